"""The method on human-translated data: prepares, pretrains, finetunes, runs every variant, prints the table.

Two regimes of initial transfer: the nano model is pretrained on single texts (weak), or on texts and concatenated
translations (decent). Every finished stage is kept: the same command goes on after an interruption.

    python benchmarks/debian/run.py [--seeds 0,1,2] [--regimes weak,decent]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

HERE = Path(__file__).parent
ROOT = Path("runs/debian")
CONCATENATE = {"weak": 0.0, "decent": 0.5}


def main() -> None:
    """Parse the flags, run what is not done yet, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated seeds")
    parser.add_argument("--regimes", default="weak,decent", help="comma-separated regimes")
    parser.add_argument("--only-print", action="store_true", help="print the table of what is finished")
    flags = parser.parse_args()
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    source = ROOT / "source"
    if not flags.only_print and not (source / "test.jsonl").exists():
        subprocess.run([sys.executable, str(HERE / "data.py"), "--out", str(source)], check=True)
    for regime in flags.regimes.split(","):
        for seed in () if flags.only_print else seeds:
            run(regime, seed)
        print_table(regime, seeds)


def run_directory(regime: str, seed: int) -> Path:
    """Where one run lies."""
    return ROOT / f"{regime}-{seed}"


def run(regime: str, seed: int) -> None:
    """One run with all its variants."""
    command = [sys.executable, "-m", "alsace_dist", "run", str(HERE / "config.yaml")]
    overrides = {
        "run_dir": run_directory(regime, seed),
        "seed": seed,
        "pretrain.concatenate": CONCATENATE[regime],
    }
    print(f"--- {regime}, seed {seed}", file=sys.stderr)
    subprocess.run([*command, *(f"--{key}={value}" for key, value in overrides.items())], check=True)


def print_table(regime: str, seeds: list[int]) -> None:
    """Mean over the finished seeds, in points; significantly better and worse are languages summed over the seeds."""
    files = [run_directory(regime, seed) / "report.json" for seed in seeds]
    reports = [json.loads(file.read_text()) for file in files if file.exists()]
    if not reports:
        print(f"{regime}: nothing finished yet")
        return
    print(f"\n{regime} initial transfer, {len(reports)} seed(s), accuracy in %\n")
    print("| variant | source | average | gap | worst language | significantly better / worse |")
    print("|---|---|---|---|---|---|")
    print(row("before", [summary(report, "before") for report in reports]))
    for name in ("default", *reports[0].get("variants", {})):
        print(row(name, [summary(variant(report, name), "after") for report in reports]))


def variant(report: dict, name: str) -> dict:
    """A variant's metrics within a report; "default" is the run itself."""
    return report if name == "default" else report["variants"][name]


def summary(metrics: dict, when: str) -> list[float]:
    """Source accuracy, average, gap, worst accuracy, number of languages significantly better, and worse."""
    languages = metrics["languages"].values()
    changed = [one for one in languages if one["p_value"] < 0.05]
    return [
        metrics["languages"][metrics["source_language"]][when],
        metrics["average"][when],
        metrics["gap"][when],
        metrics["worst"][when]["accuracy"],
        sum(one["after"] > one["before"] for one in changed) if when == "after" else 0,
        sum(one["after"] < one["before"] for one in changed) if when == "after" else 0,
    ]


def row(name: str, values: list[list[float]]) -> str:
    """One line of the table."""
    columns = list(zip(*values, strict=True))
    shares = [f"{100 * mean(column):.1f}" for column in columns[:4]]
    changed = "" if name == "before" else f"{sum(columns[4])} / {sum(columns[5])}"
    return f"| {name} | {' | '.join(shares)} | {changed} |"


if __name__ == "__main__":
    main()
