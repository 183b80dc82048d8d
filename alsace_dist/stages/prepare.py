"""Prepare: inputs -> validated, divided shards of parallel groups.

Every record is read before anything is written, so that all that is wrong can be said at once; the groups are
held in memory meanwhile (a few kilobytes each: a million groups of short texts take a few gigabytes).

A record is one group: a line of JSONL, or the rows of a table that share an id. Something wrong in one language
makes the whole record bad: silently thinner groups would bias what is later compared between languages.
"""

import itertools
import sys
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from alsace_dist.config import Config, Split
from alsace_dist.data import audit
from alsace_dist.data.audit import Skipped, check_audit, check_spelling
from alsace_dist.data.config_check import check_languages
from alsace_dist.data.inputs import check_inputs, contents, read_groups
from alsace_dist.data.records import BAD_RECORDS, BadRecords, Place, RecordRow, is_unicode, whole
from alsace_dist.errors import UserError
from alsace_dist.files.layout import DATA
from alsace_dist.files.manifest import MANIFEST, begin, digest_bytes, digest_json, write_manifest
from alsace_dist.files.shards import Dataset, ParallelGroup, write_dataset
from alsace_dist.ranks.group import Ranks
from alsace_dist.stages.base import Output, Stage, only

KIND = DATA
ON_RANKS = False
# Splits take undivided groups in this order, so that asking for more training data leaves the test groups as they are.
SPLITS: tuple[Split, ...] = ("test", "labeled", "unlabeled", "pretrain")
NEED_LABELS: tuple[Split, ...] = ("test", "labeled")


def inputs(stage: Stage) -> list[Output]:
    """None: prepare reads what people bring."""
    return []


def outputs(stage: Stage) -> list[Output]:
    """The directory of all splits."""
    return [Output(stage.layout.data, KIND)]


def fingerprint(stage: Stage, output: Output) -> dict[str, Any]:
    """As ``fingerprint_of``."""
    return fingerprint_of(stage.config)


def run(stage: Stage, ranks: Ranks | None) -> None:
    """Write all splits."""
    prepare(stage.config, only(stage.outputs).directory)


class Entry(NamedTuple):
    """A good group, the split that its input goes to (None: undivided), and where it stands."""

    group: ParallelGroup
    split: Split | None
    place: Place


def fingerprint_of(config: Config) -> dict[str, Any]:
    """What the prepared data depends on: settings and the content of the inputs, as JSON.

    ``data.on_bad`` and the limits are not part of it: data that is complete with bad records left out is data that a
    person has accepted, and later stages need not be told again. Raises ``UserError`` if an input file is missing.
    """
    return {
        "data": config.data.model_dump(mode="json", exclude={"on_bad", "max_skipped", "min_parallel"}),
        "task": {"fields": config.task.fields, "labels": config.task.labels},
        "seed": config.seed,
        "sources": contents(config),
    }


def prepare(config: Config, directory: Path) -> dict[str, Dataset]:
    """Read, validate and divide all inputs; write ``directory/<split>/`` datasets and the manifest of kind "data".

    The first problems go to stderr and all of them to ``bad-records.txt`` beside ``directory``; ``data.on_bad`` decides
    what happens then. Nothing in ``directory`` is touched before all inputs are found good. Whether the output is there
    already is the caller's question (``manifest.is_complete``).

    Raises ``UserError`` for bad records (unless skipped), unreadable inputs, and splits that cannot be filled.
    """
    _check_settings(config)
    identity = fingerprint_of(config)
    bad = BadRecords()
    skipped, num_missing = Skipped(), Counter[str]()
    entries, num_no_language = _read_inputs(config, bad, skipped, num_missing)
    divided = _divide(entries, config)
    parts: dict[str, list[Entry]] = {split: [] for split in divided}
    for split, part in divided.items():
        for entry in part:
            fits = _fits_split(entry, split, config, bad)
            parts[split] += [entry] if fits else []
            skipped.count(f"split {split}", "", fits)
    details = {
        "bad_records": bad.counts(),
        "num_missing": dict(sorted(num_missing.items())),
        "num_no_language": num_no_language,
        "num_left_out": len(entries) - sum(len(part) for part in divided.values()),
    }
    try:
        bad.settle(directory.parent / BAD_RECORDS, config.data.on_bad == "skip")
        skipped.check(config.data.max_skipped)
        _check_parts(parts, entries, config)
        return _write(parts, config, directory, identity, details)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{directory}: cannot be written ({reason}); free space or choose another run_dir") from error


def _check_settings(config: Config) -> None:
    """Refuse settings that would be ignored or cannot be met, before any data is read."""
    check_inputs(config)
    data = config.data
    if data.splits and all(one.split for one in data.inputs):
        raise UserError("data.splits: every input has a split of its own, so nothing is left to divide; remove it")
    for split, amount in data.splits.items():
        if amount >= 1 and amount != int(amount):
            raise UserError(f"data.splits.{split}: {amount} is neither a share below 1 nor a whole number")
    for split in NEED_LABELS:
        if split in data.withhold_labels and split in _wanted_splits(config):
            raise UserError(f"data.withhold_labels: {split} needs its labels; remove it there")
    for number, one in enumerate(data.inputs):
        if unknown := sorted(one.columns.fields.keys() - set(config.task.fields)):
            raise UserError(f"data.inputs.{number}.columns.fields.{unknown[0]}: not one of task.fields; remove it")


def _wanted_splits(config: Config) -> list[Split]:
    own = {one.split for one in config.data.inputs}
    return [split for split in SPLITS if split in own or split in config.data.splits]


# --- reading -------------------------------------------------------------------------------------------------------


def _read_inputs(
    config: Config, bad: BadRecords, skipped: Skipped, num_missing: Counter[str]
) -> tuple[list[Entry], int]:
    """All good groups, and the number of groups of which ``data.languages`` left nothing; the rest goes to ``bad``.

    ``num_missing``: language -> texts that ``data.missing`` says are none; both are counted on the way.
    """
    entries: list[Entry] = []
    num_no_language = 0
    places: dict[str, Place] = {}
    for one in config.data.inputs:
        where, num_problems = f"input {one.path or one.kind}", len(bad.problems)
        for rows in read_groups(one, config, bad):
            present = [row for row in rows if not _is_missing(row, config.data.missing)]
            num_missing.update(str(row.language) for row in rows if row not in present)
            if not present:
                num_no_language += 1
                continue
            rows = present
            group = _check_group(rows, config, bad)
            key, place = rows[0].key, rows[0].place
            label = next((str(row.label) for row in rows if row.label is not None), "")
            skipped.count(where, label, group is not None)
            if key is not None and key in places:
                bad.add(place, "duplicate id", f"id {_show(key)} is at {places[key]} already")
                continue
            if key is not None:
                places[key] = place
            if (
                key in bad.broken_keys
            ):  # a row of the group was unreadable, so that a language may be missing: leave it out
                continue
            if group is not None and not group.texts:
                num_no_language += 1
            elif group is not None:
                entries.append(Entry(group, one.split, place))
        # Lines that could not be read have made no rows, and are counted by their places.
        num_places = len({place for place, _, _ in bad.problems[num_problems:]})
        skipped.bad[where, ""] = max(skipped.bad[where, ""], num_places)
    return entries, num_no_language


def _is_missing(row: RecordRow, missing: Collection[str]) -> bool:
    """Whether one of the texts stands for a missing translation."""
    texts = row.fields.values() if isinstance(row.fields, dict) else [row.fields]
    return bool(missing) and any(isinstance(text, str) and text.strip() in missing for text in texts)


# --- checking ------------------------------------------------------------------------------------------------------


def _check_group(rows: list[RecordRow], config: Config, bad: BadRecords) -> ParallelGroup | None:
    """The group that the rows make, possibly of no wanted language; None if something is wrong and was reported."""
    num_before = len(bad.problems)
    key, place = rows[0].key, rows[0].place
    if key is None:
        bad.add(place, "missing id", "the id must be a non-empty text or a number")
    elif not is_unicode(key):
        bad.add(place, "invalid UTF-8", f"in the id {_show(key)}")
    label = _check_label(rows, config.task.labels, bad)
    texts: dict[str, dict[str, str]] = {}
    places: dict[str, Place] = {}
    for row in rows:
        if (
            not isinstance(row.language, str)
            or not row.language.isprintable()
            or row.language.split() != [row.language]
        ):
            bad.add(row.place, "missing language", f"{_show(row.language)} does not name a language")
        elif row.language in places:
            earlier = places[row.language]
            bad.add(row.place, "duplicate id", f"id {_show(key)} has language {row.language} at {earlier} already")
        elif config.data.languages is None or row.language in config.data.languages:
            places[row.language] = row.place
            texts[row.language] = _check_fields(row, config.task.fields, bad)
    return ParallelGroup(key, label, texts) if key is not None and len(bad.problems) == num_before else None


def _check_label(rows: list[RecordRow], labels: list[str], bad: BadRecords) -> int | None:
    """Index of the group's label; None without label. A language without label (null) contradicts no other language."""
    found: dict[str, Place] = {}
    for row in rows:
        if row.label is not None:
            found.setdefault(_label_name(row.label, labels), row.place)
    if not found:
        return None
    for name, place in found.items():
        if name not in labels:
            bad.add(place, "unknown label", f"{_show(name)} is not one of task.labels")
    (first, earlier), *others = found.items()
    for name, place in others:
        detail = f"id {_show(rows[0].key)} has {_show(name)} here and {_show(first)} at {earlier}"
        bad.add(place, "conflicting labels", detail)
    return labels.index(first) if first in labels else None


def _label_name(label: Any, labels: list[str]) -> str:
    """The label as ``task.labels`` spells it: Python and pandas write True, and 1.0 for 1 beside gaps."""
    spellings = [str(label)]
    if str(label) in ("True", "False"):
        spellings.append(str(label).lower())
    else:
        spellings.append(whole(str(label)))
    return next((name for name in spellings if name in labels), spellings[0])


def _check_fields(row: RecordRow, names: list[str], bad: BadRecords) -> dict[str, str]:
    """The task's fields in one language; what is wrong with them goes to ``bad``."""
    fields = {names[0]: row.fields} if isinstance(row.fields, str) and len(names) == 1 else row.fields
    if not isinstance(fields, dict):
        bad.add(row.place, "missing field", f"{row.language} must map {', '.join(names)} to texts, not {_show(fields)}")
        return {}
    texts: dict[str, str] = {}
    for name in names:
        text = fields.get(name)
        if text is None:
            bad.add(row.place, "missing field", f"{row.language}.{name}")
        elif not isinstance(text, str):
            bad.add(row.place, "non-string text", f"{row.language}.{name} is {_show(text)}")
        elif not is_unicode(text):
            bad.add(row.place, "invalid UTF-8", f"in {row.language}.{name}: {_show(text)}")
        elif not any(unicodedata.category(character)[0] not in "CZ" for character in text):
            bad.add(row.place, "empty text", f"{row.language}.{name}")
        else:
            texts[name] = text
    return texts


def _show(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) and not is_unicode(value) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- dividing and writing ------------------------------------------------------------------------------------------


def _divide(entries: list[Entry], config: Config) -> dict[str, list[Entry]]:
    """Split -> its groups, ordered by a hash of (seed, id): a shuffle that depends on nothing else."""
    ordered = sorted(entries, key=lambda entry: digest_bytes(f"{config.seed}:{entry.group.key}".encode()))
    sizes = _sizes(config.data.splits, sum(entry.split is None for entry in entries))
    undivided = itertools.chain.from_iterable(itertools.repeat(split, sizes.get(split, 0)) for split in SPLITS)
    parts: dict[str, list[Entry]] = {split: [] for split in _wanted_splits(config)}
    for entry in ordered:
        split = entry.split or next(undivided, None)
        if split is not None:
            parts[split].append(entry)
    return parts


def _sizes(splits: Mapping[Any, float], num_groups: int) -> dict[str, int]:
    """Split -> number of groups. Shares are cut at rounded cumulative sums: shares of 1 in all leave no group out."""
    sizes: dict[str, int] = {}
    shares = 0.0
    for split in (split for split in SPLITS if split in splits):
        if splits[split] >= 1:
            sizes[split] = int(splits[split])
        else:
            start, shares = round(shares * num_groups), shares + splits[split]
            sizes[split] = round(shares * num_groups) - start
    return sizes


def _fits_split(entry: Entry, split: str, config: Config, bad: BadRecords) -> bool:
    """Whether a group can serve in its split; why not goes to ``bad``."""
    source_language = config.data.source_language
    if split in NEED_LABELS and entry.group.label is None:
        bad.add(entry.place, "missing label", f"id {_show(entry.group.key)} is in split {split}")
        return False
    if split == "labeled" and source_language not in entry.group.texts:
        detail = f"id {_show(entry.group.key)} is in split labeled without {source_language}"
        bad.add(entry.place, "missing source language", detail)
        return False
    return True


def _check_parts(parts: dict[str, list[Entry]], entries: list[Entry], config: Config) -> None:
    """Raise ``UserError`` if a split got nothing, more was asked for than there is, or a wanted language is nowhere."""
    num_undivided = sum(entry.split is None for entry in entries)
    num_asked = sum(_sizes(config.data.splits, num_undivided).values())
    if num_asked > num_undivided:
        raise UserError(f"data.splits: asks for {num_asked} groups of {num_undivided}; ask for less or add inputs")
    for split, part in parts.items():
        if not part:
            what = "labeled groups" if split in NEED_LABELS else "groups"
            raise UserError(f"data: split {split} ends up without {what}; add inputs or a larger share in data.splits")
    languages = {language for entry in entries for language in entry.group.texts}
    if missing := sorted(set(config.data.languages or ()) - languages):
        found = ", ".join(sorted(languages))
        raise UserError(f"data.languages: {missing[0]!r} is in no input (they have {found}); correct or remove it")
    by_split = {split: {name for entry in part for name in entry.group.texts} for split, part in parts.items()}
    if missing := sorted(config.data.exposure.keys() - by_split.get("pretrain", set())):
        raise UserError(f"data.exposure.{missing[0]}: the pretrain split has nothing in that language; remove it")
    check_spelling(by_split)
    check_languages(config, by_split)


def _thin_out(groups: list[ParallelGroup], exposure: Mapping[str, float], seed: int) -> list[ParallelGroup]:
    """Groups with each language kept with its probability, by a hash of (seed, language, id)."""

    def is_kept(key: str, language: str) -> bool:
        drawn = int(digest_json([seed, language, key])[:13], 16) / 16**13
        return drawn < exposure.get(language, 1.0)

    thinned = (
        replace(group, texts={name: text for name, text in group.texts.items() if is_kept(group.key, name)})
        for group in groups
    )
    return [group for group in thinned if group.texts]


def _write(
    parts: dict[str, list[Entry]], config: Config, directory: Path, identity: dict[str, Any], details: dict[str, Any]
) -> dict[str, Dataset]:
    """Write every split's dataset, then the manifest that makes the directory complete."""
    import rich.progress
    from rich.console import Console

    groups_of = {split: _groups_of(split, part, config) for split, part in parts.items()}
    found = audit.audit(groups_of, config.task.labels)
    for line in audit.lines(found):
        print(line, file=sys.stderr)
    check_audit(found, config)
    begin(directory, KIND, identity)
    (directory / MANIFEST).unlink(missing_ok=True)
    written: dict[str, Dataset] = {}
    statistics: dict[str, Any] = {}
    for split, groups in groups_of.items():
        target = directory / split
        for pattern in (MANIFEST, "*.tar", ".*.tmp"):  # a killed run may have written more shards
            for stale in target.glob(pattern):
                stale.unlink()
        shown = rich.progress.track(
            groups, f"writing {split}", console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        )
        labels = tuple(config.task.labels)
        split_identity = {**identity, "split": split}
        written[split] = write_dataset(target, shown, labels, config.data.groups_per_shard, split_identity)
        statistics[split] = {
            "num_groups": len(groups),
            "num_labeled": sum(group.label is not None for group in groups),
            "num_examples": dict(sorted(Counter(language for group in groups for language in group.texts).items())),
        }
    manifests = [directory / split / MANIFEST for split in parts]
    write_manifest(directory, KIND, identity, manifests, {"splits": statistics, **details, "audit": found})
    return written


def _groups_of(split: str, part: list[Entry], config: Config) -> list[ParallelGroup]:
    """The groups of a split as they are written: without labels that are withheld, and thinned out."""
    groups = [entry.group for entry in part]
    if split in config.data.withhold_labels:
        groups = [replace(group, label=None) for group in groups]
    if split == "pretrain" and config.data.exposure:
        groups = _thin_out(groups, config.data.exposure, config.seed)
    return groups
