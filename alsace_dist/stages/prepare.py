"""Prepare: inputs -> validated, divided shards of parallel groups.

Every record is read before anything is written, so that all that is wrong can be said at once; the groups are
held in memory meanwhile (a few kilobytes each: a million groups of short texts take a few gigabytes).

A record is one group: a line of JSONL, or the rows of a table that share an id. Something wrong in one language
makes the whole record bad: silently thinner groups would bias what is later compared between languages.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from alsace_dist.config import Config, InputConfig
from alsace_dist.data import audit
from alsace_dist.data.audit import LeftOut, Skipped, check_audit, check_spelling
from alsace_dist.data.checking import check_group, shown
from alsace_dist.data.config_check import check_calibration, check_languages
from alsace_dist.data.inputs import check_inputs, contents, kind_of, read_groups
from alsace_dist.data.records import BAD_RECORDS, BadRecords, Place, RecordRow, whole
from alsace_dist.data.splits import NEED_LABELS, Entry, check_sizes, divide, needs_labels, wanted_splits
from alsace_dist.errors import UserError
from alsace_dist.files.layout import DATA
from alsace_dist.files.manifest import MANIFEST, begin, digest_json, remove_own, write_manifest
from alsace_dist.files.shards import Dataset, ParallelGroup, write_dataset
from alsace_dist.ranks.group import Ranks
from alsace_dist.stages.base import Output, Stage, only

KIND = DATA
ON_RANKS = False
# What is no part of the prepared data, but decides whether a run goes on with it, or where what is read is kept.
LIMITS = {"on_bad", "max_skipped", "min_parallel", "max_unknown", "max_cut", "cache", "cache_gb"}


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


def fingerprint_of(config: Config) -> dict[str, Any]:
    """What the prepared data depends on: settings and the content of the inputs, as JSON.

    ``data.on_bad`` and the limits are not part of it: data that is complete with bad records left out is data that a
    person has accepted, and later stages need not be told again. Raises ``UserError`` if an input file is missing.
    """
    return {
        "data": config.data.model_dump(mode="json", exclude=LIMITS),
        "task": {"fields": config.task.fields, "labels": config.task.labels}
        | ({"candidates": "own"} if config.task.has_own_candidates else {}),
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
    skipped, left_out = Skipped(), LeftOut()
    entries = _read_inputs(config, bad, skipped, left_out)
    divided = divide(entries, config, left_out)
    parts: dict[str, list[Entry]] = {split: [] for split in divided}
    for split, part in divided.items():
        for entry in part:
            fits = _fits_split(entry, split, config, bad)
            parts[split] += [entry] if fits else []
            skipped.count(f"split {split}", "", fits)
    details = {
        "bad_records": bad.counts(),
        **left_out.details(),
        "num_left_out": len(entries) - sum(len(part) for part in divided.values()),
    }
    try:
        bad.settle(directory.parent / BAD_RECORDS, config.data.on_bad == "skip")
        skipped.check(config.data.max_skipped)
        for line in left_out.lines():
            print(line, file=sys.stderr)
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
        if split in data.withhold_labels and split in wanted_splits(config):
            raise UserError(f"data.withhold_labels: {split} needs its labels; remove it there")
    for number, one in enumerate(data.inputs):
        if unknown := sorted(one.columns.fields.keys() - set(config.task.fields)):
            raise UserError(f"data.inputs.{number}.columns.fields.{unknown[0]}: not one of task.fields; remove it")


# --- reading -------------------------------------------------------------------------------------------------------


def _read_inputs(config: Config, bad: BadRecords, skipped: Skipped, left_out: LeftOut) -> list[Entry]:
    """All good groups. What is wrong goes to ``bad``; ``skipped`` and ``left_out`` are counted on the way."""
    entries: list[Entry] = []
    places: dict[str, Place] = {}
    for one in config.data.inputs:
        where, num_problems = f"input {one.path or one.kind}", len(bad.problems)
        placeholders = _placeholders_of(one, config)
        for every in read_groups(one, config, bad):
            rows = _known_rows(every, placeholders, where, left_out)
            if not rows:
                continue
            group = check_group(rows, config, bad)
            key, place = rows[0].key, rows[0].place
            label = next((str(row.label) for row in rows if row.label is not None), "")
            skipped.count(where, label, group is not None)
            if key is not None and key in places:
                bad.add(place, "duplicate id", f"id {shown(key)} is at {places[key]} already")
                continue
            if key is not None:
                places[key] = place
            if not rows[0].is_whole:  # a row of the group was unreadable, so that a language may be missing
                continue
            if group is not None and not group.texts:
                left_out.num_no_language += 1
            elif group is not None:
                entries.append(Entry(group, one.split, place, _unit_of(rows, config.data.source_language)))
        # Lines that could not be read have made no rows, and are counted by their places.
        num_places = len({place for place, _, _ in bad.problems[num_problems:]})
        skipped.bad[where, ""] = max(skipped.bad[where, ""], num_places)
    return entries


class _Placeholders(NamedTuple):
    """What stands in an input where there is no text or no label; an empty label is none at all.

    ``need_label``: whether groups of the input may go to a split that needs labels.
    """

    texts: frozenset[str]
    labels: frozenset[str]
    need_label: bool


def _placeholders_of(one: InputConfig, config: Config) -> _Placeholders:
    kind, data = kind_of(one), config.data
    splits = [one.split] if one.split else list(data.splits)
    need_label = any(needs_labels(split, config) for split in splits)
    return _Placeholders(kind.missing | set(data.missing), kind.no_label | set(data.no_label), need_label)


def _known_rows(every: list[RecordRow], placeholders: _Placeholders, where: str, left_out: LeftOut) -> list[RecordRow]:
    """The rows of a group that is translated and labeled: without placeholders of texts and labels.

    Empty if the group is to be left out, which is counted.
    """
    absent = [_is_missing(row, placeholders.texts) for row in every]
    left_out.num_missing.update(str(row.language) for row in itertools.compress(every, absent))
    left_out.num_changed.update(str(row.language) for row in every if row.is_changed)
    rows = [row for row, is_absent in zip(every, absent, strict=True) if not is_absent]
    if not rows:
        left_out.num_no_language += 1
        return []
    spelled = ["" if row.label is None else whole(str(row.label)) for row in rows]
    if placeholders.need_label and placeholders.labels.issuperset(spelled):
        left_out.num_no_label[where] += 1
        return []
    return [
        row._replace(label=None) if label in placeholders.labels else row
        for row, label in zip(rows, spelled, strict=True)
    ]


def _is_missing(row: RecordRow, missing: Collection[str]) -> bool:
    """Whether one of the texts stands for a missing translation."""
    texts = row.fields.values() if isinstance(row.fields, dict) else [row.fields]
    return bool(missing) and any(isinstance(text, str) and text.strip() in missing for text in texts)


def _unit_of(rows: list[RecordRow], source_language: str) -> str | None:
    """What a group belongs to, as its source language says it, or else the first that it has."""
    units = {str(row.language): row.unit for row in rows if row.unit is not None}
    return units.get(source_language, units[min(units)]) if units else None


# --- writing -------------------------------------------------------------------------------------------------------


def _fits_split(entry: Entry, split: str, config: Config, bad: BadRecords) -> bool:
    """Whether a group can serve in its split; why not goes to ``bad``."""
    source_language = config.data.source_language
    if needs_labels(split, config) and not _is_labeled(entry.group):
        bad.add(entry.place, "missing label", f"id {shown(entry.group.key)} is in split {split}")
        return False
    if split == "labeled" and source_language not in entry.group.texts:
        detail = f"id {shown(entry.group.key)} is in split labeled without {source_language}"
        bad.add(entry.place, "missing source language", detail)
        return False
    return True


def _is_labeled(group: ParallelGroup) -> bool:
    return all(group.label_of(language) is not None for language in group.texts)


def _check_parts(parts: dict[str, list[Entry]], entries: list[Entry], config: Config) -> None:
    """Raise ``UserError`` if a split got nothing, more was asked for than there is, or a wanted language is nowhere."""
    check_sizes(parts, entries, config)
    for split, part in parts.items():
        if not part:
            what = "labeled groups" if needs_labels(split, config) else "groups"
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
    check_calibration(config, (entry.group for entry in parts.get("unlabeled", [])))


def _thin_out(groups: list[ParallelGroup], exposure: Mapping[str, float], seed: int) -> list[ParallelGroup]:
    """Groups with each language kept with its probability, by a hash of (seed, language, id)."""

    def is_kept(key: str, language: str) -> bool:
        drawn = int(digest_json([seed, language, key])[:13], 16) / 16**13
        return drawn < exposure.get(language, 1.0)

    thinned = (group.in_languages([name for name in group.texts if is_kept(group.key, name)]) for group in groups)
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
        # Shards that a killed start has left are written over: equal fingerprints give equal names and bytes.
        remove_own(target)
        shown = rich.progress.track(
            groups, f"writing {split}", console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        )
        labels = tuple(config.task.labels)
        split_identity = {**identity, "split": split}
        written[split] = write_dataset(target, shown, labels, config.data.groups_per_shard, split_identity)
        statistics[split] = {
            "num_groups": len(groups),
            "num_labeled": sum(_is_labeled(group) for group in groups),
            "num_examples": dict(sorted(Counter(language for group in groups for language in group.texts).items())),
        }
    manifests = [directory / split / MANIFEST for split in parts]
    details = {"splits": statistics, "audit": found.model_dump(mode="json")} | details
    write_manifest(directory, KIND, identity, manifests, details)
    return written


def _groups_of(split: str, part: list[Entry], config: Config) -> list[ParallelGroup]:
    """The groups of a split as they are written: without labels that are withheld, and thinned out."""
    groups = [entry.group for entry in part]
    if split in config.data.withhold_labels:
        groups = [group.without_labels() for group in groups]
    if split == "pretrain" and config.data.exposure:
        groups = _thin_out(groups, config.data.exposure, config.seed)
    return groups
