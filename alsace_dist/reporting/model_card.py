"""The model card of an exported model: its data, its settings, and the accuracy of each language before and after.

Its first lines are the metadata that the Hugging Face hub reads ("Model Cards" in its documentation).
"""

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from alsace_dist.config import Config
from alsace_dist.files.evaluation import Evaluation
from alsace_dist.reporting.markdown import escape, table
from alsace_dist.reporting.tables import language_table, overall_table, teachers_in_words
from alsace_dist.reporting.verdict import AN_ANALYSIS, printable, ruled_out, verdict

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    config: Config, variant: str, evaluation: Evaluation, fingerprints: Mapping[str, str], pooling: str | None = None
) -> str:
    """Markdown with the hub's metadata. ``variant``: of the config, empty for the run itself; ``fingerprints``: what
    the model was made of -> sha256; ``pooling``: what the model's head reads, where its files say so."""
    languages = sorted(evaluation.languages)
    metadata = {
        "language": languages,
        "tags": ["alsace", "self-distillation", "cross-lingual"],
        **({"base_model": config.model.path} if _is_hub_name(config.model.path) else {}),
    }
    shown = f"`method: {config.method}`" + (f", variant `{printable(variant)}`" if variant else "")
    parts = [
        "---\n" + yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True) + "---",
        f"# {escape(printable(config.model.path or 'nano mT5'))}, distilled across languages",
        f"{escape(_made(config))} Made with alsace_dist: {shown}, rounds: {config.rounds}.",
        *[AN_ANALYSIS] * evaluation.uses_labels,
        f"**{escape(verdict(evaluation, config.evaluate.alpha))}**",
        escape(ruled_out(evaluation, config.evaluate.margin)),
        "## Languages",
        f"{escape(_teachers(config, evaluation))} Accuracy in percent on the same test examples.",
        table(language_table(evaluation, config.evaluate.alpha)),
        table(overall_table(evaluation)),
        "## How it is asked",
        _fenced(config.task.model_dump(mode="json", exclude_defaults=True) | _scoring(config)),
        *([MEAN_POOLING] if "mean" in (pooling, config.model.pooling) else []),
        "## What it was made from",
        "\n".join(f"- {escape(printable(name))}: `{digest}`" for name, digest in fingerprints.items()),
        "## Settings",
        _fenced({name: config.model_dump(mode="json")[name] for name in ("seed", "method", "rounds", *SECTIONS)}),
    ]
    return "\n\n".join(parts) + "\n"


# What every language learnt, where nobody taught.
_WITHOUT_TEACHERS = {
    "votes": "in every language on the answer that most languages gave (self-training)",
    "labels": "in every language on their true labels (an upper bound)",
}


def _made(config: Config) -> str:
    """How the model came about, in sentences."""
    source = printable(config.data.source_language)
    begun = f"Finetuned on the labels of {source}" if config.finetune else "Taken as it was, without finetuning"
    if not config.rounds:
        return f"{begun}; not distilled."
    if learnt := _WITHOUT_TEACHERS.get(str(config.distill.targets)):
        return f"{begun}, then trained on parallel groups {learnt}."
    taught = "the languages that the model handles well taught the others (ALSACE, Zhao et al., NAACL 2024)"
    return f"{begun}, then distilled on unlabeled parallel groups: {taught}."


def _teachers(config: Config, evaluation: Evaluation) -> str:
    if not config.rounds or str(config.distill.targets) in _WITHOUT_TEACHERS:
        return "Nobody taught."
    return f"Teachers: {teachers_in_words(evaluation)}."


def _is_hub_name(path: str | None) -> bool:
    """Whether a model's path is a name on the hub, and no directory here."""
    return path is not None and bool(_HUB_NAME.fullmatch(path)) and not Path(path).exists()


MEAN_POOLING = (
    "The head reads the mean of all tokens (`pooling: mean`). Its weights load in transformers, whose class reads the "
    "first token, so that answers differ there."
)


def _scoring(config: Config) -> dict[str, dict[str, object]]:
    """How the model is asked, where that is not the default."""
    found = config.model.model_dump(mode="json", include={"mode", "masks", "pooling"}, exclude_defaults=True)
    return {"model": found} if found else {}


SECTIONS = ("finetune", "select", "distill")


def _fenced(value: object) -> str:
    return "```yaml\n" + yaml.safe_dump(value, sort_keys=False, allow_unicode=True).replace("```", "'''") + "```"
