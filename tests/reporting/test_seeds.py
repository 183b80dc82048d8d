"""Several seeds together: by hand, and as the commands write it."""

import json
from pathlib import Path

import pytest
from reporting.test_report import make_evaluation

from alsace_dist.config import Config
from alsace_dist.files.evaluation import Evaluation, write_evaluation
from alsace_dist.files.layout import Layout
from alsace_dist.reporting.seeds import as_json, pooled, seeds_table
from alsace_dist.reporting.statistics import mcnemar_of_counts
from alsace_dist.runner import report_seeds

BEFORE = {"en": 0.7, "de": 0.5, "sw": 0.3}


def changed(de: float, sw: float) -> Evaluation:
    return make_evaluation(BEFORE, BEFORE | {"de": 0.5 + de, "sw": 0.3 + sw})


def test_means_spread_and_significance_over_all_seeds() -> None:
    """Of 1,000 examples de gains 5 in each of three seeds: 15 of 15, significant together and in no seed alone."""
    assert mcnemar_of_counts(5, 0) == pytest.approx(2 / 2**5) and mcnemar_of_counts(15, 0) == pytest.approx(2 / 2**15)
    found = {seed: {"main": changed(0.005, 0.0)} for seed in (1, 2, 3)}
    found[3]["paper"] = changed(0.0, -0.1)
    found[3]["oracle"] = found[3]["main"].model_copy(update={"uses_labels": True})
    ways = pooled(found, 0.05)
    assert list(ways) == ["before", "main", "paper", "oracle"]
    assert (ways["main"].better, ways["main"].worse) == (("de",), ())
    assert (ways["paper"].seeds, ways["paper"].better, ways["paper"].worse) == ((3,), (), ("sw",))
    rows = {row.cells[0]: row.cells[1:] for row in seeds_table(ways).rows}
    assert rows["before"] == ["3", "50.0 ± 0.0", "30.0 ± 0.0", "30.0 ± 0.0", "70.0 ± 0.0", "30.0 ± 0.0", "–", "–"]
    assert "oracle (uses labels)" in rows and [as_json(ways)[name]["uses_labels"] for name in ways] == [False] * 3 + [
        True
    ]
    assert rows["main"][:2] == ["3", "50.2 ± 0.0"] and rows["main"][-2:] == ["1", "0"]
    assert rows["paper"][:2] == ["1", "46.7"] and rows["paper"][-2:] == ["0", "1"]


def test_the_spread_is_the_samples() -> None:
    ways = pooled({seed: {"main": changed(0.0, sw)} for seed, sw in ((1, 0.0), (2, 0.3))}, 0.05)
    (main,) = (row for row in seeds_table(ways).rows if row.cells[0] == "main")
    assert main.cells[2] == "55.0 ± 7.1"  # averages 50 and 60
    assert as_json(ways)["main"]["average"] == pytest.approx([0.5, 0.6])


def test_what_is_written_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a seed that is not evaluated yet nothing is said; none at all is an error."""
    task = {"fields": ["text"], "template": "{text}", "labels": ["x", "y"]}
    value = {"task": task, "data": {"directory": "data"}, "model": {"path": "model"}}
    configs = {
        seed: Config.model_validate(value | {"run_dir": str(tmp_path / f"seed-{seed}"), "seed": seed})
        for seed in (1, 2)
    }
    with pytest.raises(Exception, match=r"holds no evaluation yet; `alsace run --seeds` makes them"):
        report_seeds(tmp_path, configs)
    write_evaluation(Layout(Path(configs[2].run_dir)).evaluation, changed(0.1, 0.1), {}, 10)
    report_seeds(tmp_path, configs)
    assert capsys.readouterr().out.startswith("Seeds 2: mean ± standard deviation, in percent;")
    assert json.loads((tmp_path / "seeds.json").read_text())["main"]["seeds"] == [2]
    assert "| **main** | **1** |" in (tmp_path / "seeds.md").read_text()
