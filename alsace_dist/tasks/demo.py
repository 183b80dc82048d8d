"""A small inference corpus in eight languages, composed from a hand-written lexicon.

Every example is a pair of events told in all languages at once ("A king buys an apple in the kitchen."). The hypothesis
repeats the premise with one or two slots changed, and the label follows from how the words there relate:

* entailment: every change makes the event more general (apple -> fruit -> something, a time left out);
* neutral: one change says what the premise leaves open (fruit -> apple, a time or a detail added);
* contradiction: one change cannot be true of the same event (apple -> pear, buys -> sells, a king -> nobody).

As in corpora that people wrote (SNLI and its kin), some words of a hypothesis alone already speak for a label: details
for neutral, "nobody" for contradiction, "something" for entailment. The others need both sentences.

The words are in demo_lexicon.yaml. Nothing else is needed, and nothing is read on import.
"""

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from alsace_dist.config import InputConfig
from alsace_dist.errors import UserError

SETTINGS = frozenset({"num_groups"})
LANGUAGES = ("en", "de", "es", "fr", "ru", "tr", "hi", "zh")
LABELS = ("entailment", "neutral", "contradiction")

# Far fewer than the lexicon allows, so that a draw which repeats an earlier one stays rare and is simply drawn again.
MAX_GROUPS = 50_000

SLOTS = ("subject", "verb", "object", "place", "time", "detail")
NOBODY = "nobody"

# How the word of the hypothesis relates to the word of the premise in one slot.
SAME, IMPLIED, OPEN, CLASH = "same", "implied", "open", "clash"

# What gives a pair its label: one change of this kind. At times a harmless (implied) change stands beside it.
DECIDING_CHANGE = {"entailment": IMPLIED, "neutral": OPEN, "contradiction": CLASH}
HARMLESS_SHARE = 0.3

# Relative frequency with which a change of a kind falls on a slot. No verb implies another verb.
SLOT_WEIGHTS = {
    IMPLIED: {"subject": 3, "object": 3, "place": 2, "time": 2},
    OPEN: {"subject": 1, "object": 1, "place": 1, "time": 1, "detail": 4},
    CLASH: {"subject": 4, "verb": 4, "object": 1, "place": 1, "time": 1},
}

# How often a clash of subjects is "nobody", and how often a slot that may be left open is, on both sides.
NOBODY_SHARE = 0.75
LEFT_OPEN_SHARE = {"subject": 0.0, "object": 0.0, "place": 0.5, "time": 0.5, "detail": 0.9}

# The concept in each slot; None where the slot is left open.
Event = dict[str, str | None]
Pair = tuple[str | None, str | None]


def files(one: InputConfig) -> list[Path]:
    """None: the corpus is generated."""
    return []


def records(one: InputConfig, seed: int) -> Iterator[dict[str, Any]]:
    """``num_groups`` groups. Raises ``UserError`` if there are not that many."""
    try:
        return generate_groups(one.num_groups, seed)
    except ValueError as error:
        raise UserError(f"data.inputs.num_groups: {error}") from None


@cache
def _lexicon() -> dict[str, Any]:
    path = Path(__file__).with_name("demo_lexicon.yaml")
    lexicon: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return lexicon


def _relation(slot: str, premise: str | None, hypothesis: str | None) -> str | None:
    """How two words of a slot relate; None for a pair that the corpus does not use."""
    if premise == hypothesis:
        return SAME
    if hypothesis is None:
        return IMPLIED
    if premise is None:
        return OPEN
    words = _lexicon()[slot]
    if slot == "verb":
        return CLASH if words[premise]["antonym"] == hypothesis else None
    if slot == "detail":
        return None  # a king may well be glad and have a friend
    kind, other_kind = words[premise].get("is_a"), words[hypothesis].get("is_a")
    if kind == hypothesis:
        return IMPLIED
    if other_kind == premise:
        return OPEN
    return CLASH


@cache
def _pairs(slot: str, relation: str) -> list[Pair]:
    """The (premise, hypothesis) words of a slot in this relation."""
    words: list[str | None] = list(_lexicon()[slot])
    if slot in _lexicon()["left_open"]:
        words.append(None)
    return [
        (premise, hypothesis)
        for premise in words
        for hypothesis in words
        if _relation(slot, premise, hypothesis) == relation
    ]


def _draw(rng: random.Random, slot: str, relation: str) -> Pair:
    """Words for one slot."""
    pairs = _pairs(slot, relation)
    if relation == SAME and slot in LEFT_OPEN_SHARE:
        is_open = rng.random() < LEFT_OPEN_SHARE[slot]
        pairs = [pair for pair in pairs if (pair[0] is None) == is_open]
    premise, hypothesis = rng.choice(pairs)
    if slot == "subject" and relation == CLASH and rng.random() < NOBODY_SHARE:
        hypothesis = NOBODY
    return premise, hypothesis


def _draw_events(rng: random.Random, label: str) -> tuple[Event, Event]:
    """A premise and a hypothesis between which the label holds."""
    kinds = [DECIDING_CHANGE[label]] + [IMPLIED] * (rng.random() < HARMLESS_SHARE)
    relations: dict[str, str] = {}
    for relation in kinds:
        weights = {slot: weight for slot, weight in SLOT_WEIGHTS[relation].items() if slot not in relations}
        (slot,) = rng.choices(list(weights), weights=list(weights.values()))
        relations[slot] = relation
    pairs = {slot: _draw(rng, slot, relations.get(slot, SAME)) for slot in SLOTS}
    return {slot: pair[0] for slot, pair in pairs.items()}, {slot: pair[1] for slot, pair in pairs.items()}


def _phrase(event: Event, slot: str, language: str) -> str:
    lexicon = _lexicon()
    concept = event[slot]
    if concept == NOBODY:
        return str(lexicon[NOBODY][language])
    words = lexicon["left_open"][slot] if concept is None else lexicon[slot][concept]
    phrase = words.get(language, "")
    return str(phrase[_form(event, phrase)]) if isinstance(phrase, dict) else str(phrase)


def _form(event: Event, forms: dict[str, str]) -> str:
    """Which form of a phrase the other words of its sentence ask for."""
    lexicon = _lexicon()
    is_nobody = event["subject"] == NOBODY
    if "acc" in forms:
        return "bare" if is_nobody else str(lexicon["verb"][event["verb"]]["case"])
    if is_nobody:
        return "not"
    if "is" in forms:
        return "is"
    return str(lexicon["subject"].get(event["subject"], {}).get("gender", "m"))


def _sentence(event: Event, language: str) -> str:
    pattern: str = _lexicon()["patterns"][language]
    text = pattern.format(**{slot: _phrase(event, slot, language) for slot in SLOTS})
    # A slot left empty leaves two blanks in a row, or one before the full stop.
    text = " ".join(text.split()).replace(" .", ".")
    return text[0].upper() + text[1:]


def generate_groups(num_groups: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield distinct groups, each one pair of sentences with its label, in every language.

    A group reads ``{"id": "demo-000001", "label": "neutral", "texts": {"en": {"premise": ..., "hypothesis": ...},
    "de": ...}}``. The labels are balanced: of every three groups in a row, counted from the first, each label has one.
    The same seed gives the same groups, and a longer run begins with the groups of a shorter one.

    Raises ``ValueError`` at once if num_groups is negative or above MAX_GROUPS.
    """
    if not 0 <= num_groups <= MAX_GROUPS:
        raise ValueError(f"the demo corpus gives 0 to {MAX_GROUPS} groups, not {num_groups}")
    return _generate(num_groups, seed)


def _generate(num_groups: int, seed: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(seed)
    seen: set[tuple[str | None, ...]] = set()
    labels: list[str] = []
    for number in range(1, num_groups + 1):
        if not labels:
            labels = rng.sample(LABELS, len(LABELS))
        label = labels.pop()
        while True:
            premise, hypothesis = _draw_events(rng, label)
            key = (*premise.values(), *hypothesis.values())
            if key not in seen:
                break
        seen.add(key)
        texts = {
            language: {"premise": _sentence(premise, language), "hypothesis": _sentence(hypothesis, language)}
            for language in LANGUAGES
        }
        yield {"id": f"demo-{number:06d}", "label": label, "texts": texts}
