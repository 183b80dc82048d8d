"""What the tokenizer makes of the texts is counted by language, and stops a run where nothing of a language is left."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from alsace_dist.config_file import load_config
from alsace_dist.data.rows import EncodedRow, answers_of
from alsace_dist.data.texts import TextCounts, check_texts, count, lines, parse_texts, total
from alsace_dist.errors import UserError
from alsace_dist.files.shards import Dataset, ParallelGroup, write_dataset
from alsace_dist.models.family import Family, open_model


def encoded(language: str, num_tokens: int, num_unknown: int = 0, is_cut: bool = False) -> EncodedRow:
    return EncodedRow("k", language, None, [5] * num_tokens, None, num_unknown, is_cut)  # type: ignore[arg-type]


def test_counts_add_up_by_language_and_only_what_stands_out_is_said() -> None:
    rows = [encoded("ti", 10, 4), encoded("en", 400), encoded("ti", 30, 6, True), encoded("en", 100, 5)]
    found = total([count(rows[:2]), count(rows[2:])])
    assert found == count(rows)
    assert found["ti"] == TextCounts(num_rows=2, num_tokens=40, num_unknown=10, num_cut=1)
    assert list(found) == ["en", "ti"]
    assert lines(found) == [
        "ti: 25.0% of its tokens are unknown to the model",
        "ti: 1 of 2 prompts were cut at task.max_tokens",
    ]


@pytest.mark.parametrize("value", [[], {"en": 3}, {"en": {"num_rows": "x"}}, {"en": {"other": 1}}])
def test_counts_that_are_none_are_refused_with_the_file(value: Any) -> None:
    with pytest.raises(UserError, match=r"m\.json: texts"):
        parse_texts(value, Path("m.json"))


@pytest.fixture
def model(world: Path) -> Family:
    task = load_config(tiny.write_config(world / "t.yaml", tiny.make_config(world))).task
    return open_model(world / "model", answers_of(task, ["en", "zgh"]))


def dataset(directory: Path, texts: dict[str, str]) -> Dataset:
    groups = [
        ParallelGroup(f"g{i}", None, {language: {"text": text} for language, text in texts.items()}) for i in range(25)
    ]
    return write_dataset(directory, groups, tuple(tiny.LABELS), 25, {})


def test_shards_are_looked_at_until_there_are_rows_enough(world: Path, tmp_path: Path, model: Family) -> None:
    groups = [ParallelGroup(f"g{i}", None, {"en": {"text": "red"}, "zgh": {"text": "ⴰⵣⵓⵍ"}}) for i in range(25)]
    data = write_dataset(tmp_path / "d", groups, tuple(tiny.LABELS), 8, {})
    strict = load_config(tiny.write_config(tmp_path / "c.yaml", tiny.make_config(world)))
    model.answers = answers_of(strict.task, ["en", "zgh"])
    with pytest.raises(UserError, match=r"zgh: .*data\.max_unknown"):
        check_texts(model.encode, data, ["en", "zgh"], strict)


@pytest.mark.parametrize(
    ("texts", "limit", "said"),
    [
        ({"en": "red tree", "zgh": "ⴰⵣⵓⵍ ⴰⵎⴰⵣⵉⵖ"}, "max_unknown", "zgh: .* tokens are unknown to the model"),
        ({"en": "red tree " * 60, "zgh": "red"}, "max_cut", "en: the texts of 100% of the prompts are cut"),
    ],
)
def test_a_language_of_which_nothing_reaches_the_model_stops_before_the_work(
    world: Path, tmp_path: Path, model: Family, texts: dict[str, str], limit: str, said: str
) -> None:
    data = dataset(tmp_path / "d", texts)
    path = tiny.write_config(tmp_path / "c.yaml", tiny.make_config(world, task={"max_tokens": 64}))
    strict, loose = load_config(path), load_config(path, {f"data.{limit}": 1.0})
    model.answers = answers_of(strict.task, ["en", "zgh"])
    with pytest.raises(UserError, match=rf"{said}.*data\.{limit}"):
        check_texts(model.encode, data, ["en", "zgh"], strict)
    check_texts(model.encode, data, ["en", "zgh"], loose)
    (language,) = {"en", "zgh"} - {said[: said.index(":")]}
    check_texts(model.encode, data, [language], strict)
