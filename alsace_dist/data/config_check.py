"""Whether config and data fit together: what would fail, or be ignored, hours later is refused before anything runs."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from alsace_dist.config import Config
from alsace_dist.config_file import variant
from alsace_dist.errors import UserError
from alsace_dist.files.layout import data_url
from alsace_dist.files.shards import Dataset, ParallelGroup, open_dataset
from alsace_dist.tasks.base import for_language


def check_prepared(config: Config) -> None:
    """Open the datasets of ``data.directory`` and check them. Raises ``UserError`` as ``check_datasets`` does."""
    splits = ["unlabeled", "test"] + ["labeled"] * bool(config.finetune)
    check_datasets(config, {split: open_dataset(data_url(config, split)) for split in splits})


def check_datasets(config: Config, datasets: Mapping[str, Dataset]) -> None:
    """``datasets``: by split. Raises ``UserError`` if one has other labels than the task, or as ``check_languages``."""
    for split, dataset in datasets.items():
        if split != "pretrain" and list(dataset.labels) != config.task.labels:  # shards hold labels as numbers
            has, wants = ", ".join(dataset.labels), ", ".join(config.task.labels)
            raise UserError(f"task.labels: split {split} was prepared with {has}, in this order, not with {wants}")
    check_languages(config, {split: dataset.languages for split, dataset in datasets.items()})


def check_calibration(config: Config, unlabeled: Iterable[ParallelGroup]) -> None:
    """Raises ``UserError`` if biases of places are wanted where groups have different numbers of candidates."""
    sizes = {
        len(own) for group in unlabeled for language, own in group.candidates.items() if language not in group.apart
    }
    if len(sizes) < 2:
        return
    for name in ("", *config.variants):
        if (variant(config, name) if name else config).select.calibration == "marginal":
            where = f"variants.{name}.select" if name else "select"
            raise UserError(
                f"{where}.calibration: marginal needs the same number of candidates in all groups, and those of split "
                f"unlabeled have {min(sizes)} to {max(sizes)}; set it to none"
            )


def check_languages(config: Config, languages: Mapping[str, Collection[str]]) -> None:
    """Refuse now what would fail, or be ignored, hours later.

    ``languages``: split -> the languages it has. Raises ``UserError`` if a split lacks the source language, a language
    has no template or verbalizers, these name a language that no split has, or a selection rule cannot be met.
    """
    task, source = config.task, config.data.source_language
    answered = {split: set(found) for split, found in languages.items() if split != "pretrain"}
    for split, found in answered.items():
        if source not in found:
            names = ", ".join(sorted(found))
            raise UserError(
                f"data.source_language: split {split} has nothing in {source!r} (it has {names}); correct it"
            )
    every = set().union(*answered.values())
    if not every:
        return
    texts: dict[str, dict[str, Any]] = {"template": {**task.templates()}}
    if task.answers():
        texts["verbalizers"] = {**task.answers()}
    if task.words:
        texts["words"] = {**task.words_of()}
    for name, keys in texts.items():
        for language in sorted(every):
            for_language(keys, language, name)
        unknown = sorted(keys.keys() - every - {"default"})
        # With data.languages some templates are not needed, and a dataset's own prompts are for all of its languages.
        if unknown and config.data.languages is None and not task.prompts:
            raise UserError(f"task.{name}.{unknown[0]}: no split has that language; correct or remove it")
    for name in ("", *config.variants):
        section = (variant(config, name) if name else config).select
        where = f"variants.{name}.select" if name else "select"
        scored = answered.get("unlabeled", every)
        if unknown := sorted(set(section.teachers) - scored):
            names = ", ".join(sorted(scored))
            raise UserError(f"{where}.teachers: {unknown[0]!r} is not among the unlabeled languages {names}; remove it")
        if (section.top_k or 0) > len(scored):
            raise UserError(f"{where}.top_k: {section.top_k} asked for, there are {len(scored)} languages; lower it")
