"""What people are warned of: the one place through which every warning goes, and the checks behind some of them."""

import math
import sys

from alsace_dist.errors import UserError
from alsace_dist.ranks import job


def warn(text: str) -> None:
    """Tell people of something that is not an error; the text names the remedy where there is one."""
    print(f"warning: {text}", file=sys.stderr)


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


def check_loss(loss: float, step: int, kind: str, directory: object) -> None:
    """Raises ``UserError`` if a training has diverged. ``kind``: its stage; ``directory``: of its checkpoints."""
    if not math.isfinite(loss):
        raise UserError(
            f"{kind}: the loss is {loss} at step {step}; lower {kind}.learning_rate, and delete {directory}"
        )
