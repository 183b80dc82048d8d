"""Fixtures that several test files share."""

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
