"""stdin, stdout and stderr of this process: whatever becomes of them, work goes on and the exit code stays.

A person closes a terminal, pipes into ``head``, redirects to a full disk, or has a locale that spells no Cyrillic. None
of this is a reason to lose an hour of work.
"""

import os
import sys
from typing import Any, TextIO


class SteadyStream:
    """A text stream that is written to as long as that works, and swallows what comes after."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or pass over it once the other end is gone or the disk is full."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream was closed
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 (for the rest of the process)
            return len(text)

    def flush(self) -> None:
        """Flush, or pass over it."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 (for the rest of the process)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_steady() -> None:
    """Call it before anything is printed: opens what is closed, and wraps stdout and stderr.

    A closed descriptor would be given to the next file that is opened, and what a rank prints would end up in there.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 (for the rest of the process)
        if hasattr(stream, "reconfigure"):
            # In UTF-16 or EBCDIC no terminal and no job script would read what is said.
            is_readable = "error: a".encode(stream.encoding, "replace") == b"error: a"
            stream.reconfigure(encoding=None if is_readable else "utf-8", errors="backslashreplace")
        setattr(sys, name, SteadyStream(stream))
