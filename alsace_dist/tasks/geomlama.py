"""GeoMLAMA (Yin et al., 2022): what people do in five countries, in five languages; several answers may be right.

A file per language holds 25 concepts of five rows, a row for each country; another one, ``_aug``, four paraphrases of
each row. Which candidates mean the same is in geomlama.yaml: candidates are put into English's order, and a language
whose candidates correspond to nobody's stands apart.

``hub_split`` says which prompts to read: ``prompts`` or ``paraphrases``; without it all 625. The five prompts of one
concept and country are a unit. Ids are CONCEPT-COUNTRY-NUMBER, 0 for the prompt, 1 to 4 for its paraphrases.
"""

import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from alsace_dist.config import InputConfig
from alsace_dist.errors import UserError
from alsace_dist.reading import check_encoding, check_file, check_regular
from alsace_dist.tasks.base import FoundProblem, FoundRow

SETTINGS = frozenset({"path", "languages", "hub_split"})
LANGUAGES = ("en", "zh", "hi", "fa", "sw")
COUNTRIES = ("United States", "China", "India", "Iran", "Kenya")
PARTS = ("prompts", "paraphrases")
GAP = "<mask>"
NUM_PARAPHRASES = 4  # of each prompt; those of a concept stand together, country by country
COLUMNS = ("Prompt", "Ans", "Candidate Ans")
MAX_BYTES = 64 << 20


class _Prompt(NamedTuple):
    """A line with a prompt. ``text``: None if it could not be read; ``answers``, ``candidates``: of prompts alone."""

    line: int
    text: str | None
    answers: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()


@cache
def concepts() -> list[dict[str, Any]]:
    """The concepts in their order, as geomlama.yaml has them."""
    found: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return found


def files(one: InputConfig) -> list[Path]:
    """The files that it reads. Raises ``UserError`` if there are none."""
    return [path for pair in _found(one).values() for path in pair if path is not None]


def rows(one: InputConfig) -> Iterator[FoundRow | FoundProblem]:
    """All rows, language by language, and what is wrong with lines. Raises ``UserError`` if there are no files."""
    part = one.hub_split
    if part not in (None, *PARTS):
        raise UserError(f"data.inputs.hub_split: {part!r} is no part of GeoMLAMA; set it to one of {', '.join(PARTS)}")
    prompts: dict[str, list[_Prompt]] = {}
    paraphrases: dict[str, list[_Prompt]] = {}
    found = _found(one)
    for language, (path, further) in found.items():
        prompts[language] = yield from _prompts(path)
        if further is not None:
            paraphrases[language] = yield from _paraphrases(further)
    yield from _other_counts({found[language][0]: read for language, read in prompts.items()})
    for language, (path, further) in found.items():
        yield from _language(language, path, further, prompts[language], paraphrases.get(language, []), part)


def _found(one: InputConfig) -> dict[str, tuple[Path, Path | None]]:
    """Language -> its files: prompts, and paraphrases where they are asked for."""
    root, wanted = Path(one.path), one.hub_split != "prompts"
    for folder in (root, root / "data"):
        pairs = {name: (folder / f"gd_prompt_{name}.tsv", folder / f"gd_prompt_{name}_aug.tsv") for name in LANGUAGES}
        there = {name: pair for name, pair in pairs.items() if os.path.lexists(pair[0])}
        if there:
            break
    else:
        raise UserError(f"data.inputs.path: {one.path}: holds no gd_prompt_LANGUAGE.tsv of GeoMLAMA; correct the path")
    asked = {name: pair for name, pair in there.items() if one.languages is None or name in one.languages}
    if not asked:
        has, wants = ", ".join(there), ", ".join(one.languages or ())
        raise UserError(f"data.inputs.path: {one.path}: GeoMLAMA is here in {has}, and not in {wants}")
    for path, _ in asked.values():
        check_file(str(path), "data.inputs.path")
    lacking = [further for _, further in asked.values() if wanted and not further.is_file()]
    if lacking:
        raise UserError(f"{lacking[0]}: no such file; restore it, or set hub_split: prompts")
    return {name: (path, further if wanted else None) for name, (path, further) in asked.items()}


# --- lines ---------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers: a line ends with a line feed, and nothing else ends one."""
    check_regular(path, "restore the file", MAX_BYTES)
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    check_encoding(path, data)
    for number, line in enumerate(data.split(b"\n"), start=1):
        line = line.removesuffix(b"\r")
        if line.strip():
            yield number, line


def _prompts(path: Path) -> Generator[FoundProblem, None, list[_Prompt]]:
    """The rows of a file of prompts are what is returned; what is wrong is yielded.

    Raises ``UserError`` if the columns are other ones.
    """
    lines = _lines(path)
    header = next(lines, (1, b""))[1].decode("utf-8", "replace").split("\t")
    if lacks := [name for name in COLUMNS if header.count(name) != 1]:
        raise UserError(f"{path}: no column {lacks[0]!r} among {', '.join(header)}; restore the file")
    places = [header.index(name) for name in COLUMNS]
    read: list[_Prompt] = []
    for number, line in lines:
        text, problem = _decoded(path, number, line)
        cells = text.split("\t")
        if problem is None and len(cells) != len(header):
            problem = FoundProblem(path, number, "broken row", f"{len(cells)} cells under {len(header)} columns")
        if problem is not None:
            yield problem._replace(keys=_keys_of(len(read)))
            read.append(_Prompt(number, None))
            continue
        prompt, answers, candidates = (cells[place] for place in places)
        read.append(_Prompt(number, prompt, _split(answers), _split(candidates)))
    return read


def _paraphrases(path: Path) -> Generator[FoundProblem, None, list[_Prompt]]:
    """As ``_prompts``, of a file with a prompt a line."""
    read: list[_Prompt] = []
    for number, line in _lines(path):
        text, problem = _decoded(path, number, line)
        if problem is None and "\t" in text:
            problem = FoundProblem(
                path, number, "broken row", f"{text.count(chr(9)) + 1} cells in a file of one column"
            )
        if problem is not None:
            row, paraphrase = _place_of(len(read))
            yield problem._replace(keys=_keys_of(row)[paraphrase : paraphrase + 1])
        read.append(_Prompt(number, None if problem else text))
    return read


def _decoded(path: Path, number: int, line: bytes) -> tuple[str, FoundProblem | None]:
    try:
        return line.decode("utf-8"), None
    except UnicodeDecodeError as error:
        return "", FoundProblem(path, number, "invalid UTF-8", f"byte {error.start + 1} of the line: {error.reason}")


def _split(cell: str) -> tuple[str, ...]:
    """Answers of a cell. A word that is listed twice is one answer, for nothing tells the two apart."""
    return tuple(dict.fromkeys(text.strip() for text in cell.split(",")))


def _place_of(number: int) -> tuple[int, int]:
    """Of a paraphrase, counted from 0, the row that it says again, and which of its paraphrases it is, from 1."""
    concept, rest = divmod(number, NUM_PARAPHRASES * len(COUNTRIES))
    paraphrase, country = divmod(rest, len(COUNTRIES))
    return concept * len(COUNTRIES) + country, paraphrase + 1


def _keys_of(row: int) -> tuple[str, ...]:
    """The ids of a row, counted from 0, and of its paraphrases."""
    concept, country = divmod(row, len(COUNTRIES))
    return tuple(f"{_unit(concept, country)}-{number}" for number in range(NUM_PARAPHRASES + 1))


def _unit(concept: int, country: int) -> str:
    return f"{concept:02d}-{COUNTRIES[country].replace(' ', '_')}"


def _other_counts(read: dict[Path, list[_Prompt]]) -> Iterator[FoundProblem]:
    """Rows are joined by their place, so that a file with more or fewer of them than most fits to none; and all tell
    by their place which concept and country they are of."""
    for path, prompts in read.items():
        if len(prompts) % len(COUNTRIES):
            detail = f"{len(prompts):,} rows, which are not {len(COUNTRIES)} countries of each concept: one is missing"
            yield FoundProblem(path, prompts[-1].line, "row count", detail)
    counts = Counter(map(len, read.values()))
    usual = max(counts, key=lambda number: (counts[number], number), default=0)
    for path, prompts in read.items():
        if len(prompts) != usual:
            detail = f"ends here after {len(prompts):,} rows, where most languages have {usual:,}"
            yield FoundProblem(path, prompts[-1].line if prompts else 1, "row count", detail)


# --- rows ----------------------------------------------------------------------------------------------------------


def _language(
    language: str,
    path: Path,
    further: Path | None,
    prompts: Sequence[_Prompt],
    paraphrases: Sequence[_Prompt],
    part: str | None,
) -> Iterator[FoundRow | FoundProblem]:
    """The rows of one language. The answers to a paraphrase are those of its prompt."""
    if len(prompts) > len(concepts()) * len(COUNTRIES):
        detail = f"{len(prompts)} rows, and GeoMLAMA has {len(concepts())} concepts of {len(COUNTRIES)}"
        yield FoundProblem(path, prompts[-1].line, "row count", detail)
        return
    if further is not None and len(paraphrases) != NUM_PARAPHRASES * len(prompts):
        detail = f"{len(paraphrases)} paraphrases of {len(prompts)} prompts, where each has {NUM_PARAPHRASES}"
        yield FoundProblem(further, paraphrases[-1].line if paraphrases else 1, "row count", detail)
        return
    made: dict[int, tuple[tuple[str, ...], list[int], bool]] = {}
    for row, prompt in enumerate(prompts):
        concept = row // len(COUNTRIES)
        if prompt.text is None:
            continue
        if unknown := [text for text in prompt.answers if text not in prompt.candidates]:
            detail = f"{unknown[0]!r} is not one of the candidates {', '.join(prompt.candidates)}"
            yield FoundProblem(path, prompt.line, "unknown label", detail, _keys_of(row))
            continue
        candidates, is_apart = _in_order(concept, language, prompt.candidates)
        made[row] = candidates, [candidates.index(text) for text in prompt.answers], is_apart
    texts = [(path, row, 0, prompt) for row, prompt in enumerate(prompts)] if part != PARTS[1] else []
    if further is not None:
        texts += [(further, *_place_of(number), prompt) for number, prompt in enumerate(paraphrases)]
    without = _without_countries(texts)
    for file, row, number, prompt in texts:
        if row not in made or prompt.text is None:
            continue
        concept, country = divmod(row, len(COUNTRIES))
        fields = {"prompt": prompt.text, "without_country": without[concept, number]}
        unit = _unit(concept, country)
        yield FoundRow(file, prompt.line, f"{unit}-{number}", language, fields, *made[row], unit, COUNTRIES[country])


def _in_order(concept: int, language: str, candidates: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
    """Candidates in the order of English, or as they are; and whether they correspond to no other language's."""
    about = concepts()[concept]
    if language in about.get("apart", {}) or len(candidates) != about["num"]:
        return candidates, True
    order = about.get("order", {}).get(language, range(about["num"]))
    return tuple(candidates[place] for place in order), False


def _without_countries(texts: Sequence[tuple[Path, int, int, _Prompt]]) -> dict[tuple[int, int], str]:
    """(concept, number of the paraphrase) -> what the prompts of all countries have in common: all but the country.

    A common part without the gap, as of prompts that differ in more than that, gives a bare gap.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    for _, row, number, prompt in texts:
        if prompt.text is not None:
            groups.setdefault((row // len(COUNTRIES), number), []).append(prompt.text)
    return {place: _common(group) for place, group in groups.items()}


def _common(texts: Sequence[str]) -> str:
    """The words that all texts begin with and those that all end with; of a text without blanks its letters."""
    has_blanks = all(" " in text.strip() for text in texts)
    pieces = [text.split() if has_blanks else list(text.strip()) for text in texts]
    least = min(map(len, pieces))
    start = next((place for place in range(least) if len({one[place] for one in pieces}) > 1), least)
    most = least - start
    end = next((place for place in range(most) if len({one[-1 - place] for one in pieces}) > 1), most)
    kept = [*pieces[0][:start], *pieces[0][len(pieces[0]) - end :]]
    common = (" " if has_blanks else "").join(kept)
    return common if common.count(GAP) == 1 else GAP
