"""The demo corpus: sound data in every language, true labels, and no way around the words."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import yaml

from alsace_dist import demo_corpus
from alsace_dist.demo_corpus import LABELS, LANGUAGES, MAX_GROUPS, SLOTS, generate_groups

LEXICON_PATH = Path(demo_corpus.__file__).with_name("demo_lexicon.yaml")
LEXICON = yaml.safe_load(LEXICON_PATH.read_text(encoding="utf-8"))
SCRIPTS = {"ru": "CYRILLIC", "hi": "DEVANAGARI", "zh": "CJK UNIFIED"}
NUM_GROUPS = 20_000


@pytest.fixture(scope="module")
def groups():
    return list(generate_groups(NUM_GROUPS, seed=0))


@pytest.fixture(scope="module")
def events(groups):
    """The concepts behind the English sentences of the first groups: premise and hypothesis."""
    english = [group["texts"]["en"] for group in groups[:6000]]
    return [(read_english(en["premise"]), read_english(en["hypothesis"])) for en in english]


def forms(phrase):
    return list(phrase.values()) if isinstance(phrase, dict) else [phrase]


@cache
def english_sentence():
    """A pattern of every English sentence, and the concepts that its phrases name."""
    names = {slot: {} for slot in SLOTS}
    for slot in SLOTS:
        for concept, words in LEXICON[slot].items():
            names[slot][words["en"]] = concept
    one_of = {slot: "|".join(map(re.escape, phrases)) for slot, phrases in names.items()}
    pattern = (
        rf"(?P<subject>{one_of['subject']}|someone) (?P<verb>{one_of['verb']})"
        rf" (?P<object>{one_of['object']}|something)"
        rf"( (?P<place>{one_of['place']}))?( (?P<time>{one_of['time']}))?\."
    )
    return re.compile(pattern), names


def read_english(text):
    """The concept in each slot, None where it is left open; fails on any other sentence."""
    pattern, names = english_sentence()
    match = pattern.fullmatch(text[0].lower() + text[1:])
    assert match, text
    return {slot: names[slot].get(match[slot]) for slot in SLOTS}


def label_of(premise, hypothesis):
    """The label by the meaning of the words alone: what each of them also is."""
    verdicts = {"entailment"}
    for slot in SLOTS:
        before, after = premise[slot], hypothesis[slot]
        words = LEXICON[slot]
        wider_than_before = {before, words.get(before, {}).get("is_a"), None}
        wider_than_after = {after, words.get(after, {}).get("is_a"), None}
        if after not in wider_than_before:
            compatible = before in wider_than_after
            if slot == "verb":
                compatible = words[before]["antonym"] != after
            verdicts.add("neutral" if compatible else "contradiction")
    return max(verdicts, key=LABELS.index)


def test_same_seed_same_groups_and_a_longer_run_begins_with_a_shorter(groups):
    assert list(generate_groups(500, seed=0)) == groups[:500]
    assert list(generate_groups(50, seed=1)) != groups[:50]


def test_shape(groups):
    assert len(groups) == NUM_GROUPS
    assert groups[0]["id"] == "demo-000001"
    assert len({group["id"] for group in groups}) == NUM_GROUPS
    for group in groups:
        assert set(group) == {"id", "label", "texts"}
        assert tuple(group["texts"]) == LANGUAGES


def test_pairs_are_distinct_in_every_language(groups):
    for language in LANGUAGES:
        pairs = {tuple(group["texts"][language].values()) for group in groups}
        assert len(pairs) == NUM_GROUPS, language


def test_labels_are_balanced(groups):
    assert Counter(group["label"] for group in groups[:19_998]) == dict.fromkeys(LABELS, 6666)
    # In a fixed order, the position of a group would give its label away.
    firsts = Counter(group["label"] for group in groups[:9_000:3])
    assert all(count > 900 for count in firsts.values())


@pytest.mark.parametrize("num_groups", [-1, MAX_GROUPS + 1])
def test_impossible_numbers_are_refused_at_once(num_groups):
    with pytest.raises(ValueError, match=str(num_groups)):
        generate_groups(num_groups, seed=0)


def test_draws_succeed_at_other_seeds_and_none_is_allowed():
    assert len(list(islice(generate_groups(MAX_GROUPS, seed=7), 100))) == 100
    assert list(generate_groups(0, seed=7)) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_whole(groups, language):
    end = {"hi": "।", "zh": "。"}.get(language, ".")
    for group in groups:
        premise, hypothesis = (group["texts"][language][key] for key in ("premise", "hypothesis"))
        assert premise != hypothesis
        for text in (premise, hypothesis):
            assert text.endswith(end) and text.count(end) == 1
            assert not text[0].islower()
            assert "  " not in text and f" {end}" not in text and text == text.strip()


@pytest.mark.parametrize("language", LANGUAGES)
def test_letters_are_of_the_script_of_the_language(groups, language):
    texts = [text for group in groups[:3000] for text in group["texts"][language].values()]
    letters = {char for char in "".join(texts) if char.isalpha()}
    script = SCRIPTS.get(language, "LATIN")
    assert len(letters) > 20
    assert [char for char in letters if not unicodedata.name(char).startswith(script)] == []
    # One spelling of each letter, also where Unicode has two (Hindi ज़, French é).
    assert all(unicodedata.is_normalized("NFC", text) for text in texts)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_concepts_look_alike(language):
    phrases = [
        form
        for slot in SLOTS
        for words in [*LEXICON[slot].values(), LEXICON["left_open"].get(slot, {})]
        # The Hindi forms of a verb, or the Turkish ones of a noun, may coincide with each other.
        for form in set(forms(words.get(language, "")))
        if form
    ]
    assert len(phrases) > 70
    assert [phrase for phrase, count in Counter(phrases).items() if count > 1] == []


def test_lexicon_is_coherent():
    for slot in SLOTS:
        for concept, words in LEXICON[slot].items():
            assert set(LANGUAGES) <= set(words), concept
            if "is_a" in words:
                assert "is_a" not in LEXICON[slot][words["is_a"]], concept
    for slot in ("subject", "object", "place"):
        members = Counter(words.get("is_a") for words in LEXICON[slot].values())
        assert members.pop(None) == len(members), f"a general {slot} without members"
        assert len(set(members.values())) == 1, f"uneven {slot}s"
    for verb, words in LEXICON["verb"].items():
        antonym = LEXICON["verb"][words["antonym"]]
        assert antonym["antonym"] == verb and antonym["objects"] == words["objects"]
        assert all("is_a" not in LEXICON["object"][kind] for kind in words["objects"])


def test_all_words_are_used_and_verbs_take_their_objects(events):
    used = defaultdict(set)
    for event in (event for pair in events for event in pair):
        for slot in SLOTS:
            used[slot].add(event[slot])
        thing = event["object"]
        kind = LEXICON["object"].get(thing, {}).get("is_a", thing)
        assert kind is None or kind in LEXICON["verb"][event["verb"]]["objects"], event
    for slot in SLOTS:
        assert used[slot] - {None} == set(LEXICON[slot])
        assert (None in used[slot]) == (slot in LEXICON["left_open"])


def test_labels_follow_from_the_words(groups, events):
    wrong = [
        group["texts"]["en"]
        for group, (premise, hypothesis) in zip(groups, events, strict=False)
        if label_of(premise, hypothesis) != group["label"]
    ]
    assert wrong == []


def test_all_languages_say_the_same(groups, events):
    for group, pair in zip(groups[:2000], events, strict=False):
        for language, texts in group["texts"].items():
            for text, event in zip(texts.values(), pair, strict=True):
                for slot in SLOTS:
                    words = LEXICON[slot].get(event[slot]) or LEXICON["left_open"].get(slot, {})
                    phrases = forms(words.get(language, ""))
                    said = [phrase.casefold() in text.casefold() for phrase in phrases]
                    assert any(said), (text, event[slot])


def test_sentences_read_as_written_by_hand():
    queen = {
        "subject": "queen",
        "verb": "wash",
        "object": "ring",
        "place": "kitchen",
        "time": "evening",
    }
    someone = dict.fromkeys(SLOTS) | {"verb": "buy"}
    tailor = dict.fromkeys(SLOTS) | {"subject": "tailor", "verb": "sell", "object": "ring"}
    expected = {
        "en": (
            "A queen washes a ring in the kitchen in the evening.",
            "Someone buys something.",
            "A tailor sells a ring.",
        ),
        "de": (
            "Eine Königin wäscht am Abend in der Küche einen Ring.",
            "Jemand kauft etwas.",
            "Ein Schneider verkauft einen Ring.",
        ),
        "es": (
            "Una reina lava un anillo en la cocina al atardecer.",
            "Alguien compra algo.",
            "Un sastre vende un anillo.",
        ),
        "fr": (
            "Une reine lave une bague dans la cuisine le soir.",
            "Quelqu'un achète quelque chose.",
            "Un tailleur vend une bague.",
        ),
        "ru": (
            "Вечером королева моет кольцо на кухне.",
            "Кто-то покупает что-то.",
            "Портной продаёт кольцо.",
        ),
        "tr": (
            "Bir kraliçe akşamleyin mutfakta bir yüzüğü yıkıyor.",
            "Biri bir şey satın alıyor.",
            "Bir terzi bir yüzük satıyor.",
        ),
        "hi": (
            "एक रानी शाम को रसोई में एक अँगूठी धो रही है।",
            "कोई कुछ ख़रीद रहा है।",
            "एक दर्ज़ी एक अँगूठी बेच रहा है।",
        ),
        "zh": (
            "傍晚，一位王后正在厨房里清洗一枚戒指。",
            "有人正在购买某样东西。",
            "一位裁缝正在出售一枚戒指。",
        ),
    }
    for language in LANGUAGES:
        said = tuple(demo_corpus._sentence(event, language) for event in (queen, someone, tailor))
        assert said == expected[language]


def naive_bayes_accuracy(features: list[list[Hashable]], labels: list[str]) -> float:
    """Train on the first 4000, test on the next 2000."""
    index: dict[Hashable, int] = {}
    for present in features:
        for feature in present:
            index.setdefault(feature, len(index))
    counts = np.zeros((len(features), len(index)))
    for row, present in zip(counts, features, strict=True):
        for feature in present:
            row[index[feature]] += 1
    gold = np.array([LABELS.index(label) for label in labels])
    train, test = slice(0, 4000), slice(4000, 6000)
    by_label = np.array([counts[train][gold[train] == i].sum(axis=0) + 1 for i in range(3)])
    log_odds = np.log(by_label / by_label.sum(axis=1, keepdims=True))
    return float(((counts[test] @ log_odds.T).argmax(axis=1) == gold[test]).mean())


def lookup_accuracy(keys: list[Hashable], labels: list[str]) -> float:
    """Of the best guess from the key alone, learnt on the first 4000, on the next 2000."""
    seen: dict[Hashable, Counter[str]] = defaultdict(Counter)
    for key, label in zip(keys[:4000], labels, strict=False):
        seen[key][label] += 1
    guesses = [max(LABELS, key=lambda label: seen[key][label]) for key in keys[4000:]]
    return float(np.mean([a == b for a, b in zip(guesses, labels[4000:], strict=True)]))


@pytest.fixture(scope="module")
def labels(groups):
    return [group["label"] for group in groups[:6000]]


@pytest.mark.parametrize("side", ["premise", "hypothesis"])
def test_one_sentence_alone_does_not_give_the_label(groups, labels, side):
    words = [group["texts"]["en"][side].lower().strip(".").split() for group in groups[:6000]]
    assert naive_bayes_accuracy(words, labels) < 0.42


def test_the_two_words_of_a_slot_together_do(events, labels):
    # Also shows that the classifier above can learn.
    pairs = []
    for before, after in events:
        pairs.append([(s, before[s], after[s]) for s in SLOTS if before[s] != after[s]])
    assert naive_bayes_accuracy(pairs, labels) > 0.75


def test_the_overlap_alone_does_not_give_the_label(groups, events, labels):
    changed = [tuple(before[slot] != after[slot] for slot in SLOTS) for before, after in events]
    longer = []
    for group in groups[:6000]:
        before, after = (len(text.split()) for text in group["texts"]["en"].values())
        longer.append(np.sign(after - before))
    assert lookup_accuracy(changed, labels) < 0.55
    assert lookup_accuracy(longer, labels) < 0.45
    assert lookup_accuracy(list(zip(changed, longer, strict=True)), labels) < 0.6
