"""The run's YAML: what is wrong in it gets one line with file, key and remedy; what is right comes back as it was."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from alsace_dist.config import METHODS, Config, RawSection, Section
from alsace_dist.config_file import config_text, load_config, parse_value, variant
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import write_text

BASE: dict[str, Any] = {
    "run_dir": "runs/x",
    "task": {"fields": ["premise", "hypothesis"], "template": "{premise} {hypothesis}", "labels": ["a", "b"]},
    "data": {"inputs": [{"path": "x.jsonl"}], "splits": {"labeled": 100, "unlabeled": 0.5}},
    "model": {"path": "google/mt5-small"},
}

NANO = {"path": None, "nano": {"d_model": 64}}


def merged(base: Any, over: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return base | {key: merged(base.get(key), value) for key, value in over.items()}


def write(directory: Path, over: dict[str, Any] | None = None, text: str | None = None) -> Path:
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(merged(BASE, over or {})) if text is None else text, encoding="utf-8")
    return path


def load(directory: Path, over: dict[str, Any] | None = None, **overrides: Any) -> Config:
    return load_config(write(directory, over), overrides)


def complaint(directory: Path, over: dict[str, Any] | None = None, text: str | None = None, **overrides: Any) -> str:
    """The message without the file's name, which every message begins with; always one line."""
    path = write(directory, over, text)
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


# --- errors --------------------------------------------------------------------------------------------------------

INPUT = {"path": "x.jsonl"}
UNKNOWN = [
    ({"foo": 1}, "foo", "data, distill, engine"),
    ({"engine": {"zero": 3}}, "engine.zero", "deepspeed, dtype"),
    ({"data": {"sorce_language": "en"}}, "data.sorce_language", "cache, cache_gb, directory"),
    ({"data": {"inputs": [INPUT, INPUT | {"pth": "y"}]}}, "data.inputs.1.pth", "also, columns, header, hub_split"),
    (
        {"data": {"inputs": [INPUT | {"columns": {"lable": "y"}}]}},
        "data.inputs.0.columns.lable",
        "fields, id, label, language",
    ),
    ({"model": {"path": None, "nano": {"layers": 2}}}, "model.nano.layers", "d_ff, d_kv, d_model"),
    ({"finetune": {"epochs": 2}}, "finetune.epochs", "best_by, checkpoint_every_steps"),
    ({"variants": {"v": {"select": {"rul": "all"}}}}, "variants.v: select.rul", "beta, calibration"),
]


@pytest.mark.parametrize(("over", "key", "known"), UNKNOWN, ids=[key for _, key, _ in UNKNOWN])
def test_unknown_key(tmp_path: Path, over: dict[str, Any], key: str, known: str) -> None:
    assert complaint(tmp_path, over).startswith(f"{key}: unknown key; known here: {known}")


WRONG = [
    ({"rounds": "many"}, "rounds: Input should be a valid integer"),
    ({"rounds": -1}, "rounds: Input should be greater than or equal to 0, not -1"),
    ({"seed": 1.5}, "seed: Input should be a valid integer"),
    ({"task": {"labels": "ab"}}, "task.labels: must be a list, in the order that answers have, not 'ab'"),
    ({"task": {"fields": []}}, "task.fields: List should have at least 1 item"),
    ({"data": None}, "data: must be a mapping of keys to values"),
    ({"data": {"inputs": {"path": "x"}}}, "data.inputs: Input should be a valid list"),
    ({"data": {"inputs": [{"path": 3}]}}, "data.inputs.0.path: Input should be a valid string, not 3"),
    ({"data": {"splits": {"test": 0}}}, "data.splits.test: Input should be greater than 0, not 0"),
    ({"data": {"exposure": {"de": 1.5}}}, "data.exposure.de: Input should be less than or equal to 1, not 1.5"),
    ({"engine": {"zero_stage": 4}}, "engine.zero_stage: Input should be 0, 1, 2 or 3, not 4"),
    ({"engine": {"deepspeed": [1]}}, "engine.deepspeed: must be a mapping of keys to values, not [1]"),
    ({"distill": {"learning_rate": 0}}, "distill.learning_rate: Input should be greater than 0, not 0"),
    ({"distill": {"learning_rate": "fast"}}, "distill.learning_rate: Input should be a valid number"),
    ({"method": "magic"}, "method: Input should be 'paper', 'authors' or 'calibrated', not 'magic'"),
    ({"select": {"rule": "best"}}, "select.rule: Input should be 'threshold', 'top_k'"),
    ({"variants": {"v": 3}}, "variants.v: must be a mapping of keys to values, not 3"),
]


@pytest.mark.parametrize(("over", "message"), WRONG, ids=[message.split(":")[0] for _, message in WRONG])
def test_wrong_type_or_value(tmp_path: Path, over: dict[str, Any], message: str) -> None:
    assert complaint(tmp_path, over).startswith(message)


UNION = [
    ({"engine": {"num_processes": 0}}, "engine.num_processes"),
    ({"task": {"template": 3}}, "task.template"),
    ({"task": {"verbalizers": ["yes", 2]}}, "task.verbalizers.1"),
    ({"data": {"splits": {"tset": 3}}}, "data.splits.tset"),
    ({"variants": {"two words": {}}}, "variants.two words"),
]


@pytest.mark.parametrize(("over", "key"), UNION, ids=[key for _, key in UNION])
def test_keys_are_named_as_they_are_written(tmp_path: Path, over: dict[str, Any], key: str) -> None:
    assert complaint(tmp_path, over).startswith(f"{key}: ")


@pytest.mark.parametrize("over", [{"on_bad": "skip"}, {"groups_per_shard": 9}, {"withhold_labels": []}])
def test_settings_of_preparation_need_inputs(tmp_path: Path, over: dict[str, Any]) -> None:
    text = yaml.safe_dump(BASE | {"data": {"directory": "/d"} | over})
    assert complaint(tmp_path, text=text).startswith(f"data: {next(iter(over))} says how inputs are prepared")


def test_missing_sections_are_all_named(tmp_path: Path) -> None:
    message = complaint(tmp_path, text="run_dir: x\nengine: {zero_stage: 9}\n")
    for key in ("task", "data", "model"):
        assert f"{key}: is needed and missing; add it" in message
    assert "engine.zero_stage: " in message


IMPOSSIBLE = [
    ({"engine": {"offload_optimizer": True, "zero_stage": 0}}, "engine: offload_optimizer needs zero_stage 1, 2 or 3"),
    ({"engine": {"deepspeed": {"bf16": {}}}}, "engine.deepspeed: bf16 is set from this config's own keys; remove it"),
    ({"engine": {"deepspeed": {"optimizer": {}}}}, "engine.deepspeed: optimizer is set"),
    (
        {"engine": {"deepspeed": {"zero_optimization": {"stage": 3}}}},
        "engine.deepspeed: zero_optimization.stage is set from this config's own keys; use engine.zero_stage",
    ),
    (
        {"engine": {"deepspeed": {"zero_optimization": {"stage3_max_live_parameters": 1}}}},
        "engine: deepspeed.zero_optimization.stage3_max_live_parameters needs zero_stage 3; remove it",
    ),
    ({"finetune": {"num_steps": 5, "num_epochs": 1}}, "finetune: give either num_steps or num_epochs"),
    ({"finetune": {"num_epochs": None}}, "finetune: give either num_steps or num_epochs"),
    ({"finetune": {"optimizer": "adafactor"}}, "finetune.optimizer adafactor needs engine.zero_stage 0; use adamw"),
    ({"distill": {"optimizer": "adafactor"}}, "distill.optimizer adafactor needs engine.zero_stage 0; use adamw"),
    ({"pretrain": {"num_steps": 5}}, "pretrain is only done for model.nano; remove the section"),
    ({"model": {"nano": {}}}, "model: give either path or nano"),
    ({"model": {"path": None}}, "model: give either path or nano"),
    ({"model": {"path": None, "nano": {}, "revision": "main"}}, "model: revision needs path"),
    ({"data": {"directory": "/d"}}, "data: give either inputs or directory"),
    ({"data": {"inputs": []}}, "data: give either inputs or directory"),
    ({"data": {"languages": ["de", "fr"]}}, "data: languages must hold the source_language 'en'"),
    ({"data": {"splits": {"test": 0.6}}}, "data: the shares in splits add up to more than 1"),
    ({"select": {"rule": "explicit"}}, "select: rule: explicit needs teachers; list them"),
    ({"select": {"teachers": ["en"]}}, "select: teachers is only used with rule: explicit; remove it"),
    ({"select": {"top_k": 2}}, "select: top_k is only used with rule: top_k; remove it"),
    ({"select": {"weighting": "equal", "beta": 2}}, "select: beta is only used with weighting: score; remove it"),
    ({"method": "paper", "select": {"reference": "pooled"}}, "select: reference is only used with calibration"),
    ({"rounds": True}, "rounds: must be a number, not true"),
    ({"engine": {"num_processes": False}}, "engine.num_processes: must be a number, not false"),
    ({"distill": {"learning_rate": float("inf")}}, "distill.learning_rate: Input should be a finite number"),
    ({"task": {"template": "{text:d}"}}, "task: template for default must hold bare {field}s"),
    ({"task": {"template": "{text!r}"}}, "task: template for default must hold bare {field}s"),
    ({"rounds": 0}, "rounds: 0 changes nothing; set it to 1, or set evaluate.calibrate: true"),
    ({"method": "paper", "evaluate": {"calibrate": True}}, "evaluate.calibrate needs select.calibration: marginal"),
    ({"task": {"labels": ["a", "a"]}}, "task: labels holds 'a' twice; remove one"),
    ({"task": {"fields": ["a", "a"]}}, "task: fields holds 'a' twice; remove one"),
    ({"task": {"fields": ["premise", "a-b"]}}, "task: fields: 'a-b' is not a name that a template can hold"),
    ({"task": {"template": "{premise}"}}, "task: fields: no template uses hypothesis; remove it or use it"),
    ({"data": {"splits": {"test": True}}}, "data.splits: must be a number, not true"),
    ({"data": {"exposure": {"de": 0.5}}}, "data: exposure thins out the pretrain split, and nothing goes there"),
    ({"run_dir": ""}, "run_dir: String should have at least 1 character"),
    (
        {"model": {"path": None, "nano": {}}, "pretrain": {"freeze_vocabulary": True}},
        "pretrain.freeze_vocabulary: a new",
    ),
    ({"engine": {"deepspeed": {"managed_gradient_accumulation": False}}}, "engine.deepspeed: managed_gradient_accumu"),
    ({"variants": {"main": {}}}, "variants.main: so the report calls the run itself; choose another name"),
    ({"variants": {"v": {"select": 5}}}, "variants.v: select: must be a mapping of keys to values"),
    ({"task": {"verbalizers": ["x"]}}, "task: verbalizers for default must hold one answer per label (2)"),
    ({"task": {"verbalizers": {"de": ["x", "y", "z"]}}}, "task: verbalizers for de must hold one answer per label (2)"),
    ({"task": {"template": "{premise} {text}"}}, "task: template for default must use {field} of fields"),
    ({"task": {"template": "{premise.__class__}"}}, "task: template for default must use {field} of fields"),
    ({"task": {"template": {"de": "no braces"}}}, "task: template for de must use {field} of fields"),
    ({"task": {"template": "{premise"}}, "task: template for default is broken"),
    ({"variants": {"v": {"seed": 1}}}, "variants.v.seed: a variant may change distill, evaluate, method, ro"),
    ({"variants": {"v": {"rounds": 0}}}, "variants.v: rounds: 0 changes nothing"),
    (
        {"variants": {"v": {"method": "paper", "evaluate": {"calibrate": True}}}},
        "variants.v: evaluate.calibrate needs select.calibration: marginal",
    ),
]


@pytest.mark.parametrize(("over", "message"), IMPOSSIBLE, ids=[message for _, message in IMPOSSIBLE])
def test_impossible_combination(tmp_path: Path, over: dict[str, Any], message: str) -> None:
    assert complaint(tmp_path, over).startswith(message)


def test_splits_are_needed_for_undivided_inputs_only(tmp_path: Path) -> None:
    text = yaml.safe_dump(BASE | {"data": {"inputs": [INPUT | {"split": "test"}, INPUT]}})
    assert complaint(tmp_path, text=text) == "data: splits is needed for inputs without a split of their own"
    text = yaml.safe_dump(BASE | {"data": {"inputs": [INPUT | {"split": "test"}]}})
    assert load_config(write(tmp_path, text=text)).data.inputs[0].split == "test"


@pytest.mark.parametrize("name", ["fp16", "float16", "half"])
def test_fp16_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    message = "engine.dtype: fp16 overflows in T5's layers; use bf16 or fp32"
    assert complaint(tmp_path, {"engine": {"dtype": name}}) == message
    raw = complaint(tmp_path, {"engine": {"deepspeed": {"fp16": {"enabled": True}}}})
    assert raw.startswith("engine.deepspeed: fp16 is set from this config's own keys")


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (
            {"engine": {"deepspeed": {"zero_optimisation": {}}}},
            "engine.deepspeed.zero_optimisation: unknown key; known here: comms_logger, communication_data_type, ",
        ),
        ({"task": {"verbalizers": ["x", "x"]}}, "task: verbalizers for default must be different answers"),
        ({"task": {"verbalizers": {"en": ["x", " "]}}}, "task: verbalizers for en must be different answers"),
        ({"task": {"max_tokens": 10**23}}, "task.max_tokens: "),
        ({"engine": {"timeout_seconds": 1e300}}, "engine.timeout_seconds: "),
        ({"rounds": 10**12}, "rounds: "),
    ],
)
def test_what_would_fail_late_or_be_passed_over(tmp_path: Path, over: dict[str, Any], words: str) -> None:
    assert complaint(tmp_path, over).startswith(words)


CRASHES = [
    ({"engine": {"deepspeed": {"zero_optimization": 3}}}, "engine.deepspeed.zero_optimization"),
    ({"engine": {"deepspeed": None}}, "engine.deepspeed"),
    ({"method": ["paper"]}, "method"),
]


@pytest.mark.parametrize(("over", "key"), CRASHES, ids=str)
def test_wrong_types_where_validators_look(tmp_path: Path, over: dict[str, Any], key: str) -> None:
    assert complaint(tmp_path, over).startswith(f"{key}: ")


@pytest.mark.parametrize("value", [None, False, 0, "", []])
@pytest.mark.parametrize("section", ["select", "distill"])
def test_a_section_that_is_none_is_not_filled_in(tmp_path: Path, section: str, value: Any) -> None:
    assert complaint(tmp_path, {section: value}).startswith(f"{section}: must be a mapping of keys to values")


def test_not_yaml_and_not_a_mapping(tmp_path: Path) -> None:
    assert complaint(tmp_path, text="a: [1\n").startswith("cannot be read as YAML: ")
    assert complaint(tmp_path, text="a: 1\nb:\n  c: 1\n  c: 2\n").startswith(
        "cannot be read as YAML: key 'c' is given twice"
    )
    for text in ("", "- a\n", "just words\n"):
        assert complaint(tmp_path, text=text) == "must be a mapping of keys to values; write `key: value`, one a line"
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"run_dir: \xff\n")
    with pytest.raises(UserError, match=r"bytes\.yaml: no UTF-8 text .*invalid start byte"):
        load_config(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.yaml: no such file; give the path of a run's YAML$"):
        load_config(tmp_path / "gone.yaml")
    with pytest.raises(UserError, match=r"is a directory; give the path"):
        load_config(tmp_path)


def test_nothing_in_the_yaml_is_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    text = f"run_dir: !!python/object/apply:os.mkdir [{marker}]\n"
    assert "could not determine a constructor" in complaint(tmp_path, text=text)
    assert not marker.exists()


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = yaml.safe_dump(BASE) + "finetune: &same {learning_rate: 2.0e-4}\ndistill:\n  <<: *same\n"
    assert load_config(write(tmp_path, text=text)).distill.learning_rate == 2e-4


# --- what YAML makes of words --------------------------------------------------------------------------------------


def test_norwegian_is_a_language(tmp_path: Path) -> None:
    """YAML 1.1 reads no, yes, on and off as booleans."""
    text = """
run_dir: x
task:
  fields: [text]
  template: {no: "nei {text}", default: "{text}"}
  labels: [yes, no]
  verbalizers: {no: [ja, nei], default: [yes, no]}
data:
  inputs: [{path: d.jsonl, split: pretrain}]
  source_language: no
  languages: [no, on, en]
  exposure: {no: 0.5, on: 0.25}
model: {path: m}
engine: {offload_optimizer: true, gradient_checkpointing: False}
"""
    config = load_config(write(tmp_path, text=text))
    assert config.task.labels == ["yes", "no"]
    assert config.task.templates()["no"] == "nei {text}"
    assert config.task.answers() == {"no": ["ja", "nei"], "default": ["yes", "no"]}
    assert config.data.source_language == "no" and config.data.languages == ["no", "on", "en"]
    assert config.data.exposure == {"no": 0.5, "on": 0.25}
    assert config.engine.offload_optimizer is True and config.engine.gradient_checkpointing is False
    write_text(tmp_path / "saved.yaml", config_text(config))
    assert load_config(tmp_path / "saved.yaml") == config


def test_codes_times_and_dates_are_names(tmp_path: Path) -> None:
    """YAML 1.1 reads them as 1, 5400 and a date."""
    config = load_config(
        write(tmp_path, text=yaml.safe_dump(BASE)), {"task.labels": parse_value("[01, 1:30:00, 2026-01-01]")}
    )
    assert config.task.labels == ["01", "1:30:00", "2026-01-01"]
    write_text(tmp_path / "saved.yaml", config_text(config))
    assert load_config(tmp_path / "saved.yaml") == config


def test_numbers_are_labels_and_exponents_are_numbers(tmp_path: Path) -> None:
    text = yaml.safe_dump(merged(BASE, {"task": {"labels": [0, 1]}})) + "distill: {learning_rate: 3e-5}\n"
    config = load_config(write(tmp_path, text=text))
    assert config.task.labels == ["0", "1"] and config.task.answers() == {"default": ["0", "1"]}
    assert config.distill.learning_rate == 3e-5


# --- overrides -----------------------------------------------------------------------------------------------------


def test_overrides_are_laid_over_the_file(tmp_path: Path) -> None:
    over = {"distill": {"learning_rate": 1e-4, "num_epochs": 2}, "finetune": None}
    raw = "engine.deepspeed.zero_optimization.sub_group_size"
    config = load(tmp_path, over, **{"distill.learning_rate": 3e-5, "seed": 7, raw: 1})
    assert (config.distill.learning_rate, config.distill.num_epochs, config.seed) == (3e-5, 2, 7)
    assert config.engine.deepspeed == {"zero_optimization": {"sub_group_size": 1}}
    assert config.finetune is None
    revived = load(tmp_path, over, **{"finetune.num_epochs": 9})
    assert revived.finetune is not None and revived.finetune.num_epochs == 9
    dropped = load(tmp_path, None, **{"finetune.num_epochs": None, "finetune.num_steps": 4})
    assert dropped.finetune is not None and (dropped.finetune.num_epochs, dropped.finetune.num_steps) == (None, 4)


def test_a_given_length_takes_the_place_of_the_default_one(tmp_path: Path) -> None:
    config = load(tmp_path, {"model": NANO, "pretrain": {"num_epochs": 2}, "distill": {"num_steps": 9}})
    assert (config.pretrain.num_epochs, config.pretrain.num_steps) == (2, None)
    assert (config.distill.num_epochs, config.distill.num_steps) == (None, 9)
    assert config.finetune is not None and (config.finetune.num_epochs, config.finetune.num_steps) == (3, None)


def test_overrides_are_checked_like_the_file(tmp_path: Path) -> None:
    assert complaint(tmp_path, **{"distill.lr": 1}).startswith(
        "distill.lr: unknown key; known here: best_by, checkpoint_ev"
    )
    assert complaint(tmp_path, **{"seed.x": 1}) == "seed: Input should be a valid integer, not {'x': 1}"
    assert complaint(tmp_path, **{"engine.dtype": "fp16"}).startswith("engine.dtype: fp16 overflows")


# --- methods and variants ------------------------------------------------------------------------------------------

PAPER = ("none", "threshold", "equal", "others")
CALIBRATED = ("marginal", "all", "score", "ensemble")


def parts(config: Config) -> tuple[Any, ...]:
    return config.select.calibration, config.select.rule, config.select.weighting, config.distill.targets


def test_the_method_decides_what_is_not_given(tmp_path: Path) -> None:
    assert parts(load(tmp_path)) == CALIBRATED
    assert parts(load(tmp_path, {"method": "paper"})) == PAPER
    mixed = {"method": "paper", "select": {"rule": "all", "weighting": None}, "distill": {"targets": "anchor"}}
    assert parts(load(tmp_path, mixed)) == ("none", "all", "equal", "anchor")
    assert parts(load(tmp_path, **{"method": "paper", "select.calibration": "marginal"})) == ("marginal", *PAPER[1:])


def test_every_preset_decides_the_same_parts() -> None:
    shapes = {tuple((name, *sorted(values)) for name, values in preset.items()) for preset in METHODS.values()}
    assert len(shapes) == 1
    assert {"paper", "authors", "calibrated"} == METHODS.keys()


def test_a_variant_with_another_method_takes_that_methods_presets(tmp_path: Path) -> None:
    over = {
        "select": {"beta": 3.0},
        "distill": {"num_epochs": 7},
        "variants": {
            "paper": {"method": "paper"},
            "english": {"select": {"rule": "source"}},
            "twice": {"rounds": 2, "distill": {"targets": "anchor"}},
            "mixed": {"method": "paper", "select": {"calibration": "marginal"}},
        },
    }
    config = load(tmp_path, over)
    assert parts(config) == CALIBRATED
    assert parts(variant(config, "paper")) == PAPER
    assert parts(variant(config, "english")) == ("marginal", "source", "score", "ensemble")
    assert parts(variant(config, "twice")) == ("marginal", "all", "score", "anchor")
    assert parts(variant(config, "mixed")) == ("marginal", "threshold", "equal", "others")
    for name in config.variants:
        found = variant(config, name)
        # Weights that are chosen anew have their own sharpness, if any.
        beta = None if found.select.weighting == "equal" else 3.0
        assert (found.variants, found.select.beta, found.distill.num_epochs) == ({}, beta, 7)
        for shared in ("run_dir", "seed", "task", "data", "model", "engine", "finetune", "score"):
            assert getattr(found, shared) == getattr(config, shared)
    assert variant(config, "twice").rounds == 2


def test_a_variant_with_another_method_keeps_what_the_config_gives_itself(tmp_path: Path) -> None:
    over = {"method": "paper", "select": {"rule": "top_k", "top_k": 2}, "variants": {"v": {"method": "calibrated"}}}
    assert parts(variant(load(tmp_path, over), "v")) == ("marginal", "top_k", "score", "ensemble")


def test_an_unknown_variant(tmp_path: Path) -> None:
    config = load(tmp_path, {"variants": {"a": {}, "b": {}}})
    with pytest.raises(UserError, match=r"^variants\.c: no such variant; the config has a, b$"):
        variant(config, "c")


# --- saved and loaded again ----------------------------------------------------------------------------------------

WHOLE = {
    "seed": 3,
    "task": {"labels": ["1", "no"], "verbalizers": {"default": ["a b", "ü"], "no": ["x", "y"]}},
    "engine": {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 5e8}}, "zero_stage": 3, "num_processes": 2},
    "finetune": {"num_epochs": None, "num_steps": 10, "learning_rate": 1.0e-20},
    "score": {"tokens_per_batch": 77},
}
SAVED = {
    "least": {},
    "paper": {"method": "paper"},
    "nano": {"model": NANO, "pretrain": {"num_steps": 5}},
    "no finetuning": {"finetune": None},
    "steps": {"distill": {"num_steps": 7}},
    "whole": WHOLE,
    "explicit": {"select": {"rule": "explicit", "teachers": ["en", "no"]}},
    "variants": {
        "method": "paper",
        "variants": {
            "calibrated": {"method": "calibrated", "evaluate": {"calibrate": True}},
            "rounds": {"rounds": 2, "select": {"rule": "top_k", "top_k": 1}},
            "nothing": {},
        },
    },
    "calibration alone": {"rounds": 0, "evaluate": {"calibrate": True}},
}


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_config_loads_back_equal(tmp_path: Path, name: str) -> None:
    config = load(tmp_path, SAVED[name])
    saved = tmp_path / "saved.yaml"
    write_text(saved, config_text(config))
    again = load_config(saved)
    assert again == config
    for one in config.variants:
        assert variant(again, one) == variant(config, one)
    first = saved.read_bytes()
    write_text(saved, config_text(again))
    assert saved.read_bytes() == first


def test_the_saved_config_shows_every_setting(tmp_path: Path) -> None:
    write_text(tmp_path / "saved.yaml", config_text(load(tmp_path, {"method": "paper"})))
    value = yaml.safe_load((tmp_path / "saved.yaml").read_text(encoding="utf-8"))
    assert list(value) == list(Config.model_fields)
    assert value["select"]["rule"] == "threshold" and value["distill"]["targets"] == "others"
    assert value["distill"]["learning_rate"] == 5e-5


def test_a_config_does_not_change_after_loading(tmp_path: Path) -> None:
    config = load(tmp_path)
    for section, field in ((config, "seed"), (config.engine, "dtype"), (config.data.inputs[0], "path")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, field, "x")


# --- documentation -------------------------------------------------------------------------------------------------


def sections(section: type[Section] = Config) -> Iterator[type[Section]]:
    """A section and all below it, wherever they stand in an annotation."""
    yield section
    pending = [field.annotation for field in section.model_fields.values()]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from sections(annotation)
        pending += get_args(annotation)


SECTIONS = sorted(set(sections()), key=lambda section: section.__name__)


def undocumented(section: type[Section]) -> set[str]:
    """Settings without a docstring; a section within a section is documented by its class."""
    return {
        name
        for name, field in section.model_fields.items()
        if not field.description and not (isinstance(field.annotation, type) and issubclass(field.annotation, Section))
    }


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_setting_is_documented(section: type[Section]) -> None:
    """Where it is first declared; a subclass that gives another default need not say it again."""
    assert section.__doc__ and section.__doc__ != Section.__doc__
    for name in undocumented(section):
        parents = [one for one in section.__mro__ if issubclass(one, Section)]
        assert any(one.model_fields[name].description for one in parents if name in one.model_fields), name


def test_all_sections_are_found() -> None:
    assert {section.__name__ for section in SECTIONS} >= {"Config", "ColumnsConfig", "InputConfig", "NanoConfig"}
    below = {section for section in Section.__subclasses__() if section.__module__ == Section.__module__}
    while more := {sub for section in below for sub in section.__subclasses__()} - below:
        below |= more
    raw = {section for section in below if issubclass(section, RawSection)}  # which DeepSpeed documents
    assert below - set(SECTIONS) - raw == {section for section in below if section.__name__ == "TrainConfig"}


def test_the_keys_of_a_section_are_listed_once(tmp_path: Path) -> None:
    said = complaint(tmp_path, {"distill": {"dtype": "bf16", "zero_stage": 1}})
    assert said.count("known here: ") == 1
    assert said.endswith("; distill.zero_stage: unknown key; remove it")
