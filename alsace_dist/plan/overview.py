"""What a run takes before it is started: parameters, memory of the model states per rank, disk, steps and forwards.

No weights are read: a model of the right geometry is built on PyTorch's meta device, where tensors have no memory.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from alsace_dist import pipeline
from alsace_dist.config import Config, EngineConfig, Mode, Split, TrainConfig
from alsace_dist.errors import UserError
from alsace_dist.plan.memory import checkpoint_bytes, model_bytes, scoring_memory, training_memory
from alsace_dist.plan.model import PlannedModel, planned_model
from alsace_dist.plan.output import amount, gigabytes, print_notes, print_table
from alsace_dist.plan.work import dataset_of, num_rows, num_steps, prompts_per_example, training_stages
from alsace_dist.stages import distill, finetune, score

if TYPE_CHECKING:
    from rich.console import Console

    from alsace_dist.models.family import Parameters

ZERO_STAGES = (0, 1, 2, 3)


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
    model = planned_model(config)
    parameters = _print_parameters(model, console)
    _print_memory(config, parameters, num_ranks, console)
    _print_disk(config, parameters, console)
    _print_work(config, model.mode, console)


# --- parameters ----------------------------------------------------------------------------------------------------


def _print_parameters(model: PlannedModel, console: "Console") -> "Parameters":
    family, model_config, num_head_rows, mode, remarks = model
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
    cells = [[name, f"{count:,}", amount(count)] for name, count in rows]
    print_table(console, f"Parameters: {family.describe(model_config)}", ["", "parameters", ""], cells)
    share = parameters.vocabulary / parameters.total
    notes = [f"{share:.0%} of the model is its vocabulary: embeddings of the pieces, in and out.", *remarks]
    print_notes(console, notes)
    return parameters


# --- memory --------------------------------------------------------------------------------------------------------


def _print_memory(config: Config, parameters: "Parameters", num_ranks: int, console: "Console") -> None:
    dtype = config.engine.dtype
    for names, section, engine in _trainings(config):
        shown = parameters
        if names == ["pretrain"]:  # span corruption needs the whole head
            shown = replace(parameters, kept_head=parameters.whole_head)
        stages = ZERO_STAGES if section.optimizer == "adamw" and names != ["pretrain"] else (0,)
        rows = [_memory_row(shown, section, engine, stage, num_ranks) for stage in stages]
        title = f"GB per rank, {num_ranks} {'rank' if num_ranks == 1 else 'ranks'}, {engine.dtype}: "
        title += f"{' and '.join(names)} with {section.optimizer}"
        title += ", optimizer offloaded" if engine.offload_optimizer else ""
        title += ", embedding frozen" if section.freeze_vocabulary and not section.lora else ""
        title += f", LoRA of rank {section.lora.rank}" if section.lora else ""
        header = ["ZeRO", "weights", "gradients", "optimizer", "sum", "buffers", "host"]
        print_table(console, title, header, rows)
    notes = [
        "* as configured. GB are 10^9 bytes. Sum: model states on the device; host: offloaded, in main memory.",
        "Activations come on top, and under ZeRO-3 the layers that are gathered at a time.",
        "While a checkpoint is written, each rank has its part of it in main memory, too.",
        f"Scoring: {gigabytes(scoring_memory(parameters, dtype, 1))} where a rank has all weights, "
        f"{gigabytes(scoring_memory(parameters, dtype, num_ranks))} where all ranks share them out (score.sharding).",
    ]
    if config.engine.deepspeed:
        notes.append("engine.deepspeed is not considered, but for zero_optimization.reduce_bucket_size.")
    print_notes(console, notes)


def _trainings(config: Config) -> Iterator[tuple[list[str], TrainConfig, EngineConfig]]:
    """Kinds of training of the run itself that differ in what they hold: names, a section and the engine."""
    found: dict[tuple[str, bool, str, int], tuple[list[str], TrainConfig, EngineConfig]] = {}
    for stage, module in training_stages(config):
        if not stage.variant and stage.round <= 1:
            section, engine = module.section_of(config), module.engine_of(config)
            kind = (section.optimizer, section.freeze_vocabulary, str(section.lora), engine.zero_stage)
            found.setdefault(kind, ([], section, engine))[0].append(module.KIND)
    yield from found.values()


def _memory_row(
    parameters: "Parameters", section: TrainConfig, engine: EngineConfig, stage: int, num_ranks: int
) -> list[str]:
    mark = "*" if stage == engine.zero_stage else " "
    here = engine.model_copy(update={"zero_stage": stage, "offload_optimizer": engine.offload_optimizer and stage > 0})
    memory = training_memory(parameters, section, here, num_ranks)
    values = [memory.weights, memory.gradients, memory.optimizer, memory.states, memory.buffers, memory.host]
    return [f"{mark} {stage}", *(gigabytes(value) for value in values)]


# --- disk and work -------------------------------------------------------------------------------------------------


def _print_disk(config: Config, parameters: "Parameters", console: "Console") -> None:
    trainings = training_stages(config)
    rows = [["exported model", gigabytes(model_bytes(parameters, config.export.dtype)), f"{len(trainings)} in the end"]]
    for module in (finetune, distill):
        if any(stage.module is module for stage, _ in trainings):
            section = module.section_of(config)
            note = f"up to {section.keep_checkpoints + 1} at a time, none in the end"
            rows.append([f"checkpoint of {module.KIND}", gigabytes(checkpoint_bytes(parameters, section)), note])
    print_table(console, "Disk, GB each", ["", "GB", ""], rows)
    console.print()


def _print_work(config: Config, mode: Mode, console: "Console") -> None:
    num_prompts, why = prompts_per_example(config, mode)
    rows = [*_training_rows(config), *_scoring_rows(config, num_prompts)]
    if not rows:
        print_notes(console, ["The data is not prepared yet; afterwards this shows examples, steps and forwards, too."])
        return
    header = ["", "groups", "examples", "steps", "batches", "times"]
    print_table(console, "Work: examples are (group, language) pairs; each is one forward in scoring", header, rows)
    notes = ["Batches of scoring: at most, over all ranks, if every prompt were task.max_tokens long."]
    if why:
        notes.append(f"An example is {num_prompts} prompts, {why}.")
    print_notes(console, notes)


def _training_rows(config: Config) -> Iterator[list[str]]:
    """Trainings; the rounds of a variant are alike."""
    trainings = training_stages(config)
    for stage, module in trainings:
        data = dataset_of(config, module.SPLIT) if stage.round <= 1 else None
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
        if data := dataset_of(config, split):
            rows_per_batch = max(1, config.score.tokens_per_batch // (num_prompts * config.task.max_tokens))
            batches = sum(math.ceil(sum(shard.num_examples.values()) / rows_per_batch) for shard in data.shards)
            counts = [f"{data.num_groups:,}", f"{num_rows(data):,}", "", f"{batches:,}"]
            yield [f"score {split}", *counts, str(passes[split])]
