"""What a model's tokenizer makes of the texts: how much of each language is cut and how much is unknown, and limits.

Neither ends a run by itself: a language that the vocabulary lacks is a row of unknown tokens, and a prompt whose texts
are cut to a few words still has an answer. The counts stand in the manifest of the scores and in the report.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alsace_dist.config import Config, Section
from alsace_dist.config_file import validate
from alsace_dist.data.rows import EncodedRow, Row, rows_of
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import RERUN
from alsace_dist.files.scores import read_metadata
from alsace_dist.files.shards import Dataset, Number, read_shard
from alsace_dist.reading import parse_json

TEXTS = "texts"  # where the counts stand, in a score file's metadata and in the manifest of the scores
NOTABLE = 0.01  # share from which people are warned
MIN_ROWS = 20  # of fewer rows a share says little
MOST_GROUPS = 1000  # that are looked at for languages of which there is little


class TextCounts(Section):
    """Rows of a language, the tokens of their prompts, unknown tokens among those, and prompts whose texts were cut."""

    num_rows: Number = 0
    num_tokens: Number = 0
    num_unknown: Number = 0
    num_cut: Number = 0

    @property
    def unknown(self) -> float:
        """Share of the tokens that are unknown."""
        return self.num_unknown / max(1, self.num_tokens)

    @property
    def cut(self) -> float:
        """Share of the prompts that were cut."""
        return self.num_cut / max(1, self.num_rows)

    def __add__(self, other: "TextCounts") -> "TextCounts":
        return TextCounts(**{name: getattr(self, name) + getattr(other, name) for name in TextCounts.model_fields})


def count(rows: Iterable[EncodedRow]) -> dict[str, TextCounts]:
    """Language -> counts of encoded rows."""
    return total(
        {
            row.language: TextCounts(
                num_rows=1, num_tokens=len(row.input_ids), num_unknown=row.num_unknown, num_cut=int(row.is_cut)
            )
        }
        for row in rows
    )


def total(parts: Iterable[Mapping[str, TextCounts]]) -> dict[str, TextCounts]:
    """Counts added up by language."""
    added: dict[str, TextCounts] = {}
    for part in parts:
        for language, counts in part.items():
            added[language] = added.get(language, TextCounts()) + counts
    return dict(sorted(added.items()))


def check_texts(
    encode: Callable[[Sequence[Row]], list[EncodedRow]], dataset: Dataset, languages: Iterable[str], config: Config
) -> None:
    """Look at the first shards of a dataset before hours of work, until there are some rows of each language.
    ``encode``: of the model's family.

    Raises ``UserError`` if more of a language is unknown to the model, or more of its prompts are cut, than the limits
    allow.
    """
    names, found, num_groups = list(languages), dict[str, TextCounts](), 0
    for shard in dataset.shards:
        if num_groups >= MOST_GROUPS or all(name in found and found[name].num_rows >= MIN_ROWS for name in names):
            break
        found = total([found, count(encode(rows_of(config.task, read_shard(dataset, shard), names)))])
        num_groups += shard.num_groups
    for language, counts in found.items():
        if counts.num_rows < MIN_ROWS:
            continue
        where = f"{dataset.url}: {language}"
        if counts.unknown > config.data.max_unknown:
            raise UserError(
                f"{where}: {counts.unknown:.0%} of the tokens are unknown to the model, more than data.max_unknown "
                f"({config.data.max_unknown:.0%}); leave the language out of data.languages, or raise the limit"
            )
        if counts.cut > config.data.max_cut:
            raise UserError(
                f"{where}: the texts of {counts.cut:.0%} of the prompts are cut, more than data.max_cut "
                f"({config.data.max_cut:.0%}); raise task.max_tokens ({config.task.max_tokens}), or the limit"
            )


def read_texts(path: Path) -> dict[str, TextCounts]:
    """The counts in a score file's metadata. Raises ``UserError`` if there are none that can be read."""
    text = (read_metadata(path) or {}).get(TEXTS, "")
    return parse_texts(parse_json(text, f"{path}: {TEXTS}: ", RERUN), path)


def parse_texts(value: Any, path: Path) -> dict[str, TextCounts]:
    """Language -> counts, from JSON. Raises ``UserError`` that names ``path`` if it is something else."""
    if not isinstance(value, dict):
        raise UserError(f"{path}: {TEXTS}: is no mapping of languages to counts; {RERUN}")
    return {language: validate(TextCounts, counts, f"{path}: {TEXTS}: ", RERUN) for language, counts in value.items()}


def lines(counts: Mapping[str, TextCounts]) -> list[str]:
    """What stands out, a line a language."""
    shown = []
    for language, one in counts.items():
        if one.unknown > NOTABLE:
            shown.append(f"{language}: {one.unknown:.1%} of its tokens are unknown to the model")
        if one.cut > NOTABLE:
            shown.append(f"{language}: {one.num_cut:,} of {one.num_rows:,} prompts were cut at task.max_tokens")
    return shown
