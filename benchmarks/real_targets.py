"""What ways to make targets are worth on the unlabeled groups, before anything is trained: from one scoring pass.

``real.py --only-targets`` calls this for every task and seed. Labels are looked at here and nowhere in the method.
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from alsace_dist.config import Config
from alsace_dist.config_file import variant
from alsace_dist.files.layout import Layout
from alsace_dist.files.scores import read_scores
from alsace_dist.method.calibration import calibrate
from alsace_dist.method.selection import accuracies
from alsace_dist.reporting.explanation import worth, worth_of_language
from alsace_dist.stages.select import make_selection

IDEAS = Path(__file__).parent / "real/targets.yaml"
Worths = dict[str, dict[str, float]]


def worths(config: Config) -> Worths:
    """Idea -> accuracy and log-loss of its targets; first those of the source language, and of all languages' own
    answers. The run must have scored its unlabeled groups, which must have labels."""
    ideas = yaml.safe_load(IDEAS.read_text())
    directory = Layout(Path(config.run_dir)).scores(0, "unlabeled")
    scores = read_scores(directory)
    groups, labels = list(scores.groups().values()), list(scores.golds().values())
    own = accuracies(groups, labels)
    source = worth_of_language(config.data.source_language, groups, labels)
    found = {
        "source alone": {"accuracy": source.accuracy, "log_loss": source.log_loss},
        "each language's own": {"accuracy": mean(own.values()), "log_loss": float("nan")},
    }
    named = config.model_copy(
        update={"variants": {f"idea-{number}": idea for number, idea in enumerate(ideas.values())}}
    )
    for number, name in enumerate(ideas):
        one = variant(named, f"idea-{number}")
        selection = make_selection(one, directory)
        calibrated = [calibrate(group, selection.bias_rows()) for group in groups]
        targets = worth(one.distill, selection, calibrated, labels)
        found[name] = {"accuracy": targets.accuracy, "log_loss": targets.log_loss}
    return found


def table(found: list[Worths]) -> list[str]:
    """Lines of a table of means over seeds, in Markdown."""
    lines = [f"| targets, {len(found)} seed(s) | accuracy, each seed | mean | log-loss |", "|---|---|---|---|"]
    for name in found[0]:
        shares = [100 * one[name]["accuracy"] for one in found]
        loss = mean(one[name]["log_loss"] for one in found)
        each = " ".join(f"{share:.1f}" for share in shares)
        lines.append(f"| {name} | {each} | {mean(shares):.1f} | {'' if loss != loss else f'{loss:.3f}'} |")
    return lines


def collected(directory: Path, task: str) -> list[Worths]:
    """What earlier calls have kept of a task, seed by seed."""
    files = sorted(directory.glob(f"targets-{task}-[0-9]*.json"))
    kept: list[Any] = [json.loads(file.read_text()) for file in files]
    return kept
