"""DeepSpeed, and nothing else of the project knows it: engines for scoring and training, and their full states."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alsace_dist.config import EngineConfig, TrainConfig
from alsace_dist.errors import UserError
from alsace_dist.models.mt5 import (
    DTYPES,
    CandidateScorer,
    Weights,
    check_weights,
    head_key,
    load_model_config,
    make_body,
)
from alsace_dist.ranks.group import Runtime
from alsace_dist.tasks.base import Answers

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"
STEP = "step"


def _import_deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # Its shared-memory all-reduce for CPUs is compiled at first use, and spins for ever when a peer has died.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_config(engine: EngineConfig, train: TrainConfig | None, runtime: Runtime) -> dict[str, Any]:
    """The DeepSpeed settings that an engine section stands for; its raw ``deepspeed`` mapping is merged last.

    Accumulation is driven from here (one optimizer step per global batch), so DeepSpeed is told of a single
    micro-batch per step.
    """
    stage = engine.zero_stage
    value: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": engine.dtype == "bf16"},
        # Sums over ranks in bf16 would lose what the float32 loss keeps.
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
    if runtime.device.type == "cpu" and stage > 0:
        value["zero_optimization"]["overlap_comm"] = False
    if train is not None:
        value["gradient_clipping"] = train.max_gradient_norm
        if engine.dtype == "bf16" and stage > 0:
            value["data_types"] = {"grad_accum_dtype": "fp32"}
        if engine.offload_optimizer:
            value["zero_optimization"]["offload_optimizer"] = {
                "device": "cpu",
                "pin_memory": runtime.device.type == "cuda",
            }
            # DeepSpeed's own CPU Adam is compiled at first use; on machines without GPUs torch's does as well.
            value["zero_force_ds_cpu_optimizer"] = runtime.device.type == "cuda"
    return _merge(value, engine.deepspeed)


def _with_buckets(value: dict[str, Any], trained: list[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    """DeepSpeed reserves buckets of 5e8 elements (2 GB) however small the model is; the model's size is enough."""
    size = sum(getattr(parameter, "ds_numel", parameter.numel()) for _, parameter in trained)
    if value["zero_optimization"]["stage"] > 0 and size < 500_000_000:
        value["zero_optimization"].setdefault("reduce_bucket_size", size)
    return value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = (
            _merge(merged[key], value) if isinstance(merged.get(key), dict) and isinstance(value, dict) else value
        )
    return merged


def load_module(
    build: Callable[[], nn.Module], value: Callable[[str], Tensor], engine: EngineConfig, runtime: Runtime
) -> nn.Module:
    """Build a module in the engine's dtype and fill its parameters, sharded from the start under ZeRO-3.

    ``value(name)`` gives a parameter's value on the CPU; under ZeRO-3 only rank 0 asks, and the others receive their
    part, otherwise every rank reads for itself.
    """
    dtype = DTYPES[engine.dtype]
    if engine.zero_stage < 3:
        with torch.device("meta"):
            module = build().to(dtype)
        module.to_empty(device=runtime.device)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(value(name))
        return module
    deepspeed = _import_deepspeed()
    deepspeed.init_distributed()
    # The dtype comes from the config: given as an argument, it is ignored on machines without fp16.
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(engine, None, runtime)):
        module = build()
    for name, parameter in module.named_parameters():  # gathering is collective: the same order on every rank
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            if runtime.is_main:
                parameter.data.copy_(value(name))
    return module


def inference_module(module: nn.Module, engine: EngineConfig, runtime: Runtime) -> nn.Module:
    """A module ready for scoring; under ZeRO-3 every forward is collective."""
    module.eval()
    if engine.zero_stage < 3:
        return module
    deepspeed = _import_deepspeed()
    wrapped: nn.Module = _initialize(deepspeed, model=module, config=deepspeed_config(engine, None, runtime))[0]
    wrapped.eval()
    return wrapped


def _initialize(deepspeed: Any, **arguments: Any) -> Any:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some of its optimizers print what memory they take
            return deepspeed.initialize(**arguments)
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"engine.deepspeed: DeepSpeed refuses these settings: {reason}; correct or remove them"
        ) from error


class TrainEngine:
    """One optimizer step per call, over any number of micro-batches; and the state of it, parameter by parameter.

    The state is the same for every ZeRO stage and world size: per trainable parameter the float32 weight and Adam's
    two moments, and the number of steps taken.
    """

    def __init__(self, module: nn.Module, engine: EngineConfig, train: TrainConfig, runtime: Runtime) -> None:
        deepspeed = _import_deepspeed()
        deepspeed.init_distributed()
        self.runtime = runtime
        self.stage = engine.zero_stage
        self.global_batch_size = train.global_batch_size
        module.train()
        trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.optimizer = _make_optimizer(trained, engine, train, runtime)
        self.engine, *_ = _initialize(
            deepspeed,
            model=module,
            optimizer=self.optimizer,
            config=_with_buckets(deepspeed_config(engine, train, runtime), trained),
        )
        self.parameters = {
            name: parameter for name, parameter in self.engine.module.named_parameters() if parameter.requires_grad
        }
        self._prepare_optimizer()

    def step(self, losses: Sequence[Callable[[nn.Module], Tensor]], learning_rate: float) -> Tensor:
        """One optimizer step: forward, backward and update.

        Each element of ``losses`` computes, with the module, the float32 sum of the losses of one micro-batch. Every
        rank gives one at least, from ZeRO-2 on equally many. The gradient is that of the sum over all ranks and
        micro-batches divided by the global batch size. Returns this rank's sum (detached).
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self.runtime.device)
        # DeepSpeed averages gradients over the ranks; ours is a sum over ranks.
        scale = self.runtime.world_size / self.global_batch_size
        for index, loss_of in enumerate(losses):
            self.engine.set_gradient_accumulation_boundary(index == len(losses) - 1)
            loss = loss_of(self.engine)
            self.engine.backward(loss * scale)
            total += loss.detach()
        self.engine.step()
        return total

    def gradient_norm(self) -> float:
        """Global norm of the last step's gradient before clipping."""
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def state(self, name: str) -> dict[str, Tensor]:
        """Whole float32 weight and optimizer state of one parameter, on the CPU. Collective under ZeRO."""
        parameter = self.parameters[name]
        if self.stage == 0:
            master = self._masters[name]
            moments = {key: value for key, value in self.optimizer.state.get(master, {}).items() if key != STEP}
            tensors = {WEIGHT: master} | moments
        else:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            tensors = {WEIGHT: safe_get_full_fp32_param(parameter)}
            tensors |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        return {key: value.detach().float().cpu().contiguous() for key, value in tensors.items()}

    def load_weight(self, name: str, value: Tensor) -> None:
        """Set one parameter, in the float32 copy and in the engine's dtype. Collective under ZeRO-3."""
        parameter = self.parameters[name]
        if self.stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                if self.runtime.is_main:
                    parameter.data.copy_(value)
        else:
            parameter.data.copy_(value)
        self._set_full(name, value, None)

    def load_moments(self, name: str, moments: dict[str, Tensor]) -> None:
        """Set the optimizer state of one parameter, as ``state`` gave it (without the weight)."""
        if self.stage == 0:
            master = self._masters[name]
            self.optimizer.state[master] = {STEP: self._step_value(0, master)} | {
                key: value.to(master.device) for key, value in moments.items()
            }
        else:
            for key in MOMENTS:
                self._set_full(name, moments[key], key)

    def set_num_steps(self, num_steps: int) -> None:
        """Tell the optimizer how many steps it has taken (for Adam's bias correction)."""
        for key, state in self.optimizer.state.items():
            state[STEP] = self._step_value(num_steps, key)

    def _set_full(self, name: str, value: Tensor, key: str | None) -> None:
        parameter = self.parameters[name]
        if self.stage == 0:
            self._masters[name].data.copy_(value)
            return
        from deepspeed import utils

        if self.stage < 3:
            value = value.to(parameter.device)
            if key is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        # DeepSpeed's own full setter fails where the last rank's part is padded, so cut this rank's part here.
        size = parameter.ds_tensor.numel()
        padded = torch.zeros(size * self.runtime.world_size)
        padded[: value.numel()] = value.flatten()
        part = padded[size * self.runtime.rank : size * (self.runtime.rank + 1)].to(self.runtime.device)
        if key is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, key)

    def _prepare_optimizer(self) -> None:
        """Give the optimizer its state before the first step, so that it can be read and written at any time.

        This also undoes the empty step by which DeepSpeed's bf16 optimizer of stage 0 creates its state, which leaves
        Adam's step count one too high and the first updates a quarter too small.
        """
        wrapped = self.engine.optimizer
        self._masters = dict(self.parameters)
        if self.stage == 0 and hasattr(wrapped, "fp32_groups"):
            pairs = zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True)
            masters = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
            self._masters = {name: masters[id(parameter)] for name, parameter in self.parameters.items()}
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        flats = next((getattr(wrapped, name) for name in names if hasattr(wrapped, name)), None)
        keys = list(self._masters.values()) if flats is None else flats
        self.optimizer.state.clear()
        if isinstance(self.optimizer, torch.optim.Adafactor):
            return  # its state has other shapes; it makes it in the first step
        for key in keys:
            self.optimizer.state[key] = {STEP: self._step_value(0, key)} | {
                moment: torch.zeros_like(key.data) for moment in MOMENTS
            }
        if hasattr(wrapped, "_lazy_init_hp_params_optimizer_state"):
            wrapped._lazy_init_hp_params_optimizer_state()

    def _step_value(self, num_steps: int, key: Tensor) -> Any:
        if type(self.optimizer).__module__.startswith("deepspeed"):
            return num_steps
        on_device = bool(self.optimizer.defaults.get("fused"))
        return torch.tensor(float(num_steps), device=key.device if on_device else "cpu")


def _make_optimizer(
    trained: list[tuple[str, nn.Parameter]], engine: EngineConfig, train: TrainConfig, runtime: Runtime
) -> torch.optim.Optimizer:
    """AdamW, or Adafactor with parameter scaling; vectors (layer norms, biases) are not decayed."""
    matrices = [p for _, p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for _, p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if train.optimizer == "adafactor":
        # torch's Adafactor scales the step by the root mean square of each parameter (Shazeer & Stern 2018, section 8).
        return torch.optim.Adafactor(groups, lr=train.learning_rate)
    if engine.offload_optimizer and runtime.device.type == "cuda":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=train.learning_rate, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=train.learning_rate, fused=True)


def load_scorer(
    directory: Path, answers: Answers, engine: EngineConfig, dropout: float, runtime: Runtime
) -> tuple[CandidateScorer, Callable[[str], Tensor]]:
    """A scorer with the weights of a model directory, and a function that reads one of its weights in float32.

    Raises ``UserError`` if the directory does not hold a sound mT5. Under ZeRO-3 the rows of the head are then compared
    with the file's, because a silent loss of the head is what other loaders suffer there.
    """
    weights = Weights(directory)
    rows = answers.vocabulary

    def build() -> CandidateScorer:
        body = make_body(load_model_config(directory), dropout)
        if engine.gradient_checkpointing:
            body.gradient_checkpointing_enable({"use_reentrant": False})
        return CandidateScorer(body, answers)

    def value(name: str) -> Tensor:
        if name == "head.weight":
            whole = weights.tensor(head_key(weights)).float()
            return whole[rows] if answers.single_token else whole
        return weights.tensor(name.removeprefix("body.")).float()

    with torch.device("meta"):
        check_weights(build(), weights)
    module = load_module(build, value, engine, runtime)
    assert isinstance(module, CandidateScorer)
    _check_head(module, value, engine)
    return module, value


def _check_head(module: CandidateScorer, value: Callable[[str], Tensor], engine: EngineConfig) -> None:
    parameter = module.head.weight
    expected = value("head.weight").to(DTYPES[engine.dtype])
    with gathered(parameter, engine):
        if not torch.equal(parameter.detach().cpu(), expected):
            raise UserError("the output head in memory is not the checkpoint's; please report this as a bug")


def gathered(parameter: nn.Parameter, engine: EngineConfig) -> Any:
    """Context in which a parameter is whole, for reading. Collective under ZeRO-3."""
    if engine.zero_stage < 3:
        return contextlib.nullcontext()
    return _import_deepspeed().zero.GatheredParameters(parameter)
