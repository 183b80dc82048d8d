"""Write docs/monitoring.md from the table of scalars: ``python docs/make_monitoring.py``; a test holds it."""

from pathlib import Path

from alsace_dist.monitor.scalars import GROUPS, Scalar

HEAD = """# Monitoring

<!-- Made by docs/make_monitoring.py, its tables from alsace_dist/monitor/scalars.py. Change it there and run it. -->

`tensorboard --logdir RUN/tensorboard` shows a run while it goes on, and after a requeue: every step is there once.
Over SSH: `ssh -L 6006:localhost:6006 LOGIN_NODE`, there `tensorboard --logdir RUN/tensorboard`, and here
http://localhost:6006.

| Tab | What it shows |
|---|---|
| Scalars, Time Series | the tables below; what is logged for each language is a group of its own: `agreement_of/sw` |
| Custom Scalars | **start here**: loss and agreement, languages side by side, speed and its parts, memory |
| Text | warnings of a training, at the step they were said; the resolved config; versions |
| Images | after the report: languages before and after, language scores, agreement between languages, reliability |
| HParams | after the report: settings and results, so that runs below one directory compare (`--logdir runs`) |

The same numbers are in `metrics.jsonl` of every training and scoring pass, one object a line: `step`, and each scalar
by the name below (`loss`, `agreement_of/sw`), without the group that TensorBoard puts before it (`train/loss`). Where
either cannot be written (a full disk, a directory that is gone), that is said once, and the run goes on.
`monitor.tracker` sends them to Weights & Biases, MLflow or trackio as well, if that is installed, and nothing else: no
console output, and nothing of the machine. Each is set up by its own means, such as `WANDB_MODE` or
`MLFLOW_TRACKING_URI`.

Warnings are printed, kept in `RUN/warnings.jsonl` (`time`, `stage`, `text`), and shown by `alsace status`, in the
report and in TensorBoard. A training warns when its loss jumps to thrice the usual, when one answer takes over in a
language while its targets differ, or did at first, when live teachers drift from the vote, when speed falls by half,
when ranks wait for data, and of a straggler, with its rank and host. A gradient that is not finite changes nothing:
the training stops with the state before it kept, or counts it and goes on (`on_nonfinite`); `alsace replay RUN
--step=N` then shows what each example of a step adds to its gradient.
"""


def make_page() -> str:
    """The whole page."""
    parts = [HEAD]
    for group, (about, scalars) in GROUPS.items():
        rows = ["| Scalar | Unit | Meaning | Healthy | If not |", "|---|---|---|---|---|", *map(_row, scalars)]
        parts.append(f"## {group}\n\n{about}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(scalar: Scalar) -> str:
    name = f"`{scalar.name}{'/LANGUAGE' if scalar.by_language else ''}`"
    return f"| {name} | {scalar.unit} | {scalar.meaning} | {scalar.healthy} | {scalar.remedy} |"


if __name__ == "__main__":
    (Path(__file__).parent / "monitoring.md").write_text(make_page(), encoding="utf-8")
