"""Stage evaluate: compare the scores of two models on the same labeled test groups, language by language.

Arithmetic on score files only, so that it runs anywhere within seconds. Writes ``metrics.json``, the stable interface
that ``docs/formats.md`` describes, and the manifest last.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from alsace_dist import __version__
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import (
    MANIFEST,
    Manifest,
    begin,
    is_complete,
    load_manifest,
    read_json,
    verify_files,
    write_json,
    write_manifest,
)
from alsace_dist.files.scores import KIND as SCORES_KIND
from alsace_dist.files.scores import Scores, read_scores
from alsace_dist.reporting.statistics import holm, mcnemar_exact, paired_bootstrap, summary

if TYPE_CHECKING:
    from alsace_dist.config import Config  # pydantic takes longer to load than all the rest

KIND = "evaluation"
METRICS = "metrics.json"
TEACHERS = "teachers.json"
NO_SELECTION: dict[str, Any] = {"teachers": [], "students": [], "scores": {}, "biases": {}}


def fingerprint(
    config: "Config", before: Path, after: Path, teachers: Path | None, bias_dir: Path | None = None
) -> dict[str, Any]:
    """Everything the metrics depend on. ``teachers``, ``bias_dir``: directories of stage select, None without one.

    Raises ``UserError`` if one of the directories is not complete.
    """
    return {
        "evaluate": config.evaluate.model_dump(mode="json", exclude={"alpha"}),  # only the report's wording
        "source_language": config.data.source_language,
        "seed": config.seed,
        "before": load_manifest(before, SCORES_KIND).digest,
        "after": load_manifest(after, SCORES_KIND).digest,
        "teachers": None if teachers is None else _select_manifest(teachers).digest,
        "biases": None if bias_dir is None else _select_manifest(bias_dir).digest,
        "code": __version__,
    }


def evaluate(
    config: "Config",
    before_dir: Path,
    after_dir: Path,
    select_dir: Path | None,
    out_dir: Path,
    bias_dir: Path | None = None,
) -> dict[str, Any]:
    """Compare two score directories on the same labeled test groups; write and return the metrics.

    ``select_dir``: the selection that the model after was distilled with, None without one. With
    ``evaluate.calibrate``, the biases in ``bias_dir/teachers.json`` (a selection on the unlabeled scores of the model
    after) are added to its log-probabilities. The metrics (accuracies in [0, 1]; ``ci95`` is the interval of
    after - before; ``p_value`` is adjusted for the number of languages)::

        {"source_language", "teachers": [...], "students": [...],
         "languages": {lang: {"before", "after", "num_examples", "p_value", "p_value_raw", "score"}},
         "average": {"before", "after", "ci95"}, "gap": {"before", "after", "ci95"}, "std": {"before", "after"},
         "worst": {"before": {"language", "accuracy"}, "after": {...}}}

    The gap's values are null where it is not defined: the source language is missing, or alone.
    Raises ``UserError`` if an input is incomplete or damaged, or if the two do not hold the same labeled examples.
    """
    wanted = fingerprint(config, before_dir, after_dir, select_dir, bias_dir)
    if is_complete(out_dir, KIND, wanted):
        verify_files(out_dir, load_manifest(out_dir, KIND))
        return read_json(out_dir / METRICS)
    selection = NO_SELECTION if select_dir is None else _read_selection(select_dir)
    biases = _biases(config, bias_dir)
    pairs = _pair(_outcomes(before_dir, None), _outcomes(after_dir, biases), before_dir, after_dir)
    metrics = _metrics(config, pairs, selection)
    begin(out_dir, KIND, wanted)
    write_json(out_dir / METRICS, metrics)
    write_manifest(out_dir, KIND, wanted, [out_dir / METRICS], {"num_groups": len(pairs.present)})
    return metrics


def _select_manifest(directory: Path) -> Manifest:
    """Manifest of a complete directory that holds a selection of teachers."""
    if not (directory / MANIFEST).exists():
        raise UserError(f"{directory}: not complete ({MANIFEST} is missing); run `alsace select` first")
    manifest = load_manifest(directory, read_json(directory / MANIFEST).get("kind"))
    if TEACHERS not in manifest.files:
        raise UserError(f"{directory}: holds no {TEACHERS}; name the directory of stage select")
    return manifest


def _read_selection(directory: Path) -> dict[str, Any]:
    verify_files(directory, _select_manifest(directory))
    selection: dict[str, Any] = read_json(directory / TEACHERS)
    return selection


def _biases(config: "Config", bias_dir: Path | None) -> dict[str, np.ndarray] | None:
    """Language -> bias per candidate, None if the answers are taken as they are."""
    if not config.evaluate.calibrate:
        return None
    if bias_dir is None:
        raise UserError(
            "evaluate.calibrate: needs the biases of stage calibrate; run it, or set evaluate.calibrate: false"
        )
    biases = _read_selection(bias_dir)["biases"]
    if not biases:
        raise UserError(
            f"{bias_dir / TEACHERS}: holds no biases, which evaluate.calibrate needs; "
            "set select.calibration: marginal or evaluate.calibrate: false"
        )
    return {language: np.asarray(bias, dtype=np.float64) for language, bias in biases.items()}


class _Outcome(NamedTuple):
    """What became of one row of a score directory."""

    label: int
    right: bool


Outcomes = dict[tuple[str, str], _Outcome]  # (key, language) -> outcome, in row order


def _outcomes(directory: Path, biases: dict[str, np.ndarray] | None) -> Outcomes:
    """Answers of a model against the labels: argmax over the candidates, ties to the lowest index."""
    verify_files(directory, load_manifest(directory, SCORES_KIND))
    scores: Scores = read_scores(directory)
    found: Outcomes = {}
    rows = zip(scores.keys, scores.languages, scores.log_probs, scores.labels, strict=True)
    for key, language, log_probs, label in rows:
        place = f"{directory}: group {key!r}, language {language!r}"
        if label is None:
            raise UserError(f"{place}: has no label; evaluate on a split with labels, such as test")
        if not 0 <= label < len(log_probs):
            raise UserError(f"{place}: label {label} is not one of its {len(log_probs)} candidates; score again")
        if np.isnan(log_probs).any():
            raise UserError(f"{place}: scores are not numbers (NaN); the model has diverged, train it again")
        if (key, language) in found:
            raise UserError(f"{place}: is there twice; delete the directory and run `alsace score` again")
        if biases is not None:
            log_probs = log_probs + _bias_of(biases, language, len(log_probs), place)
        found[key, language] = _Outcome(label, int(np.argmax(log_probs)) == label)
    if not found:
        raise UserError(f"{directory}: holds no rows; evaluate on a split that has groups")
    return found


def _bias_of(biases: dict[str, np.ndarray], language: str, num_candidates: int, place: str) -> np.ndarray:
    if language not in biases:
        raise UserError(f"{place}: {TEACHERS} has no biases for this language; set evaluate.calibrate: false")
    if len(biases[language]) != num_candidates:
        raise UserError(
            f"{place}: {num_candidates} candidates but {len(biases[language])} biases in {TEACHERS}; "
            "set evaluate.calibrate: false"
        )
    return biases[language]


@dataclass(frozen=True)
class _Pairs:
    """Both models' outcomes on the same examples: bool [N groups, T languages] each, right only where present."""

    languages: list[str]
    present: np.ndarray
    before: np.ndarray
    after: np.ndarray


def _pair(before: Outcomes, after: Outcomes, before_dir: Path, after_dir: Path) -> _Pairs:
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
        if after[key, language].label != outcome.label:
            raise UserError(
                f"{after_dir}: group {key!r}, language {language!r}: label {after[key, language].label} where "
                f"{before_dir} has {outcome.label}; score both models on the same test groups"
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
    return _Pairs(languages, present, right_before, right_after)


def _metrics(config: "Config", pairs: _Pairs, selection: dict[str, Any]) -> dict[str, Any]:
    """The content of metrics.json. An accuracy is one sum over one count; the average is macro by definition."""
    source = config.data.source_language
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
        pairs.languages.index(source) if source in pairs.languages else None,
        config.evaluate.num_resamples,
        np.random.default_rng(config.seed),
    )
    old, new = summary(accuracy["before"], source), summary(accuracy["after"], source)
    return {
        "source_language": source,
        "teachers": selection["teachers"],
        "students": selection["students"],
        "languages": {
            language: {
                "before": accuracy["before"][language],
                "after": accuracy["after"][language],
                "num_examples": int(num_examples[column]),
                "p_value": adjusted[language],
                "p_value_raw": p_values[language],
                "score": selection["scores"].get(language),
            }
            for column, language in enumerate(pairs.languages)
        },
        "average": {"before": old.average, "after": new.average, "ci95": list(intervals.average)},
        "gap": {"before": old.gap, "after": new.gap, "ci95": list(intervals.gap) if intervals.gap else None},
        "std": {"before": old.std, "after": new.std},
        "worst": {
            "before": {"language": old.worst_language, "accuracy": old.worst_accuracy},
            "after": {"language": new.worst_language, "accuracy": new.worst_accuracy},
        },
    }
