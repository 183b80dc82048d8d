"""Random edits of texts, of values as JSON and YAML have them, of bytes, and of what a path is in the file system.

Each function takes the random numbers of its trial, and returns what it did in a few words.
"""

import copy
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = 100_000
NASTY: tuple[Any, ...] = (None, True, False, 0, -1, 1, 2, 3, 0.5, -0.0, 1e308, float("nan"), float("inf"), [], {})
NASTY += (-float("inf"), 10**9, 2**31, 2**63, -(2**63), 10**30, 10**400, "nan", "null", "1e9", "no", "", " ", "\n")
NASTY += ("x" * 5_000, "..", "run", "en", "xx", "ÅÄ", "\ud800", "\0", "{text}", "{x}", "<extra_id_0>", "</s>", "a: b")
NASTY += ("[", "*", "$(id)", [None], [[[]]], {"": None}, ["en", "en"], {"en": 1}, [0.5, 0.5], {"a": {"b": {"c": []}}})
LETTERS = "aZ09 \t\n:-[]{}#&*!|>'\"%@`,.?\\é☃\u2028\ufeff\x00\x1b"  # no slash: a path must not leave the world


def edit_text(rng: random.Random, text: str) -> tuple[str, str]:
    """A text with a character, a line, an indentation, or a bracket that is not the old one."""
    lines = text.split("\n")
    row = rng.randrange(len(lines))
    at = rng.randrange(len(text) + 1)
    letter = rng.choice(LETTERS)
    kind = rng.choice(
        ("insert", "drop", "replace", "line twice", "line less", "lines swapped", "indent", "cut", "deep")
    )
    if kind == "insert":
        return text[:at] + letter + text[at:], f"{letter!r} inserted at {at}"
    if kind == "drop":
        return text[:at] + text[at + 1 :], f"character {at} dropped"
    if kind == "replace":
        return text[:at] + letter + text[at + 1 :], f"character {at} replaced by {letter!r}"
    if kind == "cut":
        return text[:at], f"cut at {at}"
    if kind == "deep":
        bracket = rng.choice(("[", '{"a":', "- ", "? "))
        return text[:at] + bracket * rng.choice((10, 100, 3_000, DEEP)) + text[at:], f"{bracket!r} many times at {at}"
    if kind == "line twice":
        lines.insert(row, lines[row])
    elif kind == "line less":
        del lines[row]
    elif kind == "lines swapped":
        other = rng.randrange(len(lines))
        lines[row], lines[other] = lines[other], lines[row]
    else:
        lines[row] = rng.choice(("  ", "\t", " ")) + lines[row]
    return "\n".join(lines), f"line {row}: {kind}"


def edit_value(rng: random.Random, value: Any) -> tuple[Any, str]:
    """A JSON value one part of which is another, gone, twice, or renamed."""
    value = copy.deepcopy(value)
    place, parent, key = value, None, None
    path = []
    while isinstance(place, dict | list) and place and (parent is None or rng.random() < 0.8):
        key = rng.choice(sorted(place, key=str)) if isinstance(place, dict) else rng.randrange(len(place))
        parent, place = place, place[key]
        path.append(str(key))
    name = ".".join(path)
    if parent is None:
        new = rng.choice(NASTY)
        return new, f"whole replaced by {_short(new)}"
    kind = rng.choice(("replace", "replace", "replace", "drop", "another", "rename", "sibling"))
    if kind == "drop":
        del parent[key]
        return value, f"{name} dropped"
    if kind == "sibling":
        other = rng.choice(list(parent.values()) if isinstance(parent, dict) else parent)
        parent[key] = copy.deepcopy(other)
        return value, f"{name} replaced by its sibling {_short(other)}"
    if kind in ("another", "rename"):
        if isinstance(parent, dict):
            new = rng.choice(("", "x", f"{key}s", str(key).upper(), f" {key}", "\ud800", "en", "0"))
            parent[new] = parent.pop(key) if kind == "rename" else parent[key]
            return value, f"{name}: {kind} {new!r}"
        parent.insert(key, parent[key])
        return value, f"{name} twice"
    parent[key] = copy.deepcopy(rng.choice(NASTY)) if rng.random() < 0.7 else near(rng, place)
    return value, f"{name} replaced by {_short(parent[key])}"


def near(rng: random.Random, value: Any) -> Any:
    """A value that might be a person's slip for this one."""
    if isinstance(value, bool) or value is None:
        return rng.choice(("yes", 1, not value))
    if isinstance(value, int | float):
        return rng.choice((-value, value + 1, value * 1000, str(value), [value], value / 3))
    if isinstance(value, str):
        return rng.choice((value + " ", value.upper(), value[:-1], [value], value + "\n", value * 2))
    if isinstance(value, list):
        return rng.choice((value + value, value[:1], dict.fromkeys(map(str, value)), value[::-1]))
    return rng.choice((list(value), str(value), {key: value[key] for key in list(value)[:1]}))


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 60 else text[:57] + "..."


def edit_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Bytes some of which are others, gone, or twice."""
    if not data:
        return b"\0", "a NUL where there was nothing"
    at = rng.randrange(len(data))
    stop = min(len(data), at + rng.choice((1, 2, 8, 100)))
    kind = rng.choice(("flip", "zero", "random", "drop", "cut", "empty", "append", "twice", "header", "utf-16", "bom"))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :], f"a bit of byte {at} flipped"
    if kind == "header":
        return bytes(rng.randrange(256) for _ in range(16)) + data[16:], "the first 16 bytes replaced"
    new = {
        "zero": data[:at] + bytes(stop - at) + data[stop:],
        "random": data[:at] + bytes(rng.randrange(256) for _ in range(stop - at)) + data[stop:],
        "drop": data[:at] + data[stop:],
        "cut": data[:at],
        "empty": b"",
        "append": data + rng.choice((b"\0", b"\n", b"x" * 600, b"\xff\xfe")),
        "twice": data + data,
        "utf-16": data.decode("utf-8", "replace").encode("utf-16"),
        "bom": b"\xef\xbb\xbf" + data,
    }[kind]
    return new, f"{kind} at {at} of {len(data)}"


# --- what a path is ------------------------------------------------------------------------------------------------


def _fifo(path: Path, aside: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path, aside: Path) -> None:
    os.chdir(path.parent)  # the name of a socket has at most 107 characters
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)


def _link(path: Path, aside: Path) -> None:
    path.symlink_to(aside)


def _nowhere(path: Path, aside: Path) -> None:
    path.symlink_to("nowhere")


def _loop(path: Path, aside: Path) -> None:
    path.symlink_to(path.name)


def _zeros(path: Path, aside: Path) -> None:
    path.symlink_to("/dev/zero")


def _directory(path: Path, aside: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("a person's own\n")


def _file(path: Path, aside: Path) -> None:
    path.write_text("a person's own\n")


def _sparse(path: Path, aside: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def _long_sparse(path: Path, aside: Path) -> None:
    """The old content, and then a terabyte of nothing."""
    shutil.copyfile(aside, path)
    with path.open("ab") as file:
        file.truncate(1 << 40)


def _closed(path: Path, aside: Path) -> None:
    (shutil.copytree if aside.is_dir() else shutil.copyfile)(aside, path)
    path.chmod(0)


def _read_only(path: Path, aside: Path) -> None:
    (shutil.copytree if aside.is_dir() else shutil.copyfile)(aside, path)
    path.chmod(0o555 if path.is_dir() else 0o444)


def _gone(path: Path, aside: Path) -> None:
    pass


_OF_FILES = (
    _fifo,
    _socket,
    _link,
    _nowhere,
    _loop,
    _zeros,
    _directory,
    _sparse,
    _long_sparse,
    _closed,
    _read_only,
    _gone,
)
_OF_DIRECTORIES = (_fifo, _link, _nowhere, _loop, _file, _closed, _read_only, _gone)


def edit_state(rng: random.Random, path: Path, aside: Path) -> str:
    """Move what is at a path aside and put something else in its place."""
    make: Callable[[Path, Path], None] = rng.choice(_OF_DIRECTORIES if path.is_dir() else _OF_FILES)
    aside.parent.mkdir(parents=True, exist_ok=True)
    path.rename(aside)
    make(path, aside)
    return make.__name__.strip("_").replace("_", " ")
