"""Section 3: what is broken is said in this program's words: one line with the file and the remedy, no traceback.

Elsewhere: the bounds of every read JSON, in tests/test_reading.py; that files of a stage are typed and validated value
by value, in tests/files; weights and tokenizers by themselves, in tests/models/test_weights.py and test_family.py.
"""

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cases.case import Case, forged, sign
from safetensors.torch import load_file, save_file

FINETUNE = ("finetune", "fresh.yaml")
DIGITS = "9" * 5_000
DEEP = "[" * 100_000 + "]" * 100_000
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
)


# --- YAML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: !!int foo", "'foo' is no int (line 1, column 7)"),
        ("seed: !!float 1.2.3", "is no float"),
        ("seed: !!timestamp foo", "'foo' is no timestamp"),
        ("seed: !!binary ä", "cannot be read as YAML"),
        ("run_dir: !!python/object/apply:os.system ['touch touched']", "could not determine a constructor"),
        ("run_dir: !unknown x", "could not determine a constructor"),
        ("a: " + "[" * 3_000 + "]" * 3_000, "nested too deeply"),
        ("a: " + "{a: " * 3_000 + "1" + "}" * 3_000, "nested too deeply"),
        ("a: " + "[" * 100 + "]" * 100, "nested more than 64 deep"),
        ("engine: {deepspeed: &a {x: *a}}", "within itself"),
        ("seed: " + DIGITS, "is no int"),
        ("seed: 0x" + DIGITS, "seed: "),
        (BOMB, "more than 30 aliases"),
        ("variants: {x: &x {a: *x}}", "within itself"),
        ("run_dir: a\nrun_dir: b", "key 'run_dir' is given twice (line 2"),
        ("? [a, b]\n: c", "run.yaml: "),
        ("<<: 3", "expected a mapping"),
        ("- a list", "must be a mapping of keys to values"),
        ("just text", "must be a mapping of keys to values"),
        ("", "must be a mapping of keys to values"),
        ("a: 1\n---\nb: 2", "single document"),
        ("a: [", "cannot be read as YAML"),
        ("a: *b", "undefined alias"),
        ("a:\tb\n\tc: d", "cannot be read as YAML"),
        ("a: \x07", "character 4 (#x0007)"),
        ("x: '" + "a" * (1 << 20) + "'", "1,048,581 bytes where at most 1,048,576 are read"),
    ],
    ids=lambda value: value[:24],
)
def test_yaml_that_no_config_is(case: Case, text: str, words: str) -> None:
    case.put("run.yaml", text)
    case.refused("run", "run.yaml", says=("run.yaml: ", words))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"run_dir: \xff", "no UTF-8 text (byte 10"), ("run_dir: größe".encode("utf-16"), "save it as UTF-8")],
    ids=["latin", "utf-16"],
)
def test_a_config_in_another_encoding(case: Case, content: bytes, words: str) -> None:
    (case / "run.yaml").write_bytes(content)
    case.refused("run", "run.yaml", says=("run.yaml: ", words))


def test_a_bomb_of_aliases_as_a_variant(case: Case) -> None:
    """Its values are printed nowhere."""
    text = (case / "run.yaml").read_text()
    case.put("run.yaml", f"{text}variants:\n  x:\n" + "".join(f"    {line}\n" for line in BOMB.splitlines()))
    case.refused("run", "run.yaml", says=("run.yaml: ", "more than 30 aliases"), most_bytes=1 << 29)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("engine.deepspeed", {"data_types": 3}, "engine.deepspeed.data_types: "),
        ("engine.deepspeed", {"wandb": {"enabled": True}}, "engine.deepspeed.wandb: unknown key"),
        ("engine.deepspeed", {"amp": {"enabled": True}}, "engine.deepspeed.amp: unknown key"),
        ("engine.deepspeed", {"zero_optimization": [1]}, "engine.deepspeed.zero_optimization: "),
        ("engine.deepspeed", [], "engine.deepspeed: "),
        ("engine.deepspeed", {"fp16": {"enabled": True}}, "fp16 is set from this config's own keys; remove it"),
        ("engine.deepspeed", {"steps_per_print": 0}, "engine.deepspeed.steps_per_print: "),
        ("engine.timeout_seconds", 0.001, "engine.timeout_seconds: "),
        ("engine.timeout_seconds", 1e300, "engine.timeout_seconds: "),
        ("engine.num_threads", 0, "engine.num_threads: "),
        ("engine.dtype", "fp16", "fp16 overflows in T5's layers; use bf16 or fp32"),
        ("score.tokens_per_batch", 10**30, "score.tokens_per_batch: "),
        ("finetune.learning_rate", float("nan"), "finetune.learning_rate: "),
        ("finetune.learning_rate", "fast", "finetune.learning_rate: "),
        ("finetune.num_steps", -1, "finetune.num_steps: "),
        ("evaluate.alpha", 0, "evaluate.alpha: "),
        ("data.splits", {"test": float("inf")}, "data.splits.test: "),
        ("data.splits", {"valid": 0.5}, "data.splits.valid"),
        ("data.inputs", [3], "data.inputs.0: "),
        ("data.inputs", [{"path": "x" * 100_000}], "data.inputs.0.path: "),
        ("data.inputs", [{"kind": "x" * 100_000}], "data.inputs.0.kind: "),
        ("variants", {"x": 3}, "variants"),
        ("variants", {"../x": {}}, "variants"),
        ("variants", {"x": {"select": {"rule": "y"}}}, "variants.x: select.rule: "),
        ("rounds", -1, "rounds: "),
        ("seed", 10**30, "seed: "),
        ("method", "x" * 100_000, "method: "),
        ("task.template", "{text", "task: template"),
        ("task.template", "{text.__class__}", "task: template"),
        ("task.template", "{0}", "task: template"),
        ("task.template", {"en": 3}, "task.template.en: "),
        ("task.labels", 3, "labels"),
    ],
    ids=lambda value: json.dumps(value)[:40] if not isinstance(value, str) else None,
)
def test_a_setting_that_is_none(case: Case, key: str, value: Any, words: str) -> None:
    section, _, name = key.partition(".")
    case.change("run.yaml", **{section: {name: value} if name else value})
    line = case.refused("run", "run.yaml", says=("run.yaml: ", words))
    assert line.count(f"{key}: ") <= 1, line  # not two phrases that contradict each other


def test_a_nano_model_of_one_piece(case: Case) -> None:
    case.change("run.yaml", model={"path": None, "nano": {"vocab_size": 1}})
    case.refused("run", "run.yaml", says="model.nano.vocab_size: Input should be greater than or equal to 10")


def test_a_vocabulary_too_small_for_its_answers(case: Case) -> None:
    case.change("run.yaml", model={"path": None, "nano": {"vocab_size": 10}}, pretrain={"num_steps": 1})
    case.change("run.yaml", data={"splits": {"pretrain": 10, "labeled": 20, "unlabeled": 40, "test": 30}})
    case.done("prepare", "run.yaml")
    case.refused("pretrain-nano", "run.yaml", says="model.nano.vocab_size")


# --- half characters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task.template", "{text} \ud800"),
        ("task.decoder_prefix", "\udcff"),
        ("data.source_language", "e\ud800"),
        ("task.verbalizers", {"en": ["a", "b", "\udfff"]}),
        ("data.missing", ["\ud800"]),
        ("run_dir", "run\udcff"),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_half_a_character_in_a_config(case: Case, key: str, value: Any) -> None:
    section, _, name = key.partition(".")
    case.change("run.yaml", **{section: {name: value} if name else value})
    case.refused("prepare", "run.yaml", says=("run.yaml: ", name or key, "half of a character", "write the whole"))


def test_half_a_character_on_the_command_line(case: Case) -> None:
    case.refused("prepare", "run.yaml", "--task.template={text} \udcff", says=("task.template", "half of a character"))


@pytest.mark.parametrize("part", ["text", "id", "language", "label"])
def test_half_a_character_in_an_input(case: Case, part: str) -> None:
    """A bad record like any other, with its line."""
    lines = (case / "data.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[0])
    half = "x\ud800"
    if part == "text":
        record["texts"]["en"]["text"] = half
    elif part == "language":
        record["texts"][half] = {"text": "x"}
    else:
        record[part] = half
    case.put("data.jsonl", "\n".join([json.dumps(record), *lines[1:]]))
    case.refused("prepare", "run.yaml", says="bad record")
    assert "data.jsonl:1: " in (case / "run/bad-records.txt").read_text(encoding="utf-8")


# --- shards --------------------------------------------------------------------------------------------------------


def member(name: str, content: bytes | str) -> tuple[tarfile.TarInfo, bytes]:
    data = content.encode() if isinstance(content, str) else content
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def forge_shard(case: Case, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> None:
    """Change the members of the first labeled shard and sign it again."""
    directory = case / "run/data/labeled"
    path = directory / "000000.tar"
    with tarfile.open(path) as tar:
        members = [(one, tar.extractfile(one).read()) for one in tar]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    sign(directory)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("g1.json", '{"label": 0, "texts": {"en": {"text": "x\\ud800"}}}'),
        ("g1.json", '{"label": "a", "texts": {"en": {"text": "x"}}}'),
        ("g1.json", '{"label": true, "texts": {"en": {"text": "x"}}}'),
        ("g1.json", '{"label": 0, "texts": {"en": {"text": ""}}}'),
        ("g1.json", '{"label": 0, "texts": {"en": {"other": "x"}}}'),
        ("g1.json", '{"label": 0, "texts": {"en": "x"}}'),
        ("g1.json", '{"label": 0, "texts": []}'),
        ("g1.json", '{"label": 0}'),
        ("g1.json", '{"label": 99, "texts": {"en": {"text": "x"}}}'),
        ("g1.json", "[]"),
        ("g1.json", ""),
        ("g1.json", b"\xff\xfe"),
        ("g1.json", DEEP),
        ("g1.json", '{"label": ' + DIGITS + "}"),
        (".json", '{"label": 0, "texts": {"en": {"text": "x"}}}'),
        ("g1.pyd", "x"),
        ("../g1.json", '{"label": 0, "texts": {}}'),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "bytes",
)
def test_a_member_of_a_shard_that_is_none(case: Case, name: str, content: str | bytes) -> None:
    case.finish("data")
    forge_shard(case, lambda members: members.__setitem__(0, member(name, content)))
    case.refused(*FINETUNE, says="run/data/labeled")


@pytest.mark.parametrize(
    "content", [b"", b"no tar", b"\0" * 10_240, gzip.compress(b"x")], ids=["empty", "text", "zeros", "gzip"]
)
def test_a_shard_that_is_no_tar(case: Case, content: bytes) -> None:
    case.finish("data")
    (case / "run/data/labeled/000000.tar").write_bytes(content)
    sign(case / "run/data/labeled")
    case.refused(*FINETUNE, says="run/data/labeled/000000.tar")


# --- JSON of this program's -----------------------------------------------------------------------------------------

PLACES = {
    "run/data/labeled/manifest.json": FINETUNE,
    "run/data/manifest.json": ("prepare", "run.yaml"),
    "run/finetune/manifest.json": ("score", "run.yaml"),
    "run/scores/unlabeled/manifest.json": ("select", "run.yaml"),
    "run/round1/selection/manifest.json": ("distill", "run.yaml"),
    "run/round1/selection/teachers.json": ("distill", "run.yaml"),
    "run/evaluation/metrics.json": ("report", "run"),
    "run/evaluation/manifest.json": ("report", "run"),
}
REMADE = {"score": "scores", "select": "round1/selection", "distill": "round1/distill", "finetune": "finetune"}


@pytest.mark.parametrize(
    "text",
    [DEEP, DIGITS, "[]", "{}", "null", "", "{"],
    ids=["deep", "digits", "list", "mapping", "null", "empty", "cut"],
)
@pytest.mark.parametrize("place", PLACES)
def test_json_of_a_stage_that_is_none(case: Case, place: str, text: str) -> None:
    case.finish()
    words = PLACES[place]
    made = case / "run" / REMADE.get(words[0], "nothing")
    if made.exists() and not (case / place).is_relative_to(made):
        shutil.rmtree(made)
    case.put(place, text)
    if not place.endswith("manifest.json"):
        sign((case / place).parent)
    line = case.refused(*words, says=f"{place}: ")
    assert line.count("delete") + line.count("name a") + line.count("move") == 1, line  # one remedy
    assert "sys." not in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value.pop("worst"), "worst"),
        (lambda value: value["worst"]["after"].update(language="xx"), "worst.after.language"),
        (lambda value: value["languages"]["de"].update(before="high"), "languages.de.before"),
        (lambda value: value["languages"]["de"].update(before=float("nan")), "languages.de.before"),
        (lambda value: value["languages"].update({"de": []}), "languages.de"),
        (lambda value: value["average"].update(ci95=[0]), "average.ci95"),
        (lambda value: value.update(teachers={"en": 1}), "teachers"),
        (lambda value: value.update(more=1), "more"),
    ],
    ids=["worst", "language", "text", "nan", "list", "interval", "mapping", "more"],
)
def test_metrics_that_are_signed_again(case: Case, change: Callable[[dict[str, Any]], None], words: str) -> None:
    case.finish()
    with forged(case / "run/evaluation/metrics.json") as value:
        change(value)
    case.refused("report", "run", says=("run/evaluation/metrics.json: ", words))


def checkpoint_of(case: Case) -> Path:
    (path,) = case.stop_finetuning().glob("*.safetensors")
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("exp_avg"), "has "),
        (lambda tensors: tensors.pop("weight"), "has "),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "has "),
        (lambda tensors: tensors.update(exp_avg=torch.zeros(3)), "exp_avg is F32 [3], not F32 ["),
        (lambda tensors: tensors.update(weight=torch.zeros(3)), "weight is F32 [3], not F32 ["),
        (lambda tensors: tensors["exp_avg"].fill_(float("nan")), "no finite number"),
        (lambda tensors: tensors["exp_avg_sq"].fill_(-1), "squares below 0"),
        (lambda tensors: tensors.update(weight=tensors["weight"].int()), "weight is I32"),
        (lambda tensors: tensors.update({"other/weight": torch.zeros(1)}), "has "),
    ],
    ids=["moment", "weight", "more", "moment shape", "weight shape", "nan", "negative", "int", "parameter"],
)
def test_a_checkpoint_that_is_signed_again(case: Case, change: Callable[[Any], object], words: str) -> None:
    path = checkpoint_of(case)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    sign(path.parent)
    case.refused("finetune", "stopped.yaml", says=("stopped/finetune/checkpoints/step-", words, "delete"))


@pytest.mark.parametrize(
    "content", [b"", b"x" * 100, (1 << 62).to_bytes(8, "little") + b"{}"], ids=["empty", "text", "long"]
)
def test_a_checkpoint_that_is_no_safetensors(case: Case, content: bytes) -> None:
    path = checkpoint_of(case)
    path.write_bytes(content)
    sign(path.parent)
    case.refused("finetune", "stopped.yaml", says=("stopped/finetune/checkpoints/step-", "delete"))


# --- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("decoder_start_token_id", None, "decoder_start_token_id"),
        ("decoder_start_token_id", 10**6, "decoder_start_token_id"),
        ("decoder_start_token_id", -1, "decoder_start_token_id"),
        ("decoder_start_token_id", "x", "decoder_start_token_id"),
        ("d_model", -1, "d_model"),
        ("d_model", 0, "d_model"),
        ("d_model", "wide", "d_model"),
        ("d_model", 10**12, "d_model"),
        ("d_model", [16], "d_model"),
        ("num_layers", 10**6, "num_layers"),
        ("num_heads", 3.5, "num_heads"),
        ("num_heads", 0, "num_heads"),
        ("vocab_size", 0, "vocab_size"),
        ("vocab_size", 10**15, "vocab_size"),
        ("layer_norm_epsilon", "x", "layer_norm_epsilon"),
        ("layer_norm_epsilon", float("nan"), "layer_norm_epsilon"),
        ("relative_attention_num_buckets", 0, "relative_attention_num_buckets"),
        ("dense_act_fn", "nonsense", "dense_act_fn"),
        ("model_type", "t5", "model_type"),
        ("model_type", ["mt5"], "model_type"),
        ("model_type", None, "model_type"),
        ("auto_map", {"AutoConfig": "theirs.Config"}, ""),
    ],
    ids=lambda value: str(value),
)
def test_a_config_of_a_model_that_is_none(case: Case, key: str, value: Any, words: str) -> None:
    case.finish("data")
    path = case / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    case.put("model/theirs.py", "open('executed', 'w')")
    if words:
        case.refused(*FINETUNE, says=("model/config.json: ", words))
    else:
        case.done(*FINETUNE)
    assert not (case / "executed").exists()


@pytest.mark.parametrize(
    "text",
    ['{"d_model": ', "[]", "3", "", "null", DEEP, '{"model_type": "mt5", "d_model": ' + DIGITS + "}"],
    ids=["cut", "list", "number", "empty", "null", "deep", "digits"],
)
def test_a_broken_config_of_a_model_is_not_blamed_on_the_tokenizer(case: Case, text: str) -> None:
    case.finish("data")
    case.put("model/config.json", text)
    line = case.refused(*FINETUNE, says="model/config.json: ")
    assert "tokenizer" not in line


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "text", ["{", "[]", "3", "", DEEP, "{}"], ids=["cut", "list", "number", "empty", "deep", "mapping"]
)
def test_a_broken_tokenizer(case: Case, name: str, text: str) -> None:
    case.finish("data")
    case.put(f"model/{name}", text)
    if name == "tokenizer_config.json" and text == "{}":
        case.done(*FINETUNE)  # a tokenizer that says all by itself
    else:
        where = "model" if text == "{}" else f"model/{name}"
        case.refused(*FINETUNE, says=(f"{where}: ", "put the model's tokenizer files there"))


def change_tokenizer(case: Case, change: Callable[[dict[str, Any]], object]) -> None:
    path = case / "model/tokenizer.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value["model"]["vocab"].extend([f"piece{number}", -9.0] for number in range(500)), "embedding"),
        (lambda value: value.update(post_processor=None), "does not end texts"),
        (lambda value: value["model"].update(unk_id=None), "tokenizer"),
        (lambda value: value["model"].update(vocab=[["x", "y"]]), "tokenizer"),
        (lambda value: value["model"].update(vocab=[]), "tokenizer"),
        (lambda value: value["model"].update(type="nonsense"), "tokenizer"),
    ],
    ids=["beyond", "no end", "no unknown", "no scores", "empty", "type"],
)
def test_a_tokenizer_that_does_not_fit(case: Case, change: Callable[[dict[str, Any]], object], words: str) -> None:
    case.finish("data")
    change_tokenizer(case, change)
    case.refused(*FINETUNE, says=("model: ", words))


def test_a_vocabulary_of_bert(case: Case) -> None:
    case.finish("data")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tiny.LABELS, *tiny.WORDS["en"]]
    value = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
        | {"strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
        | {"max_input_chars_per_word": 100, "vocab": {token: number for number, token in enumerate(tokens)}},
    }
    case.put("model/tokenizer.json", json.dumps(value))
    config = {"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    case.put("model/tokenizer_config.json", json.dumps(config))
    case.refused(*FINETUNE, says=("model: ", "tokenizer"))


@pytest.mark.parametrize(
    ("command", "key", "value"),
    [
        ("finetune", "shared.weight", float("nan")),
        ("finetune", "lm_head.weight", float("inf")),
        ("score", "encoder.final_layer_norm.weight", float("-inf")),
        ("score", "lm_head.weight", float("nan")),
    ],
)
def test_weights_that_are_no_numbers_are_blamed_on_the_file(case: Case, command: str, key: str, value: float) -> None:
    case.finish("data")
    path = case / "model/model.safetensors"
    tensors = load_file(path)
    tensors[key][:] = value
    save_file(tensors, path, {"format": "pt"})
    if command == "score":
        case.change("fresh.yaml", finetune=None)
    case.refused(command, "fresh.yaml", says=(f"model/model.safetensors: {key} holds NaN or infinite", "sound"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("shared.weight"), "shared.weight is missing"),
        (lambda tensors: tensors.update({"more": torch.zeros(1)}), "more is not of this model"),
        (lambda tensors: tensors.update({"shared.weight": torch.zeros(3, 4)}), "shared.weight has shape (3, 4), not"),
        (lambda tensors: tensors.clear(), "is missing"),
    ],
    ids=["missing", "more", "shape", "none"],
)
def test_weights_that_do_not_fit(case: Case, change: Callable[[Any], object], words: str) -> None:
    case.finish("data")
    tensors = load_file(case / "model/model.safetensors")
    change(tensors)
    save_file(tensors, case / "model/model.safetensors", {"format": "pt"})
    case.refused(*FINETUNE, says=("model: does not fit its config.json: ", words, "get a sound checkpoint"))


# --- in whose words ------------------------------------------------------------------------------------------------


class Touching:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def test_a_torch_file_with_code_is_not_met_with_advice_to_run_it(case: Case) -> None:
    case.finish("data")
    (case / "model/model.safetensors").unlink()
    torch.save({"shared.weight": Touching()}, case / "model/pytorch_model.bin")
    line = case.refused(*FINETUNE, says=("model/pytorch_model.bin: cannot be read as weights", "get the file again"))
    assert "weights_only" not in line
    assert not (case / "executed").exists()


@pytest.mark.parametrize(
    "content", [b"", b"x" * 1000, b"PK\x03\x04" + b"\0" * 50, b"\x80\x02."], ids=["empty", "text", "zip", "pickle"]
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_none(case: Case, name: str, content: bytes) -> None:
    case.finish("data")
    (case / "model/model.safetensors").unlink()
    (case / f"model/{name}").write_bytes(content)
    line = case.refused(*FINETUNE, says=(f"model/{name}: cannot be read as", "get the file again"))
    assert "weights_only" not in line


def test_a_directory_that_may_not_be_written(case: Case) -> None:
    """The directory is named, not a temporary file in it."""
    (case / "run").mkdir(mode=0o500)
    line = case.refused("prepare", "run.yaml", says=("run", "Permission denied"), as_person=True)
    assert ".tmp" not in line


@pytest.mark.parametrize("value", ["{a: 1}" + " " * 100_000, "x" * 100_000], ids=["mapping", "text"])
def test_a_long_value_is_not_shown_whole(case: Case, value: str) -> None:
    line = case.refused("prepare", "run.yaml", f"--finetune.num_steps={value}", says="finetune.num_steps: ")
    assert len(line) < 500


def test_changed_data_is_said_without_hashes(case: Case) -> None:
    case.finish("data")
    lines = (case / "data.jsonl").read_text().splitlines()
    case.put("data.jsonl", "\n".join(lines[1:]))
    line = case.refused("prepare", "run.yaml", says=("run/data: made with other settings", "data.jsonl"))
    assert "content has changed" in line


def test_a_path_of_a_model_that_is_not_there_is_no_lesson_in_the_hubs_names(case: Case) -> None:
    case.finish("data")
    for path in ("./nowhere/model", "/nowhere/model", "no where", "models/mt5/large"):
        case.change("fresh.yaml", model={"path": path})
        line = case.refused(*FINETUNE, says=("model.path: ", path))
        assert "alphanumeric" not in line and "Repo id" not in line, line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", -1),
        ("hidden_size", 17),
        ("num_hidden_layers", 10**6),
        ("num_attention_heads", 0),
        ("vocab_size", 10**15),
        ("max_position_embeddings", 1),
        ("layer_norm_eps", "x"),
        ("hidden_act", "nonsense"),
        ("intermediate_size", [3]),
    ],
    ids=lambda value: str(value),
)
def test_a_config_of_an_xlmr_that_is_none(case: Case, finished: Path, key: str, value: Any) -> None:
    case.finish("data")
    shutil.copytree(finished / "xlmr-head", case / "xlmr")
    path = case / "xlmr/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    case.change("fresh.yaml", **tiny.SCORERS["head"])
    case.change("fresh.yaml", model={"path": "xlmr"})
    case.refused(*FINETUNE, says="xlmr/config.json: ")
