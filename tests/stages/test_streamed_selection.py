"""A selection made a shard at a time equals, to the last digit, the one made by the definitions, group by group."""

import resource
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alsace_dist.config import Config
from alsace_dist.errors import UserError
from alsace_dist.files import score_columns
from alsace_dist.files import scores as score_files
from alsace_dist.files.manifest import write_manifest
from alsace_dist.files.scores import Scores, read_batches, read_scores, write_scores
from alsace_dist.files.shards import Label
from alsace_dist.method import calibration
from alsace_dist.method.targets import MODES, lessons
from alsace_dist.stages.select import make_selection
from tests.stages.test_select import OWN, make_config

LANGUAGES = ("aa", "bb", "cc", "en", "zz")
Group = dict[str, np.ndarray]

# --- by the definitions --------------------------------------------------------------------------------------------


def vote_of(rows: list[np.ndarray], soft: bool) -> int:
    stacked = np.stack(rows).astype(np.float64)
    summed = np.exp(stacked).sum(axis=0)
    if soft:
        return int(np.argmax(summed))
    votes = np.bincount(stacked.argmax(axis=1), minlength=stacked.shape[1])
    return int(np.argmax(np.where(votes == votes.max(), summed, -np.inf)))


def normalised(row: np.ndarray) -> np.ndarray:
    shifted = row - row.max()
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return found


def biases_of(groups: list[Group], reference: str | None) -> dict[str, np.ndarray]:
    biases = {}
    for language in sorted({language for group in groups for language in group}):
        shared = [group for group in groups if language in group and (reference is None or reference in group)]
        if language == reference:
            biases[language] = np.zeros(len(next(iter(shared[0].values()))))
        elif shared:
            own = np.stack([group[language] for group in shared]).astype(np.float64)
            aims = [[group[reference]] if reference else list(group.values()) for group in shared]
            aim = np.mean([np.exp(np.stack(rows).astype(np.float64)).mean(axis=0) for rows in aims], axis=0)
            biases[language] = matching(own, np.maximum(aim, 1e-9))
    return biases


def matching(own: np.ndarray, aim: np.ndarray) -> np.ndarray:
    bias = np.zeros(aim.shape)
    for _ in range(500):
        marginal = np.mean([np.exp(normalised(row + bias)) for row in own], axis=0)
        if np.abs(marginal - aim).max() < 1e-6:
            break
        bias += np.log(aim) - np.log(np.maximum(marginal, 1e-12))
    return bias - bias.mean()


def values_of(config: Config, groups: list[Group], golds: list[tuple[int, ...]]) -> Iterator[tuple[str, float]]:
    section, source = config.select, config.data.source_language
    for group, gold in zip(groups, golds, strict=True):
        for language, row in group.items():
            answer = int(np.argmax(row))
            others = [group[other] for other in group if not section.leave_one_out or other != language]
            if section.score == "accuracy":
                yield language, float(answer in gold)
            elif others and (section.vote != "source" or source in group):
                is_source = section.vote == "source"
                voted = int(np.argmax(group[source])) if is_source else vote_of(others, section.vote == "soft")
                yield (
                    language,
                    float(answer == voted if section.score == "agreement" else np.exp(np.float64(row[voted]))),
                )


def by_definition(config: Config, directory: Path) -> dict[str, Any]:
    """Scores, biases, number of groups, and the languages of each group, from all rows at once."""
    whole = read_scores(directory, config.select.num_groups)
    groups, golds, biases = list(whole.groups().values()), list(whole.golds().values()), {}
    languages = [tuple(group) for group in groups]
    if config.select.calibration == "marginal":
        biases = biases_of(groups, "en" if config.select.reference == "source" else None)
        groups = [
            {name: normalised(row + biases[name]) if name in biases else row for name, row in group.items()}
            for group in groups
        ]
    sums: dict[str, list[float]] = {}
    for language, value in values_of(config, groups, golds):
        sums.setdefault(language, []).append(value)
    scores = {language: sum(values) / len(values) for language, values in sums.items()}
    return {"scores": scores, "biases": biases, "num_groups": len(groups), "languages": languages}


# --- data ----------------------------------------------------------------------------------------------------------


def write_shards(
    directory: Path,
    sizes: tuple[int, ...],
    candidates: Callable[[int], int],
    labels: bool = True,
    seed: int = 0,
    most_apart: int = 0,
) -> Path:
    """Files of so many groups with holes, rows that stand apart, and probabilities so coarse that votes often tie.
    ``most_apart``: how many candidates rows have that stand apart; 0: as many as the others."""
    rng, paths, number = np.random.default_rng(seed), [], 0
    for shard, size in enumerate(sizes):
        rows: list[tuple[str, str, np.ndarray, Label, bool]] = []
        for _ in range(size):
            number += 1
            own = [name for name in LANGUAGES if rng.random() < 0.7] or ["en"]
            most = candidates(number)
            label: Label = (0, most - 1) if number % 5 == 0 else int(rng.integers(most))
            for place, language in enumerate(own):
                shares = rng.integers(1, 4, most) + (language == "aa") * np.eye(most)[0]
                log_probs = np.log(shares / shares.sum()).astype(np.float32)
                is_apart = place > 0 and rng.random() < 0.1
                if is_apart and most_apart:
                    log_probs = np.full(most_apart, -np.log(most_apart), np.float32)
                rows.append((f"g{number}", language, log_probs, label if labels else None, is_apart))
        keys, languages, log_probs_of, labels_of, apart = (list(column) for column in zip(*rows, strict=True))
        path = directory / f"{shard:06d}.parquet"
        write_scores(path, Scores(keys, languages, log_probs_of, labels_of, apart), {})
        paths.append(path)
    write_manifest(directory, score_files.KIND, {}, paths)
    return directory


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("scores"), (25, 1, 30, 12), lambda number: 3)


WAYS: list[dict[str, Any]] = [
    {"calibration": way, "vote": vote, "score": score, "leave_one_out": alone} | reference
    for (way, reference), vote, score, alone in product(
        [("none", {}), ("marginal", {"reference": "source"}), ("marginal", {"reference": "pooled"})],
        ["hard", "soft", "source"],
        ["confidence", "agreement", "accuracy"],
        [False, True],
    )
    if not alone or (vote != "source" and score != "accuracy")
]


def compare(config: Config, directory: Path) -> None:
    found, expected = make_selection(config, directory), by_definition(config, directory)
    assert found.scores == expected["scores"]
    assert found.biases == {name: bias.tolist() for name, bias in expected["biases"].items()}
    assert found.num_groups == expected["num_groups"]
    present = {name for group in expected["languages"] for name in group}
    assert {*found.teachers, *found.students} == present
    for mode in MODES:
        taught = [lessons(group, found.ranked_weights, mode).values() for group in expected["languages"]]
        assert found.num_pairs[mode] == sum(lesson.weight for group in taught for lesson in group)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(str(value) for value in way.values()))
def test_a_selection_is_what_the_definitions_say(
    tmp_path: Path, shards: Path, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few that the iterations of the calibration read pieces of a file, which end within a shard's rows.
    monkeypatch.setattr(calibration, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(calibration, "BYTES_IN_MEMORY", 100)
    compare(make_config(tmp_path, task=TASK, select=way | {"rule": "top_k", "top_k": 2}), shards)


TASK = {"fields": ["text"], "template": "{text}", "labels": ["x", "y", "z"]}


@pytest.mark.parametrize("num_groups", [1, 25, 27, 68])
def test_of_the_first_groups_whole_shards_are_taken(tmp_path: Path, shards: Path, num_groups: int) -> None:
    config = make_config(tmp_path, task=TASK, select={"num_groups": num_groups})
    compare(config, shards)
    assert make_selection(config, shards).num_groups == {1: 25, 25: 25, 27: 56, 68: 68}[num_groups]
    with pytest.raises(UserError, match=r"select\.num_groups: 69 asked for, .* has 68; lower it"):
        make_selection(make_config(tmp_path, task=TASK, select={"num_groups": 69}), shards)


@pytest.mark.parametrize("way", [way for way in WAYS if way["calibration"] == "none"], ids=str)
def test_groups_with_candidates_of_their_own(tmp_path: Path, way: dict[str, Any]) -> None:
    directory = write_shards(tmp_path / "scores", (20, 25), lambda number: 2 + number % 4, seed=1)
    compare(make_config(tmp_path, **OWN, select=way | {"rule": "all"}), directory)


@pytest.mark.parametrize("way", WAYS[::4], ids=str)
def test_rows_that_stand_apart_may_have_other_numbers_of_candidates(tmp_path: Path, way: dict[str, Any]) -> None:
    """Rows that stand apart have no part in a selection, which is the same whatever their number of candidates."""
    found = []
    for most in (3, 5):
        directory = write_shards(tmp_path / str(most), (20, 25), lambda number: 3, most_apart=most)
        found.append(make_selection(make_config(tmp_path, **OWN, select=way | {"rule": "all"}), directory))
    assert found[0] == found[1]


def test_memory_is_that_of_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six times as many shards take but the hashes of their keys more, and their combinations of languages."""
    monkeypatch.setattr(calibration, "BYTES_IN_MEMORY", 100)
    config = make_config(tmp_path, task=TASK)
    peaks = []
    for number in (4, 24):
        directory = write_shards(tmp_path / f"of-{number}", (150,) * number, lambda number: 3)
        make_selection(config, directory)  # what is loaded for the first time stays
        tracemalloc.start()
        make_selection(config, directory)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0]


def test_a_disk_without_room_for_the_calibration_is_said(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "BYTES_IN_MEMORY", 100)
    config = make_config(tmp_path, task=TASK)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # no file may be larger, as on a disk that is full
    try:
        with pytest.raises(UserError, match=r"large; the calibration keeps its scores there, 4 bytes .* in \$TMPDIR"):
            make_selection(config, shards)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- groups that files share ---------------------------------------------------------------------------------------


def write_files(directory: Path, files: list[list[tuple[str, str]]]) -> Path:
    paths = []
    for number, rows in enumerate(files):
        path = directory / f"{number:06d}.parquet"
        log_probs = [np.log(np.array([0.5, 0.5], np.float32)) for _ in rows]
        write_scores(path, Scores([key for key, _ in rows], [name for _, name in rows], log_probs, [0] * len(rows)), {})
        paths.append(path)
    write_manifest(directory, score_files.KIND, {}, paths)
    return directory


FILES = [[("a", "en"), ("b", "en")], [("c", "en")], [("d", "de"), ("d", "en")]]


@pytest.mark.parametrize(
    ("further", "words"),
    [
        ([("e", "en"), ("b", "de"), ("b", "en")], "group 'b', language 'en': is there twice; delete the"),
        (
            [("b", "de")],
            "group 'b': is divided between 000000.parquet and 000003.parquet; delete the",
        ),
    ],
)
def test_a_group_that_two_files_have_is_found(tmp_path: Path, further: list[tuple[str, str]], words: str) -> None:
    directory = write_files(tmp_path / "scores", [*FILES, further])
    with pytest.raises(UserError, match=words):
        list(read_batches(directory))
    with pytest.raises(UserError, match=words):
        read_scores(directory)
    with pytest.raises(UserError, match=words):
        make_selection(make_config(tmp_path), directory)
    assert len(read_scores(directory, 3).keys) == 3  # of the files that are read no two have the group


def test_keys_whose_hashes_meet_are_no_group_that_two_files_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_columns, "_hashes", lambda keys: np.zeros(len(keys), np.int64))
    directory = write_files(tmp_path / "scores", FILES)
    assert read_scores(directory).keys == ["a", "b", "c", "d", "d"]
    with pytest.raises(UserError, match="group 'a', language 'en': is there twice"):
        read_scores(write_files(tmp_path / "more", [*FILES, [("a", "en")]]))


def test_languages_of_a_group_with_different_numbers_of_candidates_are_refused(tmp_path: Path) -> None:
    rows = [np.log(np.full(size, 1 / size, np.float32)) for size in (2, 2, 3)]
    path = tmp_path / "scores/000000.parquet"
    for apart, words in ([False] * 3, "group 'a', language 'en': has more or fewer candidates"), ([True] * 3, ""):
        write_scores(path, Scores(["a"] * 3, ["aa", "de", "en"], rows, [None] * 3, list(apart)), {})
        write_manifest(path.parent, score_files.KIND, {}, [path])
        if words:
            with pytest.raises(UserError, match=words):
                read_scores(path.parent)
        else:
            assert len(read_scores(path.parent).keys) == 3
