"""Sources of parallel groups: JSONL, CSV, Parquet, Hugging Face datasets and the demo corpus, all as rows.

Rows are unchecked (``prepare`` checks them); only what hides the rows themselves is reported here.
"""

import csv
import glob
import gzip
import io
import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import rich.progress
from rich.console import Console

from alsace_dist.config import Config, InputConfig, TaskConfig
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import write_text

BAD_RECORDS = "bad-records.txt"
MAX_PRINTED = 50
_WHOLE_FLOAT = re.compile(r"(0|-?[1-9][0-9]*)\.0")
OPEN_QUOTE = "open quote"

Cells = dict[str, Any]


class Place(NamedTuple):
    """Where a record stands: a line of a text file, or a row of a table; both count from 1."""

    source: str
    number: int
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.unit}{self.number}"


class Row(NamedTuple):
    """One language of a group as the source spells it, unchecked. ``key`` is None if the source gives no id."""

    place: Place
    key: str | None
    language: Any
    label: Any
    fields: Any


class BadRecords:
    """Collects everything that is wrong with the inputs, for a person to mend in one go."""

    def __init__(self) -> None:
        self.problems: list[tuple[Place, str, str]] = []
        self.broken_keys: set[str] = set()  # ids of groups of which a row could not be read

    def add(self, place: Place, kind: str, detail: str) -> None:
        """Note a problem: where, of which kind, and what exactly."""
        self.problems.append((place, kind, detail))

    def counts(self) -> dict[str, int]:
        """Kind -> number of bad records (lines, or rows of a table) of that kind."""
        return dict(sorted(Counter(kind for _, kind in {(place, kind) for place, kind, _ in self.problems}).items()))

    def settle(self, path: Path, skip: bool) -> None:
        """Write the whole list to ``path``, print its beginning, and unless ``skip`` raise ``UserError``."""
        if not self.problems:
            path.unlink(missing_ok=True)  # the list of an earlier try would mislead
            return
        lines = [f"{place}: {kind}: {detail}" for place, kind, detail in sorted(self.problems, key=lambda row: row[0])]
        write_text(path, "\n".join(lines) + "\n")
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.counts().items())
        can_skip = OPEN_QUOTE not in self.counts()  # it hides an unknown number of rows, and of which groups
        if skip and can_skip:
            print(f"bad records left out: {kinds} (listed in {path})", file=sys.stderr)
            return
        print("\n".join(lines[:MAX_PRINTED]), file=sys.stderr)
        if len(lines) > MAX_PRINTED:
            print(f"... and {len(lines) - MAX_PRINTED} more of {len(lines)}", file=sys.stderr)
        remedy = "or use --data.on_bad=skip" if can_skip else f"of which an {OPEN_QUOTE} cannot be skipped"
        raise UserError(f"data.inputs: bad records ({kinds}); mend those listed in {path}, {remedy}")


def read_groups(source: InputConfig, config: Config, bad: BadRecords) -> Iterator[list[Row]]:
    """The groups of one input, each as its rows (at least one)."""
    if source.kind == "demo":
        for number, record in enumerate(generate_demo(source, config.seed), start=1):
            yield from _rows_of_record(record, Place("demo", number, "group "), bad)
    elif source.kind == "jsonl":
        for path in source_files(source):
            yield from _read_jsonl(path, bad)
    else:
        table = source.kind == "table"
        rows = _read_tables(source, config.task, bad) if table else _read_huggingface(source, config.task)
        groups: dict[Any, list[Row]] = {}
        for row in rows:
            groups.setdefault(row.place if row.key is None else row.key, []).append(row)
        yield from groups.values()


def generate_demo(source: InputConfig, seed: int) -> Iterator[dict[str, Any]]:
    from alsace_dist.tasks import demo as demo_corpus

    try:
        return demo_corpus.generate_groups(source.num_groups, seed)
    except ValueError as error:
        raise UserError(f"data.inputs.num_groups: {error}") from None


def source_files(source: InputConfig) -> list[Path]:
    """The files that an input's path names: itself, those that match it as a pattern, or all below a directory."""
    path = Path(source.path)
    if path.is_dir() and source.kind == "huggingface":
        return sorted(file for file in path.rglob("*") if file.is_file())
    names = [source.path] if path.exists() else sorted(glob.glob(source.path, recursive=True))  # noqa: PTH207 (may be absolute)
    if files := [Path(name) for name in names if Path(name).is_file()]:
        if broken := [str(file) for file in files if not is_unicode(str(file))]:
            raise UserError(f"data.inputs.path: {broken[0]!a}: the file's name is not UTF-8; rename it")
        return files
    if path.is_dir():
        raise UserError(f"data.inputs.path: {source.path}: is a directory; name its files, such as {path / '*.jsonl'}")
    raise UserError(f"data.inputs.path: {source.path}: no such file (relative to {Path.cwd()}); correct the path")


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a plain or .gz file for reading bytes, with a progress bar where a person watches."""
    try:
        console, silent = Console(stderr=True), not sys.stderr.isatty()
        bar = rich.progress.open(path, "rb", description=path.name, console=console, transient=True, disable=silent)
        with bar as raw:
            file = io.BufferedReader(cast(io.RawIOBase, raw), 1 << 20)  # in blocks, as rich's bar is slow by the line
            yield gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore the file") from None


def _read_jsonl(path: Path, bad: BadRecords) -> Iterator[list[Row]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            place = Place(str(path), number)
            if not line.strip():
                continue
            try:
                text = line.rstrip().decode("utf-8-sig" if number == 1 else "utf-8")
                record = json.loads(text, object_pairs_hook=_object_of_distinct_keys)
            except UnicodeDecodeError as error:
                bad.add(place, "invalid UTF-8", f"byte {error.start + 1} of the line: {error.reason}")
            except json.JSONDecodeError as error:
                bad.add(place, "broken JSON", f"{error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:
                bad.add(place, "broken JSON", str(error))
            else:
                yield from _rows_of_record(record, place, bad)


def _object_of_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. The standard decoder would quietly keep the last of two values for one key."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError(f"a key is given twice among {[key for key, _ in pairs]}")
    return value


def _rows_of_record(record: Any, place: Place, bad: BadRecords) -> Iterator[list[Row]]:
    """The rows of a record in the JSON form; nothing, with the reason reported, if it holds no texts."""
    if not isinstance(record, dict):
        bad.add(place, "broken JSON", "the line is not an object")
        return
    texts = record.get("texts")
    if not isinstance(texts, dict) or not texts:
        bad.add(place, "no texts", "`texts` must map at least one language to its fields")
        return
    key = _key(record.get("id"))
    yield [Row(place, key, language, record.get("label"), fields) for language, fields in texts.items()]


def _read_tables(source: InputConfig, task: TaskConfig, bad: BadRecords) -> Iterator[Row]:
    """Rows of Parquet and CSV files in long form; the rows of a group may stand in several files of one input."""
    for path in source_files(source):
        if path.suffix == ".parquet":
            rows = _read_parquet(path, source, task)
        elif path.name.endswith((".csv", ".csv.gz")):
            rows = _read_csv(path, source, task, bad)
        else:
            raise UserError(f"{path}: kind table reads .parquet, .csv and .csv.gz; convert it or correct the path")
        for place, cells in rows:
            yield _row_of_cells(place, cells, source, task, cells[source.columns.language])


def _read_csv(path: Path, source: InputConfig, task: TaskConfig, bad: BadRecords) -> Iterator[tuple[Place, Cells]]:
    with _open(path) as file:
        # Bytes that are not UTF-8 become lone surrogates, which the checks of texts report with their line.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        csv.field_size_limit(2**31 - 1)  # the default refuses texts of over 131,072 characters
        lines: list[str] = []  # of the current row

        def remembered() -> Iterator[str]:
            for line in text:
                lines.append(line)
                yield line

        reader = csv.reader(remembered(), strict=True)
        header = next(reader, [])
        if not header:
            raise UserError(f"{path}: holds nothing; restore the file, or remove it from data.inputs")
        _wanted_columns(str(path), header, source, task, with_language=True)

        def note_key(values: list[str]) -> None:
            number = header.index(source.columns.id)
            if number < len(values) and (key := _key(whole(values[number]))):
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
                yield place, cells | {source.columns.id: whole(cells[source.columns.id])}
            elif values:
                bad.add(place, "broken row", f"{len(values)} cells under {len(header)} columns")
                note_key(values)


def _read_parquet(path: Path, source: InputConfig, task: TaskConfig) -> Iterator[tuple[Place, Cells]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = _wanted_columns(str(path), file.schema_arrow.names, source, task, with_language=True)
            yield from _cells_of_tables(file.iter_batches(columns=wanted), str(path))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path}: cannot be read as Parquet ({' '.join(str(error).split())}); restore the file"
        ) from None


def _cells_of_tables(tables: Iterable[Any], name: str) -> Iterator[tuple[Place, Cells]]:
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
    return [None if value != value else value for value in column.to_pylist()]  # NaN: a gap, as pandas writes it


def _read_huggingface(source: InputConfig, task: TaskConfig) -> Iterator[Row]:
    """Rows of a dataset in long form, or of one dataset per language that are joined by id or row number."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    subsets: Mapping[Any, str | None] = source.subsets or {None: None}
    # Of a directory its own name alone, so that the ids do not change with the place it lies in.
    name = Path(source.path).resolve().name if Path(source.path).exists() else source.path
    loaded = {language: _load_dataset(source, name) for language, name in subsets.items()}
    if len({source.columns.id in dataset.column_names for dataset in loaded.values()}) > 1:
        raise UserError(f"{source.path}: only some subsets have the id column {source.columns.id!r}; set columns.id")
    for language, dataset in loaded.items():
        where = source.path if language is None else f"{source.path}[{subsets[language]}]"
        with_id = source.columns.id in dataset.column_names
        num_rows = {len(other) for other in loaded.values()}
        if not with_id and len(num_rows) > 1:
            raise UserError(f"{source.path}: subsets of {sorted(num_rows)} rows need an id column to join them by")
        wanted = _wanted_columns(where, dataset.column_names, source, task, language is None, with_id)
        label = dataset.features.get(source.columns.label)
        has_names = isinstance(label, datasets.ClassLabel) and set(label.names) & set(task.labels)
        names = label.names if has_names else []
        tables = dataset.select_columns(wanted).with_format("arrow").iter(1000)
        for place, cells in _cells_of_tables(tables, where):
            # The row number alone would collide between the splits of one dataset, which are inputs of their own.
            cells.setdefault(source.columns.id, f"{name}/{source.hub_split or 'train'}/{place.number}")
            named = cells[source.columns.language] if language is None else language
            row = _row_of_cells(place, cells, source, task, named)
            yield row._replace(label=_class_name(row.label, names)) if isinstance(label, datasets.ClassLabel) else row


def _class_name(number: int | None, names: list[str]) -> str | int | None:
    """The name of a numbered class if the task uses the names, else its number; -1 means no label, by custom."""
    if number is None or number < 0:
        return None
    return names[number] if number < len(names) else number


def _load_dataset(source: InputConfig, name: str | None) -> Any:
    """One split of a dataset from the hub, a local folder, or what ``save_to_disk`` wrote there."""
    import datasets

    directory, split = Path(source.path, name or ""), source.hub_split or "train"
    if source.hub_split and (directory / "state.json").exists():
        raise UserError(f"{directory}: is a single split, there is no {source.hub_split!r} to choose; remove hub_split")
    if source.revision and Path(source.path).exists():
        raise UserError(f"{source.path}: is here, and has no revision {source.revision!r}; remove revision")
    try:
        if (directory / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(directory))[split]
        if (directory / "state.json").exists():
            return datasets.load_from_disk(str(directory))
        return datasets.load_dataset(source.path, name, split=split, revision=source.revision)
    except Exception as error:  # the library hands on whatever its many back ends raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = "check path, subsets, hub_split and the network, or fetch it beforehand and give the local path"
        raise UserError(f"data.inputs.path: {source.path}: cannot be loaded ({reason}); {remedy}") from error


def _wanted_columns(
    where: str, found: Sequence[str], source: InputConfig, task: TaskConfig, with_language: bool, with_id: bool = True
) -> list[str]:
    """The columns to read. Raises ``UserError`` if one is missing or ambiguous."""
    columns = source.columns
    wanted = {f"fields.{field}": columns.fields.get(field, field) for field in task.fields}
    wanted |= {"id": columns.id} if with_id else {}
    wanted |= {"language": columns.language} if with_language else {}
    wanted |= {"label (null: no labels)": columns.label} if columns.label is not None else {}
    for option, name in wanted.items():
        if found.count(name) != 1:
            problem = f"{'more than one' if name in found else 'no'} column {name!r} among {', '.join(found)}"
            raise UserError(f"{where}: {problem}; set data.inputs.columns.{option}")
    return list(dict.fromkeys(wanted.values()))


def _row_of_cells(place: Place, cells: Cells, source: InputConfig, task: TaskConfig, language: Any) -> Row:
    columns = source.columns
    label = None if columns.label is None or cells[columns.label] == "" else cells[columns.label]
    fields = {field: cells[columns.fields.get(field, field)] for field in task.fields}
    return Row(place, _key(cells[columns.id]), language, label, fields)


def _key(value: Any) -> str | None:
    """A group's id as text; None if it has none. A whole number is the same id as 1 and as pandas' 1.0."""
    if isinstance(value, float):
        return str(int(value) if value.is_integer() else value) if math.isfinite(value) else None
    return str(value) or None if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def whole(text: str) -> str:
    """A number as text without a `.0`: in CSV pandas writes 1.0 for 1 in a column of numbers with gaps."""
    return text.removesuffix(".0") if _WHOLE_FLOAT.fullmatch(text) else text


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can spell the text: lone surrogates come from JSON escapes and from bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
