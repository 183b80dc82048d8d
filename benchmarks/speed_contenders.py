"""The loops that benchmarks/speed.py lets run in turns: ours, and others that compute the same."""

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from speed_world import LEARNING_RATE, World

from alsace_dist.config import Config
from alsace_dist.files.layout import Layout, data_url
from alsace_dist.files.shards import open_dataset, read_shard
from alsace_dist.ranks.group import Runtime, StopFlag
from alsace_dist.tasks.base import encode_answers, encode_groups


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
    """Our loops ask after every step and before every shard whether to stop: there they wait for their turn."""

    def __init__(self, pause: Callable[[], None]) -> None:
        self._pause = pause

    @property
    def is_set(self) -> bool:  # type: ignore[override]
        """Never, but later."""
        self._pause()
        return False


def take_turns(runtime: Runtime, contenders: Sequence[Sequence[Contender]], num_blocks: int) -> list[list[float]]:
    """Seconds of each contender (one or several loops, one after the other) in each block, mean over the ranks."""
    blocks = []
    for block in range(num_blocks):
        seconds = [0.0] * len(contenders)
        for turn in range(len(contenders)):
            index = (turn + block) % len(contenders)
            for part in contenders[index]:
                runtime.barrier()
                seconds[index] += part.advance()
        blocks.append([value / runtime.world_size for value in runtime.sum(*seconds)])
    return blocks


def ours_scoring(
    world: World, runtime: Runtime, config: Config, outputs: Sequence[Path], pause: Callable[[], None]
) -> None:
    """Our scoring of a dataset, once for each output directory. Pauses before every shard and after the last."""
    from alsace_dist.stages import score

    turns = dataclasses.replace(runtime, stop=Turn(pause))
    url = data_url(config, "unlabeled")
    score.score(config, world.model, dict.fromkeys(outputs, url), {path: {} for path in outputs}, turns)


def ours_training(world: World, runtime: Runtime, config: Config, jobs: list[Any], pause: Callable[[], None]) -> None:
    """Our distillation. Leaves the loop's job in ``jobs`` and pauses after every step."""
    from alsace_dist.stages import train
    from alsace_dist.training import loop

    run = loop.run

    def leave_job(job: loop.Job, runtime: Runtime) -> None:
        loop.run = run
        jobs.append(job)
        pause()
        run(job, runtime)

    layout = Layout(Path(config.run_dir))
    directory = layout.distill(1)
    turns = dataclasses.replace(runtime, stop=Turn(pause))
    loop.run = leave_job
    train.distill(config, world.model, layout.scores(0, "unlabeled"), layout.selection(1), directory, {}, turns)


def ready_batches(job: Any, runtime: Runtime, num_steps: int) -> list[list[Any]]:
    """This rank's micro-batches of the first steps, as our loop cuts them."""
    from alsace_dist.data import stream
    from alsace_dist.training import loop

    order = stream.CanonicalOrder(job.counts, job.section.global_batch_size, job.seed)
    own = stream.TrainStream(order, job.load, job.build, runtime.rank, runtime.world_size)
    return [loop._micro_batches(job, own.batch(step), runtime) for step in range(num_steps)]


def encode(world: World, config: Config, shards: slice) -> tuple[Any, Any, list[list[Any]]]:
    """Answers, the collator for them, and the encoded rows of some shards of the config's dataset."""
    from alsace_dist.models import collate
    from alsace_dist.models import mt5 as modeling

    tokenizer = modeling.load_tokenizer(world.model)
    begin = modeling.load_model_config(world.model).decoder_start_token_id
    dataset = open_dataset(data_url(config, "unlabeled"))
    answers = encode_answers(config.task, tokenizer, dataset.languages, begin)
    groups = [read_shard(dataset, shard) for shard in dataset.shards[shards]]
    rows = [encode_groups(config.task, tokenizer, one, dataset.languages) for one in groups]
    return answers, collate.AnswerCollator(answers, tokenizer.pad_token_id), rows


def by_language(collator: Any, rows: list[Any]) -> dict[str, Any]:
    """Language -> arguments of a forward, over rows of complete groups."""
    import torch

    found = {}
    for language in sorted({row.language for row in rows}):
        ids = [row.input_ids for row in rows if row.language == language]
        found[language] = collator(ids, [language] * len(ids)).to(torch.device("cpu"))
    return found


def load_whole(world: World, config: Config) -> tuple[Any, Any]:
    """The same model with its whole head, as transformers has it, and the token ids of the answers."""
    import torch
    from transformers import MT5ForConditionalGeneration

    from alsace_dist.models.mt5 import DTYPES

    whole = MT5ForConditionalGeneration.from_pretrained(world.model, dtype=DTYPES[config.engine.dtype])
    assert whole.lm_head.weight.data_ptr() != whole.shared.weight.data_ptr()
    return whole, torch.tensor(encode(world, config, slice(0))[0].vocabulary)


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
    log_probs_of: Callable[..., Any], shards: list[list[Any]], results: list[np.ndarray], pause: Callable[[], None]
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

    def __init__(self, module: Any, value: Callable[[str], Any], runtime: Runtime) -> None:
        import torch

        named = list(module.named_parameters())
        numel = sum(parameter.numel() for _, parameter in named)
        part = -(-numel // runtime.world_size)
        self.flat = torch.zeros(part * runtime.world_size, dtype=named[0][1].dtype)
        self.gradient = torch.zeros(part * runtime.world_size)
        own = slice(part * runtime.rank, part * (runtime.rank + 1))
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
    world: World, runtime: Runtime, job: Any, num_steps: int, losses: list[float], pause: Callable[[], None]
) -> None:
    """A bare loop over the micro-batches of ours. Pauses after every step."""
    from alsace_dist.training import engine

    answers, _, _ = encode(world, world.config("timed"), slice(0))
    scorer, value = engine.load_scorer(world.model, answers, job.engine, 0.0, runtime)
    optimizer = ShardedAdamW(scorer.train(), value, runtime)
    for parts in ready_batches(job, runtime, num_steps):
        total = 0.0
        for part in parts:
            loss = part.loss(scorer)
            (loss / job.section.global_batch_size).backward()
            optimizer.accumulate()
            total += float(loss.detach())
        optimizer.step()
        losses.append(total / job.section.global_batch_size)
        pause()


def trainer_training(
    world: World, runtime: Runtime, job: Any, num_steps: int, losses: list[float], pause: Callable[[], None]
) -> None:
    """``transformers.Trainer`` over the same examples, rank by rank and step by step. Pauses after every step."""
    import accelerate
    import transformers
    from torch.utils.data import DataLoader

    from alsace_dist.data import stream
    from alsace_dist.training import engine

    order = stream.CanonicalOrder(job.counts, job.section.global_batch_size, job.seed)
    own = stream.TrainStream(order, job.load, job.build, runtime.rank, runtime.world_size)
    examples = [example for step in range(num_steps) for example in own.batch(step)]
    share = job.section.global_batch_size // runtime.world_size
    micro = min(share, job.section.micro_batch_size)

    whole, vocabulary = load_whole(world, world.config("timed"))

    def collate(rows: list[Any]) -> dict[str, Any]:
        return {"part": job.collate(rows), "num": len(rows)}

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(examples, micro, collate_fn=collate)  # type: ignore[arg-type]

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            assert type(model).__name__ == "DeepSpeedEngine"
            loss = inputs["part"].loss(lambda *arguments: whole_log_probs(model, vocabulary, *arguments))
            losses.append(float(loss.detach()) / job.section.global_batch_size)
            return loss / inputs["num"]

    class Pause(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **options: Any) -> None:
            pause()

    settings = engine.deepspeed_config(job.engine, job.section, runtime)
    settings = engine._with_buckets(settings, list(whole.named_parameters()))
    settings |= {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": share // micro}
    # On CPUs accelerate takes DistributedDataParallel, whatever is asked for, unless its state is there already.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    accelerate.PartialState(backend="gloo")
    arguments = transformers.TrainingArguments(
        output_dir=str(world.directory / "trainer"),
        use_cpu=True,
        accelerator_config={"use_configured_state": True},
        bf16=job.engine.dtype == "bf16",
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
    runtime: Runtime,
    config: Config,
    teachers: Sequence[str],
    losses: list[float],
    pause: Callable[[], None],
) -> None:
    """The pairwise algorithm over this rank's half of the groups, again and again. Pauses before every pass."""
    whole, vocabulary = load_whole(world, config)
    log_probs_of = partial(whole_log_probs, whole.train(), vocabulary)
    optimizer = ShardedAdamW(whole, lambda name: whole.get_parameter(name).detach().float(), runtime)
    _, collator, (rows,) = encode(world, config, slice(runtime.rank, runtime.rank + 1))
    inputs = by_language(collator, rows)
    num_groups = world.size.num_pair_groups
    scale = 1 / (num_groups * len(teachers) * (len(inputs) - 1))
    while True:
        pause()
        losses.append(pairwise_loss(log_probs_of, inputs, teachers, scale))
        optimizer.accumulate()
        optimizer.step()
