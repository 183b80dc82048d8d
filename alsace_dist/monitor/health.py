"""Checks behind some of the warnings; every warning goes through ``warn``."""

import math
import time

from alsace_dist.errors import UserError, warn
from alsace_dist.ranks import job

MOST_BF16_SLOWDOWN = 3.0  # where bf16 is at home it is faster than float32, and this is noise


class LeadCheck:
    """In a job: warns, once, if stopping takes longer than the time between the signal and the end of the job."""

    def __init__(self) -> None:
        self.lead_seconds = job.lead_seconds()

    def __call__(self, seconds: float, what: str) -> None:
        """``seconds``: the most that passes between a signal and what is kept of ``what``, as measured."""
        if seconds > self.lead_seconds:
            warn(
                f"{what} took {seconds:.0f} s, but the signal to stop comes {self.lead_seconds:.0f} s before "
                f"a job's end: set lead_seconds in the site profile to {2 * seconds:.0f}, or work is lost"
            )
            self.lead_seconds = float("inf")


def check_bf16() -> None:
    """Warns where the CPU computes bf16 far slower than float32."""
    if (slowdown := bf16_slowdown()) > MOST_BF16_SLOWDOWN:
        warn(f"this CPU has no bf16 of its own: a product takes {slowdown:.0f} times float32's; set engine.dtype: fp32")


def bf16_slowdown() -> float:
    """CPU time of a matrix product in bf16 on this CPU over that in float32, the best of some of each, in turns.

    Measured (in milliseconds) and not read off the CPU's name: without AVX-512 or its like torch falls back on loops
    that take 50 times as long. CPU time of one thread, for other work on the machine may hold up either, and several
    threads spin while they wait for each other.
    """
    import torch

    def one(dtype: torch.dtype) -> float:
        a, b = torch.ones(128, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        start = time.process_time()
        a @ b
        return time.process_time() - start

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = [(one(torch.bfloat16), *(one(torch.float32) for _ in range(5))) for _ in range(5)]
    finally:
        torch.set_num_threads(num_threads)
    slow, *fast = map(min, zip(*rounds, strict=True))
    return slow / max(min(fast), 1e-9)


def check_loss(loss: float, step: int, kind: str, directory: object) -> None:
    """Raises ``UserError`` if a training has diverged. ``kind``: its stage; ``directory``: of its checkpoints."""
    if not math.isfinite(loss):
        raise UserError(
            f"{kind}: the loss is {loss} at step {step}; lower {kind}.learning_rate, and delete {directory}"
        )
