"""What trains: the sections ``pretrain``, ``finetune`` and ``distill``."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from alsace_dist.config.base import Count, Fraction, Positive, Section, Steps

# Keys that a rerun may change without training another model: they say how fast and how safely it trains.
NOT_IN_FINGERPRINT = {
    "tokens_per_micro_batch",
    "micro_batch_size",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "on_nonfinite",
    "evaluate_every_steps",  # these four count where patience is given: data.held_out.stopping_fingerprint
    "evaluate_groups",
    "patience",
    "best_by",
    "log_every_steps",
}


class LoraConfig(Section):
    """Low-rank adapters (LoRA, Hu et al. 2022) beside a model's linear layers, merged into its weights on export."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank of the adapters."""
    alpha: Annotated[int, Field(ge=1, le=65536)] = 32
    """What the adapters have learnt counts alpha / rank times."""
    dropout: Annotated[float, Field(ge=0.0, le=0.9)] = 0.0
    """Dropout rate before the adapters."""
    modules: Annotated[list[str], Field(min_length=1)] | None = None
    """Ends of the names of the layers to adapt, as mT5's [q, v] or XLM-R's [query, value]; null: all linear layers."""

    def adapts(self, name: str) -> bool:
        """Whether a layer has an adapter, by its name or the end of it."""
        return self.modules is None or name.rpartition(".")[2] in self.modules


class TrainConfig(Section):
    """What every kind of training has."""

    num_epochs: Positive | None = None
    """Passes over the training examples; or give num_steps."""
    num_steps: Steps | None = None
    """Optimizer steps; or give num_epochs."""
    global_batch_size: Count = 64
    """Examples per optimizer step, over all ranks."""
    tokens_per_micro_batch: Count | Literal["auto"] = "auto"
    """Most encoder tokens, padding included, per forward and backward pass on a rank; fewer, where that saves more
    padding than another pass costs. A pass of the largest shape is tried before the first step. auto: on a GPU as many
    as its memory holds, found by such passes; on a CPU 2,048. Without dropout the result does not depend on it."""
    micro_batch_size: Count | None = None
    """Most examples per pass, beside tokens_per_micro_batch; null: any number."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adamw, or adafactor with parameter scaling (ZeRO 0 only)."""
    learning_rate: Positive
    """Peak learning rate."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps in which the learning rate rises linearly from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_gradient_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are clipped to this global norm; 0: not clipped."""
    dropout: Annotated[float, Field(ge=0.0, le=0.9)] = 0.0
    """Dropout rate. Above 0 the loss depends on how a batch is split over ranks."""
    freeze_vocabulary: bool = False
    """Keep the embedding matrix fixed (21 % of mT5-large's parameters, 14 % of XL's)."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the weights, `{}` for those of rank 16: optimizer states of XXL fall from 150
    GB to 1. They want a learning rate about ten times as high. Needs peft: `pip install 'alsace_dist[lora]'`."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do if a step's gradient is not finite. Either way it changes nothing. stop: the state before it is kept,
    and `alsace replay` shows its examples; skip: it is counted, and training goes on, until ten in a row are so."""
    checkpoint_every_steps: Count = 500
    """Steps between checkpoints."""
    keep_checkpoints: Count = 1
    """Verified checkpoints to keep."""
    log_every_steps: Count = 10
    """Steps between lines in metrics.jsonl and TensorBoard."""

    @model_validator(mode="before")
    @classmethod
    def _length_given(cls, value: Any) -> Any:
        """A given length takes the place of the other's default."""
        if isinstance(value, dict):
            for given, other in (("num_steps", "num_epochs"), ("num_epochs", "num_steps")):
                if value.get(given) is not None and other not in value:
                    return value | {other: None}
        return value

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give either num_steps or num_epochs")
        return self


class PretrainConfig(TrainConfig):
    """Span corruption for the nano model."""

    num_epochs: Positive | None = None
    num_steps: Steps | None = 1500
    optimizer: Literal["adamw", "adafactor"] = "adafactor"
    learning_rate: Positive = 2e-2
    concatenate: Fraction = 0.5
    """Share of examples that are a pair of translations, one after the other (as in TLM); the rest are single texts."""
    mask_ratio: Fraction = 0.25
    """Share of tokens that are masked."""
    mean_span_length: Positive = 2.0
    """Mean length of a masked span in tokens."""
    max_tokens: Count = 128
    """Longest encoder input in tokens."""


class TaskTrainConfig(TrainConfig):
    """Trainings whose model answers the task, so that its answers can be watched."""

    evaluate_every_steps: Count | None = None
    """Steps between measurements on the split `dev`, where the data has one, for TensorBoard: how often answers are
    their group's vote and, where it has labels, every language's accuracy; null: ten in a training."""
    evaluate_groups: Count = 100
    """Groups of `dev` that are measured, the first in shard order."""
    patience: Count | None = None
    """Stop once `best_by` has not risen in so many measurements, and export the weights of the best one. Null: train to
    the end, and export the last weights."""
    best_by: Literal["accuracy", "vote_agreement"] = "accuracy"
    """What is to rise, with `patience`: the average accuracy on `dev`, which looks at labels of every language; or the
    share of answers on `dev` that are their group's vote, which looks at none; a model that gives one answer to all but
    everything does not count."""

    @model_validator(mode="after")
    def _best_with_patience(self) -> Self:
        if self.best_by != "accuracy" and self.patience is None:
            raise ValueError("best_by: says by what training stops; give patience, too")
        return self


class FinetuneConfig(TaskTrainConfig):
    """Stage 0: learn the task from the source language's labels."""

    num_epochs: Positive | None = 3.0
    learning_rate: Positive = 1e-4
    num_examples: Count | None = None
    """Few-shot: this many labeled groups, the first in shard order, whatever their labels; null: all."""
    shots: Count | None = None
    """Few-shot: this many labeled groups of each label, drawn by hash of the seed and the id; null: all."""

    @model_validator(mode="after")
    def _check_shots(self) -> Self:
        if self.shots is not None and self.num_examples is not None:
            raise ValueError("shots and num_examples are two ways to say how many; remove one")
        return self


Targets = Literal["others", "ranked", "ensemble", "anchor", "votes", "labels"]
# Those that are the same for every language of a group, and come from no teacher.
NO_TEACHERS = ("votes", "labels")


class DistillConfig(TaskTrainConfig):
    """Stage 2: cross-lingual self-distillation from frozen teacher distributions, or from those of the current weights.

    With live teachers an example is a parallel group, all languages of it, and so are the examples that
    global_batch_size counts; micro_batch_size counts rows all the same.
    """

    num_epochs: Positive | None = 3.0
    learning_rate: Positive = 5e-5
    targets: Targets | None = None
    """What teachers learn from: the other teachers (the paper), the teachers ranked before them (the authors' code),
    the ensemble with themselves included, or their own distribution. Students always learn from the teachers. Baselines
    without teachers: votes, where every language learns the answer that most languages give (self-training), and
    labels, where it learns the true one (an upper bound; the unlabeled split must hold labels, see
    data.withhold_labels). Null: as `method` says."""
    pool: Literal["linear", "logarithmic"] | None = None
    """How frozen teachers become one target. linear: the mean of their distributions, which is the mean over pairs of
    the paper; logarithmic: the normalised product of their powers. Null: as `method` says."""
    pool_mass: Annotated[float, Field(gt=0, le=100)] | None = None
    """Sum of the exponents of the logarithmic pool (default 1): above 1 the target is surer than its teachers are on
    the whole, which is right as far as their errors are not the same."""
    group_weight: Literal["equal", "presence"] = "equal"
    """Weight of what a language learns from a group that lacks some of its frozen teachers. equal: as much as from any
    other group; presence: the share of all its teachers' weight that the group has."""
    languages: Annotated[list[str], Field(min_length=1)] | Literal["source"] | None = None
    """Languages that learn from frozen targets; source: the source language alone (with targets: votes self-training
    there); null: all that have a teacher."""
    teachers: Literal["frozen", "live"] | None = None
    """frozen: what the teachers said in the scoring pass; live: what the current weights say. Null: as `method`
    says."""
    divergence: Literal["forward", "reverse", "symmetric"] | None = None
    """Of live teachers P and a language Q: forward is KL(P || Q) (the paper), reverse KL(Q || P) (the authors' code),
    symmetric the Jensen-Shannon divergence. Null: as `method` says."""
    teacher_gradient: bool | None = None
    """Let the gradient through live teachers, too. Null: as `method` says."""
    temperature: Positive = 1.0
    """Divide the log-probabilities of live teachers and of their students by this, and multiply the loss by its square
    (Hinton et al. 2015)."""

    @model_validator(mode="after")
    def _check_live(self) -> Self:
        for name, usual in {"divergence": "forward", "teacher_gradient": False, "temperature": 1.0}.items():
            if self.teachers == "frozen" and getattr(self, name) not in (None, usual):
                raise ValueError(f"{name}: {getattr(self, name)} is only for teachers: live; remove it")
        if self.pool_mass is not None and self.pool != "logarithmic":
            raise ValueError("pool_mass is only used with pool: logarithmic; remove it")
        if self.teachers == "live" and self.pool == "logarithmic":
            raise ValueError("pool: logarithmic is only for teachers: frozen; remove it")
        for name in ("languages", "group_weight"):
            if self.teachers == "live" and getattr(self, name) not in (None, "equal"):
                raise ValueError(f"{name} is only for teachers: frozen; remove it")
        if self.group_weight == "presence" and self.targets in NO_TEACHERS:
            raise ValueError(
                f"group_weight: presence is that of teachers, and targets: {self.targets} has none; remove it"
            )
        if self.targets in NO_TEACHERS and (self.teachers == "live" or self.pool == "logarithmic"):
            raise ValueError(f"targets: {self.targets} has no teachers; set teachers: frozen, pool: linear")
        return self
