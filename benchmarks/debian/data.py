"""Debian's package descriptions and their human translations, as a classification benchmark.

    python benchmarks/debian/data.py --out DIR [--seed 0]

Fetches the package index and the translated descriptions of one Debian release with apt, from
the sources the system already has, into a private directory (the system's own apt state is not
touched), and writes five JSONL files to DIR:

    test.jsonl       labelled groups with many languages
    unlabeled.jsonl  the same kind of groups, without labels
    labeled.jsonl    labelled groups, English only
    pretrain.jsonl   everything that is not of a test source, in all languages, without labels
    parallel.jsonl   those of them in five languages or more

One line is one group of packages with the same English description:

    {"id": "0ad", "label": "games", "texts": {"en": {"text": "..."}, "de": {"text": "..."}}}

The same apt indices and seed give the same bytes. Needs apt and `pip install python-debian`.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from debian.deb822 import Deb822

LANGUAGES = ["en", "da", "it", "fr", "de", "sk", "ja", "pt_BR", "uk", "ko", "pl", "ru"]
SIZES = {"test": 1500, "unlabeled": 1500, "labeled": 6000}
MIN_LANGUAGES = 6  # of a test or unlabeled group, English included
PARALLEL_LANGUAGES = 5  # of a group of parallel.jsonl, English included
MAX_CHARS = 300  # the synopsis and about the first paragraph

# Archive sections by class. Left out, so never labelled: sections that do not tell what a
# package is about (utils, misc, metapackages, tasks, oldlibs, debug, otherosfs, ...), and those
# too small or filled by a few sources (database, fonts, localization, lisp, ocaml, ...).
CLASSES = {
    "communication": "mail news comm hamradio",
    "desktop": "gnome kde xfce x11",
    "development": "devel vcs interpreters",
    "documentation": "doc",
    "games": "games",
    "graphics": "graphics",
    "libraries": "libs libdevel",
    "modules": "python perl ruby java javascript php haskell rust golang gnu-r",
    "multimedia": "sound video",
    "network": "net",
    "science": "science math electronics education",
    "system": "admin kernel",
    "text": "text editors tex",
    "web": "web httpd",
}
LABELS = {section: label for label, sections in CLASSES.items() for section in sections.split()}

# Packages without content say nothing about a class.
EMPTY = re.compile(r"\b(transition|transitional|dummy|empty) (\w+ )?(meta)?package", re.IGNORECASE)

BULLET = re.compile(r"^[-+*•·–—] +")
# Japanese is wrapped without spaces, so a fold between two such characters adds none.
CJK = "[\u3001-\u30ff\u3400-\u9fff\uff01-\uff60]"
CJK_FOLD = re.compile(f"(?<={CJK}) (?={CJK})")


@dataclass
class Group:
    """Packages with the same English text, represented by one of them."""

    name: str
    label: str | None  # None: a section without a class
    cluster: str  # related sources; groups of one cluster never go to two splits
    texts: dict[str, str]


def fetch(directory: Path, release: str, languages: list[str]) -> dict[str, list[Path]]:
    """Download the indices of `release` main; gives the files of "packages" and each language."""
    lists = directory / "lists"
    lists.mkdir()
    directory.chmod(0o755)  # as root, apt downloads as another user, who must get in
    config = directory / "apt.conf"
    # Read last of all (-c), so that it wins over the system's configuration: some images turn
    # translations off. The system's update hooks are dropped, as they act on its own state.
    config.write_text(
        "#clear Acquire::Languages;\n#clear APT::Update;\n"
        f'Acquire::Languages "{",".join(languages)}";\n'
        'Acquire::GzipIndexes "false";\n'
        f'Dir::State::lists "{lists}";\nDir::Cache "{directory}/cache";\n'
    )
    _, messages = apt(config, "update")
    columns = "$(CREATED_BY) $(LANGUAGE) $(FILENAME)"
    wanted = ["Origin: Debian", f"Codename: {release}", "Component: main"]
    listing, more = apt(config, "indextargets", "--format", columns, *wanted)

    files = defaultdict(list)
    for line in listing.splitlines():
        kind, language, path = line.split(" ", 2)
        if kind in ("Packages", "Translations"):
            files["packages" if kind == "Packages" else language].append(Path(path))
    # Only what is missing counts: a failing source that has nothing to do with Debian does not.
    for key in ["packages", *languages]:
        if not files[key]:
            reason = (messages + more).strip().splitlines() or ["not in the system's sources?"]
            raise SystemExit(f"error: no {key!r} index of Debian {release} main: {reason[-1]}")
    return {key: sorted(paths) for key, paths in files.items()}


def apt(config: Path, *arguments: str) -> tuple[str, str]:
    """Run apt-get with a private configuration; gives its output and its messages."""
    command = ["apt-get", "-q", "-c", str(config), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit("error: apt-get not found; this needs Debian or a derivative") from None
    return done.stdout, done.stderr


def paragraphs(lines: Iterable[str] | Iterable[bytes]) -> Iterator[Deb822]:
    """The paragraphs of an index (a plain parser, as python-apt may not be there)."""
    return Deb822.iter_paragraphs(lines, use_apt_pkg=False)


def read_rows(paths: list[Path]) -> Iterator[Deb822]:
    """The paragraphs of some index files, one after the other."""
    for path in paths:
        with path.open("rb") as file:
            yield from paragraphs(file)


def read_packages(index: Iterable[Deb822]) -> dict[str, dict[str, str]]:
    """{package: its source, section and md5}, without paragraphs that lack a field."""
    packages = {}
    for row in index:
        if all(key in row for key in ("Package", "Section", "Description-md5")):
            packages[row["Package"]] = {
                "source": row.get("Source", row["Package"]).split()[0],  # "name (version)"
                "section": row["Section"].split("/")[-1],
                "md5": row["Description-md5"],
            }
    return packages


def read_descriptions(index: Iterable[Deb822], language: str) -> dict[str, str]:
    """{md5 of the English description: description in `language`}."""
    field = f"Description-{language}"
    complete = (row for row in index if "Description-md5" in row and field in row)
    return {row["Description-md5"]: row[field] for row in complete}


def clean(description: str) -> tuple[str, str]:
    """The synopsis and the long description, each on one line."""
    synopsis, *lines = [line.strip() for line in description.split("\n")]
    body = " ".join(BULLET.sub("", line) for line in lines if line != ".")
    return fold(synopsis), fold(body)


def fold(text: str) -> str:
    """Text with whitespace folded to single spaces."""
    return CJK_FOLD.sub("", " ".join(unicodedata.normalize("NFC", text).split()))


def join(
    packages: dict[str, dict[str, str]],
    descriptions: dict[str, dict[str, str]],
) -> list[Group]:
    """Groups of packages with the same English text and their translations.

    A translation counts only if its md5 is that of the current English description (it is
    stale otherwise) and if it is not the English text itself.
    """
    groups: dict[str, Group] = {}
    parents: dict[str, str] = {}
    first_source: dict[str, str] = {}

    def root(source: str) -> str:
        while parents.setdefault(source, source) != source:
            source = parents[source]
        return source

    for name, package in sorted(packages.items()):
        md5, source = package["md5"], package["source"]
        if md5 not in descriptions["en"]:
            continue
        texts = {}
        for language, table in descriptions.items():
            if md5 in table:
                text = " ".join(clean(table[md5]))[:MAX_CHARS].strip()
                if language == "en" or text != texts["en"]:
                    texts[language] = text

        # Versions of one upstream (gcc-11, gcc-12) have the same text but for the digits. Those
        # are one group; sources that share the beginning of a long description are one cluster.
        key = anonymous(texts["en"])
        body = anonymous(clean(descriptions["en"][md5])[1])[:100]
        other = root(first_source.setdefault(body if len(body) > 20 else key, source))
        low, high = sorted((root(source), other))
        parents[high] = low

        group = Group(name, label_of(name, package["section"], texts["en"]), source, texts)
        if key not in groups or len(texts) > len(groups[key].texts):
            groups[key] = group
    for group in groups.values():
        group.cluster = root(group.cluster)
    return sorted(groups.values(), key=lambda group: group.name)


def label_of(name: str, section: str, text: str) -> str | None:
    """The class of a package, if it has one."""
    if EMPTY.search(text):
        return None
    if section == "devel" and name.endswith("-dev"):
        section = "libdevel"  # headers, which some maintainers file under devel
    return LABELS.get(section)


def anonymous(text: str) -> str:
    """Text without what tells versions of one description apart."""
    return re.sub(r"\d+", "0", text.lower())


def split(groups: list[Group], seed: int, sizes: dict[str, int]) -> dict[str, list[Group]]:
    """The groups of each split; a cluster is in one of test, unlabeled and labeled at most.

    Of the groups with at least MIN_LANGUAGES, a third each, by a hash of the cluster, can become
    test and unlabeled ones, those with the most languages first; the last third leaves the
    labelled split some of the well-known packages that are translated most. Pretraining gets all
    but the clusters of the test split; the "parallel" ones are those in many languages.
    """

    def rank(group: Group) -> str:
        return hashlib.sha256(f"{seed}:{group.cluster}".encode()).hexdigest()

    def widest_first(group: Group) -> tuple[int, str]:
        return -len(group.texts), rank(group)

    wide = [group for group in groups if len(group.texts) >= MIN_LANGUAGES]
    sides = [[group for group in wide if int(rank(group), 16) % 3 == side] for side in (0, 1)]
    test = pick(sides[0], sizes["test"], widest_first)
    unlabeled = pick(sides[1], sizes["unlabeled"], widest_first)
    tested = {group.cluster for group in test}
    taken = tested | {group.cluster for group in unlabeled}
    free = [group for group in groups if group.cluster not in taken]
    pretrain = [group for group in groups if group.cluster not in tested]
    return {
        "test": test,
        "unlabeled": unlabeled,
        "labeled": pick(free, sizes["labeled"], rank, repeat=True),
        "pretrain": pretrain,
        "parallel": [group for group in pretrain if len(group.texts) >= PARALLEL_LANGUAGES],
    }


def pick(
    groups: list[Group],
    size: int,
    order: Callable[[Group], Any],
    repeat: bool = False,
) -> list[Group]:
    """Up to `size` labelled groups, one of each class in turn.

    Taking turns keeps the large classes (modules, libraries) from drowning the others: all
    classes get the same share until the small ones run out. A cluster gives one group to a
    class (the one with the most languages), as its packages have much text in common; with
    `repeat` it may give more, but only once the class has one of every other cluster.
    """
    queues = defaultdict(list)
    copies: Counter[tuple[str, str]] = Counter()
    for group in sorted(groups, key=lambda group: (-len(group.texts), group.name)):
        if group.label:
            copy = copies[group.label, group.cluster]
            copies[group.label, group.cluster] += 1
            if repeat or not copy:
                queues[group.label].append((copy, order(group), group.name, group))
    turns = []
    for label, queue in queues.items():
        queue.sort(key=lambda entry: entry[:3])
        turns += [(turn, label, group) for turn, (_, _, _, group) in enumerate(queue)]
    turns.sort(key=lambda entry: entry[:2])
    return sorted((group for _, _, group in turns[:size]), key=lambda group: group.name)


def record(group: Group, name: str) -> dict:
    """The JSON line of a group in the split `name`."""
    # Pretraining has the texts of the labeled and unlabeled groups too, and an id names one group of a dataset.
    line: dict = {"id": f"pretrain-{group.name}" if name in ("pretrain", "parallel") else group.name}
    if name in ("test", "labeled"):
        line["label"] = group.label
    languages = ["en"] if name == "labeled" else list(group.texts)
    line["texts"] = {language: {"text": group.texts[language]} for language in languages}
    return line


def report(name: str, groups: list[Group]) -> None:
    """Print a split's size, its texts per language and, where labelled, its class shares."""
    languages = Counter(language for group in groups for language in record(group, name)["texts"])
    print(f"{name}: {len(groups)} groups")
    print("  texts:", " ".join(f"{x}={languages[x]}" for x in LANGUAGES if languages[x]))
    if name in ("test", "labeled"):
        labels = Counter(group.label for group in groups)
        shares = [f"{x}={n / len(groups):.1%}" for x, n in sorted(labels.items())]
        print("  classes:", " ".join(shares))


def main() -> None:
    """Command line: fetch, join, split, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the JSONL files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the splits (default: 0)")
    parser.add_argument("--release", default="bookworm", help="codename (default: bookworm)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="debian-data-") as directory:
        files = fetch(Path(directory), args.release, LANGUAGES)
        rows = {key: read_rows(paths) for key, paths in files.items()}
        packages = read_packages(rows["packages"])
        descriptions = {x: read_descriptions(rows[x], x) for x in LANGUAGES}
        digest = hashlib.sha256()
        for paths in files.values():
            for path in paths:
                digest.update(path.read_bytes())
    groups = join(packages, descriptions)
    print(f"{len(packages)} packages, {len(groups)} groups, indices {digest.hexdigest()[:16]}")

    args.out.mkdir(parents=True, exist_ok=True)
    for name, members in split(groups, args.seed, SIZES).items():
        with (args.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for group in members:
                file.write(json.dumps(record(group, name), ensure_ascii=False) + "\n")
        report(name, members)


if __name__ == "__main__":
    sys.exit(main())
