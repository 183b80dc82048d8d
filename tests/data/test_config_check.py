"""What would fail, or be ignored, hours later is refused before anything runs: languages, teachers, labels."""

from pathlib import Path
from typing import Any

import pytest
from data.preparing import MANY, Record, make_config, write_jsonl

from alsace_dist.config import Config
from alsace_dist.data.config_check import check_prepared
from alsace_dist.errors import UserError
from alsace_dist.stages.prepare import prepare


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("task", "data", "words"),
    [
        ({}, {"source_language": "fr"}, r"data.source_language: split test has nothing in 'fr' \(it has de, en\)"),
        ({"template": {"en": "{text}"}}, {}, "task.template: has nothing for language 'de' and no default"),
        ({"template": {"default": "{text}", "dde": "{text}"}}, {}, "task.template.dde: no split has that language"),
        ({"verbalizers": {"en": ["a", "b"]}}, {}, "task.verbalizers: has nothing for language 'de'"),
        ({}, {"exposure": {"xx": 0.5}}, "data.exposure.xx: the pretrain split has nothing in that language"),
    ],
)
def test_what_would_fail_later_is_said_now(task: Record, data: Record, words: str) -> None:
    write_jsonl("a.jsonl", MANY)
    splits = {"test": 30, "unlabeled": 30, "pretrain": 30}
    with pytest.raises(UserError, match=f"^{words}"):
        prepare(make_config([{"path": "a.jsonl"}], task, splits=splits, **data), Path("run/data"))
    assert not Path("run/data").exists()


@pytest.mark.parametrize(
    ("select", "words"),
    [
        ({"rule": "explicit", "teachers": ["en", "xx"]}, "select.teachers: 'xx' is not among the unlabeled languages"),
        ({"rule": "top_k", "top_k": 3}, "select.top_k: 3 asked for, there are 2 languages"),
    ],
)
def test_a_selection_that_cannot_be_met_is_said_before_training(select: Record, words: str) -> None:
    write_jsonl("a.jsonl", MANY)
    config = make_config([{"path": "a.jsonl"}], splits={"test": 30, "unlabeled": 30})
    for name, changed in (
        ("", {"select": select}),
        ("variants.x.", {"variants": {"x": {"select": select}}}),
    ):
        value = config.model_dump(mode="json", exclude_unset=True) | changed
        with pytest.raises(UserError, match=f"^{name}{words}"):
            prepare(Config.model_validate(value), Path("run/data"))


def test_a_prepared_dataset_must_fit_the_task() -> None:
    """Labels are stored as numbers: in another order they would mean something else."""
    write_jsonl("a.jsonl", MANY)
    prepare(make_config([{"path": "a.jsonl"}], splits={"test": 30, "unlabeled": 30, "labeled": 30}), Path("run/data"))

    def use(**task: Any) -> None:
        value = make_config([{"path": "a.jsonl", "split": "test"}], task).model_dump(mode="json", exclude_unset=True)
        check_prepared(Config.model_validate(value | {"data": {"directory": "run/data"}}))

    use()
    with pytest.raises(
        UserError, match=r"task.labels: .* was prepared with good, bad, in this order, not with bad, good"
    ):
        use(labels=["bad", "good"])
    with pytest.raises(UserError, match=r"task.template.xx: no split has that language"):
        use(template={"default": "{text}", "xx": "{text}"})
