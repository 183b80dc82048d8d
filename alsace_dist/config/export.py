"""The section ``export``."""

from typing import Literal

from alsace_dist.config.base import Section

ExportType = Literal["float32", "bf16"]


class ExportConfig(Section):
    """The models that finetuning and distillation leave."""

    dtype: ExportType = "float32"
    """Type of the weights in their files. bf16: half the size; changes of less than 0.4 % of a weight are lost, which a
    small learning rate may never go beyond, and a later stage starts from the rounded weights."""
