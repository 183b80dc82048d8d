"""Tables in long form, a row per group and language: CSV and Parquet; and the columns of any table."""

import csv
import fnmatch
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from alsace_dist.config import InputConfig, TaskConfig
from alsace_dist.data.records import (
    BadRecords,
    Place,
    RecordRow,
    input_files,
    is_unicode,
    key_of,
    open_bytes,
    whole,
)
from alsace_dist.errors import UserError

Cells = dict[str, Any]
ROW_NUMBER = "\0row number"  # no column has this name


def read_tables(one: InputConfig, task: TaskConfig, bad: BadRecords) -> Iterator[RecordRow]:
    """Rows of Parquet, CSV and TSV files in long form; the rows of a group may stand in several files of one input.

    A path with ``{language}`` in it names a file per language, which then needs no column for it.
    """
    for path in input_files(one):
        language = language_of_file(one.path, path)
        name = path.name.lower().removesuffix(".gz")
        if name.endswith(".parquet"):
            rows = _read_parquet(path, one, task, language is None)
        elif name.endswith((".csv", ".tsv")):
            rows = _read_csv(path, one, task, bad, "\t" if name.endswith(".tsv") else ",", language is None)
        else:
            raise UserError(
                f"{path}: kind table reads .parquet, .csv and .tsv (.gz, too); convert it or correct the path"
            )
        for place, cells in rows:
            named = cells[one.columns.language] if language is None else language
            yield row_of_cells(place, cells, one, task, named)


def language_of_file(pattern: str, path: Path) -> str | None:
    """What stands in a file's name where the pattern says ``{language}``; None if it does not."""
    if "{language}" not in pattern:
        return None
    first, *others = (fnmatch.translate(part)[4:-3] for part in str(Path(pattern)).split("{language}"))
    match = re.fullmatch(first + "(?P<language>[^/]+?)" + "(?P=language)".join(others), str(path))
    return match["language"] if match else None


def _read_csv(
    path: Path, one: InputConfig, task: TaskConfig, bad: BadRecords, delimiter: str, with_language: bool
) -> Iterator[tuple[Place, Cells]]:
    with open_bytes(path) as file:
        # Bytes that are not UTF-8 become lone surrogates, which the checks of texts report with their line.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        csv.field_size_limit(2**31 - 1)  # the default refuses texts of over 131,072 characters
        lines: list[str] = []  # the lines that the current row was read from

        def remembered() -> Iterator[str]:
            for line in text:
                lines.append(line)
                yield line

        reader = csv.reader(remembered(), strict=True, delimiter=delimiter)
        header = next(reader, [])
        if not header:
            raise UserError(f"{path}: holds nothing; restore the file, or remove it from data.inputs")
        _check_header(path, header, delimiter)
        with_id = one.columns.id is not None
        wanted_columns(str(path), header, one, task, with_language=with_language, with_id=with_id)

        def note_key(values: list[str]) -> None:
            number = header.index(one.columns.id) if one.columns.id is not None else len(values)
            if number < len(values) and (key := key_of(whole(values[number]))):
                bad.broken_keys.add(key)

        number = 0
        while True:
            lines.clear()
            place = Place(str(path), reader.line_num + 1)
            number += 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end" in str(error):
                    bad.add(place, "open quote", "never closed; it takes in all that follows")
                else:
                    bad.add(place, "broken row", str(error))
                    note_key(next(csv.reader(lines, delimiter=delimiter)))
                continue
            if any(len(line.rstrip("\r\n").split(delimiter)) == len(header) > 1 for line in lines[1:-1] or lines[1:]):
                bad.add(
                    place, "open quote", f"takes in {len(lines) - 1} lines that look like rows; double it or remove it"
                )
            elif len(values) == len(header):
                cells = dict(zip(header, values, strict=True))
                if one.columns.id is None:
                    yield place, cells | {ROW_NUMBER: str(number)}
                else:
                    yield place, cells | {one.columns.id: whole(cells[one.columns.id])}
            elif values:
                bad.add(place, "broken row", f"{len(values)} cells under {len(header)} columns")
                note_key(values)


def _check_header(path: Path, header: Sequence[str], delimiter: str) -> None:
    """Raises ``UserError`` if the cells are separated by something else, or the file is no UTF-8."""
    if any("\0" in name or "\ufffd" in name or not is_unicode(name) for name in header):
        raise UserError(f"{path}: is no UTF-8 text (UTF-16, as spreadsheets write it?); save it as UTF-8")
    other = {";": "semicolons", "\t": "tabs", ",": "commas"}
    if len(header) == 1 and (found := next((mark for mark in other if mark != delimiter and mark in header[0]), None)):
        ending = "a name that ends in .tsv" if found == "\t" else "commas, as .csv, or with tabs, as .tsv"
        raise UserError(f"{path}: its cells are separated by {other[found]}; write it with {ending}")


def _read_parquet(path: Path, one: InputConfig, task: TaskConfig, with_language: bool) -> Iterator[tuple[Place, Cells]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            with_id = one.columns.id is not None
            names = file.schema_arrow.names
            wanted = wanted_columns(str(path), names, one, task, with_language=with_language, with_id=with_id)
            for place, cells in cells_of_tables(file.iter_batches(columns=wanted), str(path)):
                yield place, cells | ({} if with_id else {ROW_NUMBER: str(place.number)})
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
    wanted |= {"id (null: row numbers)": columns.id} if with_id and columns.id is not None else {}
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
    key = key_of(cells[ROW_NUMBER if columns.id is None else columns.id])
    return RecordRow(place, key, language, label, fields)
