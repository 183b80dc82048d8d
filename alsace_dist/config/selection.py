"""Stage 1, the sections ``score`` and ``select``; and ``evaluate``."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from alsace_dist.config.base import Count, Positive, Section

Sharding = Literal["auto", "replicated", "zero3"]
Rule = Literal["threshold", "top_k", "explicit", "all", "source", "random"]


class ScoreConfig(Section):
    """The scoring pass."""

    tokens_per_batch: Count = 8192
    """Most prompt tokens, padding included, per forward pass. Part of the result, in the last bits."""
    sharding: Sharding = "auto"
    """Where the weights are while a model scores, whatever engine.zero_stage says of training. replicated: every rank
    has all of them, and works at its own pace; zero3: they are divided, over the ranks of each machine where that is
    enough, else over all, and travel in every pass; auto: replicated if they take up to half of a GPU's memory (without
    GPUs of the machine's, for all its ranks). Scores are the same, but for last bits."""


class SelectConfig(Section):
    """Stage 1: which languages teach, and with what weight. Null: as `method` says."""

    calibration: Literal["none", "marginal"] | None = None
    """marginal: per language, a bias per candidate that makes its mean prediction equal to the reference's."""
    reference: Literal["source", "pooled"] | None = None
    """Reference of the calibration: the source language's mean prediction (the default), or the pooled one, the mean
    over all languages."""
    vote: Literal["hard", "soft", "source"] | None = None
    """What languages are scored against. hard: one vote per language and group (ties by summed probability); soft:
    summed probabilities; source: the source language's own answer, for where most votes would be noise."""
    leave_one_out: bool = False
    """Score a language against the vote of all other languages."""
    score: Literal["confidence", "agreement", "accuracy"] = "confidence"
    """confidence: mean probability of the voted answer; agreement: share of groups whose best answer is the voted;
    accuracy: share of groups whose best answer is the label, which only an analysis may look at (an oracle; the
    unlabeled split must hold labels, see data.withhold_labels)."""
    rule: Rule | None = None
    """threshold: score at or above the mean; top_k; explicit; baselines: all, source only, random (as many as the
    threshold rule picks)."""
    top_k: Count | None = None
    """Number of teachers under rule top_k (default 3)."""
    teachers: list[str] = []
    """Teachers under rule explicit, the best first."""
    weighting: Literal["equal", "score"] | None = None
    """Weight of a teacher in the ensemble: equal, or proportional to exp(beta * score)."""
    beta: Positive | None = None
    """Sharpness of the score weights (default 12)."""
    num_groups: Count | None = None
    """Select and distil with this many unlabeled groups only: the first ones, rounded up to whole shards; null: all."""

    @model_validator(mode="before")
    @classmethod
    def _options_of_choices(cls, value: Any) -> Any:
        """Fill in the options that the choices have, and refuse those that they would ignore."""
        if not isinstance(value, dict):
            return value
        filled = dict(value)
        for option, (choice, needed, default) in OPTION_OF.items():
            if filled.get(choice) == needed:
                if filled.get(option) is None and default is not None:
                    filled[option] = default
            elif filled.get(option):
                raise ValueError(f"{option} is only used with {choice}: {needed}; remove it")
        return filled

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rule == "explicit" and not self.teachers:
            raise ValueError("rule: explicit needs teachers; list them")
        if self.score == "accuracy" and self.leave_one_out:
            raise ValueError("leave_one_out leaves a language out of a vote, and score: accuracy has none; remove it")
        if self.vote == "source" and self.leave_one_out:
            raise ValueError("leave_one_out leaves a language out of a vote, and vote: source has none")
        return self


# Options of `select` that belong to one value of a choice: option -> (choice, its value, the option's default there).
OPTION_OF: dict[str, tuple[str, str, Any]] = {
    "reference": ("calibration", "marginal", "source"),
    "top_k": ("rule", "top_k", 3),
    "teachers": ("rule", "explicit", None),
    "beta": ("weighting", "score", 12.0),
}


class EvaluateConfig(Section):
    """Comparison of before and after on the labeled test groups."""

    num_resamples: Annotated[int, Field(ge=1, le=1_000_000)] = 2000
    """Bootstrap resamples of the confidence intervals."""
    calibrate: bool = False
    """Add the calibration biases at inference to the answers of the `after` model."""
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Significance level."""
    margin: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Loss of accuracy of which the report says in which languages it can be ruled out: a small test set cannot see a
    small loss."""
