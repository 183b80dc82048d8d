"""The Slurm that the tests here share; in CI a missing one is a failure."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from cluster.local_slurm import LocalSlurm, why_not
from cluster.runs import LONG, make_run


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    """Two nodes, up for the whole session."""
    if reason := why_not():
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    slurm = LocalSlurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture
def slurm(cluster: LocalSlurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalSlurm]:
    """The cluster with an empty queue and both nodes up; the clients of this process find it."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    cluster.mend()
    yield cluster
    cluster.clear()


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Job scripts go where they are submitted from."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finetuned and scored on two ranks of this machine, without Slurm."""
    directory = tmp_path_factory.mktemp("undisturbed")
    config = make_run(world, directory, finetune=LONG, engine={"num_processes": 2})
    tiny.do("finetune", config)
    tiny.do("score", config)
    return directory
