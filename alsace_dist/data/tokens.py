"""Encoded rows in files: what a training reads is tokenised once, and then mapped into memory.

One Arrow file per shard, a row per encoded row, in the order of ``rows_of``. Columns: ``key``, ``language``,
``category`` (strings), ``label`` (int or null) or ``labels`` (list of int32: several right candidates), ``input_ids``
and ``context_free_ids`` (lists of int32), ``candidates`` (list of lists of int32; null where they are the language's
fixed answers), ``num_unknown`` (int32), ``is_cut`` and ``is_apart`` (bool).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from alsace_dist.data.rows import Candidates, EncodedRow
from alsace_dist.data.stream import Lazily
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import atomic_path
from alsace_dist.files.shards import Label


@lru_cache
def _schema() -> Any:
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    kinds = {"key": pa.string(), "language": pa.string(), "category": pa.string(), "label": pa.int32(), "labels": ids}
    kinds |= {"input_ids": ids, "context_free_ids": ids, "candidates": pa.list_(ids)}
    kinds |= {"num_unknown": pa.int32(), "is_cut": pa.bool_(), "is_apart": pa.bool_()}
    return pa.schema(list(kinds.items()))


def write_tokens(path: Path, rows: Sequence[EncodedRow], are_fixed: bool, metadata: dict[str, str]) -> None:
    """Write the rows of one shard atomically; equal rows and metadata give equal bytes. ``are_fixed``: whether the
    candidates are those of the language, which are not written."""
    import pyarrow as pa

    columns = {
        "key": [row.key for row in rows],
        "language": [row.language for row in rows],
        "category": [row.category for row in rows],
        "label": [None if isinstance(row.label, tuple) else row.label for row in rows],
        "labels": [list(row.label) if isinstance(row.label, tuple) else None for row in rows],
        "input_ids": [row.input_ids for row in rows],
        "context_free_ids": [row.context_free_ids for row in rows],
        "candidates": [None if are_fixed else row.candidates.tokens for row in rows],
        "num_unknown": [row.num_unknown for row in rows],
        "is_cut": [row.is_cut for row in rows],
        "is_apart": [row.is_apart for row in rows],
    }
    table = pa.table(columns, schema=_schema()).combine_chunks().replace_schema_metadata(metadata)
    with atomic_path(path) as temporary, pa.ipc.new_file(str(temporary), table.schema) as writer:
        writer.write_table(table)


def read_metadata(path: Path) -> dict[str, str]:
    """What ``write_tokens`` was told about a file; nothing if there is no readable one."""
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as file:
            metadata = pa.ipc.open_file(file).schema.metadata or {}
    except (OSError, pa.ArrowException):
        return {}
    return {key.decode(): value.decode() for key, value in metadata.items()}


class TokenRows(Lazily[EncodedRow]):
    """The rows of a file of ``write_tokens``, each made when it is asked for."""

    def __init__(self, path: Path, candidates_of: Callable[[str], Candidates]) -> None:
        """``candidates_of``: the fixed answers of a language, for rows without candidates of their own.

        Raises ``UserError`` if the file is not one of these.
        """
        import pyarrow as pa

        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            if not table.schema.equals(_schema()):
                raise ValueError("other columns")
        except (OSError, pa.ArrowException, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not a file of tokens ({reason}); delete {path.parent} and start again") from None
        self._candidates_of = candidates_of
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        self.keys: list[str] = columns["key"].to_pylist()
        self.languages: list[str] = columns["language"].to_pylist()
        self._category: list[str] = columns["category"].to_pylist()
        self._label: list[int | None] = columns["label"].to_pylist()
        self._is_apart: list[bool] = columns["is_apart"].to_pylist()
        self._is_cut, self._num_unknown = columns["is_cut"], columns["num_unknown"]
        self._labels, self._candidates = columns["labels"], columns["candidates"]
        self._input_ids, self._context_free_ids = _Lists(columns["input_ids"]), _Lists(columns["context_free_ids"])
        super().__init__(len(self.keys), self._row)

    def _row(self, index: int) -> EncodedRow:
        own = self._candidates[index].as_py()
        language = self.languages[index]
        return EncodedRow(
            self.keys[index],
            language,
            self._label_of(index),
            self._input_ids[index],
            self._candidates_of(language) if own is None else Candidates(tuple(map(tuple, own))),
            self._num_unknown[index].as_py(),
            self._is_cut[index].as_py(),
            self._is_apart[index],
            self._category[index],
            tuple(self._context_free_ids[index]),
        )

    def _label_of(self, index: int) -> Label:
        several = self._labels[index].as_py()
        return self._label[index] if several is None else tuple(several)

    def places(self) -> Iterator[tuple[str, str, int]]:
        """Key, language and number of candidates of the rows whose candidates correspond, without making the rows."""
        sizes = self._candidates.value_lengths().to_pylist()
        for key, language, size, is_apart in zip(self.keys, self.languages, sizes, self._is_apart, strict=True):
            if not is_apart:
                yield key, language, len(self._candidates_of(language)) if size is None else size

    def groups(self) -> list[slice]:
        """Where the rows of each group are."""
        starts = [index for index, key in enumerate(self.keys) if index == 0 or key != self.keys[index - 1]]
        return [slice(start, end) for start, end in pairwise([*starts, len(self)])]


class _Lists:
    """A column of lists of int32 as two arrays: the values of all lists, and where each begins."""

    def __init__(self, column: Any) -> None:
        self._starts: np.ndarray = column.offsets.to_numpy()
        self._values: np.ndarray = column.values.to_numpy()

    def __getitem__(self, index: int) -> list[int]:
        found: list[int] = self._values[self._starts[index] : self._starts[index + 1]].tolist()
        return found
