"""Score files: one Parquet file per shard, one row per (group, language), in shard order.

Columns: ``key``, ``language``, ``log_probs`` (list of float32, one per candidate), ``label`` (index or null). Where a
row has need of them there are also ``labels`` (list of int32: several right candidates), ``apart`` (bool: candidates
that correspond to no other language's) and ``category`` (string). While a shard is scored by several ranks, each writes
files of parts of it, whose metadata says which of the shard's rows they hold.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alsace_dist.errors import UserError
from alsace_dist.files import score_columns
from alsace_dist.files.manifest import Manifest, atomic_path, load_manifest, verify_file
from alsace_dist.files.score_columns import ScoreColumns, read_columns, schema
from alsace_dist.files.shards import Label, golds

KIND = "scores"
PART = "part-"  # after a shard's name and a point: a file of a part of it
_PART_FILE = re.compile(rf"(.+)\.{PART}\d+-of-\d+\.parquet")
ROWS = "rows"  # in the metadata of such a file: the places of its rows among the shard's
COUNTS = "counts"  # in the metadata of every file: its groups, and by language the groups that have it


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


def write_scores(path: Path, scores: Scores, metadata: dict[str, str], rows: Sequence[int] | None = None) -> None:
    """Write one shard's scores atomically; equal rows and metadata give equal bytes. ``rows``: of a part of a shard,
    the places of its rows. How many groups there are, and how many have each language, is added to the metadata."""
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
    places = set(zip(scores.keys, scores.languages, strict=True))
    languages = dict(sorted(Counter(language for _, language in places).items()))
    counts = {"groups": len(set(scores.keys)), "languages": languages}
    metadata = metadata | {COUNTS: json.dumps(counts, ensure_ascii=False)}
    metadata |= {} if rows is None else {ROWS: " ".join(map(str, rows))}
    table = pa.table(columns, schema=schema(columns)).replace_schema_metadata(metadata)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def parts_of(directory: Path) -> dict[str, list[Path]]:
    """Files of parts of shards: name of the shard -> its files. What a person has named in another way is none."""
    found: dict[str, list[Path]] = {}
    for path in sorted(directory.iterdir()):
        if (match := _PART_FILE.fullmatch(path.name)) and path.is_file():
            found.setdefault(match[1], []).append(path)
    return found


def is_part(name: str) -> bool:
    """Whether a file of this name is one of a part of a shard."""
    return _PART_FILE.fullmatch(name) is not None


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
    """What ``write_scores`` was told about a file, and its counts, or None if there is no readable file."""
    return _read_footer(path)[0]


def _read_footer(path: Path) -> tuple[dict[str, str] | None, int]:
    """The metadata of a file, and its number of rows, without reading these; None if there is no readable file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():  # nor a pipe, which would never end
        return None, 0
    try:
        footer = pq.read_metadata(path)
        metadata = footer.schema.to_arrow_schema().metadata or {}
        return {key.decode(): value.decode() for key, value in metadata.items()}, int(footer.num_rows)
    except (OSError, UnicodeDecodeError, pa.ArrowException):
        return None, 0


def read_verified(directory: Path, manifest: Manifest, name: str) -> Scores:
    """Read one file of a complete score directory. Raises ``UserError`` if it is not what the manifest lists."""
    verify_file(directory, manifest, name)
    return read_score_file(directory / name)


def read_score_file(path: Path) -> Scores:
    """Read one file. Raises ``UserError`` if it is missing, broken or lacks a column."""
    return _as_scores(read_columns(path))


def _as_scores(rows: ScoreColumns) -> Scores:
    table, num_rows = rows.table, len(rows.sizes)
    keys, languages = table.column("key").to_pylist(), table.column("language").to_pylist()
    log_probs = np.split(rows.values, np.cumsum(rows.sizes)[:-1]) if num_rows else []
    found = {name: table.column(name).to_pylist() for name in ("apart", "category") if name in table.column_names}
    return Scores(keys, languages, log_probs, rows.labels(), found.get("apart", []), found.get("category", []))


def check_rows(path: Path, num_examples: Mapping[str, int]) -> None:
    """Raises ``UserError`` if a shard's file has not every row once. ``num_examples``: of the shard, by language.

    A file is there whole or not at all, so what was counted when it was written is what it holds, and only its footer
    is read. Whoever reads the rows checks each of them. A file without counts, of version 0.1.0, is read whole.
    """
    metadata, num_rows = _read_footer(path)
    counts = _languages_in(metadata or {})
    if counts is None:
        rows = read_columns(path)
        of_rows = np.bincount(rows.language, minlength=len(rows.languages)).tolist()
        counts, num_rows = dict(zip(rows.languages, of_rows, strict=True)), len(rows.sizes)
    wanted = {language: count for language, count in num_examples.items() if count}
    if counts != wanted or num_rows != sum(wanted.values()):
        raise UserError(f"{path}: rows are missing or too many; delete it and score again")


def _languages_in(metadata: Mapping[str, str]) -> dict[str, int] | None:
    """Language -> groups that have it, by the counts in a file's metadata; None if there are none that can be read."""
    try:
        counts = json.loads(metadata.get(COUNTS, ""))
    except ValueError:
        return None
    found = counts.get("languages") if isinstance(counts, dict) else None
    return found if isinstance(found, dict) else None


def read_batches(
    directory: Path, num_groups: int | None = None, num_candidates: int | None = None
) -> Iterator[ScoreColumns]:
    """Rows of a complete score directory, a shard at a time, in the memory of one shard and 8 bytes for each group.

    Parameters and errors as of ``read_scores``; what concerns the shards together is raised behind the last of them.
    """
    return score_columns.read_batches(directory, load_manifest(directory, KIND), num_groups, num_candidates)


def read_scores(directory: Path, num_groups: int | None = None, num_candidates: int | None = None) -> Scores:
    """Rows of a complete score directory, in the order of its shards: some hundred bytes of memory for each of them.

    ``num_groups``: read whole shards until there are this many groups; None: all. ``num_candidates``: of the task; None
    if groups bring their own. Raises ``UserError`` if there are fewer groups, or the rows are not those of such a task.
    """
    whole = Scores([], [], [], [], [], [])
    for rows in read_batches(directory, num_groups, num_candidates):
        part = _as_scores(rows)
        whole.keys.extend(part.keys)
        whole.languages.extend(part.languages)
        whole.log_probs.extend(part.log_probs)
        whole.labels.extend(part.labels)
        whole.apart.extend(part.apart or [False] * len(part.keys))
        whole.categories.extend(part.categories or [""] * len(part.keys))
    return whole
