"""What describes a run: pydantic models, one per section of its YAML."""

import difflib
import os
import string
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Split = Literal["pretrain", "labeled", "unlabeled", "test"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Seconds = Annotated[float, Field(gt=0.0, le=1e6)]


def _is_location(text: str) -> str:
    if not text.strip():
        raise ValueError("must name a place, and is blank")
    if "\0" in text or not text.isprintable():
        raise ValueError(f"{text!a} holds a character that no path should; rename it")
    return os.path.expanduser(text)  # noqa: PTH111 (a URL keeps its slashes); ~ as shells read it


def _is_local(text: str) -> str:
    if "://" in text or "::" in text:
        raise ValueError(f"{text!r} is a URL; a run is written to a directory of this machine's disks")
    return text


Location = Annotated[str, Field(min_length=1), AfterValidator(_is_location)]  # of files or a store
LocalDirectory = Annotated[Location, AfterValidator(_is_local)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take ``true`` for 1, also within a mapping."""
        kinds = list(_types_in(cls.model_fields[str(info.field_name)].annotation))
        truths = [one for one in (value.values() if isinstance(value, Mapping) else [value]) if isinstance(one, bool)]
        if truths and Any not in kinds and bool not in kinds and (int in kinds or float in kinds):
            raise ValueError(f"must be a number, not {str(truths[0]).lower()}")
        return value


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)


class TaskConfig(Section):
    """Multi-class classification of one text, or of several, as answers of a language model."""

    fields: list[str] = Field(min_length=1)
    """Names of the text fields of an example, such as [premise, hypothesis]."""
    template: str | dict[str, str]
    """Prompt with {field} in braces; or a mapping language -> prompt, with a `default`."""
    labels: list[str] = Field(min_length=2)
    """Label names as the data spells them, in a fixed order."""
    verbalizers: list[str] | dict[str, list[str]] = []
    """Candidate answers, one per label; or a mapping language -> answers, with a `default`. Empty: the labels."""
    decoder_prefix: str = ""
    """Text that the decoder has already produced before the answer, such as the sentinel <extra_id_0>."""
    max_tokens: Annotated[int, Field(ge=2, le=100_000)] = 256
    """Longest prompt in tokens; in longer ones the texts are cut, the longest first, and counted."""

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_as_text(cls, value: Any) -> Any:
        """YAML reads true and 1 as what they are; data spells them as text."""
        if not isinstance(value, list):  # a set has no order, and the order of labels counts
            raise ValueError(f"must be a list, in the order that answers have, not a {type(value).__name__}")
        if bad := [label for label in value if not isinstance(label, str | int | float)]:
            raise ValueError(f"holds {bad[0]!r}, which is no name; write each label as the data spells it")
        return [str(label).lower() if isinstance(label, bool) else str(label) for label in value]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("labels", "fields"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"{name} holds a name twice")
        if wrong := [field for field in self.fields if not field.isidentifier()]:
            raise ValueError(f"fields: {wrong[0]!r} is not a name that a template can hold; use letters, digits and _")
        used_anywhere: set[str] = set()
        for language, answers in self.answers().items():
            if len(answers) != len(self.labels):
                raise ValueError(f"verbalizers for {language} must hold one answer per label ({len(self.labels)})")
            if not all(answer.strip() for answer in answers) or len(set(answers)) != len(answers):
                raise ValueError(f"verbalizers for {language} must be different answers, none of them empty: {answers}")
        for language, template in self.templates().items():
            try:
                parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
            except ValueError as error:
                raise ValueError(f"template for {language} is broken ({error}); write {{{{ for a brace") from None
            if any(form or conversion for _, _, form, conversion in parts):
                raise ValueError(f"template for {language} must hold bare {{field}}s, without ':' or '!'")
            used = [name or "" for _, name, _, _ in parts]
            if not used or set(used) - set(self.fields):
                raise ValueError(f"template for {language} must use {{field}} of fields {self.fields}, it uses {used}")
            used_anywhere |= set(used)
        if unused := sorted(set(self.fields) - used_anywhere):
            raise ValueError(f"fields: no template uses {unused[0]}; remove it or use it")
        return self

    def templates(self) -> dict[str, str]:
        """Language -> prompt template, always with a `default` unless the mapping in the YAML lacks one."""
        return {"default": self.template} if isinstance(self.template, str) else self.template

    def answers(self) -> dict[str, list[str]]:
        """Language -> candidate answers."""
        if isinstance(self.verbalizers, list):
            return {"default": self.verbalizers or self.labels}
        return self.verbalizers


class ColumnsConfig(Section):
    """Which columns of a table or a Hugging Face dataset hold what."""

    id: str | None = "id"
    """Column with the group's id; null: the row's number is the id, in every file anew, so that row N of each
    language's file is one group. A Hugging Face dataset without the column has row numbers anyway."""
    language: str = "language"
    """Column with the language (long form: one row per group and language)."""
    label: str | None = "label"
    """Column with the label; null: unlabeled."""
    fields: dict[str, str] = {}
    """Field -> column; a field that is not named here has the column of its own name."""


class InputConfig(Section):
    """Where some parallel groups come from."""

    kind: str = "jsonl"
    """jsonl (plain or .gz), table (Parquet or CSV in long form), huggingface (through `datasets`), or the name of a
    published dataset: demo (generated)."""
    path: Annotated[str, AfterValidator(os.path.expanduser)] = ""
    """File, or glob pattern of files, or for tables a path with {language} in it, such as xnli/test.{language}.tsv, a
    file per language; for huggingface a hub name or a local path."""
    name: Annotated[str, Field(pattern=r"^[^/\s]*$")] = ""
    """Put before the ids of this input, as NAME/ID: for inputs whose ids start anew."""
    split: Split | None = None
    """All groups of this input go to that split; null: divided as `data.splits` says."""
    columns: ColumnsConfig = ColumnsConfig()
    """Columns of a table or a Hugging Face dataset."""
    subsets: dict[str, str] = {}
    """huggingface: language -> configuration name, joined by id or row number; empty: one table in long form."""
    hub_split: str | None = None
    """huggingface: the split to read; null: train. A single split that `save_to_disk` wrote has none to choose from."""
    revision: str | None = None
    """huggingface: the revision (branch, tag or commit) to read."""
    num_groups: Count = 1000
    """demo: how many groups to generate."""


class DataConfig(Section):
    """Where parallel groups come from and how they are divided."""

    directory: Location | None = None
    """An existing prepared dataset (directory or fsspec URL); then nothing is prepared."""
    inputs: list[InputConfig] = []
    """Where parallel groups come from."""
    splits: dict[Split, Annotated[float, Field(gt=0, le=1e12)]] = {}
    """Share (below 1) or number (from 1) of the groups of undivided inputs that each split gets, by hash of the id."""
    withhold_labels: list[Split] = ["pretrain", "unlabeled"]
    """Splits that are written without labels, whatever the inputs say."""
    source_language: str = "en"
    """The language that has labels."""
    languages: list[str] | None = None
    """Languages to keep; null: all that the data has."""
    exposure: dict[str, Fraction] = {}
    """Language -> share of its texts that the pretrain split keeps (default 1): large corpora, too, hold far more of
    some languages than of others."""
    groups_per_shard: Count = 256
    """Parallel groups per shard."""
    missing: list[str] = []
    """Texts that stand for a missing translation, such as [NS] in PAWS-X: that language is missing in that group."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do with bad records: stop and list them all, or skip and count them in the manifest."""
    max_skipped: Fraction = 0.2
    """Most that on_bad: skip may leave out, as a share of the records of a split, or of a label in it."""
    min_parallel: Fraction = 0.1
    """Least share of the unlabeled and test groups that must have two languages or more."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.directory is None) == (not self.inputs):
            raise ValueError("give either inputs or directory")
        if self.directory is not None:
            for name in ("splits", "withhold_labels", "languages", "exposure", "groups_per_shard", "on_bad", "missing"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} says how inputs are prepared, and there are none; remove it")
        wanted = {one.split for one in self.inputs} | self.splits.keys()
        if self.exposure and "pretrain" not in wanted:
            raise ValueError("exposure thins out the pretrain split, and nothing goes there; remove it")
        if self.languages is not None and len(set(self.languages)) != len(self.languages):
            raise ValueError("languages holds a language twice; remove one")
        if self.languages is not None and self.source_language not in self.languages:
            raise ValueError(f"languages must hold the source_language {self.source_language!r}")
        if any(one.split is None for one in self.inputs) and not self.splits:
            raise ValueError("splits is needed for inputs without a split of their own")
        shares = [value for value in self.splits.values() if value < 1]
        if sum(shares) > 1 + 1e-9:
            raise ValueError("the shares in splits add up to more than 1")
        return self


class NanoConfig(Section):
    """Geometry of a small mT5 that is built and pretrained here."""

    vocab_size: Count = 4000
    """Pieces of the Unigram tokenizer that is trained on the pretraining texts."""
    d_model: Count = 128
    """Width."""
    d_kv: Count = 32
    """Width of an attention head."""
    d_ff: Count = 256
    """Width of the feed-forward layers."""
    num_heads: Count = 4
    """Attention heads."""
    num_layers: Count = 3
    """Encoder layers."""
    num_decoder_layers: Count = 1
    """Decoder layers."""


class ModelConfig(Section):
    """The multilingual model."""

    path: Location | None = None
    """Local directory or hub name of an mT5 checkpoint; null: the nano model is pretrained first."""
    revision: str | None = None
    """Revision on the hub."""
    nano: NanoConfig | None = None
    """Build and pretrain a nano mT5 of this geometry instead of loading one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.path is None) == (self.nano is None):
            raise ValueError("give either path or nano")
        if self.revision and not self.path:
            raise ValueError("revision needs path")
        return self


# Raw settings of DeepSpeed that may be given: they change speed, memory or what is printed, and no result. ("DeepSpeed
# Configuration JSON" in its documentation.) DeepSpeed passes over keys that it does not know in silence, and some that
# it knows change the mathematics: gradient_allreduce_op: sum doubles the gradient with two ranks.
DEEPSPEED_KEYS = {
    "zero_optimization": dict,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "communication_data_type": str,
    "data_types": dict,
    "aio": dict,
    "activation_checkpointing": dict,
    "flops_profiler": dict,
    "comms_logger": dict,
    "timers": dict,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
}


class EngineConfig(Section):
    """How the ranks compute: processes, precision, DeepSpeed ZeRO."""

    num_processes: Count | Literal["auto"] = "auto"
    """Ranks on this machine; auto: one per GPU, without GPUs one per core, four at most."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What the ranks share out. 1: the optimizer's states; 2: the gradients too, which then travel after every
    micro-batch and not once a step; 3: the weights too, also for scoring."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations; the loss and the optimizer are always float32."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory (ZeRO 1 to 3)."""
    num_threads: Annotated[int, Field(ge=1, le=4096)] = 1
    """CPU threads per rank. Part of the result: another number may change the last bits of scores on CPUs."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time. Not in pretraining."""
    timeout_seconds: Seconds = 1800
    """Longest silence of a collective before a rank gives up."""
    hang_seconds: Seconds | Literal["auto"] | None = "auto"
    """Longest time without a step or a scored batch, checkpoints included, before a rank counts as hung: then all
    ranks write their stacks, say who is behind, and end. auto: half of timeout_seconds; null: never."""
    deepspeed: dict[str, Any] = {}
    """Raw DeepSpeed settings, merged last over those that this config makes: such as change speed, memory or logs."""

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_fp16(cls, value: Any) -> Any:
        if value in ("fp16", "float16", "half"):
            raise ValueError("fp16 overflows in T5's layers; use bf16 or fp32")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if isinstance(self.hang_seconds, float) and self.hang_seconds + 120 > self.timeout_seconds:
            raise ValueError(
                "hang_seconds must be at least 120 below timeout_seconds, which would end a hung group first"
            )
        owned = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer"}
        owned |= {"scheduler", "fp16", "bf16", "checkpoint", "gradient_clipping", "managed_gradient_accumulation"}
        if clash := sorted(owned & self.deepspeed.keys()):
            raise ValueError(f"deepspeed.{clash[0]} is set from this config's own keys; remove it")
        for key, value in self.deepspeed.items():
            if key not in DEEPSPEED_KEYS:
                meant = difflib.get_close_matches(key, DEEPSPEED_KEYS, 1, 0.8)
                hint = f"{meant[0]} is meant?" if meant else f"there are {', '.join(DEEPSPEED_KEYS)}"
                raise ValueError(f"deepspeed.{key}: not a setting that may be given here; {hint}")
            if not isinstance(value, DEEPSPEED_KEYS[key]):
                kind = {dict: "a mapping", bool: "true or false", int: "a whole number", str: "text"}[
                    DEEPSPEED_KEYS[key]
                ]
                raise ValueError(f"deepspeed.{key} must be {kind}, not {value!r}")
        zero = self.deepspeed.get("zero_optimization", {})
        if "stage" in zero:
            raise ValueError("deepspeed.zero_optimization.stage: use engine.zero_stage")
        return self

    def hang_limit(self) -> float | None:
        """``hang_seconds`` as a number; None: never."""
        return self.timeout_seconds / 2 if self.hang_seconds == "auto" else self.hang_seconds


# Keys that a rerun may change without training another model: they say how fast and how safely it trains.
NOT_IN_FINGERPRINT = {"micro_batch_size", "checkpoint_every_steps", "keep_checkpoints", "log_every_steps"}


class TrainConfig(Section):
    """What every kind of training has."""

    num_epochs: Positive | None = None
    """Passes over the training examples; or give num_steps."""
    num_steps: Count | None = None
    """Optimizer steps; or give num_epochs."""
    global_batch_size: Count = 64
    """Examples per optimizer step, over all ranks."""
    micro_batch_size: Count = 64
    """Most examples per forward pass on a rank; fewer, where that saves more padding than another pass costs. Without
    dropout the result does not depend on it."""
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
    num_steps: Count | None = 1500
    optimizer: Literal["adamw", "adafactor"] = "adafactor"
    learning_rate: Positive = 2e-2
    concatenate: Fraction = 0.5
    """Share of examples that are a pair of translations, one after the other (as in TLM); the others are single."""
    mask_ratio: Fraction = 0.25
    """Share of tokens that are masked."""
    mean_span_length: Positive = 2.0
    """Mean length of a masked span in tokens."""
    max_tokens: Count = 128
    """Longest encoder input in tokens."""


class FinetuneConfig(TrainConfig):
    """Stage 0: learn the task from the source language's labels."""

    num_epochs: Positive | None = 3.0
    learning_rate: Positive = 1e-4
    num_examples: Count | None = None
    """Few-shot: this many labeled groups, the first in shard order; null: all."""


class ScoreConfig(Section):
    """The scoring pass."""

    tokens_per_batch: Count = 8192
    """Most prompt tokens, padding included, per forward pass. Part of the result, in the last bits."""


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
    """Score a language against the vote of the others."""
    score: Literal["confidence", "agreement"] = "confidence"
    """confidence: mean probability of the voted answer; agreement: share of groups whose best answer is the voted."""
    rule: Literal["threshold", "top_k", "explicit", "all", "source", "random"] | None = None
    """threshold: score at or above the mean; top_k; explicit; baselines: all, source only, random (as many as the
    threshold rule picks)."""
    top_k: Count | None = None
    """Number of teachers under rule top_k (default 3)."""
    teachers: list[str] = []
    """Teachers under rule explicit."""
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


class DistillConfig(TrainConfig):
    """Stage 2: cross-lingual self-distillation from frozen teacher distributions."""

    num_epochs: Positive | None = 3.0
    learning_rate: Positive = 5e-5
    targets: Literal["others", "ensemble", "anchor"] | None = None
    """What teachers learn from: the other teachers (the paper), the ensemble with themselves included, or their own
    frozen distribution. Students always learn from the teachers. Null: as `method` says."""


class EvaluateConfig(Section):
    """Comparison of before and after on the labeled test groups."""

    num_resamples: Count = 2000
    """Bootstrap resamples of the confidence intervals."""
    calibrate: bool = False
    """Add the calibration biases at inference to the answers of the `after` model."""
    alpha: Fraction = 0.05
    """Significance level."""


# A variant shares data, model and finetuning with the run; it may change what comes after.
VARIANT_KEYS = {"method", "rounds", "select", "distill", "evaluate"}

METHODS: dict[str, dict[str, dict[str, str]]] = {
    "paper": {
        "select": {"calibration": "none", "vote": "hard", "rule": "threshold", "weighting": "equal"},
        "distill": {"targets": "others"},
    },
    "calibrated": {
        "select": {"calibration": "marginal", "vote": "source", "rule": "all", "weighting": "score"},
        "distill": {"targets": "ensemble"},
    },
}


class Config(Section):
    """A run."""

    run_dir: LocalDirectory
    """Directory of the run's outputs."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Seed of splits, order, initial weights and resampling."""
    method: Literal["paper", "calibrated"] = "calibrated"
    """Preset for the parts of `select` and `distill` that are not given: the paper's rule, or calibrated and
    score-weighted."""
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
    evaluate: EvaluateConfig = EvaluateConfig()
    variants: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], dict[str, Any]] = {}
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "pretrain" in self.model_fields_set and not self.model.nano and self.pretrain != PretrainConfig():
            raise ValueError("pretrain is only done for model.nano; remove the section")
        if self.pretrain.freeze_vocabulary:
            raise ValueError("pretrain.freeze_vocabulary: a new vocabulary must learn; remove it")
        for name in ("finetune", "distill"):
            section = getattr(self, name)
            if section is not None and section.optimizer == "adafactor" and self.engine.zero_stage != 0:
                raise ValueError(f"{name}.optimizer adafactor needs engine.zero_stage 0; use adamw")
        if self.rounds == 0 and not self.evaluate.calibrate and not self.variants:
            raise ValueError("rounds: 0 changes nothing; set it to 1, or set evaluate.calibrate: true")
        if self.evaluate.calibrate and self.select.calibration != "marginal":
            raise ValueError("evaluate.calibrate needs select.calibration: marginal")
        if "main" in self.variants:
            raise ValueError("variants.main: so the report calls the run itself; choose another name")
        for name, overrides in self.variants.items():
            if extra := sorted(overrides.keys() - VARIANT_KEYS):
                raise ValueError(f"variants.{name}.{extra[0]}: a variant may change {', '.join(sorted(VARIANT_KEYS))}")
        return self
