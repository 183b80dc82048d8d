"""The engine on real ranks: gradients that no split of the batch changes; exports that transformers scores alike."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from alsace_dist.config import DistillConfig, EngineConfig, ExportType, TaskConfig
from alsace_dist.data.rows import Example, Part, Row, answers_of
from alsace_dist.files.manifest import file_entry
from alsace_dist.models.family import WHOLE, Family, Options, open_model
from alsace_dist.models.mt5 import MT5
from alsace_dist.models.weights import Weights
from alsace_dist.ranks.group import Ranks
from alsace_dist.training import engine, state
from alsace_dist.training.export import export
from alsace_dist.training.losses import FrozenTargetLoss

# With the start token alone, self-attention of the decoder sees one position: its softmax is constant.
CONSTANT = {
    f"body.decoder.block.0.layer.0.SelfAttention.{name}.weight" for name in ("q", "k", "relative_attention_bias")
}
# No text holds the end of an image.
CONSTANT_OF = {"mt5": CONSTANT, "cloze": set(), "t5gemma2": {"embedding.eoi_embedding"}}
# A bias of all keys moves all attention logits of a query alike: the true gradient is 0, what is computed is rounding.
NOISE = "attention.self.key.bias"
SCORERS = pytest.mark.parametrize("scorer", tiny.SCORERS)


def opened(world: str, scorer: str, directory: str = "", **task_settings: Any) -> Family:
    """The small model of this kind, or what was trained from it in another directory."""
    sections = tiny.of_scorer(Path(world), scorer)
    task = {"fields": ["text"], "template": "{text}", "labels": tiny.LABELS} | sections.get("task", {}) | task_settings
    model = sections["model"]
    path = Path(directory or model["path"])
    return open_model(path, answers_of(TaskConfig(**task), ["en"]), Options(pooling=model.get("pooling"), seed=7))


def load(
    group: Ranks,
    world: str,
    scorer: str,
    settings: dict[str, Any],
    freeze_vocabulary: bool = False,
    **task_settings: Any,
) -> tuple[engine.TrainEngine, Family]:
    """A train engine over a small model, as the training loop makes it."""
    config = EngineConfig(**settings)
    model = opened(world, scorer, **task_settings)
    model.check_weights(may_be_new=True)
    module = engine.load_module(model, 0.0, config, group)
    for name in model.vocabulary if freeze_vocabulary else ():
        module.get_parameter(name).requires_grad_(False)
    section = DistillConfig(num_steps=3, global_batch_size=10, learning_rate=1e-2)
    trained = engine.TrainEngine(module, config, section, group)
    trained.load_initial(model)
    return trained, model


def prompt_of(words: list[str], model: Family) -> tuple[Part, ...]:
    """A prompt of an example's text, with the mask behind it where it is to be filled."""
    return (Part(" ".join(words), True), *([Part(" <mask>", False)] if model.mode == "cloze" else []))


def examples(model: Family) -> list[Example]:
    """Ten weighted examples of different lengths."""
    words, answers = tiny.WORDS["en"], model.answers.fixed["en"]
    rows = [Row(f"g{number}", "en", None, prompt_of(words[: 1 + number % 7], model), answers) for number in range(10)]
    generator = torch.Generator().manual_seed(5)
    found = []
    for number, row in enumerate(model.encode(rows)):
        target = torch.rand(3, generator=generator)
        found.append(Example(row, (target / target.sum()).numpy(), 0.5 + number / 10, 0.1))
    return found


def loss_of(model: Family, chunk: list[Example], group: Ranks) -> FrozenTargetLoss:
    return FrozenTargetLoss(model.collate([example.row for example in chunk]), chunk, group.device)


def train(
    group: Ranks,
    world: str,
    scorer: str,
    engine_settings: dict[str, Any],
    micro_batch_size: int,
    num_steps: int = 2,
    freeze_vocabulary: bool = False,
) -> dict[str, Any]:
    """Loss of every step and, afterwards, norms and sums of every parameter and of Adam's first moment.

    Also how often the encoder's first block was computed, and how far each parameter is from where it started.
    """
    trained, model = load(group, world, scorer, engine_settings, freeze_vocabulary)
    mine = examples(model)[group.rank :: group.world_size]
    chunks = [mine[start : start + micro_batch_size] for start in range(0, len(mine), micro_batch_size)]
    calls = []
    whole = trained.engine.module
    if scorer == "t5gemma2":
        part = whole.encoder.layers[0].self_attn
    else:
        encoder = whole.body.encoder
        part = encoder.block[0].layer[0] if scorer == "mt5" else encoder.layer[0].attention
    hook = part.register_forward_pre_hook(lambda *_: calls.append(1))
    losses = []
    for _ in range(num_steps):
        total = trained.step([loss_of(model, chunk, group) for chunk in chunks], 1e-3)["loss"]
        losses.append(group.sum(float(total))[0] / 10)
    hook.remove()
    numbers = {}
    for name in trained.parameters:
        tensors = trained.state(name)
        numbers[name] = [float(tensors[key].norm()) for key in sorted(tensors)] + [float(tensors["weight"].sum())]
    moved = {}
    for name, parameter in trained.engine.module.named_parameters():
        with tiny.gathered(parameter):
            moved[name] = float((parameter.detach().float().cpu() - model.initial_value(name)).abs().max())
    result = {"losses": losses, "state": numbers, "norm": float(trained.gradient_norm)}
    return result | {"moved": moved, "num_calls": len(calls)}


def train_each(group: Ranks, world: str, scorer: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``train`` with each of these arguments, one engine after the other on the same ranks."""
    return [train(group, world, scorer, **run) for run in runs]


@SCORERS
def test_loss_and_gradient_do_not_depend_on_how_a_batch_is_split(world: Path, scorer: str) -> None:
    """Adam's moments are running sums of gradients: equal moments after two steps mean equal gradients."""
    arguments = {"world": str(world), "scorer": scorer}
    splits = [(0, 5), (0, 1), (2, 5), (2, 1), (3, 5), (3, 1), (1, 2)] if scorer == "mt5" else [(0, 1), (2, 5), (3, 2)]
    runs = [
        {"engine_settings": {"dtype": "fp32", "zero_stage": stage}, "micro_batch_size": micro}
        for stage, micro in [(0, 10), *splits]
    ]
    (expected,) = tiny.run_ranks(train_each, 1, runs=runs[:1], **arguments)[0]
    results = tiny.run_ranks(train_each, 2, runs=runs[1:], **arguments)[0]
    assert expected["losses"][1] < expected["losses"][0]
    for split, result in zip(splits, results, strict=True):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5), split
        assert result["state"].keys() == expected["state"].keys()
        for name, values in expected["state"].items():
            if NOISE not in name:
                assert result["state"][name] == pytest.approx(values, rel=2e-3, abs=1e-6), (split, name)


@pytest.mark.parametrize("scorer", ["mt5", "cloze", "t5gemma2"])
def test_bf16_and_offload_train_alike_at_every_stage(world: Path, scorer: str) -> None:
    settings = [
        {"zero_stage": 0, "dtype": "bf16"},
        {"zero_stage": 1, "dtype": "bf16"},
        {"zero_stage": 2, "dtype": "bf16", "offload_optimizer": True},
        {"zero_stage": 3, "dtype": "bf16", "offload_optimizer": True},
    ]
    runs = [{"engine_settings": one, "micro_batch_size": 5, "num_steps": 3} for one in settings]
    results = tiny.run_ranks(train_each, 2, world=str(world), scorer=scorer, runs=runs)[0]
    for one, result in zip(settings, results, strict=True):
        assert result["losses"] == pytest.approx(results[0]["losses"], rel=0.02), one
        assert result["losses"][2] < result["losses"][0]


@pytest.mark.parametrize("freeze_vocabulary", [False, True], ids=["all trained", "embedding frozen"])
@pytest.mark.parametrize("scorer", ["mt5", "cloze", "t5gemma2"])
def test_gradient_checkpointing_computes_twice_and_changes_nothing(
    world: Path, scorer: str, freeze_vocabulary: bool
) -> None:
    """At every ZeRO stage; a frozen embedding stays as it is, without state, and all the rest is trained."""
    frozen = set(opened(str(world), scorer).vocabulary) if freeze_vocabulary else set()
    more = {"micro_batch_size": 3, "num_steps": 3, "freeze_vocabulary": freeze_vocabulary}
    runs = [
        {"engine_settings": {"dtype": "fp32", "zero_stage": stage, "gradient_checkpointing": checkpointing}} | more
        for stage in range(4)
        for checkpointing in (False, True)
    ]
    for results in tiny.run_ranks(train_each, 2, world=str(world), scorer=scorer, runs=runs):
        for stage in range(4):
            plain, checkpointed = results[2 * stage : 2 * stage + 2]
            assert plain["losses"][2] < plain["losses"][1] < plain["losses"][0]
            assert checkpointed["losses"] == pytest.approx(plain["losses"], rel=1e-6), stage
            assert checkpointed["norm"] == pytest.approx(plain["norm"], rel=1e-6, nan_ok=True), stage
            assert (plain["num_calls"], checkpointed["num_calls"]) == (3 * 2, 3 * 2 * 2), stage
            for name, values in plain["state"].items():
                if NOISE not in name:
                    assert checkpointed["state"][name] == pytest.approx(values, rel=1e-5, abs=1e-9), (stage, name)
            for result in (plain, checkpointed):
                assert result["state"].keys() == result["moved"].keys() - frozen, stage
                assert {name for name, distance in result["moved"].items() if distance == 0} == frozen | CONSTANT_OF[
                    scorer
                ]


def elements_read(group: Ranks, world: str) -> dict[str, list[int]]:
    """By parameter, how many elements a rank has read of it each time, to make an engine under ZeRO-3."""
    found: dict[str, list[int]] = {}
    initial_value = MT5.initial_value

    def counted(model: MT5, name: str, part: slice = WHOLE) -> torch.Tensor:
        value = initial_value(model, name, part)
        found.setdefault(name, []).append(value.numel())
        return value

    MT5.initial_value = counted  # type: ignore[method-assign]
    try:
        load(group, world, "mt5", {"dtype": "bf16", "zero_stage": 3})
    finally:
        MT5.initial_value = initial_value  # type: ignore[method-assign]
    return found


def test_under_zero_3_a_rank_reads_no_more_of_the_weights_than_it_holds(world: Path) -> None:
    """And the rows at the ends of its part: once for the module, once in float32, the head once more to compare."""
    stored, (first, second) = Weights(world / "model"), tiny.run_ranks(elements_read, 2, world=str(world))
    rows, width = stored.shape("shared.weight")
    for rank in (first, second):
        assert len(rank["body.shared.weight"]) == 2 and len(rank["head.weight"]) == 3
        assert all(rows // 2 * width <= size <= (rows // 2 + 1) * width for size in rank["body.shared.weight"])
    assert sum(map(len, first.values())) == sum(map(len, second.values())) == 2 * len(first) + 1


def what_is_missing(group: Ranks) -> list[str]:
    """What is said when DeepSpeed's optimizers have lost each of the attributes that the layouts are built on."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])

    class Wrapped:
        fp16_groups = ()
        single_partition_of_fp32_groups = ()

    assert state.private(Wrapped(), "gone", "fp16_groups") == ()
    said = []
    for layout in state.LAYOUTS.values():
        with pytest.raises(RuntimeError) as caught:
            layout(Wrapped(), optimizer, {}, group)
        said.append(str(caught.value))
    return said


def test_deepspeed_is_imported_without_the_compiler_of_torch() -> None:
    """It takes longer to load than all of DeepSpeed, and nothing here is compiled; who wants to compile still can."""
    code = "import sys, torch; given = torch.compile; "
    code += "from alsace_dist.training.engine import import_deepspeed; import_deepspeed(); "
    code += "import deepspeed.runtime.zero.muon.muon_optimizer; "
    code += "print('torch._dynamo' in sys.modules, torch.compile is given)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=tiny.environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False True"


def test_deepspeed_is_imported_without_mlflow_which_may_be_imported_later() -> None:
    """DeepSpeed's autotuner would load it with all it needs, as long as DeepSpeed itself takes."""
    code = "import sys; from alsace_dist.training.engine import import_deepspeed; import_deepspeed(); "
    code += "found = 'mlflow' in sys.modules; import mlflow; print(found, hasattr(mlflow, 'log_metric'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=tiny.environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False True"


def test_a_deepspeed_without_what_is_built_on_is_named_with_its_version() -> None:
    whole, partitioned, sharded = tiny.run_ranks(what_is_missing, 1)[0]
    form = f"DeepSpeed {re.escape(version('deepspeed'))}: Wrapped has no {{}}; install a version in the range of "
    assert re.match(form.format("fp32_groups"), whole)
    assert re.match(form.format("_lazy_init_hp_params_optimizer_state"), partitioned)
    assert re.match(form.format("fp32_partitioned_groups_flat"), sharded)


def export_after_a_step(group: Ranks, world: str, scorer: str, out: str, stage: int, freeze: bool) -> list[float]:
    """Load, take a step, export; the exported model's answer logits as the engine computes them."""
    raw = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    trained, model = load(group, world, scorer, {"dtype": "fp32", "zero_stage": stage, "deepspeed": raw}, freeze)
    batch = examples(model)
    trained.step([loss_of(model, batch[group.rank :: group.world_size], group)], 1e-2)
    export(Path(out), trained, model, max_bytes=20_000)
    trained.engine.eval()
    with torch.no_grad():
        inputs = model.collate([example.row for example in batch])
        log_probs: list[float] = trained.engine(*inputs.to(group.device)).flatten().tolist()
    return log_probs


def export_in_both_types(group: Ranks, world: str, out: str) -> list[dict[str, Any]]:
    """What exports in float32 and in bf16 of a model under ZeRO-3 say of their files."""
    trained, model = load(group, world, "mt5", {"dtype": "fp32", "zero_stage": 3}, freeze_vocabulary=True)
    types: tuple[ExportType, ...] = ("float32", "bf16")
    return [dict(export(Path(out, dtype), trained, model, dtype, max_bytes=2_000)) for dtype in types]


def test_ranks_write_an_export_together_in_the_type_that_is_asked_for(world: Path, tmp_path: Path) -> None:
    from transformers import MT5ForConditionalGeneration

    maps = []
    for num_ranks in (1, 2):
        out = tmp_path / str(num_ranks)
        entries, *others = tiny.run_ranks(export_in_both_types, num_ranks, world=str(world), out=str(out))
        assert others == [[{}, {}]] * (num_ranks - 1)
        for dtype, entry in zip(("float32", "bf16"), entries, strict=True):
            files = sorted((out / dtype).glob("*.safetensors"))
            assert len(files) > 4 and entry == {path.name: file_entry(path) for path in files}
            maps.append(json.loads((out / dtype / "model.safetensors.index.json").read_text())["weight_map"])
        whole, rounded = Weights(out / "float32"), Weights(out / "bf16")
        assert whole.keys() == rounded.keys()
        for key in whole:
            assert torch.equal(whole.tensor(key).to(torch.bfloat16), rounded.tensor(key))
            assert torch.equal(whole.tensor(key), Weights(world / "model").tensor(key))  # nothing was trained
        loaded = MT5ForConditionalGeneration.from_pretrained(out / "bf16")
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        assert json.loads((out / "bf16/config.json").read_text())["dtype"] == "bfloat16"
    assert maps[0] == maps[2] and maps[1] == maps[3]  # whatever the number of ranks


@pytest.mark.parametrize("stage", [2, 3])
def test_the_separate_head_survives_training_and_export(world: Path, tmp_path: Path, stage: int) -> None:
    from transformers import AutoTokenizer, MT5ForConditionalGeneration

    out = str(tmp_path / "out")
    arguments = {"world": str(world), "scorer": "mt5", "out": out, "stage": stage, "freeze": False}
    scored = tiny.run_ranks(export_after_a_step, 2, **arguments)
    assert scored[0] == scored[1]
    before = MT5ForConditionalGeneration.from_pretrained(world / "model")
    plain = MT5ForConditionalGeneration.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tmp_path / "out/model.safetensors.index.json").exists()  # the small limit makes several files
    assert not torch.equal(plain.lm_head.weight, plain.shared.weight)
    rows = [tokenizer.convert_tokens_to_ids(label) for label in tiny.LABELS]
    others = [row for row in range(len(plain.lm_head.weight)) if row not in rows]
    assert torch.equal(plain.lm_head.weight[others], before.lm_head.weight[others])
    assert not torch.equal(plain.lm_head.weight[rows], before.lm_head.weight[rows])
    assert not torch.equal(plain.shared.weight, before.shared.weight)
    batch = [example.row.input_ids for example in examples(opened(str(world), "mt5", out))]
    logits = []
    with torch.no_grad():
        for ids in batch:
            output = plain(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[0]]))
            logits.append(output.logits[0, 0, rows].log_softmax(-1))
    assert torch.stack(logits).flatten().tolist() == pytest.approx(scored[0], abs=2e-5)


@pytest.mark.parametrize(
    ("scorer", "stage", "freeze"),
    [("cloze", 2, False), ("cloze", 3, True), ("cloze", 3, False), ("head", 3, False), ("new head", 3, True)],
)
def test_an_xlmr_that_was_trained_and_exported_scores_the_same_in_transformers(
    world: Path, tmp_path: Path, scorer: str, stage: int, freeze: bool
) -> None:
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

    out = str(tmp_path / "out")
    arguments = {"world": str(world), "scorer": scorer, "out": out, "stage": stage, "freeze": freeze}
    scored = tiny.run_ranks(export_after_a_step, 2, **arguments)
    assert scored[0] == scored[1]
    kind: Any = AutoModelForMaskedLM if scorer == "cloze" else AutoModelForSequenceClassification
    plain, told = kind.from_pretrained(out, output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    config = AutoConfig.from_pretrained(out)
    assert config.architectures == [type(plain).__name__]
    again = opened(str(world), scorer, out)
    assert again.check_weights() == []
    batch = [example.row.input_ids for example in examples(again)]
    stored = Weights(again.directory)
    word_embeddings = stored.tensor("roberta.embeddings.word_embeddings.weight")
    start = Weights(world / tiny.SCORERS[scorer]["model"]["path"])
    assert torch.equal(word_embeddings, start.tensor("roberta.embeddings.word_embeddings.weight")) == freeze
    tokenizer = AutoTokenizer.from_pretrained(out)
    found = []
    with torch.no_grad():
        for ids in batch:
            inputs = torch.tensor([ids])
            if scorer == "cloze":
                rows = tokenizer.convert_tokens_to_ids([f"▁{label}" for label in tiny.LABELS])
                logits = plain(input_ids=inputs).logits[0, ids.index(tokenizer.mask_token_id), rows]
            elif scorer == "head":
                logits = plain(input_ids=inputs).logits[0]
            else:  # docs/method.md: transformers pools otherwise
                pooled = plain.roberta(input_ids=inputs).last_hidden_state.mean(dim=1)
                logits = plain.classifier.out_proj(plain.classifier.dense(pooled).tanh())[0]
            found.append(logits.log_softmax(-1))
    assert torch.stack(found).flatten().tolist() == pytest.approx(scored[0], abs=2e-5)
    if scorer == "cloze":
        others = [row for row in range(len(tokenizer)) if row not in rows]
        assert torch.equal(stored.tensor("lm_head.bias")[others], start.tensor("lm_head.bias")[others])
        assert not torch.equal(stored.tensor("lm_head.bias")[rows], start.tensor("lm_head.bias")[rows])
        assert plain.lm_head.decoder.weight is plain.roberta.embeddings.word_embeddings.weight
    else:
        assert config.id2label == dict(enumerate(tiny.LABELS))
        assert getattr(config, "classifier_pooling", None) == ("mean" if scorer == "new head" else None)


@pytest.mark.parametrize(("stage", "freeze"), [(2, False), (3, False), (3, True)])
def test_a_t5gemma2_that_was_trained_and_exported_is_whole_and_scores_the_same_in_transformers(
    world: Path, tmp_path: Path, stage: int, freeze: bool
) -> None:
    """The vision tower is there as it was, and in float32 as all the rest, whatever the checkpoint was in."""
    from transformers import AutoModelForSeq2SeqLM

    out = str(tmp_path / "out")
    arguments = {"world": str(world), "scorer": "t5gemma2", "out": out, "stage": stage, "freeze": freeze}
    scored = tiny.run_ranks(export_after_a_step, 2, **arguments)
    assert scored[0] == scored[1]
    plain, told = AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    again = opened(str(world), "t5gemma2", out)
    assert again.check_weights() == []
    start, stored = Weights(world / "t5gemma2"), Weights(Path(out))
    assert start.keys() == stored.keys()
    same = {key for key in start if torch.equal(start.tensor(key).float(), stored.tensor(key))}
    beside = {key for key in start if "vision_tower" in key or "projector" in key}
    words = "model.encoder.embed_tokens"
    assert beside and same == beside | {f"{words}.eoi_embedding"} | ({f"{words}.weight"} if freeze else set())
    loaded = plain.state_dict()
    for key in stored:
        name = key if key in beside else key.replace("model.encoder.", "model.encoder.text_model.")
        assert torch.equal(loaded[name], stored.tensor(key)), key
    assert plain.lm_head.out_proj.weight is plain.model.encoder.text_model.embed_tokens.weight
    rows, found = again.tokenizer.convert_tokens_to_ids(tiny.LABELS), []
    with torch.no_grad():
        for example in examples(again):
            ids, first = torch.tensor([example.row.input_ids]), torch.tensor([[plain.config.decoder.bos_token_id]])
            found.append(plain(input_ids=ids, decoder_input_ids=first).logits[0, 0, rows].log_softmax(-1))
    assert torch.stack(found).flatten().tolist() == pytest.approx(scored[0], abs=2e-5)
