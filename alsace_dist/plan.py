"""What a run takes before it is started: parameters, memory of the model states per rank, disk, steps and forwards.

No weights are read: a model of the right geometry is built on PyTorch's meta device, where tensors have no memory.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alsace_dist import pipeline
from alsace_dist.config import Config, EngineConfig, ExportType, Mode, Split, TrainConfig
from alsace_dist.data.rows import answers_of
from alsace_dist.data.stream import CanonicalOrder
from alsace_dist.errors import UserError
from alsace_dist.files.layout import MODEL, Layout, data_url
from alsace_dist.files.shards import Dataset, open_dataset
from alsace_dist.stages import distill, finetune, pretrain, score
from alsace_dist.stages.base import Stage, TrainingStageModule

if TYPE_CHECKING:
    from rich.console import Console

    from alsace_dist.models.family import Family, Parameters

WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
REDUCE_BUCKET_SIZE = 500_000_000  # DeepSpeed's default, in elements
ZERO_STAGES = (0, 1, 2, 3)


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
        raise UserError(f"--num-processes={num_processes}: must be 1 or more; leave it out for as many as would run")
    num_ranks = num_processes or launcher.num_local_processes(config.engine)
    console = Console(highlight=False)
    model = _model(config)
    parameters = _print_parameters(model, console)
    _print_memory(config, parameters, num_ranks, console)
    _print_disk(config, parameters, console)
    _print_work(config, model.mode, console)


# --- parameters ----------------------------------------------------------------------------------------------------


class _Model(NamedTuple):
    """What is known of a model without its weights. ``num_head_rows``: rows of its head that are kept (None: all);
    ``mode``: in which it scores; ``notes``: what to say to people."""

    family: "type[Family]"
    config: Any
    num_head_rows: int | None
    mode: Mode
    notes: list[str]


def _print_parameters(model: _Model, console: "Console") -> "Parameters":
    family, model_config, num_head_rows, mode, notes = model
    parameters = family.count_parameters(model_config, num_head_rows, mode)
    rows = [
        ("layers", parameters.body - parameters.embedding),
        ("input embedding", parameters.embedding),
        ("output head, whole", parameters.whole_head),
        *([("read by no text, and not trained", parameters.beside)] if parameters.beside else []),
        ("all", parameters.total),
        ("output head, rows kept here", parameters.kept_head),
        ("held for scoring and training", parameters.kept),
    ]
    cells = [[name, f"{count:,}", _amount(count)] for name, count in rows]
    _table(console, f"Parameters: {family.describe(model_config)}", ["", "parameters", ""], cells)
    share = parameters.vocabulary / parameters.total
    notes = [f"{share:.0%} of the model is its vocabulary: embeddings of the pieces, in and out.", *notes]
    _notes(console, notes)
    return parameters


def _model(config: Config) -> _Model:
    """The model that the run starts from. Raises ``UserError`` if its config.json is not to be had."""
    from alsace_dist.models import nano, weights
    from alsace_dist.models.family import Options, family_of
    from alsace_dist.models.mt5 import MT5

    options = Options.of(config)
    distinct = {answer for answers in config.task.answers().values() for answer in answers}
    num_rows = len(distinct) or None  # candidates of each example's own take the whole head
    if config.model.nano:
        directory = Layout(Path(config.run_dir)).pretrain / MODEL
        if (directory / "config.json").exists():
            return _Model(MT5, MT5.load_config(directory), num_rows, "auto", [])
        note = "The nano model's vocabulary is as configured; sentinels and answers are added to its tokenizer."
        return _Model(MT5, nano.model_config(config.model.nano), num_rows, "auto", [note])
    assert config.model.path is not None
    directory = weights.resolve_model(config.model.path, config.model.revision, weights.CONFIG_FILES)
    family = family_of(directory)
    model_config = family.load_config(directory)
    answers = answers_of(config.task, config.data.languages or sorted(config.task.answers()))
    if not any(path.suffix == ".model" or path.name == "tokenizer.json" for path in directory.iterdir()):
        note = "There is no tokenizer beside config.json: every answer is taken for one token."
        return _Model(family, model_config, num_rows, family.mode_of(answers, options), [note])
    model = family(directory, answers, options)
    notes = [] if model.num_head_rows else ["Answers of several tokens take the whole output head."]
    return _Model(family, model_config, model.num_head_rows, model.mode, notes)


# --- memory --------------------------------------------------------------------------------------------------------


def training_memory(parameters: "Parameters", section: TrainConfig, engine: EngineConfig, num_ranks: int) -> Memory:
    """Bytes per rank of the model states of a training, at the moment when the optimizer steps.

    After Rajbhandari et al. 2020 (ZeRO, section 3.1: weights, gradients and Adam's states of a mixed-precision
    training; section 5: what each stage divides by the number of ranks), adapted to what training/settings.py makes
    DeepSpeed hold. With P trained parameters, N ranks, and w = 2 (bf16) or 4 (fp32) bytes per weight:

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
    trained = parameters.trained(section.freeze_vocabulary)
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


def scoring_memory(parameters: "Parameters", engine: EngineConfig, num_ranks: int) -> int:
    """Bytes per rank of the weights while scoring; only ZeRO-3 divides them."""
    divisor = num_ranks if engine.zero_stage == 3 else 1
    return WEIGHT_BYTES[engine.dtype] * math.ceil(parameters.kept / divisor)


def checkpoint_bytes(parameters: "Parameters", section: TrainConfig) -> int:
    """Size of a training checkpoint: per trained parameter the float32 weight and Adam's two moments."""
    return parameters.trained(section.freeze_vocabulary) * (12 if section.optimizer == "adamw" else 4)


def model_bytes(parameters: "Parameters", dtype: ExportType = "float32") -> int:
    """Size of an exported model: all parameters, the whole output head included."""
    return (4 if dtype == "float32" else 2) * parameters.total


def _print_memory(config: Config, parameters: "Parameters", num_ranks: int, console: "Console") -> None:
    for names, section, engine in _trainings(config):
        shown = parameters
        if names == ["pretrain"]:  # span corruption needs the whole head
            shown = replace(parameters, kept_head=parameters.whole_head)
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
        "While a checkpoint is written, each rank has its part of it in main memory, too.",
    ]
    if config.engine.deepspeed:
        notes.append("engine.deepspeed is not considered, but for zero_optimization.reduce_bucket_size.")
    _notes(console, notes)


def _trainings(config: Config) -> Iterator[tuple[list[str], TrainConfig, EngineConfig]]:
    """Kinds of training of the run itself that differ in what they hold: names, a section and the engine."""
    found: dict[tuple[str, bool, int], tuple[list[str], TrainConfig, EngineConfig]] = {}
    for stage, module in _training_stages(config):
        if not stage.variant and stage.round <= 1:
            section, engine = module.section_of(config), module.engine_of(config)
            kind = (section.optimizer, section.freeze_vocabulary, engine.zero_stage)
            found.setdefault(kind, ([], section, engine))[0].append(module.KIND)
    yield from found.values()


def _training_stages(config: Config) -> list[tuple[Stage, TrainingStageModule]]:
    """The stages of the run and its variants that train a model."""
    modules: dict[str, TrainingStageModule] = {one.KIND: one for one in (pretrain, finetune, distill)}
    return [(stage, modules[stage.module.KIND]) for stage in pipeline.stages(config) if stage.module.KIND in modules]


def _memory_row(
    parameters: "Parameters", section: TrainConfig, engine: EngineConfig, stage: int, num_ranks: int
) -> list[str]:
    mark = "*" if stage == engine.zero_stage else " "
    here = engine.model_copy(update={"zero_stage": stage, "offload_optimizer": engine.offload_optimizer and stage > 0})
    memory = training_memory(parameters, section, here, num_ranks)
    values = [memory.weights, memory.gradients, memory.optimizer, memory.states, memory.buffers, memory.host]
    values.append(scoring_memory(parameters, here, num_ranks))
    return [f"{mark} {stage}", *(_gigabytes(value) for value in values)]


# --- disk and work -------------------------------------------------------------------------------------------------


def _print_disk(config: Config, parameters: "Parameters", console: "Console") -> None:
    trainings = _training_stages(config)
    rows = [
        ["exported model", _gigabytes(model_bytes(parameters, config.export.dtype)), f"{len(trainings)} in the end"]
    ]
    for module in (finetune, distill):
        if any(stage.module is module for stage, _ in trainings):
            section = module.section_of(config)
            note = f"up to {section.keep_checkpoints + 1} at a time, none in the end"
            rows.append([f"checkpoint of {module.KIND}", _gigabytes(checkpoint_bytes(parameters, section)), note])
    _table(console, "Disk, GB each", ["", "GB", ""], rows)
    console.print()


def prompts_per_example(config: Config, mode: Mode) -> tuple[int, str]:
    """How many prompts a model reads of one example, and in words why; of candidates in any number the fewest."""
    if mode == "head" and config.task.candidates:
        number = config.task.num_candidates
        return (number, "one for each candidate") if number else (2, "one for each candidate, at least")
    return (2, "one with context and one without") if config.task.needs_context_free else (1, "")


def _print_work(config: Config, mode: Mode, console: "Console") -> None:
    num_prompts, why = prompts_per_example(config, mode)
    rows = [*_training_rows(config), *_scoring_rows(config, num_prompts)]
    if not rows:
        _notes(console, ["The data is not prepared yet; afterwards this shows examples, steps and forwards, too."])
        return
    header = ["", "groups", "examples", "steps", "batches", "times"]
    _table(console, "Work: examples are (group, language) pairs; each is one forward in scoring", header, rows)
    notes = ["Batches of scoring: at most, over all ranks, if every prompt were task.max_tokens long."]
    if why:
        notes.append(f"An example is {num_prompts} prompts, {why}.")
    _notes(console, notes)


def _dataset(config: Config, split: Split) -> Dataset | None:
    """A split's dataset; None if it is not prepared yet."""
    try:
        return open_dataset(data_url(config, split))
    except UserError:
        if config.data.directory is not None:  # no stage is going to prepare the dataset
            raise
        return None


def num_steps(section: TrainConfig, num_examples: int) -> int:
    """Optimizer steps of a training, as the training loop counts them."""
    order = CanonicalOrder([num_examples], section.global_batch_size, 0)
    return section.num_steps or order.num_steps(section.num_epochs or 0)


def _training_rows(config: Config) -> Iterator[list[str]]:
    """Trainings; the rounds of a variant are alike."""
    trainings = _training_stages(config)
    for stage, module in trainings:
        data = _dataset(config, module.SPLIT) if stage.round <= 1 else None
        if data is not None:
            times = sum(one.module is stage.module and one.variant == stage.variant for one, _ in trainings)
            num_examples = sum(module.most_examples(data, stage.config))
            section = module.section_of(stage.config)
            steps = f"{num_steps(section, num_examples):,}" if num_examples else "-"
            name = f"{module.KIND} ({stage.variant})" if stage.variant else module.KIND
            yield [name, f"{data.num_groups:,}", f"{num_examples:,}", steps, "", str(times)]


def _scoring_rows(config: Config, num_prompts: int) -> Iterator[list[str]]:
    """Scoring passes. ``num_prompts``: of an example."""
    passes = Counter(
        output.directory.name for stage in pipeline.stages(config) if stage.module is score for output in stage.outputs
    )
    splits: tuple[Split, ...] = ("unlabeled", "test")
    for split in splits:
        if data := _dataset(config, split):
            rows_per_batch = max(1, config.score.tokens_per_batch // (num_prompts * config.task.max_tokens))
            batches = sum(math.ceil(sum(shard.num_examples.values()) / rows_per_batch) for shard in data.shards)
            counts = [f"{data.num_groups:,}", f"{_num_examples(data):,}", "", f"{batches:,}"]
            yield [f"score {split}", *counts, str(passes[split])]


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
