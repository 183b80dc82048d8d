"""Hugging Face datasets: from the hub, from a local folder, or as ``save_to_disk`` wrote them."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alsace_dist.config import InputConfig, TaskConfig
from alsace_dist.data.records import RecordRow, input_files
from alsace_dist.data.tables import ROW_NUMBER, cells_of_tables, row_of_cells, wanted_columns
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


def read_huggingface(one: InputConfig, task: TaskConfig) -> Iterator[RecordRow]:
    """Rows of a dataset in long form, or of one dataset per language that are joined by id or row number."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    subsets: Mapping[Any, str | None] = one.subsets or {None: None}
    # Ids hold the name of a directory but not its path, so that they stay the same when it is moved.
    name = Path(one.path).resolve().name if Path(one.path).exists() else one.path
    loaded = {language: _load_dataset(one, name) for language, name in subsets.items()}
    if len({one.columns.id in dataset.column_names for dataset in loaded.values()}) > 1:
        raise UserError(f"{one.path}: only some subsets have the id column {one.columns.id!r}; set columns.id")
    for language, dataset in loaded.items():
        where = one.path if language is None else f"{one.path}[{subsets[language]}]"
        with_id = one.columns.id in dataset.column_names
        num_rows = {len(other) for other in loaded.values()}
        if not with_id and len(num_rows) > 1:
            raise UserError(f"{one.path}: subsets of {sorted(num_rows)} rows need an id column to join them by")
        wanted = wanted_columns(where, dataset.column_names, one, task, language is None, with_id)
        label = dataset.features.get(one.columns.label)
        has_names = isinstance(label, datasets.ClassLabel) and set(label.names) & set(task.labels)
        names = label.names if has_names else []
        tables = dataset.select_columns(wanted).with_format("arrow").iter(1000)
        for place, cells in cells_of_tables(tables, where):
            # Row numbers alone would collide: the splits of one dataset are different inputs.
            cells.setdefault(one.columns.id or ROW_NUMBER, f"{name}/{one.hub_split or 'train'}/{place.number}")
            named = cells[one.columns.language] if language is None else language
            row = row_of_cells(place, cells, one, task, named)
            yield row._replace(label=_class_name(row.label, names)) if isinstance(label, datasets.ClassLabel) else row


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
    try:
        if (directory / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(directory))[split]
        if (directory / "state.json").exists():
            return datasets.load_from_disk(str(directory))
        return datasets.load_dataset(one.path, name, split=split, revision=one.revision)
    except Exception as error:  # datasets hands on whatever its many back ends raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = "check path, subsets, hub_split and the network, or fetch it beforehand and give the local path"
        raise UserError(f"data.inputs.path: {one.path}: cannot be loaded ({reason}); {remedy}") from error
