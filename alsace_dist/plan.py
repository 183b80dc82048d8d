"""What a run takes before it is started: parameters, memory of the model states per rank, disk, steps and forwards.

No weights are read: a model of the right geometry is built on PyTorch's meta device, where tensors have no memory.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alsace_dist.config import Config, EngineConfig, Split, TrainConfig
from alsace_dist.config_file import variant
from alsace_dist.data.stream import CanonicalOrder
from alsace_dist.errors import UserError
from alsace_dist.files.layout import Layout, data_url
from alsace_dist.files.shards import Dataset, open_dataset
from alsace_dist.tasks.base import encode_answers

if TYPE_CHECKING:
    from rich.console import Console

WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
REDUCE_BUCKET_SIZE = 500_000_000  # DeepSpeed's default, in elements
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. ``body`` includes ``embedding``; ``kept_head``: the head's rows that are held in memory."""

    body: int
    embedding: int
    whole_head: int
    kept_head: int

    @property
    def total(self) -> int:
        """The model as people count it, and as it is exported: with its whole output head."""
        return self.body + self.whole_head

    @property
    def kept(self) -> int:
        """What a rank (or, under ZeRO-3, all of them together) holds for scoring and training."""
        return self.body + self.kept_head

    def trained(self, section: TrainConfig) -> int:
        """Parameters that a kind of training changes."""
        return self.kept - (self.embedding if section.freeze_vocabulary else 0)


@dataclass(frozen=True)
class Memory:
    """Bytes per rank: on the device the model states and fixed buffers, and in host memory what is offloaded."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    host: int

    @property
    def states(self) -> int:
        """Model states on the device."""
        return self.weights + self.gradients + self.optimizer


def print_plan(config: Config, num_processes: int | None = None) -> None:
    """Print the plan of a run on ``num_processes`` ranks (None: as many as would be started on this machine).

    Raises ``UserError`` if the model's config.json is not to be had.
    """
    from rich.console import Console

    from alsace_dist.ranks import launcher

    if num_processes is not None and num_processes < 1:
        raise UserError(f"--num_processes={num_processes}: must be 1 or more; leave it out for as many as would run")
    num_ranks = num_processes or launcher.num_local_processes(config.engine)
    console = Console(highlight=False)
    parameters = _print_parameters(config, console)
    _print_memory(config, parameters, num_ranks, console)
    _print_disk(config, parameters, console)
    _print_work(config, console)


# --- parameters ----------------------------------------------------------------------------------------------------


def count_parameters(model_config: Any, num_answer_tokens: int | None) -> Parameters:
    """Count an mT5's parameters on the meta device.

    ``num_answer_tokens``: K, the rows of the output head that are kept; None: the whole head, which answers of several
    tokens need.
    """
    import torch

    from alsace_dist.models import mt5 as modeling

    with torch.device("meta"):
        body = modeling.make_body(model_config, 0.0)
    width, vocabulary = model_config.d_model, model_config.vocab_size
    return Parameters(
        body=sum(parameter.numel() for parameter in body.parameters()),
        embedding=body.shared.weight.numel(),
        whole_head=vocabulary * width,
        kept_head=(vocabulary if num_answer_tokens is None else num_answer_tokens) * width,
    )


def _print_parameters(config: Config, console: "Console") -> Parameters:
    model_config, num_answer_tokens, notes = _model(config)
    parameters = count_parameters(model_config, num_answer_tokens)
    rows = [
        ("encoder and decoder", parameters.body - parameters.embedding),
        ("input embedding", parameters.embedding),
        ("output head, whole", parameters.whole_head),
        ("all", parameters.total),
        ("output head, rows kept here", parameters.kept_head),
        ("held for scoring and training", parameters.kept),
    ]
    share = (parameters.embedding + parameters.whole_head) / parameters.total
    cells = [[name, f"{count:,}", _amount(count)] for name, count in rows]
    title = f"Parameters: mT5, width {model_config.d_model}, {model_config.num_layers} encoder and "
    title += f"{model_config.num_decoder_layers} decoder layers, vocabulary {model_config.vocab_size:,}"
    _table(console, title, ["", "parameters", ""], cells)
    notes = [f"The two vocabulary matrices are {share:.0%} of the model.", *notes]
    _notes(console, notes)
    return parameters


def _model(config: Config) -> tuple[Any, int | None, list[str]]:
    """The model's transformers config, the number of head rows that are kept (None: all), and what to say of it."""
    from alsace_dist.models import mt5 as modeling

    distinct = {answer for answers in config.task.answers().values() for answer in answers}
    if config.model.nano:
        model = Layout(Path(config.run_dir)).pretrain / "model"
        if (model / "config.json").exists():
            return modeling.load_model_config(model), len(distinct), []
        from transformers import MT5Config

        note = "The nano model's vocabulary is as configured; sentinels and answers are added to its tokenizer."
        return MT5Config(**config.model.nano.model_dump()), len(distinct), [note]
    assert config.model.path is not None
    directory = modeling.resolve_model(config.model.path, config.model.revision, modeling.CONFIG_FILES)
    model_config = modeling.load_model_config(directory)
    if not any(path.suffix == ".model" or path.name == "tokenizer.json" for path in directory.iterdir()):
        note = "There is no tokenizer beside config.json: every answer is taken for one token."
        return model_config, len(distinct), [note]
    languages = config.data.languages or sorted(config.task.answers())
    answers = encode_answers(config.task, modeling.load_tokenizer(directory), languages, 0)
    if answers.single_token:
        return model_config, len(answers.vocabulary), []
    return model_config, None, ["Some answers have several tokens, so the whole output head is kept."]


# --- memory --------------------------------------------------------------------------------------------------------


def training_memory(parameters: Parameters, section: TrainConfig, engine: EngineConfig, num_ranks: int) -> Memory:
    """Bytes per rank of the model states of a training, at the moment when the optimizer steps.

    After Rajbhandari et al. 2020 (ZeRO, section 3.1: weights, gradients and Adam's states of a mixed-precision
    training; section 5: what each stage divides by the number of ranks), adapted to what ``engine.py`` makes DeepSpeed
    hold. With P trained parameters, N ranks, and w = 2 (bf16) or 4 (fp32) bytes per weight:

    - weights: w P' (all P' parameters in memory, frozen ones too); ZeRO-3: w P' / N;
    - optimizer: a float32 copy of the weights, 4 P, and Adam's two moments, 8 P; from ZeRO-1 on divided by N. ZeRO-0 in
      fp32 has no copy. Adafactor's factored moments are left out: they are as small as rows and columns;
    - gradients: the paper counts 2 P. Here they are summed over micro-batches and ranks in float32 from ZeRO-1 on
      (``grad_accum_dtype``), and a flattened copy of a rank's part is handed to Adam in places:
      ZeRO-0 (2 + 4) P in bf16, 4 P in fp32; ZeRO-1 (2 + 4) P in bf16, 4 P + 4 P / N in fp32; ZeRO-2 4 P / N in bf16,
      8 P / N in fp32; ZeRO-3 8 P / N.

    With the optimizer offloaded, its states and its gradients (4 P / N) are in host memory, with a staging area for
    the new weights (ZeRO-1 and 2: w P / N; fp32 in ZeRO-2 another 4 P / N) or the flat sums (ZeRO-3: 4 P / N); on the
    device remain the sums of ZeRO-1 (4 P, in bf16 another 4 P / N) and of ZeRO-2 in bf16 (4 P / N).

    ``buffers``: DeepSpeed's reduce bucket, and with offload in ZeRO-1 and 2 one as large as the embedding, the largest
    parameter (and its like in host memory). Not counted: activations, layers that ZeRO-3 has gathered.
    """
    stage, weight = engine.zero_stage, WEIGHT_BYTES[engine.dtype]
    is_bf16 = engine.dtype == "bf16"
    trained = parameters.trained(section)
    own = trained if stage == 0 else math.ceil(trained / num_ranks)
    copy = 0 if stage == 0 and not is_bf16 else 4 * own
    optimizer = copy + (8 * own if section.optimizer == "adamw" else 0)
    weights = weight * (parameters.kept if stage < 3 else math.ceil(parameters.kept / num_ranks))
    buffers, host = _bucket_bytes(engine, trained), 0
    if engine.offload_optimizer and stage > 0:
        gradients = (4 * trained if stage == 1 else 0) + (4 * own if is_bf16 and stage < 3 else 0)
        staging = 4 * own if stage == 3 else weight * own + (4 * own if stage == 2 and not is_bf16 else 0)
        largest = 0 if stage == 3 else weight * parameters.embedding
        host, buffers = optimizer + 4 * own + staging + largest, buffers + largest
        return Memory(weights, gradients, 0, buffers, host)
    gradients = {
        0: (6 if is_bf16 else 4) * trained,
        1: 6 * trained if is_bf16 else 4 * trained + 4 * own,
        2: (4 if is_bf16 else 8) * own,
        3: 8 * own,
    }[stage]
    return Memory(weights, gradients, optimizer, buffers, host)


def _bucket_bytes(engine: EngineConfig, trained: int) -> int:
    """Size of the bucket in which DeepSpeed reduces gradients, no larger than the model: as long as it trains in
    ZeRO-3, else while it goes backward. ZeRO-0, and ZeRO-1 in bf16 without offload, have none of a fixed size."""
    stage = engine.zero_stage
    if stage == 0 or (stage == 1 and engine.dtype == "bf16" and not engine.offload_optimizer):
        return 0
    size = engine.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", min(trained, REDUCE_BUCKET_SIZE))
    return int(size) * (2 if stage == 2 and engine.dtype == "bf16" else 4)


def scoring_memory(parameters: Parameters, engine: EngineConfig, num_ranks: int) -> int:
    """Bytes per rank of the weights while scoring; only ZeRO-3 divides them."""
    divisor = num_ranks if engine.zero_stage == 3 else 1
    return WEIGHT_BYTES[engine.dtype] * math.ceil(parameters.kept / divisor)


def checkpoint_bytes(parameters: Parameters, section: TrainConfig) -> int:
    """Size of a training checkpoint: per trained parameter the float32 weight and Adam's two moments."""
    return parameters.trained(section) * (12 if section.optimizer == "adamw" else 4)


def model_bytes(parameters: Parameters) -> int:
    """Size of an exported model: all parameters in float32, the whole output head included."""
    return 4 * parameters.total


def _print_memory(config: Config, parameters: Parameters, num_ranks: int, console: "Console") -> None:
    for names, section, engine in _trainings(config):
        shown = parameters
        if names == ["pretrain"]:  # span corruption needs the whole head
            shown = Parameters(parameters.body, parameters.embedding, parameters.whole_head, parameters.whole_head)
        stages = ZERO_STAGES if section.optimizer == "adamw" and names != ["pretrain"] else (0,)
        rows = [_memory_row(shown, section, engine, stage, num_ranks) for stage in stages]
        title = f"GB per rank, {num_ranks} {'rank' if num_ranks == 1 else 'ranks'}, {engine.dtype}: "
        title += f"{' and '.join(names)} with {section.optimizer}"
        title += ", optimizer offloaded" if engine.offload_optimizer else ""
        title += ", embedding frozen" if section.freeze_vocabulary else ""
        header = ["ZeRO", "weights", "gradients", "optimizer", "sum", "buffers", "host", "scoring"]
        _table(console, title, header, rows)
    notes = [
        "* as configured. GB are 10^9 bytes. Sum: model states on the device; host: offloaded, in main memory.",
        "Activations come on top, and under ZeRO-3 the layers that are gathered at a time.",
    ]
    if config.engine.deepspeed:
        notes.append("engine.deepspeed is not considered, but for zero_optimization.reduce_bucket_size.")
    _notes(console, notes)


def _trainings(config: Config) -> Iterator[tuple[list[str], TrainConfig, EngineConfig]]:
    """Kinds of training that differ in what they hold: names, a section and the engine."""
    if config.model.nano:  # always trained with ZeRO-0
        yield (
            ["pretrain"],
            config.pretrain,
            config.engine.model_copy(update={"zero_stage": 0, "offload_optimizer": False}),
        )
    found: dict[tuple[str, bool], tuple[list[str], TrainConfig, EngineConfig]] = {}
    for name, section in (("finetune", config.finetune), ("distill", config.distill if config.rounds else None)):
        if section is not None:
            kind = (section.optimizer, section.freeze_vocabulary)
            found.setdefault(kind, ([], section, config.engine))[0].append(name)
    yield from found.values()


def _memory_row(
    parameters: Parameters, section: TrainConfig, engine: EngineConfig, stage: int, num_ranks: int
) -> list[str]:
    mark = "*" if stage == engine.zero_stage else " "
    here = engine.model_copy(update={"zero_stage": stage, "offload_optimizer": engine.offload_optimizer and stage > 0})
    memory = training_memory(parameters, section, here, num_ranks)
    values = [memory.weights, memory.gradients, memory.optimizer, memory.states, memory.buffers, memory.host]
    values.append(scoring_memory(parameters, here, num_ranks))
    return [f"{mark} {stage}", *(_gigabytes(value) for value in values)]


# --- disk and work -------------------------------------------------------------------------------------------------


def _variants(config: Config) -> list[tuple[str, Config]]:
    """The run itself, under the name "", and its variants."""
    return [("", config), *((name, variant(config, name)) for name in config.variants)]


def _print_disk(config: Config, parameters: Parameters, console: "Console") -> None:
    num_models = bool(config.model.nano) + bool(config.finetune) + sum(one.rounds for _, one in _variants(config))
    rows = [["exported model", _gigabytes(model_bytes(parameters)), f"{num_models} in the end"]]
    for name, section in (("finetune", config.finetune), ("distill", config.distill)):
        if section is not None:
            note = f"up to {section.keep_checkpoints + 1} at a time, none in the end"
            rows.append([f"checkpoint of {name}", _gigabytes(checkpoint_bytes(parameters, section)), note])
    _table(console, "Disk, GB each", ["", "GB", ""], rows)
    console.print()


def _print_work(config: Config, console: "Console") -> None:
    rows = [*_training_rows(config), *_scoring_rows(config)]
    if not rows:
        _notes(console, ["The data is not prepared yet; afterwards this shows examples, steps and forwards, too."])
        return
    header = ["", "groups", "examples", "steps", "batches", "times"]
    _table(console, "Work: examples are (group, language) pairs; each is one forward in scoring", header, rows)
    _notes(console, ["Batches of scoring: at most, over all ranks, if every prompt were task.max_tokens long."])


def _dataset(config: Config, split: Split) -> Dataset | None:
    """A split's dataset; None if it is not prepared yet."""
    try:
        return open_dataset(data_url(config, split))
    except UserError:
        if config.data.directory is not None:  # nobody is going to prepare it
            raise
        return None


def num_steps(section: TrainConfig, num_examples: int) -> int:
    """Optimizer steps of a training, as ``loop.run`` counts them."""
    order = CanonicalOrder([num_examples], section.global_batch_size, 0)
    return section.num_steps or order.num_steps(section.num_epochs or 0)


def _training_rows(config: Config) -> Iterator[list[str]]:
    if config.model.nano and (data := _dataset(config, "pretrain")):
        yield _training_row("pretrain", data, config.pretrain, _num_examples(data), 1)
    if config.finetune and (data := _dataset(config, "labeled")):
        count = sum(shard.num_examples.get(config.data.source_language, 0) for shard in data.shards)
        yield _training_row("finetune", data, config.finetune, min(count, config.finetune.num_examples or count), 1)
    unlabeled = _dataset(config, "unlabeled")
    for name, one in _variants(config):
        if unlabeled and one.rounds:
            title = f"distill ({name})" if name else "distill"
            yield _training_row(title, unlabeled, one.distill, _num_distilled(unlabeled, one), one.rounds)


def _num_distilled(data: Dataset, config: Config) -> int:
    """Examples of the first ``select.num_groups`` groups, rounded up to whole shards."""
    before = itertools.accumulate((shard.num_groups for shard in data.shards), initial=0)
    wanted = config.select.num_groups or math.inf
    shards = [shard for shard, start in zip(data.shards, before, strict=False) if start < wanted]
    return sum(sum(shard.num_examples.values()) for shard in shards)


def _training_row(name: str, data: Dataset, section: TrainConfig, num_examples: int, times: int) -> list[str]:
    steps = f"{num_steps(section, num_examples):,}" if num_examples else "-"
    return [name, f"{data.num_groups:,}", f"{num_examples:,}", steps, "", str(times)]


def _scoring_rows(config: Config) -> Iterator[list[str]]:
    """Scoring passes; round 0 is shared by all variants."""
    all_variants = [one for _, one in _variants(config)]
    times = {
        "unlabeled": 1 + sum(one.rounds - 1 + one.evaluate.calibrate for one in all_variants if one.rounds),
        "test": 1 + sum(one.rounds for one in all_variants),
    }
    splits: tuple[Split, ...] = ("unlabeled", "test")
    for split in splits:
        if data := _dataset(config, split):
            rows_per_batch = max(1, config.score.tokens_per_batch // config.task.max_tokens)
            batches = sum(math.ceil(sum(shard.num_examples.values()) / rows_per_batch) for shard in data.shards)
            counts = [f"{data.num_groups:,}", f"{_num_examples(data):,}", "", f"{batches:,}"]
            yield [f"score {split}", *counts, str(times[split])]


def _num_examples(data: Dataset) -> int:
    return sum(sum(shard.num_examples.values()) for shard in data.shards)


# --- printing ------------------------------------------------------------------------------------------------------


def _table(console: "Console", title: str, header: list[str], rows: list[list[str]]) -> None:
    """A table of plain text: words on the left, numbers to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)


def _notes(console: "Console", lines: list[str]) -> None:
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    console.print()


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M" if count >= 1e4 else ""


def _gigabytes(value: int) -> str:
    if value == 0:
        return "-"
    amount = value / 1e9
    num_decimals = next((number for number, least in enumerate((100, 10, 1)) if amount >= least), 3)
    return f"{amount:.{num_decimals}f}"
