"""What benchmarks/speed.py measures on: a model with random weights, datasets of real texts, their configs."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alsace_dist.config import Config
from alsace_dist.files.layout import Layout
from alsace_dist.files.manifest import write_manifest
from alsace_dist.files.scores import KIND as SCORES
from alsace_dist.files.scores import Scores, write_scores
from alsace_dist.files.selection import Selection, write_selection
from alsace_dist.files.shards import ParallelGroup, write_dataset
from alsace_dist.method.targets import MODES

SOURCE = Path("runs/debian/source")
NUM_RANKS = 2
LABELS = ["games", "graphics", "libraries", "network", "science", "system", "text", "web"]
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Size:
    """What is measured on. ``num_pieces``: of the tokenizer, the vocabulary is padded with unused ones as mT5's is."""

    geometry: dict[str, int]
    num_pieces: int
    dtype: str
    num_blocks: int
    groups_per_shard: int
    tokens_per_batch: int
    global_batch_size: int
    num_pair_groups: int
    num_pair_blocks: int


MT5_SMALL = {"vocab_size": 250_112, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_heads": 6, "num_layers": 8}
TINY = {"vocab_size": 2_000, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 2, "num_layers": 2}
SIZES = {
    "full": Size(MT5_SMALL, 32_000, "bf16", 5, 16, 2048, 384, 8, 2),
    "tiny": Size(TINY, 1_000, "fp32", 3, 16, 1024, 64, 4, 2),
}


@dataclass(frozen=True)
class World:
    """Everything lies in one directory: ``model``, and a dataset and a run for each ``name``."""

    directory: Path
    size: Size

    @property
    def model(self) -> Path:
        """The model with random weights."""
        return self.directory / "model"

    def config(self, name: str, method: str = "calibrated", dtype: str = "", **distill: Any) -> Config:
        """A user's config for one dataset; what is not said here is the default."""
        return Config.model_validate(
            {
                "run_dir": str(self.directory / name / "run"),
                "method": method,
                "task": {"fields": ["text"], "template": "{text} <extra_id_0>", "labels": LABELS},
                "data": {"directory": str(self.directory / name)},
                "model": {"path": str(self.model)},
                "finetune": None,
                "engine": {
                    "num_processes": NUM_RANKS,
                    "dtype": dtype or self.size.dtype,
                    "deepspeed": {"zero_optimization": {"reduce_bucket_size": 50_000_000}},
                },
                "score": {"tokens_per_batch": self.size.tokens_per_batch},
                "distill": {"num_steps": 1000, "checkpoint_every_steps": 1000, "log_every_steps": 1}
                | {
                    "global_batch_size": self.size.global_batch_size,
                    "learning_rate": LEARNING_RATE,
                    "schedule": "constant",
                    "warmup_ratio": 0.0,
                }
                | distill,
            }
        )


def make_world(world: World) -> None:
    """Model and datasets: ``timed`` for scoring and training, ``pairs`` of complete groups, and the ``large`` one."""
    size = world.size
    groups = list(read_groups(world, "unlabeled"))
    write_model(world, (fields["text"] for group in groups for fields in group.texts.values()))
    # Spread over the whole file, which is sorted by name.
    chosen = groups[:: max(1, len(groups) // (2 * size.num_blocks * size.groups_per_shard + 2 * size.groups_per_shard))]
    write: dict[str, Any] = {"labels": tuple(LABELS), "fingerprint": {}}
    num_timed = 2 * (size.num_blocks + 1) * size.groups_per_shard
    write_dataset(
        world.directory / "timed/unlabeled", chosen[:num_timed], groups_per_shard=size.groups_per_shard, **write
    )
    most = max(len(group.texts) for group in groups)
    complete = [group for group in groups if len(group.texts) == most][:: 7 if size.dtype == "bf16" else 1]
    complete = complete[: size.num_pair_groups]
    write_dataset(world.directory / "pairs/unlabeled", complete, groups_per_shard=size.num_pair_groups // 2, **write)
    write_large(world, [*groups, *read_groups(world, "pretrain")])


def read_groups(world: World, split: str) -> Iterator[ParallelGroup]:
    """Parallel groups of real texts, of Debian's descriptions; tiny: of the demo corpus."""
    if world.size is SIZES["tiny"]:
        from alsace_dist.tasks.demo import generate_groups

        rows: Any = generate_groups(400, seed=0 if split == "unlabeled" else 1)
    else:
        rows = map(json.loads, (SOURCE / f"{split}.jsonl").open(encoding="utf-8"))
    for row in rows:
        texts = {language: {"text": " ".join(fields.values())} for language, fields in row["texts"].items()}
        yield ParallelGroup(f"{split}-{row['id']}", None, texts)


def write_model(world: World, texts: Iterator[str]) -> None:
    """An mT5 with random weights and a tokenizer of the texts; the head differs from the embedding, as in every mT5."""
    import torch
    from safetensors.torch import save_file
    from transformers import MT5Config

    from alsace_dist.models.mt5 import make_body
    from alsace_dist.models.nano import LanguageModel, initialise, train_tokenizer

    tokenizer = train_tokenizer(texts, world.size.num_pieces, [LABELS])
    config = MT5Config(**world.size.geometry, dropout_rate=0.0, architectures=["MT5ForConditionalGeneration"])
    module = LanguageModel(make_body(config, 0.0))
    initialise(module, 0)
    tensors = {name.removeprefix("body."): value.detach() for name, value in module.named_parameters()}
    for name, value in tensors.items():
        if "EncDecAttention.o" in name:  # else the answers of an untrained model hardly depend on the prompt
            value.mul_(10)
    tensors["lm_head.weight"] = tensors.pop("head.weight")
    world.model.mkdir(parents=True)
    tokenizer.save_pretrained(world.model)
    config.save_pretrained(world.model)
    save_file({name: value.to(torch.float32) for name, value in tensors.items()}, world.model / "model.safetensors")


def write_large(world: World, groups: list[ParallelGroup]) -> None:
    """All groups in shards of the default size, with random scores, as if they had been scored and selected."""
    config = world.config("large")
    dataset = write_dataset(
        world.directory / "large/unlabeled", groups, tuple(LABELS), config.data.groups_per_shard, fingerprint={}
    )
    layout, rng = Layout(Path(config.run_dir)), np.random.default_rng(0)
    scores, per_shard = layout.scores(0, "unlabeled"), config.data.groups_per_shard
    files = []
    for number, shard in enumerate(dataset.shards):
        rows = [(g.key, one) for g in groups[number * per_shard : (number + 1) * per_shard] for one in sorted(g.texts)]
        log_probs = np.log(rng.dirichlet(np.ones(len(LABELS)), len(rows))).astype(np.float32)
        files.append(scores / f"{shard.stem}.parquet")
        columns = [key for key, _ in rows], [language for _, language in rows]
        write_scores(files[-1], Scores(*columns, list(log_probs), [None] * len(rows)), {})
    write_manifest(scores, SCORES, {}, files)
    num_examples = sum(sum(shard.num_examples.values()) for shard in dataset.shards)
    selection = Selection(
        rule="all",
        num_groups=dataset.num_groups,
        teachers=list(dataset.languages),
        students=[],
        scores=dict.fromkeys(dataset.languages, 1.0),
        threshold=None,
        normalised_scores={language: 1 / len(dataset.languages) for language in dataset.languages},
        weights={language: 1 / len(dataset.languages) for language in dataset.languages},
        biases={language: [0.0] * len(LABELS) for language in dataset.languages},
        num_pairs=dict.fromkeys(MODES, num_examples),
    )
    write_selection(layout.selection(1), selection, {})
