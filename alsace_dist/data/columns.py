"""From the cells of a row to unchecked records: which column holds what, which row is which group."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from alsace_dist.config import InputConfig, TaskConfig
from alsace_dist.data.records import ROW_COUNT, BadRecords, Place, RecordRow, key_of
from alsace_dist.errors import UserError
from alsace_dist.reading import shorten

Cells = dict[str, Any]
Line = TypeVar("Line")
ROW_NUMBER = "\0row number"  # no column has this name
NOBODYS = "no one knows of which language this row is, and rows are joined by their position; mend it, or give rows ids"


class FileRow(NamedTuple):
    """A row of a file. ``cells``: None if it could not be read, which was reported; ``key``: its id, if that could."""

    place: Place
    cells: Cells | None
    key: str | None = None


def rows_between(lines: Iterable[Line], is_blank: Callable[[Line], bool], by_position: bool) -> Iterator[Line]:
    """The lines of a file without blank ones, which are no rows.

    ``by_position``: rows are joined by their position, so a blank line that others follow stands where a row of the
    other languages is. It stays, for whoever reads the rows to report.
    """
    blank: list[Line] = []
    for line in lines:
        if is_blank(line):
            blank += [line] if by_position else []
            continue
        yield from blank
        blank = []
        yield line


class Numbering:
    """Numbers the rows of each language from 1, and holds against each other how many the languages have."""

    def __init__(self) -> None:
        self._last: dict[Any, tuple[int, Place]] = {}

    def next(self, language: Any, place: Place) -> int:
        """The number of the row that stands at ``place``."""
        number = self._last[language][0] + 1 if language in self._last else 1
        self._last[language] = (number, place)
        return number

    def has(self, language: Any) -> bool:
        """Whether any row of a language was met."""
        return language in self._last

    def check(self, bad: BadRecords, kind: str) -> None:
        """Note, as ``kind``, every language that has more or fewer rows than most, at its last row."""
        counts = Counter(number for number, _ in self._last.values())
        usual = max(counts, key=lambda number: (counts[number], number), default=0)
        for language, (number, place) in self._last.items():
            if number != usual:
                bad.add(place, kind, f"{language} ends here after {number:,} rows, where most languages have {usual:,}")


def check_languages(files: Mapping[str, Path], numbering: Numbering) -> None:
    """Raises ``UserError`` if a language has no rows. ``files``: the first file of each language that has its own."""
    for language, path in files.items():
        if not numbering.has(language):
            raise UserError(f"{path}: holds no rows; restore the file, or leave {language} out (languages)")


def wanted_columns(
    where: str, found: Sequence[str], one: InputConfig, task: TaskConfig, with_language: bool, with_id: bool = True
) -> list[str]:
    """The columns to read. Raises ``UserError`` if one is missing or ambiguous."""
    columns = one.columns
    wanted = {f"fields.{field}": columns.fields.get(field, field) for field in task.fields}
    wanted |= {"id (null: row numbers)": columns.id} if with_id and columns.id is not None else {}
    wanted |= {"language": columns.language} if with_language and columns.language is not None else {}
    wanted |= {"label (null: no labels)": columns.label} if columns.label is not None else {}
    wanted |= {"unit": columns.unit} if columns.unit is not None else {}
    for option, name in wanted.items():
        if found.count(name) != 1:
            problem = f"{'more than one' if name in found else 'no'} column {name!r} among {', '.join(found)}"
            raise UserError(f"{where}: {problem}; set data.inputs.columns.{option}")
    return list(dict.fromkeys(wanted.values()))


def records_of(
    rows: Iterable[FileRow],
    one: InputConfig,
    task: TaskConfig,
    language: str | None,
    numbering: Numbering,
    bad: BadRecords,
) -> Iterator[RecordRow]:
    """The records of a file's rows. ``language``: of the whole file; None if its rows say it."""
    columns = one.columns
    for place, cells, key in rows:
        if cells is None:
            # A broken row keeps its place among the rows of its language, where that is known.
            number = None if language is None else numbering.next(language, place)
            if number is None and columns.id is None and columns.language is not None:
                bad.add(place, ROW_COUNT, NOBODYS)
            broken = key if columns.id is not None else number and str(number)
            bad.broken_keys |= {broken} if broken else set()
            continue
        named = cells.get(columns.language) if language is None and columns.language is not None else language
        if isinstance(named, (list, dict)):
            bad.add(place, "missing language", f"{columns.language} holds {shorten(repr(named))}, which names none")
        if columns.id is None and columns.language is not None and not (isinstance(named, str) and named.strip()):
            bad.add(place, ROW_COUNT, NOBODYS)
        if isinstance(named, (list, dict)):
            continue
        number = numbering.next(named, place)
        key = str(number) if columns.id is None else key_of(cells.get(columns.id))
        yield from records_of_cells(place, key, cells, one, task, named, bad)


def records_of_cells(
    place: Place, key: str | None, cells: Cells, one: InputConfig, task: TaskConfig, language: Any, bad: BadRecords
) -> Iterator[RecordRow]:
    """The records of one row: one, or one for each language if the row holds all of them."""
    columns = one.columns
    label = None if columns.label is None or cells.get(columns.label) == "" else cells.get(columns.label)
    values = {field: cells.get(columns.fields.get(field, field)) for field in task.fields}
    unit = None if columns.unit is None else cells.get(columns.unit)
    if language is not None or columns.language is not None:
        yield RecordRow(place, key, language, label, values, key_of(unit))
        return
    texts: dict[str, Cells] = {}
    for field, value in values.items():
        by_language = _translations(value)
        if by_language is None:
            name = columns.fields.get(field, field)
            bad.add(place, "no texts", f"{name} must map languages to texts, or hold lists of language and translation")
            return
        for spoken, text in by_language.items():
            texts.setdefault(spoken, {})[field] = text
    if not texts:
        bad.add(place, "no texts", f"{', '.join(columns.fields.get(field, field) for field in values)}: in no language")
    units = _translations(unit) or {}
    for spoken, fields in texts.items():
        yield RecordRow(place, key, spoken, label, fields, key_of(units.get(spoken)))


def _translations(value: Any) -> Mapping[str, Any] | None:
    """Language -> text of a cell that holds several languages, in either form that ``datasets`` has; None if it is
    neither."""
    if isinstance(value, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        value = dict(value)  # a map of Parquet
    if not isinstance(value, dict):
        return None
    if value.keys() == {"language", "translation"}:
        languages, texts = value["language"], value["translation"]
        if not (isinstance(languages, list) and isinstance(texts, list)) or len(languages) != len(texts):
            return None
        if not all(isinstance(one, str) for one in languages) or len(set(languages)) != len(languages):
            return None
        value = dict(zip(languages, texts, strict=True))
    return {language: text for language, text in value.items() if text is not None}
