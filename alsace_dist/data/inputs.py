"""Where parallel groups come from: the kinds of ``data.inputs`` in one table, and JSONL, the plainest of them.

A published dataset is a kind of its own: a module in tasks/, found by its name.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alsace_dist import tasks
from alsace_dist.config import Config, InputConfig, TaskConfig
from alsace_dist.data import hub, tables
from alsace_dist.data.records import BadRecords, Place, RecordRow, input_files, key_of, open_bytes
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import digest_file, digest_json

Groups = Iterator[list[RecordRow]]


@dataclass(frozen=True)
class InputKind:
    """A kind of input.

    ``settings``: the keys of an input that it has beside ``kind`` and ``split``. ``read(input, task, seed, bad)``: its
    groups, each as its rows (at least one). ``files(input)``: the files that it reads; none if it is generated, or on
    the hub. ``content(input, seed)``: for the fingerprint, name -> what tells the content from another one.
    """

    settings: frozenset[str]
    read: Callable[[InputConfig, TaskConfig, int, BadRecords], Groups]
    files: Callable[[InputConfig], list[Path]]
    content: Callable[[InputConfig, int], dict[str, Any]]


def kinds() -> dict[str, InputKind]:
    """The table: name -> kind, the general ones first."""
    return KINDS | {name: _published(name) for name in tasks.published()}


def kind_of(one: InputConfig) -> InputKind:
    """The kind of an input. Raises ``UserError`` if there is none of that name."""
    if one.kind in KINDS:
        return KINDS[one.kind]
    if one.kind in tasks.published():
        return _published(one.kind)
    raise UserError(f"data.inputs.kind: {one.kind!r} is not known; there are {', '.join(sorted(kinds()))}")


def check_inputs(config: Config) -> None:
    """Raises ``UserError`` if an input is of no known kind, or has settings that its kind would ignore or lacks."""
    for number, one in enumerate(config.data.inputs):
        if one.kind not in kinds():
            known = ", ".join(sorted(kinds()))
            raise UserError(f"data.inputs.{number}.kind: {one.kind!r} is not known; there are {known}")
        own = kind_of(one).settings
        if "path" in own and not one.path:
            raise UserError(f"data.inputs.{number}: path is needed for kind {one.kind}")
        for name in sorted(one.model_fields_set - own - {"kind", "split"}):
            if getattr(one, name) != type(one).model_fields[name].default:
                users = " or ".join(name_of for name_of, kind in kinds().items() if name in kind.settings)
                raise UserError(f"data.inputs.{number}: {name} is only used with kind {users}; remove it")


def read_groups(one: InputConfig, config: Config, bad: BadRecords) -> Groups:
    """The groups of one input, each as its rows (at least one). Raises ``UserError`` if it holds none."""
    num_before, is_empty = len(bad.problems), True
    for rows in kind_of(one).read(one, config.task, config.seed, bad):
        is_empty = False
        named = [row._replace(key=f"{one.name}/{row.key}") if one.name and row.key else row for row in rows]
        yield named
    if is_empty and len(bad.problems) == num_before:
        raise UserError(f"data.inputs: {one.path or one.kind}: holds no records; correct the path, or remove the input")


def contents(config: Config) -> dict[str, Any]:
    """What tells the content of all inputs from another one, by file or name."""
    found: dict[str, Any] = {}
    for one in config.data.inputs:
        found |= kind_of(one).content(one, config.seed)
    return found


def _hashed(files: Iterable[Path]) -> dict[str, Any]:
    return {str(path): {"bytes": path.stat().st_size, "sha256": digest_file(path)} for path in files}


# --- JSONL ---------------------------------------------------------------------------------------------------------


def _read_jsonl(one: InputConfig, task: TaskConfig, seed: int, bad: BadRecords) -> Groups:
    for path in input_files(one):
        yield from _lines_of_jsonl(path, bad)


def _lines_of_jsonl(path: Path, bad: BadRecords) -> Iterator[list[RecordRow]]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            place = Place(str(path), number)
            if not line.strip():
                continue
            if number == 1:
                _check_first_line(path, line)
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


def _check_first_line(path: Path, line: bytes) -> None:
    """Raises ``UserError`` for the ways in which JSON is no JSONL as a whole."""
    if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: is UTF-16; save it as UTF-8")
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


def _rows_of_record(record: Any, place: Place, bad: BadRecords) -> Iterator[list[RecordRow]]:
    """The rows of a record in the JSON form; nothing, with the reason reported, if it holds no texts."""
    if not isinstance(record, dict):
        bad.add(place, "broken JSON", "the line is not an object")
        return
    texts = record.get("texts")
    if not isinstance(texts, dict) or not texts:
        bad.add(place, "no texts", "`texts` must map at least one language to its fields")
        return
    key = key_of(record.get("id"))
    yield [RecordRow(place, key, language, record.get("label"), fields) for language, fields in texts.items()]


# --- the other kinds -----------------------------------------------------------------------------------------------


def _by_key(rows: Iterable[RecordRow]) -> Groups:
    """Rows of one id together, wherever they stand; a row without an id is alone."""
    groups: dict[Any, list[RecordRow]] = {}
    for row in rows:
        groups.setdefault(row.place if row.key is None else row.key, []).append(row)
    yield from groups.values()


def _read_tables(one: InputConfig, task: TaskConfig, seed: int, bad: BadRecords) -> Groups:
    return _by_key(tables.read_tables(one, task, bad))


def _read_hub(one: InputConfig, task: TaskConfig, seed: int, bad: BadRecords) -> Groups:
    return _by_key(hub.read_huggingface(one, task))


def _content_of_hub(one: InputConfig, seed: int) -> dict[str, Any]:
    if hub.is_on_hub(one):
        return {f"hub {one.path} {one.revision}": {"name": one.path, "revision": one.revision}}
    return _hashed(hub.local_files(one))


@functools.cache
def _published(name: str) -> InputKind:
    dataset = tasks.dataset(name)

    def read(one: InputConfig, task: TaskConfig, seed: int, bad: BadRecords) -> Groups:
        for number, record in enumerate(dataset.records(one, seed), start=1):
            yield from _rows_of_record(record, Place(name, number, "group "), bad)

    def content(one: InputConfig, seed: int) -> dict[str, Any]:
        if files := dataset.files(one):
            return _hashed(files)
        return {f"{name} of {one.num_groups}": {"sha256": digest_json(list(dataset.records(one, seed)))}}

    return InputKind(dataset.SETTINGS | {"name"}, read, dataset.files, content)


KINDS: dict[str, InputKind] = {
    "jsonl": InputKind(
        frozenset({"path", "name"}), _read_jsonl, input_files, lambda one, seed: _hashed(input_files(one))
    ),
    "table": InputKind(
        frozenset({"path", "name", "columns"}), _read_tables, input_files, lambda one, seed: _hashed(input_files(one))
    ),
    "huggingface": InputKind(
        frozenset({"path", "name", "columns", "subsets", "hub_split", "revision"}),
        _read_hub,
        hub.local_files,
        _content_of_hub,
    ),
}
