"""Score files: what is written comes back; what is no score file is an error that says so."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alsace_dist.errors import UserError
from alsace_dist.files.manifest import write_manifest
from alsace_dist.files.scores import (
    COUNTS,
    KIND,
    Scores,
    check_rows,
    read_metadata,
    read_score_file,
    read_scores,
    write_scores,
)


def log_probs(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities, np.float32))


ROWS = [log_probs(0.6, 0.4), log_probs(0.1, 0.9), log_probs(0.2, 0.3, 0.5)]
SCORES = Scores(["a", "a", "b"], ["en", "de", "en"], ROWS, [None, None, 2])


COUNTED = '{"groups": 2, "languages": {"de": 1, "en": 2}}'


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    metadata = {"fingerprint": "x", "shard": "y"}
    write_scores(tmp_path / "s.parquet", SCORES, metadata)
    found = read_score_file(tmp_path / "s.parquet")
    assert (found.keys, found.languages, found.labels) == (SCORES.keys, SCORES.languages, SCORES.labels)
    for row, expected in zip(found.log_probs, SCORES.log_probs, strict=True):
        assert row.dtype == np.float32 and row.tolist() == expected.tolist()
    assert read_metadata(tmp_path / "s.parquet") == metadata | {COUNTS: COUNTED}


@pytest.mark.parametrize("are_counted", [True, False])
def test_a_file_has_every_row_of_its_shard_once(tmp_path: Path, are_counted: bool) -> None:
    """By the counts that it carries, or, as version 0.1.0 wrote files, without any."""
    path = tmp_path / "s.parquet"

    def write(scores: Scores) -> None:
        write_scores(path, scores, {})
        if not are_counted:
            pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)

    write(SCORES)
    check_rows(path, {"de": 1, "en": 2, "sw": 0})
    for wrong in ({"de": 1, "en": 3}, {"de": 1}, {"de": 1, "en": 1, "fr": 1}, {"de": 2, "en": 1}, {}):
        with pytest.raises(UserError, match=r"s\.parquet: rows are missing or too many; delete it and score again"):
            check_rows(path, wrong)
    write(Scores(["a"] * 3, ["en", "en", "de"], [ROWS[0]] * 3, [None] * 3))
    for counts in ({"de": 1, "en": 2}, {"de": 1, "en": 1}):
        with pytest.raises(UserError, match="rows are missing or too many" if are_counted else "is there twice"):
            check_rows(path, counts)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        check_rows(path, {"de": 1, "en": 2})


def test_no_rows_come_back_as_no_rows(tmp_path: Path) -> None:
    write_scores(tmp_path / "s.parquet", Scores([], [], [], []), {})
    assert read_score_file(tmp_path / "s.parquet").groups() == {}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"log_probs": [1.0]}, "not a score file"),
        ({"log_probs": [["much"]]}, "not a score file"),
        ({"log_probs": [None]}, "column log_probs has holes"),
        ({"key": [None]}, "column key has holes"),
        ({"language": None}, "not a score file"),
        ({"key": [7]}, r"not a score file (column key holds int64)"),
        ({"log_probs": [[-1]]}, r"not a score file (column log_probs holds list<"),
        ({"label": [0.5]}, r"not a score file (column label holds double)"),
        ({"label": ["0"]}, r"not a score file (column label holds string)"),
    ],
)
def test_a_file_of_another_kind_is_an_error(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    whole = {"key": ["a"], "language": ["en"], "log_probs": [[-1.0]], "label": [0]} | columns
    path = tmp_path / "s.parquet"
    pq.write_table(pa.table({name: values for name, values in whole.items() if values is not None}), path)
    with pytest.raises(UserError) as error:
        read_score_file(path)
    assert str(error.value).startswith(f"{path}: {words}")
    assert str(error.value).endswith("delete its directory and run `alsace score` again")
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match="not a score file"):
        read_score_file(path)


def test_num_groups_takes_whole_shards_until_there_are_enough(tmp_path: Path) -> None:
    directory = tmp_path / "scores"
    paths = []
    for shard in range(3):
        keys = [f"g{shard}{number}" for number in range(4)]
        path = directory / f"00000{shard}.parquet"
        rows = [np.log(np.array([0.5, 0.5], dtype=np.float32))] * 4
        write_scores(path, Scores(keys, ["en"] * 4, rows, [None] * 4), {})
        paths.append(path)
    write_manifest(directory, KIND, {}, paths)
    assert [len(read_scores(directory, number).keys) for number in (1, 4, 5, 12, None)] == [4, 4, 8, 12, 12]
    with pytest.raises(UserError, match=r"select\.num_groups: 13 asked for, .* has 12; lower it"):
        read_scores(directory, 13)


@pytest.mark.parametrize(
    ("keys", "languages", "words"),
    [
        (["a", "b", "a"], ["en", "en", "en"], "group 'a', language 'en': is there twice"),
        (["a", "", "b"], ["en", "en", "en"], "group '', language 'en': a name is empty"),
        (["a", "b", "c"], ["en", "", "en"], "group 'b', language '': a name is empty"),
    ],
)
def test_names_that_are_none_or_twice_are_refused(
    tmp_path: Path, keys: list[str], languages: list[str], words: str
) -> None:
    write_scores(tmp_path / "s.parquet", Scores(keys, languages, [ROWS[0]] * 3, [None] * 3), {})
    with pytest.raises(UserError, match=rf"s\.parquet: {words}; delete its directory"):
        read_score_file(tmp_path / "s.parquet")


@pytest.mark.parametrize(
    ("details", "words"),
    [
        ({"num_examples": 4}, "has 3 rows, and manifest.json says 4"),
        ({"num_examples": 3, "texts": {"en": {}, "sw": {}}}, "differ in the language 'de'"),
        ({"num_examples": 3, "texts": {"en": {}, "de": {}, "sw": {}}}, "differ in the language 'sw'"),
    ],
)
def test_rows_are_held_against_the_manifest(tmp_path: Path, details: dict[str, Any], words: str) -> None:
    write_scores(tmp_path / "s.parquet", SCORES, {})
    write_manifest(tmp_path, KIND, {}, [tmp_path / "s.parquet"], {"num_examples": 3, "texts": {"en": {}, "de": {}}})
    assert len(read_scores(tmp_path).keys) == 3
    write_manifest(tmp_path, KIND, {}, [tmp_path / "s.parquet"], details)
    with pytest.raises(UserError, match=words):
        read_scores(tmp_path)
    assert len(read_scores(tmp_path, 1).keys) == 3  # with a number of groups, not all files need be read


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (np.array([0.0], np.float32), "row 2 has fewer than two candidates"),
        (np.array([-0.1, -0.1], np.float32), r"row 2: its probabilities add up to 1\.81, not to 1"),
    ],
)
def test_rows_that_are_no_log_probabilities_are_refused(tmp_path: Path, row: np.ndarray, words: str) -> None:
    write_scores(tmp_path / "s.parquet", Scores(["a"] * 3, ["en", "de", "fr"], [*ROWS[:2], row], [None] * 3), {})
    with pytest.raises(UserError, match=rf"s\.parquet: {words}; delete its directory"):
        read_score_file(tmp_path / "s.parquet")


def test_rows_that_are_not_of_the_task_or_contradict_each_other(tmp_path: Path) -> None:
    """As somebody leaves them who edits all files alike and signs them again."""
    row = np.log(np.array([0.5, 0.5], dtype=np.float32))
    for name, labels, is_apart, words in (
        ("size", [0, 0], False, "language 'de': has scores of 2 candidates, and the task has 3"),
        ("label", [0, 1], False, "language 'en': has the label 1, where another language has 0"),
        ("apart", [0, 1], True, ""),
    ):
        directory = tmp_path / name
        scores = Scores(["g", "g"], ["de", "en"], [row, row], labels, [False, is_apart] if is_apart else [])
        write_scores(directory / "000000.parquet", scores, {})
        write_manifest(directory, KIND, {}, [directory / "000000.parquet"])
        if not words:
            assert read_scores(directory, num_candidates=2).labels == [0, 1]
            continue
        with pytest.raises(UserError, match=words):
            read_scores(directory, num_candidates=3 if name == "size" else 2)
