"""What would make the host wait for the device within a step: counted on the CPU, where nothing waits."""

import collections
import traceback
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training.test_engine import examples, load, loss_of

from alsace_dist.ranks.group import Ranks

# Operators whose result the host needs, or whose size depends on values.
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Counter(TorchDispatchMode):
    """Counts operators that wait, by the file and line that asks for them: of a library, or of this program."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        is_by_mask = name in INDEXING and any(one is not None and one.dtype == torch.bool for one in args[1])
        if name in WAITING or is_by_mask:
            frames = [one for one in traceback.extract_stack() if "/torch/" not in one.filename]
            self.found[f"{frames[-2].filename.split('site-packages/')[-1]}:{frames[-2].lineno} {name}"] += 1
        return function(*args, **(kwargs or {}))


def count(
    group: Ranks, world: str, scorer: str, settings: dict[str, Any], num_parts: int, task: dict[str, Any]
) -> dict[str, int]:
    """Where two steps wait, after two others, in which memory is laid out; "synchronize": for all that was asked of the
    device."""
    from deepspeed.accelerator import get_accelerator

    trained, model = load(group, world, scorer, settings, **task)
    losses = [loss_of(model, examples(model)[start::num_parts], group) for start in range(num_parts)]
    calls = []
    accelerator = get_accelerator()
    before = accelerator.synchronize
    accelerator.synchronize = lambda *_: calls.append(1)
    try:
        for _ in range(2):
            trained.step(losses, 1e-3)
        with Counter() as counter:
            for _ in range(2):
                trained.step(losses, 1e-3)
    finally:
        accelerator.synchronize = before
    return dict(counter.found) | {"synchronize": len(calls)}


# What DeepSpeed itself asks for in a step, at its end: below ZeRO-1 something of each of some 40 parameters, else norms
# and overflows.
OF_DEEPSPEED = {0: 80, 1: 2, 2: 4, 3: 1}
SEVERAL_TOKENS = {"verbalizers": ["red green", "blue", "old new tree"]}


@pytest.mark.parametrize(
    ("scorer", "task", "stage", "num_parts"),
    [
        ("mt5", {}, 0, 1),
        ("mt5", {}, 1, 1),
        ("mt5", {}, 1, 3),
        ("mt5", {}, 2, 3),
        ("mt5", {}, 3, 3),
        ("mt5", SEVERAL_TOKENS, 1, 3),
        ("cloze", {}, 1, 3),
        ("cloze", SEVERAL_TOKENS | {"max_tokens": 60}, 1, 3),
        ("head", {}, 3, 3),
        ("t5gemma2", {}, 1, 3),
        ("t5gemma2", SEVERAL_TOKENS, 3, 3),
    ],
)
def test_the_passes_of_a_step_wait_for_nothing(
    world: Path, scorer: str, task: dict[str, Any], stage: int, num_parts: int
) -> None:
    settings = {"dtype": "bf16", "zero_stage": stage}
    arguments = {"world": str(world), "scorer": scorer, "task": task, "settings": settings}
    (found,) = tiny.run_ranks(count, 1, num_parts=num_parts, **arguments)
    assert found.pop("synchronize") == 0
    assert not {place for place in found if not place.startswith("deepspeed/")}
    assert sum(found.values()) <= 2 * OF_DEEPSPEED[stage], found
