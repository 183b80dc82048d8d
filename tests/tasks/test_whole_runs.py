"""Every published task from its files to the report, on two ranks of ZeRO-3, with every family. (XCOPA: test_xcopa.)"""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from tasks import publishing

from alsace_dist.files.scores import read_scores

SIZES = {"train": 18, "dev": 24, "test": 18}


def rows_of(language: str, part: str, labels: list[str]) -> list[tuple[str, str, str]]:
    """Two texts and a label, the same rows in every language; the label is the first text's first word."""
    rng, words = random.Random(part), tiny.WORDS[language]
    rows = []
    for number in range(SIZES[part]):
        label = number % len(labels)
        texts = [" ".join(words[place] for place in rng.sample(range(3, 8), 3)) for _ in range(2)]
        rows.append((f"{words[label]} {texts[0]}", texts[1], labels[label]))
    return rows


def write_xnli(folder: Path) -> None:
    """XTREME's files."""
    for language in tiny.LANGUAGES:
        for part in SIZES:
            found = enumerate(rows_of(language, part, publishing.NLI["labels"]))
            lines = [["row", "premise", "hypothesis", "label"], *([str(number), *row] for number, row in found)]
            publishing.write_lines(f"{folder}/{part}.{language}.tsv", lines, "\r\n")


def write_pawsx(folder: Path) -> None:
    """The original distribution; a sentence that was never translated, and a label that is hidden."""
    names = {"train": "translated_train", "dev": "dev_2k", "test": "test_2k"}
    for language in ("en", "de", "fr"):
        for part in SIZES:
            rows = [[str(number), *row] for number, row in enumerate(rows_of(language, part, ["0", "1"]), 1)]
            if language == "de":
                rows[3][1:3] = ["NS", "NS"]
            lines = [["id", "sentence1", "sentence2", "label"], *rows]
            publishing.write_lines(f"{folder}/{language}/{names[part]}.tsv", lines)


NAMES = {"eng_Latn": "en", "deu_Latn": "de", "fra_Latn": "fr", "rus_Cyrl": "ru"}


def write_sib200(folder: Path) -> None:
    for name, language in NAMES.items():
        for part in SIZES:
            rows = rows_of(language, part, publishing.TOPICS["labels"])
            lines = [[str(number), label, text] for number, (text, _, label) in enumerate(rows)]
            publishing.write_csv(f"{folder}/{name}/{part}.tsv", [["index_id", "category", "text"], *lines])


TASKS: dict[str, tuple[Callable[[Path], None], dict[str, Any], set[str]]] = {
    "xnli": (write_xnli, publishing.NLI | {"verbalizers": ["a", "b", "c"]}, set(tiny.LANGUAGES)),
    "pawsx": (write_pawsx, publishing.PARAPHRASES | {"verbalizers": ["a", "b"]}, {"en", "de", "fr"}),
    "sib200": (
        write_sib200,
        publishing.TOPICS | {"verbalizers": ["a", "b", "c", "red", "blue", "old", "new"]},
        set(NAMES),
    ),
}


SCORERS = ("mt5", "cloze", "new head")


@pytest.mark.parametrize(("kind", "scorer"), [*itertools.product(TASKS, SCORERS), ("pawsx", "t5gemma2")])
def test_from_the_files_to_the_report(world: Path, tmp_path: Path, kind: str, scorer: str) -> None:
    write, task, languages = TASKS[kind]
    write(tmp_path / "set")
    place = {"kind": kind, "path": str(tmp_path / "set")}
    parts = {"train": "labeled", "dev": "unlabeled", "test": "test"}
    inputs = [place | {"hub_split": part, "split": split} for part, split in parts.items()]
    if scorer == "new head":
        task = {key: value for key, value in task.items() if key != "verbalizers"}
    else:
        task = task | {"template": task["template"] + " {answer}"}
    value = tiny.make_config(world, run_dir=str(tmp_path / "run"), engine={"zero_stage": 3})
    value["data"] = {"inputs": inputs, "groups_per_shard": 8}
    value["data"]["source_language"] = "eng_Latn" if kind == "sib200" else "en"
    value["model"] = tiny.of_scorer(world, scorer)["model"]
    value["task"] = task | {"max_tokens": 48}
    tiny.run_all(tiny.write_config(tmp_path / "c.yaml", value))
    scores = read_scores(tmp_path / "run/scores/test")
    num_missing = 1 if kind == "pawsx" else 0
    assert len(scores.keys) == SIZES["test"] * len(languages) - num_missing
    assert len({float(row[0]) for row in scores.log_probs}) > len(scores.keys) / 2  # no scores of constants
    metrics = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())
    assert set(metrics["languages"]) == languages
    assert (tmp_path / "run/round1/distill/model/model.safetensors").exists()


@pytest.mark.parametrize("scorer", ["mt5", "cloze"])
def test_geomlama_from_the_files_to_the_report(world: Path, tmp_path: Path, scorer: str) -> None:
    """Its words are none of the small models': what is shown is that every stage takes candidates of any number."""
    publishing.geomlama(str(tmp_path / "set"))
    value = tiny.make_config(world, run_dir=str(tmp_path / "run"), engine={"zero_stage": 3}, finetune=None)
    inputs = [{"kind": "geomlama", "path": str(tmp_path / "set")}]
    splits = {"unlabeled": 0.5, "test": 0.5}
    value["data"] = {"inputs": inputs, "splits": splits, "groups_per_shard": 8, "max_unknown": 1.0}
    value["model"] = tiny.of_scorer(world, scorer)["model"]
    value["task"] = publishing.GAPS | {"max_tokens": 60}
    value["select"] = {"calibration": "none"}
    tiny.run_all(tiny.write_config(tmp_path / "c.yaml", value))
    metrics = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())
    assert len(metrics["languages"]) > 2
    assert "precision" in json.dumps(metrics)
