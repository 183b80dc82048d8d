"""Fixtures of the cases: one process that has imported the program, and one finished run, for all of them."""

from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
from cases.case import Case, make_finished


@pytest.fixture(scope="session")
def program() -> Iterator[forked.Forked]:
    """The program, loaded once."""
    with forked.Forked() as process:
        yield process


@pytest.fixture(scope="session")
def finished(program: forked.Forked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world that every case is a copy of."""
    directory = tmp_path_factory.mktemp("cases")
    make_finished(directory, program)
    return directory


@pytest.fixture
def case(program: forked.Forked, finished: Path, tmp_path: Path) -> Case:
    """A world of a test's own; what is in it may be broken."""
    return Case(tmp_path, program, finished)
