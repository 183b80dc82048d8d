"""XLM-R with a multiple-choice head: against plain transformers, in files, and where it does not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.small_xlmr import END, PAD, XL, make_config, make_model, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultipleChoice, XLMRobertaForMultipleChoice, XLMRobertaXLForMultipleChoice

from alsace_dist.config import EngineConfig, TaskConfig
from alsace_dist.data.rows import Answers, EncodedRow, Part, Row, answers_of
from alsace_dist.errors import UserError
from alsace_dist.models.family import Options, open_model
from alsace_dist.ranks.group import Ranks
from alsace_dist.training.engine import load_module

CPU = torch.device("cpu")
RANKS = Ranks(0, 1, 0, CPU, None)
ENGINE = EngineConfig(zero_stage=0, dtype="fp32")
TEXTS = ["word text", "Was it all text? word", "是"]
# Each row's own, in different numbers and lengths.
CHOICES = [("yes", "no it is"), ("maybe", "not at all", "no"), ("text word", "yes")]


def make_plain(model_type: str = "xlm-roberta", seed: int = 0) -> Any:
    """A plain transformers model whose weights are large enough for scores that differ."""
    torch.manual_seed(seed)
    kind = XLMRobertaXLForMultipleChoice if model_type == XL else XLMRobertaForMultipleChoice
    model = kind(make_config(model_type)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def own_answers(max_tokens: int = 20) -> Answers:
    task = TaskConfig(
        fields=["text", "a", "b"],
        template="{text}",
        labels=["0", "1"],
        candidates=["a", "b"],
        max_tokens=max_tokens,
    )
    return answers_of(task, ["en"])


def encoded(model: Any) -> list[EncodedRow]:
    rows = [
        Row(f"g{index}", "en", None, (Part(text, True),), choices)
        for index, (text, choices) in enumerate(zip(TEXTS, CHOICES, strict=True))
    ]
    found: list[EncodedRow] = model.encode(rows)
    return found


@torch.no_grad()
def score(model: Any, rows: list[EncodedRow]) -> torch.Tensor:
    module = load_module(model, 0.0, ENGINE, RANKS).eval()
    found: torch.Tensor = module(*model.collate(rows).to(CPU))
    assert found.dtype == torch.float32
    return found


def logits_of(plain: Any, model: Any, row: EncodedRow) -> torch.Tensor:
    """What transformers makes of a row: the prompt with each candidate as a second text."""
    texts = [[*row.input_ids, END, *candidate, END] for candidate in row.candidates.tokens]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [PAD] * (longest - len(text)) for text in texts])
    found: torch.Tensor = plain(input_ids=ids[None], attention_mask=(ids != PAD).long()[None]).logits[0]
    return found


@pytest.mark.parametrize("model_type", ["xlm-roberta", XL])
def test_scores_are_those_of_transformers(tmp_path: Path, model_type: str) -> None:
    plain = make_plain(model_type)
    model = open_model(write_model(tmp_path, plain), own_answers(), Options("head"))
    assert (model.mode, model.num_head_rows) == ("head", 1) and model.check_weights() == []
    assert model.answers_in_words == "by a multiple-choice head over the first token"
    rows = encoded(model)
    inputs = model.collate(rows)
    assert sum(map(model.num_tokens, rows)) == inputs.num_tokens[0]  # what batches are cut by is what they hold
    scored = score(model, rows)
    assert scored.shape == (3, 3) and torch.isinf(scored[0, 2]) and torch.isinf(scored[2, 2])
    for row, result in zip(rows, scored, strict=True):
        expected = torch.log_softmax(logits_of(plain, model, row).detach(), dim=-1)
        torch.testing.assert_close(result[: len(expected)], expected, rtol=0, atol=1e-5)
        alone = score(model, [row])[0]
        torch.testing.assert_close(alone, result[: len(alone)], rtol=0, atol=1e-5)


def test_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    plain = make_plain()
    model = open_model(write_model(tmp_path, plain), own_answers(), Options("head"))
    rows = encoded(model)
    sum(-torch.log_softmax(logits_of(plain, model, row), dim=-1)[1] for row in rows).backward()  # type: ignore[union-attr]
    module = load_module(model, 0.0, ENGINE, RANKS).train()
    (-module(*model.collate(rows).to(CPU))[:, 1].sum()).backward()
    expected = {name: value.grad for name, value in plain.named_parameters()}
    for name, parameter in module.named_parameters():
        (key,) = model.exported(name, model.initial_value(name))
        assert parameter.grad is not None
        gradient = expected[key]
        assert gradient is not None
        if name.endswith("word_embeddings.weight"):  # transformers gives the padding's embedding no gradient
            gradient[PAD] = parameter.grad[PAD] = 0.0
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_what_is_exported_is_loaded_by_transformers(tmp_path: Path) -> None:
    """From a masked language model, whose own pooler belongs to nothing: a new head, the same for a seed."""
    source = write_model(tmp_path / "source", make_model("cloze", make_config()))
    model = open_model(source, own_answers(), Options("head", seed=3))
    assert model.check_weights(may_be_new=True) == []
    with pytest.raises(
        UserError, match=r"has no multiple-choice head \(classifier\.\*, roberta\.pooler\.\*\), and a new"
    ):
        model.check_weights()
    module = load_module(model, 0.0, ENGINE, RANKS)
    tensors = {
        key: tensor.clone()
        for name, parameter in module.named_parameters()
        for key, tensor in model.exported(name, parameter.detach()).items()
    }
    out = write_model(tmp_path / "out", make_model("cloze", make_config()), tensors)
    config = json.loads((out / "config.json").read_text()) | dict(model.config_changes)
    (out / "config.json").write_text(json.dumps(config))
    assert config["architectures"] == ["XLMRobertaForMultipleChoice"]
    plain, told = AutoModelForMultipleChoice.from_pretrained(out, output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    again = open_model(out, own_answers(), Options("head"))
    assert again.check_weights() == []
    rows = encoded(again)
    for row, result in zip(rows, score(again, rows), strict=True):
        expected = torch.log_softmax(logits_of(plain.eval(), again, row).detach(), dim=-1)
        torch.testing.assert_close(result[: len(expected)], expected, rtol=0, atol=1e-5)


def test_heads_and_budgets_that_do_not_fit(tmp_path: Path) -> None:
    directory = write_model(tmp_path, make_plain())
    tight = open_model(directory, own_answers(max_tokens=28), Options("head"))
    with pytest.raises(
        UserError, match=r"leaves no room for a candidate of 3 tokens behind the prompt; lower it to 27"
    ):
        encoded(tight)
    tensors = load_file(directory / "model.safetensors")
    tensors["classifier.weight"], tensors["classifier.bias"] = torch.zeros(4, 16), torch.zeros(4)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model = open_model(directory, own_answers(), Options("head"))
    assert model.check_weights(may_be_new=True) == [
        f"{directory}: has a head with 4 outputs, and choices need one; finetuning starts with a new one"
    ]
    with pytest.raises(UserError, match=r"task\.candidate_score: a head gives a candidate one number"):
        task = TaskConfig(
            fields=["text", "a", "b"],
            template="{text}",
            labels=["0", "1"],
            candidates=["a", "b"],
            candidate_score="mean",
        )
        open_model(directory, answers_of(task, ["en"]), Options("head"))
