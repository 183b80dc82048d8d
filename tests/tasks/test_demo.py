"""The demo corpus: sound data in every language, true labels, and no more cues in one sentence than people leave."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from alsace_dist import tasks
from alsace_dist.config import InputConfig
from alsace_dist.errors import UserError
from alsace_dist.tasks import demo
from alsace_dist.tasks.demo import LABELS, LANGUAGES, MAX_GROUPS, NOBODY, SLOTS, generate_groups

LEXICON_PATH = Path(demo.__file__).with_name("demo_lexicon.yaml")
LEXICON = yaml.safe_load(LEXICON_PATH.read_text(encoding="utf-8"))
SCRIPTS = {"ru": "CYRILLIC", "hi": "DEVANAGARI", "zh": "CJK UNIFIED"}
NUM_GROUPS = 12_000
NUM_READ = 6000

Group = dict[str, Any]
Event = dict[str, str | None]


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    return list(generate_groups(NUM_GROUPS, seed=0))


@pytest.fixture(scope="module")
def events(groups: list[Group]) -> list[tuple[Event, Event]]:
    """The concepts behind the English sentences of the first groups: premise and hypothesis."""
    english = [group["texts"]["en"] for group in groups[:NUM_READ]]
    return [(read_english(en["premise"]), read_english(en["hypothesis"])) for en in english]


@pytest.fixture(scope="module")
def labels(groups: list[Group]) -> list[str]:
    return [group["label"] for group in groups[:NUM_READ]]


def forms(phrase: Any) -> list[str]:
    return list(phrase.values()) if isinstance(phrase, dict) else [phrase]


def words_of(slot: str, concept: str | None) -> dict[str, Any]:
    """What the lexicon has for a concept, for nobody, or for a slot left open (None): language -> phrase."""
    if concept == NOBODY:
        return LEXICON[NOBODY]
    return LEXICON["left_open"][slot] if concept is None else LEXICON[slot][concept]


@cache
def english_sentence() -> tuple[re.Pattern[str], dict[str, dict[str, str]]]:
    """A pattern of every English sentence, and the concepts that its phrases name."""
    names = {slot: {words["en"]: concept for concept, words in LEXICON[slot].items()} for slot in SLOTS}
    names["subject"]["nobody"] = NOBODY
    one_of = {slot: "|".join(map(re.escape, phrases)) for slot, phrases in names.items()}
    pattern = (
        rf"(?P<subject>{one_of['subject']}|someone) (?P<verb>{one_of['verb']})"
        rf" (?P<object>{one_of['object']}|something|anything)( (?P<detail>{one_of['detail']}))?"
        rf"( (?P<place>{one_of['place']}))?( (?P<time>{one_of['time']}))?\."
    )
    return re.compile(pattern), names


def read_english(text: str) -> Event:
    """The concept in each slot, None where it is left open; fails on any other sentence."""
    pattern, names = english_sentence()
    match = pattern.fullmatch(text[0].lower() + text[1:])
    assert match, text
    assert match["object"] != ("something" if match["subject"] == "nobody" else "anything"), text
    return {slot: names[slot].get(match[slot]) for slot in SLOTS}


def label_of(premise: Event, hypothesis: Event) -> str:
    """The label by the meaning of the words alone: what each of them also is."""
    if hypothesis["subject"] == NOBODY:
        return "contradiction"
    verdicts = {"entailment"}
    for slot in SLOTS:
        before, after = premise[slot], hypothesis[slot]
        words = LEXICON[slot]
        wider_than_before = {before, words.get(before, {}).get("is_a"), None}
        wider_than_after = {after, words.get(after, {}).get("is_a"), None}
        if after not in wider_than_before:
            # Any two details may both be true; any two verbs that are no antonyms, too.
            compatible = before in wider_than_after or slot == "detail"
            if slot == "verb":
                compatible = words[before]["antonym"] != after
            verdicts.add("neutral" if compatible else "contradiction")
    return max(verdicts, key=LABELS.index)


def test_same_seed_same_groups_and_a_longer_run_begins_with_a_shorter(groups: list[Group]) -> None:
    assert list(generate_groups(500, seed=0)) == groups[:500]
    assert list(generate_groups(50, seed=1)) != groups[:50]


def test_shape(groups: list[Group]) -> None:
    assert len(groups) == NUM_GROUPS
    assert groups[0]["id"] == "demo-000001"
    assert len({group["id"] for group in groups}) == NUM_GROUPS
    for group in groups:
        assert set(group) == {"id", "label", "texts"}
        assert tuple(group["texts"]) == LANGUAGES
        assert all(tuple(texts) == ("premise", "hypothesis") for texts in group["texts"].values())


def test_pairs_are_distinct_in_every_language(groups: list[Group]) -> None:
    for language in LANGUAGES:
        pairs = {tuple(group["texts"][language].values()) for group in groups}
        assert len(pairs) == NUM_GROUPS, language


def test_labels_are_balanced(groups: list[Group]) -> None:
    for start in range(0, NUM_GROUPS, 3):
        assert {group["label"] for group in groups[start : start + 3]} == set(LABELS)
    # In a fixed order, the position of a group would give its label away.
    firsts = Counter(group["label"] for group in groups[:9_000:3])
    assert all(firsts[label] > 900 for label in LABELS)


@pytest.mark.parametrize("num_groups", [-1, MAX_GROUPS + 1])
def test_impossible_numbers_are_refused_at_once(num_groups: int) -> None:
    with pytest.raises(ValueError, match=f"not {num_groups}$"):
        generate_groups(num_groups, seed=0)


def test_the_most_and_none_are_allowed() -> None:
    assert len(list(islice(generate_groups(MAX_GROUPS, seed=7), 100))) == 100
    assert list(generate_groups(0, seed=7)) == []


def test_it_is_a_published_dataset_that_reads_no_files(groups: list[Group]) -> None:
    """Its groups are those of the input's number and the run's seed; too many are refused under the key's name."""
    dataset = tasks.dataset("demo")
    one = InputConfig(kind="demo", num_groups=50)
    assert "demo" in tasks.published()
    assert dataset.files(one) == []
    assert set(dataset.SETTINGS) == {"num_groups"}
    assert list(dataset.records(one, 0)) == groups[:50]
    assert list(dataset.records(one, 1)) == list(generate_groups(50, seed=1))
    with pytest.raises(
        UserError, match=rf"^data\.inputs\.num_groups: .* 0 to {MAX_GROUPS} groups, not {MAX_GROUPS + 1}$"
    ):
        dataset.records(InputConfig(kind="demo", num_groups=MAX_GROUPS + 1), 0)


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_whole(groups: list[Group], language: str) -> None:
    end = {"hi": "।", "zh": "。"}.get(language, ".")
    for group in groups:
        premise, hypothesis = group["texts"][language].values()
        assert premise != hypothesis
        for text in (premise, hypothesis):
            assert text.endswith(end) and text.count(end) == 1
            assert not text[0].islower()
            assert "  " not in text and f" {end}" not in text and text == text.strip()
            assert " " not in text or language != "zh"
            assert not set("{}") & set(text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_letters_are_of_the_script_of_the_language(groups: list[Group], language: str) -> None:
    texts = [text for group in groups[:3000] for text in group["texts"][language].values()]
    letters = {char for char in "".join(texts) if char.isalpha()}
    script = SCRIPTS.get(language, "LATIN")
    assert len(letters) > 20
    assert [char for char in letters if not unicodedata.name(char).startswith(script)] == []
    # One spelling of each letter, also where Unicode has two (Hindi ज़, French é).
    assert all(unicodedata.is_normalized("NFC", text) for text in texts)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_concepts_of_a_slot_look_alike(language: str) -> None:
    for slot in SLOTS:
        concepts = [*LEXICON[slot], *([None] if slot in LEXICON["left_open"] else [])]
        concepts += [NOBODY] if slot == "subject" else []
        phrases = [phrase for concept in concepts for phrase in set(forms(words_of(slot, concept).get(language, "")))]
        assert len(phrases) >= len(concepts) >= 4
        assert [phrase for phrase, count in Counter(phrases).items() if count > 1] == [], slot


def test_lexicon_says_every_word_in_every_language() -> None:
    for slot in SLOTS:
        for concept, words in LEXICON[slot].items():
            assert set(words) - {"is_a", "antonym", "case", "gender"} == set(LANGUAGES), concept
            assert all(phrase for language in LANGUAGES for phrase in forms(words[language])), concept
    for words in (LEXICON[NOBODY], LEXICON["left_open"]["subject"], LEXICON["left_open"]["object"]):
        assert set(words) == set(LANGUAGES)
    assert set(LEXICON["left_open"]) == set(SLOTS) - {"verb"}
    assert set(LEXICON["patterns"]) == set(LANGUAGES)
    for language, pattern in LEXICON["patterns"].items():
        assert sorted(re.findall(r"{(\w+)}", pattern)) == sorted(SLOTS), language


def test_lexicon_is_coherent() -> None:
    for slot in ("subject", "object", "place"):
        kinds = [words["is_a"] for words in LEXICON[slot].values() if "is_a" in words]
        assert set(kinds) == {concept for concept, words in LEXICON[slot].items() if "is_a" not in words}
        assert len(set(Counter(kinds).values())) == 1, f"uneven {slot}s"
    for slot in ("verb", "time", "detail"):
        assert all("is_a" not in words for words in LEXICON[slot].values())
    for verb, words in LEXICON["verb"].items():
        assert words["antonym"] != verb
        assert LEXICON["verb"][words["antonym"]]["antonym"] == verb


def test_lexicon_has_the_forms_that_sentences_ask_for() -> None:
    for verb, words in LEXICON["verb"].items():
        assert words["case"] in ("bare", "acc"), verb
        for language in LANGUAGES:
            expected = {"hi": {"m", "f", "not"}} | {key: {"is", "not"} for key in ("fr", "ru", "tr")}
            phrase = words[language]
            assert (set(phrase) if isinstance(phrase, dict) else None) == expected.get(language), verb
            assert len(set(forms(phrase))) == len(forms(phrase)), verb
    for thing, words in LEXICON["object"].items():
        assert set(words["tr"]) == {"bare", "acc"}, thing
        assert words["tr"]["acc"] != words["tr"]["bare"], thing
        assert set(words["fr"]) == {"is", "not"}, thing
        assert words["fr"]["not"] == re.sub("^une? ", "de ", words["fr"]["is"]), thing
        assert not re.match("de [aeiouyhéèêâîô]", words["fr"]["not"]), f"{thing} wants d'"
        assert all(isinstance(words[language], str) for language in LANGUAGES if language not in ("fr", "tr"))
    # Nothing agrees with the other slots.
    for slot in ("subject", "place", "time", "detail"):
        for words in LEXICON[slot].values():
            assert all(isinstance(words[language], str) for language in LANGUAGES)
            assert words.get("gender", "f") == "f"


def test_all_words_are_used(events: list[tuple[Event, Event]]) -> None:
    used = defaultdict(set)
    for pair in events:
        for slot in SLOTS:
            used[slot] |= {event[slot] for event in pair}
    for slot in SLOTS:
        expected = set(LEXICON[slot])
        if slot in LEXICON["left_open"]:
            expected.add(None)
        if slot == "subject":
            expected.add(NOBODY)
        assert used[slot] == expected


def test_labels_follow_from_the_words(
    groups: list[Group], events: list[tuple[Event, Event]], labels: list[str]
) -> None:
    wrong = [
        group["texts"]["en"]
        for group, (premise, hypothesis), label in zip(groups, events, labels, strict=False)
        if label_of(premise, hypothesis) != label
    ]
    assert wrong == []


def test_natural_cues_are_there_and_not_everywhere(events: list[tuple[Event, Event]], labels: list[str]) -> None:
    nobody = Counter(label for (_, after), label in zip(events, labels, strict=True) if after["subject"] == NOBODY)
    assert set(nobody) == {"contradiction"}
    assert 0.1 < nobody["contradiction"] / labels.count("contradiction") < 0.5
    assert all(before["subject"] != NOBODY for before, _ in events)

    added = [(before["detail"], after["detail"]) for before, after in events]
    detail = Counter(
        label for (before, after), label in zip(added, labels, strict=True) if before is None and after is not None
    )
    assert set(detail) == {"neutral"}
    assert 0.3 < detail["neutral"] / labels.count("neutral") < 0.7
    # A detail is also there with the other labels, so that it alone does not decide.
    kept = Counter(label for (before, after), label in zip(added, labels, strict=True) if before == after is not None)
    assert all(kept[label] > 50 for label in LABELS)


@pytest.mark.parametrize("language", LANGUAGES)
def test_all_languages_say_the_same(groups: list[Group], events: list[tuple[Event, Event]], language: str) -> None:
    """Taking the phrase of every slot out of a sentence leaves nothing but marks."""
    for group, pair in zip(groups[:3000], events, strict=False):
        for text, event in zip(group["texts"][language].values(), pair, strict=True):
            rest = text.casefold()
            for slot in SLOTS:
                phrases = forms(words_of(slot, event[slot]).get(language, ""))
                said = [phrase.casefold() for phrase in phrases if phrase.casefold() in rest]
                assert said, (text, slot, event[slot])
                # The longest, as a form may begin with another (bir elma, bir elmayı).
                rest = rest.replace(max(said, key=len), " ", 1)
            assert rest.strip(" .।。") == "", (text, event)


def event(**concepts: str) -> Event:
    return dict.fromkeys(SLOTS) | concepts


HAND_WRITTEN = {
    "a woman, a detail, a thing acted on, all slots": (
        event(subject="queen", verb="hide", object="pear", place="kitchen", time="evening", detail="with_friend"),
        {
            "en": "A queen hides a pear with a friend in the kitchen in the evening.",
            "de": "Eine Königin versteckt am Abend mit einem Freund in der Küche eine Birne.",
            "es": "Una reina esconde una pera con un amigo en la cocina al atardecer.",
            "fr": "Une reine cache une poire avec un ami dans la cuisine le soir.",
            "ru": "Вечером королева вместе с другом прячет грушу на кухне.",
            "tr": "Bir kraliçe akşamleyin mutfakta bir arkadaşıyla bir armudu saklıyor.",
            "hi": "एक रानी शाम को रसोई में एक दोस्त के साथ एक नाशपाती छिपा रही है।",
            "zh": "傍晚，一位王后在厨房里和一位朋友一起藏一个梨。",
        },
    ),
    "nothing but the verb": (
        event(verb="buy"),
        {
            "en": "Someone buys something.",
            "de": "Jemand kauft etwas.",
            "es": "Alguien compra algo.",
            "fr": "Quelqu'un achète quelque chose.",
            "ru": "Кто-то покупает что-то.",
            "tr": "Biri bir şey satın alıyor.",
            "hi": "कोई व्यक्ति कुछ ख़रीद रहा है।",
            "zh": "有人在购买某样东西。",
        },
    ),
    "a man, a thing sold, a manner": (
        event(subject="singer", verb="sell", object="ball", detail="reluctantly"),
        {
            "en": "A singer sells a ball reluctantly.",
            "de": "Ein Sänger verkauft widerwillig einen Ball.",
            "es": "Un cantante vende una pelota de mala gana.",
            "fr": "Un chanteur vend un ballon à contrecœur.",
            "ru": "Певец неохотно продаёт мяч.",
            "tr": "Bir şarkıcı isteksizce bir top satıyor.",
            "hi": "एक गायक अनिच्छा से एक गेंद बेच रहा है।",
            "zh": "一位歌手在不情愿地出售一个球。",
        },
    ),
    "nobody, a vowel after ne, a place": (
        event(subject=NOBODY, verb="buy", object="apple", place="beach"),
        {
            "en": "Nobody buys an apple on the beach.",
            "de": "Niemand kauft am Strand einen Apfel.",
            "es": "Nadie compra una manzana en la playa.",
            "fr": "Personne n'achète de pomme sur la plage.",
            "ru": "Никто не покупает яблоко на пляже.",
            "tr": "Hiç kimse plajda bir elma satın almıyor.",
            "hi": "कोई भी व्यक्ति समुद्र तट पर एक सेब नहीं ख़रीद रहा है।",
            "zh": "没有人在海滩上购买一个苹果。",
        },
    ),
    "nobody, no particular thing acted on, a time": (
        event(subject=NOBODY, verb="show", object="skirt", time="noon"),
        {
            "en": "Nobody shows a skirt at noon.",
            "de": "Niemand zeigt am Mittag einen Rock.",
            "es": "Nadie muestra una falda al mediodía.",
            "fr": "Personne ne montre de jupe à midi.",
            "ru": "В полдень никто не показывает юбку.",
            "tr": "Hiç kimse öğleyin bir etek göstermiyor.",
            "hi": "कोई भी व्यक्ति दोपहर को एक स्कर्ट नहीं दिखा रहा है।",
            "zh": "中午，没有人在展示一条裙子。",
        },
    ),
    "nobody, nothing": (
        event(subject=NOBODY, verb="hide", place="forest"),
        {
            "en": "Nobody hides anything in the forest.",
            "de": "Niemand versteckt im Wald etwas.",
            "es": "Nadie esconde nada en el bosque.",
            "fr": "Personne ne cache rien dans la forêt.",
            "ru": "Никто не прячет ничего в лесу.",
            "tr": "Hiç kimse ormanda bir şey saklamıyor.",
            "hi": "कोई भी व्यक्ति जंगल में कुछ नहीं छिपा रहा है।",
            "zh": "没有人在森林里藏任何东西。",
        },
    ),
}


@pytest.mark.parametrize("case", HAND_WRITTEN)
def test_sentences_read_as_written_by_hand(case: str) -> None:
    told, expected = HAND_WRITTEN[case]
    assert {language: demo._sentence(told, language) for language in LANGUAGES} == expected


def naive_bayes_accuracy(features: list[list[Hashable]], labels: list[str]) -> float:
    """Train on the first 4000, test on the other 2000."""
    index: dict[Hashable, int] = {}
    for present in features:
        for feature in present:
            index.setdefault(feature, len(index))
    counts = np.zeros((len(features), len(index)))
    for row, present in zip(counts, features, strict=True):
        for feature in present:
            row[index[feature]] += 1
    gold = np.array([LABELS.index(label) for label in labels])
    train, test = slice(0, 4000), slice(4000, NUM_READ)
    by_label = np.array([counts[train][gold[train] == i].sum(axis=0) + 1 for i in range(3)])
    log_odds = np.log(by_label / by_label.sum(axis=1, keepdims=True))
    return float(((counts[test] @ log_odds.T).argmax(axis=1) == gold[test]).mean())


# The hypotheses of SNLI alone give 0.67 of its labels (Gururangan et al., 2018).
@pytest.mark.parametrize(("side", "limit"), [("premise", 0.47), ("hypothesis", 0.67)])
def test_one_sentence_alone_does_not_give_the_label(
    events: list[tuple[Event, Event]], labels: list[str], side: str, limit: float
) -> None:
    one = [pair[side == "hypothesis"] for pair in events]
    words = [[(slot, concept) for slot, concept in event.items()] for event in one]
    assert naive_bayes_accuracy(words, labels) < limit


def test_the_changed_words_of_both_sentences_do(events: list[tuple[Event, Event]], labels: list[str]) -> None:
    # Also shows that the classifier above can learn.
    changes = [[(s, before[s], after[s]) for s in SLOTS if before[s] != after[s]] for before, after in events]
    assert naive_bayes_accuracy(changes, labels) > 0.85
