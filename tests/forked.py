"""The command line as users start it, without the seconds that Python takes to import it: a process that has loaded the
program forks for every command.

The child has its own working directory, environment, descriptors and process group, as a new process would. A stage
that computes on ranks runs as the only rank of a real gloo group (``as_rank``), or behind the launcher like any other.
"""

import ctypes
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import tiny


@dataclass(frozen=True)
class Done:
    """How a command ended. ``code``: as a shell has it; ``is_late``: it was killed after its time; ``was_asked``: to
    stop, after ``stop_after`` seconds."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    is_late: bool
    was_asked: bool = False

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that begin with ``error:``."""
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]


class Forked:
    """A process that has imported the program, for one command at a time."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="alsace-forked-")
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=tiny.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Forked":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def alsace(
        self,
        *arguments: str,
        directory: Path,
        seconds: float = 20,
        as_rank: bool = False,
        environment: Mapping[str, str] = {},
        stop_after: float | None = None,
        signals: Sequence[int] = (signal.SIGTERM,),
        streams: Mapping[int, str] = {},
        most_bytes: int | None = None,
        as_person: bool = False,
        host_name: str = "",
    ) -> Done:
        """Run ``alsace ARGUMENTS`` in a working directory; after ``seconds`` it is killed.

        ``stop_after``: seconds after which it gets the ``signals`` first, each soon after the one before; ``streams``:
        descriptors of its that are "closed", "broken" (a pipe that nobody reads), or a file; ``most_bytes``: of memory
        of its own (mapped files do not count) that it may take beyond what the program takes; ``as_person``: without
        root's right to pass over permissions; ``host_name``: what it takes for this machine's name (needs root).
        """
        extra = dict(environment)
        if as_rank:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
            extra = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | place | extra
        out, err = Path(self._folder.name, "out"), Path(self._folder.name, "err")
        request = {"arguments": arguments, "directory": str(directory), "environment": extra, "seconds": seconds}
        request |= {"stop_after": stop_after, "most_bytes": most_bytes, "as_person": as_person, "host_name": host_name}
        request |= {"signals": list(signals), "streams": list(streams.items())}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request | {"out": str(out), "err": str(err)}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        text = [file.read_bytes().decode("utf-8", "replace") for file in (out, err)]
        return Done(answer["code"], *text, answer["seconds"], answer["is_late"], answer["was_asked"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


def _child(request: dict[str, Any]) -> None:
    """In the forked process: become the command."""
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.closerange(3, 256)
    for number, how in request["streams"]:
        _redirect(number, how)
    encoding = request["environment"].get("PYTHONIOENCODING", "utf-8")
    sys.stdout, sys.stderr = (_text_stream(number, encoding) for number in (1, 2))
    os.environ.update(request["environment"])
    if request["most_bytes"]:
        taken = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_DATA, (taken + request["most_bytes"],) * 2)
    if request["host_name"]:
        assert ctypes.CDLL(None).unshare(0x04000000) == 0  # CLONE_NEWUTS
        socket.sethostname(request["host_name"])
    if request["as_person"]:
        _obey_permissions()
    os.chdir(request["directory"])
    sys.argv = ["alsace", *request["arguments"]]
    from alsace_dist.cli import main

    main()


def _redirect(number: int, how: str) -> None:
    if how == "closed":
        os.close(number)
        return
    if how == "broken":
        reading, file = os.pipe()
        os.close(reading)
    else:
        file = os.open(how, os.O_WRONLY)
    os.dup2(file, number)
    os.close(file)


def _text_stream(number: int, encoding: str) -> Any:
    """What Python makes of a descriptor at its start: nothing of one that is closed."""
    try:
        return os.fdopen(number, "w", encoding=encoding, closefd=False)
    except OSError:
        return None


def _obey_permissions() -> None:
    """Give up the two capabilities with which root passes over permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: the low words, then the high words
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0
    for index in range(3):
        sets[index] &= ~0b110
    assert libc.capset(header, sets) == 0


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints while it is imported
    from alsace_dist.training import engine, loop  # noqa: F401

    engine.import_deepspeed()
    import datasets  # noqa: F401
    import deepspeed.ops.adam
    import deepspeed.runtime.engine  # noqa: F401
    import pyarrow.dataset
    import pyarrow.parquet  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.mt5.modeling_mt5  # noqa: F401
    import webdataset.tariterators  # noqa: F401

    from alsace_dist import cli, doctor, pipeline, runner  # noqa: F401
    from alsace_dist.cluster import submit  # noqa: F401
    from alsace_dist.models import mt5  # noqa: F401
    from alsace_dist.plan import overview  # noqa: F401
    from alsace_dist.reporting import report  # noqa: F401

    gc.collect()
    gc.freeze()  # else each child's first full collection copies a gigabyte of pages that it shares with this process
    for line in sys.stdin:
        request = json.loads(line)
        start = time.monotonic()
        process = os.fork()
        if process == 0:
            try:
                _child(request)
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        is_late = was_asked = False
        stop_after = float("inf") if request["stop_after"] is None else request["stop_after"]
        while (found := os.waitpid(process, os.WNOHANG)) == (0, 0):
            time.sleep(0.002)
            if not was_asked and time.monotonic() > start + stop_after:
                was_asked = True
                for number in request["signals"]:
                    os.kill(process, number)
                    time.sleep(0.02)
            if time.monotonic() > start + request["seconds"]:
                is_late = True
                os.killpg(process, signal.SIGKILL)
                found = os.waitpid(process, 0)
                break
        code = os.waitstatus_to_exitcode(found[1])
        answer = {"code": code if code >= 0 else 128 - code, "seconds": time.monotonic() - start, "is_late": is_late}
        answer["was_asked"] = was_asked
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
