"""The stages of a run, in order, as data: what plan, submit, status and the runner read.

A stage is listed where its inputs have been made by stages before it. What a stage reads, writes and depends on, its
module in stages/ declares.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alsace_dist.config import Config
from alsace_dist.config_file import config_text, load_config, read_yaml, variant
from alsace_dist.data.config_check import check_prepared
from alsace_dist.data.inputs import check_inputs
from alsace_dist.errors import UserError
from alsace_dist.files.layout import TENSORBOARD, Layout
from alsace_dist.files.manifest import OtherSettings, write_text
from alsace_dist.monitor.overview import write_overview
from alsace_dist.stages import distill, evaluate, finetune, prepare, pretrain, score, select
from alsace_dist.stages.base import Stage, StageModule

# Command -> the stage behind it, in the order of a run.
COMMANDS: dict[str, StageModule] = {
    "prepare": prepare,
    "pretrain-nano": pretrain,
    "finetune": finetune,
    "score": score,
    "select": select,
    "distill": distill,
    "calibrate": select,
    "evaluate": evaluate,
}


def stages(config: Config) -> list[Stage]:
    """All stages of a run and its variants, in an order in which each finds what it needs.

    Raises ``UserError`` if the data's splits leave one of them without input, or ``data.directory`` does not fit.
    """
    if config.data.directory is None:
        _check_splits(config)
    else:
        check_prepared(config)
    found = list(_shared_stages(config))
    for name, one in variants(config):
        found += _own_stages(one, name)
    return found


def variants(config: Config) -> list[tuple[str, Config]]:
    """The run itself, under the name "", and its variants, each with its own settings laid over."""
    return [("", config), *((name, variant(config, name)) for name in config.variants)]


def _stage(command: str, config: Config, name: str = "", round_: int = 0) -> Stage:
    return Stage(COMMANDS[command], command, config, name, round_)


def _shared_stages(config: Config) -> Iterator[Stage]:
    """What variants share with the run."""
    if config.data.directory is None:
        yield _stage("prepare", config)
    if config.model.nano:
        yield _stage("pretrain-nano", config)
    if config.finetune:
        yield _stage("finetune", config)
    yield _stage("score", config)


def _own_stages(config: Config, name: str) -> Iterator[Stage]:
    """What the run, or a variant of it, has for itself."""
    for round_ in range(1, config.rounds + 1):
        for command in ("select", "distill", "score"):
            yield _stage(command, config, name, round_)
    if config.evaluate.calibrate:
        yield _stage("calibrate", config, name, config.rounds)
    if config.rounds or config.evaluate.calibrate:
        yield _stage("evaluate", config, name)


def _check_splits(config: Config) -> None:
    filled = {one.split for one in config.data.inputs} | set(config.data.splits)
    needed = ["unlabeled", "test"] + ["labeled"] * bool(config.finetune) + ["pretrain"] * bool(config.model.nano)
    missing = [split for split in needed if split not in filled]
    if missing:
        raise UserError(f"data.splits: nothing goes to split {missing[0]!r}; give it a share, or an input of its own")


# --- the config of a run -------------------------------------------------------------------------------------------


def load_run(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a run's YAML, lay dotted overrides over it and check it, its kinds of input too.

    Raises ``UserError`` that names the file, the key and the remedy.
    """
    config = load_config(path, overrides)
    try:
        check_inputs(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def write_config(config: Config, yaml_path: Path, found: list[Stage]) -> None:
    """Write the resolved config into the run, if it says anything new.

    ``yaml_path``: the YAML that it was read from; ``found``: the run's stages.

    Raises ``UserError`` if the run holds outputs of other settings, or if ``yaml_path`` is a person's file that would
    be written over.
    """
    layout, text = Layout(Path(config.run_dir)), config_text(config)
    claim_run(layout)
    if layout.config.exists():
        if layout.config.read_bytes() == text.encode():
            return
        for stage in found:
            _refuse_other_settings(stage)
    write_text(layout.config, text)
    write_overview(layout.run / TENSORBOARD, text)


def claim_run(layout: Layout) -> None:
    """Make sure that the files which lie in the run directory itself are this program's to write over.

    The mark is a resolved ``config.yaml``, the first file of every run. Raises ``UserError`` that names a file of
    somebody else's, or a link.
    """
    if linked := next((path for path in (layout.config, *layout.files) if path.is_symlink()), None):
        raise UserError(f"{linked}: is a link, which would be written over; remove it, or choose another run_dir")
    if layout.config.exists():
        remedy = "lies where the run's resolved config goes; move it out of run_dir"
        try:
            value = read_yaml(layout.config, "")
        except UserError as error:
            raise UserError(f"{error}; {layout.config} {remedy}") from None
        if not Config.model_fields.keys() <= value.keys():
            raise UserError(f"{layout.config}: {remedy}")
        return
    for path in layout.files:
        if path.exists():
            raise UserError(
                f"{path}: is not alsace_dist's, and would be written over; move it, or choose another run_dir"
            )


def _refuse_other_settings(stage: Stage) -> None:
    if stage.is_begun():
        try:
            stage.is_complete()
        except OtherSettings:
            raise
        except UserError:
            pass  # an input is missing: running the stage will say so
