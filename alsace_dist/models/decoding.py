"""Candidates that a decoder scores after the prompt, whatever the family: their form, their batches, their scores."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alsace_dist.data.rows import Answers, Candidates, EncodedRow
from alsace_dist.errors import UserError
from alsace_dist.models.batches import IGNORED, MOST_KEPT, CandidateScore, Inputs, pad_prompts, stack
from alsace_dist.models.family import DEFAULTS, Family, Options
from alsace_dist.models.weights import SOUND

# --- the form of the candidates ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CandidateForm:
    """How candidates are scored.

    ``single_token``: every candidate is one token long, scored at one position of the decoder; then the rows of
    ``vocabulary`` (sorted ids of all candidates) are all that is needed of the output head. Otherwise candidates are
    sequences that end with the end-of-sequence token, so that none wins for being the beginning of another, and the
    head is kept whole. ``decoder_prefix``: what the decoder starts with, the start token first. ``longest``: tokens to
    which shorter sequences are filled up, so that shapes, and with them last bits, do not vary from batch to batch.
    """

    single_token: bool
    vocabulary: tuple[int, ...]
    decoder_prefix: tuple[int, ...]
    pad_id: int
    longest: int = 1

    @classmethod
    def of(
        cls, candidates: Iterable[Candidates], decoder_prefix: tuple[int, ...], single_token: bool, pad_id: int
    ) -> "CandidateForm":
        """The form of fixed candidates, which are all there will be."""
        rows = [row for one in candidates for row in one.tokens]
        vocabulary = sorted({token for row in rows for token in row}) if single_token else ()
        longest = max((len(row) for row in rows), default=1)
        return cls(single_token, tuple(vocabulary), decoder_prefix, pad_id, longest)

    @property
    def head_rows(self) -> list[int] | None:
        """Rows of the output head that are kept; None: all."""
        return list(self.vocabulary) if self.single_token else None


class Collator:
    """Batches of encoded rows; what belongs to equal candidates is made once."""

    def __init__(self, form: CandidateForm) -> None:
        self._form = form
        self._row_of = {token: row for row, token in enumerate(form.vocabulary)}
        self._made: dict[Candidates, tuple[Tensor, Tensor]] = {}

    def __call__(self, rows: Sequence[EncodedRow]) -> Inputs:
        """Prompts padded to the longest; decoder inputs and predicted tokens as a scorer takes them."""
        ids, mask = pad_prompts([row.input_ids for row in rows], self._form.pad_id)
        made = zip(*(self._candidates(row.candidates) for row in rows), strict=True)
        decoder_inputs, answer_ids = (
            stack(part, fill) for part, fill in zip(made, (self._form.pad_id, IGNORED), strict=True)
        )
        further = [decoder_inputs, answer_ids]
        if not self._form.single_token:
            # Counted here: on an accelerator the host would have to wait for their number.
            further.append((answer_ids.flatten() != IGNORED).nonzero().flatten())
        return Inputs(ids, mask, tuple(further), answer_ids.shape[1])

    def _candidates(self, candidates: Candidates) -> tuple[Tensor, Tensor]:
        if candidates not in self._made:
            if len(self._made) >= MOST_KEPT:  # candidates of each row's own, which do not come again
                self._made.clear()
            prefix = torch.tensor(self._form.decoder_prefix)
            if self._form.single_token:
                rows = torch.tensor([self._row_of[row[0]] for row in candidates.tokens])
                self._made[candidates] = (prefix, rows)
            else:
                self._made[candidates] = self._sequences(candidates)
        return self._made[candidates]

    def _sequences(self, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """Decoder inputs and predicted tokens [K, prefix + longest - 1]: position i predicts what comes after it."""
        prefix = list(self._form.decoder_prefix)
        longest = max(self._form.longest, *(len(row) for row in candidates.tokens))
        inputs = torch.full((len(candidates), len(prefix) + longest - 1), self._form.pad_id)
        targets = torch.full_like(inputs, IGNORED)
        for index, row in enumerate(candidates.tokens):
            inputs[index, : len(prefix) + len(row) - 1] = torch.tensor(prefix + list(row[:-1]))
            targets[index, len(prefix) - 1 : len(prefix) - 1 + len(row)] = torch.tensor(row)
        return inputs, targets


# --- scores --------------------------------------------------------------------------------------------------------


def score_single_tokens(score: CandidateScore, logits: Tensor, answer_ids: Tensor) -> Tensor:
    """float32 logits [batch, num_rows] of the kept rows of a head -> log-probabilities [batch, K].

    ``answer_ids``: [batch, K] rows of the head, -100 for a candidate that a row lacks. The softmax over K logits is the
    full softmax renormalised over the candidates: exact without full logits.
    """
    lacks = answer_ids == IGNORED
    return score.log_probs(logits.gather(1, answer_ids.clamp(min=0)), (~lacks).long())


def score_sequences(
    score: CandidateScore,
    hidden: Tensor,
    answer_ids: Tensor,
    counted: Tensor,
    log_probs: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Hidden states [batch * K, target, width] of a decoder -> float32 log-probabilities [batch, K].

    ``answer_ids``: [batch, K, target], the token that each position predicts, -100 for none; ``counted``: the positions
    that predict one, in batch * K * target. ``log_probs``: of one token at each position, float32, from hidden states
    [positions, width] and ids [positions].
    """
    tokens = answer_ids.flatten().index_select(0, counted)
    token_log_probs = log_probs(hidden.flatten(0, 1).index_select(0, counted), tokens)
    # index_add would not do: its order of summation, and so the last bits, vary on GPUs.
    by_position = torch.zeros(answer_ids.numel(), device=hidden.device).index_copy(0, counted, token_log_probs)
    return score.log_probs(by_position.view(answer_ids.shape).sum(dim=-1), (answer_ids != IGNORED).sum(dim=-1))


# --- the family ----------------------------------------------------------------------------------------------------


class DecoderFamily(Family):
    """A family whose decoder scores the candidates. ``form``: how it does."""

    form: CandidateForm

    def __init__(self, directory: Path, answers: Answers, options: Options = DEFAULTS) -> None:
        super().__init__(directory, answers, options)
        answers = self.answers
        key, start = self.start_token()
        if not isinstance(start, int) or not 0 <= start < self.config.vocab_size:
            raise UserError(f"{directory / 'config.json'}: {key} is {start!r}, no id of its vocabulary; {SOUND}")
        # Decide it over all languages of the task: finetuning encodes the source language only, but must train the same
        # form of score that the later scoring pass uses.
        self.is_single_token = bool(answers.fixed) and all(len(self.token_ids(text)) == 1 for text in answers.every)
        fixed = [self.candidates(texts, language) for language, texts in answers.fixed.items()]
        prefix = self.token_ids(answers.decoder_prefix) if answers.decoder_prefix else ()
        if self.tokenizer.unk_token_id in prefix:
            raise UserError(f"task.decoder_prefix: {answers.decoder_prefix!r} holds unknown tokens; choose another")
        self.form = CandidateForm.of(fixed, (start, *prefix), self.is_single_token, self.tokenizer.pad_token_id)
        self._collator = Collator(self.form)

    @abstractmethod
    def start_token(self) -> tuple[str, Any]:
        """What the decoder starts with: the key of config.json, and what stands there."""

    @property
    def head_rows(self) -> list[int] | None:
        """The rows of the output head that are kept, as vocabulary ids; None: all."""
        return self.form.head_rows

    @property
    def num_head_rows(self) -> int | None:
        return None if self.head_rows is None else len(self.head_rows)

    @property
    def answers_in_words(self) -> str:
        return "single tokens" if self.is_single_token else "several tokens each, which take the whole output head"

    def encode_candidates(self, texts: tuple[str, ...]) -> Candidates:
        end = () if self.is_single_token else (self.tokenizer.eos_token_id,)
        return Candidates(tuple(self.token_ids(text) + end for text in texts))

    def collate(self, rows: Sequence[EncodedRow]) -> Inputs:
        return self._collator(self.with_context_free(rows))
