"""Score files: one Parquet file per shard, one row per (group, language), in shard order.

Columns: ``key``, ``language``, ``log_probs`` (list of float32, one per candidate), ``label`` (index or null). Where a
row has need of them there are also ``labels`` (list of int32: several right candidates), ``apart`` (bool: candidates
that correspond to no other language's) and ``category`` (string). While a shard is scored by several ranks, each writes
files of parts of it, whose metadata says which of the shard's rows they hold.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alsace_dist.errors import UserError
from alsace_dist.files.manifest import MANIFEST, Manifest, atomic_path, load_manifest, verify_file
from alsace_dist.files.shards import Label, golds
from alsace_dist.reading import check_regular

KIND = "scores"
PART = "part-"  # after a shard's name and a point: a file of a part of it
_PART_FILE = re.compile(rf"(.+)\.{PART}\d+-of-\d+\.parquet")
ROWS = "rows"  # in the metadata of such a file: the places of its rows among the shard's


@dataclass(frozen=True)
class Scores:
    """Rows of scores. ``log_probs[i]``: float32 [K_i], normalised over the K_i candidates of row i.

    ``apart``: whether a row's candidates correspond to no other language's; ``categories``: as in ``ParallelGroup``.
    Either is empty if that is so of no row.
    """

    keys: list[str]
    languages: list[str]
    log_probs: list[np.ndarray]
    labels: list[Label]
    apart: list[bool] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[str, str, np.ndarray, Label, bool, str]]:
        """Row by row: key, language, log-probabilities, label, apart, category."""
        num_rows = len(self.keys)
        apart, categories = self.apart or [False] * num_rows, self.categories or [""] * num_rows
        return zip(self.keys, self.languages, self.log_probs, self.labels, apart, categories, strict=True)

    def groups(self) -> dict[str, dict[str, np.ndarray]]:
        """key -> language -> log-probabilities of candidates that correspond, keys in row order."""
        grouped: dict[str, dict[str, np.ndarray]] = {}
        apart = self.apart or [False] * len(self.keys)
        for key, language, row, is_apart in zip(self.keys, self.languages, self.log_probs, apart, strict=True):
            if not is_apart:
                grouped.setdefault(key, {})[language] = row
        return grouped

    def golds(self) -> dict[str, tuple[int, ...]]:
        """key -> the right candidates of the languages whose candidates correspond, none without a label; the same keys
        as ``groups``."""
        apart = self.apart or [False] * len(self.keys)
        rows = zip(self.keys, self.labels, apart, strict=True)
        return {key: golds(label) for key, label, is_apart in rows if not is_apart}


NEEDED = ("key", "language", "log_probs", "label")


def _schema(names: Collection[str] = NEEDED) -> Any:
    import pyarrow as pa

    kinds = {"key": pa.string(), "language": pa.string(), "log_probs": pa.list_(pa.float32()), "label": pa.int32()}
    kinds |= {"labels": pa.list_(pa.int32()), "apart": pa.bool_(), "category": pa.string()}
    return pa.schema([(name, kind) for name, kind in kinds.items() if name in names])


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


def write_scores(path: Path, scores: Scores, metadata: dict[str, str], rows: Sequence[int] | None = None) -> None:
    """Write one shard's scores atomically; equal rows and metadata give equal bytes. ``rows``: of a part of a shard,
    the places of its rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "key": scores.keys,
        "language": scores.languages,
        "log_probs": [row.tolist() for row in scores.log_probs],
        "label": [None if isinstance(label, tuple) else label for label in scores.labels],
    }
    if any(isinstance(label, tuple) for label in scores.labels):
        columns["labels"] = [list(label) if isinstance(label, tuple) else None for label in scores.labels]
    columns |= {"apart": scores.apart} if any(scores.apart) else {}
    columns |= {"category": scores.categories} if any(scores.categories) else {}
    metadata = metadata if rows is None else metadata | {ROWS: " ".join(map(str, rows))}
    table = pa.table(columns, schema=_schema(columns)).replace_schema_metadata(metadata)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def parts_of(directory: Path) -> dict[str, list[Path]]:
    """Files of parts of shards: name of the shard -> its files. What a person has named in another way is none."""
    found: dict[str, list[Path]] = {}
    for path in sorted(directory.iterdir()):
        if (match := _PART_FILE.fullmatch(path.name)) and path.is_file():
            found.setdefault(match[1], []).append(path)
    return found


def put_together(path: Path, parts: Sequence[Path], metadata: dict[str, str]) -> None:
    """Write a shard's scores from files of parts of it, as if nobody had divided it; parts whose metadata says anything
    else than ``metadata`` are those of another model and left out. Raises ``UserError`` as ``read_score_file``."""
    rows: dict[int, tuple[Any, ...]] = {}
    whole = dict(metadata)
    for part in parts:
        found = read_metadata(part) or {}
        if found.items() >= metadata.items():
            places = map(int, found.pop(ROWS, "").split())
            rows |= dict(zip(places, read_score_file(part).rows(), strict=True))
            whole = {name: value for name, value in found.items() if not name.startswith("ARROW:")}
    keys, languages, log_probs, labels, apart, categories = (
        map(list, zip(*(rows[place] for place in sorted(rows)), strict=True)) if rows else ([] for _ in range(6))
    )
    write_scores(path, Scores(keys, languages, log_probs, labels, apart, categories), whole)


def read_metadata(path: Path) -> dict[str, str] | None:
    """What ``write_scores`` was told about a file, or None if there is no readable file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():  # nor a pipe, which would never end
        return None
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    return {key.decode(): value.decode() for key, value in metadata.items()}


def read_verified(directory: Path, manifest: Manifest, name: str) -> Scores:
    """Read one file of a complete score directory. Raises ``UserError`` if it is not what the manifest lists."""
    verify_file(directory, manifest, name)
    return read_score_file(directory / name)


def read_score_file(path: Path) -> Scores:
    """Read one file. Raises ``UserError`` if it is missing, broken or lacks a column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    remedy = "delete its directory and run `alsace score` again"
    try:
        check_regular(path, remedy)
    except FileNotFoundError:
        raise UserError(f"{path}: not a score file (no such file); {remedy}") from None
    try:
        names = {*NEEDED, *pq.read_schema(path).names}
        table = pq.read_table(path, columns=_schema(names).names)
        if wrong := next((column for column in table.schema if not _is_of_kind(column)), None):
            raise ValueError(f"column {wrong.name} holds {wrong.type}")
        table = table.cast(_schema(names))
    except PermissionError:
        raise  # the file is not broken, and the operating system's message names path and reason
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(f"{path}: not a score file ({' '.join(str(error).split())}); {remedy}") from None
    if bad := next((name for name in ("key", "language", "log_probs") if table.column(name).null_count), None):
        raise UserError(f"{path}: column {bad} has holes; {remedy}")
    column = table.column("log_probs").combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False)
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    _check_values(path, values, lengths, remedy)
    rows = np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []
    keys, languages = table.column("key").to_pylist(), table.column("language").to_pylist()
    _check_names(path, keys, languages, remedy)
    found = {name: table.column(name).to_pylist() for name in table.column_names if name not in NEEDED}
    labels = table.column("label").to_pylist()
    if "labels" in found:
        labels = [tuple(many) if many else one for one, many in zip(labels, found["labels"], strict=True)]
    return Scores(keys, languages, rows, labels, found.get("apart", []), found.get("category", []))


def check_rows(path: Path, num_examples: Mapping[str, int]) -> None:
    """Raises ``UserError`` if a shard's file has not every row once. ``num_examples``: of the shard, by language."""
    scores = read_score_file(path)
    if dict(Counter(scores.languages)) != {language: count for language, count in num_examples.items() if count}:
        raise UserError(f"{path}: rows are missing or too many; delete it and score again")


def _check_names(path: Path, keys: list[str], languages: list[str], remedy: str) -> None:
    """Raises ``UserError`` if a row has an empty name or is there twice."""
    seen = set()
    for place in zip(keys, languages, strict=True):
        problem = "is there twice" if place in seen else "a name is empty" if not all(place) else ""
        if problem:
            raise UserError(f"{path}: group {place[0]!r}, language {place[1]!r}: {problem}; {remedy}")
        seen.add(place)


def _check_values(path: Path, values: np.ndarray, lengths: np.ndarray, remedy: str) -> None:
    """Raises ``UserError`` if rows are no log-probabilities over two candidates or more.

    Numbers that are not finite pass: they are a model's, not a file's fault, and the stages say so.
    """
    if len(lengths) == 0:
        return
    if lengths.min() < 2:
        raise UserError(f"{path}: row {int(lengths.argmin())} has fewer than two candidates; {remedy}")
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    with np.errstate(over="ignore", invalid="ignore"):
        sums = np.add.reduceat(np.exp(values.astype(np.float64)), starts)
    wrong = np.isfinite(sums) & (np.abs(sums - 1) > 1e-3)
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(f"{path}: row {row}: its probabilities add up to {sums[row]:.3g}, not to 1; {remedy}")


def _check_counts(directory: Path, manifest: Manifest, whole: Scores) -> None:
    """Hold all rows of a directory against what its manifest says of them. Raises ``UserError``."""
    remedy = "delete the directory and run `alsace score` again"
    num_rows, languages = manifest.details.get("num_examples"), manifest.details.get("texts")
    if num_rows not in (None, len(whole.keys)):
        raise UserError(f"{directory}: has {len(whole.keys)} rows, and {MANIFEST} says {num_rows}; {remedy}")
    if isinstance(languages, dict) and (unknown := sorted(set(whole.languages) ^ languages.keys())):
        raise UserError(f"{directory}: its rows and {MANIFEST} differ in the language {unknown[0]!r}; {remedy}")


def _check_groups(directory: Path, whole: Scores, num_candidates: int | None) -> None:
    """Raises ``UserError`` if rows have another number of candidates than the task, or a group two labels."""
    label_of: dict[str, Label] = {}
    apart = whole.apart or [False] * len(whole.keys)
    rows = zip(whole.keys, whole.languages, whole.log_probs, whole.labels, apart, strict=True)
    for key, language, log_probs, label, is_apart in rows:
        where = f"{directory}: group {key!r}, language {language!r}"
        if num_candidates is not None and len(log_probs) != num_candidates:
            raise UserError(
                f"{where}: has scores of {len(log_probs)} candidates, and the task has {num_candidates}; delete the "
                "directory and run `alsace score` again"
            )
        if label is not None and not is_apart and label_of.setdefault(key, label) != label:
            raise UserError(
                f"{where}: has the label {label}, where another language has {label_of[key]}; delete the directory and "
                "run `alsace score` again"
            )


def read_scores(directory: Path, num_groups: int | None = None, num_candidates: int | None = None) -> Scores:
    """Rows of a complete score directory, in the order of its shards.

    ``num_groups``: read whole shards until there are this many groups; None: all. ``num_candidates``: of the task; None
    if groups bring their own. Raises ``UserError`` if there are fewer groups, or the rows are not those of such a task.
    """
    manifest: Manifest = load_manifest(directory, KIND)
    apart: list[bool] = []
    categories: list[str] = []
    whole = Scores([], [], [], [], apart, categories)
    keys: set[str] = set()
    for name in sorted(manifest.files):
        if num_groups is not None and len(keys) >= num_groups:
            break
        part = read_verified(directory, manifest, name)
        keys.update(part.keys)
        whole.keys.extend(part.keys)
        whole.languages.extend(part.languages)
        whole.log_probs.extend(part.log_probs)
        whole.labels.extend(part.labels)
        apart.extend(part.apart or [False] * len(part.keys))
        categories.extend(part.categories or [""] * len(part.keys))
    pairs = list(zip(whole.keys, whole.languages, strict=True))
    if len(set(pairs)) != len(pairs):
        key, language = Counter(pairs).most_common(1)[0][0]
        place = f"{directory}: group {key!r}, language {language!r}"
        raise UserError(f"{place}: is there twice; delete the directory and run `alsace score` again")
    _check_groups(directory, whole, num_candidates)
    if num_groups is None:
        _check_counts(directory, manifest, whole)
    if num_groups is not None and len(keys) < num_groups:
        raise UserError(f"select.num_groups: {num_groups} asked for, {directory} has {len(keys)}; lower it")
    return whole
