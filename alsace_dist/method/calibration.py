"""Marginal calibration: in the same groups every language has the same distribution of true answers.

A language whose mean prediction differs from that of the reference is biased, and the bias can be taken away without a
label. This is the project's addition to the paper; docs/method.md tells what it mends.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

import numpy as np

from alsace_dist.errors import UserError
from alsace_dist.method import GroupScores
from alsace_dist.method.block import Block, block_of

ROWS_AT_ONCE = 1 << 14
BYTES_IN_MEMORY = 1 << 20  # of a language's rows, before they go to a file


def calibrate(group: GroupScores, biases: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Log-probabilities with each language's bias per candidate added, normalised again."""
    return {
        language: normalised(row + biases[language]) if language in biases else row for language, row in group.items()
    }


def normalised(logits: np.ndarray) -> np.ndarray:
    """Logits [..., K] as log-probabilities."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def calibrated(block: Block, biases: Mapping[str, np.ndarray]) -> Block:
    """The same for all groups of a block."""
    has_bias = np.array([name in biases for name in block.languages], bool)[block.language]
    if not has_bias.any():
        return block
    none = np.zeros(block.log_probs.shape[1])
    rows = np.stack([biases.get(name, none) for name in block.languages])[block.language]
    return block.with_log_probs(
        np.where(has_bias[:, None], normalised(block.log_probs + rows), block.log_probs.astype(np.float64))
    )


class MarginalCalibration:
    """Per language, the bias per candidate under which its mean prediction equals the reference's; a block at a time.

    In parallel groups every language has the same distribution of true answers, whatever it is; a language whose mean
    prediction differs is biased. ``reference``: the language whose mean prediction is the aim; None: the mean over all
    languages. A language is compared with the reference on the groups that both have.

    Each iteration needs all rows, so they are kept outside of memory: 4 bytes for each row and candidate in temporary
    files (of ``$TMPDIR``), which are gone with this object.
    """

    def __init__(self, reference: str | None) -> None:
        self._reference = reference
        self._sizes: set[int] = set()
        self._kept: dict[str, _Kept] = {}

    def add(self, block: Block) -> None:
        """Add the rows of a block."""
        self._sizes |= set(np.unique(block.sizes).tolist())
        if len(self._sizes) > 1:
            return
        probabilities = block.probabilities()
        aims, has_aim = self._aims(block, probabilities)
        for number, language in enumerate(block.languages):
            rows = np.flatnonzero(block.language == number)
            if language not in self._kept:
                self._kept[language] = _Kept()
            kept = self._kept[language]
            if language != self._reference:
                rows = rows[has_aim[block.group[rows]]]
                kept.add(block.log_probs[rows], aims[block.group[rows]])

    def _aims(self, block: Block, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The prediction that the rows of a group are compared with, [G, K], and whether there is one, [G]."""
        if self._reference is None:
            numbers = block.present().sum(axis=1)
            return block.dense(probabilities).sum(axis=1) / np.maximum(1, numbers)[:, None], numbers > 0
        aims, has_aim = np.zeros((block.num_groups, probabilities.shape[1])), np.zeros(block.num_groups, bool)
        rows = np.array([name == self._reference for name in block.languages], bool)[block.language]
        aims[block.group[rows]], has_aim[block.group[rows]] = probabilities[rows], True
        return aims, has_aim

    def biases(self, num_iterations: int = 500, tolerance: float = 1e-6) -> dict[str, np.ndarray]:
        """Biases with mean 0, of the languages that have been beside the reference; to be asked for once.

        Raises ``ValueError`` if the groups do not all have the same number of candidates (then there is no common
        bias).
        """
        if len(self._sizes) > 1:
            sizes = sorted(self._sizes)
            raise ValueError(f"marginal calibration needs the same candidates everywhere, found {sizes} of them")
        biases: dict[str, np.ndarray] = {}
        for language, kept in sorted(self._kept.items()):
            if language == self._reference:
                biases[language] = np.zeros(max(self._sizes))
            elif kept.num_rows:
                biases[language] = _match_marginal(kept, num_iterations, tolerance)
            kept.close()
        return biases


def marginal_biases(groups: Iterable[GroupScores], reference: str | None) -> dict[str, np.ndarray]:
    """The biases that ``MarginalCalibration`` finds for these groups."""
    calibration = MarginalCalibration(reference)
    calibration.add(block_of(groups))
    return calibration.biases()


class _Kept:
    """Rows of log-probabilities [n, K] outside of memory, and the sum of what they are compared with, [K]."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.aims = np.zeros(0)
        self._file = tempfile.SpooledTemporaryFile(BYTES_IN_MEMORY)  # noqa: SIM115 (it lives as long as this object)

    def add(self, rows: np.ndarray, aims: np.ndarray) -> None:
        self.num_rows += len(rows)
        self.aims = _sum_of_rows(aims, self.aims)
        self._kind = rows.dtype
        try:
            self._file.write(rows.tobytes())
            self._file.flush()
        except OSError as error:  # names no file, for this one has no name
            with suppress(OSError):
                self.close()
            raise UserError(
                f"{tempfile.gettempdir()}: {error.strerror}; the calibration keeps its scores there, 4 bytes for each "
                "row and candidate: name a directory with more room in $TMPDIR"
            ) from None

    def close(self) -> None:
        self._file.close()

    def blocks(self) -> Iterator[np.ndarray]:
        """The rows in their order, some thousands at a time: what is computed with them stays in a core's cache."""
        num_candidates = len(self.aims)
        self._file.seek(0)
        while data := self._file.read(ROWS_AT_ONCE * num_candidates * self._kind.itemsize):
            yield np.frombuffer(data, self._kind).reshape(-1, num_candidates).astype(np.float64)


def _sum_of_rows(rows: np.ndarray, start: np.ndarray) -> np.ndarray:
    """``start`` (nothing, or [K]) and the rows [n, K], added one after another: so sums do not depend on where rows are
    divided."""
    found: np.ndarray = np.add.reduce(np.concatenate([start.reshape(-1, rows.shape[1]), rows]), axis=0)
    return found


def _match_marginal(kept: _Kept, num_iterations: int, tolerance: float) -> np.ndarray:
    """Bias b with mean_i softmax(log_probs_i + b) = aim, by iterative scaling (Deming and Stephan 1940)."""
    aim = np.maximum(kept.aims / kept.num_rows, 1e-9)
    bias = np.zeros(aim.shape)
    for _ in range(num_iterations):
        total = np.zeros(0)
        for log_probs in kept.blocks():
            total = _sum_of_rows(np.exp(normalised(log_probs + bias)), total)
        marginal = total / kept.num_rows
        if np.abs(marginal - aim).max() < tolerance:
            break
        bias += np.log(aim) - np.log(np.maximum(marginal, 1e-12))
    return bias - bias.mean()
