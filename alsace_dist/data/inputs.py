"""Where parallel groups come from: the kinds of ``data.inputs`` in one table.

A published dataset is a kind of its own: a module in tasks/, found by its name.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from alsace_dist import tasks
from alsace_dist.config import Config, InputConfig, TaskConfig
from alsace_dist.data import hub, jsonl, published, tables
from alsace_dist.data.columns import Numbering
from alsace_dist.data.records import ROW_COUNT, BadRecords, Place, RecordRow, input_files
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import digest_file, digest_json
from alsace_dist.tasks.base import FoundProblem, Published

Groups = Iterator[list[RecordRow]]


@dataclass(frozen=True)
class InputKind:
    """A kind of input.

    ``settings``: the keys of an input that it has beside ``kind`` and ``split``. ``read(input, config, bad)``: its
    groups, each as its rows (at least one). ``files(input)``: the files that it reads; none if it is generated, or on
    the hub. ``content(input, seed)``: for the fingerprint, name -> what tells the content from another one.
    ``missing``, ``no_label``: what says, beside ``data.missing`` and ``data.no_label``, that there is no translation,
    and that nobody knows the label; the empty one is for a group without label.
    """

    settings: frozenset[str]
    read: Callable[[InputConfig, Config, BadRecords], Groups]
    files: Callable[[InputConfig], list[Path]]
    content: Callable[[InputConfig, int], dict[str, Any]]
    missing: frozenset[str] = frozenset()
    no_label: frozenset[str] = frozenset()


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
        if one.kind in ("jsonl", "table") and one.hub_split is not None and "{split}" not in one.path:
            raise UserError(f"data.inputs.{number}: hub_split is not used where path has no {{split}} in it; remove it")
        for name in sorted(one.model_fields_set - own - {"kind", "split"}):
            if getattr(one, name) != type(one).model_fields[name].default:
                users = " or ".join(name_of for name_of, kind in kinds().items() if name in kind.settings)
                raise UserError(f"data.inputs.{number}: {name} is only used with kind {users}; remove it")


def read_groups(one: InputConfig, config: Config, bad: BadRecords) -> Groups:
    """The groups of one input, each as its rows (at least one). Raises ``UserError`` if it holds none."""
    num_before, is_empty, asked = len(bad.problems), True, _asked(one, config)
    for rows in kind_of(one).read(in_languages(one, config), config, bad):
        is_empty = False
        if asked is not None:  # whatever holds them: files, a column, the keys of a group
            rows = [row for row in rows if row.language in asked or not isinstance(row.language, str)]
        named = [row._replace(key=f"{one.name}/{row.key}") if one.name and row.key else row for row in rows]
        if named:
            yield named
    if is_empty and len(bad.problems) == num_before:
        raise UserError(f"data.inputs: {one.path or one.kind}: holds no records; correct the path, or remove the input")


def contents(config: Config) -> dict[str, Any]:
    """What tells the content of all inputs from another one, by file or name."""
    found: dict[str, Any] = {}
    for one in config.data.inputs:
        found |= kind_of(one).content(in_languages(one, config), config.seed)
    return found


def in_languages(one: InputConfig, config: Config) -> InputConfig:
    """The input with the languages made explicit in which it is read; None still means all of them."""
    asked = _asked(one, config)
    return one.model_copy(update={"languages": config.data.languages if asked is None else asked})


def _asked(one: InputConfig, config: Config) -> list[str] | None:
    """The languages that are asked for of this input, whatever the run's are; None: no others than those.

    Of a published dataset, labeled groups are read in the source language alone: more would not be used.
    """
    if one.languages is None and one.split == "labeled" and one.kind in tasks.published():
        return [config.data.source_language]
    return one.languages


def _hashed(files: Iterable[Path]) -> dict[str, Any]:
    return {str(path): {"bytes": path.stat().st_size, "sha256": digest_file(path)} for path in files}


# --- the table -----------------------------------------------------------------------------------------------------


def _by_key(rows: Iterable[RecordRow], bad: BadRecords) -> Groups:
    """Rows of one id together, wherever they stand; a row without an id is alone."""
    groups: dict[Any, list[RecordRow]] = {}
    for row in rows:
        groups.setdefault(row.place if row.key is None else row.key, []).append(row)
    broken, bad.broken_keys = bad.broken_keys, set()
    for key, group in groups.items():
        yield [row._replace(is_whole=False) for row in group] if key in broken else group


def _read_jsonl(one: InputConfig, config: Config, bad: BadRecords) -> Groups:
    if jsonl.holds_rows(one):
        return _by_key(_counted(jsonl.read_rows, one, config, bad), bad)
    return jsonl.read_groups(one, bad)


def _read_tables(one: InputConfig, config: Config, bad: BadRecords) -> Groups:
    return _by_key(_counted(tables.read_tables, one, config, bad), bad)


def _counted(
    read: Callable[[InputConfig, TaskConfig, BadRecords, Numbering], Iterator[RecordRow]],
    one: InputConfig,
    config: Config,
    bad: BadRecords,
) -> Iterator[RecordRow]:
    """The rows of files; where they are joined by their position, every language must have equally many."""
    numbering = Numbering()
    yield from read(one, config.task, bad, numbering)
    if one.columns.id is None:
        numbering.check(bad, ROW_COUNT)


def _read_hub(one: InputConfig, config: Config, bad: BadRecords) -> Groups:
    return _by_key(hub.read_huggingface(one, config.task, bad), bad)


def _content_of_files(one: InputConfig, seed: int) -> dict[str, Any]:
    return _hashed(input_files(one))


def _content_of_hub(one: InputConfig, seed: int) -> dict[str, Any]:
    if hub.is_on_hub(one):
        return {f"hub {one.path} {one.revision}": {"name": one.path, "revision": one.revision}}
    return _hashed(hub.local_files(one))


@functools.cache
def _published(name: str) -> InputKind:
    dataset = tasks.dataset(name)
    if isinstance(dataset, Published):
        return _described(dataset)
    if hasattr(dataset, "rows"):
        return _parsed(cast(tasks.ParsedDataset, dataset))
    return _generated(name, dataset)


def _described(dataset: Published) -> InputKind:
    def read(one: InputConfig, config: Config, bad: BadRecords) -> Groups:
        groups = _by_key(published.read_rows(dataset, one, config.task, bad), bad)
        return (published.agreed(dataset, group, bad) for group in groups)

    def files(one: InputConfig) -> list[Path]:
        return published.files(dataset, one)

    def content(one: InputConfig, seed: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part in published.locate(dataset, one):
            paths = published.files_of(part)
            found |= _hashed(paths) if paths else _content_of_hub(part.input, seed)
        return found

    return InputKind(published.SETTINGS, read, files, content, dataset.missing, dataset.no_label)


def _parsed(dataset: tasks.ParsedDataset) -> InputKind:
    def rows(one: InputConfig, bad: BadRecords) -> Iterator[RecordRow]:
        for found in dataset.rows(one):
            place = Place(str(found.path), found.line)
            if isinstance(found, FoundProblem):
                bad.add(place, found.kind, found.detail)
                bad.broken_keys |= set(found.keys)
                continue
            label = found.label[0] if len(found.label) == 1 else found.label
            row = RecordRow(place, found.key, found.language, label, dict(found.fields), found.unit)
            yield row._replace(candidates=found.candidates, is_apart=found.is_apart, category=found.category)

    def read(one: InputConfig, config: Config, bad: BadRecords) -> Groups:
        return _by_key(rows(one, bad), bad)

    def content(one: InputConfig, seed: int) -> dict[str, Any]:
        return _hashed(dataset.files(one))

    return InputKind(dataset.SETTINGS | {"name"}, read, dataset.files, content)


def _generated(name: str, dataset: tasks.GeneratedDataset) -> InputKind:
    def read(one: InputConfig, config: Config, bad: BadRecords) -> Groups:
        for number, record in enumerate(dataset.records(one, config.seed), start=1):
            yield from jsonl.rows_of_record(record, Place(name, number, "group "), bad)

    def content(one: InputConfig, seed: int) -> dict[str, Any]:
        if files := dataset.files(one):
            return _hashed(files)
        return {f"{name} of {one.num_groups}": {"sha256": digest_json(list(dataset.records(one, seed)))}}

    return InputKind(dataset.SETTINGS | {"name"}, read, dataset.files, content)


KINDS: dict[str, InputKind] = {
    "jsonl": InputKind(
        frozenset({"path", "name", "languages", "hub_split", "columns"}), _read_jsonl, input_files, _content_of_files
    ),
    "table": InputKind(
        frozenset({"path", "name", "languages", "hub_split", "columns", "header", "quoting"}),
        _read_tables,
        input_files,
        _content_of_files,
    ),
    "huggingface": InputKind(
        frozenset({"path", "name", "languages", "columns", "subsets", "hub_split", "revision"}),
        _read_hub,
        hub.local_files,
        _content_of_hub,
    ),
}
