"""Score files as columns: a shard at a time, checked, as numpy arrays; no Python object for each row.

A directory of 10^5 files and 10^8 rows is read in the memory of one file and 8 bytes for each group.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alsace_dist.errors import UserError
from alsace_dist.files.manifest import MANIFEST, Manifest, verify_file
from alsace_dist.files.shards import Label
from alsace_dist.reading import check_regular

NEEDED = ("key", "language", "log_probs", "label")
FILE_REMEDY = "delete its directory and run `alsace score` again"
REMEDY = "delete the directory and run `alsace score` again"


def schema(names: Collection[str] = NEEDED) -> Any:
    """The columns of score files that have these names, as pyarrow knows them."""
    import pyarrow as pa

    kinds = {"key": pa.string(), "language": pa.string(), "log_probs": pa.list_(pa.float32()), "label": pa.int32()}
    kinds |= {"labels": pa.list_(pa.int32()), "apart": pa.bool_(), "category": pa.string()}
    return pa.schema([(name, kind) for name, kind in kinds.items() if name in names])


@dataclass(frozen=True)
class ScoreColumns:
    """The N rows of one file, in its order, of G groups in T languages.

    ``keys``: of the groups, in the order of their first rows; ``languages``: sorted. ``group``, ``language``: int64
    [N], which of them a row is of. ``values``: float32, the log-probabilities of all rows one after another, of which
    row i has ``sizes[i]``. ``golds``: int64 [N, M], the right candidates, -1 where a row has fewer than M; ``apart``:
    bool [N], as in ``Scores``. ``table``: the same as pyarrow has it.
    """

    keys: list[str]
    languages: tuple[str, ...]
    group: np.ndarray
    language: np.ndarray
    values: np.ndarray
    sizes: np.ndarray
    golds: np.ndarray
    apart: np.ndarray
    table: Any

    def padded(self) -> np.ndarray:
        """The log-probabilities, float32 [N, K], with -inf behind those of a row with fewer candidates than others."""
        most = int(self.sizes.max(initial=0))
        rows = np.full((len(self.sizes), most), -np.inf, np.float32)
        rows[np.arange(most) < self.sizes[:, None]] = self.values
        return rows

    def labels(self) -> list[Label]:
        """Row by row."""
        labels: list[Label] = self.table.column("label").to_pylist()
        if "labels" in self.table.column_names:
            several = self.table.column("labels").to_pylist()
            labels = [tuple(many) if many else one for one, many in zip(labels, several, strict=True)]
        return labels


def read_columns(path: Path) -> ScoreColumns:
    """Read one file. Raises ``UserError`` if it is missing, broken, lacks a column, or holds rows that are none."""
    table = _read_table(path)
    keys = table.column("key").combine_chunks().dictionary_encode()
    names = table.column("language").combine_chunks().dictionary_encode()
    languages: list[str] = names.dictionary.to_pylist()
    ranked = sorted(languages)
    column = table.column("log_probs").combine_chunks()
    found = ScoreColumns(
        keys.dictionary.to_pylist(),
        tuple(ranked),
        _numbers(keys.indices),
        np.array([ranked.index(name) for name in languages], np.int64)[_numbers(names.indices)],
        column.flatten().to_numpy(zero_copy_only=False),
        _numbers(column.value_lengths()),
        _golds(table),
        table.column("apart").combine_chunks().fill_null(False).to_numpy(zero_copy_only=False).astype(bool)
        if "apart" in table.column_names
        else np.zeros(len(table), bool),
        table,
    )
    _check_values(path, found.values, found.sizes)
    _check_names(path, found)
    return found


def _read_table(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        check_regular(path, FILE_REMEDY)
    except FileNotFoundError:
        raise UserError(f"{path}: not a score file (no such file); {FILE_REMEDY}") from None
    try:
        with pa.OSFile(str(path)) as opened, pq.ParquetFile(opened) as file:
            here = file.schema_arrow.names
            names = {*NEEDED, *here}
            # To share a file of some kilobytes among threads takes longer than to read it.
            table = file.read([name for name in schema(names).names if name in here], use_threads=False)
        if lacking := [name for name in NEEDED if name not in table.column_names]:
            raise ValueError(f"it has no column {lacking[0]}")
        if wrong := next((column for column in table.schema if not _is_of_kind(column)), None):
            raise ValueError(f"column {wrong.name} holds {wrong.type}")
        table = table.select(schema(names).names).cast(schema(names))
    except PermissionError:
        raise  # the file is not broken, and the operating system's message names path and reason
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(f"{path}: not a score file ({' '.join(str(error).split())}); {FILE_REMEDY}") from None
    if bad := next((name for name in ("key", "language", "log_probs") if table.column(name).null_count), None):
        raise UserError(f"{path}: column {bad} has holes; {FILE_REMEDY}")
    return table


def _is_of_kind(column: Any) -> bool:
    """Whether a column has the kind of values that it should, in whatever width: a cast would take numbers for text."""
    import pyarrow.types as kinds

    kind = column.type
    if kinds.is_null(kind):  # no value at all
        return True
    if column.name == "log_probs":
        return bool(kinds.is_list(kind) and kinds.is_floating(kind.value_type))
    if column.name == "labels":
        return bool(kinds.is_list(kind) and kinds.is_integer(kind.value_type))
    if column.name == "apart":
        return bool(kinds.is_boolean(kind))
    return bool(kinds.is_integer(kind) if column.name == "label" else kinds.is_string(kind))


def _numbers(column: Any) -> np.ndarray:
    found: np.ndarray = column.to_numpy(zero_copy_only=False).astype(np.int64)
    return found


def _golds(table: Any) -> np.ndarray:
    """``label`` of each row, or ``labels`` where a row has such: int64 [N, M], -1 where there is none."""
    one = _numbers(table.column("label").combine_chunks().fill_null(-1))[:, None]
    if "labels" not in table.column_names:
        return one
    several = table.column("labels").combine_chunks()
    lengths = _numbers(several.value_lengths().fill_null(0))
    golds = np.full((len(table), max(1, int(lengths.max(initial=0)))), -1, np.int64)
    golds[:, :1] = np.where(lengths[:, None] > 0, -1, one)
    golds[np.arange(golds.shape[1]) < lengths[:, None]] = several.flatten().to_numpy(zero_copy_only=False)
    return golds


def _check_names(path: Path, rows: ScoreColumns) -> None:
    """Raises ``UserError`` if a row has an empty name or is there twice."""
    places = rows.group * max(1, len(rows.languages)) + rows.language
    _, first = np.unique(places, return_index=True)
    is_wrong = np.ones(len(places), bool)
    is_wrong[first] = False  # all but the first row of each place
    is_wrong |= np.array([not key for key in rows.keys], bool)[rows.group]
    is_wrong |= np.array([not name for name in rows.languages], bool)[rows.language]
    if is_wrong.any():
        row = int(is_wrong.argmax())
        key, language = rows.keys[rows.group[row]], rows.languages[rows.language[row]]
        problem = "is there twice" if row not in first else "a name is empty"
        raise UserError(f"{path}: group {key!r}, language {language!r}: {problem}; {FILE_REMEDY}")


def _check_values(path: Path, values: np.ndarray, lengths: np.ndarray) -> None:
    """Raises ``UserError`` if rows are no log-probabilities over two candidates or more.

    Numbers that are not finite pass: they are a model's, not a file's fault, and the stages say so.
    """
    if len(lengths) == 0:
        return
    if lengths.min() < 2:
        raise UserError(f"{path}: row {int(lengths.argmin())} has fewer than two candidates; {FILE_REMEDY}")
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    with np.errstate(over="ignore", invalid="ignore"):
        sums = np.add.reduceat(np.exp(values.astype(np.float64)), starts)
    wrong = np.isfinite(sums) & (np.abs(sums - 1) > 1e-3)
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(f"{path}: row {row}: its probabilities add up to {sums[row]:.3g}, not to 1; {FILE_REMEDY}")


# --- a directory of files ------------------------------------------------------------------------------------------


def read_batches(
    directory: Path, manifest: Manifest, num_groups: int | None = None, num_candidates: int | None = None
) -> Iterator[ScoreColumns]:
    """The files of a complete directory, one after another; whole files until there are ``num_groups`` groups.

    Raises ``UserError`` if a file is not what the manifest lists or its rows are not of a task with ``num_candidates``
    (None: groups bring their own); and behind the last file, if the files together are wrong: a group that two of them
    have, too few groups, other rows than the manifest tells of.
    """
    names: list[str] = []
    hashes: list[np.ndarray] = []
    languages: set[str] = set()
    num_keys = num_rows = 0
    for name in sorted(manifest.files):
        if num_groups is not None and num_keys >= num_groups:
            break
        verify_file(directory, manifest, name)
        rows = read_columns(directory / name)
        _check_rows(directory, rows, num_candidates)
        names.append(name)
        hashes.append(_hashes(rows.keys))
        languages.update(rows.languages)
        num_keys, num_rows = num_keys + len(rows.keys), num_rows + len(rows.group)
        yield rows
    _check_keys(directory, names, hashes)
    if num_groups is None:
        _check_counts(directory, manifest, num_rows, languages)
    elif num_keys < num_groups:
        raise UserError(f"select.num_groups: {num_groups} asked for, {directory} has {num_keys}; lower it")


def _check_rows(directory: Path, rows: ScoreColumns, num_candidates: int | None) -> None:
    """Raises ``UserError`` if rows have another number of candidates than the task, or than others of their group that
    correspond to them, or if a group has two labels."""

    def where(row: int) -> str:
        key, language = rows.keys[rows.group[row]], rows.languages[rows.language[row]]
        return f"{directory}: group {key!r}, language {language!r}: has"

    if num_candidates is not None and (wrong := rows.sizes != num_candidates).any():
        row = int(wrong.argmax())
        size = rows.sizes[row]
        raise UserError(f"{where(row)} scores of {size} candidates, and the task has {num_candidates}; {REMEDY}")
    together = np.flatnonzero(~rows.apart)
    other = _first_other(rows.group, together, rows.sizes[:, None])
    if other is not None:
        raise UserError(f"{where(other)} more or fewer candidates than another language; {REMEDY}")
    labelled = np.flatnonzero(~rows.apart & (rows.golds[:, 0] >= 0))
    other = _first_other(rows.group, labelled, rows.golds)
    if other is not None:
        labels = rows.labels()
        first = labels[labelled[rows.group[labelled] == rows.group[other]][0]]
        raise UserError(f"{where(other)} the label {labels[other]}, where another language has {first}; {REMEDY}")


def _first_other(group: np.ndarray, chosen: np.ndarray, values: np.ndarray) -> int | None:
    """Of the chosen rows, the first whose values [N, M] are others than those of its group's first chosen row."""
    _, first, of_group = np.unique(group[chosen], return_index=True, return_inverse=True)
    differs = (values[chosen] != values[chosen[first]][of_group]).any(axis=1)
    return int(chosen[differs.argmax()]) if differs.any() else None


def _hashes(keys: list[str]) -> np.ndarray:
    """64 bits of each key; others in each process, so that nobody can choose keys that meet."""
    return np.fromiter(map(hash, keys), np.int64, len(keys))


def _check_keys(directory: Path, names: list[str], hashes: list[np.ndarray]) -> None:
    """Raises ``UserError`` if two files have the same group.

    All hashes together, 8 bytes for each group, are sorted: equal keys are neighbours then. That two of 10^7 different
    keys have the same hash happens once in 300,000 directories, so the keys themselves decide.
    """
    ordered = np.sort(np.concatenate([*hashes, np.empty(0, np.int64)]))
    suspects = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if len(suspects) == 0:
        return
    seen: dict[str, tuple[str, set[str]]] = {}
    for name, own in zip(names, hashes, strict=True):
        numbers = np.flatnonzero(np.isin(own, suspects))
        if len(numbers) == 0:
            continue
        rows = read_columns(directory / name)
        for number in numbers.tolist():
            key, languages = rows.keys[number], rows.language[rows.group == number]
            own_languages = {rows.languages[language] for language in languages}
            earlier, others = seen.setdefault(key, (name, own_languages))
            if earlier == name:
                continue
            place, both = f"{directory}: group {key!r}", sorted(own_languages & others)
            if both:
                raise UserError(f"{place}, language {both[0]!r}: is there twice; {REMEDY}")
            raise UserError(f"{place}: is divided between {earlier} and {name}; {REMEDY}")


def _check_counts(directory: Path, manifest: Manifest, num_rows: int, found: set[str]) -> None:
    """Hold all rows of a directory against what its manifest says of them. Raises ``UserError``."""
    listed, languages = manifest.details.get("num_examples"), manifest.details.get("texts")
    if listed not in (None, num_rows):
        raise UserError(f"{directory}: has {num_rows} rows, and {MANIFEST} says {listed}; {REMEDY}")
    if isinstance(languages, dict) and (unknown := sorted(found ^ languages.keys())):
        raise UserError(f"{directory}: its rows and {MANIFEST} differ in the language {unknown[0]!r}; {REMEDY}")
