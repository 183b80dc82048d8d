"""Stage 1: which languages teach, and with what weight, from the scores of unlabeled groups alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alsace_dist.config import Config, SelectConfig
from alsace_dist.errors import UserError
from alsace_dist.files import manifest as artifacts
from alsace_dist.files.scores import KIND as SCORES_KIND
from alsace_dist.files.scores import read_scores
from alsace_dist.method import languages

KIND = "selection"
TEACHERS = "teachers.json"


def fingerprint(config: Config, scores: Path) -> dict[str, Any]:
    """Everything the selection depends on."""
    return {
        "select": config.select.model_dump(mode="json"),
        "source_language": config.data.source_language,
        "seed": config.seed,
        "scores": artifacts.load_manifest(scores, SCORES_KIND).digest,
        "code": artifacts.__version__,
    }


def select(config: Config, scores: Path, directory: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Write ``teachers.json``: teachers, students, scores, weights (summing to 1), calibration biases per language.

    Labels are not read, even where the score files have some.
    Raises ``UserError`` if the rule names languages that the scores do not have.
    """
    section, source = config.select, config.data.source_language
    groups = list(read_scores(scores, section.num_groups).groups().values())
    if not groups:
        raise UserError(f"{scores}: holds no scores; unlabeled groups are needed to select teachers")
    if not all(np.isfinite(row).all() for group in groups for row in group.values()):
        raise UserError(f"{scores}: holds scores that are no numbers; the model has diverged: lower its learning rate")
    biases: dict[str, np.ndarray] = {}
    if section.calibration == "marginal":
        try:
            biases = languages.marginal_biases(groups, source if section.reference == "source" else None)
        except ValueError as error:
            raise UserError(f"select.calibration: {error}; set it to none") from None
        groups = [languages.calibrate(group, biases) for group in groups]
    found = languages.language_scores(
        groups,
        agreement=section.score == "agreement",
        soft=section.vote == "soft",
        leave_one_out=section.leave_one_out,
        source=source if section.vote == "source" else None,
    )
    if source not in found:
        raise UserError(f"{scores}: has no scores in the source language {source!r}; check data.source_language")
    teachers = choose_teachers(section, found, source, config.seed)
    if section.weighting == "score":
        assert section.beta is not None
        weights = languages.score_weights(found, teachers, section.beta)
    else:
        weights = {teacher: 1 / len(teachers) for teacher in teachers}
    normalised = languages.softmax_scores(found)
    unscored = sorted({language for group in groups for language in group} - found.keys())
    value = {
        "rule": section.rule,
        "num_groups": len(groups),
        "teachers": teachers,
        # Last those without a score: they are in no group with the source language, whose answers are the vote.
        "students": [language for language in (*languages.best_first(found), *unscored) if language not in teachers],
        "scores": found,
        "threshold": float(np.mean(list(normalised.values()))) if section.rule == "threshold" else None,
        "normalised_scores": normalised,
        "weights": weights,
        "biases": {language: bias.tolist() for language, bias in biases.items()},
        "num_pairs": {mode: _num_pairs(groups, weights, mode) for mode in ("others", "ensemble", "anchor")},
    }
    artifacts.begin(directory, KIND, fingerprint)
    artifacts.write_json(directory / TEACHERS, value)
    artifacts.write_manifest(directory, KIND, fingerprint, [directory / TEACHERS])
    return value


def choose_teachers(section: SelectConfig, scores: Mapping[str, float], source: str, seed: int) -> list[str]:
    """Teachers under the section's rule, best score first. Raises ``UserError`` for a rule that cannot be met."""
    ranked = languages.best_first(scores)
    if section.rule == "all":
        return ranked
    if section.rule == "source":
        return [source]
    if section.rule == "top_k":
        assert section.top_k is not None
        if section.top_k > len(ranked):
            raise UserError(f"select.top_k: {section.top_k} asked for, there are {len(ranked)} languages; lower it")
        return ranked[: section.top_k]
    if section.rule == "explicit":
        if unknown := sorted(set(section.teachers) - set(ranked)):
            raise UserError(f"select.teachers: {', '.join(unknown)} not among the scored languages {', '.join(ranked)}")
        return [language for language in ranked if language in section.teachers]
    chosen = languages.teachers_by_threshold(scores)
    if section.rule == "random":
        drawn = np.random.default_rng([seed, 1]).choice(ranked, size=len(chosen), replace=False)
        return [language for language in ranked if language in drawn]
    return chosen


def _num_pairs(groups: list[dict[str, np.ndarray]], weights: Mapping[str, float], mode: str) -> float:
    """Sum of the weights of all targets: the number of pairs that the mean loss is taken over."""
    total = 0.0
    for group in groups:
        teachers = sum(language in weights for language in group)
        for language in group:
            own = language in weights
            if mode == "others":
                total += teachers - own
            elif teachers or (mode == "anchor" and own):
                total += 1
    return total
