"""The sections of a run's YAML, as pydantic models, a module each; their docstrings are docs/config.md."""

from alsace_dist.config.base import Count, Fraction, Section, Split
from alsace_dist.config.data import ColumnsConfig, DataConfig, InputConfig
from alsace_dist.config.engine import EngineConfig, KeysOf, RawSection
from alsace_dist.config.export import ExportConfig, ExportType
from alsace_dist.config.model import Masks, Mode, ModelConfig, NanoConfig, Pooling
from alsace_dist.config.monitor import MonitorConfig, TrackerKind
from alsace_dist.config.run import METHODS, Config
from alsace_dist.config.selection import OPTION_OF, EvaluateConfig, Rule, ScoreConfig, SelectConfig, Sharding
from alsace_dist.config.task import ANSWER, TaskConfig
from alsace_dist.config.training import (
    NO_TEACHERS,
    NOT_IN_FINGERPRINT,
    DistillConfig,
    FinetuneConfig,
    LoraConfig,
    PretrainConfig,
    Targets,
    TaskTrainConfig,
    TrainConfig,
)

__all__ = [
    "ANSWER",
    "METHODS",
    "NOT_IN_FINGERPRINT",
    "NO_TEACHERS",
    "OPTION_OF",
    "ColumnsConfig",
    "Config",
    "Count",
    "DataConfig",
    "DistillConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ExportType",
    "FinetuneConfig",
    "Fraction",
    "InputConfig",
    "KeysOf",
    "LoraConfig",
    "Masks",
    "Mode",
    "ModelConfig",
    "MonitorConfig",
    "NanoConfig",
    "Pooling",
    "PretrainConfig",
    "RawSection",
    "Rule",
    "ScoreConfig",
    "Section",
    "SelectConfig",
    "Sharding",
    "Split",
    "Targets",
    "TaskConfig",
    "TaskTrainConfig",
    "TrackerKind",
    "TrainConfig",
]
