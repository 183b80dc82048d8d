"""The prompts that come with published datasets: what ``task.template: english`` and ``native`` stand for.

They are data, a file for each dataset beside its module in tasks/. The resolved config holds them in full, so that a
run says what it has asked.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[1] / "tasks"
CHOICES = ("english", "native")
# What a file says of the dataset itself, whatever the language of its prompts.
OF_DATASET = ("fields", "labels", "candidates", "gap")
# What it says in a language, under ``english`` and, language by language, under ``native``, where English stands in for
# what a language leaves out.
OF_LANGUAGE = ("template", "context_free_template", "words", "verbalizers")


def datasets() -> list[str]:
    """The datasets that have prompts."""
    return sorted(path.name.removesuffix(".prompts.yaml") for path in FOLDER.glob("*.prompts.yaml"))


@cache
def read(dataset: str) -> dict[str, Any]:
    """The file of a dataset."""
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{dataset}.prompts.yaml").read_text(encoding="utf-8"))
    return found


def filled_in(task: Mapping[str, Any], kinds: Iterable[Any]) -> dict[str, Any]:
    """A ``task`` section whose template names prompts, with these in full; what the section gives itself stays.

    ``kinds``: those of ``data.inputs``. Raises ``ValueError`` if the template names prompts that are not there.
    """
    asked = task.get("template")
    dataset, _, choice = asked.rpartition("/") if isinstance(asked, str) else ("", "", "")
    if choice not in CHOICES or "{" in dataset:
        return dict(task)
    found = [dataset] if dataset else sorted({str(kind) for kind in kinds} & set(datasets()))
    if len(found) != 1 or found[0] not in datasets():
        known = ", ".join(datasets())
        raise ValueError(
            f"task.template: {asked} stands for the prompts of one published dataset, and data.inputs names "
            f"{' and '.join(found) or 'none'}; write SET/{choice}, where SET is one of {known}, or a template"
        )
    file = read(found[0])
    given = {key: value for key, value in task.items() if key != "template"}
    labels = [str(label) for label in given.get("labels", file.get("labels", []))]
    texts = _english(file, labels) if choice == "english" else _native(file, labels)
    if "verbalizers" in given or given.get("candidates"):
        texts.pop("verbalizers", None)
    about = {key: file[key] for key in OF_DATASET if key in file}
    if given.get("candidate_score", "sum") in ("sum", "mean"):  # then no prompt is without context
        texts.pop("context_free_template", None)
    whole = {**about, **texts, **given, "prompts": f"{found[0]}/{choice}"}
    if "fields" not in given:
        shown = json.dumps([whole.get(key) for key in (*OF_LANGUAGE, "candidates")])
        whole["fields"] = [field for field in file["fields"] if f"{{{field}}}" in shown or f'"{field}"' in shown]
    return whole


def _english(file: Mapping[str, Any], labels: list[str]) -> dict[str, Any]:
    return {key: _in_order(key, value, file, labels) for key, value in file["english"].items() if key in OF_LANGUAGE}


def _native(file: Mapping[str, Any], labels: list[str]) -> dict[str, Any]:
    english = file["english"]
    texts = {language: {**english, **own} for language, own in file["native"].items()}
    return {
        key: {language: _in_order(key, own[key], file, labels) for language, own in texts.items()}
        for key in OF_LANGUAGE
        if key in english
    }


def _in_order(key: str, value: Any, file: Mapping[str, Any], labels: list[str]) -> Any:
    """Verbalizers in the order that a config has the labels in; other values as they are."""
    if key != "verbalizers" or sorted(labels) != sorted(file["labels"]):
        return value
    return [value[file["labels"].index(label)] for label in labels]
