"""What TensorBoard shows of a run beside its curves: the resolved config, versions, and a dashboard to begin with."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from alsace_dist import __version__
from alsace_dist.errors import warn
from alsace_dist.monitor.board import Board

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "webdataset", "numpy", "pyarrow")
# Category -> chart -> regular expressions of tags, for the tab Custom Scalars.
DASHBOARD: Mapping[str, Mapping[str, Sequence[str]]] = {
    "Is it learning?": {
        "loss": ["train/loss"],
        "agreement with the targets": ["train/target_agreement", "train/vote_agreement"],
        "agreement by language": ["agreement_of/.*"],
        "divergence by language": ["divergence_of/.*"],
        "entropy": ["train/target_entropy", "train/model_entropy"],
        "gradient": ["train/gradient_norm", "train/clipped_share"],
    },
    "Is it fast?": {
        "tokens a second": ["speed/tokens_per_second"],
        "a step's parts, in seconds": ["speed/(data|forward|backward|optimizer|communication)_seconds"],
        "slowest and fastest rank": ["speed/forward_seconds_(most|least)"],
        "padding and waiting": ["speed/padding_share", "speed/data_wait_share"],
        "memory, in GB": ["memory/.*"],
        "checkpoints": ["checkpoint/checkpoint_(blocking_|age_)?seconds"],
    },
    "Scoring": {
        "confidence by language": ["confidence_of/.*"],
        "agreement with the vote by language": ["vote_agreement_of/.*"],
    },
    "On the split dev, where there is one": {
        "agreement with the vote": ["eval/dev_vote_agreement"],
        "accuracy": ["eval/accuracy", "eval/accuracy_(gap|sd|worst)"],
        "accuracy by language": ["accuracy_of/.*"],
    },
}


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    found = {"alsace-dist": __version__, "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not there"
    return found


def write_overview(directory: Path, config: str) -> None:
    """Write config (a YAML text) and versions into a log of their own. What cannot be written ends no run."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in versions().items())
    try:
        board = Board(directory, first_step=-1)
        board.layout(DASHBOARD)
        # Indented, it is taken for code, whatever it holds.
        board.text("config", "\n".join(f"    {line}" for line in config.splitlines()))
        board.text("versions", f"| package | version |\n|---|---|\n{rows}")
        board.close()
    except OSError as error:
        warn(f"{directory}: cannot be written ({error.strerror or error}); TensorBoard will show no config")
