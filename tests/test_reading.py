"""Foreign files: regular ones only, bounded in size and depth; an error is one line with the path and the remedy."""

import json
import os
from pathlib import Path

import pytest

from alsace_dist import reading
from alsace_dist.errors import NotReady, UserError

REMEDY = "make it anew"


def test_a_pipe_a_device_and_a_directory_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match=REMEDY) as caught:
            reading.read_text(path, REMEDY)
        assert str(path) in str(caught.value)


def test_a_file_beyond_the_bound_is_refused_by_its_size_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no disk, and reading it would take all memory
    with pytest.raises(UserError, match="bytes where at most") as caught:
        reading.read_json(path, REMEDY)
    assert str(path) in str(caught.value)


def test_text_that_is_no_utf8_is_refused_with_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("abé".encode("latin-1"))
    with pytest.raises(UserError, match="byte 3"):
        reading.read_text(path, REMEDY)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[" * 100_000 + "]" * 100_000, "[" * 65 + "]" * 65, "9" * 5_000, "{", ""],
    ids=["open", "very-deep", "a-level-too-deep", "digits", "cut", "empty"],
)
def test_json_that_is_broken_deep_or_endless_is_one_line_with_path_and_remedy(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        reading.read_json(path, REMEDY)
    assert str(caught.value).startswith(f"{path}: ")
    assert REMEDY in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_json_within_the_bounds_is_read_whole(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, "ü"], "b": {"c": []}}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    assert reading.read_json(path, REMEDY) == value
    deepest = "[" * reading.MAX_DEPTH + "]" * reading.MAX_DEPTH
    assert reading.depth_of(reading.parse_json(deepest, "", REMEDY)) == reading.MAX_DEPTH


def test_a_missing_file_is_not_ready_rather_than_broken(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match="no such file"):
        reading.read_json(tmp_path / "none.json", REMEDY)


def test_what_an_error_quotes_is_one_short_line() -> None:
    assert reading.shorten("a\n b") == "a b"
    assert len(reading.shorten("x" * 100_000)) == reading.MAX_SHOWN


@pytest.mark.parametrize(
    ("text", "where"),
    [(r'{"a": {"b": ["x", "\ud800"]}}', "a.b.1"), (r'{"a": {"\udc00": 1}}', "a"), (r'"x\ud83d"', "the text")],
)
def test_half_a_character_is_refused_by_its_place(text: str, where: str) -> None:
    with pytest.raises(UserError, match=rf"^f\.json: {where}: half of a character in .*; {REMEDY}$"):
        reading.parse_json(text, "f.json: ", REMEDY)
    assert reading.parse_json(r'"\ud83d\ude00"', "f.json: ", REMEDY) == "😀"


def test_a_message_is_one_line_that_steers_no_terminal() -> None:
    assert reading.one_line("a\nb\t c") == "a b c"
    assert reading.one_line("x\ufeffy\x1b[31mz é") == "x\\ufeffy\\x1b[31mz é"


def test_a_line_for_people_keeps_its_end_where_the_remedy_stands() -> None:
    line = reading.one_line("error at " + "x" * 5000 + "\x1b[31m; mend it\n\n")
    assert len(line) < 2000 and line.startswith("error at xxx") and line.endswith("\\x1b[31m; mend it")
    assert reading.one_line("a\n b") == "a b"


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("s3://bucket/data", ""),
        ("s3://bucket/a:b@c/data", ""),
        ("https://host:8443/a@b", ""),
        ("hdfs://someone@namenode:8020/data", ""),
        ("abfs://container@account.dfs.core.windows.net/data", ""),
        ("data/what?", ""),
        ("file:///data/what?", ""),
        ("s3://AKIAKEY:hunter2@bucket/data", "a user or a password"),
        ("s3://AKIAKEY:hun/ter2@bucket/data", "a user or a password"),
        ("https://hunter2@host/data", "a user or a password"),
        ("hdfs://someone:hunter2@namenode:8020/data", "a user or a password"),
        ("https://host/data?X-Amz-Signature=hunter2", "a query (?...), where signatures and tokens stand"),
        ("abfs://container@account/data?sig=hunter2", "a query (?...), where signatures and tokens stand"),
    ],
)
def test_secrets_in_urls_are_seen_and_not_shown(url: str, what: str) -> None:
    assert reading.secret_in(url) == what
    shown = reading.without_secrets(f"Cannot open '{url}' (http://me:hunter2@proxy:3128 answers): see http://x.org/a")
    assert "hunter2" not in shown and "ter2" not in shown
    assert shown.startswith(f"Cannot open '{url}'" if not what else "Cannot open '")
    assert shown.endswith("(http://***@proxy:3128 answers): see http://x.org/a")
