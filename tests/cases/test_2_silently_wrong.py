"""Section 2: what would end with a wrong number and not a word is refused, or has the right value.

Elsewhere: that texts are cut and templates stay whole, and that control tokens in texts are nothing but text, in
tests/models/test_prompts.py; nothing of the working directory is imported by ranks, in tests/ranks/test_group.py.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.case import Case, forged, sign
from safetensors.torch import load_file, save_file

from alsace_dist.config_file import parse_value
from alsace_dist.files.scores import Scores, read_score_file, write_scores

FINETUNE = ("finetune", "fresh.yaml")


# --- sentinels -----------------------------------------------------------------------------------------------------


@pytest.fixture
def real(case: Case) -> Case:
    """With sentinels as mT5's vocabulary has them: ordinary pieces with a blank in front, no tokens of their own."""
    case.finish("data")
    path = case / "model/tokenizer.json"
    value = json.loads(path.read_text())
    sentinels = [one["content"] for one in value["added_tokens"] if one["content"].startswith("<extra_id_")]
    pieces = value["model"]["vocab"]
    names = {piece for piece, _ in pieces}
    pieces += [[letter, -9.0] for letter in "<>_0123456789abcdeilrtx" if letter not in names]
    pieces += [[f"▁{sentinel}", -1.0] for sentinel in sentinels]
    value["added_tokens"] = [one for one in value["added_tokens"] if one["content"] not in sentinels]
    for number, one in enumerate(one for one in value["added_tokens"] if one["id"] > 2):
        one["id"] = len(pieces) + number
    path.write_text(json.dumps(value))
    case.resize(len(pieces) + sum(one["id"] > 2 for one in value["added_tokens"]))
    return case


@pytest.mark.parametrize("template", ["{text}<extra_id_0>", "Topic:<extra_id_0> {text}", "{text}.<extra_id_1>"])
def test_a_sentinel_that_would_be_seven_tokens(real: Case, template: str) -> None:
    real.change("fresh.yaml", task={"template": template})
    real.refused(*FINETUNE, says=("task.template: <extra_id_", "needs a blank before it"))


def test_a_prefix_that_would_be_seven_tokens(real: Case) -> None:
    real.change("fresh.yaml", task={"decoder_prefix": "x<extra_id_0>"})
    real.refused(*FINETUNE, says=("task.decoder_prefix: <extra_id_0>", "needs a blank before it"))


def test_a_sentinel_that_the_vocabulary_lacks(real: Case) -> None:
    real.change("fresh.yaml", task={"template": "{text} <extra_id_100>"})
    real.refused(*FINETUNE, says="<extra_id_100> is no token of this model")


def test_sentinels_that_are_right(real: Case) -> None:
    """What is written as it should be is accepted by the same model."""
    real.change("fresh.yaml", task={"template": "{text} <extra_id_0>", "decoder_prefix": "<extra_id_0>"})
    real.done(*FINETUNE)


@pytest.mark.parametrize(("max_tokens", "words"), [(1, "greater than or equal to 2"), (4, "leaves no room for texts")])
def test_a_budget_without_room_for_a_text(case: Case, max_tokens: int, words: str) -> None:
    case.finish("data")
    case.change("fresh.yaml", task={"template": "one two three {text} <extra_id_0>", "max_tokens": max_tokens})
    case.refused(*FINETUNE, says=("task.max_tokens: ", words))


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("!!set {a, b, c}", "must be a list, in the order that answers have"),
        ("{a: 1, b: 2, c: 3}", "must be a list"),
        ("[a, null, c]", "holds None, which is no name"),
        ("[a, [b], c]", "holds ['b'], which is no name"),
        ("[a, {b: 1}, c]", "holds {'b': 1}, which is no name"),
        ("[a, .nan, c]", "holds nan, which is no name"),
        ("[a, 'b ', c]", "holds 'b ', which is no name"),
        ('[a, "b\\n", c]', "which is no name"),
        ("[a, b, a]", "holds 'a' twice"),
        ('[a, "b\\u00a0b", c]', "which is no name"),
        ('[a, "\\uff41", c]', "look the same"),
        ('["caf\\u00e9", "cafe\\u0301", c]', "look the same"),
    ],
)
def test_labels_that_are_no_names_in_an_order(case: Case, labels: str, words: str) -> None:
    path = case / "run.yaml"
    path.write_text(path.read_text().replace("  labels:\n  - a\n  - b\n  - c\n", f"  labels: {labels}\n"))
    case.refused("prepare", "run.yaml", says=("labels", words))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.languages", ["en", "de", "de"], "languages holds a language twice"),
        ("data.languages", ["en", "d e"], "data.languages.1: "),
        ("data.source_language", "en ", "data.source_language: "),
        ("finetune.dropout", 1.0, "finetune.dropout: Input should be less than or equal to 0.9"),
        ("task.max_tokens", True, "task.max_tokens: must be a number, not true"),
        ("engine.deepspeed", {"nonsense": 1}, "engine.deepspeed.nonsense: unknown key"),
        ("engine.deepspeed", {"compile": {}}, "engine.deepspeed.compile: unknown key"),
        ("engine.deepspeed", {"gradient_allreduce_op": "sum"}, "engine.deepspeed.gradient_allreduce_op: unknown key"),
        ("engine.deepspeed", {"zero_optimization": {"nonsense": 1}}, "deepspeed.zero_optimization.nonsense: unknown"),
        ("engine.deepspeed", {"data_types": {"grad_dtype": "fp32"}}, "deepspeed.data_types.grad_dtype: unknown key"),
        ("engine.deepspeed", {"timers": {"x": 1}}, "engine.deepspeed.timers.x: unknown key"),
        ("engine.deepspeed", {"activation_checkpointing": {}}, "use engine.gradient_checkpointing"),
        ("engine.deepspeed", {"communication_data_type": "fp16"}, "engine.deepspeed.communication_data_type: "),
        ("engine.deepspeed", {"zero_optimization": {"stage3_max_reuse_distance": 1}}, "needs zero_stage 3"),
        ("engine.deepspeed", {"zero_optimization": {"offload_optimizer": {}}}, "use engine.offload_optimizer"),
    ],
    ids=lambda value: json.dumps(value) if not isinstance(value, str) else None,
)
def test_a_setting_that_would_be_passed_over_or_ruin_the_result(case: Case, key: str, value: Any, words: str) -> None:
    section, _, name = key.partition(".")
    case.change("run.yaml", **{section: {name: value}})
    case.refused("prepare", "run.yaml", says=words)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{calibrate: false}", {"calibrate": False}),
        ("{de: 0}", {"de": 0}),
        ("{de: 0.0, fr: 0}", {"de": 0.0, "fr": 0}),
        ("{a: null}", {"a": None}),
        ("{}", {}),
        ("{text}", "{text}"),
        ("{premise} {hypothesis}", "{premise} {hypothesis}"),
    ],
)
def test_a_mapping_of_falsy_values_on_the_command_line_is_a_mapping(text: str, value: object) -> None:
    assert parse_value(text) == value


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["shared.weight", "lm_head.weight", "encoder.final_layer_norm.weight"])
@pytest.mark.parametrize("kind", ["int32", "bool", "complex64", "float8_e4m3fn"])
def test_weights_of_another_kind(case: Case, key: str, kind: str) -> None:
    case.finish("data")
    path = case / "model/model.safetensors"
    tensors = load_file(path)
    tensors[key] = tensors[key].to(getattr(torch, kind))
    save_file(tensors, path, {"format": "pt"})
    case.refused(*FINETUNE, says=(f"model/model.safetensors: {key}", kind, "get a sound checkpoint"))


# --- files of a stage that are not what it wrote -------------------------------------------------------------------


def twice(scores: Scores) -> Scores:
    return Scores(*([*rows, rows[0]] for rows in (scores.keys, scores.languages, scores.log_probs, scores.labels)))


def less(scores: Scores) -> Scores:
    kept = [number for number, key in enumerate(scores.keys) if key != scores.keys[0]]
    columns = (scores.keys, scores.languages, scores.log_probs, scores.labels)
    return Scores(*([rows[number] for number in kept] for rows in columns))


def none(scores: Scores) -> Scores:
    return Scores([], [], [], [])


def one_candidate(scores: Scores) -> Scores:
    return Scores(scores.keys, scores.languages, [np.zeros(1, np.float32)] * len(scores.keys), scores.labels)


def unnormalised(scores: Scores) -> Scores:
    return Scores(scores.keys, scores.languages, [row + 1 for row in scores.log_probs], scores.labels)


def other_language(scores: Scores) -> Scores:
    return Scores(scores.keys, ["xx", *scores.languages[1:]], scores.log_probs, scores.labels)


def other_key(scores: Scores) -> Scores:
    return Scores(["xx", *scores.keys[1:]], scores.languages, scores.log_probs, scores.labels)


def not_finite(scores: Scores) -> Scores:
    nothing = np.full(3, np.nan, np.float32)
    return Scores(scores.keys, scores.languages, [nothing, *scores.log_probs[1:]], scores.labels)


FORGERIES = (twice, less, none, one_candidate, unnormalised, other_language, other_key, not_finite)


def forge_scores(path: Path, change: Callable[[Scores], Scores]) -> None:
    write_scores(path, change(read_score_file(path)), {})
    sign(path.parent)


@pytest.mark.parametrize("change", FORGERIES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    ("split", "command", "made"),
    [
        ("unlabeled", "distill", "round1/distill"),
        ("test", "evaluate", "evaluation"),
    ],
)
def test_scores_that_are_signed_again(
    case: Case, change: Callable[[Scores], Scores], split: str, command: str, made: str
) -> None:
    """Distillation joins them to the shards, evaluation to the scores after; both have to notice."""
    case.finish()
    shutil.rmtree(case / "run" / made)
    forge_scores(case / f"run/scores/{split}/000000.parquet", change)
    case.refused(command, "run.yaml", says="run/scores")


def first_weight(selection: dict[str, Any], weight: float) -> None:
    selection["weights"][selection["teachers"][0]] = weight


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: first_weight(value, float("nan")), "weights"),
        (lambda value: first_weight(value, -1), "weights"),
        (lambda value: first_weight(value, 0), "weights"),
        (lambda value: first_weight(value, 1e300), "weights"),
        (lambda value: value["teachers"].append("xx"), "weights"),
        (lambda value: value.update(teachers=["xx"], weights={"xx": 1.0}), "'xx'"),
        (lambda value: value.update(teachers=[], weights={}), "teachers"),
        (lambda value: value["biases"].update(en=[0.0, 0.0]), "biases"),
        (lambda value: value["biases"].update(en=[0.0, float("inf"), 0.0]), "biases"),
        (lambda value: value.update(num_groups=-1), "num_groups"),
    ],
    ids=["nan", "negative", "zero", "huge", "twice-as-many", "unknown", "nobody", "length", "infinite", "groups"],
)
def test_a_selection_that_is_signed_again(case: Case, change: Callable[[dict[str, Any]], None], words: str) -> None:
    case.finish()
    shutil.rmtree(case / "run/round1/distill")
    with forged(case / "run/round1/selection/teachers.json") as value:
        change(value)
    case.refused("distill", "run.yaml", says=("run/round1/selection/teachers.json", words))


@pytest.mark.parametrize("step", [10**9, 3001])
def test_a_checkpoint_of_an_impossible_step(case: Case, step: int) -> None:
    """The training has 3,000 steps."""
    path = case.stop_finetuning() / "manifest.json"
    value = json.loads(path.read_text())
    value["details"]["step"] = step
    path.write_text(json.dumps(value))
    case.refused("finetune", "stopped.yaml", says="stopped/finetune/checkpoints")
