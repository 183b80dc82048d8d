"""The two ways in which a command ends early for a reason that a person should read."""

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request after a checkpoint; the same command goes on from there


class UserError(Exception):
    """A person's mistake or a broken input: shown as one line that names the file, the field and the remedy."""


class Stopped(Exception):
    """All ranks agreed to stop (SIGTERM, SIGUSR2, SIGINT); what was done so far is on disk."""
