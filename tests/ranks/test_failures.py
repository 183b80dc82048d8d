"""What a rank says about its end, and which ends a job script may try again."""

import errno
from pathlib import Path

import pytest
import torch

from alsace_dist.errors import EXIT_STOPPED, EXIT_USER_ERROR, PeerFailed, RankFailed, Stopped, UserError
from alsace_dist.ranks import job
from alsace_dist.ranks.failures import exit_code, is_plain, readable, record_cause


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), EXIT_USER_ERROR),
        (OSError(errno.EACCES, "Permission denied", "x"), EXIT_USER_ERROR),
        # These may pass by themselves: a job is requeued.
        (OSError(errno.ESTALE, "Stale file handle", "x"), 1),
        (OSError(errno.EIO, "Input/output error", "x"), 1),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1),
        (MemoryError(), 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), 1),
        (RankFailed("rank 1 was killed by SIGKILL"), 1),
        (PeerFailed("rank 0 failed"), 1),
        (KeyboardInterrupt(), EXIT_STOPPED),
        (Stopped("stopped"), EXIT_STOPPED),
        (UserError("a mistake"), EXIT_USER_ERROR),
    ],
    ids=repr,
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert exit_code(readable(error)) == code


def test_out_of_memory_is_told_with_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB"
    )
    told = readable(error)
    assert is_plain(told)
    assert str(told).startswith("rank 3: out of memory (tried to allocate 2.00 GiB); lower tokens_per_micro_batch")
    assert str(readable(MemoryError())).startswith("rank 3: out of memory; lower")
    monkeypatch.delenv("RANK")  # prepare and select have no micro-batches
    assert str(readable(MemoryError())).startswith("out of memory; give this machine or job more")


def test_the_cause_of_a_job_is_the_first_that_a_rank_has_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(job.ATTEMPT_DIR, str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)
    for node, error in enumerate([PeerFailed("rank 3 failed"), ValueError("two\nlines"), UserError("later")]):
        monkeypatch.setenv(job.NODE_RANK, str(node))
        record_cause(error)
    causes = sorted(tmp_path.glob("cause-*"))  # as the job script sorts them
    assert [path.read_text() for path in causes[:2]] == ["ValueError: two lines\n", "later\n"]
    assert [path.name.split("-")[3:] for path in causes] == [["1", "node1"], ["2", "node2"], ["1", "node0"]]
    assert "a rank died without a word" in causes[2].read_text()
