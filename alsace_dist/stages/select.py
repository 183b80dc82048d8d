"""Stage 1 of the method: which languages teach, and with what weight, from the scores of unlabeled groups alone.

The command *calibrate* is the same on the final model's own scores, for the biases that are added at inference.
"""

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
from alsace_dist.method.calibration import calibrate, marginal_biases
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

    Labels are not read, even where the score files have some, but for ``score: accuracy``.
    Raises ``UserError`` if the rule names languages that the scores do not have, or labels are wanted and missing.
    """
    section, source_language = config.select, config.data.source_language
    rows = score_files.read_scores(scores, section.num_groups, config.task.num_candidates)
    groups = list(rows.groups().values())
    if not groups:
        raise UserError(f"{scores}: holds no scores; unlabeled groups are needed to select teachers")
    if not all(np.isfinite(row).all() for group in groups for row in group.values()):
        raise UserError(f"{scores}: holds scores that are no numbers; the model has diverged: lower its learning rate")
    biases: dict[str, np.ndarray] = {}
    if section.calibration == "marginal":
        try:
            biases = marginal_biases(groups, source_language if section.reference == "source" else None)
        except ValueError as error:
            raise UserError(f"select.calibration: {error}; set it to none") from None
        groups = [calibrate(group, biases) for group in groups]
    if section.score == "accuracy":
        found = method.accuracies(groups, _labels(rows, scores))
    else:
        found = method.language_scores(
            groups,
            agreement=section.score == "agreement",
            soft=section.vote == "soft",
            leave_one_out=section.leave_one_out,
            source_language=source_language if section.vote == "source" else None,
        )
    if source_language not in found:
        raise UserError(
            f"{scores}: has no scores in the source language {source_language!r}; check data.source_language"
        )
    assert section.rule is not None, "the config fills it in from the method"
    teachers = method.choose_teachers(section, found, source_language, config.seed)
    if section.weighting == "score":
        assert section.beta is not None
        weights = method.score_weights(found, teachers, section.beta)
    else:
        weights = dict.fromkeys(teachers, 1 / len(teachers))
    normalised = method.softmax_scores(found)
    unscored = sorted({language for group in groups for language in group} - found.keys())
    return Selection(
        rule=section.rule,
        num_groups=len(groups),
        teachers=teachers,
        # Last the languages without a score: no group has them beside the source language, whose answers are the vote.
        students=[language for language in (*method.best_first(found), *unscored) if language not in teachers],
        scores=found,
        threshold=float(np.mean(list(normalised.values()))) if section.rule == "threshold" else None,
        normalised_scores=normalised,
        weights=weights,
        biases={language: bias.tolist() for language, bias in biases.items()},
        num_pairs={mode: num_pairs(groups, weights, mode) for mode in MODES},
    )


def _labels(rows: score_files.Scores, directory: Path) -> list[tuple[int, ...]]:
    """The right candidates of each group, where candidates correspond. Raises ``UserError`` if one has no label."""
    labels = list(rows.golds().values())
    if lacking := labels.count(()):
        raise UserError(
            f"select.score: accuracy looks at labels, and {lacking} of {len(labels)} groups in "
            f"{directory} have none; take unlabeled out of data.withhold_labels, or choose another score"
        )
    return labels
