"""The loops that benchmarks/speed.py lets run in turns: ours, and others that compute the same."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from speed_world import LEARNING_RATE, World
from typing_extensions import override

from alsace_dist.config import Config
from alsace_dist.data.dealing import Part
from alsace_dist.data.rows import EncodedRow, answers_of, rows_of
from alsace_dist.data.stream import CanonicalOrder, TrainStream
from alsace_dist.files.layout import Layout, data_url
from alsace_dist.files.shards import ShardInfo, open_dataset, read_shard
from alsace_dist.monitor.sinks import Places
from alsace_dist.ranks.group import Ranks, StopFlag
from alsace_dist.ranks.watchdog import Watchdog
from alsace_dist.stages import distill
from alsace_dist.stages.base import Stage
from alsace_dist.stages.score import ScoringPass

if TYPE_CHECKING:
    from alsace_dist.models.batches import Inputs
    from alsace_dist.models.family import Family
    from alsace_dist.training.loop import Training
    from alsace_dist.training.losses import MicroBatch


class Contender:
    """A loop that runs in turns with others: in a thread of its own that waits wherever the loop calls ``pause``.

    ``cpu_seconds``: what this process has computed in each of its turns.
    """

    def __init__(self, name: str, loop: Callable[[Callable[[], None]], None]) -> None:
        self.name = name
        self.cpu_seconds: list[float] = []
        self._loop, self._go, self._back = loop, threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def advance(self) -> float:
        """Let it run to its next pause; the seconds that it took."""
        assert not self._ended, f"{self.name} has ended"
        begin, cpu_begin = time.monotonic(), time.process_time()
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error
        self.cpu_seconds.append(time.process_time() - cpu_begin)
        return time.monotonic() - begin

    def _main(self) -> None:
        self._go.acquire()
        try:
            self._loop(self._pause)
        except BaseException as error:
            self._error = error
        self._ended = True
        self._back.release()

    def _pause(self) -> None:
        self._back.release()
        self._go.acquire()


class Turn(StopFlag):
    """Our scoring asks before every shard whether to stop: there it waits for its turn."""

    def __init__(self, pause: Callable[[], None]) -> None:
        self._pause = pause

    @property
    def is_set(self) -> bool:  # type: ignore[override]
        """Never, but later."""
        self._pause()
        return False


class InTurns(Ranks):
    """The ranks as our loops see them while they take turns with others.

    Each rank draws the shards that the bare loop has, too, so that all ranks pause equally often: of the counter that
    they share, one rank may draw twice before another has drawn at all.
    """

    def shared_counter(self, text: str) -> Callable[..., int]:
        """As in ``Ranks``, and it takes as long."""
        draw, own = super().shared_counter(text), itertools.count(self.rank, self.world_size)

        def draw_own(amount: int = 1) -> int:
            draw(amount)
            return next(own)

        return draw_own


class InSteps(Ranks):
    """The ranks as our training sees them while it takes turns: it pauses where, after a step, it hears what all have
    agreed on meanwhile."""

    pause: Callable[[], None]

    @override
    def most(self, *values: float) -> list[float]:
        """As in ``Ranks``: no step ends where this is asked."""
        return super().most_later(*values)()

    @override
    def most_later(self, *values: float) -> Callable[[], list[float]]:
        """As in ``Ranks``, and whoever waits for it waits for its turn."""
        wait = super().most_later(*values)

        def wait_for_turn() -> list[float]:
            found = wait()
            self.pause()
            return found

        return wait_for_turn


def in_turns(ranks: Ranks, pause: Callable[[], None]) -> Ranks:
    """The same ranks, pausing wherever a loop asks whether to stop."""
    return InTurns(ranks.rank, ranks.world_size, ranks.local_rank, ranks.device, ranks.control, Turn(pause))


def take_turns(ranks: Ranks, contenders: Sequence[Sequence[Contender]], num_blocks: int) -> list[list[float]]:
    """Seconds of each contender (one or several loops, one after the other) in each block, mean over the ranks."""
    blocks = []
    for block in range(num_blocks):
        seconds = [0.0] * len(contenders)
        for turn in range(len(contenders)):
            index = (turn + block) % len(contenders)
            for part in contenders[index]:
                ranks.barrier()
                seconds[index] += part.advance()
        blocks.append([value / ranks.world_size for value in ranks.sum(*seconds)])
    return blocks


class WholeShards(ScoringPass):
    """A pass that deals whole shards, however few there are: a turn is a shard."""

    @override
    def _deal(self, shards: list[ShardInfo]) -> list[Part]:
        return [Part(shard) for shard in shards]


def ours_scoring(
    world: World, ranks: Ranks, config: Config, outputs: Sequence[Path], pause: Callable[[], None]
) -> None:
    """Our scoring of a dataset, once for each output directory. Pauses before every shard and after the last."""
    from alsace_dist.training.engine import inference_module, load_module
    from alsace_dist.training.settings import is_sharded

    turns = in_turns(ranks, pause)
    dataset = open_dataset(data_url(config, "unlabeled"))
    model, _ = encode(world, config, slice(0))
    model.check_weights()
    module = inference_module(load_module(model, 0.0, config.engine, turns), config.engine, turns)
    for output in outputs:
        places = Places(output, Layout(Path(config.run_dir)).tensorboard(output))
        work = WholeShards(config, dataset, places, {})
        work.run(model, module, turns, turns if is_sharded(config.engine) else None)


def ours_training(ranks: Ranks, config: Config, begun: "list[Training]", pause: Callable[[], None]) -> None:
    """Our distillation. Pauses before it loads the model, having tokenised and left what it trains in ``begun``, and
    after every step."""
    from alsace_dist.training import loop

    run = loop.run

    def leave(training: loop.Training, turns: Ranks) -> Any:
        loop.run = run
        tokenise(training, training.directory / loop.TOKENS, ranks)
        begun.append(training)
        pause()
        return run(training, turns)

    loop.run = leave
    turns = InSteps(ranks.rank, ranks.world_size, ranks.local_rank, ranks.device, ranks.control)
    turns.pause = pause
    Stage(distill, "distill", config, round=1).run(turns)


def tokenise(training: "Training", directory: Path, ranks: Ranks) -> None:
    """Tokenise all that a training may read. Collective."""
    shards = [shard for shard, count in enumerate(training.examples.counts) if count]
    training.examples.make_ready(directory, training.fingerprint, shards, Watchdog(ranks, directory, None))


def own_stream(training: "Training", ranks: Ranks) -> TrainStream[Any]:
    """This rank's share of every step, as our loop reads it."""
    examples = training.examples
    order = CanonicalOrder(examples.counts, training.section.global_batch_size, training.seed)
    return TrainStream(order, examples.load, examples.build, ranks.rank, ranks.world_size)


def ready_batches(training: "Training", ranks: Ranks, num_steps: int) -> "list[list[MicroBatch]]":
    """This rank's micro-batches of the first steps, as our loop cuts them."""
    from alsace_dist.training import loop
    from alsace_dist.training.budget import usual_rule

    own = own_stream(training, ranks)
    rule = usual_rule(training.section, training.engine, ranks.world_size, ranks.device.type)
    return [loop._micro_batches(training, own.batch(step), rule) for step in range(num_steps)]


def encode(world: World, config: Config, shards: slice) -> "tuple[Family, list[list[EncodedRow]]]":
    """The model, and the encoded rows of some shards of the config's dataset."""
    from alsace_dist.models.family import open_model

    dataset = open_dataset(data_url(config, "unlabeled"))
    model = open_model(world.model, answers_of(config.task, dataset.languages))
    groups = [read_shard(dataset, shard) for shard in dataset.shards[shards]]
    return model, [model.encode(rows_of(config.task, one, dataset.languages)) for one in groups]


def by_language(model: "Family", rows: Sequence[EncodedRow]) -> dict[str, Any]:
    """Language -> arguments of a forward, over rows of complete groups."""
    import torch

    found = {}
    for language in sorted({row.language for row in rows}):
        inputs = model.collate([row for row in rows if row.language == language])
        found[language] = inputs.to(torch.device("cpu"))
    return found


def load_whole(world: World, config: Config) -> tuple[Any, Any]:
    """The same model with its whole head, as transformers has it, and the token ids of the answers."""
    import torch
    from transformers import MT5ForConditionalGeneration

    from alsace_dist.models.weights import DTYPES

    whole = MT5ForConditionalGeneration.from_pretrained(world.model, dtype=DTYPES[config.engine.dtype])
    assert whole.lm_head.weight.data_ptr() != whole.shared.weight.data_ptr()
    return whole, torch.tensor(encode(world, config, slice(0))[0].head_rows)


def whole_log_probs(whole: Any, vocabulary: Any, ids: Any, mask: Any, decoder_ids: Any, answers: Any) -> Any:
    """What ``CandidateScorer`` gives, through the logits of the whole vocabulary. ``answers`` index ``vocabulary``."""
    import torch

    output = whole(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False)
    return torch.log_softmax(output.logits[:, -1].float().gather(1, vocabulary[answers]), dim=-1)


def generated_log_probs(whole: Any, vocabulary: Any, ids: Any, mask: Any, decoder_ids: Any, answers: Any) -> Any:
    """The same from the scores of the first step that ``generate`` takes."""
    import torch

    found = whole.generate(
        input_ids=ids,
        attention_mask=mask,
        decoder_input_ids=decoder_ids,
        max_new_tokens=1,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return torch.log_softmax(found.scores[0].float().gather(1, vocabulary[answers]), dim=-1)


def plain_scoring(
    log_probs_of: Callable[..., Any], shards: "list[list[Inputs]]", results: list[np.ndarray], pause: Callable[[], None]
) -> None:
    """A bare loop over ready batches. Pauses before every shard and after the last."""
    import torch

    with torch.inference_mode():
        for batches in shards:
            pause()
            results += [log_probs_of(*inputs.to(torch.device("cpu"))).numpy() for inputs in batches]
    pause()


class ShardedAdamW:
    """AdamW on float32 weights of which every rank updates a part: what ZeRO-1 does, by hand, on one flat tensor."""

    def __init__(self, module: Any, value: Callable[[str], Any], ranks: Ranks) -> None:
        import torch

        named = list(module.named_parameters())
        numel = sum(parameter.numel() for _, parameter in named)
        part = -(-numel // ranks.world_size)
        self.flat = torch.zeros(part * ranks.world_size, dtype=named[0][1].dtype)
        self.gradient = torch.zeros(part * ranks.world_size)
        own = slice(part * ranks.rank, part * (ranks.rank + 1))
        self.own, self.own_gradient = self.flat[own], self.gradient[own]
        begin = 0
        self.places = []
        for name, parameter in named:
            place = slice(begin, begin + parameter.numel())
            self.gradient[place] = value(name).flatten()  # passing through, to become the float32 weights
            self.flat[place] = self.gradient[place]
            parameter.data = self.flat[place].view_as(parameter)
            self.places.append((parameter, self.gradient[place].view_as(parameter)))
            begin = place.stop
        self.weights = self.own_gradient.clone()
        self.gradient.zero_()
        self.optimizer = torch.optim.AdamW([self.weights], lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def accumulate(self) -> None:
        """Add the gradients that the module has to those of the step."""
        for parameter, gradient in self.places:
            if parameter.grad is not None:
                gradient += parameter.grad
                parameter.grad = None

    def step(self) -> None:
        """Sum over the ranks, clip, update, and gather the weights again."""
        import torch
        import torch.distributed as dist

        dist.all_reduce(self.gradient)
        norm = self.own_gradient.square().sum()
        dist.all_reduce(norm)
        self.own_gradient *= min(1.0, 1.0 / (float(norm.sqrt()) + 1e-6))
        self.weights.grad = self.own_gradient
        self.optimizer.step()
        with torch.no_grad():
            self.own.copy_(self.weights)
        dist.all_gather_into_tensor(self.flat, self.own.clone())
        self.gradient.zero_()


def bare_training(
    world: World,
    ranks: Ranks,
    training: "Training",
    num_steps: int,
    losses: list[float],
    pause: Callable[[], None],
) -> None:
    """A bare loop over the micro-batches of ours. Pauses after every step."""
    from alsace_dist.training.engine import load_module

    scorer = load_module(training.model, 0.0, training.engine, ranks)
    optimizer = ShardedAdamW(scorer.train(), training.model.initial_value, ranks)
    for parts in ready_batches(training, ranks, num_steps):
        total = 0.0
        for part in parts:
            loss = part.sums(scorer)["loss"]
            (loss / training.section.global_batch_size).backward()
            optimizer.accumulate()
            total += float(loss.detach())
        optimizer.step()
        losses.append(total / training.section.global_batch_size)
        pause()


def trainer_training(
    world: World,
    ranks: Ranks,
    training: "Training",
    num_steps: int,
    losses: list[float],
    pause: Callable[[], None],
) -> None:
    """``transformers.Trainer`` over the same examples, rank by rank and step by step. Pauses after every step."""
    import accelerate
    import transformers
    from torch.utils.data import DataLoader

    from alsace_dist.training.settings import deepspeed_settings, with_buckets

    own = own_stream(training, ranks)
    examples = [example for step in range(num_steps) for example in own.batch(step)]
    share = training.section.global_batch_size // ranks.world_size
    micro = min(share, training.section.micro_batch_size or share)

    whole, vocabulary = load_whole(world, world.config("timed"))

    def collate(rows: list[Any]) -> dict[str, Any]:
        return {"part": training.examples.collate(rows), "num": len(rows)}

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(examples, micro, collate_fn=collate)  # type: ignore[arg-type]

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            assert type(model).__name__ == "DeepSpeedEngine"
            sums = inputs["part"].sums(lambda *arguments: whole_log_probs(model, vocabulary, *arguments))
            loss = sums["loss"]
            losses.append(float(loss.detach()) / training.section.global_batch_size)
            return loss / inputs["num"]

    class Pause(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **options: Any) -> None:
            pause()

    settings = deepspeed_settings(training.engine, training.section, ranks)
    settings = with_buckets(settings, whole.parameters())
    settings |= {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": share // micro}
    # On CPUs accelerate takes DistributedDataParallel, whatever is asked for, unless its state is there already.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    accelerate.PartialState(backend="gloo")
    arguments = transformers.TrainingArguments(
        output_dir=str(world.directory / "trainer"),
        use_cpu=True,
        accelerator_config={"use_configured_state": True},
        bf16=training.engine.dtype == "bf16",
        deepspeed=settings,
        max_steps=num_steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(whole, arguments, train_dataset=examples, callbacks=[Pause()]).train()  # type: ignore[arg-type]


def pairwise_loss(
    log_probs_of: Callable[..., Any], inputs: dict[str, Any], teachers: Sequence[str], scale: float
) -> float:
    """``scale`` times the sum of KL(teacher || other) over pairs and groups, two forwards each; leaves its gradient."""
    import torch

    total = 0.0
    for teacher in teachers:
        for other in (language for language in inputs if language != teacher):
            with torch.no_grad():
                target = log_probs_of(*inputs[teacher])
            loss = scale * (target.exp() * (target - log_probs_of(*inputs[other]))).sum()
            loss.backward()
            total += float(loss.detach())
    return total


def pairwise_training(
    world: World,
    ranks: Ranks,
    config: Config,
    teachers: Sequence[str],
    losses: list[float],
    pause: Callable[[], None],
) -> None:
    """The pairwise algorithm over this rank's half of the groups, again and again. Pauses before every pass."""
    whole, vocabulary = load_whole(world, config)
    log_probs_of = partial(whole_log_probs, whole.train(), vocabulary)
    optimizer = ShardedAdamW(whole, lambda name: whole.get_parameter(name).detach().float(), ranks)
    model, (rows,) = encode(world, config, slice(ranks.rank, ranks.rank + 1))
    inputs = by_language(model, rows)
    num_groups = world.size.num_pair_groups
    scale = 1 / (num_groups * len(teachers) * (len(inputs) - 1))
    while True:
        pause()
        losses.append(pairwise_loss(log_probs_of, inputs, teachers, scale))
        optimizer.accumulate()
        optimizer.step()
