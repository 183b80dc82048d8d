"""Tables in long form, a row per group and language: CSV and Parquet; and the columns of any table."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from alsace_dist.config import InputConfig, TaskConfig
from alsace_dist.data.records import BadRecords, Place, RecordRow, input_files, key_of, open_bytes, whole
from alsace_dist.errors import UserError

Cells = dict[str, Any]


def read_tables(one: InputConfig, task: TaskConfig, bad: BadRecords) -> Iterator[RecordRow]:
    """Rows of Parquet and CSV files in long form; the rows of a group may stand in several files of one input."""
    for path in input_files(one):
        if path.suffix == ".parquet":
            rows = _read_parquet(path, one, task)
        elif path.name.endswith((".csv", ".csv.gz")):
            rows = _read_csv(path, one, task, bad)
        else:
            raise UserError(f"{path}: kind table reads .parquet, .csv and .csv.gz; convert it or correct the path")
        for place, cells in rows:
            yield row_of_cells(place, cells, one, task, cells[one.columns.language])


def _read_csv(path: Path, one: InputConfig, task: TaskConfig, bad: BadRecords) -> Iterator[tuple[Place, Cells]]:
    with open_bytes(path) as file:
        # Bytes that are not UTF-8 become lone surrogates, which the checks of texts report with their line.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        csv.field_size_limit(2**31 - 1)  # the default refuses texts of over 131,072 characters
        lines: list[str] = []  # the lines that the current row was read from

        def remembered() -> Iterator[str]:
            for line in text:
                lines.append(line)
                yield line

        reader = csv.reader(remembered(), strict=True)
        header = next(reader, [])
        if not header:
            raise UserError(f"{path}: holds nothing; restore the file, or remove it from data.inputs")
        wanted_columns(str(path), header, one, task, with_language=True)

        def note_key(values: list[str]) -> None:
            number = header.index(one.columns.id)
            if number < len(values) and (key := key_of(whole(values[number]))):
                bad.broken_keys.add(key)

        while True:
            lines.clear()
            place = Place(str(path), reader.line_num + 1)
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end" in str(error):
                    bad.add(place, "open quote", "never closed; it takes in all that follows")
                else:
                    bad.add(place, "broken row", str(error))
                    note_key(next(csv.reader(lines)))
                continue
            if len(values) == len(header):
                cells = dict(zip(header, values, strict=True))
                yield place, cells | {one.columns.id: whole(cells[one.columns.id])}
            elif values:
                bad.add(place, "broken row", f"{len(values)} cells under {len(header)} columns")
                note_key(values)


def _read_parquet(path: Path, one: InputConfig, task: TaskConfig) -> Iterator[tuple[Place, Cells]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = wanted_columns(str(path), file.schema_arrow.names, one, task, with_language=True)
            yield from cells_of_tables(file.iter_batches(columns=wanted), str(path))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path}: cannot be read as Parquet ({' '.join(str(error).split())}); restore the file"
        ) from None


def cells_of_tables(tables: Iterable[Any], name: str) -> Iterator[tuple[Place, Cells]]:
    """Rows of Arrow tables or record batches, numbered from 1."""
    number = 0
    for table in tables:
        columns = [_plain_values(table.column(name)) for name in table.schema.names]
        for values in zip(*columns, strict=True):
            number += 1
            yield Place(name, number, "row "), dict(zip(table.schema.names, values, strict=True))


def _plain_values(column: Any) -> list[Any]:
    """Python values of an Arrow column. Arrow does not check UTF-8: a broken text gets lone surrogates, as in CSV."""
    import pyarrow

    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind):
        values = column.cast(pyarrow.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in values]
    return [None if value != value else value for value in column.to_pylist()]  # pandas writes NaN for a gap


def wanted_columns(
    where: str, found: Sequence[str], one: InputConfig, task: TaskConfig, with_language: bool, with_id: bool = True
) -> list[str]:
    """The columns to read. Raises ``UserError`` if one is missing or ambiguous."""
    columns = one.columns
    wanted = {f"fields.{field}": columns.fields.get(field, field) for field in task.fields}
    wanted |= {"id": columns.id} if with_id else {}
    wanted |= {"language": columns.language} if with_language else {}
    wanted |= {"label (null: no labels)": columns.label} if columns.label is not None else {}
    for option, name in wanted.items():
        if found.count(name) != 1:
            problem = f"{'more than one' if name in found else 'no'} column {name!r} among {', '.join(found)}"
            raise UserError(f"{where}: {problem}; set data.inputs.columns.{option}")
    return list(dict.fromkeys(wanted.values()))


def row_of_cells(place: Place, cells: Cells, one: InputConfig, task: TaskConfig, language: Any) -> RecordRow:
    columns = one.columns
    label = None if columns.label is None or cells[columns.label] == "" else cells[columns.label]
    fields = {field: cells[columns.fields.get(field, field)] for field in task.fields}
    return RecordRow(place, key_of(cells[columns.id]), language, label, fields)
