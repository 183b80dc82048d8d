"""The command ``alsace``: what is typed to a command, signals and errors to an exit code."""

import os
import signal
import sys
import traceback
from types import FrameType

from alsace_dist import environment, streams
from alsace_dist.arguments import parse
from alsace_dist.commands import COMMANDS
from alsace_dist.errors import Stopped
from alsace_dist.reading import one_line


def main() -> None:
    """Entry point. A person's mistake ends with one line on stderr and a non-zero exit code."""
    environment.start_soundly()
    streams.make_steady()
    words = sys.argv[1:]
    debug = any(word in ("--debug", "--debug=True", "--debug=true") for word in words)
    _stop_on_signals()
    error: BaseException | None = None
    try:
        environment.check()
        parse(words, COMMANDS, _settings)()
    except (Exception, KeyboardInterrupt) as caught:
        error = caught
    _leave(error, debug)


def _settings() -> list[str]:
    """Names of the config's keys and sections."""
    from alsace_dist.config import Config
    from alsace_dist.config_file import OVER

    return [*Config.model_fields, OVER]


def _stop_on_signals() -> None:
    """The signals that stop a rank between two steps (ranks/group.py) stop any other process at once, like Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup lets SIGHUP be ignored
            signal.signal(number, interrupt)


def _leave(error: BaseException | None, debug: bool) -> None:
    """End the process: exit code 0, or what is to be said of the error and its exit code."""
    from alsace_dist.ranks import failures

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # one more Ctrl-C must not cut off the last words and the exit code
    code = 0
    if error is not None:
        shown = failures.readable(error)
        if shown is not error:
            shown.__cause__ = error  # --debug prints the traceback of the cause
        code = failures.exit_code(shown)
        if failures.in_group():
            failures.record_failure(shown)
        if debug or not failures.is_plain(shown):
            traceback.print_exception(shown)
        # The launcher prints the error that came first, once, as the last line.
        if failures.error_directory() is None:
            prefix = "" if isinstance(shown, Stopped) else "error: "
            print(f"{prefix}{one_line(str(shown))}", file=sys.stderr)
            failures.record_cause(shown)
    sys.stdout.flush()
    sys.stderr.flush()
    if failures.in_group():
        # Threads of the communication libraries abort the interpreter on its way out, now and then.
        os._exit(code)
    sys.exit(code)
