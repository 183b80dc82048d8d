"""Speed and memory of scoring and training on one GPU, beside a bare PyTorch loop and beside what the plan predicts.

    python benchmarks/gpu.py --out=gpu.json    # mT5-large, XL, and XXL with adapters (LoRA)
    python benchmarks/gpu.py --size=tiny       # the same in small, also without a GPU

Weights and token ids are random, so nothing is downloaded; lengths are distributed as in XNLI (premise and hypothesis,
log-normal around 45 tokens), with three answers of one token after a decoder prefix of two. First the results are
checked against float32 on the CPU. Then each part times blocks of the project's code and of a bare loop (the same
module, precision and batches, padded and on the device beforehand) in turn, A B A B; shown are the medians, and of the
ratios of neighbouring blocks the median, the least and the largest. Every training block builds its model anew, for
two models with their optimizers do not fit side by side.

MFU is model FLOPs per second over the GPU's dense bf16 peak. Model FLOPs are two per multiply-add of real tokens
(padding counts for nothing): every encoder token through the encoder's matrices and through the keys and values of the
decoder's cross-attention, every decoder token through the decoder's other matrices, and the products of the attention
itself. Embedding look-ups, norms and the K rows of the head are left out. Training counts three times the forward
pass, with adapters twice (most weights get no gradient), also where gradient checkpointing makes the hardware do it
once more.

Memory: *plan* is what alsace_dist/plan predicts of weights, gradients, optimizer and buffers; *states* is the peak of
a step on one short example (scoring: the weights), to compare with it; *peak* has the activations as well, to compare
with *plan peak*, which is an upper bound: states and activations are not largest at the same time.
"""

import argparse
import faulthandler
import math
import os
import platform
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpu_work as work
import numpy as np
import torch
from gpu_work import SIZES, RandomWeights, Row, Runs

from alsace_dist.config import EngineConfig
from alsace_dist.data.stream import score_batches
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import write_json
from alsace_dist.plan.cost import backward_share
from alsace_dist.plan.memory import scoring_memory, training_memory
from alsace_dist.ranks.group import STOP_SIGNALS, Ranks, finish, start
from alsace_dist.training.engine import inference_module

LEAST_RATIO = 0.95  # of the bare loop's speed
# Dense bf16 peaks of the makers' data sheets, FLOP/s.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "A10G": 70e12}


# --- parts ---------------------------------------------------------------------------------------------------------


def measure_scoring(name: str, group: Ranks, deadline: float) -> Row:
    """Scoring in bf16, in batches of a token budget."""
    size, config, device = SIZES[name], EngineConfig(), group.device
    rows, weights = work.make_prompts(size, size.num_rows), RandomWeights(size, device)
    batches = score_batches([len(row.input_ids) for row in rows], size.tokens_per_batch)
    predicted = scoring_memory(weights.parameters, config.dtype, 1)
    row = work.make_row(f"score {name}", size, f"{size.tokens_per_batch:,} tokens a batch", predicted, rows, 1)
    lengths = [len(prompt.input_ids) for prompt in rows]
    row.plan_activation_bytes = max(one.largest_layer + one.working for one in work.activations(size, lengths, batches))
    module = inference_module(weights.load(config, group), config, group)
    work.take_peak(device)
    row.states_bytes = work.take_peak(device)
    contestants: dict[str, Callable[[], Runs]] = {
        "ours": lambda: nullcontext(partial(work.log_probs, module, rows, batches, device)),
        "bare": lambda: work.bare_scoring(module, rows, batches, device),
    }
    return work.compare(row, contestants, contestants["bare"], size, device, deadline)


def measure_training(name: str, config: EngineConfig, group: Ranks, with_engine: bool, deadline: float) -> Row:
    """Training with one ZeRO stage; without DeepSpeed the bare loop alone; with checkpointing if memory runs out."""
    size, section, device = SIZES[name], SIZES[name].section, group.device
    examples, weights = work.make_examples(size, section.global_batch_size), RandomWeights(size, device)
    prompts = [example.row for example in examples]
    memory = training_memory(weights.parameters, section, config, 1)
    settings = f"ZeRO-{config.zero_stage}" if with_engine else "no DeepSpeed"
    settings += f", {section.global_batch_size} in micro-batches of at most {section.micro_batch_size}"
    settings += ", embedding frozen" * section.freeze_vocabulary + ", checkpointing" * config.gradient_checkpointing
    settings += f", LoRA of rank {section.lora.rank}" if section.lora else ""
    times = 1 + backward_share(section)
    row = work.make_row(f"train {name}", size, settings, memory.states + memory.buffers, prompts, times)
    lengths = [len(prompt.input_ids) for prompt in prompts]
    kept = work.activations(size, lengths, work.cut_step(lengths, section, device))
    is_frozen = section.freeze_vocabulary or section.lora is not None
    row.plan_activation_bytes = max(one.most(config.gradient_checkpointing, is_frozen) for one in kept)
    common = (weights, examples, config, section, group)
    contestants: dict[str, Callable[[], Runs]] = {"bare": lambda: work.bare_training(*common)}
    if with_engine:
        contestants = {"ours": lambda: work.training(*common, row)} | contestants
    collating = partial(work.split, examples, section, device)
    try:
        return work.compare(row, contestants, collating, size, device, deadline)
    except torch.OutOfMemoryError:
        if config.gradient_checkpointing:
            raise
    work.release()
    again = config.model_copy(update={"gradient_checkpointing": True})
    return measure_training(name, again, group, with_engine, deadline)


def check(group: Ranks, with_engine: bool, rows: list[dict[str, Any]]) -> None:
    """The tiny model on this device against float32 on the CPU: log-probabilities, and losses over three steps.

    The CPU's losses are the bare loop's, so this also shows that the two loops do the same. Results go into ``rows``.
    """
    size, cpu = SIZES["tiny"], replace(group, device=torch.device("cpu"))
    weights, section = RandomWeights(size, cpu.device), size.section
    examples, prompts = work.make_examples(size, section.global_batch_size), work.make_prompts(size, size.num_rows)
    batches = score_batches([len(prompt.input_ids) for prompt in prompts], size.tokens_per_batch)

    def add(what: str, differences: np.ndarray, most: float) -> None:
        value = float(np.abs(differences).max())
        difference = value if math.isfinite(value) else None
        rows.append({"what": what, "difference": difference, "most": most, "good": value <= most})

    def scored(config: EngineConfig, place: Ranks) -> np.ndarray:
        return work.log_probs(weights.load(config, place).eval(), prompts, batches, place.device)

    def losses(opened: Runs) -> np.ndarray:
        with opened as run:
            return np.array([float(run()) for _ in range(3)])

    exact = EngineConfig(dtype="fp32", zero_stage=0)
    log_probs = scored(exact, cpu)
    assert log_probs.std() > 0.1, "answers that hardly differ would check nothing"
    expected = losses(work.bare_training(weights, examples, exact, section, cpu))
    assert expected[-1] < 0.95 * expected[0], "steps that learn nothing would check nothing"
    for dtype, most, most_relative, most_apart in (("fp32", 1e-3, 1e-3, 1e-3), ("bf16", 0.1, 0.03, 0.01)):
        configs = [EngineConfig.model_validate({"dtype": dtype, "zero_stage": stage}) for stage in (0, 1, 2, 3)]
        add(f"{dtype}: log-probabilities, from the CPU's", scored(configs[0], group) - log_probs, most)
        found: list[np.ndarray] = []
        for config in configs if with_engine else ():
            found.append(losses(work.training(weights, examples, config, section, group)))
            name = f"{dtype}, ZeRO-{config.zero_stage}: losses of three steps, relative, from"
            add(f"{name} the CPU's", found[-1] / expected - 1, most_relative)
            if config.zero_stage > 0:
                add(f"{name} ZeRO-0's", found[-1] / found[0] - 1, most_apart)


# --- the command ---------------------------------------------------------------------------------------------------


def start_alone() -> Ranks:
    """A group of this process alone, as torchrun would start it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # a machine may have no other
    group = start(EngineConfig())
    for number in STOP_SIGNALS:  # there is nothing to save
        signal.signal(number, signal.SIG_DFL)
    return group


def deepspeed_problem() -> str | None:
    """Why DeepSpeed cannot be used here; None if it can."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        import deepspeed  # noqa: F401
    except Exception as error:  # it probes compilers and devices when it is imported
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def describe(device: torch.device) -> dict[str, Any]:
    """The device and the versions of what computes."""
    packages = ("torch", "transformers", "deepspeed", "numpy")
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda or "-"}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "-"
    if device.type == "cpu":
        return {"device": f"CPU ({platform.machine()})", "peak_flops": None, "versions": versions}
    name = torch.cuda.get_device_name(device)
    total = torch.cuda.get_device_properties(device).total_memory
    return {"device": f"{name}, {total / 1e9:.1f} GB", "peak_flops": peak_flops(name), "versions": versions}


def peak_flops(device_name: str) -> float | None:
    """Peak of a GPU by its name, None if it is not in the table."""
    return next((value for key, value in PEAK_FLOPS.items() if key in device_name), None)


HEADER = (
    *("part", "settings", "sequences/s", "tokens/s", "MFU", "bare sequences/s", "of bare (least to most)"),
    *("making batches", "plan GB", "states GB", "plan peak GB", "peak GB", "bare peak GB"),
)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of the report in Markdown."""

    def count(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    def size(value: int | None) -> str:
        return "-" if value is None else f"{value / 1e9:.2f}"

    lines = [HEADER, ["---"] * len(HEADER)]
    for row in rows:
        rates = [count(row["sequences_per_second"]), count(row["tokens_per_second"]), share(row["mfu"])]
        ratio = " ".join(share(row[key]) for key in ("ratio", "ratio_min", "ratio_max"))
        peaks = [size(row["peak_bytes"].get(name)) for name in ("ours", "bare")]
        planned_peak = row["plan_bytes"] + row["plan_activation_bytes"]
        sizes = [size(row["plan_bytes"]), size(row["states_bytes"]), size(planned_peak), *peaks]
        lines.append([row["part"], row["settings"], *rates, count(row["bare_sequences_per_second"]), ratio,
                      share(row["collating_share"]), *sizes])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    lines = [f"{report['device']}; {versions}", "", "| check | difference | at most | |", "| --- | --- | --- | --- |"]
    for row in report["checks"]:
        difference = "not finite" if row["difference"] is None else f"{row['difference']:.2g}"
        lines.append(f"| {row['what']} | {difference} | {row['most']:.2g} | {'good' if row['good'] else 'FAILED'} |")
    lines += ["", table(report["rows"]), ""]
    if ratios := [row["ratio"] for row in report["rows"] if row["ratio"] is not None]:
        answer = "yes" if min(ratios) >= LEAST_RATIO else "no"
        lines += [f"Every part at {LEAST_RATIO:.0%} of the bare loop's speed or more: {answer}.", ""]
    return "\n".join([*lines, *(f"- {note}" for note in report["notes"])])


Part = tuple[str, Callable[[], Row | None]]


def list_parts(
    sizes: list[str], group: Ranks, with_engine: bool, checks: list[dict[str, Any]], deadline: float
) -> list[Part]:
    """What is done, the most important first: ZeRO-1 is the default, ZeRO-0 the plainest.

    ZeRO-3 is checked and not timed: DeepSpeed does not give back what its engine held.
    """

    def train(name: str, stage: int) -> Part:
        config = EngineConfig.model_validate({"zero_stage": stage})
        return f"train {name}, ZeRO-{stage}", partial(measure_training, name, config, group, with_engine, deadline)

    parts: list[Part] = [("check", partial(check, group, with_engine, checks))]
    for name in sizes:
        parts += [(f"score {name}", partial(measure_scoring, name, group, deadline)), train(name, 1)]
    if with_engine:
        parts.append(train("tiny, adapters", 1) if sizes == ["tiny"] else train(sizes[0], 0))
    return parts


def measure(parts: list[Part], report: dict[str, Any], deadline: float, out: Path | None) -> bool:
    """Do part after part into ``report``, which is written after each; whether all went well."""
    is_good = True
    for label, part in parts:
        begin = time.monotonic()
        try:
            if begin > deadline:
                raise UserError("not started, the time limit is over")
            if row := part():
                report["rows"].append(asdict(row) | row.summary(report["peak_flops"]))
                print(table(report["rows"]).splitlines()[-1], file=sys.stderr)
        except UserError as error:
            report["notes"].append(f"{label}: {error}")
        except Exception as error:  # the other parts are worth having all the same
            traceback.print_exc()
            report["notes"].append(f"{label}: failed: {type(error).__name__}: {error}".splitlines()[0][:300])
            is_good = False
        work.release()
        print(f"{label}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        if out:
            write_json(out, report)
    return is_good and all(row["good"] for row in report["checks"])


def main() -> None:
    """Check, measure, print; exit code 1 if a check or a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[name for name in SIZES if name.isalpha()], help="without it: large, xl, xxl")
    parser.add_argument("--time-limit", type=float, default=340, help="seconds after which nothing new is started")
    parser.add_argument("--out", type=Path, help="JSON file for the results, written after every part")
    flags = parser.parse_args()
    if not torch.cuda.is_available() and flags.size != "tiny":
        parser.exit(2, "benchmarks/gpu.py: there is no GPU here, and without one only --size=tiny runs\n")
    if flags.out:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + flags.time_limit
    faulthandler.dump_traceback_later(flags.time_limit + 100, exit=True)  # a part that hangs ends here
    group = start_alone()
    report = describe(group.device) | {"checks": [], "rows": [], "notes": []}
    problem = deepspeed_problem()
    if problem:
        report["notes"].append(f"DeepSpeed cannot be used ({problem}): only scoring and bare training are measured")
    sizes = [flags.size] if flags.size else ["large", "xl", "xxl"]
    parts = list_parts(sizes, group, problem is None, report["checks"], deadline)
    is_good = measure(parts, report, deadline, flags.out)
    print(markdown(report))
    finish()
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
