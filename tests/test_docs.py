"""The documentation against the code: the config reference, links, snippets, example configs, documented keys."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from alsace_dist.config import METHODS, Config, DistillConfig, EngineConfig
from alsace_dist.config_file import load_config
from alsace_dist.data.records import KINDS_OF_BAD
from alsace_dist.errors import EXIT_STOPPED, EXIT_USER_ERROR
from alsace_dist.files.manifest import write_manifest
from alsace_dist.files.scores import Scores, write_scores
from alsace_dist.files.selection import Selection
from alsace_dist.monitor.scalars import SCALARS
from alsace_dist.pipeline import load_run
from alsace_dist.stages import evaluate, select
from alsace_dist.stages.prepare import prepare

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), ROOT / "slurm/README.md"])
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
BASE: dict[str, Any] = {"run_dir": "run", "model": {"path": "some/mt5"}}


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_config_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: str, language: str) -> list[str]:
    """Fenced code blocks of a page in one language."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def column(page: str, heading: str) -> list[str]:
    """Names in backquotes in the first column of the first table below a heading."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (_, found) = text.split(f"## {heading}\n", 1)
    rows = re.split(r"\n\n(?!\|)", found[found.index("\n|") :], maxsplit=1)[0]
    return [name for row in rows.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1] if row else "")]


# --- the config reference ------------------------------------------------------------------------------------------


def test_the_config_reference_is_what_the_generator_makes_now() -> None:
    for name, made in generator().make_references().items():
        written = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert written == made, "run `python docs/make_config_reference.py`"


def test_the_reference_holds_every_key_with_type_and_meaning() -> None:
    text = generator().make_references()["config.md"]
    definitions = Config.model_json_schema()["$defs"]
    keys = [key for section in definitions.values() for key in section["properties"]]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert len(cells) == len(keys) + len(Config.model_fields) + sum(map(len, METHODS["paper"].values()))
    assert all(len(row) == 5 and row[1] and row[2] and row[4] for row in cells if "." not in row[0])
    found = {row[0]: row for row in cells}
    assert found["`learning_rate`"][1:4] == ["number", f"`{DistillConfig().learning_rate}`", "> 0"]
    assert found["`zero_stage`"][1:3] == ["`0` or `1` or `2` or `3`", f"`{EngineConfig().zero_stage}`"]
    assert found["`inputs`"][1] == "list of sections"
    assert found["`num_processes`"][1:4] == ["whole number or `auto`", '`"auto"`', "≥ 1"]
    assert found["`exposure`"][1:4] == ["mapping of text to number", "`{}`", "each ≥ 0, ≤ 1"]
    assert found["`template`"][2] == "**required**"
    assert found["`select.rule`"] == ["`select.rule`", *(f"`{METHODS[name]['select']['rule']}`" for name in METHODS)]


def test_a_key_without_a_docstring_is_refused() -> None:
    module = generator()
    schema = Config.model_json_schema()
    with pytest.raises(ValueError, match=r"Config\.newcomer: has no docstring"):
        module._description(Config, "newcomer", {"type": "string"}, schema)
    inherited = module._description(module.config.PretrainConfig, "num_steps", {"type": "integer"}, schema)
    assert inherited == "Optimizer steps; or give num_epochs."


# --- links ---------------------------------------------------------------------------------------------------------


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_there_are_links_to_check() -> None:
    assert {"config.md", "data.md", "formats.md", "method.md"} <= {page.name for page in PAGES}
    assert sum(1 for page in PAGES for _ in links(page)) >= 8
    assert "what-method-fills-in" in anchors(ROOT / "docs" / "config.md")


# --- configs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_example_configs_are_valid(path: Path) -> None:
    task = load_run(path).task
    assert task.labels or task.has_own_candidates


def test_the_xnli_example_is_the_papers_setting() -> None:
    config = load_config(ROOT / "configs" / "xnli-mt5-large.yaml")
    assert [(one.kind, one.hub_split, one.split) for one in config.data.inputs] == [
        ("xnli", "train", "labeled"),
        ("xnli", "dev", None),
        ("xnli", None, "test"),
    ]
    assert (config.data.splits, config.finetune and config.finetune.num_examples) == ({"unlabeled": 500}, 128)
    assert config.distill.global_batch_size == 15 * 32 and config.variants["paper"]["method"] == "paper"


SNIPPETS = blocks("data.md", "yaml")


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_yaml_snippets_are_valid(snippet: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE) + snippet, encoding="utf-8")
    config = load_config(tmp_path / "run.yaml")
    assert config.data.inputs or config.data.directory


def test_the_first_example_can_be_prepared_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(SNIPPETS) == 14
    monkeypatch.chdir(tmp_path)
    Path("reviews.jsonl").write_text(blocks("data.md", "json")[0], encoding="utf-8")
    Path("run.yaml").write_text(yaml.safe_dump(BASE) + SNIPPETS[0], encoding="utf-8")
    found = prepare(load_config("run.yaml"), Path("run/data"))
    assert {split: data.num_groups for split, data in found.items()} == {"test": 1, "labeled": 2, "unlabeled": 1}
    assert {language for data in found.values() for language in data.languages} == {"en", "de", "fr"}


# --- the map -------------------------------------------------------------------------------------------------------


def test_the_architecture_lists_every_file_and_none_that_is_not_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("## Files\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `([\w/]+\.py)` \| \S", text, flags=re.MULTILINE)
    package = ROOT / "alsace_dist"
    here = [path.relative_to(package).as_posix() for path in package.rglob("*.py")]
    assert sorted(listed) == sorted(name for name in here if not name.endswith(("__init__.py", "__main__.py")))


def test_the_architecture_tells_the_layers_that_the_test_holds() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^    (errors <.*?)\n\n", text, flags=re.MULTILINE | re.DOTALL)
    told = [sorted(layer.strip().split(", ")) for layer in " ".join(block.split()).split("<")]
    spec = importlib.util.spec_from_file_location("test_layers", ROOT / "tests" / "test_layers.py")
    assert spec is not None and spec.loader is not None
    layers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layers)
    assert told == [sorted(names) for names in layers.LAYERS if names != {"__main__"}]


# --- formats -------------------------------------------------------------------------------------------------------


def test_every_kind_of_bad_record_is_documented() -> None:
    assert len(KINDS_OF_BAD) > 10
    assert sorted(column("data.md", "Bad records")) == sorted(KINDS_OF_BAD)


def test_documented_metrics_are_those_that_are_written() -> None:
    present = np.ones((4, 2), dtype=bool)
    pairs = evaluate.Pairs(["de", "en"], present, present, present)
    value = BASE | {"task": {"fields": ["text"], "template": "{text}", "labels": ["a", "b"]}}
    config = Config.model_validate(value | {"data": {"directory": "data"}})
    made = evaluate.evaluation_of(config, pairs).as_json()
    (example,) = (json.loads(block) for block in blocks("formats.md", "json") if "source_language" in block)
    assert example.keys() == made.keys()
    for key in ("average", "gap", "std", "worst"):
        assert example[key].keys() == made[key].keys()
    assert {frozenset(row) for row in example["languages"].values()} == {frozenset(made["languages"]["en"])}


def test_documented_figures_add_up() -> None:
    (example,) = (json.loads(block) for block in blocks("formats.md", "json") if "source_language" in block)
    for when in ("before", "after"):
        accuracy = {language: row[when] for language, row in example["languages"].items()}
        assert example["average"][when] == pytest.approx(np.mean(list(accuracy.values())), abs=5e-3)
        assert example["gap"][when] == pytest.approx(accuracy["en"] - (accuracy["de"] + accuracy["sw"]) / 2, abs=5e-3)
        assert example["std"][when] == pytest.approx(np.std(list(accuracy.values())), abs=5e-3)


def test_documented_teachers_are_those_that_are_written(tmp_path: Path) -> None:
    rows = [("a", "de", [0.4, 0.6]), ("a", "en", [0.1, 0.9]), ("b", "de", [0.5, 0.5]), ("b", "en", [0.8, 0.2])]
    keys, languages, probabilities = (list(part) for part in zip(*rows, strict=True))
    log_probs = [np.log(np.array(row, dtype=np.float32)) for row in probabilities]
    write_scores(tmp_path / "000000.parquet", Scores(keys, languages, log_probs, [None] * 4), {})
    write_manifest(tmp_path, "scores", {}, [tmp_path / "000000.parquet"])
    value = BASE | {"task": {"fields": ["text"], "template": "{text}", "labels": ["a", "b"]}}
    config = Config.model_validate(value | {"data": {"directory": "data"}})
    made = select.make_selection(config, tmp_path)
    assert sorted(column("formats.md", "Teachers")) == sorted(made.model_dump()) == sorted(Selection.model_fields)


def test_the_page_on_monitoring_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_monitoring", ROOT / "docs" / "make_monitoring.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert written == module.make_page(), "run `python docs/make_monitoring.py`"
    assert all(f"| `{scalar.name}" in written for scalar in SCALARS)


def test_documented_exit_codes() -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8").split("## Exit codes")[1]
    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)]
    assert codes == [0, 1, EXIT_USER_ERROR, EXIT_STOPPED]
