"""Stage evaluate: compare the scores of two models on the same labeled test groups, language by language.

Arithmetic on score files only, so that it runs anywhere within seconds. Writes ``metrics.json``, the stable interface
that ``docs/formats.md`` describes, and the manifest last.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alsace_dist import __version__
from alsace_dist.config import Config
from alsace_dist.errors import UserError
from alsace_dist.files import selection as selections
from alsace_dist.files.evaluation import (
    ALL,
    KIND,
    AverageChange,
    Evaluation,
    GapChange,
    LanguageChange,
    PrecisionChange,
    Round,
    SpreadChange,
    WorstChange,
    WorstLanguage,
    write_evaluation,
)
from alsace_dist.files.manifest import begin, load_manifest, verify_files
from alsace_dist.files.scores import KIND as SCORES
from alsace_dist.files.scores import Scores, read_scores
from alsace_dist.files.selection import Selection, read_selection
from alsace_dist.files.shards import golds
from alsace_dist.ranks.group import Ranks
from alsace_dist.reporting.statistics import holm, mcnemar_exact, paired_bootstrap, paired_gap, summary
from alsace_dist.stages.base import Output, Stage, only

ON_RANKS = False


def _scores(stage: Stage, round_: int) -> Output:
    return Output(stage.layout.scores(round_, "test"), SCORES)


def _teachers(stage: Stage) -> list[Output]:
    """The selections of all rounds."""
    return [Output(stage.layout.selection(round_), selections.KIND) for round_ in range(1, stage.config.rounds + 1)]


def _biases(stage: Stage) -> Output | None:
    return Output(stage.layout.calibration, selections.KIND) if stage.config.evaluate.calibrate else None


def inputs(stage: Stage) -> list[Output]:
    """The test scores before and after, the selection, and the biases if there are any."""
    scores = [_scores(stage, 0), _scores(stage, stage.config.rounds)]
    return [*scores, *_teachers(stage), *(output for output in [_biases(stage)] if output)]


def outputs(stage: Stage) -> list[Output]:
    """The evaluation."""
    return [Output(stage.layout.evaluation, KIND)]


def fingerprint(stage: Stage, output: Output) -> dict[str, Any]:
    """Everything that the evaluation depends on."""
    config, teachers, biases = stage.config, _teachers(stage), _biases(stage)
    return {
        "evaluate": config.evaluate.model_dump(
            mode="json", exclude={"alpha", "margin"}
        ),  # these change the report's wording only
        "source_language": config.data.source_language,
        "seed": config.seed,
        "before": _scores(stage, 0).manifest().digest,
        "after": _scores(stage, config.rounds).manifest().digest,
        "teachers": [output.manifest().digest for output in teachers],
        "biases": biases.manifest().digest if biases else None,
        "code": __version__,
    }


def run(stage: Stage, ranks: Ranks | None) -> None:
    """Write ``metrics.json``."""
    output = only(stage.outputs)
    wanted = stage.fingerprint(output)
    teachers, biases = _teachers(stage), _biases(stage)
    evaluation, num_groups = compare(
        stage.config,
        _scores(stage, 0).directory,
        _scores(stage, stage.config.rounds).directory,
        [read_selection(one.directory) for one in teachers],
        read_selection(biases.directory) if biases else None,
    )
    begin(output.directory, KIND, wanted)
    write_evaluation(output.directory, evaluation, wanted, num_groups)


def compare(
    config: Config, before: Path, after: Path, selected: Sequence[Selection], calibration: Selection | None
) -> tuple[Evaluation, int]:
    """Compare two score directories on the same labeled test groups; the evaluation, and the number of groups.

    ``selected``: what the model after was distilled with, round by round. ``calibration``: with
    ``evaluate.calibrate``, a selection on the unlabeled scores of the model after, whose biases are added to its
    log-probabilities. The gap is None where it is not defined: the source language is missing, or alone.

    Raises ``UserError`` if an input is incomplete or damaged, or if the two do not hold the same labeled examples.
    """
    biases = bias_rows(config, calibration)
    size = config.task.num_candidates
    pairs = pair(outcomes_of(before, None, size), outcomes_of(after, biases, size), before, after)
    return evaluation_of(config, pairs, selected), len(pairs.present)


def bias_rows(config: Config, calibration: Selection | None) -> dict[str, np.ndarray] | None:
    """Language -> bias per candidate, None if the answers are taken as they are. Raises ``UserError`` if they lack."""
    if not config.evaluate.calibrate:
        return None
    if calibration is None:
        raise UserError(
            "evaluate.calibrate: needs the biases of stage calibrate; run it, or set evaluate.calibrate: false"
        )
    if not calibration.biases:
        raise UserError(
            "evaluate.calibrate: teachers.json holds no biases; "
            "set select.calibration: marginal or evaluate.calibrate: false"
        )
    return calibration.bias_rows()


class Outcome(NamedTuple):
    """What became of one row of a score directory. ``label``: the right candidates, ``num_hits``: how many of these are
    among as many best answers; ``category``: as in ``ParallelGroup``."""

    num_candidates: int
    label: tuple[int, ...]
    right: bool
    num_hits: int
    category: str


Outcomes = dict[tuple[str, str], Outcome]  # (key, language) -> outcome, in row order


def outcomes_of(directory: Path, biases: dict[str, np.ndarray] | None, num_candidates: int | None) -> Outcomes:
    """Answers of a model against the labels: the best candidates first, ties to the lowest index."""
    verify_files(directory, load_manifest(directory, SCORES))
    scores: Scores = read_scores(directory, num_candidates=num_candidates)
    found: Outcomes = {}
    categories = scores.categories or [""] * len(scores.keys)
    rows = zip(scores.keys, scores.languages, scores.log_probs, scores.labels, categories, strict=True)
    for key, language, log_probs, label, category in rows:
        place = f"{directory}: group {key!r}, language {language!r}"
        right = golds(label)
        if not right:
            raise UserError(f"{place}: has no label; evaluate on a split with labels, such as test")
        if not all(0 <= index < len(log_probs) for index in right):
            raise UserError(f"{place}: label {label} is not one of its {len(log_probs)} candidates; score again")
        if not np.isfinite(log_probs).all():
            raise UserError(f"{place}: scores are not numbers (NaN, inf); the model has diverged, train it again")
        if (key, language) in found:
            raise UserError(f"{place}: is there twice; delete the directory and run `alsace score` again")
        if biases is not None:
            log_probs = log_probs + _bias_of(biases, language, len(log_probs), place)
        best = np.argsort(-log_probs, kind="stable")[: len(right)].tolist()
        num_hits = len(set(best) & set(right))
        found[key, language] = Outcome(len(log_probs), right, best[0] in right, num_hits, category)
    if not found:
        raise UserError(f"{directory}: holds no rows; evaluate on a split that has groups")
    return found


def _bias_of(biases: dict[str, np.ndarray], language: str, num_candidates: int, place: str) -> np.ndarray:
    if language not in biases:
        raise UserError(f"{place}: teachers.json has no biases for this language; set evaluate.calibrate: false")
    if len(biases[language]) != num_candidates:
        raise UserError(
            f"{place}: {num_candidates} candidates but {len(biases[language])} biases in teachers.json; "
            "set evaluate.calibrate: false"
        )
    return biases[language]


def _shown(label: tuple[int, ...]) -> str:
    return " and ".join(map(str, label))


@dataclass(frozen=True)
class Pairs:
    """Both models' outcomes on the same examples: bool [N groups, T languages] each, right only where present.

    ``precision``: as in ``Evaluation``.
    """

    languages: list[str]
    present: np.ndarray
    before: np.ndarray
    after: np.ndarray
    precision: dict[str, dict[str, PrecisionChange]] = field(default_factory=dict)


def pair(before: Outcomes, after: Outcomes, before_dir: Path, after_dir: Path) -> Pairs:
    """Join the outcomes on (key, language). Raises ``UserError`` that names the first example that does not match."""
    for one, other, has, lacks in ((before, after, before_dir, after_dir), (after, before, after_dir, before_dir)):
        missing = [place for place in one if place not in other]
        if missing:
            key, language = missing[0]
            raise UserError(
                f"{lacks}: lacks {len(missing)} of the examples in {has}, the first is group {key!r}, "
                f"language {language!r}; score both models on the same test groups"
            )
    for (key, language), outcome in before.items():
        if after[key, language].num_candidates != outcome.num_candidates:
            raise UserError(
                f"{after_dir}: group {key!r}, language {language!r}: {after[key, language].num_candidates} candidates "
                f"where {before_dir} has {outcome.num_candidates}; score both models on the same test groups"
            )
        if after[key, language].label != outcome.label:
            raise UserError(
                f"{after_dir}: group {key!r}, language {language!r}: label {_shown(after[key, language].label)} where "
                f"{before_dir} has {_shown(outcome.label)}; score both models on the same test groups"
            )
    rows = {key: row for row, key in enumerate(dict.fromkeys(key for key, _ in before))}
    languages = sorted({language for _, language in before})
    columns = {language: column for column, language in enumerate(languages)}
    present, right_before, right_after = (np.zeros((len(rows), len(languages)), dtype=bool) for _ in range(3))
    for key, language in before:
        cell = rows[key], columns[language]
        present[cell] = True
        right_before[cell] = before[key, language].right
        right_after[cell] = after[key, language].right
    return Pairs(languages, present, right_before, right_after, precision(before, after))


def precision(before: Outcomes, after: Outcomes) -> dict[str, dict[str, PrecisionChange]]:
    """Language -> category -> share of the right candidates that are among as many best answers, and over all of them.

    So GeoMLAMA is measured (Yin et al. 2022, section 4): one sum over one count. Empty where every row has one right
    candidate, and no category.
    """
    if not any(len(one.label) > 1 or one.category for one in before.values()):
        return {}
    sums: dict[tuple[str, str], list[int]] = {}
    for (key, language), one in before.items():
        for category in {one.category, ""}:
            found = sums.setdefault((language, category), [0, 0, 0])
            counts = (one.num_hits, after[key, language].num_hits, len(one.label))
            found[:] = [total + count for total, count in zip(found, counts, strict=True)]
    changes: dict[str, dict[str, PrecisionChange]] = {}
    for (language, category), (old, new, number) in sorted(sums.items()):
        change = PrecisionChange(before=old / number, after=new / number, num_right=number)
        changes.setdefault(language, {})[category or ALL] = change
    return changes


def evaluation_of(config: Config, pairs: Pairs, selected: Sequence[Selection] = ()) -> Evaluation:
    """The evaluation of paired outcomes. An accuracy is one sum over one count; the average is macro by definition."""
    source_language = config.data.source_language
    source_column = pairs.languages.index(source_language) if source_language in pairs.languages else None
    first = selected[0] if selected else None
    num_examples = pairs.present.sum(axis=0)
    accuracy = {
        when: dict(zip(pairs.languages, (right.sum(axis=0) / num_examples).tolist(), strict=True))
        for when, right in (("before", pairs.before), ("after", pairs.after))
    }
    p_values = {
        language: mcnemar_exact(before[present], after[present])
        for language, before, after, present in zip(
            pairs.languages, pairs.before.T, pairs.after.T, pairs.present.T, strict=True
        )
    }
    adjusted = holm(p_values)
    intervals = paired_bootstrap(
        pairs.before,
        pairs.after,
        pairs.present,
        source_column,
        config.evaluate.num_resamples,
        np.random.default_rng(config.seed),
    )
    old, new = summary(accuracy["before"], source_language), summary(accuracy["after"], source_language)
    return Evaluation(
        source_language=source_language,
        teachers=first.teachers if first else [],
        students=first.students if first else [],
        languages={
            language: LanguageChange(
                before=accuracy["before"][language],
                after=accuracy["after"][language],
                ci95=intervals.languages[column],
                num_examples=int(num_examples[column]),
                num_gained=int((pairs.after & ~pairs.before)[:, column].sum()),
                num_lost=int((pairs.before & ~pairs.after)[:, column].sum()),
                p_value=adjusted[language],
                p_value_raw=p_values[language],
                score=first.scores.get(language) if first else None,
            )
            for column, language in enumerate(pairs.languages)
        },
        precision=pairs.precision,
        average=AverageChange(before=old.average, after=new.average, ci95=intervals.average),
        gap=GapChange(before=old.gap, after=new.gap, ci95=intervals.gap),
        paired_gap=GapChange(
            before=paired_gap(pairs.before, pairs.present, source_column),
            after=paired_gap(pairs.after, pairs.present, source_column),
            ci95=intervals.paired_gap,
        ),
        rounds=[Round(teachers=one.teachers, scores=one.scores) for one in selected],
        std=SpreadChange(before=old.std, after=new.std),
        worst=WorstChange(
            before=WorstLanguage(language=old.worst_language, accuracy=old.worst_accuracy),
            after=WorstLanguage(language=new.worst_language, accuracy=new.worst_accuracy),
        ),
        uses_labels=config.select.score == "accuracy" or config.distill.targets == "labels",
    )
