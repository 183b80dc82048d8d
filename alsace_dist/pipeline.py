"""The stages of a run in order: what each needs, whether it is complete, and how it is run.

Stages talk through files. A stage whose manifest carries the fingerprint that its inputs have now is skipped; one that
holds something else stops the run and says what differs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alsace_dist.config import Config
from alsace_dist.config_file import config_text, load_config, variant
from alsace_dist.data.config_check import check_prepared
from alsace_dist.errors import UserError
from alsace_dist.files import manifest as artifacts
from alsace_dist.files.layout import Layout, data_url
from alsace_dist.ranks.group import Runtime


@dataclass(frozen=True)
class Stage:
    """One stage: its command, of which round and variant, and what it writes.

    ``directories``: what it writes. ``fingerprints()``: output directory -> (kind, fingerprint); readable once the
    stages before it are complete, and it may fetch the model from the hub.
    ``execute(runtime)``: does the work, on every rank if ``is_distributed``, else in one process with None.
    """

    command: str
    config: Config
    variant: str
    round: int
    is_distributed: bool
    directories: tuple[Path, ...]
    fingerprints: Callable[[], dict[Path, tuple[str, dict[str, Any]]]]
    execute: Callable[[Runtime | None], None]

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
        if self.command not in ("score", "select", "distill"):
            return [f"--variant={self.variant}"] if self.variant else []
        return [f"--round={self.round}"] + ([f"--variant={self.variant}"] if self.variant else [])

    @property
    def lock(self) -> Path:
        """What a process holds while it works on the stage."""
        return Path(self.config.run_dir) / ".locks" / self.name.replace(" ", "-")

    def is_begun(self) -> bool:
        """Whether there is anything of its outputs, whatever it was made with."""
        names = (artifacts.MANIFEST, artifacts.STARTED)
        return any((directory / name).exists() for directory in self.directories for name in names)

    def is_complete(self) -> bool:
        """Whether all its outputs are there. Raises ``UserError`` if one is there with other settings."""
        complete = True
        for path, (kind, value) in self.fingerprints().items():  # all, so that none with other settings is passed over
            complete = artifacts.is_complete(path, kind, value) and complete
        return complete

    def state(self) -> str:
        """``complete``, ``to do`` or ``refused: ...``; never an error."""
        if not self.is_begun():
            return "to do"
        try:
            return "complete" if self.is_complete() else "to do"
        except UserError as error:
            return "to do" if "not complete" in str(error) or "no such file" in str(error) else f"refused: {error}"


def stages(config: Config) -> list[Stage]:
    """All stages of a run and its variants, in an order in which each finds what it needs.

    Raises ``UserError`` if the data's splits leave one of them without input, or ``data.directory`` does not fit.
    """
    if config.data.directory is None:
        _check_splits(config)
    else:
        check_prepared(config)
    found = list(_shared_stages(config))
    for name in ("", *config.variants):
        found += _variant_stages(variant(config, name) if name else config, name)
    return found


def write_config(config: Config, source: Path, found: list[Stage]) -> None:
    """Write the resolved config into the run, if it says anything new.

    ``source``: the YAML that it was read from; ``found``: the run's stages.

    Raises ``UserError`` if the run holds outputs of other settings, or if ``source`` is a person's file that would be
    written over.
    """
    path, text = Layout(Path(config.run_dir)).config, config_text(config)
    if path.exists():
        old = path.read_bytes()
        if old == text.encode():
            return
        if path.samefile(source) and old != config_text(load_config(source)).encode():
            raise UserError(f"{source}: lies where the run's resolved config goes; move it out of run_dir")
        for stage in found:
            _refuse_other_settings(stage)
    artifacts.write_text(path, text)


def _refuse_other_settings(stage: Stage) -> None:
    if stage.is_begun():
        try:
            stage.is_complete()
        except artifacts.OtherSettings:
            raise
        except UserError:
            pass  # an input of it is missing: it will be said when it is its turn


def _check_splits(config: Config) -> None:
    filled = {source.split for source in config.data.inputs} | set(config.data.splits)
    needed = ["unlabeled", "test"] + ["labeled"] * bool(config.finetune) + ["pretrain"] * bool(config.model.nano)
    missing = [split for split in needed if split not in filled]
    if missing:
        raise UserError(f"data.splits: nothing goes to split {missing[0]!r}; give it a share, or an input of its own")


def _shared_stages(config: Config) -> Iterator[Stage]:
    from alsace_dist.stages import prepare, pretrain, train

    layout = Layout(Path(config.run_dir))

    def stage(command: str, directory: Path, is_distributed: bool, fingerprints: Any, execute: Any) -> Stage:
        return Stage(command, config, "", 0, is_distributed, (directory,), fingerprints, execute)

    if config.data.directory is None:
        yield stage(
            "prepare",
            layout.data,
            False,
            lambda: {layout.data: (prepare.KIND, prepare.fingerprint(config))},
            lambda runtime: prepare.prepare(config, layout.data),
        )
    if config.model.nano:
        yield stage(
            "pretrain-nano",
            layout.pretrain,
            True,
            lambda: {layout.pretrain: ("pretrain", pretrain.fingerprint(config))},
            lambda runtime: pretrain.pretrain(config, layout.pretrain, pretrain.fingerprint(config), runtime),
        )
    if config.finetune:

        def finetune_fingerprint() -> dict[str, Any]:
            return train.finetune_fingerprint(config, identity(config, layout, -1))

        yield stage(
            "finetune",
            layout.finetune,
            True,
            lambda: {layout.finetune: ("finetune", finetune_fingerprint())},
            lambda runtime: train.finetune(
                config, checked_model(config, layout, -1, runtime), layout.finetune, finetune_fingerprint(), runtime
            ),
        )
    yield _score_stage(config, layout, 0, ["unlabeled", "test"])


def _variant_stages(config: Config, name: str) -> Iterator[Stage]:
    from alsace_dist.stages import evaluate

    layout = Layout(Path(config.run_dir), name)
    for round_ in range(1, config.rounds + 1):
        yield _select_stage(config, layout, round_, layout.scores(round_ - 1, "unlabeled"), layout.selection(round_))
        yield _distill_stage(config, layout, round_)
        needs_unlabeled = round_ < config.rounds or config.evaluate.calibrate
        yield _score_stage(config, layout, round_, ["unlabeled", "test"] if needs_unlabeled else ["test"])
    if config.evaluate.calibrate:
        # Biases of the model that is evaluated: those of the model before would correct what distillation has mended.
        scores = layout.scores(config.rounds, "unlabeled")
        yield _select_stage(config, layout, config.rounds, scores, layout.calibration, "calibrate")
    if config.rounds or config.evaluate.calibrate:
        before, after = layout.scores(0, "test"), layout.scores(config.rounds, "test")
        teachers = layout.selection(1) if config.rounds else None
        biases = layout.calibration if config.evaluate.calibrate else None

        def run_evaluate(runtime: Runtime | None) -> None:
            evaluate.evaluate(config, before, after, teachers, layout.evaluation, biases)

        yield Stage(
            "evaluate",
            config,
            name,
            0,
            False,
            (layout.evaluation,),
            lambda: {layout.evaluation: (evaluate.KIND, evaluate.fingerprint(config, before, after, teachers, biases))},
            run_evaluate,
        )


def _score_stage(config: Config, layout: Layout, round_: int, splits: list[str]) -> Stage:
    from alsace_dist.stages import score

    outputs = {layout.scores(round_, split): data_url(config, split) for split in splits}

    def fingerprints() -> dict[Path, dict[str, Any]]:
        model = identity(config, layout, round_)
        return {path: score.fingerprint(config, model, url) for path, url in outputs.items()}

    def execute(runtime: Runtime | None) -> None:
        assert runtime is not None
        score.score(config, checked_model(config, layout, round_, runtime), outputs, fingerprints(), runtime)

    return Stage(
        "score",
        config,
        layout.variant,
        round_,
        True,
        tuple(outputs),
        lambda: {path: (score.KIND, value) for path, value in fingerprints().items()},
        execute,
    )


def _select_stage(
    config: Config, layout: Layout, round_: int, scores: Path, directory: Path, command: str = "select"
) -> Stage:
    from alsace_dist.stages import select

    def execute(runtime: Runtime | None) -> None:
        select.select(config, scores, directory, select.fingerprint(config, scores))

    return Stage(
        command,
        config,
        layout.variant,
        round_,
        False,
        (directory,),
        lambda: {directory: (select.KIND, select.fingerprint(config, scores))},
        execute,
    )


def _distill_stage(config: Config, layout: Layout, round_: int) -> Stage:
    from alsace_dist.stages import train

    scores, selection = layout.scores(round_ - 1, "unlabeled"), layout.selection(round_)

    def fingerprint() -> dict[str, Any]:
        return train.distill_fingerprint(config, identity(config, layout, round_ - 1), scores, selection)

    def execute(runtime: Runtime | None) -> None:
        assert runtime is not None
        model = checked_model(config, layout, round_ - 1, runtime)
        train.distill(config, model, scores, selection, layout.distill(round_), fingerprint(), runtime)

    return Stage(
        "distill",
        config,
        layout.variant,
        round_,
        True,
        (layout.distill(round_),),
        lambda: {layout.distill(round_): ("distill", fingerprint())},
        execute,
    )


def made_by(config: Config, layout: Layout, round_: int) -> tuple[Path, str] | None:
    """Directory and kind of the stage whose ``model/`` is the model after a round; None: it comes from elsewhere.

    ``round_``: 0: before any round of distillation; -1: before finetuning.
    """
    if round_ > 0:
        return layout.distill(round_), "distill"
    if round_ == 0 and config.finetune:
        return layout.finetune, "finetune"
    return (layout.pretrain, "pretrain") if config.model.nano else None


def checked_model(config: Config, layout: Layout, round_: int, runtime: Runtime | None) -> Path:
    """Directory of the model after a round, whose files are what the manifest of its stage lists. Collective.

    Raises ``UserError`` if they are not.
    """
    assert runtime is not None
    if (maker := made_by(config, layout, round_)) is None:
        return _given_model(config)
    directory, kind = maker
    runtime.main_first(lambda: artifacts.verify_files(directory, artifacts.load_manifest(directory, kind)))
    return directory / "model"


def identity(config: Config, layout: Layout, round_: int) -> dict[str, Any]:
    """What tells the model after a round from others: the manifest of the stage that made it, or its files."""
    if maker := made_by(config, layout, round_):
        directory, kind = maker
        return {kind: artifacts.load_manifest(directory, kind).digest}
    from alsace_dist.models import mt5 as modeling

    return modeling.model_identity(_given_model(config))


def _given_model(config: Config) -> Path:
    from alsace_dist.models import mt5 as modeling

    assert config.model.path is not None
    return modeling.resolve_model(config.model.path, config.model.revision)
