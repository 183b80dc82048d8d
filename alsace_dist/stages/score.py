"""Scoring: log P(candidate | prompt) of every (group, language) of a dataset, exactly once, for any number of ranks.

The unit of work is a shard, and its result does not depend on who computes it. Ranks draw shards from a shared
counter; what a killed run has finished is kept.
"""

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alsace_dist.config import Config
from alsace_dist.data.stream import ahead, score_batches
from alsace_dist.errors import Stopped, UserError
from alsace_dist.files import manifest as artifacts
from alsace_dist.files.scores import KIND, Scores, read_metadata, read_score_file, write_scores
from alsace_dist.files.shards import Dataset, ShardInfo, open_dataset, read_shard
from alsace_dist.ranks.group import LeadCheck, PeerFailed, Runtime, note_position, shared_counter
from alsace_dist.ranks.watchdog import Watchdog
from alsace_dist.tasks.base import EncodedText, encode_answers, encode_groups


def fingerprint(config: Config, model: dict[str, Any], url: str) -> dict[str, Any]:
    """Everything the scores of a dataset depend on; ``model``: the model's identity."""
    return {
        "score": config.score.model_dump(mode="json"),
        "task": config.task.model_dump(mode="json"),
        "engine": config.engine.model_dump(mode="json", include={"dtype", "num_threads"})
        | {"is_sharded": config.engine.zero_stage == 3},
        "languages": config.data.languages,
        "model": model,
        "data": open_dataset(url).digest,
        "code": artifacts.__version__,
    }


def score(
    config: Config, model: Path, datasets: dict[Path, str], fingerprints: dict[Path, dict[str, Any]], runtime: Runtime
) -> None:
    """Score several datasets with one model: output directory -> dataset URL.

    Raises ``UserError`` for broken inputs, ``Stopped`` if a stop was agreed (finished shards are kept).
    """
    from alsace_dist.models import mt5 as modeling
    from alsace_dist.training import engine

    tokenizer = modeling.load_tokenizer(model)
    start = modeling.load_model_config(model).decoder_start_token_id
    opened = {directory: open_dataset(url) for directory, url in datasets.items()}
    languages = sorted({language for dataset in opened.values() for language in dataset.languages})
    answers = encode_answers(config.task, tokenizer, languages, start)
    scorer, _ = engine.load_scorer(model, answers, config.engine, 0.0, runtime)
    module = engine.inference_module(scorer, config.engine, runtime)
    for directory, dataset in opened.items():
        pass_ = _Pass(config, runtime, module, tokenizer, answers, dataset, directory, fingerprints[directory])
        pass_.run()


class _Pass:
    """One dataset's scoring pass on this rank."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        module: Any,
        tokenizer: Any,
        answers: Any,
        dataset: Dataset,
        directory: Path,
        fingerprint: dict[str, Any],
    ) -> None:
        from alsace_dist.models.collate import AnswerCollator

        self.config, self.runtime, self.module, self.tokenizer = config, runtime, module, tokenizer
        self.dataset, self.directory, self.fingerprint = dataset, directory, fingerprint
        self.collator = AnswerCollator(answers, tokenizer.pad_token_id)
        self.tokens_per_batch = config.score.tokens_per_batch
        self.num_done = 0
        self.digest = artifacts.digest_json(fingerprint)
        self.draw = shared_counter(f"score/{directory}/{self.digest}")
        self.num_tokens = self.num_padded = 0
        self.statistics: dict[str, list[int]] = {}
        self.check_lead = LeadCheck()
        self.watchdog = Watchdog(runtime, directory, config.engine.hang_limit())

    def run(self) -> None:
        """Score all shards that have no result yet, then check the whole and write the manifest."""
        with self.watchdog:
            stopped = self._run()
        if stopped:
            raise Stopped(f"score: stopped; {self.directory} keeps the shards that are done")
        self._merge()

    def _run(self) -> bool:
        """Score what has no result yet; whether a stop was asked for."""
        from alsace_dist.monitor.scalars import progress

        runtime, directory = self.runtime, self.directory
        runtime.main_first(lambda: artifacts.begin(directory, KIND, self.fingerprint))
        todo = runtime.gather([s for s in self.dataset.shards if not self._is_done(s)] if runtime.is_main else None)[0]
        num_shards = len(self.dataset.shards)
        if runtime.is_main:
            note_position(f"{num_shards - len(todo)} shards of {directory}")
        with progress(f"score {directory.name}", num_shards, num_shards - len(todo), runtime.is_main) as advance:
            run = self._run_in_step if self.config.engine.zero_stage == 3 else self._run_freely
            return run(todo, advance)

    def _path(self, shard: ShardInfo) -> Path:
        return self.directory / f"{shard.stem}.parquet"

    def _is_done(self, shard: ShardInfo) -> bool:
        metadata = read_metadata(self._path(shard))
        return metadata is not None and metadata == self._metadata(shard)

    def _metadata(self, shard: ShardInfo) -> dict[str, str]:
        return {"fingerprint": self.digest, "shard": shard.sha256}

    def _batches(self, todo: list[ShardInfo]) -> "Iterator[_Batch]":
        """All batches of the shards that this rank draws, in order; made ahead of the model, in a thread."""
        while (index := self.draw()) < len(todo):
            work = _ShardWork(self, todo[index], index + 1)
            if not work.cut:
                work.write()
            for number, rows in enumerate(work.cut):
                yield _Batch(work, rows, self._collate(work, rows), number == 0, number == len(work.cut) - 1)

    def _run_freely(self, todo: list[ShardInfo], advance: Any) -> bool:
        """Without ZeRO-3 a forward concerns nobody else: each rank works at its own pace.

        An error leaves the loop at once; the launcher ends the other ranks. Returns whether a stop was asked for.
        """
        import torch

        with torch.inference_mode(), closing(ahead(self._batches(todo))) as batches:
            while batch := self._next(batches):
                self._keep(batch, self._forward(batch), advance)
                self.watchdog.beat("the next batch")
        with self.watchdog.waiting_for_others():
            return self.runtime.any_rank(self.runtime.stop.is_set)[0]

    def _run_in_step(self, todo: list[ShardInfo], advance: Any) -> bool:
        """Under ZeRO-3 every forward is collective: all ranks run equally many, with stand-ins where one has no work.

        An exception in one rank becomes a flag that all see before the next forward, so that none waits for it.
        """
        import torch

        batch: _Batch | None = None
        error: Exception | None = None
        log_probs, stand_in = np.empty(0), None
        with torch.inference_mode(), closing(ahead(self._batches(todo))) as batches:
            while True:
                self.watchdog.beat("the next batch")
                try:
                    if batch is not None:
                        self._keep(batch, log_probs, advance)
                    batch = self._next(batches)
                except Exception as caught:
                    error = caught
                some_batch, failed = self.runtime.any_rank(batch is not None, error is not None)
                if error is not None:
                    raise error
                if failed:
                    raise PeerFailed("another rank failed while scoring")
                if not some_batch:
                    break
                if batch is None:
                    stand_in = stand_in or self._stand_in()
                    self.module(*stand_in.to(self.runtime.device))
                else:
                    log_probs = self._forward(batch)
        return self.runtime.any_rank(self.runtime.stop.is_set)[0]

    def _next(self, batches: "Generator[_Batch]") -> "_Batch | None":
        """The next batch; None at the end, or before the next shard if a stop is asked for."""
        batch = next(batches, None)
        if batch is not None and batch.is_first and self.runtime.stop.is_set:
            self.draw(len(self.dataset.shards))  # nothing is left for the others either, who may not have been asked
            batches.close()
            return None
        return batch

    def _stand_in(self) -> Any:
        """A short batch, for a rank without work."""
        work = next(w for shard in self.dataset.shards if (w := _ShardWork(self, shard, 0)).rows)
        return self._collate(work, work.cut[-1][-1:])

    def _collate(self, work: "_ShardWork", rows: list[int]) -> Any:
        texts = [work.rows[index] for index in rows]
        return self.collator([text.input_ids for text in texts], [text.language for text in texts])

    def _forward(self, batch: "_Batch") -> np.ndarray:
        tokens, padded = batch.inputs.num_tokens
        self.num_tokens += tokens
        self.num_padded += padded
        log_probs: np.ndarray = self.module(*batch.inputs.to(self.runtime.device)).cpu().numpy()
        return log_probs

    def _keep(self, batch: "_Batch", log_probs: np.ndarray, advance: Any) -> None:
        """Put a batch's results in their places; with the last one the shard is written."""
        for index, row in zip(batch.rows, log_probs, strict=True):
            batch.work.results[index] = row
        if batch.is_last:
            batch.work.write()
            self.check_lead(time.monotonic() - batch.work.begin, "score: a shard (data.groups_per_shard)")
            self._count(batch.work.rows)
            advance(batch.work.number - self.num_done)  # the shared counter tells how far all ranks are
            self.num_done = batch.work.number

    def encode(self, shard: ShardInfo) -> list[EncodedText]:
        """All rows of a shard."""
        groups = read_shard(self.dataset, shard)
        return encode_groups(self.config.task, self.tokenizer, groups, self.dataset.languages)

    def _count(self, rows: list[EncodedText]) -> None:
        for row in rows:
            counts = self.statistics.setdefault(row.language, [0, 0, 0, 0])
            for index, value in enumerate((1, len(row.input_ids), row.num_unknown, int(row.is_cut))):
                counts[index] += value

    def _merge(self) -> None:
        """Assert that every (group, language) is there once, then complete the directory."""
        gathered = self.runtime.gather((self.statistics, self.num_tokens, self.num_padded))

        def finish() -> None:
            for shard in self.dataset.shards:
                scores = read_score_file(self._path(shard))
                pairs = list(zip(scores.keys, scores.languages, strict=True))
                found = {language: scores.languages.count(language) for language in shard.num_examples}
                if len(set(pairs)) != len(pairs) or found != shard.num_examples:
                    raise UserError(f"{self._path(shard)}: rows are missing or double; delete it and score again")
            files = [self._path(shard) for shard in self.dataset.shards]
            details = {"num_examples": sum(sum(s.num_examples.values()) for s in self.dataset.shards)}
            artifacts.write_manifest(self.directory, KIND, self.fingerprint, files, details)
            _report(gathered)

        self.runtime.main_first(finish)


@dataclass(frozen=True)
class _Batch:
    """A batch of a shard: which of its rows, as padded tensors; whether it is the shard's first or last."""

    work: "_ShardWork"
    rows: list[int]
    inputs: Any
    is_first: bool
    is_last: bool


class _ShardWork:
    """A shard being scored: its rows, how they are cut into batches, the results so far.

    ``number``: how many shards have been drawn, this one included.
    """

    def __init__(self, owner: _Pass, shard: ShardInfo, number: int) -> None:
        self.owner, self.shard, self.number = owner, shard, number
        self.begin = time.monotonic()
        self.rows = owner.encode(shard)
        self.cut = score_batches([len(row.input_ids) for row in self.rows], owner.tokens_per_batch)
        self.results: list[np.ndarray] = [np.empty(0)] * len(self.rows)

    def write(self) -> None:
        path = self.owner._path(self.shard)
        scores = Scores(
            [row.key for row in self.rows],
            [row.language for row in self.rows],
            self.results,
            [row.label for row in self.rows],
        )
        write_scores(path, scores, self.owner._metadata(self.shard))


def _report(gathered: list[tuple[dict[str, list[int]], int, int]]) -> None:
    """Warn of languages whose texts the vocabulary hardly covers, or whose prompts were cut."""
    import sys

    total: dict[str, list[int]] = {}
    for statistics, _, _ in gathered:
        for language, counts in statistics.items():
            total[language] = [a + b for a, b in zip(total.get(language, [0] * 4), counts, strict=True)]
    for language, (num_rows, num_tokens, num_unknown, num_cut) in sorted(total.items()):
        if num_unknown > 0.01 * num_tokens:
            print(f"warning: {language}: {num_unknown / num_tokens:.1%} of its tokens are unknown to the model",
                  file=sys.stderr)  # fmt: skip
        if num_cut > 0.01 * num_rows:
            print(f"warning: {language}: {num_cut} of {num_rows} prompts were cut at task.max_tokens", file=sys.stderr)
