"""What a model will read: for every language of the prepared data, one prompt with its candidates, as text."""

from collections.abc import Iterator

from alsace_dist.config import Config
from alsace_dist.data.rows import Row, rows_of
from alsace_dist.errors import NotReady
from alsace_dist.files.layout import data_url
from alsace_dist.files.shards import Dataset, ParallelGroup, golds, open_dataset, read_shard

SPLITS = ("test", "unlabeled", "labeled")


def prompts(config: Config) -> Iterator[str]:
    """Lines for people, some for each language in alphabetical order.

    Languages are shown in as few groups as there are, so that they can be compared. Raises ``NotReady`` if no data is
    prepared.
    """
    datasets = dict(_datasets(config))
    missing = {language for dataset in datasets.values() for language in dataset.languages}
    shown: dict[str, tuple[str, Row]] = {}
    for split, dataset in datasets.items():
        while missing & set(dataset.languages):
            group = _richest(dataset, missing)
            for row in rows_of(config.task, [group], missing):
                shown[row.language] = (split, row)
            missing -= group.texts.keys()
    for language, (split, row) in sorted(shown.items()):
        yield f"{language}: {split}, {row.key}"
        yield "  " + "".join(part.content for part in row.prompt).replace("\n", "\n  ")
        prefix = f"{config.task.decoder_prefix} " if config.task.decoder_prefix else ""
        yield from (
            f"    {prefix}{candidate}{'  (right)' if number in golds(row.label) else ''}"
            for number, candidate in enumerate(row.candidates)
        )


def _datasets(config: Config) -> Iterator[tuple[str, Dataset]]:
    found = 0
    for split in SPLITS:
        try:
            yield split, open_dataset(data_url(config, split))
            found += 1
        except NotReady as error:
            missing = error
    if not found:
        raise missing


def _richest(dataset: Dataset, languages: set[str]) -> ParallelGroup:
    """The first group, in the first shard that has any of the languages, that has most of them."""
    shard = next(shard for shard in dataset.shards if languages & shard.num_examples.keys())
    return max(read_shard(dataset, shard), key=lambda group: len(languages & group.texts.keys()))
