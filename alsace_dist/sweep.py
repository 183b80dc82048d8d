"""A sweep: one config under several seeds. Every seed is a run of its own, in ``RUN_DIR/seed-N``.

``RUN_DIR/sweep.json`` lists the seeds in the order in which they came, and only grows: a seed's place in it is the
number of its task in Slurm's arrays, whichever of the seeds are submitted later.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alsace_dist import pipeline
from alsace_dist.config import NOT_IN_FINGERPRINT, Config
from alsace_dist.errors import UserError
from alsace_dist.files.layout import SEEDS_NUMBERS, SEEDS_TABLE, Layout
from alsace_dist.files.manifest import differences, read_json, write_json

FILE = "sweep.json"
MAX_SEED = 2**63 - 1
MAX_SEEDS = 1000
# Sections that may differ between the runs of a sweep: they change no result, or are added later.
OF_EACH_RUN = {"seed", "run_dir", "variants", "engine", "monitor", "export", "score"}
_PART = re.compile(r"(\d{1,19})(?:-(\d{1,19}))?", re.ASCII)


@dataclass(frozen=True)
class Member:
    """A run of a sweep. ``place``: of its seed in the sweep's list."""

    seed: int
    place: int
    run: Path


def wanted(text: str | None, overrides: Mapping[str, Any]) -> list[int]:
    """The seeds that a command was given in ``--seeds``; none without that flag.

    Raises ``UserError`` also if a single seed is given beside it.
    """
    if text is not None and "seed" in overrides:
        raise UserError("--seed and --seeds: give one of them")
    return [] if text is None else parse_seeds(text)


def parse_seeds(text: str) -> list[int]:
    """The seeds in ``--seeds=1,2,5-7``, in order. Raises ``UserError`` that says what is wrong with them."""
    seeds: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise UserError(f"--seeds={text}: {part!r} is no seed; give whole numbers from 0 on, such as 1,2,3 or 1-5")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"--seeds={text}: {part!r} runs backwards; write {last}-{first}")
        if last > MAX_SEED:
            raise UserError(f"--seeds={text}: {last} is beyond the largest seed, {MAX_SEED}")
        if len(seeds) + last - first >= MAX_SEEDS:
            raise UserError(f"--seeds={text}: more than {MAX_SEEDS} seeds; give fewer")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        raise UserError(f"--seeds={text}: {twice} is given twice; give it once")
    return seeds


def configs(config: Config, seeds: Sequence[int]) -> dict[int, Config]:
    """Seed -> the config of its run."""
    run = Path(config.run_dir)
    return {seed: config.model_copy(update={"seed": seed, "run_dir": str(_directory(run, seed))}) for seed in seeds}


def is_sweep(run: Path) -> bool:
    """Whether the directory is a sweep's."""
    return (run / FILE).exists()


def members(run: Path) -> list[Member]:
    """The runs of a sweep, in the order of their places; none if the directory is not a sweep's.

    Raises ``UserError`` if its list is broken.
    """
    seeds = _read(run) if is_sweep(run) else []
    return [Member(seed, place, _directory(run, seed)) for place, seed in enumerate(seeds)]


def runs_of(path: Path) -> list[Path]:
    """The directory of a run, or those of a sweep's runs that were begun."""
    return [one.run for one in members(path) if Layout(one.run).config.exists()] if is_sweep(path) else [path]


def sweep_of(run: Path) -> tuple[Path, Member] | None:
    """The sweep that a run belongs to, and its place there; None if it is a run by itself."""
    directory = run.resolve()
    if not directory.name.startswith("seed-") or not is_sweep(directory.parent):
        return None
    found = (member for member in members(directory.parent) if member.run.name == directory.name)
    return next(((directory.parent, member) for member in found), None)


def claim(run: Path, seeds: Sequence[int]) -> list[Member]:
    """Make a directory the sweep's, with these seeds in its list; all members.

    Raises ``UserError`` if it is the directory of a run, or holds files of somebody else.
    """
    layout = Layout(run)
    if layout.config.exists():
        raise UserError(f"{layout.config}: {run} is the directory of a run; give a sweep of seeds a run_dir of its own")
    known = [member.seed for member in members(run)]
    if not known:
        pipeline.claim_run(layout)
    for path in (run / SEEDS_TABLE, run / SEEDS_NUMBERS):
        if path.is_symlink() or (path.exists() and not known):
            raise UserError(f"{path}: would be written over; move it, or choose another run_dir")
    if new := [seed for seed in seeds if seed not in known]:
        write_json(run / FILE, {"seeds": [*known, *new]})
    return members(run)


def check_same(configs: Sequence[Config]) -> None:
    """Raises ``UserError`` if runs of one sweep differ in more than their seeds and what changes no result."""
    first, *others = configs
    for other in others:
        if rows := differences(_results(first), _results(other)):
            raise UserError(
                f"{other.run_dir}: is no seed of the same config as {first.run_dir} ({rows[0]}); a sweep has one "
                "config, so give the other a run_dir of its own"
            )


def _results(config: Config) -> dict[str, Any]:
    """What a run's results depend on, but for the seed; variants may be added later."""
    value = config.model_dump(mode="json", exclude=OF_EACH_RUN)
    for name in ("pretrain", "finetune", "distill"):
        value[name] = {key: one for key, one in (value[name] or {}).items() if key not in NOT_IN_FINGERPRINT}
    return value


def refuse_sweep(run: Path) -> None:
    """Raises ``UserError`` if the directory, in which a run is to be made, is a sweep's."""
    if is_sweep(run):
        raise UserError(f"{run}: holds a sweep of seeds; give --seeds, or another run_dir")


def _directory(run: Path, seed: int) -> Path:
    return run / f"seed-{seed}"


def _read(run: Path) -> list[int]:
    path, remedy = run / FILE, "it lies where alsace lists a sweep's seeds; mend it, or move it out of run_dir"
    value = read_json(path, remedy)
    seeds = value.get("seeds") if isinstance(value, dict) else None
    are_seeds = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed <= MAX_SEED for seed in seeds)
    if not seeds or not are_seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: holds no list of seeds; {remedy}")
    return list(seeds)
