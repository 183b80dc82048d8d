"""Tables: CSV, TSV and Parquet, with a row per group and language, in one file or a file per language."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alsace_dist.config import InputConfig, TaskConfig
from alsace_dist.data.columns import (
    Cells,
    FileRow,
    Numbering,
    check_languages,
    records_of,
    rows_between,
    wanted_columns,
)
from alsace_dist.data.records import (
    BLANK,
    OPEN_QUOTE,
    ROW_COUNT,
    BadRecords,
    Place,
    RecordRow,
    input_files,
    is_unicode,
    key_of,
    language_of_file,
    open_bytes,
    whole,
)
from alsace_dist.errors import UserError


def read_tables(
    one: InputConfig, task: TaskConfig, bad: BadRecords, numbering: Numbering, language: str | None = None
) -> Iterator[RecordRow]:
    """Rows of Parquet, CSV and TSV files; the rows of a group may stand in several files of one input.

    A path with ``{language}`` in it names a file per language, which then needs no column for it. Rows without ids are
    numbered through the files of each language. ``language``: of all rows, if neither files nor columns say it.
    ``numbering``: counts them; whoever gives it compares the languages.

    Raises ``UserError`` if a language's files hold no rows.
    """
    languages: dict[str, Path] = {}
    for path in input_files(one):
        if named := language or language_of_file(one.located(), path):
            languages.setdefault(named, path)
        name = path.name.lower().removesuffix(".gz")
        if name.endswith(".parquet"):
            rows = _read_parquet(path, one, task, named is None)
        elif name.endswith((".csv", ".tsv")):
            rows = _read_csv(path, one, task, bad, named is None)
        else:
            raise UserError(
                f"{path}: kind table reads .parquet, .csv and .tsv (.gz, too); convert it or correct the path"
            )
        yield from records_of(rows, one, task, named, numbering, bad)
    check_languages(languages, numbering)


# --- CSV and TSV ---------------------------------------------------------------------------------------------------


UNREADABLE = (ValueError, OverflowError)  # what Arrow raises of values: dates beyond Python's, text that is no UTF-8


LONE_CR = "ends with a lone carriage return where others do not, or they do: is it a row, or within a text?"


class _Line(NamedTuple):
    """A row's cells as text, the lines that it was read from, and what the csv module has against it."""

    place: Place
    values: list[str]
    lines: Sequence[str]
    problem: str = ""


def delimiter_of(path: Path) -> str:
    """What separates the cells of a file of this name."""
    return "\t" if path.name.lower().removesuffix(".gz").endswith(".tsv") else ","


def _read_csv(
    path: Path, one: InputConfig, task: TaskConfig, bad: BadRecords, with_language: bool
) -> Iterator[FileRow]:
    delimiter = delimiter_of(path)
    quoting = find_quoting(path, delimiter) if one.quoting == "auto" else one.quoting
    every_line = (_quoted_lines if quoting == "csv" else _plain_lines)(path, delimiter)
    lines = rows_between(every_line, lambda line: not line.values and not line.problem, one.columns.id is None)
    header = one.header or next(lines, _Line(Place(str(path), 1), [], ())).values
    if not header:
        raise UserError(f"{path}: holds nothing; restore the file, or remove it from data.inputs")
    _check_header(path, header, delimiter)
    wanted_columns(str(path), header, one, task, with_language, one.columns.id is not None)
    id_at = None if one.columns.id is None else header.index(one.columns.id)
    for line in lines:
        if problem := _problem(line, header, delimiter, one, task.labels):
            bad.add(line.place, *problem)
            # Of a row over several lines, each may be the row of another group, which has lost a language with it.
            swallowed = [text.rstrip("\r\n").split(delimiter) for text in line.lines[1:]]
            for values in [line.values, *(swallowed if id_at is not None else [])]:
                known = id_at is not None and id_at < len(values)
                yield FileRow(line.place, None, key_of(whole(values[id_at])) if known and id_at is not None else None)
            continue
        cells: Cells = dict(zip(header, line.values, strict=True))
        if one.columns.id is not None:
            cells[one.columns.id] = whole(cells[one.columns.id])
        yield FileRow(line.place, cells)


def _problem(
    line: _Line, header: Sequence[str], delimiter: str, one: InputConfig, labels: Sequence[str]
) -> tuple[str, str] | None:
    """What is wrong with a row as such: kind and detail; None for a good one."""
    can_be_letter = one.kind == "table" and delimiter == "\t"  # and a person can say so
    hint = "; if a quote is a letter here, set quoting: none" if can_be_letter else ""
    if not line.values and not line.problem:
        return "broken row", BLANK
    if "unexpected end" in line.problem:
        return OPEN_QUOTE, f"never closed; it takes in all that follows{hint}"
    if line.problem == LONE_CR and one.columns.id is None:
        return ROW_COUNT, LONE_CR
    if line.problem:
        return "broken row", line.problem.replace("\t", "\\t") + hint
    inner = line.lines[1:-1] or line.lines[1:]
    if any(_looks_like_a_row(text, line.values, header, delimiter, one, labels) for text in inner):
        return OPEN_QUOTE, f"takes in lines that look like rows; double it or remove it{hint}"
    if len(line.values) != len(header):
        return "broken row", f"{len(line.values)} cells under {len(header)} columns"
    return None


def _looks_like_a_row(
    text: str, values: Sequence[str], header: Sequence[str], delimiter: str, one: InputConfig, labels: Sequence[str]
) -> bool:
    """Whether a line within a quoted cell has a cell for every column, a label where labels stand, and a number for an
    id where the row has one. ``values``: of the row."""
    cells = text.rstrip("\r\n").split(delimiter)
    if not len(cells) == len(header) > 1:
        return False
    id_at = header.index(one.columns.id) if one.columns.id in header else len(values)
    if id_at < len(values) and values[id_at].strip().isdecimal() and not cells[id_at].strip().isdecimal():
        return False
    return one.columns.label not in header or cells[header.index(one.columns.label)].strip() in ("", *labels)


def _quoted_lines(path: Path, delimiter: str) -> Iterator[_Line]:
    """Rows whose cells may be enclosed in quotes and then hold anything; a blank line has no values."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of over 131,072 characters
    lines: list[str] = []  # the lines that the current row was read from
    end = ""  # of the first row
    with open_bytes(path) as file:
        # Bytes that are not UTF-8 become lone surrogates, which the checks of texts report with their line.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")

        def remembered() -> Iterator[str]:
            for line in text:
                lines.append(line)
                yield line

        reader = csv.reader(remembered(), strict=True, delimiter=delimiter)
        while True:
            lines.clear()
            place = Place(str(path), reader.line_num + 1)
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield _Line(place, next(csv.reader(lines, delimiter=delimiter), []), tuple(lines), str(error))
                continue
            own = next((mark for mark in ("\r\n", "\n", "\r") if lines[-1].endswith(mark)), end)
            end = end or own
            yield _Line(place, values, tuple(lines), LONE_CR if (own == "\r") != (end == "\r") else "")


def _plain_lines(path: Path, delimiter: str) -> Iterator[_Line]:
    """Rows of files in which a quote is a letter and a row a line, ended by LF or CRLF alone; a blank one
    has no values."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")
            text = text.removeprefix("\ufeff") if number == 1 else text
            yield _Line(Place(str(path), number), text.split(delimiter) if text.strip(" ") else [], ())


def find_quoting(path: Path, delimiter: str) -> str:
    """What quotes mean in a file, "csv" or "none", as most of its cells that hold one tell.

    A writer of CSV encloses every cell that holds a quote and doubles the quote; a cell with a quote that is not so
    speaks for letters.
    """
    votes = {"csv": 0, "none": 0}
    for line in _plain_lines(path, delimiter):
        for cell in (value for value in line.values if '"' in value):
            inner = cell[1:-1]
            if len(cell) < 2 or cell[0] + cell[-1] != '""' or '"' in inner.replace('""', ""):
                votes["none"] += 1
            elif '"' in inner or line.place.number == 1:
                votes["csv"] += 1
    return "csv" if votes["csv"] > votes["none"] else "none"


def _check_header(path: Path, header: Sequence[str], delimiter: str) -> None:
    """Raises ``UserError`` if the cells are separated by something else, or the file is no UTF-8."""
    if any("\0" in name or "\ufffd" in name or not is_unicode(name) for name in header):
        raise UserError(f"{path}: is no UTF-8 text (UTF-16, as spreadsheets write it?); save it as UTF-8")
    if any("\r" in name for name in header):
        raise UserError(f"{path}: its lines end with carriage returns alone; save it with line feeds")
    other = {";": "semicolons", "\t": "tabs", ",": "commas"}
    if len(header) == 1 and (found := next((mark for mark in other if mark != delimiter and mark in header[0]), None)):
        ending = "a name that ends in .tsv" if found == "\t" else "commas, as .csv, or with tabs, as .tsv"
        raise UserError(f"{path}: its cells are separated by {other[found]}; write it with {ending}")


# --- Parquet -------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, one: InputConfig, task: TaskConfig, with_language: bool) -> Iterator[FileRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            wanted = wanted_columns(str(path), schema.names, one, task, with_language, one.columns.id is not None)
            names = _class_names(schema.metadata or {}, one.columns.label)
            for place, cells in cells_of_tables(file.iter_batches(columns=wanted), str(path)):
                if one.columns.label is not None and set(names) & set(task.labels):
                    cells[one.columns.label] = _class_name(cells[one.columns.label], names)
                yield FileRow(place, cells)
    except (*UNREADABLE, OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path}: cannot be read as Parquet ({' '.join(str(error).split())}); restore the file"
        ) from None


def _class_names(metadata: dict[bytes, bytes], column: str | None) -> list[str]:
    """The names of a numbered class column, which ``datasets`` writes into the schema; empty if there are none."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _class_name(number: Any, names: Sequence[str]) -> Any:
    """The name of a numbered class, or the number if it has none; -1 means no label, by custom."""
    if not isinstance(number, int) or number >= len(names):
        return number
    return names[number] if number >= 0 else None


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
