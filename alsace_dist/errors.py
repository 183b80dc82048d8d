"""The two ways in which a command ends early for a reason that a person should read."""

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request after a checkpoint; the same command goes on from there
STOPPED = "stopped on request; the same command goes on from here"


class UserError(Exception):
    """A person's mistake or a broken input: shown as one line that names the file, the field and the remedy."""


class Stopped(Exception):
    """Stopped by SIGTERM, SIGUSR2 or SIGINT (a group's ranks at an agreed point); what was done so far is on disk."""
