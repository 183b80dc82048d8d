"""The plan against known model sizes, figures worked out by hand, and what DeepSpeed really holds on two ranks."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alsace_dist.config import Config, EngineConfig, TrainConfig
from alsace_dist.config_file import load_config
from alsace_dist.data.stream import CanonicalOrder, score_batches
from alsace_dist.errors import UserError
from alsace_dist.models.family import Parameters
from alsace_dist.models.mt5 import MT5
from alsace_dist.plan.memory import Memory, checkpoint_bytes, model_bytes, scoring_memory, training_memory
from alsace_dist.plan.overview import print_plan
from alsace_dist.plan.work import num_steps, prompts_per_example
from alsace_dist.stages.prepare import prepare


def geometry(d_model: int, d_ff: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    """config.json of a released mT5."""
    return {
        "model_type": "mt5",
        "vocab_size": 250112,
        "d_model": d_model,
        "d_kv": 64,
        "d_ff": d_ff,
        "num_layers": num_layers,
        "num_decoder_layers": num_layers,
        "num_heads": num_heads,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }


SIZES = {
    "small": (geometry(512, 1024, 8, 6), 300_176_768),
    "base": (geometry(768, 2048, 12, 12), 582_401_280),
    "large": (geometry(1024, 2816, 24, 16), 1_229_581_312),
    "xl": (geometry(2048, 5120, 24, 32), 3_742_619_648),
    "xxl": (geometry(4096, 10240, 24, 64), 12_921_057_280),
}


def make_config(model: Path, run_dir: Path, **sections: dict[str, Any]) -> Config:
    value: dict[str, Any] = {
        "run_dir": str(run_dir),
        "task": {"fields": ["text"], "template": "{text}", "labels": ["good", "bad", "neither"], "max_tokens": 16},
        "data": {"inputs": [{"path": "texts.jsonl"}], "splits": {"labeled": 40, "unlabeled": 30, "test": 20}},
        "model": {"path": str(model)},
        "engine": {"num_processes": 2},
    }
    for name, section in sections.items():
        value[name] = value.get(name, {}) | section
    return Config.model_validate(value)


def write_model(directory: Path, value: dict[str, Any]) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(value))
    return directory


def table(text: str) -> dict[str, list[str]]:
    """Rows of the printed tables: first cell (all words before the first number) -> the other cells."""
    rows = {}
    for line in text.splitlines():
        name, *cells = [cell for cell in line.split("  ") if cell.strip()] or [""]
        rows[name.strip()] = [cell.strip() for cell in cells]
    return rows


# --- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_of_the_released_models(name: str) -> None:
    from transformers import MT5Config

    value, total = SIZES[name]
    found = MT5.count_parameters(MT5Config.from_dict(value), 3)
    assert found.total == total
    assert found.embedding == found.whole_head == 250112 * value["d_model"]
    assert found.kept == total - (250112 - 3) * value["d_model"]


def test_counts_and_shares_of_the_design() -> None:
    from transformers import MT5Config

    found = {name: MT5.count_parameters(MT5Config.from_dict(value), 3) for name, (value, _) in SIZES.items()}
    assert {name: f"{one.total / 1e9:.2f}" for name, one in found.items() if name in ("large", "xl", "xxl")} == {
        "large": "1.23",
        "xl": "3.74",
        "xxl": "12.92",
    }
    shares = {name: round(100 * (one.embedding + one.whole_head) / one.total) for name, one in found.items()}
    assert (shares["large"], shares["xl"], shares["xxl"]) == (42, 27, 16)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_what_is_kept_is_what_the_scorer_has(num_tokens: int) -> None:
    import torch
    from transformers import MT5Config

    from alsace_dist.data.rows import Candidates
    from alsace_dist.models.decoding import CandidateForm
    from alsace_dist.models.mt5 import CandidateScorer, make_body

    def config() -> MT5Config:
        return MT5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=1, num_heads=2)

    rows = tuple((10 + index,) * num_tokens for index in range(4))
    form = CandidateForm.of([Candidates(rows)], (0,), num_tokens == 1, pad_id=0)
    with torch.device("meta"):
        scorer = CandidateScorer(make_body(config(), 0.0), form)
    found = MT5.count_parameters(config(), 4 if num_tokens == 1 else None)
    assert found.kept == sum(parameter.numel() for parameter in scorer.parameters())


# --- memory --------------------------------------------------------------------------------------------------------

THOUSAND = Parameters(body=900, embedding=400, whole_head=500, kept_head=100)
SECTION = TrainConfig(num_steps=1, learning_rate=1e-3)


def memory(stage: int, num_ranks: int, dtype: str = "bf16", offload: bool = False, **section: Any) -> Memory:
    raw = {"zero_optimization": {"reduce_bucket_size": 7}}
    engine = EngineConfig.model_validate(
        {"zero_stage": stage, "dtype": dtype, "offload_optimizer": offload, "deepspeed": raw}
    )
    return training_memory(THOUSAND, SECTION.model_copy(update=section), engine, num_ranks)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        # weights, gradients, optimizer, buffers, host
        (memory(0, 4), (2000, 6000, 12000, 0, 0)),
        (memory(0, 4, "fp32"), (4000, 4000, 8000, 0, 0)),
        (memory(1, 4), (2000, 4000, 3000, 0, 0)),
        (memory(1, 4, "fp32"), (4000, 5000, 3000, 28, 0)),
        (memory(2, 4), (2000, 1000, 3000, 14, 0)),
        (memory(2, 4, "fp32"), (4000, 2000, 3000, 28, 0)),
        (memory(3, 4), (500, 2000, 3000, 28, 0)),
        (memory(3, 4, "fp32"), (1000, 2000, 3000, 28, 0)),
        (memory(3, 3), (668, 2672, 4008, 28, 0)),  # 334 parameters on a rank
        (memory(2, 4, offload=True), (2000, 1000, 0, 814, 3000 + 1000 + 500 + 800)),
        (memory(3, 4, offload=True), (500, 0, 0, 28, 3000 + 2000)),
        (memory(2, 4, freeze_vocabulary=True), (2000, 600, 1800, 14, 0)),
        (memory(0, 1, optimizer="adafactor"), (2000, 6000, 4000, 0, 0)),
    ],
)
def test_memory_by_hand(found: Memory, expected: tuple[int, ...]) -> None:
    assert (found.weights, found.gradients, found.optimizer, found.buffers, found.host) == expected


def test_without_gradients_in_float32_it_is_the_papers_16_bytes() -> None:
    """Weights 2, float32 copy and moments 12; the paper's 2 for gradients are 4 in ZeRO-2 and 8 in ZeRO-3 here."""
    for stage, gradients in ((2, 4), (3, 8)):
        found = memory(stage, 1)
        assert found.states == (2 + gradients + 12) * 1000


def test_scoring_and_disk_by_hand() -> None:
    assert scoring_memory(THOUSAND, "bf16", 1) == 2000
    assert scoring_memory(THOUSAND, "bf16", 4) == 500
    assert scoring_memory(THOUSAND, "fp32", 1) == 4000
    assert model_bytes(THOUSAND) == 4 * 1400
    assert model_bytes(THOUSAND, "bf16") == 2 * 1400
    assert checkpoint_bytes(THOUSAND, SECTION) == 12000
    assert checkpoint_bytes(THOUSAND, SECTION.model_copy(update={"freeze_vocabulary": True})) == 12 * 600


CASES = ["0,bf16,0", "1,bf16,0", "2,bf16,0", "3,bf16,0", "2,fp32,0", "2,bf16,1", "3,bf16,1"]


def test_memory_is_what_deepspeed_holds_when_the_optimizer_steps() -> None:
    """Two ranks train a small model; the bytes of all live tensors against the formula, for every ZeRO stage."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", __file__, *CASES]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    assert [row["case"] for row in rows] == CASES, done.stderr[-3000:]
    for row in rows:
        assert row["measured"] == pytest.approx(row["planned"], rel=0.02), row


def _measure(cases: list[str]) -> None:
    """A rank of the test above: print planned and measured bytes of every case."""
    from alsace_dist.ranks import group

    ranks = group.start(EngineConfig(timeout_seconds=120))
    for case in cases:
        planned, measured = _measure_case(case, ranks)
        if ranks.is_main:
            print(json.dumps({"case": case, "planned": planned, "measured": measured}), flush=True)
    group.finish()


def _measure_case(case: str, ranks: Any) -> tuple[int, int]:
    from alsace_dist.data.rows import Candidates, EncodedRow
    from alsace_dist.models.decoding import CandidateForm, Collator
    from alsace_dist.training import engine

    stage, dtype, offload = case.split(",")
    raw = {"reduce_bucket_size": 2000} | ({"stage3_param_persistence_threshold": 0} if stage == "3" else {})
    settings = EngineConfig.model_validate(
        {
            "zero_stage": int(stage),
            "dtype": dtype,
            "offload_optimizer": offload == "1",
            "deepspeed": {"zero_optimization": raw} if stage != "0" else {},
        }
    )
    candidates = Candidates(((5,), (6,), (7,)))
    model = _EqualWeights(CandidateForm.of([candidates], (0,), single_token=True, pad_id=0))
    before = _live_tensors()  # held on to, so that nothing new takes their place
    module = engine.load_module(model, 0.0, settings, ranks)
    trainer = engine.TrainEngine(module, settings, TrainConfig(num_steps=1, learning_rate=1e-3), ranks)
    rows = [EncodedRow(key, "en", None, [3, 4, 5, 1], candidates, 0, False) for key in ("a", "b")]
    arguments = Collator(model.form)(rows).to(ranks.device)
    seen: list[int] = []
    step = trainer.optimizer.step

    def watched_step(*given: Any, **named: Any) -> Any:
        now = _live_tensors()
        seen.append(sum(now[place].untyped_storage().nbytes() for place in now.keys() - before.keys()))
        return step(*given, **named)

    trainer.optimizer.step = watched_step  # type: ignore[method-assign]
    losses = [lambda scorer: {"loss": -scorer(*arguments)[:, 0].sum()}] * 2  # two micro-batches
    trainer.step(losses, 1e-3)
    trainer.engine.destroy()
    planned = training_memory(MT5.count_parameters(model.config(), 3), SECTION, settings, ranks.world_size)
    # The bucket of ZeRO-1 and 2 is gone when the optimizer steps; it is as good as nothing here.
    return planned.states + planned.buffers + planned.host, max(seen)


class _EqualWeights:
    """A model for training that needs no file: every weight is the same."""

    directory = Path()
    config_changes: Mapping[str, Any] = {}
    vocabulary = frozenset({"body.shared.weight"})
    delicate = ("head.weight",)

    def __init__(self, form: Any) -> None:
        self.form = form
        self.shapes = {name: parameter.shape for name, parameter in self.build(0.0, False).named_parameters()}

    @staticmethod
    def config() -> Any:
        from transformers import MT5Config

        return MT5Config(
            vocab_size=1500, d_model=128, d_kv=32, d_ff=512, num_layers=3, num_decoder_layers=2, num_heads=4
        )

    def build(self, dropout: float, gradient_checkpointing: bool) -> Any:
        from alsace_dist.models.mt5 import make_scorer

        return make_scorer(self.config(), self.form, dropout, gradient_checkpointing)

    def initial_value(self, name: str, part: slice = slice(None)) -> Any:
        import torch

        return torch.full(self.shapes[name], 0.01)[part]

    def exported(self, name: str, value: Any) -> dict[str, Any]:
        raise NotImplementedError  # nothing is exported

    def remaining(self, written: Any) -> Any:
        raise NotImplementedError


def _live_tensors() -> dict[int, Any]:
    """A tensor of every storage in memory, by the storage's address."""
    import torch

    gc.collect()
    found: dict[int, Any] = {}
    for known in gc.get_objects():
        if not issubclass(type(known), torch.Tensor) or known.device.type == "meta":
            continue
        for tensor in (known, known.grad if known.is_leaf else None, getattr(known, "ds_tensor", None)):
            if tensor is not None:
                found[tensor.untyped_storage().data_ptr()] = tensor
    return found


# --- steps and batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "epochs"), [(1, 1.0), (7, 3.0), (64, 0.5), (1000, 2.0)])
def test_steps_are_those_of_the_loop(batch: int, epochs: float) -> None:
    counts = [13, 0, 40, 7]
    section = TrainConfig(num_epochs=epochs, learning_rate=1e-3, global_batch_size=batch)
    assert num_steps(section, sum(counts)) == CanonicalOrder(counts, batch, 5).num_steps(epochs)
    fixed = TrainConfig(num_steps=11, learning_rate=1e-3, global_batch_size=batch)
    assert num_steps(fixed, sum(counts)) == 11


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """90 groups; en and de in all of them, sw in every third."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for number in range(90):
        languages = ["en", "de"] + ["sw"] * (number % 3 == 0)
        texts = {language: {"text": f"{language} text {number}"} for language in languages}
        rows.append({"id": str(number), "label": ["good", "bad", "neither"][number % 3], "texts": texts})
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = write_model(tmp_path / "model", SIZES["small"][0])
    variants = {"paper": {"method": "paper"}, "long": {"rounds": 3}}
    config = make_config(
        model,
        tmp_path / "run",
        data={"groups_per_shard": 8},
        finetune={"num_epochs": 3, "global_batch_size": 5, "num_examples": 17},
        distill={"num_epochs": 2, "global_batch_size": 6},
        score={"tokens_per_batch": 100},
        engine={"zero_stage": 3, "num_processes": 2},
    )
    return Config.model_validate(config.model_dump(exclude_unset=True) | {"variants": variants})


def test_print_plan_without_data_says_so(prepared: Config, capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(prepared)
    text = capsys.readouterr().out
    assert "not prepared yet" in text and "score test" not in text
    rows = table(text)
    assert rows["all"] == ["300,176,768", "300.18 M"]
    assert rows["output head, rows kept here"] == ["1,536"]
    # ZeRO-3 on two ranks: (2 + 8 + 12) bytes of 172 M parameters each, halved.
    assert rows["* 3"] == ["0.172", "0.688", "1.03", "1.89", "0.688", "-"]
    assert "Scoring: 0.344 where a rank has all weights, 0.172 where all ranks share them out" in text
    assert rows["0"][:4] == ["0.344", "1.03", "2.07", "3.44"]
    assert rows["exported model"] == ["1.20", "6 in the end"]  # finetune, the run, paper, three rounds of long
    assert "2 ranks" in text


def test_the_number_of_processes_given_wins(prepared: Config, capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(prepared, 16)
    text = capsys.readouterr().out
    assert "16 ranks" in text
    assert table(text)["* 3"][:4] == ["0.022", "0.086", "0.129", "0.237"]
    for number in (0, -1):
        with pytest.raises(UserError, match=f"--num-processes={number}"):
            print_plan(prepared, number)


def test_print_plan_of_prepared_data(prepared: Config, capsys: pytest.CaptureFixture[str]) -> None:
    found = prepare(prepared, Path(prepared.run_dir) / "data")
    num = {split: sum(sum(s.num_examples.values()) for s in data.shards) for split, data in found.items()}
    print_plan(prepared)
    rows = table(capsys.readouterr().out)
    assert rows["finetune"] == ["40", "17", "10", "1"]  # 3 * 17 / 5 = 10.2
    steps = str(round(2 * num["unlabeled"] / 6))
    assert rows["distill"] == ["30", str(num["unlabeled"]), steps, "1"]
    assert rows["distill (paper)"] == rows["distill"]
    assert rows["distill (long)"] == [*rows["distill"][:-1], "3"]
    assert rows["score test"][:2] == ["20", str(num["test"])] and rows["score test"][3] == "6"  # 1 + 1 + 1 + 3
    assert rows["score unlabeled"][3] == "3"  # before distillation, and after rounds 1 and 2 of long
    for split in ("test", "unlabeled"):
        # As many batches as there are if every prompt is as long as it may be; else fewer.
        per_shard = [sum(shard.num_examples.values()) for shard in found[split].shards]
        longest = sum(len(score_batches([16] * count, 100)) for count in per_shard)
        assert int(rows[f"score {split}"][2]) == longest
        rng = np.random.default_rng(0)
        for _ in range(20):
            lengths = [rng.integers(1, 17, size=count).tolist() for count in per_shard]
            assert sum(len(score_batches(row, 100)) for row in lengths) <= longest


def test_an_example_may_be_several_prompts(prepared: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own without context, or one for each of its candidates: batches hold as many fewer examples."""
    found = prepare(prepared, Path(prepared.run_dir) / "data")
    task = prepared.task.model_copy(update={"candidate_score": "pmi", "context_free_template": "{answer}"})
    print_plan(prepared.model_copy(update={"task": task}))
    text = capsys.readouterr().out
    longest = sum(len(score_batches([32] * sum(s.num_examples.values()), 100)) for s in found["test"].shards)
    assert int(table(text)["score test"][2]) == longest
    assert "An example is 2 prompts, one with context and one without." in text
    own = prepared.task.model_copy(update={"candidates": "own", "labels": []})
    three = prepared.task.model_copy(update={"candidates": ["a", "b", "c"], "labels": ["a", "b", "c"]})
    for one, mode, number in ((own, "head", 2), (three, "head", 3), (three, "cloze", 1), (prepared.task, "head", 1)):
        assert prompts_per_example(prepared.model_copy(update={"task": one}), mode)[0] == number


def test_a_directory_of_data_that_is_not_there_is_an_error(prepared: Config, tmp_path: Path) -> None:
    config = make_config(tmp_path / "model", tmp_path / "run")
    value = config.model_dump(exclude_unset=True) | {"data": {"directory": str(tmp_path / "nowhere")}}
    with pytest.raises(UserError, match="nowhere/unlabeled"):
        print_plan(Config.model_validate(value))


# --- models --------------------------------------------------------------------------------------------------------


def test_the_demo_is_planned_with_zero_0_for_pretraining(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "configs" / "demo.yaml"
    print_plan(load_config(path, {"run_dir": str(tmp_path / "run"), "engine.zero_stage": 3}))
    text = capsys.readouterr().out
    assert "fp32: pretrain with adafactor" in text and "fp32: finetune and distill with adamw" in text
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if "pretrain with adafactor" in line)
    assert lines[start + 2].startswith("* 0") and not lines[start + 3].startswith("  1")
    assert sum(line.startswith("* 3") for line in lines) == 1
    assert "vocabulary 2,000" in text and "3 in the end" in text


def test_a_model_that_is_nowhere_is_one_clear_error(tmp_path: Path) -> None:
    config = make_config(Path("nobody/nothing"), tmp_path / "run")
    with pytest.raises(UserError, match=r"model\.path: 'nobody/nothing' is neither a directory nor") as caught:
        print_plan(config)
    assert "\n" not in str(caught.value)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {"model_type": "bert"})
    with pytest.raises(UserError, match=r"config.json: model_type is 'bert'"):
        print_plan(make_config(model, tmp_path / "run"))


if __name__ == "__main__":
    _measure(sys.argv[1:])
