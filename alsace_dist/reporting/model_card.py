"""The model card of an exported model: its data, its settings, and the accuracy of each language before and after.

Its first lines are the metadata that the Hugging Face hub reads ("Model Cards" in its documentation).
"""

from collections.abc import Mapping

import yaml

from alsace_dist.config import Config
from alsace_dist.files.evaluation import Evaluation
from alsace_dist.reporting.markdown import escape, table
from alsace_dist.reporting.tables import language_table, overall_table, teachers_in_words
from alsace_dist.reporting.verdict import printable, ruled_out, verdict


def model_card(config: Config, variant: str, evaluation: Evaluation, fingerprints: Mapping[str, str]) -> str:
    """Markdown with the hub's metadata. ``variant``: of the config, empty for the run itself; ``fingerprints``: what
    the model was made of -> sha256."""
    languages = sorted(evaluation.languages)
    metadata = {
        "language": languages,
        "tags": ["alsace", "self-distillation", "cross-lingual"],
        **({"base_model": config.model.path} if config.model.path and "/" in config.model.path else {}),
    }
    learnt = "the labels of " + printable(config.data.source_language) if config.finetune else "nothing but itself"
    shown = f"`method: {config.method}`" + (f", variant `{printable(variant)}`" if variant else "")
    parts = [
        "---\n" + yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True) + "---",
        f"# {escape(printable(config.model.path or 'nano mT5'))}, distilled across languages",
        f"Finetuned on {escape(learnt)}, then distilled on unlabeled parallel groups: the languages that the model "
        "handles well taught the others (ALSACE, Zhao et al., NAACL 2024). Made with alsace_dist: "
        f"{shown}, rounds: {config.rounds}.",
        f"**{escape(verdict(evaluation, config.evaluate.alpha))}**",
        escape(ruled_out(evaluation, config.evaluate.margin)),
        "## Languages",
        f"Teachers: {escape(teachers_in_words(evaluation))}. Accuracy in percent on the same test examples.",
        table(language_table(evaluation, config.evaluate.alpha)),
        table(overall_table(evaluation)),
        "## How it is asked",
        _fenced(config.task.model_dump(mode="json", exclude_defaults=True) | _scoring(config)),
        *([MEAN_POOLING] if config.model.pooling == "mean" else []),
        "## What it was made from",
        "\n".join(f"- {escape(printable(name))}: `{digest}`" for name, digest in fingerprints.items()),
        "## Settings",
        _fenced({name: config.model_dump(mode="json")[name] for name in ("seed", "method", "rounds", *SECTIONS)}),
    ]
    return "\n\n".join(parts) + "\n"


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
