"""Stage 1 of the method: which languages teach, and with what weight, from the scores of unlabeled groups alone.

The command *calibrate* is the same on the final model's own scores, for the biases that are added at inference.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alsace_dist import __version__
from alsace_dist.config import Config
from alsace_dist.errors import UserError
from alsace_dist.files import scores as score_files
from alsace_dist.files.manifest import begin
from alsace_dist.files.selection import KIND, Selection, write_selection
from alsace_dist.method import selection as method
from alsace_dist.method.block import Block, Presence
from alsace_dist.method.calibration import MarginalCalibration, calibrated
from alsace_dist.method.targets import MODES, num_pairs
from alsace_dist.ranks.group import Ranks
from alsace_dist.stages.base import Output, Stage, only

ON_RANKS = False
CALIBRATE = "calibrate"


def _scores(stage: Stage) -> Output:
    # Biases of the model that is evaluated: those of the model before would correct what distillation has mended.
    round_ = stage.config.rounds if stage.command == CALIBRATE else stage.round - 1
    return Output(stage.layout.scores(round_, "unlabeled"), score_files.KIND)


def inputs(stage: Stage) -> list[Output]:
    """The scores of the unlabeled groups."""
    return [_scores(stage)]


def outputs(stage: Stage) -> list[Output]:
    """The selection."""
    directory = stage.layout.calibration if stage.command == CALIBRATE else stage.layout.selection(stage.round)
    return [Output(directory, KIND)]


def fingerprint(stage: Stage, output: Output) -> dict[str, Any]:
    """Everything that the selection depends on."""
    config = stage.config
    return {
        "select": config.select.model_dump(mode="json"),
        "source_language": config.data.source_language,
        "seed": config.seed,
        "scores": _scores(stage).manifest().digest,
        "code": __version__,
    }


def run(stage: Stage, ranks: Ranks | None) -> None:
    """Write ``teachers.json``."""
    output = only(stage.outputs)
    wanted = stage.fingerprint(output)
    selection = make_selection(stage.config, _scores(stage).directory)
    begin(output.directory, KIND, wanted)
    write_selection(output.directory, selection, wanted)


def make_selection(config: Config, scores: Path) -> Selection:
    """Teachers, students, scores, weights (summing to 1) and calibration biases from a directory of scores.

    The files are read one after another, twice where they are calibrated: in memory are one of them, 8 bytes for each
    group, and sums. Labels are not read, even where the score files have some, but for ``score: accuracy``.
    Raises ``UserError`` if the rule names languages that the scores do not have, or labels are wanted and missing.
    """
    section, source_language = config.select, config.data.source_language
    biases = _biases(config, scores) if section.calibration == "marginal" else {}
    presence, means = Presence(), method.Means()
    yardstick = method.Yardstick(
        agreement=section.score == "agreement",
        soft=section.vote == "soft",
        leave_one_out=section.leave_one_out,
        source_language=source_language if section.vote == "source" else None,
    )
    num_unlabeled = 0
    for plain, golds in _blocks(config, scores):
        block = calibrated(plain, biases)
        presence.add(block)
        num_unlabeled += int((golds < 0).all(axis=1).sum())
        by_labels = section.score == "accuracy"
        means.add(block, method.right_values(block, golds) if by_labels else method.score_values(block, yardstick))
    if presence.num_groups == 0:
        raise UserError(f"{scores}: holds no scores; unlabeled groups are needed to select teachers")
    if section.score == "accuracy" and num_unlabeled:
        raise UserError(
            f"select.score: accuracy looks at labels, and {num_unlabeled} of {presence.num_groups} groups in "
            f"{scores} have none; take unlabeled out of data.withhold_labels, or choose another score"
        )
    found = means.means()
    if source_language not in found:
        raise UserError(
            f"{scores}: has no scores in the source language {source_language!r}; check data.source_language"
        )
    return _selection(config, found, presence, biases)


def _selection(config: Config, found: dict[str, float], presence: Presence, biases: dict[str, np.ndarray]) -> Selection:
    """What the rule makes of the languages' scores."""
    section = config.select
    assert section.rule is not None, "the config fills it in from the method"
    teachers = method.choose_teachers(section, found, config.data.source_language, config.seed)
    if section.weighting == "score":
        assert section.beta is not None
        weights = method.score_weights(found, teachers, section.beta)
    else:
        weights = dict.fromkeys(teachers, 1 / len(teachers))
    normalised = method.softmax_scores(found)
    unscored = sorted(set(presence.languages) - found.keys())
    kinds = presence.kinds(teachers)
    return Selection(
        rule=section.rule,
        num_groups=presence.num_groups,
        teachers=teachers,
        # Last the languages without a score: no group has them beside the source language, whose answers are the vote.
        students=[language for language in (*method.best_first(found), *unscored) if language not in teachers],
        scores=found,
        threshold=float(np.mean(list(normalised.values()))) if section.rule == "threshold" else None,
        normalised_scores=normalised,
        weights=weights,
        biases={language: bias.tolist() for language, bias in biases.items()},
        num_pairs={mode: num_pairs(kinds, weights, mode) for mode in MODES},
    )


def _biases(config: Config, scores: Path) -> dict[str, np.ndarray]:
    source_language = config.data.source_language
    calibration = MarginalCalibration(source_language if config.select.reference == "source" else None)
    for block, _ in _blocks(config, scores):
        calibration.add(block)
    try:
        return calibration.biases()
    except ValueError as error:
        raise UserError(f"select.calibration: {error}; set it to none") from None


def _blocks(config: Config, scores: Path) -> Iterator[tuple[Block, np.ndarray]]:
    """A shard at a time, the rows whose candidates correspond, and the right candidates of their groups, int [G, M]
    with -1 where a group has fewer.

    Raises ``UserError`` if the files or the numbers in them are no scores.
    """
    for rows in score_files.read_batches(scores, config.select.num_groups, config.task.num_candidates):
        if not np.isfinite(rows.values[np.repeat(~rows.apart, rows.sizes)]).all():
            raise UserError(
                f"{scores}: holds scores that are no numbers; the model has diverged: lower its learning rate"
            )
        together = np.flatnonzero(~rows.apart)
        together = together[np.lexsort((rows.language[together], rows.group[together]))]
        numbers, group = np.unique(rows.group[together], return_inverse=True)
        golds = np.full((len(numbers), rows.golds.shape[1]), -1, np.int64)
        golds[group] = rows.golds[together]  # the same of all rows of a group
        present, language = np.unique(rows.language[together], return_inverse=True)
        languages = tuple(rows.languages[number] for number in present)
        sizes = rows.sizes[together]  # rows that stand apart may have more candidates
        log_probs = rows.padded()[together, : sizes.max(initial=0)]
        yield Block(languages, len(numbers), group, language, log_probs, sizes), golds
