"""Configs that go wrong: one line that names the key and the remedy, no traceback, nothing made or touched."""

from pathlib import Path

import pytest

from alsace_dist.config_file import parse_value
from alsace_dist.errors import UserError
from alsace_dist.pipeline import load_run

_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
)
_DEMO = (Path(__file__).parents[2] / "alsace_dist/presets/demo.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!int foo",
        "seed: !!timestamp foo",
        "run_dir: !!python/object/apply:os.system ['touch touched']",
        "a: " + "[" * 3_000 + "]" * 3_000,
        "engine: {deepspeed: &a {x: *a}}",
        "seed: " + "9" * 5_000,
        _BOMB,
        "- a list",
        "",
        "a: [",
    ],
    ids=["int", "timestamp", "code", "deep", "recursive", "digits", "bomb", "list", "empty", "cut"],
)
def test_yaml_that_no_config_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_run("run.yaml", {})
    shown = str(caught.value)
    assert "run.yaml" in shown
    assert "\n" not in shown
    assert len(shown) < 1_000
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run_dir", " "),
        ("run_dir", "s3://bucket/run"),
        ("task.labels", {"good": None, "bad": None}),
        ("task.labels", ["good", None]),
        ("task.labels", [["good"], "bad"]),
        ("task.max_tokens", 1),
        ("data.languages", ["en", "en", "de"]),
        ("engine.deepspeed", {"nonsense": 1}),
        ("engine.deepspeed", {"gradient_allreduce_op": "sum"}),
        ("engine.deepspeed", {"compile": {}}),
        ("engine.deepspeed", {"data_types": 3}),
        ("engine.deepspeed", {"wandb": {"enabled": True}}),
        ("engine.deepspeed", {"amp": {"enabled": True}}),
    ],
)
def test_a_setting_that_would_go_wrong_is_refused_by_its_key(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(_DEMO, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_run(str(path), {"run_dir": str(tmp_path / "run")} | {key: value})
    assert key.rpartition(".")[2] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [one.name for one in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(("text", "value"), [("{calibrate: false}", {"calibrate": False}), ("{de: 0}", {"de": 0})])
def test_a_mapping_of_falsy_values_on_the_command_line_is_a_mapping(text: str, value: object) -> None:
    assert parse_value(text) == value
