"""How a command ends early, and with which exit code; and what people are warned of."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request after a checkpoint; the same command goes on from there
STOPPED = "stopped on request; the same command goes on from here"


class UserError(Exception):
    """A person's mistake or a broken input: shown as one line that names the file, the field and the remedy."""


class NotReady(UserError):
    """An input is not there yet: the stage that writes it has not finished."""


class Stopped(Exception):
    """Stopped by SIGTERM, SIGUSR2 or SIGINT (all ranks at an agreed point); what was done so far is on disk."""


class RankFailed(Exception):
    """A rank was killed, or met a defect of the program whose traceback is printed already."""


class PeerFailed(Exception):
    """Another rank failed; the error of that rank says why."""


def warn(text: str) -> None:
    """Tell people of something that is not an error; the text names the remedy where there is one."""
    print(f"warning: {text}", file=sys.stderr)
    for listener in list(_listeners):
        listener(text)


_listeners: list[Callable[[str], None]] = []


@contextmanager
def heard_by(listener: Callable[[str], None]) -> Iterator[None]:
    """Within it, every warning of this process goes to ``listener``, too, which must not raise."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
