"""What became of the inputs is counted and shown, and stops a run where it is not what a person thinks it is."""

import json
from pathlib import Path
from typing import Any

import pytest
from data.preparing import by_key, make_config, record, write_jsonl

from alsace_dist.errors import UserError
from alsace_dist.stages.prepare import prepare

RUN = Path("run/data")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def details() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RUN / "manifest.json").read_text())["details"]
    return found


def test_the_audit_counts_languages_rows_and_labels() -> None:
    rows = [record(1), record(2, "bad"), record(3, languages=("en",)), record(4, languages=("en", "de", "fr"))]
    write_jsonl("a.jsonl", rows)
    write_jsonl("b.jsonl", [record(5, None), record(6, None, ("en", "de"))])
    prepare(make_config([{"path": "a.jsonl", "split": "test"}, {"path": "b.jsonl", "split": "unlabeled"}]), RUN)
    audit = details()["audit"]
    test = audit["splits"]["test"]
    assert test["languages_per_group"] == {"1": 1, "2": 2, "3": 1}
    assert test["rows"] == {"de": 3, "en": 4, "fr": 1}
    assert test["labels"]["en"] == {"bad": 1, "good": 3}
    assert audit["splits"]["unlabeled"]["labels"] == {}
    assert audit["only_in_one_split"] == {"fr": "test"}


def test_ids_that_do_not_join_stop_the_run_with_the_remedy() -> None:
    """As in files with ids en_dev0001 and de_dev0001: no group has two languages."""
    rows = [{**record(i, languages=(lang,)), "id": f"{lang}_{i}"} for i in range(10) for lang in ("en", "de")]
    write_jsonl("a.jsonl", rows)
    with pytest.raises(
        UserError, match=r"of the 20 groups of split test only 0 are in two languages .*columns\.id: null"
    ):
        prepare(make_config([{"path": "a.jsonl", "split": "test"}]), RUN)
    assert not RUN.exists()
    prepare(make_config([{"path": "a.jsonl", "split": "test"}], min_parallel=0.0), RUN)


@pytest.mark.parametrize(
    "names", [("zh-CN", "zh_CN"), ("pt_BR", "pt-br"), ("de", "deu"), ("iw", "he"), ("swh_Latn", "SWH-latn")]
)
def test_a_language_under_two_names_is_refused(names: tuple[str, str]) -> None:
    write_jsonl("a.jsonl", [record(i, languages=("en", names[0])) for i in range(3)])
    write_jsonl("b.jsonl", [record(i, languages=("en", names[1])) for i in range(10, 13)])
    config = make_config([{"path": "a.jsonl", "split": "test"}, {"path": "b.jsonl", "split": "unlabeled"}])
    with pytest.raises(UserError, match="one language has two names") as caught:
        prepare(config, RUN)
    assert all(repr(name) in str(caught.value) for name in names)


def test_skipping_may_not_empty_a_class() -> None:
    """The label of one class is spelt otherwise: 3 of 30 records are bad, all of them of that class."""
    write_jsonl("a.jsonl", [record(i) for i in range(27)] + [record(i, "Bad") for i in range(27, 30)])
    config = make_config([{"path": "a.jsonl", "split": "test"}], on_bad="skip")
    with pytest.raises(UserError, match=r"leaves out 3 of 3 records of input a\.jsonl, label 'Bad'"):
        prepare(config, RUN)


def test_skipping_may_not_leave_a_handful() -> None:
    write_jsonl("a.jsonl", [record(i, None if i else "good") for i in range(10)])  # a test group needs a label
    config = make_config([{"path": "a.jsonl", "split": "test"}], on_bad="skip")
    with pytest.raises(UserError, match=r"leaves out 9 of 10 records of split test"):
        prepare(config, RUN)


def test_a_text_that_stands_for_a_missing_translation_is_no_text() -> None:
    """As NS in PAWS-X: the language is missing in that group, and counted."""
    rows = [record(i) for i in range(5)]
    rows[2]["texts"]["de"]["text"] = " NS "
    write_jsonl("a.jsonl", rows)
    prepare(make_config([{"path": "a.jsonl", "split": "test"}], missing=["NS"]), RUN)
    assert set(by_key("test")["g2"].texts) == {"en"}
    assert details()["num_missing"] == {"de": 1}
