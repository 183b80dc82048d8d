"""The layering of the modules, held by their imports; and that what a person waits for starts without torch."""

import ast
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import alsace_dist
from alsace_dist.artifacts import write_json, write_manifest, write_text
from alsace_dist.config_file import config_text, load_config

PACKAGE = Path(alsace_dist.__file__).parent
FILES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}

LAYERS = [
    {"errors", "artifacts", "config", "config_file", "cluster", "layout", "languages", "statistics", "wording"},
    {"runtime", "launcher", "watchdog", "metrics", "plots"},
    {
        "checks",
        "tasks",
        "shards",
        "sources",
        "score_files",
        "stream",
        "collate",
        "modeling",
        "engine",
        "checkpoint",
        "loop",
    }
    | {"demo_corpus"},
    {"prepare", "pretrain", "train", "score", "select", "evaluate", "report", "plan", "doctor", "cluster_doctor"},
    {"pipeline", "job_scripts", "slurm", "submission", "cli", "__main__"},
]
STAGES = LAYERS[3]
LAYER = {module: number for number, modules in enumerate(LAYERS) for module in modules}


def imports(source: str) -> Iterator[str]:
    """Dotted names of everything imported, also inside functions and under TYPE_CHECKING; relative ones start with
    dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def own_modules(source: str) -> set[str]:
    """Modules of this package that are imported."""
    parts = [name.split(".") for name in imports(source)]
    return {part[1] for part in parts if part[0] == "alsace_dist" and len(part) > 1 and part[1] in LAYER}


def violations(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a higher layer, and of one stage by another."""
    return [
        f"{module} (L{LAYER[module]}) imports {other} (L{LAYER[other]})"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if LAYER[other] > LAYER[module] or {module, other} <= STAGES
    ]


def test_every_module_has_a_layer() -> None:
    assert FILES.keys() == LAYER.keys()
    assert sum(map(len, LAYERS)) == len(LAYER)


def test_modules_import_lower_layers_and_stages_never_each_other() -> None:
    assert violations({module: own_modules(path.read_text()) for module, path in FILES.items()}) == []


def test_no_import_goes_round_in_a_circle() -> None:
    graph = {module: own_modules(path.read_text()) for module, path in FILES.items()}
    assert len(graph["cli"]) > 5 and "engine" in graph["train"] and "config" in graph["evaluate"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which shows the circle


def test_only_the_engine_knows_deepspeed_and_no_import_is_relative() -> None:
    names = {module: set(imports(path.read_text())) for module, path in FILES.items()}
    assert {m for m, found in names.items() if any(name.split(".")[0] == "deepspeed" for name in found)} == {"engine"}
    assert [m for m, found in names.items() if any(name.startswith(".") for name in found)] == []


def test_the_rules_see_what_they_forbid() -> None:
    hidden = "def f():\n    from alsace_dist import train as t, errors\n    import alsace_dist.score\n"
    assert own_modules(hidden) == {"train", "errors", "score"}
    assert own_modules("from alsace_dist import __version__\nfrom alsace_dist.cli import main") == {"cli"}
    assert violations({"select": {"train", "config"}, "tasks": {"score"}, "loop": {"engine"}, "cli": {"pipeline"}}) == [
        "select (L3) imports train (L3)",
        "tasks (L2) imports score (L3)",
    ]
    assert list(imports("from . import x\nfrom .y import z")) == ["..x", ".y.z"]


# --- start-up ------------------------------------------------------------------------------------------------------

HEAVY = {"torch", "transformers", "deepspeed", "datasets"}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as far as the report looks at it."""
    run = tmp_path_factory.mktemp("runs") / "made-up"
    text = (PACKAGE / "demo.yaml").read_text(encoding="utf-8")
    source = run.parent / "demo.yaml"
    source.write_text(text, encoding="utf-8")
    write_text(run / "config.yaml", config_text(load_config(source, {"run_dir": str(run)})))
    row = {"before": 0.5, "after": 0.6, "num_examples": 100, "p_value": 0.01, "p_value_raw": 0.001, "score": 0.5}
    change = {"before": 0.5, "after": 0.6, "ci95": [0.05, 0.15]}
    worst = {when: {"language": "de", "accuracy": 0.5} for when in ("before", "after")}
    metrics = {
        "source_language": "en",
        "teachers": ["en"],
        "students": ["de"],
        "languages": {"de": row, "en": row},
        "average": change,
        "gap": change,
        "std": {"before": 0.1, "after": 0.05},
        "worst": worst,
    }
    write_json(run / "evaluation" / "metrics.json", metrics)
    write_manifest(run / "evaluation", "evaluation", {}, [run / "evaluation" / "metrics.json"])
    return run


def start(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A finished child and the processor time that it took: the clock on the wall depends on the neighbours."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("command", ["--help", "report"])
def test_commands_start_in_under_a_second_and_without_torch(finished_run: Path, command: str) -> None:
    arguments = ["-m", "alsace_dist", command, *([str(finished_run)] if command == "report" else [])]
    times = []
    for _ in range(3):
        done, seconds = start(*arguments)
        assert done.returncode == 0, done.stderr
        assert ("report.html" if command == "report" else "distill") in done.stdout + done.stderr
        times.append(seconds)
    assert statistics.median(times) < 1
    done, _ = start("-X", "importtime", *arguments)
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert {"alsace_dist", "fire"} <= loaded
    assert loaded & HEAVY == set()
    if command == "report":
        names = {"report.md", "report.html", "report.json", "report.svg"}
        assert names <= {path.name for path in finished_run.iterdir()}


def test_stages_that_compute_little_load_without_torch() -> None:
    modules = sorted({"select", "evaluate", "report", "plan", "pipeline", "cli"} & FILES.keys())
    code = f"import sys, {', '.join(f'alsace_dist.{module}' for module in modules)}; print(*sys.modules)"
    done, _ = start("-c", code)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {f"alsace_dist.{module}" for module in modules} <= loaded
    assert loaded & HEAVY == set()
