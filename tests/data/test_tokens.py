"""Encoded rows come out of their files as they went in."""

from pathlib import Path

import pytest

from alsace_dist.data.rows import Candidates, EncodedRow
from alsace_dist.data.tokens import TokenRows, read_metadata, write_tokens
from alsace_dist.errors import UserError

FIXED = {language: Candidates(((number,), (9, number))) for number, language in enumerate(("de", "en"))}
OWN = Candidates(((1, 2), (3,), (4, 5, 6)))
ABOUT = {"training": "x", "shard": "y"}
# Every kind of label, no token at all, candidates of the language and of the row, and texts beyond ASCII in names.
ROWS = [
    EncodedRow("a", "de", None, [5, 6, 7], FIXED["de"], 1, True),
    EncodedRow("a", "en", 0, [], FIXED["en"], 0, False, category="Übersee"),
    EncodedRow("b\u2028", "en", (2,), [2**31 - 1], FIXED["en"], 0, False, context_free_ids=(1, 2)),
    EncodedRow("c", "en", (0, 2), [8] * 500, FIXED["en"], 3, False, is_apart=True),
]


def written(path: Path, are_fixed: bool = True, rows: list[EncodedRow] = ROWS) -> TokenRows:
    write_tokens(path, rows, are_fixed, ABOUT)
    return TokenRows(path, FIXED.__getitem__)


def test_rows_are_what_was_written(tmp_path: Path) -> None:
    found = written(tmp_path / "0.arrow")
    assert list(found) == ROWS and len(found) == 4
    assert found[1:3] == ROWS[1:3] and found[3] == ROWS[3]
    assert [type(row.label) for row in found] == [type(row.label) for row in ROWS]
    assert all(
        found[index].candidates is FIXED[ROWS[index].language] for index in range(4)
    )  # equal ones are one object
    assert found.groups() == [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert list(found.places()) == [("a", "de", 2), ("a", "en", 2), ("b\u2028", "en", 2)]
    assert read_metadata(tmp_path / "0.arrow") == ABOUT
    with pytest.raises(IndexError):
        found[4]


def test_candidates_of_rows_are_written(tmp_path: Path) -> None:
    rows = [EncodedRow(key, "xx", 1, [1], OWN, 0, False) for key in "ab"]
    found = written(tmp_path / "0.arrow", are_fixed=False, rows=rows)
    assert list(found) == rows and list(found.places()) == [("a", "xx", 3), ("b", "xx", 3)]


def test_a_shard_without_rows(tmp_path: Path) -> None:
    found = written(tmp_path / "0.arrow", rows=[])
    assert list(found) == [] and found.groups() == [] and list(found.places()) == []


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("0", "1"):
        written(tmp_path / f"{name}.arrow")
    assert (tmp_path / "0.arrow").read_bytes() == (tmp_path / "1.arrow").read_bytes()


@pytest.mark.parametrize("data", [b"", b"ARROW1\0\0", b"no such thing", None])
def test_another_file_is_named(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "0.arrow"
    if data is None:
        import pyarrow as pa

        table = pa.table({"key": ["a"]})
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_bytes(data)
    with pytest.raises(UserError, match=r"0\.arrow: not a file of tokens \(.+\); delete .+ and start again"):
        TokenRows(path, FIXED.__getitem__)
    assert read_metadata(path) == {}
