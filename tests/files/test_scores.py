"""Score files: what is written comes back; what is no score file is an error that says so."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alsace_dist.errors import UserError
from alsace_dist.files.manifest import write_manifest
from alsace_dist.files.scores import KIND, Scores, read_metadata, read_score_file, read_scores, write_scores


def log_probs(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities, np.float32))


ROWS = [log_probs(0.6, 0.4), log_probs(0.1, 0.9), log_probs(0.2, 0.3, 0.5)]
SCORES = Scores(["a", "a", "b"], ["en", "de", "en"], ROWS, [None, None, 2])


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    metadata = {"fingerprint": "x", "shard": "y"}
    write_scores(tmp_path / "s.parquet", SCORES, metadata)
    found = read_score_file(tmp_path / "s.parquet")
    assert (found.keys, found.languages, found.labels) == (SCORES.keys, SCORES.languages, SCORES.labels)
    for row, expected in zip(found.log_probs, SCORES.log_probs, strict=True):
        assert row.dtype == np.float32 and row.tolist() == expected.tolist()
    assert read_metadata(tmp_path / "s.parquet") == metadata


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
