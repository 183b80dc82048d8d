"""A new language model: its loss is that of transformers, its head is its own, its start depends on the seed alone."""

import math
from pathlib import Path

import pytest
import torch
from models.small_mt5 import END, PAD, VOCABULARY, full_log_probs, prompts
from transformers import MT5ForConditionalGeneration

from alsace_dist.models.mt5 import HEAD, load_config, make_body
from alsace_dist.models.nano import LanguageModel, initialise
from alsace_dist.models.weights import Weights


def test_language_model_loss_is_that_of_transformers(directory: Path, reference: MT5ForConditionalGeneration) -> None:
    module = LanguageModel(make_body(load_config(directory), 0.0)).eval()
    weights = Weights(directory)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights.tensor(HEAD if name == "head.weight" else name.removeprefix("body.")))
    targets = [[5, 6, 7, END], [9, END]]
    decoder = torch.tensor([[PAD, 5, 6, 7], [PAD, 9, PAD, PAD]])
    labels = torch.tensor([targets[0], [*targets[1], -100, -100]])
    rows = prompts([5, 3])
    ids = torch.tensor([rows[0], [*rows[1], PAD, PAD]])
    with torch.no_grad():
        losses = module(ids, (torch.tensor([[1] * 6, [1] * 4 + [0] * 2])), decoder, labels)
    for row, target, loss in zip(rows, targets, losses, strict=True):
        steps = full_log_probs(reference, row, [PAD, *target[:-1]])
        expected = -sum(step[token] for step, token in zip(steps, target, strict=True)) / len(target)
        assert loss.item() == pytest.approx(float(expected), abs=1e-5)


def new_model(directory: Path, seed: int) -> LanguageModel:
    module = LanguageModel(make_body(load_config(directory), 0.0)).eval()
    initialise(module, seed)
    return module


def test_a_new_model_starts_at_the_loss_of_guessing_with_a_head_of_its_own(directory: Path) -> None:
    module = new_model(directory, 0)
    ids, labels = torch.tensor(prompts([20] * 8)), torch.tensor(prompts([6] * 8))
    decoder = torch.cat([torch.zeros(8, 1, dtype=torch.long), labels[:, :-1]], dim=1)
    with torch.no_grad():
        loss = module(ids, torch.ones_like(ids), decoder, labels).mean().item()
    assert loss == pytest.approx(math.log(VOCABULARY), rel=0.25)
    assert not torch.equal(module.head.weight, module.body.shared.weight)


def test_a_new_model_depends_on_the_seed_and_on_nothing_else(directory: Path) -> None:
    models = []
    for seed, before in ((0, 1), (0, 2), (3, 2)):
        torch.manual_seed(before)
        models.append(dict(new_model(directory, seed).named_parameters()))
    for name, parameter in models[0].items():
        assert torch.equal(parameter, models[1][name])
        assert "layer_norm" in name or not torch.equal(parameter, models[2][name])
