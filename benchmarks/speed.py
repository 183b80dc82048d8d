"""How fast, as ratios measured in one run: ours in turns with others that compute the same, and checked to.

    python benchmarks/speed.py [--tiny] [--sections=pairwise,data]

Two CPU ranks, mT5-small's geometry with its vocabulary of 250,112, random weights, bf16; the texts are Debian's package
descriptions in 12 languages (benchmarks/debian/data.py fetches them), whole. ``--tiny``: a tiny model, float32 and the
demo's sentences, so that a test can run all of it.

The contenders are whole loops that run in turns, a shard or a step each, in an order that rotates:

* ours: the stages *score* and *distill*, shards, manifests and all, with default settings (ZeRO-1) but for smaller
  shards (16 groups) and scoring batches (2,048 tokens), so that a turn is short, the paper's batch of 32 examples per
  language (384), and a reduce bucket of 5e7 elements, so that two engines find room in 24 GB;
* bare scoring: ``CandidateScorer`` over the same batches, ready-made tensors, nothing is read or written;
* ``generate(max_new_tokens=1, output_scores=True)`` over the same ready-made batches;
* bare training: the same model and micro-batches, ready-made tensors; gradients summed in float32, clipped; fused AdamW
  on float32 weights of which each rank updates half and then gathers the other: the work of ZeRO-1, by hand;
* ``transformers.Trainer`` with the same DeepSpeed settings, examples and targets, through mT5's whole head; its batches
  are 16 of a rank's examples of a step in their order, and ours has micro-batches of 16 at most in those turns;
* pairwise distillation, as the paper's authors' code does it: for every pair of a teacher and another language two
  forwards through the whole head and one backward; here without gradients for the teacher, and with one optimizer step
  (that of bare training) for all pairs. Ours does the same groups: a scoring pass and a step.

Before anything is timed, ``agreement`` asserts in float32 that they compute the same; while timed, losses and scores
are compared again within the rounding of the timed precision. Takes 25 minutes on two idle cores and 23 GB of memory.
"""

import argparse
import dataclasses
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from speed_contenders import (
    Contender,
    bare_training,
    by_language,
    encode,
    generated_log_probs,
    load_whole,
    ours_scoring,
    ours_training,
    own_stream,
    pairwise_loss,
    pairwise_training,
    plain_scoring,
    ready_batches,
    take_turns,
    tokenise,
    trainer_training,
    whole_log_probs,
)
from speed_world import NUM_RANKS, SIZES, SOURCE, World, make_world

from alsace_dist.config import Config, DistillConfig, ScoreConfig
from alsace_dist.data.rows import Example
from alsace_dist.data.stream import score_batches
from alsace_dist.files.layout import Layout, data_url
from alsace_dist.files.scores import read_score_file
from alsace_dist.files.selection import read_selection
from alsace_dist.files.shards import open_dataset
from alsace_dist.method.targets import targets
from alsace_dist.monitor.sinks import METRICS, read_scalars
from alsace_dist.ranks.group import Ranks, finish, start
from alsace_dist.stages import select
from alsace_dist.stages.base import Stage

HERE = Path(__file__).parent
RESULT = "result.json"
# What, value, range over the blocks, aim.
Row = dict[str, str]


def require_agreement(what: str, ours: Any, others: Any, tolerance: float) -> None:
    """Raises ``SystemExit`` unless two sequences of numbers agree within ``tolerance`` of the largest."""
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(others, dtype=np.float64)
    difference = float(np.abs(a - b).max() / np.abs(a).max())
    if not difference <= tolerance:
        raise SystemExit(f"speed: {what}: differ by {difference:.1e} of the largest, allowed are {tolerance:.0e}")
    print(f"{what}: agree within {difference:.1e}", file=sys.stderr)


def tolerance(world: World, bf16: float) -> float:
    """What may differ while timed: in float32 hardly anything."""
    return bf16 if world.size.dtype == "bf16" else 1e-3


def ratio_row(what: str, numerators: Sequence[float], denominators: Sequence[float], aim: str = "") -> Row:
    """A row with the median of the blocks' ratios."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return {
        "what": what,
        "value": f"{median(ratios):.2f}",
        "range": f"{min(ratios):.2f} to {max(ratios):.2f}",
        "aim": aim,
    }


def share_row(what: str, parts: Any, wholes: Any, aim: str) -> Row:
    """A row with the share over everything, and the least and most of one step or shard."""
    shares = np.divide(parts, wholes)
    value, least, most = (f"{share:.1%}" for share in (np.sum(parts) / np.sum(wholes), shares.min(), shares.max()))
    return {"what": what, "value": value, "range": f"{least} to {most}", "aim": aim}


def agreement(world: World, ranks: Ranks) -> list[Row]:
    """In float32, four languages of a group on each rank: scores, losses and gradients are the same."""
    import torch

    from alsace_dist.training.engine import load_module
    from alsace_dist.training.losses import FrozenTargetLoss

    config = world.config("pairs", "paper", "fp32")
    model, (rows,) = encode(world, config, slice(ranks.rank, ranks.rank + 1))
    rows = [row for row in rows if row.key == rows[0].key][:4]
    scorer = load_module(model, 0.0, config.engine, ranks)
    whole, vocabulary = load_whole(world, config)
    whole_scores = partial(whole_log_probs, whole, vocabulary)
    inputs = model.collate(rows)
    log_probs = scorer(*inputs.to(ranks.device))
    with torch.no_grad():
        generated = generated_log_probs(whole, vocabulary, *inputs.to(ranks.device))
    require_agreement("scores and those of generate", log_probs.tolist(), generated.tolist(), 1e-4)
    group = {row.language: one.numpy() for row, one in zip(rows, log_probs.detach(), strict=True)}
    teachers = sorted(group)[:2]
    found = targets(group, dict.fromkeys(teachers, 0.5), "others")
    examples = [
        Example(row, target.probabilities, target.weight, target.entropy)
        for row in rows
        if (target := found[row.language])
    ]
    loss_of = FrozenTargetLoss(inputs, examples, ranks.device)
    loss = loss_of(scorer)["loss"]
    loss.backward()
    with torch.no_grad():
        with_whole_head = loss_of(whole_scores)["loss"]
    require_agreement("losses and those of Trainer", [loss.item()], [with_whole_head.item()], 1e-3)
    pairs = pairwise_loss(whole_scores, by_language(model, rows), teachers, 1.0)
    require_agreement("losses and those of pairs", [loss.item()], [pairs], 1e-3)
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    gradients = [module.get_parameter(key).grad.tolist() for module, key in ((scorer, f"body.{name}"), (whole, name))]
    require_agreement("gradients and those of pairs", *gradients, 1e-2)
    return []


def scoring(world: World, ranks: Ranks) -> list[Row]:
    """Ours, a bare loop and generate, a shard per rank in each block; the first block is a warm-up."""
    from alsace_dist.training.engine import load_module

    config = world.config("timed")
    model, shards = encode(world, config, slice(ranks.rank, None, ranks.world_size))
    cuts = [score_batches([len(row.input_ids) for row in rows], world.size.tokens_per_batch) for rows in shards]
    ready = [
        [model.collate([rows[index] for index in batch]) for batch in cut]
        for rows, cut in zip(shards, cuts, strict=True)
    ]
    scorer = load_module(model, 0.0, config.engine, ranks)
    generate = partial(generated_log_probs, *load_whole(world, config))
    directory = Layout(Path(config.run_dir)).scores(0, "unlabeled")
    bare_results: list[np.ndarray] = []
    generate_results: list[np.ndarray] = []
    contenders = [
        Contender("ours", lambda pause: ours_scoring(world, ranks, config, [directory], pause)),
        Contender("bare", lambda pause: plain_scoring(scorer.eval(), ready, bare_results, pause)),
        Contender("generate", lambda pause: plain_scoring(generate, ready, generate_results, pause)),
    ]
    take_turns(ranks, [[one] for one in contenders], 1)
    blocks = take_turns(ranks, [[one] for one in contenders], world.size.num_blocks + 1)[1:]
    contenders[0].advance()  # merges and writes the manifest
    ranks.main_first(lambda: Stage(select, "select", config, round=1).run(None))
    stems = [shard.stem for shard in open_dataset(data_url(config, "unlabeled")).shards[ranks.rank :: ranks.world_size]]
    scores = [read_score_file(directory / f"{stem}.parquet").log_probs for stem in stems]
    ours = np.stack([own[i] for own, cut in zip(scores, cuts, strict=True) for batch in cut for i in batch])
    require_agreement(
        "timed scores and those of the bare loop", ours, np.concatenate(bare_results), tolerance(world, 1e-2)
    )
    require_agreement(
        "timed scores and those of generate", ours, np.concatenate(generate_results), tolerance(world, 3e-2)
    )
    mine, bare, generated = zip(*blocks, strict=True)
    return [
        ratio_row("scoring: time of ours / of a bare PyTorch loop", mine, bare, "at most 1.05"),
        ratio_row("scoring: time of `generate(max_new_tokens=1, output_scores=True)` / of ours", generated, mine),
    ]


def logged(config: Config) -> list[dict[str, float]]:
    """What our training has logged so far, step by step."""
    return read_scalars(Layout(Path(config.run_dir)).distill(1) / METRICS)


def against(
    world: World, ranks: Ranks, other: Callable[..., None], num_compared: int, num_alone: int = 0, **section: Any
) -> tuple[list[list[float]], list[list[float]], list[dict[str, float]]]:
    """Our training against another loop: seconds per block, and CPU seconds; what ours logged, the last ``num_alone``
    steps of it unbroken.

    The losses of the first ``num_compared`` steps must agree. ``section``: settings of distillation.
    """
    num_steps = world.size.num_blocks + 1
    config = world.config("timed", **section)
    begun: list[Any] = []
    losses: list[float] = []
    ours = Contender("ours", lambda pause: ours_training(ranks, config, begun, pause))
    ours.advance()
    rival = Contender(other.__name__, lambda pause: other(world, ranks, begun[0], num_steps, losses, pause))
    for contender in (ours, rival):
        ranks.barrier()
        contender.advance()
    blocks = take_turns(ranks, [[ours], [rival]], world.size.num_blocks)
    cpu_blocks = [
        ranks.sum(*pair) for pair in zip(*(one.cpu_seconds[-len(blocks) :] for one in (ours, rival)), strict=True)
    ]
    for _ in range(num_alone + 1 if num_alone else 0):  # what the first of them logs includes the other's last turn
        ours.advance()
    ranks.barrier()
    rows = logged(config)
    summed = np.array(ranks.sum(*losses)).reshape(num_steps, -1).sum(axis=1)
    own = [row["loss"] for row in rows[:num_compared]]
    what = f"losses of {num_compared} steps and of {other.__name__}"
    require_agreement(what, own, summed[:num_compared], tolerance(world, 2e-2))
    return blocks, cpu_blocks, rows


def training(world: World, ranks: Ranks) -> list[Row]:
    """Against a bare loop; and what ours logs of padding and of waiting."""
    blocks, cpu_blocks, rows = against(world, ranks, bare_training, world.size.num_blocks + 1, num_alone=5)
    batch_size = world.config("timed").distill.global_batch_size
    seconds = [batch_size / row["sequences_per_second"] for row in rows]
    waited = [row["data_wait_share"] * one for row, one in zip(rows, seconds, strict=True)]
    tokens = [row["tokens_per_second"] * one for row, one in zip(rows, seconds, strict=True)]
    padded = [one / (1 - row["padding_share"]) for row, one in zip(rows, tokens, strict=True)]
    return [
        ratio_row("training: time of ours / of a bare PyTorch loop", *zip(*blocks, strict=True), aim="at most 1.05"),
        ratio_row("training: CPU time of ours / of a bare PyTorch loop, all ranks", *zip(*cpu_blocks, strict=True)),
        share_row(
            f"training: padding tokens with batches of {batch_size}", np.subtract(padded, tokens), padded, "at most 8 %"
        ),
        share_row("training: time waiting for data", waited[-5:], seconds[-5:], "at most 1 %"),
    ]


def trainer(world: World, ranks: Ranks) -> list[Row]:
    """Against transformers' Trainer."""
    # Before training in bf16 DeepSpeed takes an empty step, which ours undoes: Trainer's first updates are smaller.
    num_compared = 1 if world.size.dtype == "bf16" else world.size.num_blocks + 1
    micro = 16  # two engines in 24 GB, Trainer's with the whole head
    blocks, _, _ = against(world, ranks, trainer_training, num_compared, micro_batch_size=micro)
    ours, others = zip(*blocks, strict=True)
    what = f"training: time of `transformers.Trainer` with DeepSpeed / of ours, micro-batches of {micro}"
    return [ratio_row(what, others, ours)]


def pairwise(world: World, ranks: Ranks) -> list[Row]:
    """Distillation by the paper's rule: our scoring pass and a step on all groups, against all pairs and a step."""
    dataset = open_dataset(data_url(world.config("pairs"), "unlabeled"))
    num_examples = sum(sum(shard.num_examples.values()) for shard in dataset.shards)
    config = world.config("pairs", "paper", global_batch_size=num_examples)
    layout = Layout(Path(config.run_dir))
    num_blocks = world.size.num_pair_blocks
    first = layout.scores(0, "unlabeled")
    outputs = [first, *(layout.run / f"pass{number}" for number in range(num_blocks))]
    scored = Contender("scoring", lambda pause: ours_scoring(world, ranks, config, outputs, pause))
    for _ in range(3):  # up to the first shard; the shard of the warm-up pass; its manifest
        scored.advance()
    ranks.main_first(lambda: Stage(select, "select", config, round=1).run(None))
    teachers = read_selection(layout.selection(1)).teachers
    losses: list[float] = []
    trained = Contender("distillation", lambda pause: ours_training(ranks, config, [], pause))
    rival = Contender("pairs", lambda pause: pairwise_training(world, ranks, config, teachers, losses, pause))
    for contender in (trained, trained, rival):
        ranks.barrier()
        contender.advance()
    blocks = take_turns(ranks, [[scored, scored, trained], [rival]], num_blocks)
    summed = ranks.sum(*losses)[:1]
    ours, others = zip(*blocks, strict=True)
    require_agreement(
        "first timed losses and those of pairs", [logged(config)[0]["loss"]], summed, tolerance(world, 0.1)
    )
    num_languages = len(dataset.languages)
    what = f"{num_languages} languages, {len(teachers)} teachers, {dataset.num_groups} groups"
    return [ratio_row(f"distillation: time of the pairwise algorithm / of ours ({what})", others, ours)]


def data(world: World, ranks: Ranks) -> list[Row]:
    """Resuming far into a large dataset, and the padding with default batches, there; no model runs here."""
    config = world.config("large")
    begun: list[Any] = []
    Contender("ours", lambda pause: ours_training(ranks, config, begun, pause)).advance()
    ours = begun[0]
    begin = time.monotonic()
    tokenise(ours, ours.directory / "again", ranks)
    tokenising = ranks.max(time.monotonic() - begin)
    positions = {}
    for share in (0.0, 0.5, 0.9):
        ranks.barrier()
        begin = time.monotonic()
        stream = own_stream(ours, ranks)
        num_steps = stream.order.num_steps(1)
        batches = stream.batches(int(share * num_steps), num_steps, lambda step, batch: batch)
        next(batches)
        positions[share] = ranks.sum(time.monotonic() - begin)[0] / ranks.world_size
        batches.close()
    _, shards = encode(world, config, slice(6))
    tokens, padded = [], []
    for rows in shards:
        lengths = [len(row.input_ids) for row in rows]
        cut = score_batches(lengths, ScoreConfig().tokens_per_batch)
        tokens.append(sum(lengths))
        padded.append(sum(len(batch) * lengths[batch[0]] for batch in cut))
    default = ours.section.model_copy(update={"global_batch_size": DistillConfig().global_batch_size})
    steps = ready_batches(dataclasses.replace(ours, section=default), ranks, 20)
    trained = ranks.sum(*(sum(part.num_tokens for part in parts) for parts in steps))
    trained_padded = ranks.sum(*(sum(part.num_padded_tokens for part in parts) for parts in steps))
    seconds = ", ".join(f"{value:.1f} s at {share:.0%}" for share, value in positions.items())
    what = f"resuming in {stream.order.total:,} examples in {len(stream.order.counts)} shards: time to the first batch"
    return [
        share_row(
            f"training: padding tokens with batches of {default.global_batch_size}, the default",
            np.subtract(trained_padded, trained),
            trained_padded,
            "at most 8 %",
        ),
        share_row("scoring: padding tokens, default settings", np.subtract(padded, tokens), padded, "at most 8 %"),
        {"what": what, "value": seconds, "range": "", "aim": "at most 3 s"},
        {"what": "tokenising them, once", "value": f"{tokenising:.1f} s", "range": "", "aim": ""},
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Ranks, and the table

SECTIONS: list[Callable[[World, Ranks], list[Row]]] = [agreement, scoring, training, trainer, pairwise, data]


def main() -> None:
    """Make the world, run the sections, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and the demo's sentences")
    every = [section.__name__ for section in SECTIONS]
    parser.add_argument("--sections", default=",".join(every), help="which to run; default: all, %(default)s")
    parser.add_argument("--rank", nargs=2, metavar=("SECTIONS", "DIRECTORY"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    size = SIZES["tiny" if flags.tiny else "full"]
    if flags.rank:
        run_rank(flags.rank[0].split(","), World(Path(flags.rank[1]), size))
    names = flags.sections.split(",")
    if unknown := sorted(set(names) - set(every)):
        parser.error(f"--sections: no {unknown[0]!r}; there are {', '.join(every)}")
    if {"training", "trainer"} & set(names):  # they distil what was scored
        names.append("scoring")
    names = [name for name in every if name in names]
    if not flags.tiny and not (SOURCE / "test.jsonl").exists():
        subprocess.run([sys.executable, str(HERE / "debian/data.py"), "--out", str(SOURCE)], check=True)
    begin = time.monotonic()
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="runs", prefix="speed-") as folder:
        world = World(Path(folder), size)
        make_world(world)
        rows: list[Row] = []
        peak = 0.0
        # A group of ranks for each section, for what one holds in memory; the tiny ones have room for all.
        for group in [names] if flags.tiny else [[name] for name in names]:
            print(f"--- {', '.join(group)}, after {time.monotonic() - begin:.0f} s", file=sys.stderr)
            result = launch(group, world)
            rows += result["rows"]
            for row in result["rows"]:  # in case a later section fails
                print(f"{row['what']}: {row['value']} ({row['range']})", file=sys.stderr)
            peak = max(peak, result["peak_gb"])
    print_table(rows, world, peak, time.monotonic() - begin)


def launch(sections: list[str], world: World) -> dict[str, Any]:
    """Run sections on a process group of its own. Raises ``SystemExit`` if a rank fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(NUM_RANKS)}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__)), "--rank", ",".join(sections), str(world.directory)]
    command += ["--tiny"] * (world.size is SIZES["tiny"])
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=sys.stderr)
        for rank in range(NUM_RANKS)
    ]
    try:
        while any(one.poll() is None for one in processes) and not any(one.poll() for one in processes):
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    if any(process.wait() for process in processes):
        raise SystemExit(f"speed: {', '.join(sections)} failed")
    result: dict[str, Any] = json.loads((world.directory / RESULT).read_text())
    return result


def run_rank(sections: list[str], world: World) -> None:
    """One rank of a group; ends the process, with whatever loops still wait for a turn that will not come."""
    code = 1
    try:
        ranks = start(world.config("timed").engine)
        rows = [row for one in SECTIONS if one.__name__ in sections for row in one(world, ranks)]
        peak = ranks.sum(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)[0]
        if ranks.is_main:
            (world.directory / RESULT).write_text(json.dumps({"rows": rows, "peak_gb": peak}))
        finish()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def print_table(rows: list[Row], world: World, peak: float, seconds: float) -> None:
    """As Markdown: the machine, then the rows."""
    cpus = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in cpus.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    geometry = ", ".join(f"{name} {value:,}" for name, value in world.size.geometry.items())
    print(
        f"{models[0] if models else platform.processor()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GB; "
        f"Python {platform.python_version()}, {packages}; {NUM_RANKS} ranks of one thread; {geometry}; "
        f"{world.size.dtype}; most memory of all ranks {peak:.1f} GB; {seconds / 60:.0f} minutes in all.\n"
    )
    print("| measured | median or share | least to most | aim |")
    print("|---|---|---|---|")
    for row in rows:
        print(f"| {row['what']} | {row['value']} | {row['range']} | {row['aim']} |")


if __name__ == "__main__":
    main()
