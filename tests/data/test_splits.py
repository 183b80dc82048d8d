"""Groups of one unit, such as the sentences of a document, are never in two splits."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data.preparing import by_key, make_config, record, write_jsonl

from alsace_dist.errors import UserError
from alsace_dist.stages.prepare import prepare

RUN = Path("run/data")
SPLITS = ("test", "labeled", "unlabeled")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_documents(path: str, num_documents: int, size: int, first: int = 0) -> None:
    """Groups of ``size`` sentences a document, documents one after another."""
    numbers = range(first, first + num_documents * size)
    write_jsonl(path, [record(number) | {"unit": f"doc{number // size}"} for number in numbers])


def units(split: str, size: int = 3) -> Counter[int]:
    return Counter(int(key.removeprefix("g")) // size for key in by_key(split))


def details() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RUN / "manifest.json").read_text())["details"]
    return found


@pytest.mark.parametrize("seed", range(5))
def test_numbers_are_met_exactly_and_what_is_left_of_a_unit_goes_nowhere(seed: int) -> None:
    write_documents("a.jsonl", 40, 3)
    prepare(make_config([{"path": "a.jsonl"}], seed=seed, splits={"test": 20, "labeled": 10, "unlabeled": 50}), RUN)
    found = {split: units(split) for split in SPLITS}
    assert {split: sum(counts.values()) for split, counts in found.items()} == {
        "test": 20,
        "labeled": 10,
        "unlabeled": 50,
    }
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == 7 + 4 + 17
    assert details()["num_left_out"] == 40


@pytest.mark.parametrize("shares", [(0.5, 0.25, 0.25), (0.34, 0.33, 0.33), (0.1, 0.1, 0.8)])
def test_shares_of_one_in_all_lose_nothing_and_part_no_unit(shares: tuple[float, ...]) -> None:
    write_documents("a.jsonl", 21, 3)
    prepare(make_config([{"path": "a.jsonl"}], splits=dict(zip(SPLITS, shares, strict=True))), RUN)
    found = {split: units(split) for split in SPLITS}
    assert sum(counts.total() for counts in found.values()) == 63
    assert sum(map(len, found.values())) == 21
    for split, share in zip(SPLITS, shares, strict=True):
        assert abs(found[split].total() - share * 63) <= 3


def test_the_test_groups_stay_when_more_is_asked_for() -> None:
    write_documents("a.jsonl", 40, 3)
    prepare(make_config([{"path": "a.jsonl"}], splits={"test": 20, "unlabeled": 30}), RUN)
    before = set(by_key("test"))
    prepare(make_config([{"path": "a.jsonl"}], splits={"test": 20, "labeled": 30, "unlabeled": 60}), RUN)
    assert set(by_key("test")) == before


def test_the_first_groups_of_a_split_are_of_many_units() -> None:
    """Few-shot takes the first ones: three sentences of one document would be one example."""
    write_documents("a.jsonl", 100, 3)
    prepare(make_config([{"path": "a.jsonl"}], splits={"labeled": 300}), RUN)
    first = list(by_key("labeled"))[:20]
    assert len({int(key.removeprefix("g")) // 3 for key in first}) > 15


def test_a_unit_of_an_input_with_a_split_is_in_no_other_split() -> None:
    """The test has half of documents 0 to 9; the other half is neither trained on nor, without a split, divided."""
    numbers = range(60)
    rows = [record(number) | {"unit": f"doc{number // 6}"} for number in numbers]
    write_jsonl("test.jsonl", [row for row in rows if int(row["id"][1:]) % 6 < 2])
    write_jsonl("train.jsonl", [row for row in rows if int(row["id"][1:]) % 6 in (2, 3)] + [record(90)])
    write_jsonl("rest.jsonl", [row for row in rows if int(row["id"][1:]) % 6 > 3] + [record(91), record(92)])
    inputs = [{"path": "test.jsonl", "split": "test"}, {"path": "train.jsonl", "split": "labeled"}]
    prepare(make_config([*inputs, {"path": "rest.jsonl"}], splits={"unlabeled": 2}), RUN)
    assert len(by_key("test")) == 20
    assert set(by_key("labeled")) == {"g90"}
    assert set(by_key("unlabeled")) == {"g91", "g92"}
    assert details()["num_other_unit"] == 40


def test_more_than_there_is_without_parting_a_unit_is_said() -> None:
    write_documents("a.jsonl", 4, 5)
    with pytest.raises(
        UserError, match=r"data\.splits\.unlabeled: asks for 10 groups, and there are 5 where the group"
    ):
        prepare(make_config([{"path": "a.jsonl"}], splits={"test": 9, "labeled": 1, "unlabeled": 10}), RUN)


def test_the_source_language_says_the_unit_where_languages_differ() -> None:
    lines = ["id,language,text,label,doc"]
    for number in range(30):
        lines += [f"{number},en,x{number},good,en{number // 3}", f"{number},de,y{number},good,de{number // 5}"]
    Path("a.csv").write_text("\n".join(lines))
    source = {"kind": "table", "path": "a.csv", "columns": {"unit": "doc"}}
    for language, size in (("en", 3), ("de", 5)):
        prepare(make_config([source], splits={"test": 15, "unlabeled": 15}, source_language=language), RUN)
        documents = [{int(key) // size for key in by_key(split)} for split in ("test", "unlabeled")]
        assert not documents[0] & documents[1]
