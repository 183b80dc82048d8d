"""The ablation: its configs and variants are valid for every corpus, and its table says what the reports hold."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from alsace_dist.config_file import load_config, variant

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ablation


@pytest.mark.parametrize("corpus", ablation.CORPORA)
def test_every_variant_is_valid_on_every_corpus(corpus: str) -> None:
    path, overrides = ablation.CORPORA[corpus]
    variants = yaml.safe_load(ablation.VARIANTS.read_text())
    config = load_config(path, {"run_dir": "x", "seed": 3, "variants": variants} | overrides)
    resolved = [variant(config, name).model_dump(exclude={"variants"}) for name in variants]
    assert all(one != other for number, one in enumerate(resolved) for other in resolved[:number])
    assert config.model_dump(exclude={"variants"}) not in resolved  # the default is not among them


def metrics(before: float, after: float, p_value: float) -> dict[str, Any]:
    """A report in which French goes from ``before`` to ``after`` and English stays at 0.8."""
    languages = {
        "en": {"before": 0.8, "after": 0.8, "p_value": 1.0},
        "fr": {"before": before, "after": after, "p_value": p_value},
    }
    value: dict[str, Any] = {"source_language": "en", "languages": languages, "average": {}, "gap": {}, "worst": {}}
    for when, french in (("before", before), ("after", after)):
        value["average"][when], value["gap"][when] = (0.8 + french) / 2, 0.8 - french
        value["worst"][when] = {"language": "fr", "accuracy": french}
    return value


def test_the_table_has_means_over_the_seeds_and_sums_of_significant_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablation, "RESULTS", tmp_path)
    for seed, after in ((0, 0.6), (1, 0.7)):
        report = metrics(0.4, after, 0.001) | {"variants": {"paper": metrics(0.4, 0.2, 0.04 + seed)}}
        (tmp_path / f"demo-{seed}.json").write_text(json.dumps(report))
    ablation.print_table("demo")
    rows = capsys.readouterr().out.splitlines()
    assert rows[-3:] == [
        "| before | 80.0 | 60.0 | 40.0 | 40.0 |  |",
        "| default | 80.0 | 72.5 | 15.0 | 65.0 | 2 / 0 |",
        "| paper | 80.0 | 50.0 | 60.0 | 20.0 | 0 / 1 |",
    ]
    ablation.print_table("debian-weak")
    assert capsys.readouterr().out == "debian-weak: nothing collected yet\n"
