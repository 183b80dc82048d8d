"""Fixtures that several test files share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and model of the small world, prepared once: run/data holds its shards."""
    directory = tmp_path_factory.mktemp("world")
    tiny.write_world(directory)
    config = tiny.write_config(directory / "prepare.yaml", tiny.make_config(directory))
    tiny.alsace("prepare", str(config))
    return directory


@pytest.fixture(scope="session", autouse=True)
def _ranks() -> Iterator[None]:
    """What ``tiny.run_ranks`` has started ends with the session."""
    yield
    tiny.end_ranks()
