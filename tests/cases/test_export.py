"""A model for other people: a directory that transformers loads, and a card; and why its teachers taught."""

import torch
import yaml
from cases.case import Case
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer


def test_what_is_exported_is_the_runs_model_with_its_card(case: Case) -> None:
    case.finish()
    done = case.done("export", "run", "out/model")
    assert done.stdout.startswith("wrote out/model: from_pretrained loads it")
    out, own = case / "out/model", case / "run/round1/distill/model"
    assert {path.name for path in out.iterdir()} == {path.name for path in own.iterdir()} | {"README.md"}
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    assert len(AutoTokenizer.from_pretrained(out)) > 10
    stored = load_file(own / "model.safetensors")
    assert torch.equal(model.state_dict()["lm_head.weight"], stored["lm_head.weight"])
    card = (out / "README.md").read_text()
    _, metadata, body = card.split("---\n", 2)
    report = yaml.safe_load((case / "run/report.json").read_text())
    assert yaml.safe_load(metadata)["language"] == sorted(report["languages"])
    for words in ("Teachers: ", "| Language |", "Average over languages", "- data, split unlabeled: `", "method: "):
        assert words in body, words
    assert str(case.directory) not in card.replace(str(case / "model"), "")


def test_what_is_not_exported(case: Case) -> None:
    case.finish()
    case.put("taken/notes.txt")
    case.refused("export", "run", "taken", says=("taken: is there already", "choose another directory"))
    case.refused("export", "run", "out", "--variant=nope", says="variants.nope: no such variant")
    model = case / "run/round1/distill/model/model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    case.refused("export", "run", "out", says=("model.safetensors: content differs from the sha256", "restore it"))
    (case / "run/evaluation/manifest.json").unlink()
    case.refused("export", "run", "out", says="run/evaluation: not complete; `alsace run` goes on with it", code=2)
    assert not list(case.directory.glob("*out*"))  # nor a part of it under another name


def test_a_selection_is_explained(case: Case) -> None:
    case.finish()
    done = case.done("select", "run.yaml", "--round=1", "--explain")
    assert "| Language | Role | Score | Rank (95 %) | Teaches |" in done.stdout
    assert "Share of groups in which two languages give the same answer" in done.stdout
