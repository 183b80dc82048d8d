"""The layering of the modules, held by their imports; and that what a person waits for starts without torch."""

import ast
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import alsace_dist
from alsace_dist.config_file import config_text, load_config
from alsace_dist.files.manifest import write_json, write_manifest, write_text

PACKAGE = Path(alsace_dist.__file__).parent
# By dotted name; a package's own name stands for its __init__.py.
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}

# A module may import what stands before its own layer, and its own package.
LAYERS: list[set[str]] = [
    {"errors"},
    {"reading"},
    {"config"},
    {"config_file"},
    {"files"},
    {"method"},
    {"ranks"},
    {"monitor"},
    {"tasks", "reporting"},
    {"data"},
    {"models"},
    {"training"},
    {"stages"},
    {"pipeline"},
    {"outcome"},
    {"runner", "plan", "doctor", "sweep", "exporting"},
    {"comparison"},
    {"cluster"},
    {"arguments", "presets", "streams", "environment"},
    {"completion"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
# Packages of siblings that know nothing of each other, but for what all of them share.
SIBLINGS = {
    "stages": {"base", "train"},
    "tasks": {"base"},
    "models": {"family", "weights", "batches", "nano", "encoder", "heads", "decoding", "footprint", "vocabulary"}
    | {"t5gemma2_module", "attention"},
}
# Packages that may not meet although one stands below the other.
STRANGERS = {("models", "tasks")}
ONLY = {
    "deepspeed": {"training.engine", "training.settings"},
    "transformers": {"models"},
}


def package(module: str) -> str:
    """The package of a module, or the module itself where it stands alone: what has a layer."""
    return module.split(".")[0]


def within(module: str) -> str:
    """Its name within its package; empty for the package itself."""
    return module.partition(".")[2]


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
    found = set()
    for name in imports(source):
        parts = name.split(".")[1:]
        if name.split(".")[0] == "alsace_dist":
            longest = next((end for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in FILES), 0)
            found |= {".".join(parts[:longest])} if longest else set()
    return found


def violations(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a higher layer or the same one, of a sibling, and of a stranger."""
    rows = []
    for module, others in sorted(graph.items()):
        for other in sorted(others):
            here, there = package(module), package(other)
            if here == there:
                is_wrong = here in SIBLINGS and not {within(module), within(other)} & (SIBLINGS[here] | {""})
            else:
                is_wrong = LAYER[there] >= LAYER[here] or (here, there) in STRANGERS
            if is_wrong:
                rows.append(f"{module} imports {other}")
    return rows


def graph_of_package() -> dict[str, set[str]]:
    return {module: own_modules(path.read_text()) for module, path in FILES.items()}


def test_every_module_has_a_layer() -> None:
    assert {package(module) for module in FILES} == LAYER.keys()
    assert sum(map(len, LAYERS)) == len(LAYER)


def test_modules_import_lower_layers_and_siblings_never_each_other() -> None:
    assert violations(graph_of_package()) == []


def test_no_import_goes_round_in_a_circle() -> None:
    graph = graph_of_package()
    assert len(graph["cli"]) > 3 and "training.loop" in graph["stages.train"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which shows the circle


@pytest.mark.parametrize("library", ONLY)
def test_one_place_alone_knows_a_library(library: str) -> None:
    users = {
        module
        for module, path in FILES.items()
        if any(name.split(".")[0] == library for name in imports(path.read_text()))
    }
    assert users and all(module in ONLY[library] or package(module) in ONLY[library] for module in users), users


def test_no_import_is_relative() -> None:
    assert [m for m, path in FILES.items() if any(name.startswith(".") for name in imports(path.read_text()))] == []


def test_the_rules_see_what_they_forbid() -> None:
    hidden = "def f():\n    from alsace_dist.stages import distill as t\n    import alsace_dist.stages.score\n"
    assert own_modules(hidden) == {"stages.distill", "stages.score"}
    assert own_modules("from alsace_dist import __version__\nfrom alsace_dist.cli import main") == {"cli"}
    packages = "from alsace_dist import tasks\nfrom alsace_dist.method import GroupScores"
    assert own_modules(packages) == {"tasks", "method"}
    forbidden = {
        "stages.select": {"stages.score", "config", "stages.base"},
        "tasks.base": {"data.records"},
        "tasks.other": {"tasks.demo", "tasks.base", "tasks"},
        "training.loop": {"training.engine"},
        "cli": {"pipeline"},
        "models.mt5": {"tasks.base", "data.stream", "models.batches"},
        "models.other": {"tasks", "models.mt5", "models.nano"},
        "monitor.scalars": {"ranks.group"},
        "ranks.group": {"monitor.health"},
    }
    assert violations(forbidden) == [
        "models.mt5 imports tasks.base",
        "models.other imports models.mt5",
        "models.other imports tasks",
        "ranks.group imports monitor.health",
        "stages.select imports stages.score",
        "tasks.base imports data.records",
        "tasks.other imports tasks.demo",
    ]
    assert list(imports("from . import x\nfrom .y import z")) == ["..x", ".y.z"]


# --- start-up ------------------------------------------------------------------------------------------------------

HEAVY = {"torch", "transformers", "deepspeed", "datasets"}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as far as the report looks at it."""
    run = tmp_path_factory.mktemp("runs") / "made-up"
    text = (PACKAGE / "presets/demo.yaml").read_text(encoding="utf-8")
    source = run.parent / "demo.yaml"
    source.write_text(text, encoding="utf-8")
    write_text(run / "config.yaml", config_text(load_config(source, {"run_dir": str(run)})))
    row = {
        "before": 0.5,
        "after": 0.6,
        "ci95": [0.0, 0.2],
        "num_examples": 100,
        "num_gained": 10,
        "num_lost": 0,
        "p_value": 0.01,
        "p_value_raw": 0.001,
        "score": 0.5,
    }
    change = {"before": 0.5, "after": 0.6, "ci95": [0.05, 0.15]}
    gap = {"before": 0.0, "after": 0.0, "ci95": [-0.05, 0.05]}
    worst = {when: {"language": "de", "accuracy": row[when]} for when in ("before", "after")}
    metrics = {
        "source_language": "en",
        "teachers": ["en"],
        "students": ["de"],
        "languages": {"de": row, "en": row},
        "average": change,
        "gap": gap,
        "paired_gap": gap,
        "rounds": [],
        "std": {"before": 0.1, "after": 0.05},
        "worst": worst,
        "uses_labels": False,
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
    # A second on a quiet core; neighbours that share its caches make it half as much again. A report draws its figures.
    assert min(times) < (3.0 if command == "report" else 1.5)
    done, _ = start("-X", "importtime", *arguments)
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "alsace_dist" in loaded
    assert loaded & HEAVY == set()
    if command == "report":
        names = {"report.md", "report.html", "report.json", "report.svg"}
        assert names <= {path.name for path in finished_run.iterdir()}


def test_stages_that_compute_little_load_without_torch() -> None:
    modules = [
        "stages.select",
        "stages.evaluate",
        "reporting.report",
        "plan.overview",
        "pipeline",
        "cli",
        "cluster.submit",
    ]
    code = f"import sys, {', '.join(f'alsace_dist.{module}' for module in modules)}; print(*sys.modules)"
    done, _ = start("-c", code)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {f"alsace_dist.{module}" for module in modules} <= loaded
    assert loaded & HEAVY == set()
