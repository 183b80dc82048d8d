"""The section ``monitor``."""

from typing import Annotated, Literal

from pydantic import Field

from alsace_dist.config.base import Section

TrackerKind = Literal["wandb", "mlflow", "trackio"]


class MonitorConfig(Section):
    """Where scalars go beside `metrics.jsonl` and TensorBoard."""

    tracker: TrackerKind | None = None
    """Weights & Biases, MLflow or trackio, which must be installed, and is set up by its own means."""
    project: Annotated[str, Field(min_length=1, max_length=100)] = "alsace_dist"
    """Project there, or experiment; a stage of a run is a run in it."""
