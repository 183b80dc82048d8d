"""What an engine section means: DeepSpeed's settings, and how a model's state is laid out over the ranks."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from alsace_dist.config import EngineConfig, TrainConfig
from alsace_dist.errors import UserError
from alsace_dist.ranks.group import Ranks

if TYPE_CHECKING:
    from torch import nn

# Where a rank finds a parameter and its optimizer state. whole: every rank has all of it (ZeRO-0); partitioned: the
# weights are whole, the float32 copies and the optimizer states are divided (ZeRO-1 and 2); sharded: the weights are
# divided, too (ZeRO-3).
StateLayout = Literal["whole", "partitioned", "sharded"]
# Raw settings of ZeRO++ with which weights or gradients travel packed.
QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients")


def state_layout(engine: EngineConfig) -> StateLayout:
    """The layout of a ZeRO stage."""
    layouts: tuple[StateLayout, ...] = ("whole", "partitioned", "partitioned", "sharded")
    return layouts[engine.zero_stage]


def is_sharded(engine: EngineConfig) -> bool:
    """Whether no rank holds all weights, so that every forward is collective."""
    return state_layout(engine) == "sharded"


def every_backward_is_collective(engine: EngineConfig) -> bool:
    """From ZeRO-2 on gradients are reduced in every backward pass; below it once a step."""
    return engine.zero_stage >= 2


def deepspeed_settings(engine: EngineConfig, train: TrainConfig | None, ranks: Ranks) -> dict[str, Any]:
    """The DeepSpeed settings that an engine section stands for; its raw ``deepspeed`` mapping is merged last.

    ``train``: None for scoring. Accumulation is driven by ``TrainEngine`` (one optimizer step per global batch), so
    DeepSpeed is told of a single micro-batch per step. Raises ``UserError`` for what this device cannot do.
    """
    stage, on_gpu = engine.zero_stage, ranks.device.type == "cuda"
    if quantized := [key for key in QUANTIZED if engine.deepspeed.get("zero_optimization", {}).get(key) and not on_gpu]:
        raise UserError(
            f"engine.deepspeed.zero_optimization.{quantized[0]}: DeepSpeed packs numbers on GPUs only; remove it"
        )
    value: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": engine.dtype == "bf16"},
        # Sums over ranks in bf16 would lose what the float32 loss keeps.
        "communication_data_type": "fp32",
        "steps_per_print": None,
        # DeepSpeed's timer would wait for the device at every forward and step.
        "timers": {"throughput": {"enabled": False}},
    }
    if not on_gpu and stage > 0:
        value["zero_optimization"]["overlap_comm"] = False
    if train is not None:
        value["gradient_clipping"] = train.max_gradient_norm
        if engine.dtype == "bf16" and stage > 0:
            value["data_types"] = {"grad_accum_dtype": "fp32"}
        if engine.dtype == "bf16" and stage == 1:
            # A gradient is added to its float32 sum, and freed, as soon as it is computed. By default DeepSpeed keeps
            # all gradients until the backward pass ends, then sets these to zero, and the next pass adds to the zeros.
            value["bf16"]["immediate_grad_update"] = True
        if engine.offload_optimizer:
            value["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
            # DeepSpeed compiles its CPU Adam at first use; on machines without GPUs torch's Adam does as well.
            value["zero_force_ds_cpu_optimizer"] = on_gpu
    return _merge(value, engine.deepspeed)


def with_buckets(settings: dict[str, Any], trained: "Iterable[nn.Parameter]") -> dict[str, Any]:
    """DeepSpeed reserves buckets of 5e8 elements (2 GB) however small the model is; the model's size is enough."""
    size = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)
    if settings["zero_optimization"]["stage"] > 0 and size < 500_000_000:
        settings["zero_optimization"].setdefault("reduce_bucket_size", size)
    return settings


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = (
            _merge(merged[key], value) if isinstance(merged.get(key), dict) and isinstance(value, dict) else value
        )
    return merged
