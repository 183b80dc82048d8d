"""The split ``dev``: groups on which a model is looked at while it is trained, if the data has any."""

from collections.abc import Sequence
from typing import Any

from alsace_dist.config import Config, Split, TaskTrainConfig
from alsace_dist.data.rows import EncodedRow, Row, comparable_groups, rows_of
from alsace_dist.errors import NotReady, UserError
from alsace_dist.files.shards import Dataset, ParallelGroup, open_split, read_shard

DEV: Split = "dev"


def open_dev(config: Config, section: TaskTrainConfig) -> Dataset:
    """The split. Raises ``NotReady`` if there is none, with what wants it."""
    try:
        return open_split(config, DEV)
    except NotReady:
        if section.patience is None:
            raise
        raise NotReady(
            "patience: needs a split dev, which the data lacks; give it some groups (data.splits), or leave patience "
            "out"
        ) from None


def watched_languages(config: Config, section: TaskTrainConfig) -> list[str]:
    """Languages of the split that the run has; none without the split, or ``NotReady`` if training is to stop by it."""
    try:
        found = open_dev(config, section)
    except NotReady:
        if section.patience is not None:
            raise
        return []
    wanted = config.data.languages
    return [language for language in found.languages if wanted is None or language in wanted]


def watched_rows(config: Config, section: TaskTrainConfig) -> list[Row]:
    """Rows of the first ``evaluate_groups`` groups; none without the split.

    Raises ``UserError`` if training is to stop by accuracy and none has a label, or by votes where there are none.
    """
    if not (languages := watched_languages(config, section)) and section.patience is None:
        return []
    dataset, groups = open_dev(config, section), list[ParallelGroup]()
    for shard in dataset.shards:
        groups += read_shard(dataset, shard) if len(groups) < section.evaluate_groups else ()
    rows = rows_of(config.task, groups[: section.evaluate_groups], languages)
    if section.patience is None:
        return rows
    if section.best_by == "accuracy" and all(row.label is None for row in rows):
        raise UserError(
            f"{dataset.url}: has no labels, which patience looks at; prepare the data again, with labels, or set "
            "best_by: vote_agreement"
        )
    if section.best_by == "vote_agreement" and not voting_groups(rows):
        raise UserError(
            f"{dataset.url}: has no group with the same candidates in two languages, so that there is no vote; set "
            "best_by: accuracy"
        )
    return rows


def voting_groups(rows: Sequence[Row] | Sequence[EncodedRow]) -> list[dict[str, int]]:
    """Language -> index of its row, of each group that can vote: alone a language is its own vote."""
    return [group for group in comparable_groups(rows, range(len(rows))).values() if len(group) > 1]


def stopping_fingerprint(config: Config, section: TaskTrainConfig) -> dict[str, Any]:
    """When training stops early, and on which data that depends; nothing where it does not."""
    if section.patience is None:
        return {}
    keys = ("patience", "best_by", "evaluate_every_steps", "evaluate_groups")
    return {"stopping": {key: getattr(section, key) for key in keys} | {"data": open_dev(config, section).digest}}
