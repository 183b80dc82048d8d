"""A run: all sections together, and what its method fills in."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from alsace_dist.config import prompts
from alsace_dist.config.base import LocalDirectory, Section
from alsace_dist.config.data import DataConfig
from alsace_dist.config.engine import EngineConfig
from alsace_dist.config.export import ExportConfig
from alsace_dist.config.model import ModelConfig
from alsace_dist.config.monitor import MonitorConfig
from alsace_dist.config.selection import EvaluateConfig, ScoreConfig, SelectConfig
from alsace_dist.config.task import TaskConfig
from alsace_dist.config.training import DistillConfig, FinetuneConfig, PretrainConfig
from alsace_dist.reading import shorten

# A variant shares data, model and finetuning with the run; it may change what comes after.
VARIANT_KEYS = {"method", "rounds", "select", "distill", "evaluate"}

FROZEN = {"pool": "linear", "teachers": "frozen", "divergence": "forward", "teacher_gradient": False}
LIVE = {"pool": "linear", "teachers": "live", "divergence": "reverse", "teacher_gradient": True}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "select": {"calibration": "none", "vote": "hard", "rule": "threshold", "weighting": "equal"},
        "distill": {"targets": "others"} | FROZEN,
    },
    "authors": {
        "select": {"calibration": "none", "vote": "hard", "rule": "explicit", "weighting": "equal"},
        "distill": {"targets": "ranked"} | LIVE,
    },
    "calibrated": {
        "select": {"calibration": "marginal", "vote": "source", "rule": "all", "weighting": "score"},
        "distill": {"targets": "ensemble"} | FROZEN,
    },
}


class Config(Section):
    """A run."""

    run_dir: LocalDirectory
    """Directory of the run's outputs."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Seed of splits, order, initial weights and resampling."""
    method: Literal["paper", "authors", "calibrated"] = "calibrated"
    """Preset for the parts of `select` and `distill` that are not given: the paper's rule, what its authors' code does
    (which needs select.teachers, best first), or calibrated and score-weighted."""
    rounds: Annotated[int, Field(ge=0, le=100)] = 1
    """How often to score, select and distil; 0: no distillation (with evaluate.calibrate: calibration alone)."""
    task: TaskConfig
    data: DataConfig
    model: ModelConfig
    engine: EngineConfig = EngineConfig()
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig | None = FinetuneConfig()
    """Null: the model has learnt the task already."""
    score: ScoreConfig = ScoreConfig()
    select: SelectConfig = SelectConfig()
    distill: DistillConfig = DistillConfig()
    export: ExportConfig = ExportConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    monitor: MonitorConfig = MonitorConfig()
    variants: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")], dict[str, Any]] = {}
    """Name -> settings laid over this config (method, rounds, select, distill, evaluate): an ablation that shares
    the data, the finetuned model and its scores with the run."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_method(cls, value: Any) -> Any:
        """Make the preset's choices explicit, so that the resolved config shows what will happen."""
        if not isinstance(value, dict) or value.get("method", "calibrated") not in list(METHODS):
            return value
        filled = dict(value)
        for section, parts in METHODS[value.get("method", "calibrated")].items():
            given = filled.get(section, {})
            if isinstance(given, Mapping):
                filled[section] = dict(given) | {key: choice for key, choice in parts.items() if given.get(key) is None}
        return filled

    @model_validator(mode="before")
    @classmethod
    def _fill_in_prompts(cls, value: Any) -> Any:
        """Make the prompts explicit that a published dataset comes with."""
        if not isinstance(value, dict) or not isinstance(value.get("task"), Mapping):
            return value
        data = value.get("data")
        inputs = data.get("inputs") if isinstance(data, Mapping) else getattr(data, "inputs", None)
        kinds = [one.get("kind") for one in inputs if isinstance(one, Mapping)] if isinstance(inputs, list) else []
        return value | {"task": prompts.filled_in(value["task"], kinds)}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "pretrain" in self.model_fields_set and not self.model.nano and self.pretrain != PretrainConfig():
            raise ValueError("pretrain is only done for model.nano; remove the section")
        if self.pretrain.freeze_vocabulary:
            raise ValueError("pretrain.freeze_vocabulary: a new vocabulary must learn; remove it")
        if self.pretrain.lora:
            raise ValueError("pretrain.lora: new weights must learn; remove it")
        for name in ("finetune", "distill"):
            section = getattr(self, name)
            if section is not None and section.optimizer == "adafactor" and self.engine.zero_stage != 0:
                raise ValueError(f"{name}.optimizer adafactor needs engine.zero_stage 0; use adamw")
        if self.rounds == 0 and not self.evaluate.calibrate and not self.variants:
            raise ValueError("rounds: 0 changes nothing; set it to 1, or set evaluate.calibrate: true")
        if self.evaluate.calibrate and self.select.calibration != "marginal":
            raise ValueError("evaluate.calibrate needs select.calibration: marginal")
        if self.task.has_own_candidates and self.finetune is not None and self.finetune.shots:
            raise ValueError("finetune.shots counts labels, and task.candidates: own has none; use num_examples")
        for name, what in (("main", "the run itself"), ("before", "the model before")):
            if name in self.variants:
                raise ValueError(f"variants.{name}: so the report calls {what}; choose another name")
        for name, overrides in self.variants.items():
            if extra := sorted(overrides.keys() - VARIANT_KEYS):
                raise ValueError(
                    f"variants.{name}.{shorten(extra[0], 60)}: a variant may change {', '.join(sorted(VARIANT_KEYS))}"
                )
        return self
