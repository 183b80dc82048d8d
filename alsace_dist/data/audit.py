"""The audit of prepared data: what became of the inputs, for people to see and for limits that stop a run.

A run on data that is quietly thinner than it looks ends without an error and with wrong conclusions: ids that do not
join, so that no group is parallel; a language under two names; bad records of one class left out. What is found is kept
in the manifest of the prepared data and shown by stage *prepare* and the report.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alsace_dist.config import Config
from alsace_dist.errors import UserError
from alsace_dist.files.shards import Audit, ParallelGroup, SplitCounts

# Splits in which a group of one language is of little use: nobody can teach or be compared in it.
PARALLEL_SPLITS = ("unlabeled", "dev", "test")
RARE_LABEL = 0.02  # share of an input's records


def audit(parts: Mapping[str, Sequence[ParallelGroup]], labels: Sequence[str]) -> Audit:
    """What the splits hold, split -> groups."""
    found = {split: _audit_split(groups, labels) for split, groups in parts.items()}
    splits_of: dict[str, list[str]] = defaultdict(list)
    for split, counts in found.items():
        for language in counts.rows:
            splits_of[language].append(split)
    expected = [split for split in PARALLEL_SPLITS if split in parts]
    alone = {
        language: splits[0]
        for language, splits in splits_of.items()
        if len(expected) > 1 and len([split for split in splits if split in expected]) == 1
    }
    return Audit(splits=found, only_in_one_split=dict(sorted(alone.items())))


def _audit_split(groups: Sequence[ParallelGroup], labels: Sequence[str]) -> SplitCounts:
    sizes = Counter(len(group.texts) for group in groups)
    rows = Counter(language for group in groups for language in group.texts)
    by_label: dict[str, Counter[str]] = defaultdict(Counter)
    for group in groups:
        if isinstance(group.label, int) and labels:
            for language in group.texts:
                by_label[language][labels[group.label]] += 1
    apart = Counter(language for group in groups for language in group.apart)
    return SplitCounts(
        num_groups=len(groups),
        languages_per_group={str(size): sizes[size] for size in sorted(sizes)},
        rows=dict(sorted(rows.items())),
        labels={language: dict(sorted(counts.items())) for language, counts in sorted(by_label.items())},
        apart=dict(sorted(apart.items())),
    )


def check_audit(found: Audit, config: Config) -> None:
    """Raises ``UserError`` if the groups of a split are hardly parallel: their ids do not join."""
    for split in PARALLEL_SPLITS:
        counts = found.splits.get(split)
        if counts is None or len(counts.rows) < 2:
            continue
        sizes = {int(size): number for size, number in counts.languages_per_group.items()}
        parallel = sum(number for size, number in sizes.items() if size > 1)
        if parallel < config.data.min_parallel * counts.num_groups:
            shown = ", ".join(f"{number:,} in {size}" for size, number in sizes.items())
            raise UserError(
                f"data.inputs: of the {counts.num_groups:,} groups of split {split} only {parallel:,} are in two "
                f"languages or more ({shown}): do ids differ from language to language? Give translations one id, or "
                "set data.columns.id: null for rows in the same order, or lower data.min_parallel"
            )


def check_spelling(languages: Mapping[str, Iterable[str]]) -> None:
    """Raises ``UserError`` if a language has two names, as zh-CN and zh_CN, de and deu, iw and he.

    ``languages``: split -> names.
    """
    seen: dict[str, tuple[str, str]] = {}
    for split, names in languages.items():
        for name in sorted(names):
            other, where = seen.setdefault(_standard_tag(name), (name, split))
            if other != name:
                raise UserError(
                    f"data.inputs: one language has two names, {other!r} (split {where}) and {name!r} (split {split}); "
                    "spell it one way"
                )


def _standard_tag(name: str) -> str:
    """The BCP 47 tag of a language's name: the two-letter code where there is one, without what goes without saying
    (eng_Latn is en); a name that is no tag as it is, but for capitals and dashes."""
    import langcodes

    try:
        return langcodes.standardize_tag(name)
    except ValueError:
        return name.replace("_", "-").casefold()


@dataclass
class LeftOut:
    """Counts what is no mistake of the person's, and yet not in the data as the inputs have it.

    ``num_missing``: language -> texts that say that there is no translation. ``num_changed``: language -> rows in which
    a field was corrected that all languages share. ``num_no_language``: groups of which
    ``data.languages`` and such texts left nothing. ``num_no_label``: input -> groups that nobody knows the label of.
    ``num_other_unit``: groups of a unit that is in another split.
    """

    num_missing: Counter[str] = field(default_factory=Counter)
    num_changed: Counter[str] = field(default_factory=Counter)
    num_no_language: int = 0
    num_no_label: Counter[str] = field(default_factory=Counter)
    num_other_unit: int = 0

    def details(self) -> dict[str, Any]:
        """As the manifest of prepared data has it."""
        return {
            "num_missing": dict(sorted(self.num_missing.items())),
            "num_changed": dict(sorted(self.num_changed.items())),
            "num_no_language": self.num_no_language,
            "num_no_label": dict(sorted(self.num_no_label.items())),
            "num_other_unit": self.num_other_unit,
        }

    def lines(self) -> list[str]:
        """The same for people: a line for each reason that there is."""
        missing, changed = (
            ", ".join(f"{language} {number:,}" for language, number in sorted(counts.items()))
            for counts in (self.num_missing, self.num_changed)
        )
        return [
            *([f"missing translations: {missing}"] if missing else []),
            *([f"rows changed to what most languages say: {changed}"] if changed else []),
            *(
                f"{where}: {number:,} groups left out, whose label is not known"
                for where, number in self.num_no_label.items()
            ),
            *(
                [f"{self.num_other_unit:,} groups left out, whose unit is in another split"]
                if self.num_other_unit
                else []
            ),
        ]


@dataclass
class Skipped:
    """Counts the records that are good and bad, by what they are part of: an input, a split, a label of either."""

    good: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: Counter[tuple[str, str]] = field(default_factory=Counter)

    def count(self, where: str, label: str, is_good: bool) -> None:
        """A record. ``where``: its input or split; ``label``: as the input spells it, empty without one."""
        counter = self.good if is_good else self.bad
        counter[where, ""] += 1
        if label:
            counter[where, label] += 1

    def check(self, most: float) -> None:
        """Raises ``UserError`` if a larger share than ``most`` of anything was left out.

        A label that few records have, such as the - of MultiNLI where annotators disagreed, may go as a whole.
        """
        for key, bad in sorted(self.bad.items()):
            whole = bad + self.good[key]
            is_rare = key[1] and whole <= RARE_LABEL * (self.bad[key[0], ""] + self.good[key[0], ""])
            if bad > most * whole and not is_rare:
                where, label = key
                what = f"{where}, label {label!r}" if label else where
                raise UserError(
                    f"data.on_bad: skip leaves out {bad:,} of {whole:,} records of {what}, more than data.max_skipped "
                    f"({most:.0%}); mend the inputs, or raise the limit if that is what you want"
                )


def lines(found: Audit) -> list[str]:
    """The audit for people: a line a split, and what stands out."""
    shown = []
    for split, counts in found.splits.items():
        sizes = {int(size): number for size, number in counts.languages_per_group.items()}
        parallel = sum(number for size, number in sizes.items() if size > 1)
        least = min(counts.rows, key=counts.rows.__getitem__, default="")
        text = f"{split}: {counts.num_groups:,} groups in {len(counts.rows)} languages, {parallel:,} parallel"
        shown.append(f"{text}; fewest rows: {least} ({counts.rows.get(least, 0):,})")
        if apart := ", ".join(f"{name} {number:,}" for name, number in counts.apart.items()):
            shown.append(f"{split}: rows whose candidates correspond to no other language's, never distilled: {apart}")
    for language, split in found.only_in_one_split.items():
        shown.append(f"{language}: only in split {split}")
    return shown
