"""JSONL: a group a line with all its texts, or, as in a table, a row a line under keys of any name."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alsace_dist.config import ColumnsConfig, InputConfig, TaskConfig
from alsace_dist.data.columns import FileRow, Numbering, check_languages, records_of, rows_between, wanted_columns
from alsace_dist.data.records import (
    BLANK,
    BadRecords,
    Place,
    RecordRow,
    input_files,
    key_of,
    language_of_file,
    open_bytes,
)
from alsace_dist.errors import UserError
from alsace_dist.reading import check_encoding, why_no_json


def holds_rows(one: InputConfig) -> bool:
    """Whether the lines of an input are rows, as its path or its columns tell, and not whole groups."""
    return "{language}" in one.path or one.columns != ColumnsConfig()


def read_groups(one: InputConfig, bad: BadRecords) -> Iterator[list[RecordRow]]:
    """Groups of files with one group a line."""
    for path in input_files(one):
        for place, record in _lines(path, bad):
            if record is not None:
                yield from rows_of_record(record, place, bad)


def read_rows(
    one: InputConfig, task: TaskConfig, bad: BadRecords, numbering: Numbering, language: str | None = None
) -> Iterator[RecordRow]:
    """Rows of files with one row a line: in long form, a file per language, or with mappings language -> text.

    ``language``, ``numbering``: as in ``tables.read_tables``. Raises ``UserError`` if a language's files hold no rows.
    """
    languages: dict[str, Path] = {}
    for path in input_files(one):
        if named := language or language_of_file(one.located(), path):
            languages.setdefault(named, path)
        rows = _checked_rows(path, one, task, named is None, bad)
        yield from records_of(rows, one, task, named, numbering, bad)
    check_languages(languages, numbering)


def _checked_rows(
    path: Path, one: InputConfig, task: TaskConfig, with_language: bool, bad: BadRecords
) -> Iterator[FileRow]:
    """Raises ``UserError`` if the first row lacks a key: then most rows will."""
    is_first = True
    for place, record in _lines(path, bad, one.columns.id is None, one.columns.id):
        if record is not None and not isinstance(record, dict):
            bad.add(place, "broken JSON", "the line is not an object")
            record = None
        if record is not None and is_first:
            found = [*record, *({one.columns.label} - record.keys() - {None})]  # labels may be left out
            with_id = one.columns.id is not None
            wanted_columns(f"{path}:{place.number}", [str(name) for name in found], one, task, with_language, with_id)
            is_first = False
        yield FileRow(place, record)


def _lines(
    path: Path, bad: BadRecords, by_position: bool = False, id_key: str | None = None
) -> Iterator[tuple[Place, Any]]:
    """The values of a file's lines; None, and the reason reported, for a line that is no JSON. Blank lines are none.

    ``by_position``: as in ``rows_between``; ``id_key``: under which rows have their ids, which are looked for in lines
    that cannot be read, for their groups lack a language then.
    """
    with open_bytes(path) as file:
        numbered = enumerate(file, start=1)
        for number, line in rows_between(numbered, lambda one: not one[1].strip(), by_position):
            place = Place(str(path), number)
            if not line.strip():
                bad.add(place, "broken row", BLANK)
                yield place, None
                continue
            if number == 1:
                _check_first_line(path, line)
            record = None
            try:
                text = line.rstrip().decode("utf-8-sig" if number == 1 else "utf-8")
                record = json.loads(text, object_pairs_hook=_object_of_distinct_keys)
                if record is None:
                    bad.add(place, "broken JSON", "the line is not an object")
            except UnicodeDecodeError as error:
                bad.add(place, "invalid UTF-8", f"byte {error.start + 1} of the line: {error.reason}")
            except json.JSONDecodeError as error:
                bad.add(place, "broken JSON", f"{error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:
                bad.add(place, "broken JSON", why_no_json(error))
            if record is None and id_key is not None and (key := _id_in(line, id_key)):
                bad.broken_keys.add(key)
            yield place, record


def _id_in(line: bytes, id_key: str) -> str | None:
    """The id that stands in a line which is no JSON, if one can be made out."""
    name = re.escape(json.dumps(id_key, ensure_ascii=False))
    match = re.search(name + r'\s*:\s*("(?:[^"\\]|\\.){1,200}"|-?[0-9]{1,20}\b)', line.decode("utf-8", "replace"))
    try:
        return key_of(json.loads(match[1])) if match else None
    except ValueError:
        return None


def _check_first_line(path: Path, line: bytes) -> None:
    """Raises ``UserError`` for the ways in which JSON is no JSONL as a whole."""
    check_encoding(path, line)
    first = line.strip().removeprefix(b"\xef\xbb\xbf")
    if first[:1] == b"[":
        raise UserError(f"{path}: is one JSON array; JSONL has one object a line (jq -c '.[]' makes that of it)")
    if first == b"{":
        raise UserError(
            f"{path}: has an object over several lines; JSONL has one object a line (jq -c . makes that of it)"
        )


def _object_of_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. The standard decoder would quietly keep the last of two values for one key."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError(f"a key is given twice among {[key for key, _ in pairs]}")
    return value


def rows_of_record(record: Any, place: Place, bad: BadRecords) -> Iterator[list[RecordRow]]:
    """The rows of a record in the JSON form; nothing, with the reason reported, if it holds no texts."""
    if not isinstance(record, dict):
        bad.add(place, "broken JSON", "the line is not an object")
        return
    texts = record.get("texts")
    if not isinstance(texts, dict) or not texts:
        bad.add(place, "no texts", "`texts` must map at least one language to its fields")
        return
    key, unit = key_of(record.get("id")), key_of(record.get("unit"))
    candidates, apart, category = record.get("candidates"), record.get("apart"), key_of(record.get("category"))
    own = candidates if isinstance(candidates, dict) else {}
    others = {} if apart is None else apart
    if not (isinstance(others, dict) and others.keys() <= texts.keys()):
        detail = f"`apart` must map languages of the group ({', '.join(map(str, texts))}) to their labels"
        bad.add(place, "conflicting candidates", detail)
        return
    for name, value in (("unit", unit), ("category", category)):
        if value is None and record.get(name) not in (None, ""):
            bad.add(place, "missing field", f"`{name}` must be a text or a whole number")
            return
    yield [
        RecordRow(
            place,
            key,
            language,
            others[language] if language in others else record.get("label"),
            fields,
            unit,
            candidates=own.get(language),
            is_apart=language in others,
            category=category or "",
        )
        for language, fields in texts.items()
    ]
