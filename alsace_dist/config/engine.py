"""The section ``engine``: processes, precision, DeepSpeed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import core_schema

from alsace_dist.config.base import Count, Fraction, Seconds, Section, Size

# Raw settings of DeepSpeed that may be given: they change speed, memory or what is printed, and no result beyond its
# last bits. ("DeepSpeed Configuration JSON" in its documentation.) DeepSpeed passes over keys that it does not know in
# silence, some that it knows change the mathematics (gradient_allreduce_op: sum doubles the gradient with two ranks),
# and flops_profiler.output_file writes over any file. None: not given.


class RawSection(Section):
    """Base of what DeepSpeed's documentation describes."""


class OffloadParam(RawSection):
    """``zero_optimization.offload_param``: weights in host memory. Not on NVMe, from where no checkpoint is written."""

    device: Literal["cpu"] | None = None
    pin_memory: bool | None = None
    buffer_count: Count | None = None
    buffer_size: Count | None = None
    max_in_cpu: Count | None = None


class ZeroOptimization(RawSection):
    """``zero_optimization``, without what this config says itself."""

    contiguous_gradients: bool | None = None
    reduce_scatter: bool | None = None
    reduce_bucket_size: Count | None = None
    use_multi_rank_bucket_allreduce: bool | None = None
    allgather_partitions: bool | None = None
    allgather_bucket_size: Count | None = None
    overlap_comm: bool | None = None
    sub_group_size: Count | None = None
    offload_param: OffloadParam | None = None
    stage3_prefetch_bucket_size: Size | None = None
    stage3_param_persistence_threshold: Size | None = None
    stage3_model_persistence_threshold: Size | None = None
    stage3_max_live_parameters: Size | None = None
    stage3_max_reuse_distance: Size | None = None
    zero_hpz_partition_size: Count | None = None
    zero_quantized_weights: bool | None = None
    zero_quantized_gradients: bool | None = None
    memory_efficient_linear: bool | None = None
    log_trace_cache_warnings: bool | None = None


class DataTypes(RawSection):
    """``data_types``."""

    grad_accum_dtype: Literal["fp32", "bf16"] | None = None


class FlopsProfiler(RawSection):
    """``flops_profiler``, which prints."""

    enabled: bool | None = None
    recompute_fwd_factor: Fraction | None = None
    profile_step: Count | None = None
    module_depth: int | None = None
    top_modules: Count | None = None
    detailed: bool | None = None


class CommsLogger(RawSection):
    """``comms_logger``."""

    enabled: bool | None = None
    prof_all: bool | None = None
    prof_ops: list[str] | None = None
    verbose: bool | None = None
    debug: bool | None = None


class Throughput(RawSection):
    """``timers.throughput``."""

    enabled: bool | None = None
    synchronized: bool | None = None


class Timers(RawSection):
    """``timers``."""

    throughput: Throughput | None = None


class DeepSpeed(RawSection):
    """The raw settings of ``engine.deepspeed``."""

    zero_optimization: ZeroOptimization | None = None
    zero_allow_untested_optimizer: bool | None = None
    zero_force_ds_cpu_optimizer: bool | None = None
    communication_data_type: Literal["fp32", "bf16"] | None = None
    data_types: DataTypes | None = None
    flops_profiler: FlopsProfiler | None = None
    comms_logger: CommsLogger | None = None
    timers: Timers | None = None
    steps_per_print: Count | None = None
    wall_clock_breakdown: bool | None = None
    memory_breakdown: bool | None = None
    dump_state: bool | None = None


# Where this config says what a raw setting would say again.
OWN_KEYS = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), ""),
    **dict.fromkeys(("optimizer", "scheduler", "fp16", "bf16", "checkpoint", "gradient_clipping"), ""),
    "managed_gradient_accumulation": "",
    "activation_checkpointing": "engine.gradient_checkpointing",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
}


# Raw settings that change what is computed beyond the order of sums: quantised weights and gradients, and the types in
# which gradients are summed and travel.
CHANGES_RESULTS = (
    "communication_data_type",
    "data_types",
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_gradients",
)


@dataclass(frozen=True)
class KeysOf:
    """Marks a mapping whose keys and values are those of a section, and of which only what is given is kept."""

    section: type[Section]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: dict[str, Any]) -> dict[str, Any]:
        for key, own in OWN_KEYS.items():
            part: Any = value
            for name in key.split("."):
                part = part.get(name, {}) if isinstance(part, Mapping) and name in part else None
            if part is not None:
                raise ValueError(f"{key} is set from this config's own keys; {f'use {own}' if own else 'remove it'}")
        return self.section.model_validate(value).model_dump(mode="json", exclude_unset=True, exclude_none=True)


class EngineConfig(Section):
    """How the ranks compute: processes, precision, DeepSpeed ZeRO."""

    num_processes: Count | Literal["auto"] = "auto"
    """Ranks on this machine; auto: one per GPU, without GPUs one per core, four at most."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What the ranks share out while they train (for scoring see score.sharding). 1: the optimizer's states; 2: the
    gradients too, which then travel after every micro-batch and not once a step; 3: the weights too."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations; the loss and the optimizer are always float32."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory (ZeRO 1 to 3)."""
    num_threads: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = "auto"
    """CPU threads per rank. auto: 1, but beside a GPU as many as there are cores for each rank, which an optimizer in
    host memory needs. Part of the result: another number may change the last bits of scores on CPUs."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time. Not in pretraining."""
    timeout_seconds: Seconds = 1800
    """Longest silence of a collective before a rank gives up."""
    hang_seconds: Seconds | Literal["auto"] | None = "auto"
    """Longest time without a step or a scored batch, checkpoints included, before a rank counts as hung: then all
    ranks write their stacks, say who is behind, and end. auto: half of timeout_seconds; null: never."""
    deepspeed: Annotated[dict[str, Any], KeysOf(DeepSpeed)] = {}
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
        zero = self.deepspeed.get("zero_optimization") or {}
        for key in sorted(zero):
            if key.startswith(("stage3_", "zero_", "offload_param")) and self.zero_stage != 3:
                raise ValueError(f"deepspeed.zero_optimization.{key} needs zero_stage 3; remove it")
        return self

    def numerics(self) -> dict[str, Any]:
        """What of this section a trained model depends on; all else changes its last bits at most."""
        found: dict[str, Any] = {"dtype": self.dtype}
        for key in CHANGES_RESULTS:
            section, _, name = key.rpartition(".")
            value = (self.deepspeed.get(section) or {} if section else self.deepspeed).get(name)
            if value is not None:
                found[key] = value
        return found

    def hang_limit(self) -> float | None:
        """``hang_seconds`` as a number; None: never."""
        return self.timeout_seconds / 2 if self.hang_seconds == "auto" else self.hang_seconds
