"""The Debian benchmark's data: parsing, joining and splitting, on a few inline paragraphs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "debian" / "data.py"
SPEC = importlib.util.spec_from_file_location("debian_data", PATH)
data = importlib.util.module_from_spec(SPEC)
sys.modules["debian_data"] = data  # dataclasses look their module up
SPEC.loader.exec_module(data)

PACKAGES = """\
Package: abalone
Version: 1.0-2
Section: games
Description: board game for two
Description-md5: a1

Package: abalone-data
Source: abalone (1.0)
Section: games
Description: board game for two - data
Description-md5: a2

Package: foo-11
Section: devel
Description: compiler of foo 11
Description-md5: f11

Package: foo-12
Section: devel
Description: compiler of foo 12
Description-md5: f12

Package: foo-12-doc
Source: foo-docs
Section: contrib/doc
Description: manual of foo
Description-md5: fd

Package: old-abalone
Section: games
Description: transitional package
Description-md5: o1

Package: nosection
Description: no section here
Description-md5: n1

Package: whatever
Section: misc
Description: something else
Description-md5: w1
"""

ENGLISH = """\
Package: abalone
Description-md5: a1
Description-en: board game for two
 Push the marbles of the other player off the board.
 .
 Features:
  * needs   no network
  - two levels

Package: abalone-data
Description-md5: a2
Description-en: board game for two - data
 Pictures and sounds of the game that is called abalone.

Package: foo-11
Description-md5: f11
Description-en: compiler of foo 11
 Translates programs in the language foo to machine code.

Package: foo-12
Description-md5: f12
Description-en: compiler of foo 12
 Translates programs in the language foo to machine code.

Package: foo-12-doc
Description-md5: fd
Description-en: manual of foo
 Translates programs in the language foo to machine code.

Package: old-abalone
Description-md5: o1
Description-en: old name of abalone
 This is a transitional dummy package for upgrades.

Package: whatever
Description-md5: w1
Description-en: something else
 Nobody knows what this package is good for at all.
"""

GERMAN = """\
Package: abalone
Description-md5: a1
Description-de: Brettspiel für zwei
 Stoßen Sie die Kugeln vom Brett.

Package: abalone-data
Description-md5: stale
Description-de: Brettspiel für zwei - alte Daten
 Diese Beschreibung ist veraltet.

Package: foo-12
Description-md5: f12
Description-de: Übersetzer für foo 12
 Übersetzt Programme in Maschinensprache.

Package: foo-12-doc
Description-md5: fd
Description-de: manual of foo
 Translates programs in the language foo to machine code.

Package: nofield
Description-md5: x
"""

JAPANESE = """\
Package: abalone
Description-md5: a1
Description-ja: 二人用ボードゲーム
 相手の玉を盤から押し出すゲー
 ムです。 GTK を
 使います。
"""


def rows(text: str):
    return data.paragraphs(text.splitlines(keepends=True))


@pytest.fixture
def groups():
    texts = {"en": ENGLISH, "de": GERMAN, "ja": JAPANESE}
    descriptions = {x: data.read_descriptions(rows(text), x) for x, text in texts.items()}
    return {group.name: group for group in data.join(data.read_packages(rows(PACKAGES)), descriptions)}


def make(name: str, label: str | None, cluster: str, languages: int):
    texts = {f"l{i}": f"{name} {i}" for i in range(1, languages)}
    return data.Group(name, label, cluster, {"en": name, **texts})


def test_read_packages_takes_source_and_section_and_skips_incomplete_paragraphs():
    packages = data.read_packages(rows(PACKAGES))
    assert packages["abalone"] == {"source": "abalone", "section": "games", "md5": "a1"}
    assert packages["abalone-data"]["source"] == "abalone"
    assert packages["foo-12-doc"]["section"] == "doc"
    assert "nosection" not in packages


def test_text_is_cleaned(groups):
    assert groups["abalone"].texts == {
        "en": "board game for two Push the marbles of the other player off the board. "
        "Features: needs no network two levels",
        "de": "Brettspiel für zwei Stoßen Sie die Kugeln vom Brett.",
        "ja": "二人用ボードゲーム 相手の玉を盤から押し出すゲームです。 GTK を使います。",
    }


def test_text_is_cut(monkeypatch):
    monkeypatch.setattr(data, "MAX_CHARS", 11)
    packages = {"p": {"source": "p", "section": "games", "md5": "m"}}
    (group,) = data.join(packages, {"en": {"m": "one two\n three four"}, "de": {"m": "one two\n thrXX"}})
    assert group.texts == {"en": "one two thr"}  # the same up to the cut: not a translation


def test_stale_and_untranslated_texts_are_dropped(groups):
    assert list(groups["abalone-data"].texts) == ["en"]
    assert list(groups["foo-12-doc"].texts) == ["en"]


def test_duplicates_are_one_group_with_the_most_languages(groups):
    assert "foo-11" not in groups
    assert list(groups["foo-12"].texts) == ["en", "de"]


def test_packages_of_one_source_or_one_text_share_a_cluster(groups):
    assert groups["abalone"].cluster == groups["abalone-data"].cluster
    assert groups["foo-12"].cluster == groups["foo-12-doc"].cluster
    assert groups["foo-12"].cluster != groups["abalone"].cluster


def test_labels(groups):
    assert groups["abalone"].label == "games"
    assert groups["foo-12-doc"].label == "documentation"
    assert groups["whatever"].label is None
    assert groups["old-abalone"].label is None
    assert data.label_of("foo-dev", "devel", "headers") == "libraries"


def test_splits_are_disjoint_and_deterministic():
    labels = ["games", "web", "text", None]
    all_groups = [make(f"p{i:03}", labels[i % 4], f"s{i // 2}", 1 + i % 9) for i in range(400)]
    sizes = {"test": 30, "unlabeled": 30, "labeled": 90}
    splits = data.split(all_groups, 0, sizes)
    assert {name: len(splits[name]) for name in sizes} == sizes

    clusters = {name: {group.cluster for group in members} for name, members in splits.items()}
    for one, other in [("test", "unlabeled"), ("test", "labeled"), ("unlabeled", "labeled")]:
        assert not clusters[one] & clusters[other]
    assert not clusters["test"] & clusters["pretrain"]
    assert clusters["unlabeled"] | clusters["labeled"] <= clusters["pretrain"]
    assert clusters["test"] | clusters["pretrain"] == {group.cluster for group in all_groups}
    for group in splits["test"] + splits["unlabeled"]:
        assert group.label and len(group.texts) >= data.MIN_LANGUAGES
    assert any(group.label is None for group in splits["pretrain"])
    assert splits["parallel"] == [group for group in splits["pretrain"] if len(group.texts) >= data.PARALLEL_LANGUAGES]

    assert data.split(all_groups, 0, sizes) == splits
    assert data.split(all_groups, 1, sizes)["test"] != splits["test"]


def test_pick_takes_classes_in_turn_and_one_group_of_a_cluster():
    games = [make(f"g{i}", "games", "same" if i < 2 else f"s{i}", 1 + i) for i in range(6)]
    picked = data.pick([*games, make("w", "web", "w", 1)], 4, order=lambda group: group.name)
    assert [group.name for group in picked] == ["g1", "g2", "g3", "w"]
    everything = data.pick(games, 6, order=lambda group: group.name, repeat=True)
    assert everything == games


def test_record_hides_labels_and_translations_where_they_must_not_be():
    group = make("p", "games", "s", 2)
    texts = {"en": {"text": "p"}, "l1": {"text": "p 1"}}
    assert data.record(group, "test") == {"id": "p", "label": "games", "texts": texts}
    assert data.record(group, "labeled") == {"id": "p", "label": "games", "texts": {"en": {"text": "p"}}}
    assert data.record(group, "unlabeled") == {"id": "p", "texts": texts}
    assert data.record(group, "pretrain") == {"id": "pretrain-p", "texts": texts}
    assert data.record(group, "parallel") == data.record(group, "pretrain")


def fake_apt(languages: list[str], messages: str = ""):
    """An apt whose lists hold the inline indices of `languages`."""
    indices = {"en": ENGLISH, "de": GERMAN, "ja": JAPANESE}

    def apt(config: Path, *arguments: str) -> tuple[str, str]:
        if arguments[0] == "update":
            return "", messages
        lists = config.parent / "lists"
        (lists / "Packages").write_text(PACKAGES)
        lines = [f"Packages $(LANGUAGE) {lists / 'Packages'}"]
        for language in languages:
            (lists / language).write_text(indices[language])
            lines.append(f"Translations {language} {lists / language}")
        return "\n".join(lines), ""

    return apt


def test_command_line_writes_the_same_files_again(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LANGUAGES", ["en", "de", "ja"])
    monkeypatch.setattr(data, "MIN_LANGUAGES", 2)
    monkeypatch.setattr(data, "apt", fake_apt(["en", "de", "ja"]))
    for name in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["data.py", "--out", str(tmp_path / name)])
        data.main()
    names = [f"{name}.jsonl" for name in ("labeled", "parallel", "pretrain", "test", "unlabeled")]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    for name in names:
        text = (tmp_path / "one" / name).read_bytes()
        assert text == (tmp_path / "two" / name).read_bytes()
        ids = [json.loads(line)["id"] for line in text.splitlines()]
        assert ids == sorted(ids)


def test_missing_language_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "apt", fake_apt(["en"], "W: some index failed\n"))
    with pytest.raises(SystemExit, match="no 'xx' index of Debian bookworm main: W: some index failed"):
        data.fetch(tmp_path, "bookworm", ["en", "xx"])


def test_missing_apt_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="apt-get not found"):
        data.fetch(tmp_path, "bookworm", ["en"])
