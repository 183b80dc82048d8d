"""GeoMLAMA: candidates in one order, several right answers, languages that stand apart, the gap in the text; and what
may be wrong with its files."""

from pathlib import Path
from typing import Any

import pytest
from data.preparing import by_key, make_config, problems
from tasks import publishing
from tasks.publishing import GAPS, PLACES, QUESTIONS, RIGHT

from alsace_dist.config import Config
from alsace_dist.data.show import prompts
from alsace_dist.errors import UserError
from alsace_dist.stages.prepare import prepare
from alsace_dist.tasks import geomlama

RUN = Path("run/data")
TEST = {"kind": "geomlama", "path": "set", "split": "test"}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publishing.geomlama("set")


def config_of(one: dict[str, Any] | None = None, **data: Any) -> Config:
    return make_config([one or TEST], GAPS, **data)


def test_candidates_are_in_one_order_and_answers_are_numbers_of_theirs() -> None:
    prepare(config_of(), RUN)
    groups = by_key("test")
    assert len(groups) == 2 * 5 * 5
    for concept, questions in QUESTIONS.items():
        for country, name in enumerate(geomlama.COUNTRIES):
            for number in range(5):
                group = groups[f"{concept:02d}-{name.replace(' ', '_')}-{number}"]
                right = RIGHT[concept][country]
                assert group.label == (right[0] if len(right) == 1 else tuple(right)) and group.apart == {}
                assert group.category == name
                for language, (sentence, _) in questions.items():
                    text = sentence.format(PLACES[language][country]) + (f" ({number})" if number else "")
                    assert group.texts[language] == {"prompt": text}
                    assert group.candidates[language] == tuple(publishing.geo_candidates(concept, language))


@pytest.mark.parametrize(("part", "numbers"), [("prompts", "0"), ("paraphrases", "1234")])
def test_one_part_alone(part: str, numbers: str) -> None:
    prepare(config_of(TEST | {"hub_split": part}), RUN)
    assert {key[-1] for key in by_key("test")} == set(numbers)
    with pytest.raises(UserError, match=r"hub_split: 'dev' is no part of GeoMLAMA; set it to one of prompts, para"):
        prepare(config_of(TEST | {"hub_split": "dev"}), Path("other/data"))


def test_the_prompts_of_one_concept_and_country_are_in_one_split() -> None:
    prepare(config_of({"kind": "geomlama", "path": "set"}, splits={"test": 0.5, "unlabeled": 0.5}), RUN)
    units = [{key[:-2] for key in by_key(split)} for split in ("test", "unlabeled")]
    assert not units[0] & units[1] and len(units[0] | units[1]) == 10


def test_a_word_listed_twice_is_one_and_such_a_language_stands_apart(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path("set/gd_prompt_sw.tsv")
    path.write_text(path.read_text("utf-8").replace("katikati, popote", "katikati, katikati"), "utf-8")
    prepare(config_of(), RUN)
    group = by_key("test")["00-Iran-3"]
    assert group.candidates["sw"] == ("kulia", "kushoto", "katikati") and group.apart == {"sw": (0, 2)}
    assert group.label == (0, 2) and set(group.candidates) == set(PLACES)
    assert "test: rows whose candidates correspond to no other language's, never distilled: sw 25" in (
        capsys.readouterr().err
    )


def test_what_the_prompts_of_all_countries_have_in_common() -> None:
    found = {(row.key, row.language): row.fields["without_country"] for row in geomlama.rows(config_of().data.inputs[0])
             if not isinstance(row, geomlama.FoundProblem)}  # fmt: skip
    assert {language: found["00-Kenya-0", language] for language in PLACES} == {
        "en": "In cars keep <mask>.",
        "zh": "的车靠<mask>",
        "hi": "में कारें <mask> चलती हैं।",
        "fa": "<mask> سمت رانندگی در است",
        "sw": "Magari ya huenda <mask>",
    }
    assert found["01-Iran-2", "en"] == 'The driver of sits "<mask>". (2)'
    assert geomlama._common(["a <mask> b", "<mask> c"]) == "<mask>"


def test_prompts_are_shown_with_their_gap_and_all_right_answers() -> None:
    config = make_config([TEST], {**GAPS, "template": "geomlama/native"})
    task = {"template": "geomlama/native"}
    config = Config.model_validate({"run_dir": "run", "model": {"path": "m"}, "data": {"inputs": [TEST]}, "task": task})
    assert config.task.fields == ["prompt"]
    prepare(config, RUN)
    shown = "\n".join(prompts(config))
    key = next(line for line in shown.splitlines() if line.startswith("zh:")).rpartition(" ")[2]
    group = by_key("test")[key]
    assert group.texts["zh"]["prompt"].replace("<mask>", "{answer}") in shown
    task = task | {"candidate_score": "mean_pmi"}
    config = Config.model_validate({"run_dir": "run", "model": {"path": "m"}, "data": {"inputs": [TEST]}, "task": task})
    assert config.task.fields == ["prompt", "without_country"]


# --- what is wrong with a file -------------------------------------------------------------------------------------


def spoil(path: str, number: int, line: bytes | None) -> None:
    """Replace a line of a file (from 1); None: remove it."""
    lines = Path(path).read_bytes().split(b"\n")
    lines[number - 1 : number] = [] if line is None else [line]
    Path(path).write_bytes(b"\n".join(lines))


def test_rows_that_are_wrong() -> None:
    spoil("set/gd_prompt_en.tsv", 2, b"In the US cars keep <mask>.\t?\tright\r")
    spoil("set/gd_prompt_zh.tsv", 3, "x <mask>\t?\t东\t右, 左, 中, 任意\t\r".encode())
    spoil("set/gd_prompt_hi.tsv", 4, "कारें चलती हैं\t?\tबाएं\tबाएं, दायें, बीच, कहीं\t\r".encode())
    spoil("set/gd_prompt_fa.tsv", 5, "<mask> <mask>\t?\tراست\tراست, چپ, وسط, هرجا\t\r".encode())
    spoil("set/gd_prompt_sw.tsv", 6, b"x <mask>\t?\tkulia\tkulia, kushoto, katikati, popote\t\r")
    spoil("set/gd_prompt_en_aug.tsv", 21, b"a\tb <mask>\r")
    spoil("set/gd_prompt_zh_aug.tsv", 22, b"\xff <mask>\r")
    with pytest.raises(UserError):
        prepare(config_of(), RUN)
    assert [line for line in problems() if "_aug.tsv" not in line] == [
        "set/gd_prompt_en.tsv:2: broken row: 3 cells under 5 columns",
        "set/gd_prompt_fa.tsv:5: no gap: fa holds <mask> 2 times where a prompt has it once",
        "set/gd_prompt_fa.tsv:5: conflicting labels: id '00-Iran-0' has (0,) here and (0, 2) at set/gd_prompt_en.tsv:5",
        "set/gd_prompt_hi.tsv:4: no gap: hi holds <mask> 0 times where a prompt has it once",
        "set/gd_prompt_sw.tsv:6: conflicting labels: id '00-Kenya-0' has (0,) here and (1,) at set/gd_prompt_en.tsv:6",
        "set/gd_prompt_zh.tsv:3: unknown label: '东' is not one of the candidates 右, 左, 中, 任意",
    ]
    assert [line for line in problems() if "_aug.tsv" in line][:2] == [
        "set/gd_prompt_en_aug.tsv:21: broken row: 2 cells in a file of one column",
        "set/gd_prompt_fa_aug.tsv:4: conflicting labels: id '00-Iran-1' has (0,) here and (0, 2) at "
        "set/gd_prompt_en_aug.tsv:4",
    ]
    assert "set/gd_prompt_zh_aug.tsv:22: invalid UTF-8: byte 1 of the line: invalid start byte" in problems()
    prepare(config_of(on_bad="skip", max_skipped=1.0), RUN)
    kept = by_key("test")
    assert all(len(group.texts) == 5 for group in kept.values())  # a group with an unreadable row is left out whole
    assert not {"00-United_States-0", "00-China-3", "01-United_States-1", "01-China-1"} & kept.keys()


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (
            "gd_prompt_sw.tsv",
            "set/gd_prompt_sw.tsv:11: row count: ends here after 9 rows, where most",
        ),
        ("gd_prompt_sw_aug.tsv", "39 paraphrases of 10 prompts, where each has 4"),
    ],
)
def test_rows_that_are_missing_cannot_be_skipped(file: str, said: str) -> None:
    spoil(f"set/{file}", 3, None)
    with pytest.raises(UserError, match="a different row count cannot be skipped"):
        prepare(config_of(on_bad="skip", max_skipped=1.0), RUN)
    assert any(said in line for line in problems())


def test_a_bom_blank_lines_and_what_looks_like_the_end_of_a_line() -> None:
    for path in Path("set").iterdir():
        data = path.read_bytes().replace(b"\r\n", b"\r\n\r\n").replace(b"cars keep", "cars\u2028keep".encode())
        path.write_bytes(b"\xef\xbb\xbf" + data)
    prepare(config_of(), RUN)
    assert len(by_key("test")) == 50
    assert by_key("test")["00-Kenya-0"].texts["en"]["prompt"] == "In Kenya cars\u2028keep <mask>."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: Path("set/gd_prompt_sw_aug.tsv").unlink(), r"set/gd_prompt_sw_aug\.tsv: no such file; restore it, or"),
        (lambda: spoil("set/gd_prompt_en.tsv", 1, b"Prompt\tAns\r"), r"no column 'Candidate Ans' among Prompt, Ans"),
        (lambda: [path.unlink() for path in Path("set").iterdir()], r"holds no gd_prompt_LANGUAGE\.tsv"),
    ],
)
def test_files_that_are_not_there(change: Any, said: str) -> None:
    change()
    with pytest.raises(UserError, match=said):
        prepare(config_of(), RUN)
    with pytest.raises(UserError, match=r"holds no gd|GeoMLAMA is here in en, zh, hi, fa, sw, and not in de"):
        prepare(config_of(languages=["de"], source_language="de"), RUN)
