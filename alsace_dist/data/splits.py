"""Which split a parallel group goes to: by a hash of its id, and together with the groups that it belongs to."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from alsace_dist.config import Config, Split
from alsace_dist.data.audit import LeftOut
from alsace_dist.data.records import Place
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import digest_bytes
from alsace_dist.files.shards import ParallelGroup

# Splits take undivided groups in this order, so that asking for more training data leaves the test groups as they are.
SPLITS: tuple[Split, ...] = ("test", "dev", "labeled", "unlabeled", "pretrain")
NEED_LABELS: tuple[Split, ...] = ("test", "labeled")


def needs_labels(split: str, config: Config) -> bool:
    """Whether every group of a split has labels: of dev unless they are withheld."""
    return split in NEED_LABELS or (split == "dev" and split not in config.data.withhold_labels)


class Entry(NamedTuple):
    """A good group, the split that its input goes to (None: undivided), where it stands, and what it belongs to."""

    group: ParallelGroup
    split: Split | None
    place: Place
    unit: str | None = None


def wanted_splits(config: Config) -> list[Split]:
    """The splits that a config asks for, in their order."""
    own = {one.split for one in config.data.inputs}
    return [split for split in SPLITS if split in own or split in config.data.splits]


def divide(entries: Sequence[Entry], config: Config, left_out: LeftOut) -> dict[str, list[Entry]]:
    """Split -> its groups, ordered by a hash of (seed, id): a shuffle that depends on nothing else.

    Groups of one unit are in one split only: the first one that an input of its own gives them, or else the one that
    the unit's hash falls into. What is thereby left out is counted.
    """

    def place_of(name: str) -> str:
        return digest_bytes(f"{config.seed}:{name}".encode())

    ordered = sorted(entries, key=lambda entry: place_of(entry.group.key))
    parts: dict[str, list[Entry]] = {split: [] for split in wanted_splits(config)}
    owners: dict[str, str] = {}
    for split, part in parts.items():
        for entry in (one for one in ordered if one.split == split):
            if entry.unit is None or owners.setdefault(entry.unit, split) == split:
                part.append(entry)
    units: dict[tuple[str, str], list[Entry]] = {}
    for entry in (one for one in ordered if one.split is None and one.unit not in owners):
        units.setdefault(("id", entry.group.key) if entry.unit is None else ("unit", entry.unit), []).append(entry)
    left_out.num_other_unit = len(entries) - sum(map(len, parts.values())) - sum(map(len, units.values()))
    shuffled = [units[key] for key in sorted(units, key=lambda key: place_of(key[1]))]
    for split, part in _filled(shuffled, config.data.splits):
        parts[split] += part
    return {split: sorted(part, key=lambda entry: place_of(entry.group.key)) for split, part in parts.items()}


def _filled(units: Sequence[list[Entry]], splits: Mapping[Any, float]) -> Iterator[tuple[str, list[Entry]]]:
    """The splits with what they get of undivided units, one after another.

    A number is met exactly, and what is then left of a unit goes nowhere. A share takes units whole, and the shares
    after it get as much less as it has got too many.
    """
    remaining = iter(units)
    surplus = 0
    for split, size in _sizes(splits, sum(map(len, units))).items():
        part: list[Entry] = []
        is_share = splits[split] < 1
        wanted = size - surplus if is_share else size
        while len(part) < wanted and (unit := next(remaining, None)):
            part += unit if is_share else unit[: wanted - len(part)]
        surplus += len(part) - size if is_share else 0
        yield split, part


def _sizes(splits: Mapping[Any, float], num_groups: int) -> dict[str, int]:
    """Split -> number of groups. Shares are cut at rounded cumulative sums: shares of 1 in all leave no group out."""
    sizes: dict[str, int] = {}
    shares = 0.0
    for split in (split for split in SPLITS if split in splits):
        if splits[split] >= 1:
            sizes[split] = int(splits[split])
        else:
            start, shares = round(shares * num_groups), shares + splits[split]
            sizes[split] = round(shares * num_groups) - start
    return sizes


def check_sizes(parts: Mapping[str, Sequence[Entry]], entries: Sequence[Entry], config: Config) -> None:
    """Raises ``UserError`` if ``data.splits`` asks for more groups than there are to divide."""
    num_undivided = sum(entry.split is None for entry in entries)
    num_asked = sum(_sizes(config.data.splits, num_undivided).values())
    if num_asked > num_undivided:
        raise UserError(f"data.splits: asks for {num_asked} groups of {num_undivided}; ask for less or add inputs")
    own = {one.split for one in config.data.inputs}
    for split, amount in config.data.splits.items():
        if split not in own and amount >= 1 and len(parts[split]) < amount:
            raise UserError(
                f"data.splits.{split}: asks for {int(amount)} groups, and there are {len(parts[split])} where the "
                "groups of one unit stay in one split; ask for less or add inputs"
            )
