"""Which settings fit a GPU's memory, cheapest first; and a config that has them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from alsace_dist.config import Config, EngineConfig
from alsace_dist.config_file import load_config, validate
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import write_text
from alsace_dist.plan.cost import hpz_size
from alsace_dist.plan.estimate import Estimate, Forecast, estimate, training_that_fits
from alsace_dist.plan.work import Work

HPZ = "zero_hpz_partition_size"


class Choice(NamedTuple):
    """Settings that fit. ``estimates``: of the stages, with the budgets of micro-batches that are chosen."""

    engine: EngineConfig
    estimates: list[Estimate]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(one.seconds for one in self.estimates)

    @property
    def node_hours(self) -> float:
        """Of all stages and nodes."""
        return sum(one.node_hours for one in self.estimates)

    @property
    def device_bytes(self) -> int:
        """Of the stage that takes most of a GPU's memory."""
        return max(one.device_bytes for one in self.estimates)

    @property
    def budgets(self) -> dict[str, int | str]:
        """Training stage -> ``tokens_per_micro_batch``."""
        return {one.work.name: one.work.section.tokens_per_micro_batch for one in self.estimates if one.work.section}


def choices(about: Forecast, works: list[Work], engine: EngineConfig) -> list[Choice]:
    """The settings that fit every stage, cheapest first: of each layout with the best budgets of micro-batches.

    ``engine``: whose precision and other settings are kept.
    """
    found = []
    for layout in _layouts(about, works, engine):
        estimates = [_best(about, replace(work, engine=layout)) for work in works]
        sound = [one for one in estimates if one is not None]
        if len(sound) == len(works):
            found.append(Choice(layout, sound))
    return sorted(found, key=lambda one: (one.node_hours, one.device_bytes))


def _layouts(about: Forecast, works: list[Work], engine: EngineConfig) -> Iterator[EngineConfig]:
    is_adamw = all(work.section is None or work.section.optimizer == "adamw" for work in works)
    gpus, has_nodes = about.cluster.gpus_per_node, about.cluster.num_nodes > 1
    for stage in (0, 1, 2, 3) if is_adamw else (0,):
        for is_saving in (False, True):
            for is_offloaded in (False, True) if stage else (False,):
                for size in (1, gpus) if stage == 3 and has_nodes and gpus > 1 else (1,):
                    yield layout_of(engine, stage, is_saving, is_offloaded, size)


def layout_of(engine: EngineConfig, stage: int, is_saving: bool, is_offloaded: bool, hpz: int = 1) -> EngineConfig:
    """An engine section in another layout; raw settings that only ZeRO-3 has go where it goes."""
    raw: dict[str, Any] = dict(engine.deepspeed)
    zero = {key: value for key, value in raw.pop("zero_optimization", {}).items() if key != HPZ}
    if stage != 3:
        zero = {key: one for key, one in zero.items() if not key.startswith(("stage3_", "zero_", "offload_param"))}
    if hpz > 1:
        zero[HPZ] = hpz
    changes: dict[str, Any] = {
        "zero_stage": stage,
        "gradient_checkpointing": is_saving,
        "offload_optimizer": is_offloaded,
    }
    changes["deepspeed"] = raw | ({"zero_optimization": zero} if zero else {})
    return EngineConfig.model_validate(engine.model_dump(exclude_unset=True) | changes)


def _best(about: Forecast, work: Work) -> Estimate | None:
    """The fastest estimate that fits; None if none does."""
    if work.section is not None:
        return training_that_fits(about, work, work.section)
    found = estimate(about, work)
    return found if found.fits else None


def write(config: Config, choice: Choice, file: Path) -> None:
    """Write the config with the settings of a choice, to be run as it is.

    Raises ``UserError`` if the file is there, or cannot be written.
    """
    cluster = choice.estimates[0].cluster
    value = config.model_dump(mode="json", exclude_unset=True)
    engine = choice.engine.model_dump(mode="json", exclude_unset=True)
    value["engine"] = engine | {"num_processes": cluster.gpus_per_node}
    for name, tokens in choice.budgets.items():
        value[name] = value.get(name, {}) | {"tokens_per_micro_batch": tokens}
    validate(Config, value, f"{file}: ")
    text = f"# Written by alsace plan for {cluster.num_nodes} nodes of {cluster.gpus_per_node} GPUs: predicted, not "
    text += f"measured, {choice.node_hours:.3g} node-hours.\n"
    text += yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
    if file.exists() or file.is_symlink():
        raise UserError(f"--write={file}: is there already; give another name")
    if not file.parent.is_dir():
        raise UserError(f"--write={file}: there is no directory {file.parent}; make it, or give another name")
    try:
        write_text(file, text)
    except OSError as error:
        raise UserError(
            f"--write={file}: cannot be written ({error.strerror}); give another name, or see to that"
        ) from None
    load_config(file)


def _seconds(choice: Choice, name: str) -> float:
    """Of a stage."""
    return next(one.seconds for one in choice.estimates if one.work.name == name)


def remedies(one: Estimate, better: list[Choice]) -> list[str]:
    """What would help a stage in which GPUs wait for each other more than they compute. ``better``: what fits."""
    engine, cluster, name = one.work.engine, one.cluster, one.work.name
    found = []
    if one.work.section is None:
        return ["a larger score.tokens_per_batch", "fewer nodes"]
    # Of the layouts that fit, the cheapest in which this stage is faster than it is.
    best = next((choice for choice in better if _seconds(choice, name) < one.seconds), None)
    if best and best.engine.zero_stage < engine.zero_stage:
        found.append(f"engine.zero_stage: {best.engine.zero_stage}, which fits")
    if best and (size := hpz_size(best.engine)) > hpz_size(engine):
        found.append(f"engine.deepspeed.zero_optimization.{HPZ}: {size}")
    if one.num_passes > 1 and engine.zero_stage >= 2:
        found.append(f"a larger {name}.tokens_per_micro_batch")
    if one.num_passes == 1:
        found.append(f"a larger {name}.global_batch_size, of which a GPU has {one.prompts:.3g} prompts a step")
    return [*found, *(["fewer nodes"] if cluster.num_nodes > 1 else [])]
