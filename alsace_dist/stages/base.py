"""What every stage is: a step of a run with a name, declared inputs and outputs, a fingerprint, and work to do.

A stage is a module of this package with the members of ``StageModule``; ``Stage`` is one use of it in a run. Stages
talk through files: an output is complete when its manifest is there, and is skipped when that carries the fingerprint
that it would have now.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from alsace_dist.config import Config, EngineConfig, Split, TrainConfig
from alsace_dist.data.rows import answers_of
from alsace_dist.errors import NotReady, UserError, warn
from alsace_dist.files import manifest
from alsace_dist.files.layout import DATA, DISTILL, FINETUNE, MODEL, PRETRAIN, Layout
from alsace_dist.files.manifest import Manifest
from alsace_dist.files.shards import Dataset
from alsace_dist.monitor.sinks import Places
from alsace_dist.monitor.trackers import Tracker
from alsace_dist.ranks.group import Ranks

if TYPE_CHECKING:
    from alsace_dist.models.family import Family


class Output(NamedTuple):
    """A directory that a stage completes, and the kind of its manifest."""

    directory: Path
    kind: str

    def manifest(self) -> Manifest:
        """Raises ``NotReady`` if the directory is not complete."""
        return manifest.load_manifest(self.directory, self.kind)

    @property
    def exists(self) -> bool:
        """Whether the stage's output is complete, whatever configuration made it."""
        return (self.directory / manifest.MANIFEST).exists()


class StageModule(Protocol):
    """What a module of a stage holds. ``KIND``: of its manifests; ``ON_RANKS``: whether it computes on ranks."""

    KIND: str
    ON_RANKS: bool

    def inputs(self, stage: "Stage") -> list[Output]:
        """Outputs of other stages that it reads."""

    def outputs(self, stage: "Stage") -> list[Output]:
        """What it writes."""

    def fingerprint(self, stage: "Stage", output: Output) -> dict[str, Any]:
        """Everything that an output depends on. Raises ``NotReady`` if an input is not complete."""

    def run(self, stage: "Stage", ranks: Ranks | None) -> None:
        """Do the work and complete the outputs; ``ranks``: None for a stage of one process."""


class TrainingStageModule(StageModule, Protocol):
    """What a stage that trains a model says beside that. ``SPLIT``: of the data that it learns from."""

    SPLIT: Split

    def section_of(self, config: Config) -> TrainConfig:
        """Its section of the config."""

    def engine_of(self, config: Config) -> EngineConfig:
        """The engine that it trains with."""

    def most_examples(self, dataset: Dataset, config: Config) -> list[int]:
        """Examples of each shard that it learns from, as far as that is known before any stage has run."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run. ``config``: with the settings of its variant; ``round``: 0 before any distillation;
    ``replay``: a step of a training that is to be looked at once more (from 1), instead of training."""

    module: StageModule
    command: str
    config: Config
    variant: str = ""
    round: int = 0
    replay: int | None = None

    @cached_property
    def layout(self) -> Layout:
        """Where the run, or the variant, keeps what."""
        return Layout(Path(self.config.run_dir), self.variant)

    @property
    def name(self) -> str:
        """How people are told of it."""
        parts = [self.command]
        if self.round:
            parts.append(f"round {self.round}")
        if self.variant:
            parts.append(f"({self.variant})")
        return " ".join(parts)

    @property
    def flags(self) -> list[str]:
        """What tells it from the other stages of its command, on the command line."""
        found = [f"--round={self.round}"] if self.command in ("score", "select", "distill") else []
        return found + ([f"--variant={self.variant}"] if self.variant else [])

    @property
    def lock(self) -> Path:
        """What a process holds while it works on the stage."""
        return self.layout.locks / self.name.replace(" ", "-")

    @property
    def on_ranks(self) -> bool:
        """Whether it computes on ranks; else in one process."""
        return self.module.ON_RANKS

    @property
    def inputs(self) -> list[Output]:
        """Outputs of other stages that it reads."""
        return self.module.inputs(self)

    @property
    def outputs(self) -> list[Output]:
        """What it writes."""
        return self.module.outputs(self)

    def fingerprint(self, output: Output) -> dict[str, Any]:
        """Everything that an output depends on. Raises ``NotReady`` if an input is not complete."""
        return self.module.fingerprint(self, output)

    def places(self, output: Output) -> Places:
        """Where the scalars go of what makes an output."""
        directory, monitor, run = output.directory, self.config.monitor, self.layout.run
        tracker = None
        if monitor.tracker is not None:
            name = f"{run.resolve().name}/{directory.relative_to(run)}"
            tracker = Tracker(monitor.tracker, monitor.project, name)
        return Places(directory, self.layout.tensorboard(directory), tracker)

    def is_begun(self) -> bool:
        """Whether the stage has left any output, whatever configuration made it."""
        names = (manifest.MANIFEST, manifest.STARTED)
        return any((output.directory / name).exists() for output in self.outputs for name in names)

    def is_complete(self) -> bool:
        """Whether all its outputs are there.

        Raises ``OtherSettings`` if one is there with other settings, ``NotReady`` if an input is missing.
        """
        complete = True
        for output in self.outputs:  # look at all: none with other settings is passed over
            is_there = manifest.is_complete(output.directory, output.kind, self.fingerprint(output))
            complete = is_there and complete
        return complete

    def state(self) -> str:
        """``complete``, ``to do`` or ``refused: ...``; never an error."""
        if not self.is_begun():
            return "to do"
        try:
            return "complete" if self.is_complete() else "to do"
        except NotReady:
            return "to do"
        except UserError as error:
            return f"refused: {error}"

    def run(self, ranks: Ranks | None) -> None:
        """Do the work."""
        self.module.run(self, ranks)


# --- the model of a round ------------------------------------------------------------------------------------------


def model_after(config: Config, layout: Layout, round_: int) -> Output | None:
    """The stage output whose ``model/`` is the model after a round; None: it comes from ``model.path``.

    ``round_``: 0: before any round of distillation; -1: before finetuning.
    """
    if round_ > 0:
        return Output(layout.distill(round_), DISTILL)
    if round_ == 0 and config.finetune:
        return Output(layout.finetune, FINETUNE)
    return Output(layout.pretrain, PRETRAIN) if config.model.nano else None


def model_inputs(stage: Stage, round_: int) -> list[Output]:
    """The model after a round as a declared input; nothing if it comes from ``model.path``."""
    output = model_after(stage.config, stage.layout, round_)
    return [output] if output else []


def model_identity(stage: Stage, round_: int) -> dict[str, Any]:
    """What tells the model after a round from other models: the manifest of the stage that made it, or its files."""
    if output := model_after(stage.config, stage.layout, round_):
        return {output.kind: output.manifest().digest}
    from alsace_dist.models import weights

    return weights.model_identity(_given_model(stage.config))


def checked_model(stage: Stage, round_: int, ranks: Ranks) -> Path:
    """Directory of the model after a round, whose files are what the manifest of its stage lists. Collective.

    Raises ``UserError`` if they are not.
    """
    if (output := model_after(stage.config, stage.layout, round_)) is None:
        return _given_model(stage.config)
    found = output.manifest()

    def verify() -> None:
        for name in sorted(found.files)[ranks.rank :: ranks.world_size]:
            manifest.verify_file(output.directory, found, name)

    ranks.each(verify)
    return output.directory / MODEL


def open_model(stage: Stage, round_: int, languages: Sequence[str], ranks: Ranks) -> "Family":
    """The model after a round as a scorer of the task's answers, its weights' names and shapes checked. Collective.

    Raises ``UserError`` if files, weights, options and answers do not fit together.
    """
    from alsace_dist.models import family

    config = stage.config
    directory = checked_model(stage, round_, ranks)
    model = family.open_model(directory, answers_of(config.task, languages), family.Options.of(config))
    for remark in model.check_weights(may_be_new=round_ < 0):
        if ranks.is_main:
            warn(remark)
    return model


def options_fingerprint(config: Config) -> dict[str, Any]:
    """How a model is to score, as far as a config says; nothing where it says nothing."""
    options = config.model.model_dump(mode="json", include={"mode", "pooling", "masks"}, exclude_defaults=True)
    return {"model_options": options} if options else {}


def export_fingerprint(config: Config) -> dict[str, Any]:
    """How a model is to be written, as far as a config says; nothing where it says nothing."""
    settings = config.export.model_dump(mode="json", exclude_defaults=True)
    return {"export": settings} if settings else {}


def _given_model(config: Config) -> Path:
    from alsace_dist.models import weights

    assert config.model.path is not None
    return weights.resolve_model(config.model.path, config.model.revision)


# --- data ----------------------------------------------------------------------------------------------------------


def data_inputs(stage: Stage) -> list[Output]:
    """Prepared data as a declared input; nothing if it lies in ``data.directory``, where nobody prepares it."""
    return [] if stage.config.data.directory is not None else [Output(stage.layout.data, DATA)]


def only(outputs: Sequence[Output]) -> Output:
    """The one output of a stage that has just one."""
    (output,) = outputs
    return output
