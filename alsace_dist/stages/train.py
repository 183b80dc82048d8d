"""What stages that train a model share: what they depend on, and the way from a stage to a finished model."""

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from alsace_dist import __version__
from alsace_dist.config import NOT_IN_FINGERPRINT, EngineConfig, ExportType, TaskTrainConfig, TrainConfig
from alsace_dist.data import held_out
from alsace_dist.files import manifest
from alsace_dist.files.layout import MODEL
from alsace_dist.ranks.group import Ranks
from alsace_dist.stages.base import Stage, export_fingerprint, only, options_fingerprint

if TYPE_CHECKING:
    from alsace_dist.models.family import TrainableModel
    from alsace_dist.training.examples import Examples


def training_fingerprint(stage: Stage, section: TaskTrainConfig, model: dict[str, Any]) -> dict[str, Any]:
    """What finetuning and distillation depend on alike; ``model``: identity of the model that they start from."""
    config = stage.config
    return {
        "section": section.model_dump(mode="json", exclude=NOT_IN_FINGERPRINT),
        "task": config.task.model_dump(mode="json"),
        "source_language": config.data.source_language,
        **config.engine.numerics(),
        "seed": config.seed,
        "model": model,
        "code": __version__,
        **held_out.stopping_fingerprint(config, section),
    } | (options_fingerprint(config) | export_fingerprint(config))


def train(stage: Stage, section: TaskTrainConfig, model: "TrainableModel", examples: "Examples", ranks: Ranks) -> None:
    """Run the training loop of a stage and complete its output."""
    output = only(stage.outputs)
    fingerprint = stage.fingerprint(output)
    if stage.replay is None:
        ranks.main_first(lambda: manifest.begin(output.directory, output.kind, fingerprint))
    config = stage.config
    run_training(stage, section, config.engine, fingerprint, model, examples, ranks, config.export.dtype)


def run_training(
    stage: Stage,
    section: TrainConfig,
    engine: EngineConfig,
    fingerprint: dict[str, Any],
    model: "TrainableModel",
    examples: "Examples",
    ranks: Ranks,
    export_type: ExportType = "float32",
) -> None:
    """The same for an output that is begun already, with an engine of the stage's own."""
    from alsace_dist.models.lora import LoraModel
    from alsace_dist.training import loop
    from alsace_dist.training.evaluator import make_evaluator
    from alsace_dist.training.replay import print_replayed, replay

    output, config, unwrapped = only(stage.outputs), stage.config, model
    if section.lora is not None:
        model = LoraModel(model, section.lora, config.seed, f"{output.kind}.lora")
    training = loop.Training(
        kind=output.kind,
        places=stage.places(output),
        section=section,
        engine=engine,
        seed=config.seed,
        fingerprint=fingerprint,
        model=model,
        examples=examples,
        export_type=export_type,
        replay=_replay_command(stage) if isinstance(section, TaskTrainConfig) else "",
    )
    if stage.replay is not None:
        position, replayed = replay(training, stage.replay, ranks)
        if ranks.is_main:
            print_replayed(stage.replay, position, replayed)
        return
    if isinstance(section, TaskTrainConfig):
        evaluator = make_evaluator(config, section, unwrapped, training.num_steps, ranks)
        training = replace(training, evaluator=evaluator)
    details, weights = loop.run(training, ranks)

    def complete() -> None:
        files = loop.other_files(output.directory, weights)
        entries = {f"{MODEL}/{name}": entry for name, entry in weights.items()}
        manifest.write_manifest(output.directory, output.kind, fingerprint, files, details, entries)
        loop.drop_passing(output.directory)

    ranks.main_first(complete)


def _replay_command(stage: Stage) -> str:
    return " ".join(["alsace replay", shlex.quote(stage.config.run_dir), f"--stage={stage.command}", *stage.flags])
