"""Score files: one Parquet file per shard, one row per (group, language), in shard order.

Columns: ``key``, ``language``, ``log_probs`` (list of float32, one per candidate), ``label`` (index or null).
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alsace_dist.errors import UserError
from alsace_dist.files.manifest import Manifest, atomic_path, load_manifest, verify_file
from alsace_dist.reading import check_regular

KIND = "scores"


@dataclass(frozen=True)
class Scores:
    """Rows of scores. ``log_probs[i]``: float32 [K_i], normalised over the K_i candidates of row i."""

    keys: list[str]
    languages: list[str]
    log_probs: list[np.ndarray]
    labels: list[int | None]

    def groups(self) -> dict[str, dict[str, np.ndarray]]:
        """key -> language -> log-probabilities, keys in row order."""
        grouped: dict[str, dict[str, np.ndarray]] = {}
        for key, language, row in zip(self.keys, self.languages, self.log_probs, strict=True):
            grouped.setdefault(key, {})[language] = row
        return grouped


def _schema() -> Any:
    import pyarrow as pa

    kinds = {"key": pa.string(), "language": pa.string(), "log_probs": pa.list_(pa.float32()), "label": pa.int32()}
    return pa.schema(kinds.items())


def write_scores(path: Path, scores: Scores, metadata: dict[str, str]) -> None:
    """Write one shard's scores atomically; equal rows and metadata give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "key": scores.keys,
            "language": scores.languages,
            "log_probs": [row.tolist() for row in scores.log_probs],
            "label": scores.labels,
        },
        schema=_schema(),
    ).replace_schema_metadata(metadata)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


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
        table = pq.read_table(path, columns=_schema().names).cast(_schema())
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
    return Scores(
        table.column("key").to_pylist(), table.column("language").to_pylist(), rows, table.column("label").to_pylist()
    )


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


def read_scores(directory: Path, num_groups: int | None = None) -> Scores:
    """Rows of a complete score directory, in the order of its shards.

    ``num_groups``: read whole shards until there are this many groups; None: all. Raises ``UserError`` if there are
    fewer.
    """
    manifest: Manifest = load_manifest(directory, KIND)
    whole = Scores([], [], [], [])
    for name in sorted(manifest.files):
        if num_groups is not None and len(set(whole.keys)) >= num_groups:
            break
        part = read_verified(directory, manifest, name)
        whole.keys.extend(part.keys)
        whole.languages.extend(part.languages)
        whole.log_probs.extend(part.log_probs)
        whole.labels.extend(part.labels)
    pairs = list(zip(whole.keys, whole.languages, strict=True))
    if len(set(pairs)) != len(pairs):
        key, language = Counter(pairs).most_common(1)[0][0]
        place = f"{directory}: group {key!r}, language {language!r}"
        raise UserError(f"{place}: is there twice; delete the directory and run `alsace score` again")
    if num_groups is not None and len(set(whole.keys)) < num_groups:
        raise UserError(f"select.num_groups: {num_groups} asked for, {directory} has {len(set(whole.keys))}; lower it")
    return whole
