"""``alsace prepare --show``: for every language one prompt with its candidates, letter by letter."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from data.preparing import make_config
from tiny import alsace

from alsace_dist.config import Config
from alsace_dist.data.rows import rows_of
from alsace_dist.data.show import prompts
from alsace_dist.errors import NotReady
from alsace_dist.files.shards import open_dataset, read_shard
from alsace_dist.stages.prepare import prepare

TEXTS = {
    "ar": "قال: «أنا في البيت».",
    "en": "cafe\u0301 \U0001f469\u200d\U0001f52c",
    "th": "น้ำใจ\u2028ครับ",
    "zh": "𠮷野家",
}
TASK = {
    "template": {"default": "{text} <extra_id_0>", "zh": "{text}，<extra_id_0>"},
    "verbalizers": {"default": ["great", "terrible"], "zh": ["好", "坏"]},
    "decoder_prefix": "<extra_id_0>",
}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_groups(**sizes: int) -> None:
    """Groups of a file in the first languages of TEXTS."""
    for name, size in sizes.items():
        texts = {language: f"{text} {name}" for language, text in list(TEXTS.items())[-size:]}
        lines = [
            {"id": f"{name}1", "label": "bad", "texts": {"en": "alone"}},
            {"id": f"{name}2", "label": "bad", "texts": texts},
        ]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def config(**data: Any) -> Config:
    inputs = [{"path": "test.jsonl", "split": "test"}, {"path": "more.jsonl", "split": "unlabeled"}]
    return make_config(inputs, TASK, **data)


def test_every_language_is_shown_once_in_as_few_groups_as_there_are() -> None:
    write_groups(test=3, more=4)
    made = config(min_parallel=0.0)
    prepare(made, Path("run/data"))
    lines = list(prompts(made))
    assert [line for line in lines if not line.startswith(" ")] == [
        "ar: unlabeled, more2",
        "en: test, test2",
        "th: test, test2",
        "zh: test, test2",
    ]
    assert lines[-4:] == [
        "zh: test, test2",
        "  𠮷野家 test，<extra_id_0>",
        "    <extra_id_0> 好",
        "    <extra_id_0> 坏  (right)",
    ]
    assert lines[:4] == [
        "ar: unlabeled, more2",
        "  قال: «أنا في البيت». more <extra_id_0>",
        "    <extra_id_0> great",
        "    <extra_id_0> terrible",  # labels of the unlabeled are withheld
    ]


def test_what_is_shown_is_what_models_are_given() -> None:
    write_groups(test=4, more=4)
    made = config(min_parallel=0.0)
    prepare(made, Path("run/data"))
    dataset = open_dataset("run/data/test")
    groups = [group for shard in dataset.shards for group in read_shard(dataset, shard) if len(group.texts) > 1]
    for row in rows_of(made.task, groups, TEXTS):
        assert "".join(part.content for part in row.prompt) in {line.strip(" ") for line in prompts(made)}
        assert TEXTS[row.language] in row.prompt[0].content


def test_the_command_prepares_and_then_shows() -> None:
    write_groups(test=4, more=4)
    value = config(min_parallel=0.0).model_dump(mode="json", exclude_unset=True) | {"finetune": None}
    Path("run.yaml").write_text(yaml.safe_dump(value), encoding="utf-8")
    shown = alsace("prepare", "run.yaml", "--show").stdout
    assert "en: test, test2\n  cafe\u0301 \U0001f469\u200d\U0001f52c test <extra_id_0>\n" in shown
    assert alsace("prepare", "run.yaml", "--show").stdout == shown
    value["data"] = {"directory": "run/data"}
    Path("other.yaml").write_text(yaml.safe_dump(value | {"run_dir": "other"}), encoding="utf-8")
    assert alsace("prepare", "other.yaml", "--show").stdout == shown
    assert not Path("other").exists()


def test_nothing_prepared_is_nothing_to_show() -> None:
    with pytest.raises(NotReady, match=r"run/data/.*manifest\.json: no such file"):
        list(prompts(config()))
