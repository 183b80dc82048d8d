"""What ``alsace plan --nodes`` is asked, from its flags."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from alsace_dist.config import Config
from alsace_dist.errors import UserError
from alsace_dist.plan import assumptions as given
from alsace_dist.plan.cluster import Cluster, read_cluster
from alsace_dist.plan.work import Counts

GPUS_PER_NODE = 8
MOST_GROUPS = 10**10
MOST_LANGUAGES = 10**4


class Wish(NamedTuple):
    """A plan for nodes that need not be there. ``counts``: of what is not prepared; ``average_length``: None for the
    usual one; ``file``: where to write choice number ``choice``."""

    cluster: Cluster
    counts: Counts
    average_length: int | None = None
    file: Path | None = None
    choice: int = 1


def read_wish(nodes: int, flags: Mapping[str, int | str], config: Config) -> Wish | None:
    """What is asked; None if the plan is for this machine. ``flags``: by name; 0 or empty: not given.

    Raises ``UserError`` that names the flag.
    """
    if nodes == 0:
        if name := next((name for name, value in flags.items() if value), None):
            raise UserError(f"--{name}={flags[name]}: is for the nodes of --nodes; give both, or neither")
        return None
    if not flags["gpu-memory"]:
        raise UserError(f"--nodes={nodes}: needs the memory of a GPU as well; give --gpu-memory=80GB")
    cluster = read_cluster(
        nodes,
        _number(flags, "gpus-per-node") or GPUS_PER_NODE,
        *(str(flags[name]) for name in ("gpu-memory", "bandwidth", "flops")),
    )
    if flags["choice"] and not flags["write"]:
        raise UserError(f"--choice={flags['choice']}: says what to write; give --write=FILE as well")
    languages = _number(flags, "languages") or len(config.data.languages or ()) or given.NUM_LANGUAGES
    groups = _number(flags, "groups")
    # Shares of what is not there yet say nothing.
    splits = {} if groups else {split: int(size) for split, size in config.data.splits.items() if size >= 1}
    counts = Counts(groups or given.NUM_GROUPS, languages, splits)
    file = Path(str(flags["write"])) if flags["write"] else None
    return Wish(cluster, counts, _number(flags, "average-length") or None, file, _number(flags, "choice") or 1)


def _number(flags: Mapping[str, int | str], name: str) -> int:
    """A flag that counts; 0: not given. Raises ``UserError`` if it is out of bounds."""
    value = flags[name]
    assert isinstance(value, int)
    most = MOST_LANGUAGES if name == "languages" else MOST_GROUPS
    if not 0 <= value <= most:
        raise UserError(f"--{name}={value}: must be from 1 to {most:,}")
    return value
