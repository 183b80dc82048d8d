"""A small inference corpus in eight languages, composed from a hand-written lexicon.

Every example is a pair of events told in all languages at once ("A king buys an apple in the
kitchen."). The hypothesis repeats the premise with one to three slots changed, and the label
follows from how the words in the changed slots relate:

* entailment: every change makes the event more general (apple -> fruit -> something, a time left
  out);
* neutral: one change says what the premise leaves open (fruit -> apple, someone -> a king, a time
  added, a verb that has nothing to do with the first);
* contradiction: one change cannot be true of the same event (apple -> pear, apple -> furniture,
  buys -> sells).

The words are in demo_lexicon.yaml. Nothing else is needed, and nothing is read on import.
"""

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

LANGUAGES = ("en", "de", "es", "fr", "ru", "tr", "hi", "zh")
LABELS = ("entailment", "neutral", "contradiction")

# Far fewer than the lexicon allows (some 160 million pairs), so that a draw which repeats an
# earlier one stays rare and can simply be drawn again.
MAX_GROUPS = 100_000

SLOTS = ("subject", "verb", "object", "place", "time")

# How the word of the hypothesis relates to the word of the premise in one slot.
SAME, IMPLIED, OPEN, CLASH = "same", "implied", "open", "clash"

# What gives a pair its label: one change of this kind ...
DECIDING_CHANGE = {"entailment": IMPLIED, "neutral": OPEN, "contradiction": CLASH}

# ... and beside it none, one or two harmless (implied) ones, with these weights. Without them,
# general words in the hypothesis would speak for entailment and special ones for neutral,
# whatever the premise. The words cannot be evened out entirely, since an entailment only ever
# generalises, and the more they are, the more the mere number of changes gives away. The numbers
# here and below were chosen to keep both small.
EXTRA_CHANGES = {"entailment": (4, 1, 1), "neutral": (1, 1, 1), "contradiction": (1, 1, 1)}

# How often a change of a kind falls on a slot. No verb implies another. An unrelated verb is the
# one open change that leaves the hypothesis no more special than before, hence its weight.
SLOT_WEIGHTS = {
    IMPLIED: {"subject": 3, "object": 3, "place": 3, "time": 1},
    OPEN: {"subject": 2, "verb": 4, "object": 2, "place": 2, "time": 1},
    CLASH: {"subject": 2, "verb": 3, "object": 2, "place": 2, "time": 1},
}

# How often a slot is left open ("someone", no place) on one side or both, where that is a choice.
LEFT_OPEN_SHARE = 0.25

# A phrase of several forms takes the one that a feature of the word in another slot asks for.
AGREEMENT = {"verb": ("subject", "gender", "m"), "object": ("verb", "case", "acc")}

# The concept in each slot; None where the slot is left open.
Event = dict[str, str | None]
Pair = tuple[str | None, str | None]


@cache
def _lexicon() -> dict[str, Any]:
    path = Path(__file__).with_name("demo_lexicon.yaml")
    lexicon: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return lexicon


def _level(slot: str, concept: str | None) -> str:
    if concept is None:
        return "left open"
    return "special" if "is_a" in _lexicon()[slot][concept] else "general"


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
        return CLASH if words[premise]["antonym"] == hypothesis else OPEN
    kind, other_kind = words[premise].get("is_a"), words[hypothesis].get("is_a")
    if kind == hypothesis:
        return IMPLIED
    if other_kind == premise:
        return OPEN
    if kind and other_kind and kind != other_kind:
        # Pears against chairs would only crowd out pears against apples, which teach more.
        return None
    return CLASH


@cache
def _pairs(slot: str, relation: str) -> dict[tuple[str, str], list[Pair]]:
    """The (premise, hypothesis) words of a slot in this relation, by the levels of the two."""
    words: list[str | None] = list(_lexicon()[slot])
    if slot in _lexicon()["left_open"]:
        words.append(None)
    pairs: dict[tuple[str, str], list[Pair]] = {}
    for premise in words:
        for hypothesis in words:
            if _relation(slot, premise, hypothesis) == relation:
                levels = (_level(slot, premise), _level(slot, hypothesis))
                pairs.setdefault(levels, []).append((premise, hypothesis))
    return pairs


def _takes(verb: str | None, thing: str | None) -> bool:
    """Whether the verb takes the object."""
    if verb is None or thing is None:
        return True
    lexicon = _lexicon()
    return lexicon["object"][thing].get("is_a", thing) in lexicon["verb"][verb]["objects"]


def _draw(rng: random.Random, slot: str, relation: str, verbs: Pair = (None, None)) -> Pair:
    """Words for one slot. The levels come first: special words are many, yet not likelier."""
    by_levels = _pairs(slot, relation)
    said = [levels for levels in by_levels if "left open" not in levels]
    left_open = [levels for levels in by_levels if "left open" in levels]
    if said and left_open:
        levels = rng.choice(left_open if rng.random() < LEFT_OPEN_SHARE else said)
    else:
        levels = rng.choice(said or left_open)
    pairs = by_levels[levels]
    if slot == "object":
        pairs = [pair for pair in pairs if _takes(verbs[0], pair[0]) and _takes(verbs[1], pair[1])]
    return rng.choice(pairs)


def _draw_events(rng: random.Random, label: str) -> tuple[Event, Event]:
    """A premise and a hypothesis between which the label holds."""
    (extra,) = rng.choices((0, 1, 2), weights=EXTRA_CHANGES[label])
    relations: dict[str, str] = {}
    for relation in (DECIDING_CHANGE[label], *[IMPLIED] * extra):
        weights = {s: w for s, w in SLOT_WEIGHTS[relation].items() if s not in relations}
        (slot,) = rng.choices(list(weights), weights=list(weights.values()))
        relations[slot] = relation
    # The verbs come first, for they limit the objects.
    verbs = _draw(rng, "verb", relations.get("verb", SAME))
    premise: Event = {}
    hypothesis: Event = {}
    for slot in SLOTS:
        pair = verbs if slot == "verb" else _draw(rng, slot, relations.get(slot, SAME), verbs)
        premise[slot], hypothesis[slot] = pair
    return premise, hypothesis


def _phrase(event: Event, slot: str, language: str) -> str:
    lexicon = _lexicon()
    concept = event[slot]
    if concept is None:
        return str(lexicon["left_open"][slot].get(language, ""))
    phrase = lexicon[slot][concept][language]
    if isinstance(phrase, dict):
        other_slot, feature, default = AGREEMENT[slot]
        other_word = lexicon[other_slot].get(event[other_slot], {})
        phrase = phrase[other_word.get(feature, default)]
    return str(phrase)


def _sentence(event: Event, language: str) -> str:
    pattern: str = _lexicon()["patterns"][language]
    text = pattern.format(**{slot: _phrase(event, slot, language) for slot in SLOTS})
    # A slot left empty leaves two blanks in a row, or one before the full stop.
    text = " ".join(text.split()).replace(" .", ".")
    return text[0].upper() + text[1:]


def generate_groups(num_groups: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield distinct groups, each one pair of sentences with its label, in every language.

    A group reads ``{"id": "demo-000001", "label": "neutral", "texts": {"en": {"premise": ...,
    "hypothesis": ...}, "de": ...}}``. The labels are balanced: of every three groups in a row,
    counted from the first, each label has one. The same seed gives the same groups, and a longer
    run begins with the groups of a shorter one.

    Raises ValueError at once if num_groups is negative or above MAX_GROUPS.
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
            language: {
                "premise": _sentence(premise, language),
                "hypothesis": _sentence(hypothesis, language),
            }
            for language in LANGUAGES
        }
        yield {"id": f"demo-{number:06d}", "label": label, "texts": texts}
