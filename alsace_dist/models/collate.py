"""Token ids of examples as padded tensors, in the form that the models take."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alsace_dist.tasks.base import Answers

IGNORED = -100


@dataclass(frozen=True)
class Inputs:
    """A batch for ``CandidateScorer`` or ``LanguageModel``; the fields are the arguments of their ``forward``."""

    input_ids: Tensor
    attention_mask: Tensor
    decoder_input_ids: Tensor
    answer_ids: Tensor

    def to(self, device: torch.device) -> tuple[Tensor, ...]:
        """The arguments, on a device."""
        return to_device(device, self.input_ids, self.attention_mask, self.decoder_input_ids, self.answer_ids)

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Encoder tokens: those that count, and all with padding."""
        return int(self.attention_mask.sum()), self.attention_mask.numel()


def to_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors on a device; the copy to an accelerator does not wait for what it computes."""
    if device.type == "cpu":
        return tensors
    return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as one int64 tensor [rows, longest], filled up at the end."""
    # In numpy: a torch tensor per row takes seven times as long.
    padded = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)


class AnswerCollator:
    """Batches of prompts with the candidate answers of their languages."""

    def __init__(self, answers: Answers, pad_id: int) -> None:
        self._pad_id = pad_id
        self._prefix = torch.tensor(answers.decoder_prefix, dtype=torch.long)
        row_of = {token: row for row, token in enumerate(answers.vocabulary)}
        self._decoder_inputs: dict[str, Tensor] = {}
        self._answer_ids: dict[str, Tensor] = {}
        longest = max(len(row) for rows in answers.tokens.values() for row in rows)
        for language, rows in answers.tokens.items():
            if answers.single_token:
                self._decoder_inputs[language] = self._prefix
                self._answer_ids[language] = torch.tensor([row_of[row[0]] for row in rows])
            else:
                self._decoder_inputs[language], self._answer_ids[language] = self._sequences(rows, longest)

    def _sequences(self, rows: tuple[tuple[int, ...], ...], longest: int) -> tuple[Tensor, Tensor]:
        """Decoder inputs and predicted tokens [K, prefix + longest - 1]: position i predicts what comes after it."""
        prefix = self._prefix.tolist()
        inputs = torch.full((len(rows), len(prefix) + longest - 1), self._pad_id, dtype=torch.long)
        targets = torch.full_like(inputs, IGNORED)
        for index, row in enumerate(rows):
            inputs[index, : len(prefix) + len(row) - 1] = torch.tensor(prefix + list(row[:-1]))
            targets[index, len(prefix) - 1 : len(prefix) - 1 + len(row)] = torch.tensor(row)
        return inputs, targets

    def __call__(self, input_ids: Sequence[Sequence[int]], languages: Sequence[str]) -> Inputs:
        """Pad a batch of prompts."""
        ids = pad(input_ids, self._pad_id)
        lengths = torch.tensor([len(row) for row in input_ids])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        decoder_inputs = torch.stack([self._decoder_inputs[language] for language in languages])
        return Inputs(ids, mask, decoder_inputs, torch.stack([self._answer_ids[language] for language in languages]))
