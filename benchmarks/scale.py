"""Models of true size on two CPU ranks: does what is loaded, scored, trained and exported keep within its memory?

    python benchmarks/scale.py [--sizes large,large-bf16,xl] [--stages score,distill] [--directory runs/scale]

Generates checkpoints with random weights in the true geometry of mT5 (large: 1.2 B parameters, xl: 3.7 B, in bf16 as
the published ones are on disk), and runs the program's own commands on them in ZeRO-3. The memory of each rank is what
the kernel says that it holds itself (RssAnon), read all the while. The bound on loading, until the first batch is
scored: twice the rank's part of the weights, the largest slice that it reads in float32, and a gigabyte for the rest.
Exits with 1 beyond it. A pass then gathers layer by layer, at most the embedding, which gloo copies again. XL, whose
optimizer states would take 75 GB, learns with adapters (LoRA).
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

NUM_RANKS = 2
LABELS = ["positive", "negative", "neutral"]
GIGABYTE = 1e9
LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Size:
    """A geometry of mT5, and what is run with it. ``stages``: those that fit 24 GB together."""

    geometry: dict[str, int]
    dtype: str
    stages: tuple[str, ...]
    max_tokens: int = 16
    lora: bool = False
    file_bytes: int = 2 << 30


def _geometry(vocab_size: int, d_model: int, d_ff: int, num_heads: int, num_layers: int) -> dict[str, int]:
    return {"vocab_size": vocab_size, "d_model": d_model, "d_ff": d_ff, "d_kv": 64, "num_heads": num_heads} | {
        "num_layers": num_layers,
        "num_decoder_layers": num_layers,
    }


SIZES = {
    "tiny": Size(_geometry(3000, 64, 128, 2, 2), "fp32", ("score", "distill"), file_bytes=1 << 20),
    "large": Size(_geometry(250_112, 1024, 2816, 16, 24), "fp32", ("score",)),
    # A trained parameter takes 16 bytes, in float32 20, for which 24 GB are too few. A CPU without bf16 takes
    # some 50 times as long.
    "large-bf16": Size(_geometry(250_112, 1024, 2816, 16, 24), "bf16", ("score", "distill"), max_tokens=8),
    "xl": Size(_geometry(250_112, 2048, 5120, 32, 24), "bf16", ("score", "distill"), max_tokens=8, lora=True),
}


def main() -> None:
    """Parse the flags, make what is missing, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="large,large-bf16,xl", help=f"comma-separated; there are {', '.join(SIZES)}")
    parser.add_argument("--stages", help="comma-separated; by default all that fit")
    parser.add_argument("--directory", type=Path, default=Path("runs/scale"))
    flags = parser.parse_args()
    if unknown := set(flags.sizes.split(",")) - set(SIZES):
        parser.error(f"--sizes: no {', '.join(sorted(unknown))}; there are {', '.join(SIZES)}")
    print("| model | stage | seconds | GB of a rank's own memory: on loading | bound | at most |")
    print("|---|---|---|---|---|---|")
    is_kept = True
    for name in flags.sizes.split(","):
        size, directory = SIZES[name], flags.directory / name
        if not (directory / "model/config.json").exists():
            make_world(size, directory)
        bound = scoring_bound(size, directory / "model")
        for stage in flags.stages.split(",") if flags.stages else size.stages:
            found = measure(stage, directory)
            is_bound = stage == "score"  # a training's first passes come before its state is loaded
            is_kept = is_kept and not (is_bound and found.loading > bound)
            loading = [f"{found.loading / GIGABYTE:.2f}", f"{bound / GIGABYTE:.2f}"] if is_bound else ["", ""]
            cells = [name, stage, f"{found.seconds:.0f}", *loading, f"{found.most / GIGABYTE:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
        if (directory / "run/round1/distill/manifest.json").exists():
            check_export(directory / "model", directory / "run/round1/distill/model", size.lora)
    sys.exit(0 if is_kept else 1)


# --- a model and data ----------------------------------------------------------------------------------------------


def make_world(size: Size, directory: Path) -> None:
    """A checkpoint in several files, prepared data in a few short groups, and a config."""
    from alsace_dist.files.shards import ParallelGroup, write_dataset

    groups = [
        ParallelGroup(f"g{number}", None, {language: {"text": f"word {number}"} for language in ("de", "en", "fr")})
        for number in range(4)
    ]
    labeled = [ParallelGroup(group.key, number % 3, group.texts) for number, group in enumerate(groups)]
    for split, content in {"unlabeled": groups, "test": labeled}.items():
        write_dataset(directory / "data" / split, content, tuple(LABELS), 2, fingerprint={})
    write_model(size, directory / "model")
    (directory / "config.yaml").write_text(yaml.safe_dump(config_of(size, directory)))


def config_of(size: Size, directory: Path) -> dict[str, Any]:
    """ZeRO-3 for scoring as well; one step of distillation over two examples on each rank."""
    return {
        "run_dir": str(directory / "run"),
        "task": {"fields": ["text"], "template": "{text} <extra_id_0>", "labels": LABELS}
        | {"max_tokens": size.max_tokens},
        "data": {"directory": str(directory / "data"), "source_language": "en"},
        "model": {"path": str(directory / "model")},
        "finetune": None,
        "engine": {"num_processes": NUM_RANKS, "dtype": size.dtype, "zero_stage": 3, "gradient_checkpointing": True}
        | {"deepspeed": {"zero_optimization": {"stage3_max_live_parameters": 10**7, "reduce_bucket_size": 5 * 10**7}}},
        "score": {"tokens_per_batch": 4 * size.max_tokens, "sharding": "zero3"},
        "distill": {"num_steps": 1, "global_batch_size": 4, "freeze_vocabulary": True}
        | {"tokens_per_micro_batch": 2 * size.max_tokens, "log_every_steps": 1}
        | ({"lora": {"rank": 8}, "learning_rate": 1e-2} if size.lora else {}),
    }


def write_model(size: Size, directory: Path) -> None:
    """Random weights in bf16, in files of a bounded size, written tensor by tensor; and a tokenizer of a few pieces."""
    import torch
    from transformers import MT5Config

    from alsace_dist.models.mt5 import make_body
    from alsace_dist.models.nano import train_tokenizer
    from alsace_dist.training.tensor_file import write_tensors

    directory.mkdir(parents=True)
    texts = [f"word {number} of {label}" for number in range(200) for label in LABELS]
    train_tokenizer(iter(texts), 150, [LABELS]).save_pretrained(directory)
    config = MT5Config(**size.geometry, architectures=["MT5ForConditionalGeneration"], tie_word_embeddings=False)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in make_body(config, 0.0).named_parameters()}
    shapes["lm_head.weight"] = shapes["shared.weight"]
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        write_tensors(directory / name, pending)
        weight_map.update(dict.fromkeys(pending, name))
        pending.clear()

    for name, shape in shapes.items():
        value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        pending[name] = value.to(torch.bfloat16)
        if sum(one.nbytes for one in pending.values()) > size.file_bytes:
            flush()
    flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(directory)
    value = json.loads((directory / "config.json").read_text())  # which says of every mT5 that it is tied
    (directory / "config.json").write_text(json.dumps(value | {"tie_word_embeddings": False}))


# --- measuring -----------------------------------------------------------------------------------------------------


def scoring_bound(size: Size, model: Path) -> float:
    """Bytes: twice a rank's part, the largest slice that it reads in float32, a gigabyte."""
    from torch import float32

    from alsace_dist.models.mt5 import MT5
    from alsace_dist.models.weights import DTYPES

    parameters = MT5.count_parameters(MT5.load_config(model), len(LABELS))
    part = parameters.kept / NUM_RANKS * (DTYPES[size.dtype].itemsize)
    return 2 * part + parameters.embedding / NUM_RANKS * float32.itemsize + GIGABYTE


@dataclass(frozen=True)
class Measured:
    """Of a command: seconds, and the most bytes that a rank held itself, until it was loaded and in all."""

    seconds: float
    loading: float
    most: float


def measure(stage: str, directory: Path) -> Measured:
    """Run a command and look at its ranks all the while. Exits if it fails."""
    config = str(directory / "config.yaml")
    if stage == "distill":
        subprocess.run([sys.executable, "-m", "alsace_dist", "select", config], check=True)
    begin, loading, most = time.monotonic(), 0.0, 0.0
    command = [sys.executable, "-m", "alsace_dist", stage, config]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    is_loaded = threading.Event()
    listener = threading.Thread(target=pass_on, args=(process.stderr, f"{stage} ", is_loaded))
    listener.start()
    while process.poll() is None:
        most = max([most, *own_bytes(process.pid)])
        loading = loading if is_loaded.is_set() else most
        time.sleep(LOOK_SECONDS)
    listener.join()
    if process.returncode != 0:
        sys.exit(f"alsace {stage} {config} has failed")
    return Measured(time.monotonic() - begin, loading, most)


def pass_on(lines: Iterable[str], beginning: str, seen: threading.Event) -> None:
    """Print a command's lines, and tell when the first comes that begins so: a stage's progress."""
    for line in lines:
        if line.startswith(beginning):
            seen.set()
        print(line, end="", file=sys.stderr, flush=True)


def own_bytes(pid: int) -> Iterator[int]:
    """Of each rank below a launcher: memory of its own, without the pages of files that it reads."""
    with suppress(psutil.Error, OSError):
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error, OSError):
                lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
                yield from (int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def check_export(before: Path, after: Path, lora: bool) -> None:
    """The exported model holds every tensor of the first, in its shape, and was trained; with adapters, in its linear
    layers alone."""
    import torch

    from alsace_dist.models.weights import Weights

    old, new = Weights(before), Weights(after)
    assert old.keys() == new.keys(), sorted(old.keys() ^ new.keys())[:5]
    assert all(old.shape(key) == new.shape(key) for key in old.keys())  # noqa: SIM118 (not a mapping)
    name = "encoder.block.0.layer.0.SelfAttention.v.weight"
    assert not torch.equal(old.tensor(name).float(), new.tensor(name))
    assert torch.equal(old.tensor("shared.weight").float(), new.tensor("shared.weight"))  # frozen
    name = "encoder.final_layer_norm.weight"
    assert torch.equal(old.tensor(name).float(), new.tensor(name)) == lora
    print(f"exported: {len(new.keys())} tensors, as many as there were", flush=True)


if __name__ == "__main__":
    main()
