"""Reading files that somebody else may have written: the one place that bounds what is read and names what is wrong.

Only regular files are opened (a FIFO or a device never ends), their size is looked at first, and nesting and numbers
are bounded, so that no input takes all memory or ends in a traceback. Nothing here executes what it reads.
"""

import json
import re
import stat
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Any

from alsace_dist.errors import NotReady, UserError

MAX_TEXT_BYTES = 256 << 20  # JSON of the largest dataset's manifest (10^5 shards) is a tenth of it
MAX_DEPTH = 64
MAX_LINE = 1500  # characters of an error
MAX_SHOWN = 120  # characters of a foreign text that an error quotes


def shorten(text: object, most: int = MAX_SHOWN) -> str:
    """A foreign text on one line, cut where it is long, so that an error stays readable; what would steer a terminal
    is escaped."""
    line = " ".join(str(text)[: 10 * most].split())
    if not line.isprintable():
        line = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)
    return line if len(line) <= most else line[: most - 3] + "..."


def one_line(text: str) -> str:
    """A message as one line that steers no terminal, whatever the names in it hold: control characters as escapes, and
    of a name of thousands of letters not the middle. The remedy stands at the end."""
    line = " ".join(text.split())
    line = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE // 2]} ... {line[-(MAX_LINE // 2) :]}"


# In Azure's and Hadoop's URLs a name before the @ is a container or a user, and no secret.
WHERE_SECRETS_GO = "remove it: secrets stand in the environment or in the store's own files, as docs/data.md says"
_NAMED = ("abfs", "abfss", "az", "hdfs")
# A secret may hold a slash, which seems to end the host: then what follows the colon is no port.
_USER = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*)(://)([^\s'\"/]*|[^\s'\"/:]*:(?!\d+/)[^\s'\"@]*)@")
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"()]+")


def without_secrets(text: str) -> str:
    """A URL, or a text with URLs in it, without users, passwords and queries: a query may be a signature or a token."""

    def mask(found: "re.Match[str]") -> str:
        is_name = found[1].lower() in _NAMED and ":" not in found[3]
        return found[0] if is_name else f"{found[1]}{found[2]}***@"

    return _QUERY.sub(r"\1?***", _USER.sub(mask, text))


def secret_in(url: str) -> str:
    """What in a URL is a secret, or may be one, in words; empty for a path and for a URL without such."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        return ""
    host = rest.partition("/")[0]
    port = host.rpartition(":")[2] if ":" in host else ""
    has_user = "@" in host and not (scheme in _NAMED and ":" not in host.rpartition("@")[0])
    if has_user or (port and not port.isdigit()):  # see _USER
        return "a user or a password"
    return "a query (?...), where signatures and tokens stand" if "?" in rest else ""


def check_regular(path: Path, remedy: str, most_bytes: int | None = None) -> int:
    """The size of a regular file in bytes.

    Raises ``FileNotFoundError`` if there is none, ``UserError`` if it is no regular file or larger than ``most_bytes``.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "no regular file (a pipe or a device)"
        raise UserError(f"{path}: is {kind}; {remedy}")
    if most_bytes is not None and found.st_size > most_bytes:
        raise UserError(f"{path}: {found.st_size:,} bytes where at most {most_bytes:,} are read; {remedy}")
    return found.st_size


def check_file(name: str, option: str) -> None:
    """Raises ``UserError`` if what a pattern has found is no file: left out, a language would be lost in silence.

    ``option``: of the config, that names the pattern.
    """
    path = Path(name)
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "a pipe or a device" if path.exists() else "a link to nothing"
        raise UserError(f"{option}: {name}: is {kind}, no file; restore the file or correct the path")


def check_encoding(path: Path, beginning: bytes) -> None:
    """Raises ``UserError`` if a file begins as UTF-16."""
    if beginning[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: is UTF-16; save it as UTF-8")


def read_text(path: Path, remedy: str, most_bytes: int = MAX_TEXT_BYTES) -> str:
    """A UTF-8 text.

    Raises ``FileNotFoundError`` and ``PermissionError``, whose own words name path and reason; ``UserError`` if it is
    no regular file, too large, or no UTF-8.
    """
    check_regular(path, remedy, most_bytes)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1}: {error.reason}"
        raise UserError(f"{path}: no UTF-8 text ({where}); save it as UTF-8, or {remedy}") from None


def read_json(path: Path, remedy: str) -> Any:
    """JSON. Raises ``NotReady`` if the file is missing, ``UserError`` with this ``remedy`` if it is broken."""
    try:
        text = read_text(path, remedy)
    except FileNotFoundError:
        raise NotReady(f"{path}: no such file; run the stage that writes it first") from None
    return parse_json(text, f"{path}: ", remedy)


def parse_json(text: str | bytes, prefix: str, remedy: str) -> Any:
    """JSON of bounded depth and whole characters. Raises ``UserError``: ``prefix``, what is wrong, ``remedy``."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{prefix}not readable as JSON ({why_no_json(error)}); {remedy}") from None
    if depth_of(value) > MAX_DEPTH:
        raise UserError(f"{prefix}nested more than {MAX_DEPTH} deep; {remedy}")
    if where := half_character(value):
        raise UserError(f"{prefix}{where}; {remedy}")
    return value


def why_no_json(error: ValueError | RecursionError) -> str:
    """What Python's decoder has against a text. Of numbers beyond its limit it gives advice on Python's settings."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    is_number = type(error) is ValueError and str(error).startswith("Exceeds the limit")
    return "a number of thousands of digits" if is_number else shorten(error)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can spell the text: lone surrogates come from escapes in JSON and YAML, and from bytes that are no
    UTF-8 on the command line."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def appearance(text: str) -> str:
    """What a text looks like to a person: without the differences between Unicode's ways to write one letter, between
    kinds of blanks, and without marks that take no room."""
    seen = "".join(letter for letter in unicodedata.normalize("NFKC", text) if unicodedata.category(letter) != "Cf")
    return " ".join(seen.split())


def half_character(value: Any) -> str:
    """Where a value holds a text that is no Unicode, by its dotted name; empty if it holds none. Without recursion."""
    # A value of JSON that can be written as UTF-8 holds none: this tells of the manifest of 10^5 shards in a tenth of a
    # second, where to look at each text takes seconds.
    with suppress(ValueError, TypeError, RecursionError):
        json.dumps(value, ensure_ascii=False).encode()
        return ""
    pending: list[tuple[str, Any]] = [("", value)]
    while pending:
        name, one = pending.pop()
        if isinstance(one, str) and not is_unicode(one):
            return f"{shorten(name) or 'the text'}: half of a character in {shorten(ascii(one))}"
        parts = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        for key, part in parts:
            pending += [(f"{name}.{key}" if name else str(key), part), (name or "a key", key)]
    return ""


def depth_of(value: Any) -> int:
    """Levels of mappings and lists within each other; counted without recursion."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            return depth
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
    return depth
