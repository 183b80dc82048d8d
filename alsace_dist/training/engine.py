"""DeepSpeed engines for scoring and training, and the full state of a training, parameter by parameter.

With settings.py the only module that knows DeepSpeed.
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alsace_dist.config import EngineConfig, TrainConfig
from alsace_dist.errors import UserError
from alsace_dist.models.family import TrainableModel
from alsace_dist.models.weights import DTYPES
from alsace_dist.monitor.health import check_bf16
from alsace_dist.ranks.group import Ranks
from alsace_dist.training.settings import deepspeed_settings, is_sharded, state_layout, with_buckets

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"
STEP = "step"
Sums = dict[str, Tensor]


def _import_deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # DeepSpeed's shared-memory all-reduce for CPUs is compiled at first use, and spins for ever when a peer has
        # died.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def private(owner: Any, *names: str) -> Any:
    """The first of some attributes of DeepSpeed that are not part of its interface and may go in a next release.

    Raises ``RuntimeError`` if none is there: what this module builds on them would silently be wrong.
    """
    for name in names:
        if hasattr(owner, name):
            return getattr(owner, name)
    version = _import_deepspeed().__version__
    raise RuntimeError(
        f"DeepSpeed {version}: {type(owner).__name__} has no {' or '.join(names)}; "
        "install a version in the range of pyproject.toml"
    )


# --- modules -------------------------------------------------------------------------------------------------------


def load_module(model: TrainableModel, dropout: float, engine: EngineConfig, ranks: Ranks) -> nn.Module:
    """Build a module in the engine's dtype and fill its parameters, sharded from the start under ZeRO-3. Collective.

    Under ZeRO-3 only rank 0 reads the values, and the other ranks receive their part, otherwise every rank reads for
    itself. Afterwards the model's ``delicate`` parameters are compared with the file: transformers loses mT5's untied
    head under ZeRO-3 silently.
    """
    dtype = DTYPES[engine.dtype]
    if dtype is torch.bfloat16 and ranks.is_main and ranks.device.type == "cpu":
        check_bf16()
    if not is_sharded(engine):
        with torch.device("meta"):
            module = model.build(dropout, engine.gradient_checkpointing).to(dtype)
        module.to_empty(device=ranks.device)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(model.initial_value(name))
    else:
        deepspeed = _import_deepspeed()
        deepspeed.init_distributed()
        # The dtype comes from the config: given as an argument, it is ignored on machines without fp16.
        with deepspeed.zero.Init(config_dict_or_path=deepspeed_settings(engine, None, ranks)):
            module = model.build(dropout, engine.gradient_checkpointing)
        for name, parameter in module.named_parameters():  # gathering is collective: the same order on every rank
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                if ranks.is_main:
                    parameter.data.copy_(model.initial_value(name))
    for name in model.delicate:
        _check_loaded(module.get_parameter(name), name, model, engine)
    return module


def _check_loaded(parameter: nn.Parameter, name: str, model: TrainableModel, engine: EngineConfig) -> None:
    expected = model.initial_value(name).to(DTYPES[engine.dtype])
    with gathered(parameter, engine):
        if not torch.equal(parameter.detach().cpu(), expected):
            raise RuntimeError(f"{name} in memory is not the checkpoint's; please report this as a bug")


def gathered(parameter: nn.Parameter, engine: EngineConfig) -> Any:
    """Context in which a parameter is whole, for reading. Collective under ZeRO-3."""
    if not is_sharded(engine):
        return contextlib.nullcontext()
    return _import_deepspeed().zero.GatheredParameters(parameter)


def inference_module(module: nn.Module, engine: EngineConfig, ranks: Ranks) -> nn.Module:
    """A module ready for scoring; under ZeRO-3 every forward is collective."""
    module.eval()
    if not is_sharded(engine):
        return module
    deepspeed = _import_deepspeed()
    wrapped: nn.Module = _initialize(deepspeed, model=module, config=deepspeed_settings(engine, None, ranks))[0]
    wrapped.eval()
    return wrapped


def _initialize(deepspeed: Any, **arguments: Any) -> Any:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some of DeepSpeed's optimizers print their memory use
            return deepspeed.initialize(**arguments)
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"engine.deepspeed: DeepSpeed refuses these settings: {reason}; correct or remove them"
        ) from error


# --- training ------------------------------------------------------------------------------------------------------


class TrainEngine:
    """One optimizer step per call, over any number of micro-batches; and the state of it, parameter by parameter.

    The state is the same for every ZeRO stage and world size: per trainable parameter the float32 weight and Adam's
    two moments, and the number of steps taken.
    """

    def __init__(self, module: nn.Module, engine: EngineConfig, train: TrainConfig, ranks: Ranks) -> None:
        deepspeed = _import_deepspeed()
        deepspeed.init_distributed()
        self.ranks = ranks
        self.global_batch_size = train.global_batch_size
        module.train()
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = _make_optimizer(trained, engine, train, ranks)
        settings = with_buckets(deepspeed_settings(engine, train, ranks), trained)
        self.engine, *_ = _initialize(deepspeed, model=module, optimizer=self.optimizer, config=settings)
        self.parameters = {
            name: parameter for name, parameter in self.engine.module.named_parameters() if parameter.requires_grad
        }
        self._state = _STATES[state_layout(engine)](self.engine.optimizer, self.optimizer, self.parameters, ranks)

    def step(self, losses: Sequence[Callable[[nn.Module], Sums]], learning_rate: float) -> Sums:
        """One optimizer step: forward, backward and update.

        Each element of ``losses`` computes, with the module, float32 sums over the examples of one micro-batch by the
        name of their scalar; "loss" is what is minimised. Every rank gives one at least, from ZeRO-2 on equally many.
        The gradient is that of the loss summed over all ranks and micro-batches, divided by the global batch size.
        Returns this rank's sums over its micro-batches (detached).
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        totals: Sums = {}
        # DeepSpeed averages gradients over the ranks; the loss here is a sum over ranks.
        scale = self.ranks.world_size / self.global_batch_size
        for index, sums_of in enumerate(losses):
            self.engine.set_gradient_accumulation_boundary(index == len(losses) - 1)
            sums = sums_of(self.engine)
            self.engine.backward(sums["loss"] * scale)
            for name, value in sums.items():
                totals[name] = totals[name] + value.detach() if name in totals else value.detach()
        self.engine.step()
        return totals

    def gradient_norm(self) -> float:
        """Global norm of the last step's gradient before clipping; NaN where DeepSpeed reports none."""
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def state(self, name: str) -> dict[str, Tensor]:
        """Whole float32 weight and optimizer state of one parameter, on the CPU. Collective under ZeRO."""
        tensors = self._state.read(name)
        return {key: value.detach().float().cpu().contiguous() for key, value in tensors.items()}

    @property
    def moments(self) -> tuple[str, ...] | None:
        """Names of the optimizer's moments, of the weight's shape, the squares last; None: Adafactor's are its own."""
        return None if isinstance(self.optimizer, torch.optim.Adafactor) else MOMENTS

    def load_weight(self, name: str, value: Tensor) -> None:
        """Set one parameter, in the float32 copy and in the engine's dtype. Collective under ZeRO-3."""
        self._state.write_weight(name, value)

    def load_moments(self, name: str, moments: dict[str, Tensor]) -> None:
        """Set the optimizer state of one parameter, as ``state`` gave it (without the weight)."""
        self._state.write_moments(name, moments)

    def forget_steps(self) -> None:
        """Set the optimizer's state to that before the first step; the weights stay as they are."""
        if self.moments is None:
            self.optimizer.state.clear()  # Adafactor makes its state in the first step
            return
        for state in self.optimizer.state.values():
            for moment in self.moments:
                state[moment].zero_()
        self.set_num_steps(0)

    def set_num_steps(self, num_steps: int) -> None:
        """Tell the optimizer how many steps it has taken (for Adam's bias correction)."""
        for key, state in self.optimizer.state.items():
            state[STEP] = _step_value(self.optimizer, num_steps, key)


def _make_optimizer(
    trained: Sequence[nn.Parameter], engine: EngineConfig, train: TrainConfig, ranks: Ranks
) -> torch.optim.Optimizer:
    """AdamW, or Adafactor with parameter scaling; vectors (layer norms, biases) are not decayed."""
    matrices = [parameter for parameter in trained if len(getattr(parameter, "ds_shape", parameter.shape)) > 1]
    vectors = [parameter for parameter in trained if len(getattr(parameter, "ds_shape", parameter.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if train.optimizer == "adafactor":
        # torch's Adafactor scales the step by the root mean square of each parameter (Shazeer & Stern 2018, section 8).
        return torch.optim.Adafactor(groups, lr=train.learning_rate)
    if engine.offload_optimizer and ranks.device.type == "cuda":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=train.learning_rate, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=train.learning_rate, fused=True)


# --- where the state lies ------------------------------------------------------------------------------------------


class _State(Protocol):
    """Reads and writes one parameter's float32 weight and moments, whole, wherever the layout keeps them."""

    def read(self, name: str) -> Mapping[str, Tensor]:
        """Weight and optimizer state. Collective unless the state is whole."""

    def write_weight(self, name: str, value: Tensor) -> None:
        """Set the weight, in float32 and in the engine's dtype. Collective if the weights are sharded."""

    def write_moments(self, name: str, moments: Mapping[str, Tensor]) -> None:
        """Set the optimizer state."""


class _WholeState:
    """ZeRO-0: every rank has a float32 copy of each parameter, or in fp32 the parameter itself."""

    def __init__(
        self, wrapped: Any, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], ranks: Ranks
    ) -> None:
        self.optimizer, self.parameters = optimizer, parameters
        self.masters: dict[str, Tensor] = dict(parameters)
        if wrapped is not optimizer:  # bf16: DeepSpeed keeps the float32 copies
            pairs = zip(private(wrapped, "fp16_groups"), private(wrapped, "fp32_groups"), strict=True)
            masters = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
            self.masters = {name: masters[id(parameter)] for name, parameter in parameters.items()}
        _clear(optimizer, list(self.masters.values()))

    def read(self, name: str) -> Mapping[str, Tensor]:
        master = self.masters[name]
        moments = {key: value for key, value in self.optimizer.state.get(master, {}).items() if key != STEP}
        return {WEIGHT: master} | moments

    def write_weight(self, name: str, value: Tensor) -> None:
        self.parameters[name].data.copy_(value)
        self.masters[name].data.copy_(value)

    def write_moments(self, name: str, moments: Mapping[str, Tensor]) -> None:
        master = self.masters[name]
        self.optimizer.state[master] = {STEP: _step_value(self.optimizer, 0, master)} | {
            key: value.to(master.device) for key, value in moments.items()
        }


class _PartitionedState:
    """ZeRO-1 and 2: weights are whole; the float32 copies and moments are flat and divided over the ranks."""

    def __init__(
        self, wrapped: Any, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], ranks: Ranks
    ) -> None:
        self.parameters = parameters
        # The second name is that of DeepSpeed's BF16_Optimizer, which bf16 at ZeRO-1 gets.
        flats = private(wrapped, "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        _clear(optimizer, flats)
        private(wrapped, "_lazy_init_hp_params_optimizer_state")()  # maps the parameters to the state made above

    def read(self, name: str) -> Mapping[str, Tensor]:
        return _read_full(self.parameters[name])

    def write_weight(self, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        parameter = self.parameters[name]
        parameter.data.copy_(value)
        safe_set_full_fp32_param(parameter, value.to(parameter.device))

    def write_moments(self, name: str, moments: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        parameter = self.parameters[name]
        for key in MOMENTS:
            safe_set_full_optimizer_state(parameter, moments[key].to(parameter.device), key)


class _ShardedState:
    """ZeRO-3: weights, float32 copies and moments are divided over the ranks, each parameter by itself."""

    def __init__(
        self, wrapped: Any, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], ranks: Ranks
    ) -> None:
        self.parameters, self.ranks = parameters, ranks
        _clear(optimizer, private(wrapped, "fp32_partitioned_groups_flat"))

    def read(self, name: str) -> Mapping[str, Tensor]:
        return _read_full(self.parameters[name])

    def write_weight(self, name: str, value: Tensor) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param

        parameter = self.parameters[name]
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            if self.ranks.is_main:
                parameter.data.copy_(value)
        safe_set_local_fp32_param(parameter, self._own_part(parameter, value))

    def write_moments(self, name: str, moments: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        parameter = self.parameters[name]
        for key in MOMENTS:
            safe_set_local_optimizer_state(parameter, self._own_part(parameter, moments[key]), key)

    def _own_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """DeepSpeed's own full setter fails where the last rank's part is padded, so cut this rank's part here."""
        size = private(parameter, "ds_tensor").numel()
        padded = torch.zeros(size * self.ranks.world_size)
        padded[: value.numel()] = value.flatten()
        return padded[size * self.ranks.rank : size * (self.ranks.rank + 1)].to(self.ranks.device)


_STATES: dict[str, Callable[..., _State]] = {
    "whole": _WholeState,
    "partitioned": _PartitionedState,
    "sharded": _ShardedState,
}


def _read_full(parameter: nn.Parameter) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    tensors = {WEIGHT: safe_get_full_fp32_param(parameter)}
    return tensors | {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}


def _clear(optimizer: torch.optim.Optimizer, keys: Sequence[Tensor]) -> None:
    """Give the optimizer its state before the first step, so that it can be read and written at any time.

    This also undoes the empty step by which DeepSpeed's bf16 optimizer of stage 0 creates its state, which leaves
    Adam's step count one too high and the first updates a quarter too small.
    """
    optimizer.state.clear()
    if isinstance(optimizer, torch.optim.Adafactor):
        return  # Adafactor's state has other shapes, and is made in the first step
    for key in keys:
        optimizer.state[key] = {STEP: _step_value(optimizer, 0, key)} | {
            moment: torch.zeros_like(key.data) for moment in MOMENTS
        }


def _step_value(optimizer: torch.optim.Optimizer, num_steps: int, key: Tensor) -> Any:
    if type(optimizer).__module__.startswith("deepspeed"):
        return num_steps
    on_device = bool(optimizer.defaults.get("fused"))
    return torch.tensor(float(num_steps), device=key.device if on_device else "cpu")
