"""The method and its ablation on both corpora: prepares, pretrains, finetunes, runs every variant, prints the tables.

    python benchmarks/ablation.py [--corpora debian-weak,debian-decent,demo] [--seeds 0,1,2]

The corpora: Debian's package descriptions (benchmarks/debian, human translations), where the nano model is pretrained
on single texts (weak initial transfer) or on concatenated translations (decent), and the embedded demo. A run of
Debian takes about half an hour on two cores. Every finished stage is kept: the same command goes on after an
interruption. Reports are collected in benchmarks/results; ``--only-print`` prints the tables from there.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SOURCE = Path("runs/debian/source")
DEBIAN, DEMO = HERE / "debian/config.yaml", HERE.parent / "configs/demo.yaml"
# Pairs of translations of which each has as much room as a single text has, and more to guess, which the other holds.
DECENT = {
    "data.inputs": [
        {"path": str(SOURCE / f"{'parallel' if split == 'pretrain' else split}.jsonl"), "split": split}
        for split in ("pretrain", "labeled", "unlabeled", "test")
    ],
    "pretrain.concatenate": 1.0,
    "pretrain.max_tokens": 128,
    "pretrain.mask_ratio": 0.25,
}
# Corpus -> config and what it says otherwise.
CORPORA: dict[str, tuple[Path, dict[str, Any]]] = {
    "debian-weak": (DEBIAN, {"pretrain.concatenate": 0.0}),
    "debian-decent": (DEBIAN, DECENT),
    "demo": (DEMO, {}),
}
VARIANTS = HERE / "variants.yaml"
ALPHA = 0.05  # of a language's Holm-corrected McNemar test


def main() -> None:
    """Parse the flags, run what is not done yet, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", default=",".join(CORPORA), help="comma-separated corpora")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated seeds")
    parser.add_argument("--only-print", action="store_true", help="print the tables of what is collected")
    flags = parser.parse_args()
    corpora = flags.corpora.split(",")
    if unknown := set(corpora) - set(CORPORA):
        parser.error(f"--corpora: no {', '.join(sorted(unknown))}; there are {', '.join(CORPORA)}")
    for seed in [] if flags.only_print else [int(seed) for seed in flags.seeds.split(",")]:
        for corpus in corpora:
            run(corpus, seed)
    for corpus in corpora:
        print_table(corpus)


def run(corpus: str, seed: int) -> None:
    """One run with all its variants; its report is collected. Exits with the run's own code if it fails or stops."""
    config, overrides = CORPORA[corpus]
    if config == DEBIAN and not (SOURCE / "test.jsonl").exists():
        call([str(HERE / "debian/data.py"), "--out", str(SOURCE)])
    directory = Path("runs/ablation") / f"{corpus}-{seed}"
    settings = {"seed": seed, "variants": yaml.safe_load(VARIANTS.read_text())} | overrides
    print(f"--- {corpus}, seed {seed}", file=sys.stderr)
    options = [f"--{key}={json.dumps(value)}" for key, value in settings.items()]
    call(["-m", "alsace_dist", "run", str(config), f"--run_dir={directory}", *options])
    RESULTS.mkdir(exist_ok=True)
    shutil.copyfile(directory / "report.json", RESULTS / f"{corpus}-{seed}.json")


def call(arguments: list[str]) -> None:
    """Run Python; leave with its code if that is not 0 (it has said why)."""
    if code := subprocess.run([sys.executable, *arguments], check=False).returncode:
        sys.exit(code)


def print_table(corpus: str) -> None:
    """Means over the collected seeds, in %; languages significantly better and worse are summed over the seeds.
    Variants that not every seed has are left out."""
    reports = [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{corpus}-[0-9]*.json"))]
    if not reports:
        print(f"{corpus}: nothing collected yet")
        return
    num_languages = len(reports[0]["languages"])
    print(f"\n{corpus}: {num_languages} languages, {len(reports)} seed(s), accuracy in %\n")
    print("| variant | source | average | gap | worst language | significantly better / worse |")
    print("|---|---|---|---|---|---|")
    print(row("before", [summary(report, "before") for report in reports]))
    names = [name for name in reports[0].get("variants", {}) if all(name in report["variants"] for report in reports)]
    for name in ("default", *names):
        own = [report if name == "default" else report["variants"][name] for report in reports]
        print(row(name, [summary(report, "after") for report in own]))


def summary(metrics: dict[str, Any], when: str) -> list[float]:
    """Source accuracy, average, gap, worst accuracy, number of languages significantly better, and worse."""
    changed = [one for one in metrics["languages"].values() if one["p_value"] < ALPHA]
    return [
        metrics["languages"][metrics["source_language"]][when],
        metrics["average"][when],
        metrics["gap"][when],
        metrics["worst"][when]["accuracy"],
        sum(one["after"] > one["before"] for one in changed),
        sum(one["after"] < one["before"] for one in changed),
    ]


def row(name: str, values: list[list[float]]) -> str:
    """One line of the table."""
    columns = list(zip(*values, strict=True))
    shares = [f"{100 * mean(column):.1f}" for column in columns[:4]]
    changed = "" if name.endswith("before") else f"{sum(columns[4])} / {sum(columns[5])}"
    return f"| {name} | {' | '.join(shares)} | {changed} |"


if __name__ == "__main__":
    main()
