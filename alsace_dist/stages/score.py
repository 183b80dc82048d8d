"""Scoring: log P(candidate | prompt) of every (group, language) of a dataset, exactly once, for any number of ranks.

The unit of work is a shard, or where there are few of them some of a shard's batches, and its result does not depend on
who computes it. Ranks draw from a shared counter; what a killed run has finished is kept.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from alsace_dist import __version__
from alsace_dist.config import Config
from alsace_dist.data.dealing import Part, Work, deal, most_batches
from alsace_dist.data.results import Results
from alsace_dist.data.rows import EncodedRow, comparable_groups, rows_of
from alsace_dist.data.stream import ahead, score_batches
from alsace_dist.data.texts import TEXTS, TextCounts, check_texts, count, lines, total
from alsace_dist.errors import PeerFailed, Stopped, UserError, warn
from alsace_dist.files import manifest
from alsace_dist.files.layout import data_url
from alsace_dist.files.manifest import FileEntry
from alsace_dist.files.progress import clear_progress
from alsace_dist.files.scores import KIND, write_scores
from alsace_dist.files.shards import Dataset, ShardInfo, open_dataset, open_split, read_shard
from alsace_dist.files.written import Written, drop, merged
from alsace_dist.method.block import block_of
from alsace_dist.monitor.health import LeadCheck
from alsace_dist.monitor.progress import Advance, progress
from alsace_dist.monitor.scoring import ScoringMonitor
from alsace_dist.monitor.sinks import Places
from alsace_dist.ranks.group import Ranks, keep_memory
from alsace_dist.ranks.job import note_position
from alsace_dist.ranks.watchdog import Watchdog
from alsace_dist.stages.base import (
    Output,
    Stage,
    data_inputs,
    model_identity,
    model_inputs,
    open_model,
    options_fingerprint,
)
from alsace_dist.training.settings import is_sharded

if TYPE_CHECKING:
    from alsace_dist.models.batches import Inputs
    from alsace_dist.models.family import Family

ON_RANKS = True
# In the first passes under ZeRO-3 DeepSpeed compares the order of modules with rank 0's, whoever shares the weights.
PASSES_OF_ALL = 2


def _splits(stage: Stage) -> list[str]:
    """What is scored: the unlabeled groups only where a later selection or calibration reads their scores."""
    is_read = stage.round < stage.config.rounds or stage.config.evaluate.calibrate
    return ["unlabeled", "test"] if stage.round == 0 or is_read else ["test"]


def inputs(stage: Stage) -> list[Output]:
    """The model of the round, and the data."""
    return data_inputs(stage) + model_inputs(stage, stage.round)


def outputs(stage: Stage) -> list[Output]:
    """Scores of one split each."""
    return [Output(stage.layout.scores(stage.round, split), KIND) for split in _splits(stage)]


def fingerprint(stage: Stage, output: Output) -> dict[str, Any]:
    """Everything that the scores of a dataset depend on."""
    config = stage.config
    return {
        "score": config.score.model_dump(mode="json", exclude={"sharding"}),
        "task": config.task.model_dump(mode="json"),
        "engine": config.engine.model_dump(mode="json", include={"dtype", "num_threads"}),
        "languages": config.data.languages,
        "model": model_identity(stage, stage.round),
        "data": open_dataset(_url_of(stage, output)).digest,
        "code": __version__,
    } | options_fingerprint(config)


def _url_of(stage: Stage, output: Output) -> str:
    return data_url(stage.config, output.directory.name)


def run(stage: Stage, ranks: Ranks | None) -> None:
    """Score all splits with one model.

    Raises ``UserError`` for broken inputs, ``Stopped`` if a stop was agreed (finished shards are kept).
    """
    from alsace_dist.training.engine import inference_module, load_module
    from alsace_dist.training.layout import scoring_layout, weight_bytes

    assert ranks is not None
    config = stage.config
    opened = {output: open_split(stage.config, output.directory.name) for output in stage.outputs}
    languages = sorted({language for dataset in opened.values() for language in dataset.languages})
    model = open_model(stage, stage.round, languages, ranks)
    hosts = ranks.gather(os.uname().nodename)
    engine, together = scoring_layout(config.score.sharding, config.engine, model, ranks, hosts)
    module = inference_module(load_module(model, 0.0, engine, together), engine, together)
    keep_memory(ranks, weight_bytes(model, engine.dtype))
    for dataset in opened.values():
        ranks.main_first(partial(check_texts, model.encode, dataset, dataset.languages, config))
    for output, dataset in opened.items():
        work = ScoringPass(config, dataset, stage.places(output), stage.fingerprint(output))
        work.run(model, module, ranks, together if is_sharded(engine) else None)


@dataclass(frozen=True)
class Batch:
    """A batch of a part: which rows of its shard, as padded tensors; whether it is the part's first or last."""

    work: Work
    rows: list[int]
    inputs: "Inputs"
    is_first: bool
    is_last: bool


class Flying(NamedTuple):
    """A batch that is being scored. ``log_probs()`` waits for its results, [rows, K]."""

    batch: Batch
    log_probs: Callable[[], np.ndarray]


class ScoringPass:
    """One dataset's scoring pass on this rank."""

    def __init__(self, config: Config, dataset: Dataset, places: Places, fingerprint: dict[str, Any]) -> None:
        """``places``: where scores go, and scalars."""
        self.config, self.dataset, self.places, self.directory = config, dataset, places, places.directory
        self.fingerprint = fingerprint
        self.num_done = 0
        self._tokenised: tuple[ShardInfo, list[EncodedRow], list[list[int]]] | None = None
        self.check_lead = LeadCheck()

    def run(self, model: "Family", module: Any, ranks: Ranks, together: Ranks | None) -> None:
        """Score all shards that have no result yet, then check the whole and write the manifest. Collective.

        ``together``: this rank among those whose forward passes are one collective; None: it runs by itself.
        """
        self.model, self.module, self.ranks, self.together = model, module, ranks, together
        self.draw = ranks.shared_counter(f"score/{self.directory}")
        self.watchdog = Watchdog(ranks, self.directory, self.config.engine.hang_limit())
        with ExitStack() as stack:
            with self.watchdog:
                stopped = self._run(stack)
            if stopped:
                raise Stopped(f"score: stopped; {self.directory} keeps what is done")
            self._finish()

    def _run(self, stack: ExitStack) -> bool:
        """Score what has no result yet; whether a stop was asked for. ``stack``: closes the monitor."""
        ranks, directory = self.ranks, self.directory
        ranks.main_first(lambda: manifest.begin(directory, KIND, self.fingerprint))
        metadata = {"fingerprint": manifest.digest_json(self.fingerprint)}
        self.results = Results(directory, metadata, Written(directory, ranks.rank))
        shards = self._without_result([Part(shard) for shard in self.dataset.shards])
        parts = self._deal([part.shard for part in shards])
        todo = self._without_result(parts)
        num_whole = len(self.dataset.shards) - len(shards)
        total, num_done = num_whole + len(parts), num_whole + len(parts) - len(todo)
        self.monitor = ScoringMonitor(self.places, ranks, num_done, total)
        stack.callback(self.monitor.close)
        self.counts = self.monitor.counts
        if ranks.is_main:
            note_position(f"{num_done} of {total} parts of {directory}")
        with progress(f"score {directory.name}", directory, total, num_done, ranks.is_main) as advance:
            if self.together is None:
                self._run_freely(todo, advance)
            else:
                self._run_in_step(todo, advance, self.together)
            with self.watchdog.waiting_for_others():
                stopped = ranks.any_rank(ranks.stop.is_set)[0]
            if not stopped:
                advance(len(todo) - self.num_done)  # by other ranks, and parts without a batch
            return stopped

    # --- parts -----------------------------------------------------------------------------------------------------

    def _deal(self, shards: list[ShardInfo]) -> list[Part]:
        """What the ranks draw, in order."""
        return deal(shards, self.ranks.world_size, partial(most_batches, self.config))

    def _without_result(self, parts: list[Part]) -> list[Part]:
        """Those that have no result yet. Collective: each rank looks after its share."""
        ranks = self.ranks
        own = np.zeros(len(parts), bool)
        for number in range(ranks.rank, len(parts), ranks.world_size):
            own[number] = self.results.is_done(parts[number])
        return [part for part, is_done in zip(parts, ranks.union(own), strict=True) if not is_done]

    def _open(self, part: Part, number: int) -> Work:
        found = self._tokenised  # a thread makes batches ahead, and the loop may ask for a stand-in
        if found is None or found[0] is not part.shard:
            groups = read_shard(self.dataset, part.shard)
            rows = self.model.encode(rows_of(self.config.task, groups, self.dataset.languages))
            cut = score_batches([self.model.num_tokens(row) for row in rows], self.config.score.tokens_per_batch)
            self._tokenised = found = part.shard, rows, cut
        _, rows, cut = found
        return Work(part, number, rows, part.of(cut))

    def _write(self, work: Work) -> None:
        texts = {language: counts.model_dump() for language, counts in count(work.rows).items()}
        metadata = self.results.metadata_of(work.part) | {TEXTS: json.dumps(texts, ensure_ascii=False)}
        rows = sorted(work.results) if work.part.num_parts > 1 else None
        write_scores(self.results.path(work.part), work.scores(), metadata, rows)
        self.results.written.add(self.results.path(work.part))

    def _see(self, work: Work) -> None:
        """Count what a part's rows answer, but for those whose candidates are no other language's."""
        found = comparable_groups(work.rows, work.results)
        groups = {key: {name: work.results[at] for name, at in group.items()} for key, group in found.items()}
        num_rows = Counter(row.key for row in work.rows if not row.is_apart)
        is_whole = [len(group) == num_rows[key] for key, group in groups.items()]  # others are in several parts
        if groups:
            self.counts.see(block_of(groups.values()), np.array(is_whole, bool))
        self.monitor.part(work.number)

    # --- batches ---------------------------------------------------------------------------------------------------

    def _batches(self, todo: list[Part]) -> Iterator[Batch]:
        """All batches of the parts that this rank draws, in order; made ahead of the model, in a thread."""
        for index in self._drawn(todo):
            work = self._open(todo[index], index + 1)
            if not work.cut:
                self._write(work)
            for number, rows in enumerate(work.cut):
                inputs = self.model.collate([work.rows[row] for row in rows]).pinned(self.ranks.device)
                yield Batch(work, rows, inputs, number == 0, number == len(work.cut) - 1)

    def _drawn(self, todo: list[Part]) -> Iterator[int]:
        """The parts that this rank draws from the shared counter; of a store, each is drawn and fetched while the one
        before is scored. Towards the end, when there may be none left for another rank, none is drawn ahead.
        """
        index, is_remote = self.draw(), self.dataset.reader.is_remote
        while index < len(todo):
            has_enough = index + self.ranks.world_size < len(todo)
            following = self.draw() if is_remote and has_enough else None
            if following is not None and following < len(todo):
                self.dataset.reader.expect([todo[following].shard])
            yield index
            index = self.draw() if following is None else following

    def _next(self, batches: Generator[Batch]) -> Batch | None:
        """The next batch; None at the end, or before the next part if a stop is asked for."""
        batch = next(batches, None)
        if batch is not None and batch.is_first and self.ranks.stop.is_set:
            self.draw(1 << 40)  # exhaust the shared counter: ranks that got no signal stop as well
            batches.close()
            return None
        return batch

    def _forward(self, batch: Batch) -> Flying:
        """Begin to score a batch: on an accelerator nobody waits here for its results."""
        from alsace_dist.models.batches import to_host

        tokens, padded = batch.inputs.num_tokens
        self.counts.num_tokens += tokens
        self.counts.num_padded += padded
        return Flying(batch, to_host(self.module(*batch.inputs.to(self.ranks.device))))

    def _keep(self, flying: Flying | None, advance: Advance) -> None:
        """Put a batch's results in their places; with the last one the part is written."""
        if flying is None:
            return
        batch, work = flying.batch, flying.batch.work
        for index, row in zip(batch.rows, flying.log_probs(), strict=True):
            work.results[index] = row[: len(work.rows[index].candidates)]
        if batch.is_last:
            self._write(work)
            self.check_lead(time.monotonic() - work.begin, "score: a shard (data.groups_per_shard)")
            self.counts.num_rows += len(work.results)
            self._see(work)
            advance(work.number - self.num_done)  # the shared counter tells how far all ranks are
            self.num_done = work.number

    def _run_freely(self, todo: list[Part], advance: Advance) -> None:
        """With whole weights a forward pass concerns no other rank, so every rank works at its own pace.

        An error leaves the loop at once; the launcher ends the other ranks.
        """
        import torch

        flying: Flying | None = None
        with torch.inference_mode(), closing(ahead(self._batches(todo))) as batches:
            while batch := self._next(batches):
                next_flying = self._forward(batch)
                self._keep(flying, advance)
                flying = next_flying
                self.watchdog.beat("the next batch")
            self._keep(flying, advance)

    def _run_in_step(self, todo: list[Part], advance: Advance, together: Ranks) -> None:
        """Under ZeRO-3 every forward is collective: all ranks run equally many, with stand-ins where one has no work.

        An exception in one rank becomes a flag that all see before the next forward, so that none waits for it.
        """
        import torch

        batch: Batch | None = None
        error: Exception | None = None
        flying: Flying | None = None
        stand_in: Inputs | None = None
        with torch.inference_mode(), closing(ahead(self._batches(todo))) as batches:
            if together.world_size < self.ranks.world_size:
                stand_in = self._stand_in()
                for _ in range(PASSES_OF_ALL):
                    self.module(*stand_in.to(self.ranks.device))
            while True:
                self.watchdog.beat("the next batch")
                try:
                    batch = self._next(batches) if error is None else None
                except Exception as caught:
                    error = caught
                some_batch, failed = together.any_rank(batch is not None, error is not None)
                if error is not None:
                    raise error
                if failed:
                    raise PeerFailed("another rank failed while scoring")
                if not some_batch:
                    break
                done = flying
                if batch is None:
                    stand_in, flying = stand_in or self._stand_in(), None
                    self.module(*stand_in.to(self.ranks.device))
                else:
                    flying = self._forward(batch)
                try:
                    self._keep(done, advance)
                except Exception as caught:
                    error = caught
            self._keep(flying, advance)

    def _stand_in(self) -> "Inputs":
        """A short batch, for a rank without work."""
        work = next(work for shard in self.dataset.shards if (work := self._open(Part(shard), 0)).rows)
        return self.model.collate([work.rows[work.cut[-1][-1]]])

    # --- the end ---------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Assert that every (group, language) is there once, complete the directory, and say what was seen."""
        ranks = self.ranks
        own: list[tuple[dict[str, FileEntry], dict[str, TextCounts]]] = []
        mine = self.dataset.shards[ranks.rank :: ranks.world_size]
        # Few: there are parts only where a rank has few shards. By message: the disk may show a file later.
        parts = merged(ranks.gather(self.results.parts_written()))
        ranks.each(lambda: own.append(self.results.finish(mine, parts)))
        gathered = ranks.gather(self.counts)
        found, written = ranks.to_main(own[0]), ranks.to_main(self.results.written.entries)
        ranks.main_first(lambda: self._complete(found or [], merged(written or [])))
        self.monitor.finish(gathered)

    def _complete(
        self, found: list[tuple[dict[str, FileEntry], dict[str, TextCounts]]], written: dict[str, FileEntry]
    ) -> None:
        """Write the manifest over the files that the ranks have checked, and say what was seen. ``written``: as they
        were written. Raises ``UserError`` if one has changed since."""
        texts = total(own for _, own in found)
        details = {
            "num_examples": sum(sum(shard.num_examples.values()) for shard in self.dataset.shards),
            TEXTS: {language: counts.model_dump() for language, counts in texts.items()},
        }
        for line in lines(texts):
            warn(line)
        entries = merged(own for own, _ in found)
        if changed := [name for name, entry in entries.items() if written.get(name) != entry]:
            path = self.directory / changed[0]
            raise UserError(
                f"{path}: has changed since it was written; run the same command again, which scores it anew"
            )
        manifest.write_manifest(self.directory, KIND, self.fingerprint, [], details, entries)
        drop(self.directory)
        clear_progress(self.directory)  # rank 0 may have drawn its last part long before another rank drew the last
