"""Scalars for Weights & Biases, MLflow or trackio, whichever a config names: places beside the files of a run.

None of them is needed, and none is imported unless it is asked for.
"""

import importlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, Protocol

from alsace_dist.config import TrackerKind
from alsace_dist.errors import UserError
from alsace_dist.monitor.scalars import tag_of

# What a run logs is scalars: no console output, and nothing of the machine, its paths, its packages or git.
WANDB_SETTINGS = {
    "console": "off",
    "disable_git": True,
    "host": "",
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


@dataclass(frozen=True)
class Tracker:
    """One of them, as a config names it. ``name``: of what is logged, the same whenever it goes on."""

    kind: TrackerKind
    project: str
    name: str


class TrackerSink(Protocol):
    """What ``sinks.Sink`` asks for."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of one step."""

    def text(self, step: int, name: str, text: str) -> None:
        """Take a text that belongs to a step."""

    def close(self) -> None:
        """Write what is left."""


def open_tracker(tracker: Tracker) -> TrackerSink:
    """Begin, or go on. Raises ``UserError`` if it is not installed."""
    try:
        module = importlib.import_module(tracker.kind)
    except ImportError:
        raise UserError(
            f"monitor.tracker: {tracker.kind} is not installed; `pip install {tracker.kind}`, or leave it out"
        ) from None
    return _MLflow(module, tracker) if tracker.kind == "mlflow" else _Logger(module, tracker)


class _Logger:
    """Weights & Biases, and trackio, which has the same interface."""

    def __init__(self, module: Any, tracker: Tracker) -> None:
        self._module = module
        more: dict[str, Any] = {}
        if tracker.kind == "wandb":
            more["id"] = "".join(one if one.isalnum() else "-" for one in tracker.name)[-100:]
            more["settings"] = module.Settings(silent=True, **WANDB_SETTINGS)
        with _quiet():
            module.init(project=tracker.project, name=tracker.name, resume="allow", **more)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log({tag_of(name): value for name, value in values.items()}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Texts stay with the run: they may name its files."""

    def close(self) -> None:
        with _quiet():
            self._module.finish()


class _MLflow:
    """MLflow: an experiment for the project; a run that is there already is gone on with."""

    def __init__(self, module: Any, tracker: Tracker) -> None:
        self._client = module.MlflowClient()
        found = self._client.get_experiment_by_name(tracker.project)
        experiment = found.experiment_id if found else self._client.create_experiment(tracker.project)
        name = tracker.name.replace("'", "")
        runs = self._client.search_runs([experiment], f"attributes.run_name = '{name}'", max_results=1)
        self._run = (runs[0] if runs else self._client.create_run(experiment, run_name=name)).info.run_id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, tag_of(name), value, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Texts stay with the run: they may name its files."""

    def close(self) -> None:
        self._client.set_terminated(self._run)


@contextmanager
def _quiet() -> Iterator[None]:
    """They greet and say goodbye at length."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
