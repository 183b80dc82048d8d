"""DeepSpeed engines for scoring and training: what they start with, and a step.

With settings.py the only module that imports DeepSpeed; state.py knows where its optimizers keep their numbers.
"""

import contextlib
import gc
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from alsace_dist.config import EngineConfig, TrainConfig
from alsace_dist.errors import UserError
from alsace_dist.models.family import TrainableModel
from alsace_dist.models.weights import DTYPES
from alsace_dist.monitor.health import check_bf16
from alsace_dist.monitor.stopwatch import Stopwatch
from alsace_dist.ranks.group import Ranks
from alsace_dist.training.settings import deepspeed_settings, is_sharded, state_layout, with_buckets
from alsace_dist.training.state import LAYOUTS, MOMENTS, STEP, WEIGHT, Piece, private, shape_of, shard_of, step_value

Sums = dict[str, Tensor]


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, without what only costs time here."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with _without("mlflow"):  # its autotuner, which nothing here uses, loads it where it is installed: 1.2 seconds
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # DeepSpeed's shared-memory all-reduce for CPUs is compiled at first use, and spins for ever when a peer has
        # died. Nothing else is looked up there, and to find out what can be compiled takes half a second.
        deepspeed.ops.__compatible_ops__ = {}
    _import_muon()
    return deepspeed


@contextlib.contextmanager
def _without(package: str) -> Iterator[None]:
    """Let imports of a package fail as if it were not installed, unless it is imported already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def _import_muon() -> None:
    """Import the optimizer that is not offered here, and that DeepSpeed's engine imports all the same.

    It is decorated with torch.compile, which loads torch's compiler: 2.5 of the 9 seconds of a core that a rank takes
    to start. (Of these torch's own optimizers load a second's worth later; scoring has none.) Here its functions stay
    plain ones.
    """
    decorate, torch.compile = torch.compile, _as_it_is  # type: ignore[assignment]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    except ImportError:  # other versions of DeepSpeed have none
        pass
    finally:
        torch.compile = decorate


def _as_it_is(function: Any = None, **_: Any) -> Any:
    """Stands for ``torch.compile``, called or with settings."""
    return _as_it_is if function is None else function


# --- modules -------------------------------------------------------------------------------------------------------


def load_module(model: TrainableModel, dropout: float, engine: EngineConfig, ranks: Ranks) -> nn.Module:
    """Build a module in the engine's dtype and fill its parameters, sharded from the start under ZeRO-3. Collective.

    Every rank reads for itself what it holds, under ZeRO-3 its own part of each parameter. Afterwards the model's
    ``delicate`` parameters are compared with the file: transformers loses mT5's untied head under ZeRO-3 silently.
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
        deepspeed = import_deepspeed()
        deepspeed.init_distributed()
        # The dtype comes from the config: given as an argument, it is ignored on machines without fp16.
        settings = deepspeed_settings(engine, None, ranks)
        with deepspeed.zero.Init(data_parallel_group=ranks.data, config_dict_or_path=settings):
            module = model.build(dropout, engine.gradient_checkpointing)
        gc.collect()  # both stacks of mT5 have made an embedding of their own, in whose place there is one now
        for name, parameter in module.named_parameters():
            private(parameter, "ds_tensor").data.zero_()  # the last part is padded
            part = shard_of(parameter, ranks.rank)
            if part.values.numel():
                part.put(part.offset, initial_elements(model, name, shape_of(parameter), part.offset, part.end))
    for name in model.delicate:
        _check_loaded(module.get_parameter(name), name, model, engine, ranks)
    return module


def initial_elements(model: TrainableModel, name: str, shape: tuple[int, ...], start: int, end: int) -> Tensor:
    """The float32 values that elements ``start`` to ``end`` of a flattened parameter start with, on the CPU.

    Only the rows that hold them are read.
    """
    if not shape:
        return model.initial_value(name).flatten()[start:end]
    row = prod(shape[1:])
    first = start // row
    values = model.initial_value(name, slice(first, -(-end // row)))
    return values.flatten()[start - first * row : end - first * row]


def _check_loaded(
    parameter: nn.Parameter, name: str, model: TrainableModel, engine: EngineConfig, ranks: Ranks
) -> None:
    """Compare what this rank holds of a parameter with the file. Raises ``RuntimeError`` if it is not the same."""
    held = shard_of(parameter, ranks.rank) if is_sharded(engine) else Piece(0, parameter.data.view(-1))
    if held.values.numel():
        expected = initial_elements(model, name, shape_of(parameter), held.offset, held.end).to(held.values.dtype)
        if not torch.equal(held.values.cpu(), expected):
            raise RuntimeError(f"{name} in memory is not the checkpoint's; please report this as a bug")


def inference_module(module: nn.Module, engine: EngineConfig, ranks: Ranks) -> nn.Module:
    """A module ready for scoring; under ZeRO-3 every forward is collective."""
    module.eval()
    if not is_sharded(engine):
        return module
    deepspeed = import_deepspeed()
    wrapped: nn.Module = _initialize(deepspeed, model=module, config=deepspeed_settings(engine, None, ranks))[0]
    wrapped.eval()
    return wrapped


def _initialize(deepspeed: Any, **arguments: Any) -> Any:
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some of DeepSpeed's optimizers print their memory use
            return deepspeed.initialize(**arguments)
    except (ValueError, TypeError, AssertionError, KeyError, NotImplementedError, ZeRORuntimeException) as error:
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
        deepspeed = import_deepspeed()
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
        self.layout = LAYOUTS[state_layout(engine)](self.engine.optimizer, self.optimizer, self.parameters, ranks)
        if self.engine.optimizer is self.optimizer:  # all other layouts of DeepSpeed do that themselves
            self.optimizer.register_step_pre_hook(_skip_unless_finite)
        self.stopwatch = Stopwatch(ranks.device)
        self.num_skipped = 0

    def step(self, losses: Sequence[Callable[[nn.Module], Sums]], learning_rate: float) -> Sums:
        """One optimizer step: forward, backward and update.

        Each element of ``losses`` computes, with the module, float32 sums over the examples of one micro-batch by the
        name of their scalar; "loss" is what is minimised. Every rank gives one at least, from ZeRO-2 on equally many.
        The gradient is that of the loss summed over all ranks and micro-batches, divided by the global batch size.
        Returns this rank's sums over its micro-batches (detached). A step whose gradient is not finite changes nothing:
        see ``is_applied``.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        totals: Sums = {}
        # DeepSpeed averages gradients over the ranks; the loss here is a sum over ranks.
        scale = self.ranks.world_size / self.global_batch_size
        for index, sums_of in enumerate(losses):
            self.engine.set_gradient_accumulation_boundary(index == len(losses) - 1)
            with self.stopwatch.phase("forward"):
                sums = sums_of(self.engine)
            with self.stopwatch.phase("backward"):
                self.engine.backward(sums["loss"] * scale)
            for name, value in sums.items():
                totals[name] = totals[name] + value.detach() if name in totals else value.detach()
        with self.stopwatch.phase("optimizer"):
            self.engine.step()
        self.num_skipped += not self.is_applied
        return totals

    @property
    def is_applied(self) -> bool:
        """Whether the last step changed the weights; if not, its gradient was not finite. The same on all ranks."""
        return bool(self.engine.was_step_applied())

    @property
    def gradient_norm(self) -> "float | Tensor":
        """Global norm of the last step's gradient before clipping, for which nobody has waited yet; NaN where DeepSpeed
        reports none."""
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    def state(self, name: str, keys: Collection[str] | None = None) -> dict[str, Tensor]:
        """Whole float32 weight and moments of one parameter (or those of ``keys``), on the CPU. Collective.

        Of Adafactor only the weight.
        """
        keys = (WEIGHT, *(self.moments or ())) if keys is None else keys
        return {key: self.layout.whole(name, key).detach().float().cpu().contiguous() for key in keys}

    @property
    def moments(self) -> tuple[str, ...] | None:
        """Names of the optimizer's moments, of the weight's shape, the squares last; None: Adafactor's are its own."""
        return None if isinstance(self.optimizer, torch.optim.Adafactor) else MOMENTS

    def load_initial(self, model: TrainableModel) -> None:
        """Set all weights to those that the model starts with: DeepSpeed made the float32 copies from rounded ones."""
        self.layout.release()
        for name, parameter in self.parameters.items():
            start, end = self.layout.range_of(name, WEIGHT)
            if start < end:
                self.layout.put(name, WEIGHT, start, initial_elements(model, name, shape_of(parameter), start, end))

    def forget_steps(self) -> None:
        """Set the optimizer's state to that before the first step; the weights stay as they are."""
        self.stopwatch.read()
        self.num_skipped = 0
        if self.moments is None:
            self.optimizer.state.clear()  # Adafactor makes its state in the first step
            return
        for state in self.optimizer.state.values():
            for moment in self.moments:
                state[moment].zero_()
        self.set_num_steps(0)

    def set_num_steps(self, num_steps: int, num_skipped: int = 0) -> None:
        """Tell the optimizer how many steps have been taken (for Adam's bias correction), and how many of them have
        changed nothing."""
        self.num_skipped = num_skipped
        num_steps -= num_skipped
        for key, state in self.optimizer.state.items():
            state[STEP] = step_value(self.optimizer, num_steps, key)


def _skip_unless_finite(optimizer: Any, *_: Any) -> None:
    """Leave the optimizer without gradients, so that it does nothing, if some are not finite; DeepSpeed's engine looks
    at ``overflow`` afterwards. Gradients are those of all ranks already."""
    trained = [one for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
    norm = torch.nn.utils.get_total_norm([one.grad for one in trained])
    optimizer.overflow = not bool(torch.isfinite(norm))
    if optimizer.overflow:
        for one in trained:
            one.grad = None


def _make_optimizer(
    trained: Sequence[nn.Parameter], engine: EngineConfig, train: TrainConfig, ranks: Ranks
) -> torch.optim.Optimizer:
    """AdamW, or Adafactor with parameter scaling; vectors (layer norms, biases) are not decayed."""
    matrices = [parameter for parameter in trained if len(shape_of(parameter)) > 1]
    vectors = [parameter for parameter in trained if len(shape_of(parameter)) <= 1]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if train.optimizer == "adafactor":
        # torch's Adafactor scales the step by the root mean square of each parameter (Shazeer & Stern 2018, section 8).
        return torch.optim.Adafactor(groups, lr=train.learning_rate)
    if engine.offload_optimizer and ranks.device.type == "cuda":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=train.learning_rate, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=train.learning_rate, fused=True)
