"""Whether the rows of a group make a parallel group: each row's fields, candidates and label, and how they agree."""

import unicodedata
from collections.abc import Mapping
from typing import Any

from alsace_dist.config import Config, TaskConfig
from alsace_dist.data.records import BadRecords, Place, RecordRow, whole
from alsace_dist.files.shards import Label, ParallelGroup, golds
from alsace_dist.reading import appearance, is_unicode
from alsace_dist.tasks.base import fields_of


def check_group(rows: list[RecordRow], config: Config, bad: BadRecords) -> ParallelGroup | None:
    """The group that the rows make, possibly of no wanted language; None if something is wrong and was reported."""
    num_before = len(bad.problems)
    key, place = rows[0].key, rows[0].place
    if key is None:
        bad.add(place, "missing id", "the id must be a non-empty text or a number")
    elif not is_unicode(key):
        bad.add(place, "invalid UTF-8", f"in the id {shown(key)}")
    if broken := next((row for row in rows if row.unit is not None and not is_unicode(row.unit)), None):
        bad.add(broken.place, "invalid UTF-8", f"in the unit {shown(broken.unit)}")
    task = config.task
    label: Label = None if task.has_own_candidates else _check_label(rows, task.labels, bad)
    kept: list[RecordRow] = []
    texts: dict[str, dict[str, str]] = {}
    places: dict[str, Place] = {}
    for row in rows:
        if (
            not isinstance(row.language, str)
            or not row.language.isprintable()
            or row.language.split() != [row.language]
        ):
            bad.add(row.place, "missing language", f"{shown(row.language)} does not name a language")
        elif row.language in places:
            earlier = places[row.language]
            bad.add(row.place, "duplicate id", f"id {shown(key)} has language {row.language} at {earlier} already")
        elif config.data.languages is None or row.language in config.data.languages:
            places[row.language] = row.place
            kept.append(row)
            texts[row.language] = _check_fields(row, task.fields, bad)
            _check_words(row, texts[row.language], task, bad)
            _check_gap(row, texts[row.language], task, bad)
            own = [text for name, text in texts[row.language].items() if name in task.candidate_fields]
            if len(set(own)) != len(own):
                bad.add(row.place, "equal candidates", f"{row.language} has {shown(own[0])} and others, two alike")
    own_candidates: dict[str, tuple[str, ...]] = {}
    apart: dict[str, Label] = {}
    if task.has_own_candidates:
        own_candidates = {str(row.language): _check_candidates(row, bad) for row in kept}
        label, apart = _check_own_labels(kept, own_candidates, bad)
    if key is None or len(bad.problems) != num_before:
        return None
    return ParallelGroup(key, label, texts, own_candidates, apart, kept[0].category if kept else "")


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
            alike = [label for label in labels if appearance(label).casefold() == appearance(name).casefold()]
            hint = f"; it looks like {shown(alike[0])}, which is spelt otherwise" if alike else ""
            bad.add(place, "unknown label", f"{shown(name)} is not one of task.labels{hint}")
    known = [(name, place) for name, place in found.items() if name in labels]
    if not known:
        return None
    (first, earlier), *others = known
    for name, place in others:
        detail = f"id {shown(rows[0].key)} has {shown(name)} here and {shown(first)} at {earlier}"
        bad.add(place, "conflicting labels", detail)
    return labels.index(first)


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
        bad.add(row.place, "missing field", f"{row.language} must map {', '.join(names)} to texts, not {shown(fields)}")
        return {}
    texts: dict[str, str] = {}
    for name in names:
        text = fields.get(name)
        if text is None:
            bad.add(row.place, "missing field", f"{row.language}.{name}")
        elif not isinstance(text, str):
            bad.add(row.place, "non-string text", f"{row.language}.{name} is {shown(text)}")
        elif not is_unicode(text):
            bad.add(row.place, "invalid UTF-8", f"in {row.language}.{name}: {shown(text)}")
        elif not _is_visible(text):
            bad.add(row.place, "empty text", f"{row.language}.{name}")
        else:
            texts[name] = text
    return texts


def _check_words(row: RecordRow, texts: Mapping[str, str], task: TaskConfig, bad: BadRecords) -> None:
    """Whether the prompt has words for the values of the fields that it says in words."""
    every = task.words_of()
    for name, words in every.get(row.language, every.get("default", {})).items():
        if name in texts and texts[name] not in words:
            detail = f"{row.language}.{name} is {shown(texts[name])}, and task.words has {', '.join(words)}"
            bad.add(row.place, "unknown value", detail)


def _check_gap(row: RecordRow, texts: Mapping[str, str], task: TaskConfig, bad: BadRecords) -> None:
    """Whether the texts of the prompt hold the place of the answer once."""
    if not task.gap or len(texts) < len(task.fields):
        return
    for template in task.prompt_templates(str(row.language)):
        number = sum(texts[name].count(task.gap) for name in fields_of(template) if name in texts)
        if number != 1:
            bad.add(row.place, "no gap", f"{row.language} holds {task.gap} {number} times where a prompt has it once")


def _check_candidates(row: RecordRow, bad: BadRecords) -> tuple[str, ...]:
    """The group's own candidates in one language; what is wrong with them goes to ``bad``."""
    own = list(row.candidates) if isinstance(row.candidates, list | tuple) else []
    if len(own) < 2 or not all(isinstance(text, str) for text in own):
        detail = f"{row.language} has {shown(row.candidates)} where a list of two texts or more is needed"
        bad.add(row.place, "no candidates", detail)
        return ()
    for text in own:
        if not is_unicode(text):
            bad.add(row.place, "invalid UTF-8", f"in a candidate in {row.language}: {shown(text)}")
        elif not _is_visible(text):
            bad.add(row.place, "empty text", f"a candidate in {row.language}")
    if len(set(own)) != len(own):
        bad.add(row.place, "equal candidates", f"{row.language} has {shown(own[0])} and others, two alike")
    return tuple(own)


def _check_own_labels(
    rows: list[RecordRow], candidates: Mapping[str, tuple[str, ...]], bad: BadRecords
) -> tuple[Label, dict[str, Label]]:
    """The group's label, as all languages have it whose candidates correspond, and those of the languages apart."""
    found: list[tuple[Label, Place]] = []
    apart: dict[str, Label] = {}
    sizes: list[tuple[int, Place]] = []
    for row in rows:
        number = len(candidates[str(row.language)])
        label = _own_label(row, number, bad)
        if row.is_apart:
            apart[str(row.language)] = label
            continue
        sizes.append((number, row.place))
        found += [] if label is None else [(label, row.place)]
    for number, place in sizes:
        if number and number != sizes[0][0]:
            detail = f"{number} here and {sizes[0][0]} at {sizes[0][1]}, and nothing says that they stand apart"
            bad.add(place, "conflicting candidates", detail)
    for label, place in found:
        if label != found[0][0]:
            detail = f"id {shown(rows[0].key)} has {shown(golds(label))} here and {shown(golds(found[0][0]))}"
            bad.add(place, "conflicting labels", f"{detail} at {found[0][1]}")
    return found[0][0] if found else None, apart


def _own_label(row: RecordRow, number: int, bad: BadRecords) -> Label:
    """The right candidates of a row as numbers from 0; None without a label, or if it is none and was reported."""
    if row.label is None:
        return None
    several = row.label if isinstance(row.label, list | tuple) else [row.label]
    indices = [int(one) if isinstance(one, str) and one.isdecimal() and len(one) < 10 else one for one in several]
    is_sound = bool(indices) and all(type(one) is int and one in range(number) for one in indices)
    if not is_sound or len(set(indices)) != len(indices):
        if number:  # else the candidates are what is wrong
            detail = f"{shown(row.label)} is no number of one of {number} candidates, from 0, nor a list of several"
            bad.add(row.place, "unknown label", detail)
        return None
    return indices[0] if len(indices) == 1 else tuple(sorted(indices))


def _is_visible(text: str) -> bool:
    return any(unicodedata.category(character)[0] not in "CZ" for character in text)


def shown(value: Any) -> str:
    """A value as a bad record's line has it."""
    text = ascii(value) if isinstance(value, str) and not is_unicode(value) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
