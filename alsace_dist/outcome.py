"""What a report is made of: everything that a run's stages have left, read once; and the same for TensorBoard."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from alsace_dist import pipeline
from alsace_dist.config import Config
from alsace_dist.config_file import validate
from alsace_dist.data import audit, texts
from alsace_dist.errors import NotReady, UserError, warn
from alsace_dist.files.costs import read_costs
from alsace_dist.files.evaluation import KIND as EVALUATION
from alsace_dist.files.evaluation import Evaluation, read_evaluation
from alsace_dist.files.layout import DATA, MODEL, TENSORBOARD, Layout, data_url
from alsace_dist.files.manifest import MANIFEST, RERUN
from alsace_dist.files.scores import KIND as SCORES
from alsace_dist.files.scores import read_scores
from alsace_dist.files.selection import read_selection
from alsace_dist.files.shards import DataDetails, Dataset, open_dataset
from alsace_dist.files.warnings import read_warnings
from alsace_dist.monitor.board import Board, Value
from alsace_dist.monitor.overview import versions
from alsace_dist.monitor.sinks import METRICS, read_scalars
from alsace_dist.reporting import pictures
from alsace_dist.reporting.explanation import explanation
from alsace_dist.reporting.facts import Facts, in_words
from alsace_dist.reporting.figures import Picture
from alsace_dist.reporting.tables import Row, Table, figures_after, figures_before
from alsace_dist.reporting.verdict import printable
from alsace_dist.stages.base import Output, model_after

LARGEST = 1e100  # no number that a training logs; NaN is not below it either
MOST_GROUPS = 5000  # that figures are made of
REPORT = "report"  # the log of results and figures, in TensorBoard's directory
EVENTS = "events.out.tfevents.*"
# Settings in TensorBoard's HParams, by dotted name, where a config has them.
SETTINGS = (
    "seed",
    "method",
    "rounds",
    "select.rule",
    "select.score",
    "distill.targets",
    "distill.teachers",
    "distill.pool",
    "distill.learning_rate",
    "distill.num_epochs",
    "distill.global_batch_size",
    "finetune.learning_rate",
    "finetune.num_epochs",
    "finetune.shots",
    "engine.zero_stage",
    "engine.dtype",
)


def evaluations_of(config: Config) -> dict[str, Evaluation]:
    """Variant -> its evaluation, of those that are complete; the run itself as "main".

    Raises ``UserError`` for one of scores, or of a model, that has been made anew since.
    """
    found = {}
    for name, own in pipeline.variants(config):
        output = Output(Layout(Path(config.run_dir), name).evaluation, EVALUATION)
        if output.exists:
            check_is_of_model(own, name)
            found[name or "main"] = read_evaluation(output.directory)
    return found


def check_is_of_model(config: Config, variant: str) -> None:
    """Raises ``UserError`` if the evaluation of a run, or of a variant, is not one of the model that lies there.

    ``config``: with the settings of the variant. Scores or a model that is gone, to save room, is no contradiction.
    """
    layout = Layout(Path(config.run_dir), variant)
    evaluation = Output(layout.evaluation, EVALUATION)
    scores = Output(layout.scores(config.rounds, "test"), SCORES)
    model = model_after(config, layout, config.rounds)
    if not scores.exists:
        return
    known = scores.manifest()
    if evaluation.manifest().fingerprint.get("after") != known.digest:
        raise UserError(
            f"{evaluation.directory}: is of other scores than those in {scores.directory}; delete it, and `alsace run` "
            "evaluates anew"
        )
    if model is not None and model.exists and known.fingerprint.get("model") != {model.kind: model.manifest().digest}:
        raise UserError(
            f"{scores.directory}: is of another model than that in {model.directory}; delete it, and `alsace run` "
            "scores anew"
        )


def facts_of(config: Config) -> Facts:
    """All that a report says beside the results. What cannot be read is left out, with a warning."""
    layout, num_groups = Layout(Path(config.run_dir)), _num_groups(config)
    model = model_after(config, layout, config.rounds)
    details = {
        "report": layout.run / "report.html",
        "numbers": layout.run / "report.json",
        "model": model.directory / MODEL if model else config.model.path,
        "config": layout.config,
        "TensorBoard": f"tensorboard --logdir {shlex.quote(str(layout.run / TENSORBOARD))}",
    }
    trainings = _trainings(config, layout)
    return Facts(
        about=in_words(config, num_groups),
        details=details,
        data=data_lines(layout),
        pictures=_pictures(config, layout, num_groups.get("test", 0), trainings),
        tables={"selection": _worth(config, layout), "data": _texts(layout)},
        speeds=[*_ends(config, layout), *_speeds(trainings)],
        costs=read_costs(layout.run),
        warnings=read_warnings(layout.run),
        again=_again(config, layout),
    )


def _num_groups(config: Config) -> dict[str, int]:
    return {split: dataset.num_groups for split, dataset in _datasets(config).items()}


def _datasets(config: Config) -> dict[str, Dataset]:
    """The splits that lie on a disk: a report is made where a store may be out of reach."""
    found: dict[str, Dataset] = {}
    for split in ("labeled", "unlabeled", "dev", "test"):
        if "://" not in (url := data_url(config, split)):
            with _optional():
                found[split] = open_dataset(url)
    return found


Rows = Mapping[str, list[dict[str, Any]]]  # name of a training -> the lines of its metrics.jsonl


def _pictures(config: Config, layout: Layout, num_test: int, trainings: Rows) -> dict[str, list[Picture]]:
    selection: list[Picture] = []
    size = config.task.num_candidates
    if config.rounds:
        with _optional():
            chosen = read_selection(layout.selection(1))
            used = min(chosen.num_groups, MOST_GROUPS)
            selection += pictures.of_selection(config, chosen, read_scores(layout.scores(0, "unlabeled"), used, size))
            test = read_scores(layout.scores(0, "test"), min(num_test, MOST_GROUPS), size)
            if (trust := pictures.of_teachers(list(chosen.ranked_weights), test)) is not None:
                selection.append(trust)
    curves = pictures.of_trainings(trainings)
    return {"selection": selection, "training": [curves] if curves else []}


def _worth(config: Config, layout: Layout) -> list[tuple[str, Table]]:
    """What targets are worth by labels of the unlabeled groups; nothing where they have none, as usual."""
    if "unlabeled" in config.data.withhold_labels or not config.rounds:
        return []
    with _optional():
        chosen = read_selection(layout.selection(1))
        used = min(chosen.num_groups, MOST_GROUPS)
        scores = read_scores(layout.scores(0, "unlabeled"), used, config.task.num_candidates)
        return explanation(config, chosen, scores)[2:]
    return []


def _texts(layout: Layout) -> list[tuple[str, Table]]:
    """How long prompts are, and what of them the model does not know, by language."""
    found = []
    for split in ("unlabeled", "test"):
        with _optional():
            manifest = Output(layout.scores(0, split), SCORES).manifest()
            counts = texts.parse_texts(manifest.details.get(texts.TEXTS, {}), layout.scores(0, split) / MANIFEST)
            rows = []
            for language, one in counts.items():
                cells = [printable(language), f"{one.num_rows:,}", f"{one.num_tokens / max(1, one.num_rows):.1f}"]
                rows.append(Row([*cells, f"{one.unknown:.1%}", f"{one.cut:.1%}"]))
            header = ["Language", "Prompts", "Tokens a prompt", "Unknown tokens", "Cut"]
            found.append((f"Prompts of the split {split}", Table(header, rows, minor=frozenset({4}))))
    return found


def _speeds(trainings: Rows) -> list[str]:
    """Medians over the readings."""
    found = []
    for title, rows in trainings.items():
        speeds = [(row.get("sequences_per_second"), row.get("tokens_per_second")) for row in rows]
        known = [one for one in speeds if None not in one]
        if known:
            sequences, tokens = (median(column) for column in zip(*known, strict=True))
            found.append(f"{title}: {sequences:,.0f} examples and {tokens:,.0f} tokens a second (median)")
    return found


def _ends(config: Config, layout: Layout) -> list[str]:
    """Which trainings have a result that is not of their last step."""
    found = []
    for number in range(config.rounds + 1):
        output = model_after(config, layout, number)
        with _optional():
            details = output.manifest().details if output else {}
            steps, exported = details.get("num_steps"), details.get("exported_step")
            if output and isinstance(steps, int) and isinstance(exported, int):
                found.append(
                    f"{output.kind}: of {steps:,} steps, the weights after step {exported:,} were the best on dev, and "
                    "are the result"
                )
    return found


def _trainings(config: Config, layout: Layout) -> Rows:
    rows: dict[str, list[dict[str, Any]]] = {}
    for title, directory in {
        "finetune": layout.finetune,
        **{f"distill round {number}": layout.distill(number) for number in range(1, config.rounds + 1)},
    }.items():
        with _optional():
            rows[title] = [
                {name: value for name, value in row.items() if isinstance(value, int | float) and abs(value) < LARGEST}
                for row in read_scalars(directory / METRICS)
            ]
    return rows


def _again(config: Config, layout: Layout) -> dict[str, str]:
    found = {
        "command": f"alsace run {shlex.quote(str(layout.config))}",
        "seed": str(config.seed),
        **{f"version of {name}": value for name, value in versions().items()},
    }
    return found | {f"data, {split} (sha256)": dataset.digest for split, dataset in _datasets(config).items()}


@contextmanager
def _optional() -> Iterator[None]:
    """Something that a report can do without: what is not there is left out, what is broken is said."""
    try:
        yield
    except (NotReady, FileNotFoundError):
        return
    except UserError as error:
        warn(f"the report leaves something out: {error}")


def data_lines(layout: Layout) -> list[str]:
    """What the audit has found in the data that this run has prepared (nothing for data prepared elsewhere), and what
    the model's tokenizer has made of it."""
    output = Output(layout.data, DATA)
    found = []
    if output.exists:
        place = f"{output.directory / MANIFEST}: details."
        details = validate(DataDetails, output.manifest().details, place, RERUN)
        found += audit.lines(details.audit)
        found += [f"left out: {number:,} records with {kind}" for kind, number in details.bad_records.items()]
        found += [f"{language}: {number:,} texts missing" for language, number in details.num_missing.items()]
        found += [
            f"{language}: {number:,} rows changed to what most languages say"
            for language, number in details.num_changed.items()
        ]
    for split in ("unlabeled", "test"):
        scores = Output(layout.scores(0, split), SCORES)
        value = scores.manifest().details.get(texts.TEXTS, {}) if scores.exists else {}
        found += [f"{split}, {line}" for line in texts.lines(texts.parse_texts(value, scores.directory / MANIFEST))]
    return found


# --- the same for TensorBoard --------------------------------------------------------------------------------------


def is_shown_in_tensorboard(config: Config) -> bool:
    """Whether a report has written there."""
    return any((Path(config.run_dir) / TENSORBOARD / REPORT).rglob(EVENTS))


def show_in_tensorboard(config: Config, evaluations: Mapping[str, Evaluation], found: list[Picture]) -> None:
    """Write figures, and settings with results; those that an earlier report has written are hidden, not deleted."""
    layout = Layout(Path(config.run_dir))
    for name, variant in pipeline.variants(config):
        if (evaluation := evaluations.get(name or "main")) is None:
            continue
        directory = layout.run / TENSORBOARD / REPORT / (name or "main")
        try:
            board = Board(directory, first_step=-1)
            before, after = figures_before(evaluation), figures_after(evaluation)
            metrics: dict[str, float | None] = {
                "result/average": after.average,
                "result/gap": after.gap,
                "result/source": after.source,
                "result/worst": after.worst.accuracy,
                "result/average_before": before.average,
                "result/gap_before": before.gap,
            }
            metrics |= {f"result_of/{language}": row.after for language, row in evaluation.languages.items()}
            known = {tag: value for tag, value in metrics.items() if value is not None}
            board.hyperparameters(_settings(variant), [tag for tag in known if tag.startswith("result/")])
            for tag, value in known.items():
                board.scalar(tag, value, 0)
            for one in found if not name else ():
                board.image(one.name, *one.png())
            board.close()
        except OSError as error:
            warn(f"{directory}: cannot be written ({error.strerror or error}); TensorBoard will show no results")


def _settings(config: Config) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for name in SETTINGS:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part, None)
        if isinstance(value, bool | int | float | str):
            found[name] = value
    found["model"] = config.model.path or "nano"
    return found
