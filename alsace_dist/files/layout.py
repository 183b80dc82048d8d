"""Where everything of a run lies. The one place that knows the names of a run's directories."""

from dataclasses import dataclass
from pathlib import Path

from alsace_dist.config import Config

CONFIG_FILE = "config.yaml"
TENSORBOARD = "tensorboard"  # below a run: a log for each directory of a stage, and one of the run's own
MODEL = "model"  # below the directory of a stage that trains one
# Kinds of the manifests of stages whose outputs have no format of their own: prepared splits, and trained models.
DATA, PRETRAIN, FINETUNE, DISTILL = "data", "pretrain", "finetune", "distill"
REPORT_FILES = ("report.md", "report.html", "report.json", "report.svg")
SEEDS_TABLE, SEEDS_NUMBERS = "seeds.md", "seeds.json"  # in the directory of a sweep: the report over all its seeds


def data_url(config: Config, split: str) -> str:
    """A split's dataset: below the run, or below ``data.directory`` (a path or an fsspec URL)."""
    return f"{config.data.directory or Path(config.run_dir) / 'data'}/{split}"


@dataclass(frozen=True)
class Layout:
    """Directories of a run, or of one variant of it. What variants share lies in the run itself."""

    run: Path
    variant: str = ""

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.run / CONFIG_FILE

    @property
    def files(self) -> list[Path]:
        """What is written into the run's directory itself, beside the resolved config."""
        return [self.run / name for name in ("bad-records.txt", "warnings.jsonl", "costs.jsonl", *REPORT_FILES)]

    @property
    def locks(self) -> Path:
        """One file per stage, which the process that works on it holds locked."""
        return self.run / ".locks"

    @property
    def slurm(self) -> Path:
        """Job scripts, their logs, and what the jobs leave."""
        return self.run / "slurm"

    @property
    def data(self) -> Path:
        """Prepared datasets, one directory per split."""
        return self.run / "data"

    @property
    def pretrain(self) -> Path:
        """The pretrained nano model."""
        return self.run / "pretrain"

    @property
    def finetune(self) -> Path:
        """The model that has learnt the task."""
        return self.run / "finetune"

    @property
    def own(self) -> Path:
        """What this variant does not share with the run."""
        return self.run / "variants" / self.variant if self.variant else self.run

    def scores(self, round_: int, split: str) -> Path:
        """Scores of the model after a round (0: before any distillation) on a split."""
        return (self.own / f"round{round_}" if round_ else self.run) / "scores" / split

    def selection(self, round_: int) -> Path:
        """Teachers of a round."""
        return self.own / f"round{round_}" / "selection"

    @property
    def calibration(self) -> Path:
        """Selection on the final model's own scores, for calibration at inference."""
        return self.own / "calibration"

    def distill(self, round_: int) -> Path:
        """The model that a round distils."""
        return self.own / f"round{round_}" / "distill"

    @property
    def evaluation(self) -> Path:
        """Accuracies before and after."""
        return self.own / "evaluation"

    def tensorboard(self, directory: Path) -> Path:
        """TensorBoard log of what is written into a stage's directory."""
        return self.run / TENSORBOARD / directory.relative_to(self.run)
