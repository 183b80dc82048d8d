"""Published datasets: which layout lies under a path, read as any other file, and said in the dataset's own words.

``tasks/`` describes the layouts; here they are looked for. Nothing but a layout's files and columns tells it: people
rename folders, unpack archives one level deeper, and keep a set's parts apart.
"""

import glob
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alsace_dist.config import ColumnsConfig, InputConfig, TaskConfig
from alsace_dist.data import hub, jsonl, tables
from alsace_dist.data.columns import Numbering
from alsace_dist.data.records import MISSING_ROWS, ROW_COUNT, BadRecords, RecordRow, input_files, open_bytes
from alsace_dist.errors import UserError
from alsace_dist.reading import check_encoding, check_file, shorten
from alsace_dist.tasks.base import Layout, Published

SETTINGS = frozenset({"path", "also", "name", "languages", "hub_split", "revision"})
PARTS = ("train", "dev", "test")
PART_NAMES = {name: name for name in PARTS} | {"validation": "dev", "val": "dev"}
MAX_DEPTH = 2  # folders between the path and the dataset's own


@dataclass(frozen=True)
class Found:
    """Files, or a name on the hub, that an input of a general kind reads. ``language``: of all of its rows."""

    reader: str
    input: InputConfig
    part: str
    language: str | None = None


def read_rows(dataset: Published, one: InputConfig, task: TaskConfig, bad: BadRecords) -> Iterator[RecordRow]:
    """The rows of a published dataset in its languages ``one.languages``; ids are PART/ID.

    Raises ``UserError`` if the task is another one, or no layout fits.
    """
    _check_task(dataset, one, task)
    broken: set[str] = set()
    numberings: dict[tuple[str, str], Numbering] = {}  # of the files of one part, whatever their form and place
    for found in locate(dataset, one):
        # Parts of a translated training half lack rows, which ids tell.
        kind = ROW_COUNT if found.input.columns.id is None else "" if found.part == "train" else MISSING_ROWS
        numbering = numberings.setdefault((found.part, kind), Numbering())
        for row in _read(found, task, bad, numbering):
            # Where the hub has no ids, those of other hub datasets would hold its name.
            number = row.key.rpartition("/")[2] if row.key and found.input.columns.id is None else row.key
            label = None if row.label is None else dataset.spellings.get(str(row.label), row.label)
            yield row._replace(key=number and f"{found.part}/{number}", label=label)
        broken |= {f"{found.part}/{key}" for key in bad.broken_keys}
        bad.broken_keys = set()
    bad.broken_keys = broken
    for (_, kind), numbering in numberings.items():
        if kind:
            numbering.check(bad, kind)


def agreed(dataset: Published, rows: list[RecordRow], bad: BadRecords) -> list[RecordRow]:
    """The rows of one group, whose shared fields are as most languages have them: of equally many, as English has them.

    Reports the rows of a group in which neither decides.
    """
    for name in dataset.shared:
        said = [(row, row.fields.get(name)) for row in rows if isinstance(row.fields, dict)]
        counts = Counter(value for _, value in said if isinstance(value, str))
        if len(counts) < 2:
            continue
        most = max(counts.values())
        usual = [value for value, number in counts.items() if number == most]
        english = [value for row, value in said if row.language == "en" and value in usual]
        if len(usual) > 1 and not english:
            others = [(row, value) for row, value in said if value != said[0][1]]
            for row, value in others:
                first = f"{shorten(repr(said[0][1]), 60)} at {said[0][0].place}"
                detail = f"{name} is {shorten(repr(value), 60)} here and {first}"
                bad.add(row.place, "conflicting fields", detail)
            continue
        value = english[0] if len(usual) > 1 else usual[0]
        rows = [
            row._replace(fields={**row.fields, name: value}, is_changed=True)
            if isinstance(row.fields, dict) and isinstance(row.fields.get(name), str) and row.fields[name] != value
            else row
            for row in rows
        ]
    return rows


def files(dataset: Published, one: InputConfig) -> list[Path]:
    """The files that ``read_rows`` reads; none for a name on the hub."""
    return [path for found in locate(dataset, one) for path in files_of(found)]


def files_of(found: Found) -> list[Path]:
    """The files of one part of it; none for a name on the hub."""
    return hub.local_files(found.input) if found.reader == "hub" else input_files(found.input)


def _read(found: Found, task: TaskConfig, bad: BadRecords, numbering: Numbering) -> Iterator[RecordRow]:
    if found.reader == "hub":
        return _counted(hub.read_huggingface(found.input, task, bad), found, numbering)
    read = tables.read_tables if found.reader == "table" else jsonl.read_rows
    return read(found.input, task, bad, numbering, found.language)


def _counted(rows: Iterator[RecordRow], found: Found, numbering: Numbering) -> Iterator[RecordRow]:
    """The rows of datasets of a language each; of one with all languages in a row there is nothing to count."""
    for row in rows:
        if found.input.subsets:
            numbering.next(row.language, row.place)
        yield row


def _check_task(dataset: Published, one: InputConfig, task: TaskConfig) -> None:
    if unknown := sorted(set(task.fields) - set(dataset.fields)):
        raise UserError(f"task.fields: kind {one.kind} has {', '.join(dataset.fields)}, and no {unknown[0]!r}")
    if set(task.labels) != set(dataset.labels):
        raise UserError(f"task.labels: kind {one.kind} has {', '.join(dataset.labels)}, in an order of your choice")


# --- finding the layout --------------------------------------------------------------------------------------------


def locate(dataset: Published, one: InputConfig) -> list[Found]:
    """What an input of this dataset stands for, in all its places.

    Raises ``UserError`` that says what was looked for.
    """
    places = [one.model_copy(update={"path": path, "also": []}) for path in (one.path, *one.also)]
    found = [part for place in places for part in _locate(dataset, place)]
    if not found:
        where, asked = " and ".join(place.path for place in places), ", ".join(one.languages or ())
        every = [part for place in places for part in _locate(dataset, place.model_copy(update={"languages": None}))]
        has = ", ".join(sorted({name for part in every for name in part.input.languages or part.input.subsets}))
        raise UserError(f"data.inputs.path: {where}: {dataset.name} is here in {has}, and not in {asked}")
    return found


def _locate(dataset: Published, one: InputConfig) -> list[Found]:
    """The same in one place, which may be in other languages than those that are asked for."""
    path = Path(one.located())
    if path.is_dir():
        return _saved(dataset, one, path) or _in_folder(dataset, one, path)
    if path.exists() or set(one.path) & set("{*?["):
        return [_by_name(dataset, one)]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", one.path):
        return _on_hub(dataset, one)
    raise UserError(
        f"data.inputs.path: {one.path}: no such file or folder (relative to {Path.cwd()}), and no name on the hub, "
        "which is owner/name; correct the path"
    )


def _part_of(dataset: Published, one: InputConfig) -> str:
    """Which part is asked for, in our names."""
    asked = one.hub_split or ("test" if one.split == "test" else "")
    if asked in PART_NAMES:
        return PART_NAMES[asked]
    said = f"{asked!r} is no part of {dataset.name}" if asked else f"which part of {dataset.name} is not said"
    raise UserError(f"data.inputs.hub_split: {one.path}: {said}; set it to one of {', '.join(PARTS)}")


def _on_hub(dataset: Published, one: InputConfig) -> list[Found]:
    """A configuration for each language; nothing if none is asked for that is there."""
    part = _part_of(dataset, one)
    subsets = dict(dataset.hub_subsets.get(one.path.rpartition("/")[2], {}))
    if not subsets:
        elsewhere = {language for found in dataset.hub_subsets.values() for language in found}
        every = dataset.languages if isinstance(dataset.languages, tuple) else None
        if every is None and one.languages is None:
            every = tuple(hub.languages_on_hub(one))
        names = one.languages or every or ()
        subsets = {name: name for name in names if dataset.has_language(name) and name not in elsewhere}
        if not subsets and not elsewhere:
            said = f"none of {', '.join(one.languages)} is" if one.languages else "the hub does not say what is"
            raise UserError(f"data.languages: {said} a language of {dataset.name}; list some of its languages")
    wanted = {name: subset for name, subset in subsets.items() if one.languages is None or name in one.languages}
    return [_hub_input(dataset, one, part, wanted, dataset.hub_columns)] if wanted else []


def _hub_input(
    dataset: Published, one: InputConfig, part: str, subsets: dict[str, str], columns: Mapping[str, Any]
) -> Found:
    name = dataset.hub_parts.get(part, part)
    update = {"subsets": subsets, "hub_split": name, "columns": ColumnsConfig(**columns)}
    return Found("hub", one.model_copy(update=update), part)


def _saved(dataset: Published, one: InputConfig, path: Path) -> list[Found]:
    """What ``save_to_disk`` wrote: a dataset with all languages in a row, or one in each of its folders."""
    if (path / "dataset_dict.json").exists():
        return [_hub_input(dataset, one, _part_of(dataset, one), {}, {**dataset.hub_columns, "language": None})]
    folders = sorted(
        file.parent.name for file in path.glob("*/dataset_dict.json") if dataset.has_language(file.parent.name)
    )
    others = [one for one in path.iterdir() if one.is_dir() and dataset.has_language(one.name)] if folders else []
    if lacking := sorted(one for one in others if one.name not in folders):
        raise UserError(
            f"{lacking[0]}: holds no dataset_dict.json, as {folders[0]} does; restore it, or remove the folder"
        )
    wanted = {name: name for name in sorted(folders) if one.languages is None or name in one.languages}
    return [_hub_input(dataset, one, _part_of(dataset, one), wanted, dataset.hub_columns)] if wanted else []


def _in_folder(dataset: Published, one: InputConfig, root: Path) -> list[Found]:
    part = _part_of(dataset, one)
    others: list[str] = []  # files that have the names of a layout, and other columns
    for depth in range(MAX_DEPTH + 1):
        for layout in dataset.layouts:
            bases = _bases(dataset, layout, root, part, depth, one.languages)
            fitting = {base: names for base, names in bases.items() if _fits(dataset, layout, _first(names), others)}
            if len(fitting) > 1:
                several = ", ".join(sorted(fitting))
                raise UserError(
                    f"data.inputs.path: {one.path}: {dataset.name} is in more than one folder ({several}); name one"
                )
            if fitting:
                ((base, names),) = fitting.items()
                return _found_in(dataset, one, layout, part, Path(base), names)
    raise UserError(f"data.inputs.path: {one.path}: {_unknown(dataset, part, others)}")


def _bases(
    dataset: Published, layout: Layout, root: Path, part: str, depth: int, languages: Collection[str] | None
) -> dict[str, dict[str, dict[str, Path]]]:
    """Folder -> pattern -> language -> a file of that pattern below the folder; the language is empty if files have
    none. Raises ``UserError`` for one of ``languages`` (None: all) that is no file."""
    found: dict[str, dict[str, dict[str, Path]]] = {}
    for pattern in _patterns(layout, part):
        matcher = re.compile(f"(?P<base>(?:[^/]+/){{{depth}}})" + _regex(dataset, pattern))
        names = glob.escape(str(root)) + "/" + "*/" * depth + pattern.replace("{language}", "*")
        for name in sorted(glob.glob(names)):  # noqa: PTH207 (may be absolute)
            match = matcher.fullmatch(Path(name).relative_to(root).as_posix())
            if match is None:
                continue
            language = match.groupdict().get("language") or ""
            if languages is None or language in ("", *languages):  # of others nobody misses a file
                check_file(name, "data.inputs.path")
            if Path(name).is_file():
                below = found.setdefault(str(root / match["base"]), {}).setdefault(pattern, {})
                below.setdefault(language, Path(name))
    return found


def _patterns(layout: Layout, part: str) -> Iterator[str]:
    for path in layout.paths:
        pattern = path.replace("{part}", layout.parts.get(part, part))
        yield pattern
        if not pattern.endswith(".parquet"):
            yield f"{pattern}.gz"


def _regex(dataset: Published, pattern: str) -> str:
    """A layout's pattern as a regular expression with the group ``language``, which may be a literal ``{language}``."""
    known = dataset.languages
    names = "|".join(map(re.escape, known)) if isinstance(known, tuple) else known.pattern
    escaped = re.escape(pattern).replace(r"\*", "[^/]*")
    before, *others = escaped.split(r"\{language\}")
    if not others:
        return escaped
    return before + rf"(?P<language>{names}|\{{language\}})" + "(?P<again>(?P=language))".join(others)


def _first(names: dict[str, dict[str, Path]]) -> Path:
    return next(path for by_language in names.values() for path in by_language.values())


def _found_in(
    dataset: Published, one: InputConfig, layout: Layout, part: str, base: Path, names: dict[str, dict[str, Path]]
) -> list[Found]:
    """An input for each pattern that has languages of its own."""
    found: list[Found] = []
    seen: set[str] = set()
    for pattern, by_language in names.items():
        languages = [name for name in by_language if name not in seen]
        seen |= by_language.keys()
        if "{language}" not in pattern:
            return [_input(one, layout, part, f"{glob.escape(str(base))}/{pattern}", one.languages)]
        wanted = [name for name in languages if one.languages is None or name in one.languages]
        if wanted:
            found.append(_input(one, layout, part, f"{glob.escape(str(base))}/{pattern}", wanted))
    return found


def _input(one: InputConfig, layout: Layout, part: str, path: str, languages: list[str] | None) -> Found:
    name = path.removesuffix(".gz")
    reader = "jsonl" if name.endswith(".jsonl") else "table"
    columns = ColumnsConfig(**layout.columns)
    update = {"path": path, "columns": columns, "languages": languages, "hub_split": None}
    if reader == "table":
        update |= {"header": list(layout.header), "quoting": layout.quoting}
    return Found(reader, one.model_copy(update=update), part, layout.language or None)


def _by_name(dataset: Published, one: InputConfig) -> Found:
    """A file, or a pattern of files, that has the name that a layout gives it. What it holds may be any part."""
    located = Path(one.located()).as_posix()
    others: list[str] = []
    for layout in dataset.layouts:
        for part in PARTS:
            for pattern in _patterns(layout, part):
                match = re.fullmatch(f"(?P<base>(?:.*/)?){_regex(dataset, pattern)}", located)
                if match is None:
                    continue
                if one.hub_split is not None and _part_of(dataset, one) != part:
                    raise UserError(f"data.inputs.hub_split: {one.path} is part {part}, not {one.hub_split}; remove it")
                language = match.groupdict().get("language")
                path, languages = located, one.languages
                if language is not None and language != "{language}":
                    path, languages = _with_language_open(located, match, language), [language]
                found = _input(one, layout, part, path, languages)
                if _fits(dataset, layout, files_of(found)[0], others):
                    return found
    raise UserError(f"data.inputs.path: {one.path}: {_unknown(dataset, '{part}', others)}")


def _with_language_open(path: str, match: "re.Match[str]", language: str) -> str:
    """The path of one language's file as a pattern that names its language, which is how files say it."""
    places = sorted(match.span(name) for name in match.re.groupindex if name in ("language", "again"))
    ends = [0, *(stop for _, stop in places)]
    parts = [path[end:start] for end, (start, _) in zip(ends, places, strict=False)]
    return "".join(glob.escape(part) + "{language}" for part in parts) + glob.escape(path[ends[-1] :])


# --- does a file fit? ----------------------------------------------------------------------------------------------


def _fits(dataset: Published, layout: Layout, path: Path, others: list[str]) -> bool:
    """Whether a file has the columns of a layout; if not, they are noted."""
    found = _columns_of(path)
    columns = ColumnsConfig(**layout.columns)
    if layout.header:
        label = found[layout.header.index(str(columns.label))] if len(found) == len(layout.header) else None
        return label in {*dataset.labels, *dataset.spellings, *dataset.no_label}
    needed = {columns.fields.get(name, name) for name in dataset.fields} | {columns.label, columns.id, columns.unit}
    if layout.language == "" and not any("{language}" in name for name in layout.paths):
        needed.add(columns.language)
    if needed - {None} <= set(found):
        return True
    note = f"{path} has the columns {shorten(', '.join(found))}"
    others += [note] if note not in others else []
    return False


def _columns_of(path: Path) -> list[str]:
    """Names of a file's columns: of Parquet its schema's, of JSONL the first line's keys, of others the first line."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return list(pyarrow.parquet.read_schema(path).names)
        except (OSError, pyarrow.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: cannot be read as Parquet ({reason}); restore the file") from None
    with open_bytes(path) as file:
        line = next((line for line in file if line.strip()), b"")
    check_encoding(path, line)
    text = line.decode("utf-8-sig", "replace").rstrip("\r\n")
    if not text:
        raise UserError(f"{path}: holds nothing; restore the file")
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            return []
        return list(record) if isinstance(record, dict) else []
    return [cell.strip('"') for cell in text.split(tables.delimiter_of(path))]


def _unknown(dataset: Published, part: str, others: list[str]) -> str:
    if others:
        return f"{others[0]}, which {dataset.name} has in none of its layouts; compare docs/data.md"
    forms = dict.fromkeys(name for layout in dataset.layouts for name in _patterns(layout, part) if ".gz" not in name)
    return (
        f"no file of {dataset.name} is here, part {part}, under any name that it is published with "
        f"({', '.join(forms)}); correct the path or hub_split"
    )
