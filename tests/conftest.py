"""Fixtures that several test files share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once

import pytest
import tiny

# nohup, and a shell that starts something in the background, have both ignored, and so would all that is started here.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


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


# The files that take longest come first, so that no process is alone with one of them in the end.
SLOW = (
    "cluster/test_chain",
    "cluster/test_disturbed",
    "cluster/test_submit",
    "training/test_loop",
    "cluster/test_sweep",
    "test_pipeline",
    "stages/test_score",
    "ranks/test_watchdog",
    "test_plan",
    "test_sweep",
)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument: spelt out, the time within a gzip would differ between pytest's processes."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first; every other file keeps its place."""

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix()
        return SLOW.index(name) if name in SLOW else len(SLOW)

    items.sort(key=place)
