"""The state of a training, and where its numbers lie: per trainable parameter the float32 weight and the moments.

Each ZeRO stage lays them out in its own way. What is common to all: a parameter is taken flat, each of its elements is
some rank's own, which saves it, and a rank may hold more elements than its own, which it loads.
"""

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alsace_dist.ranks.group import Ranks

SQUARES = "exp_avg_sq"
MOMENTS = ("exp_avg", SQUARES)
WEIGHT = "weight"
STEP = "step"


class Piece(NamedTuple):
    """Elements from ``offset`` on of a flattened parameter. ``values``: flat, and not a copy: it is what is trained."""

    offset: int
    values: Tensor

    @property
    def end(self) -> int:
        """The first element that is not in it."""
        return self.offset + self.values.numel()

    def put(self, offset: int, values: Tensor) -> None:
        """Set what it shares with the flat ``values`` from element ``offset`` on."""
        start, end = max(self.offset, offset), min(self.end, offset + values.numel())
        if start < end:
            self.values[start - self.offset : end - self.offset].copy_(values[start - offset : end - offset])


def private(owner: Any, *names: str) -> Any:
    """The first of some attributes of DeepSpeed that are not part of its interface and may go in a next release.

    Raises ``RuntimeError`` if none is there: what this module builds on them would silently be wrong.
    """
    for name in names:
        if hasattr(owner, name):
            return getattr(owner, name)
    raise RuntimeError(
        f"DeepSpeed {importlib.metadata.version('deepspeed')}: {type(owner).__name__} has no {' or '.join(names)}; "
        "install a version in the range of pyproject.toml"
    )


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, sharded or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def shard_of(parameter: nn.Parameter, rank: int) -> Piece:
    """A rank's part of a parameter that ZeRO-3 has sharded, without the padding that makes all parts equally long."""
    part = private(parameter, "ds_tensor")
    if not part.is_floating_point():
        raise RuntimeError("ZeRO-3 holds a parameter quantised; please report this as a bug")
    offset = part.numel() * rank
    numel = min(part.numel(), private(parameter, "ds_numel") - offset)
    return Piece(offset, part.data[: max(0, numel)])


class State(ABC):
    """The weights and moments of the trainable parameters on this rank, by their layout over the ranks.

    Names of numbers are WEIGHT and those of the optimizer's moments. Nothing here is collective but ``whole``.
    """

    def __init__(
        self, wrapped: Any, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], ranks: Ranks
    ) -> None:
        """``wrapped``: DeepSpeed's optimizer around ``optimizer``."""
        self.wrapped, self.optimizer, self.parameters, self.ranks = wrapped, optimizer, parameters, ranks

    @abstractmethod
    def own(self, name: str) -> dict[str, Piece]:
        """This rank's own numbers of a parameter: the same elements of each; empty if it has none.

        Over all ranks every element of every parameter is there once. Of Adafactor, whose moments are not the
        weight's elements, only the weight.
        """

    @abstractmethod
    def held(self, name: str) -> dict[str, list[Piece]]:
        """All numbers of a parameter that this rank holds: its own, and copies of others', such as those in bf16."""

    def drop_moments(self) -> None:
        """Free the optimizer's moments; from then on there are weights alone, and no step can be taken."""
        self.optimizer.state.clear()

    def release(self) -> None:  # noqa: B027 (most layouts have nothing to forget)
        """Forget what was made of weights that are about to be replaced."""

    def put(self, name: str, key: str, offset: int, values: Tensor) -> None:
        """Set numbers of a parameter, from element ``offset`` on, wherever this rank holds them."""
        for piece in self.held(name)[key]:
            piece.put(offset, values)

    def range_of(self, name: str, key: str) -> tuple[int, int]:
        """The first element of a parameter that this rank holds, and the first after the last; (0, 0) if it has none.

        What is held is held without gaps: pieces of a parameter lie in each other.
        """
        pieces = [piece for piece in self.held(name).get(key, ()) if piece.values.numel()]
        return min((piece.offset for piece in pieces), default=0), max((piece.end for piece in pieces), default=0)

    def whole(self, name: str, key: str, to: int | None = None) -> Tensor:
        """One parameter's weight or moment in float32, whole, on the device of the rank. Collective.

        ``to``: the rank that needs it, so that what the others get is worth nothing; None: all do.
        """
        shape = shape_of(self.parameters[name])
        found = torch.zeros(torch.Size(shape).numel(), device=self.ranks.device)
        if own := self.own(name):
            found[own[key].offset : own[key].end].copy_(own[key].values)
        # All but one rank add zeros to an element. As integers no bit changes: as numbers, -0.0 would become 0.0.
        bits = found.view(torch.int32)
        torch.distributed.all_reduce(bits) if to is None else torch.distributed.reduce(bits, to)
        return found.view(shape)

    # Adafactor's moments have shapes of their own, and are kept with one rank's weight.

    def own_extras(self, name: str) -> Mapping[str, Tensor]:
        """What the optimizer keeps of a parameter whose elements are not the weight's, if this rank is to save it."""
        return {}

    def put_extras(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Set these on every rank."""
        assert not values


class WholeState(State):
    """ZeRO-0: every rank has a float32 copy of each parameter, or in fp32 the parameter itself.

    Whole parameters are dealt to the ranks, by size, as their own.
    """

    def __init__(
        self, wrapped: Any, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], ranks: Ranks
    ) -> None:
        super().__init__(wrapped, optimizer, parameters, ranks)
        self.masters: dict[str, Tensor] = dict(parameters)
        if wrapped is not optimizer:  # bf16: DeepSpeed keeps the float32 copies
            pairs = zip(private(wrapped, "fp16_groups"), private(wrapped, "fp32_groups"), strict=True)
            masters = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
            self.masters = {name: masters[id(parameter)] for name, parameter in parameters.items()}
        _clear(optimizer, list(self.masters.values()))
        self.has_extras = isinstance(optimizer, torch.optim.Adafactor)
        self.owners = dict(zip(parameters, _dealt([one.numel() for one in parameters.values()], ranks), strict=True))

    def _state(self, name: str) -> dict[str, Tensor]:
        state = self.optimizer.state.get(self.masters[name], {})
        return {key: value for key, value in state.items() if key != STEP}

    def _pieces(self, name: str) -> dict[str, Piece]:
        tensors = {WEIGHT: self.masters[name].data} | ({} if self.has_extras else self._state(name))
        return {key: Piece(0, value.view(-1)) for key, value in tensors.items()}

    def own(self, name: str) -> dict[str, Piece]:
        return self._pieces(name) if self.owners[name] == self.ranks.rank else {}

    def held(self, name: str) -> dict[str, list[Piece]]:
        pieces = {key: [piece] for key, piece in self._pieces(name).items()}
        if self.masters[name] is not self.parameters[name]:
            pieces[WEIGHT].append(Piece(0, self.parameters[name].data.view(-1)))
        return pieces

    def whole(self, name: str, key: str, to: int | None = None) -> Tensor:
        return self.masters[name].data if key == WEIGHT else self._state(name)[key]

    def own_extras(self, name: str) -> Mapping[str, Tensor]:
        return self._state(name) if self.has_extras and self.owners[name] == self.ranks.rank else {}

    def put_extras(self, name: str, values: Mapping[str, Tensor]) -> None:
        if values:
            master = self.masters[name]
            self.optimizer.state[master] = {STEP: step_value(self.optimizer, 0, master)} | {
                key: value.to(master.device) for key, value in values.items()
            }


class PartitionedState(State):
    """ZeRO-1 and 2: weights are whole; the float32 copies and moments are flat and divided over the ranks."""

    def __init__(
        self, wrapped: Any, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], ranks: Ranks
    ) -> None:
        super().__init__(wrapped, optimizer, parameters, ranks)
        # The second name is that of DeepSpeed's BF16_Optimizer, which bf16 at ZeRO-1 gets.
        flats = private(wrapped, "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        _clear(optimizer, flats)
        private(wrapped, "_lazy_init_hp_params_optimizer_state")()  # maps the parameters to the state made above

    def own(self, name: str) -> dict[str, Piece]:
        fragment = private(self.parameters[name], "_hp_mapping")
        if fragment is None:  # all of it is other ranks'
            return {}
        offset = private(fragment, "lp_fragment_address").start
        moments = private(fragment, "optim_fragment")
        tensors = {WEIGHT: private(fragment, "hp_fragment")} | {key: moments[key] for key in MOMENTS if key in moments}
        return {key: Piece(offset, value.data) for key, value in tensors.items()}

    def held(self, name: str) -> dict[str, list[Piece]]:
        own = self.own(name)
        pieces = {key: [own[key]] if own else [] for key in (WEIGHT, *MOMENTS)}
        pieces[WEIGHT].append(Piece(0, self.parameters[name].data.view(-1)))
        return pieces

    def drop_moments(self) -> None:
        super().drop_moments()
        for parameter in self.parameters.values():
            if (fragment := private(parameter, "_hp_mapping")) is not None:
                private(fragment, "optim_fragment").clear()


class ShardedState(State):
    """ZeRO-3: weights, float32 copies and moments are divided over the ranks, each parameter by itself."""

    def __init__(
        self, wrapped: Any, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], ranks: Ranks
    ) -> None:
        super().__init__(wrapped, optimizer, parameters, ranks)
        self.flats = private(wrapped, "fp32_partitioned_groups_flat")
        _clear(optimizer, self.flats)
        self.positions, self.id_of = private(wrapped, "grad_position"), private(wrapped, "get_param_id")

    def own(self, name: str) -> dict[str, Piece]:
        parameter = self.parameters[name]
        offset, low = shard_of(parameter, self.ranks.rank)
        if not low.numel():  # the parts of the ranks before hold all of it
            return {}
        group, start, _ = self.positions[self.id_of(parameter)]
        flat = self.flats[group]
        moments = self.optimizer.state.get(flat, {})
        tensors = {WEIGHT: flat.data} | {key: moments[key] for key in MOMENTS if key in moments}
        return {key: Piece(offset, value[start : start + low.numel()]) for key, value in tensors.items()}

    def held(self, name: str) -> dict[str, list[Piece]]:
        own = self.own(name)
        pieces = {key: [own[key]] if own else [] for key in (WEIGHT, *MOMENTS)}
        pieces[WEIGHT].append(shard_of(self.parameters[name], self.ranks.rank))
        return pieces

    def release(self) -> None:
        """Small parameters stay gathered, and hpZ keeps second parts within a node: both are made anew when needed."""
        for parameter in self.parameters.values():
            private(parameter, "partition")()
            private(parameter, "ds_secondary_tensor")
            parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]


LAYOUTS: dict[str, Callable[..., State]] = {
    "whole": WholeState,
    "partitioned": PartitionedState,
    "sharded": ShardedState,
}


def _dealt(sizes: Sequence[int], ranks: Ranks) -> list[int]:
    """For each of these sizes, the rank that has least so far."""
    loads, owners = [0] * ranks.world_size, []
    for size in sizes:
        owners.append(loads.index(min(loads)))
        loads[owners[-1]] += size
    return owners


def _clear(optimizer: torch.optim.Optimizer, keys: Sequence[Tensor]) -> None:
    """Give the optimizer its state before the first step, so that it can be read and written at any time.

    This also undoes the empty step by which DeepSpeed's bf16 optimizer of stage 0 creates its state, which leaves
    Adam's step count one too high and the first updates a quarter too small.
    """
    optimizer.state.clear()
    if isinstance(optimizer, torch.optim.Adafactor):
        return  # Adafactor's state has other shapes, and is made in the first step
    for key in keys:
        optimizer.state[key] = {STEP: step_value(optimizer, 0, key)} | {
            moment: torch.zeros_like(key.data) for moment in MOMENTS
        }


def step_value(optimizer: torch.optim.Optimizer, num_steps: int, key: Tensor) -> Any:
    """How an optimizer keeps the number of its steps with the state of this tensor."""
    if type(optimizer).__module__.startswith("deepspeed"):
        return num_steps
    on_device = bool(optimizer.defaults.get("fused"))
    return torch.tensor(float(num_steps), device=key.device if on_device else "cpu")
