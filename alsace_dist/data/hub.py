"""Hugging Face datasets: from the hub, from a local folder, or as ``save_to_disk`` wrote them."""

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alsace_dist.config import InputConfig, TaskConfig
from alsace_dist.data.columns import Cells, records_of_cells, wanted_columns
from alsace_dist.data.records import BadRecords, Place, RecordRow, input_files, key_of
from alsace_dist.data.tables import UNREADABLE, cells_of_tables
from alsace_dist.errors import UserError


def is_on_hub(one: InputConfig) -> bool:
    """Whether an input's path names a dataset on the hub: there is no such file or folder here."""
    return not Path(one.path).exists()


def local_files(one: InputConfig) -> list[Path]:
    """The files below a local folder, or the one file; none for a dataset on the hub."""
    path = Path(one.path)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [] if is_on_hub(one) else input_files(one)


def read_huggingface(one: InputConfig, task: TaskConfig, bad: BadRecords) -> Iterator[RecordRow]:
    """Rows of a dataset in long form, of one with all languages in a row, or of one dataset per language, which are
    joined by id or row number."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    subsets: Mapping[Any, str | None] = one.subsets or {None: None}
    if one.subsets and one.languages is not None and one.columns.language is not None:
        subsets = {language: name for language, name in one.subsets.items() if language in one.languages}
    # Ids hold the name of a directory but not its path, so that they stay the same when it is moved.
    name = Path(one.path).resolve().name if Path(one.path).exists() else one.path
    loaded = {language: _load_dataset(one, name) for language, name in subsets.items()}
    if len({one.columns.id in dataset.column_names for dataset in loaded.values()}) > 1:
        raise UserError(f"{one.path}: only some subsets have the id column {one.columns.id!r}; set columns.id")
    for subset, dataset in loaded.items():
        where = one.path if subset is None else f"{one.path}[{subsets[subset]}]"
        language = None if one.columns.language is None else subset
        with_id = one.columns.id in dataset.column_names
        num_rows = {len(other) for other in loaded.values()}
        if not with_id and len(num_rows) > 1:
            raise UserError(f"{one.path}: subsets of {sorted(num_rows)} rows need an id column to join them by")
        wanted = wanted_columns(where, dataset.column_names, one, task, language is None, with_id)
        label = dataset.features.get(one.columns.label)
        has_names = isinstance(label, datasets.ClassLabel) and set(label.names) & set(task.labels)
        names = label.names if has_names else []
        tables = dataset.select_columns(wanted).with_format("arrow").iter(1000)
        for place, cells in _readable(cells_of_tables(tables, where), where):
            # Row numbers alone would collide: the splits of one dataset are different inputs.
            number = f"{name}/{one.hub_split or 'train'}/{place.number}"
            key = key_of(cells[one.columns.id]) if with_id and one.columns.id is not None else number
            named = cells[one.columns.language] if language is None and one.columns.language is not None else language
            if isinstance(label, datasets.ClassLabel) and one.columns.label is not None:
                cells[one.columns.label] = _class_name(cells[one.columns.label], names)
            yield from records_of_cells(place, key, cells, one, task, named, bad)


def _readable(rows: Iterator[tuple[Place, Cells]], where: str) -> Iterator[tuple[Place, Cells]]:
    try:
        yield from rows
    except UNREADABLE as error:
        raise UserError(f"{where}: cannot be read ({' '.join(str(error).split())}); restore the dataset") from None


def languages_on_hub(one: InputConfig) -> list[str]:
    """The names of a dataset's configurations on the hub. Raises ``UserError`` if it cannot be reached."""
    import datasets

    _check_name(one.path)
    _ask_hub_once(one)
    try:
        return list(datasets.get_dataset_config_names(one.path, revision=one.revision))
    except Exception as error:  # datasets hands on whatever its many back ends raise
        raise _cannot_be_loaded(one, error) from error


def _class_name(number: int | None, names: list[str]) -> str | int | None:
    """The name of a numbered class if the task uses the names, else its number; -1 means no label, by custom."""
    if number is None or number < 0:
        return None
    return names[number] if number < len(names) else number


def _load_dataset(one: InputConfig, name: str | None) -> Any:
    """One split of a dataset from the hub, a local folder, or what ``save_to_disk`` wrote there."""
    import datasets

    directory, split = Path(one.path, name or ""), one.hub_split or "train"
    if one.hub_split and (directory / "state.json").exists():
        raise UserError(f"{directory}: is a single split, there is no {one.hub_split!r} to choose; remove hub_split")
    if one.revision and Path(one.path).exists():
        raise UserError(f"{one.path}: is here, and has no revision {one.revision!r}; remove revision")
    if is_on_hub(one):
        _check_name(one.path)
        _ask_hub_once(one)
    try:
        if (directory / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(directory))
            if split not in found:
                raise UserError(f"{directory}: has no split {split!r}; set hub_split to one of {', '.join(found)}")
            return found[split]
        if (directory / "state.json").exists():
            return datasets.load_from_disk(str(directory))
        return datasets.load_dataset(one.path, name, split=split, revision=one.revision)
    except UserError:
        raise
    except Exception as error:  # datasets hands on whatever its many back ends raise
        raise _cannot_be_loaded(one, error) from error


def _cannot_be_loaded(one: InputConfig, error: Exception) -> UserError:
    import datasets

    if isinstance(error, OSError) and error.filename and error.strerror:
        place, cache = Path(str(error.filename)), Path(datasets.config.HF_DATASETS_CACHE)
        if place.is_relative_to(cache) or cache.is_relative_to(place):
            return UserError(
                f"{place}: {error.strerror}: `datasets` keeps its cache in {cache}; set HF_HOME to a directory "
                "that can be written"
            )
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    remedy = "check path, subsets, hub_split and the network, or fetch it beforehand and give the local path"
    return UserError(f"data.inputs.path: {one.path}: cannot be loaded ({reason}); {remedy}")


def _check_name(path: str) -> None:
    """Raises ``UserError`` for what names neither a folder nor a dataset. Names without an owner would do worse: under
    json, text, parquet and their like ``datasets`` reads whatever files lie in the working directory."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise UserError(
            f"data.inputs.path: {path}: no such file or folder, and no name on the hub, which is owner/name such as "
            "facebook/xnli; files of your own are kind: jsonl or table"
        )


def _ask_hub_once(one: InputConfig) -> None:
    """If the hub cannot be reached, take what is in the cache: the client would ask again for half a minute and print
    every try."""
    import datasets
    from huggingface_hub import HfApi, constants, errors

    try:
        HfApi().dataset_info(one.path, revision=one.revision, timeout=20)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        pass  # the hub has answered, and loading says the same with a reason
    except Exception:  # no network, a proxy, offline mode: the client raises dozens of kinds
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
