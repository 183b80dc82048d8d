"""``task.candidate_score`` and ``model.masks`` against plain transformers, in all families; no score depends on what a
row stands beside, nor on the order of its candidates."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import small_t5gemma2, small_xlmr
from transformers import MT5ForConditionalGeneration

from alsace_dist.config import EngineConfig, TaskConfig
from alsace_dist.data.rows import EncodedRow, answers_of, rows_of
from alsace_dist.errors import UserError
from alsace_dist.files.shards import ParallelGroup
from alsace_dist.models.family import Family, Options, open_model
from alsace_dist.ranks.group import Ranks
from alsace_dist.training.engine import load_module

CPU = torch.device("cpu")
RANKS = Ranks(0, 1, 0, CPU, None)
ENGINE = EngineConfig(zero_stage=0, dtype="fp32")
SCORES = ("sum", "mean", "pmi", "mean_pmi")
# In words that both small models know.
OWN = [("yes", "no"), ("at all", "ja", "nein yes no"), ("all", "no at"), ("yes at", "nein", "all no", "ja")]
TEXTS = ["ja nein", "yes no at all no no", "at", "no no ja"]


def task_of(kind: str, gap: str, **more: Any) -> TaskConfig:
    """Candidates of the groups' own, after a prompt that ends with the gap; the context-free one says nothing else."""
    context_free = {"context_free_template": f"at all{gap}"} if "pmi" in kind else {}
    base = {"fields": ["text"], "template": f"{{text}} at{gap}", "labels": [], "candidates": "own"}
    base["max_tokens"] = 24
    return TaskConfig.model_validate(base | context_free | {"candidate_score": kind} | more)


def groups_of(own: Sequence[tuple[str, ...]] = OWN) -> list[ParallelGroup]:
    return [
        ParallelGroup(f"g{number}", None, {"en": {"text": text}}, {"en": candidates})
        for number, (text, candidates) in enumerate(zip(TEXTS, own, strict=True))
    ]


@torch.no_grad()
def score(model: Family, rows: Sequence[EncodedRow]) -> torch.Tensor:
    module = load_module(model, 0.0, ENGINE, RANKS).eval()
    found: torch.Tensor = module(*model.collate(rows).to(CPU))
    return found


def combined(kind: str, own: list[torch.Tensor], context_free: list[torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of candidates from those of their tokens, in the prompt and without context."""

    def one(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.mean() if kind.startswith("mean") else tokens.sum()

    values = [one(tokens) for tokens in own]
    if "pmi" in kind:
        values = [value - one(tokens) for value, tokens in zip(values, context_free, strict=True)]
    return torch.log_softmax(torch.stack(values), dim=0)


# --- each family -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def decoder_tokens(plain: Any, model: Any, row: EncodedRow, ids: Sequence[int]) -> list[torch.Tensor]:
    """Log-probabilities of each candidate's tokens after a prompt, one forward per candidate."""
    found = []
    for tokens in row.candidates.tokens:
        prefix = list(model.form.decoder_prefix)
        decoder = torch.tensor([[*prefix, *tokens[:-1]]])
        logits = plain(input_ids=torch.tensor([list(ids)]), decoder_input_ids=decoder).logits[0].double()
        log_probs = torch.log_softmax(logits, dim=-1)[len(prefix) - 1 :]
        found.append(log_probs[torch.arange(len(tokens)), torch.tensor(tokens)])
    return found


@torch.no_grad()
def cloze_tokens(plain: Any, model: Any, row: EncodedRow, ids: Sequence[int], masks: str) -> list[torch.Tensor]:
    """The same at masks, one forward for each token where they are filled left to right."""
    mask = model.tokenizer.mask_token_id
    at, found = list(ids).index(mask), []
    for tokens in row.candidates.tokens:
        values = []
        for place, token in enumerate(tokens):
            filled = list(tokens[:place]) if masks == "left_to_right" else [mask] * place
            sequence = [*ids[:at], *filled, *[mask] * (len(tokens) - place), *ids[at + 1 :]]
            logits = plain(input_ids=torch.tensor([sequence])).logits[0].double()
            values.append(torch.log_softmax(logits, dim=-1)[at + place, token])
        found.append(torch.stack(values))
    return found


@pytest.mark.parametrize("kind", SCORES)
def test_mt5(directory: Path, reference: MT5ForConditionalGeneration, kind: str) -> None:
    task = task_of(kind, "")
    model = open_model(directory, answers_of(task, ["en"]))
    rows = model.encode(rows_of(task, groups_of(), ["en"]))
    for row, result in zip(rows, score(model, rows), strict=True):
        own = decoder_tokens(reference, model, row, row.input_ids)
        free = decoder_tokens(reference, model, row, row.context_free_ids) if "pmi" in kind else []
        expected = combined(kind, own, free)
        torch.testing.assert_close(result[: len(expected)].double(), expected, rtol=0, atol=1e-5)
        assert (result[len(expected) :] == -torch.inf).all()


@pytest.mark.parametrize("kind", SCORES)
def test_t5gemma2(tmp_path: Path, kind: str) -> None:
    plain, task = small_t5gemma2.make_model(small_t5gemma2.make_config()), task_of(kind, " {answer}")
    model = open_model(small_t5gemma2.write_model(tmp_path, plain), answers_of(task, ["en"]))
    rows = model.encode(rows_of(task, groups_of(), ["en"]))
    for row, result in zip(rows, score(model, rows), strict=True):
        own = decoder_tokens(plain, model, row, row.input_ids)
        free = decoder_tokens(plain, model, row, row.context_free_ids) if "pmi" in kind else []
        expected = combined(kind, own, free)
        torch.testing.assert_close(result[: len(expected)].double(), expected, rtol=0, atol=2e-5)
        assert (result[len(expected) :] == -torch.inf).all()


@pytest.mark.parametrize("masks", ["together", "left_to_right"])
@pytest.mark.parametrize("kind", SCORES)
def test_xlmr(tmp_path: Path, kind: str, masks: Any) -> None:
    plain, task = small_xlmr.make_model("cloze", small_xlmr.make_config()), task_of(kind, " {answer}")
    model = open_model(small_xlmr.write_model(tmp_path, plain), answers_of(task, ["en"]), Options(masks=masks))
    rows = model.encode(rows_of(task, groups_of(), ["en"]))
    for row, result in zip(rows, score(model, rows), strict=True):
        own = cloze_tokens(plain, model, row, row.input_ids, masks)
        free = cloze_tokens(plain, model, row, row.context_free_ids, masks) if "pmi" in kind else []
        expected = combined(kind, own, free)
        torch.testing.assert_close(result[: len(expected)].double(), expected, rtol=0, atol=1e-5)


def test_masks_that_are_filled_left_to_right_say_something_else(tmp_path: Path) -> None:
    task = task_of("sum", " {answer}")
    directory = small_xlmr.write_model(tmp_path, small_xlmr.make_model("cloze", small_xlmr.make_config()))
    found = {}
    for masks in ("together", "left_to_right"):
        model = open_model(directory, answers_of(task, ["en"]), Options(masks=masks))  # type: ignore[arg-type]
        rows = model.encode(rows_of(task, groups_of(), ["en"]))
        found[masks] = score(model, rows)
    assert (found["together"][1, :3] - found["left_to_right"][1, :3]).abs().max() > 0.05
    torch.testing.assert_close(found["together"][0], found["left_to_right"][0])  # of one token each


def test_fixed_answers_of_one_length_take_a_part_of_the_vocabulary_only_where_a_constant_cancels(
    tmp_path: Path,
) -> None:
    directory = small_xlmr.write_model(tmp_path, small_xlmr.make_model("cloze", small_xlmr.make_config()))
    more = {"candidates": [], "labels": ["a", "b"], "verbalizers": ["at all", "no yes"]}
    for kind in SCORES:
        task = task_of(kind, " {answer}", **more)
        assert open_model(directory, answers_of(task, ["en"])).num_head_rows == 4
        assert open_model(directory, answers_of(task, ["en"]), Options(masks="left_to_right")).num_head_rows is None


# --- nothing depends on what a row stands beside ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("family", ["mt5", "mt5 fixed", "together", "left_to_right", "t5gemma2", "t5gemma2 fixed"])
def test_neither_batch_size_nor_any_order_changes_a_score(
    tmp_path: Path, directory: Path, family: str, kind: str
) -> None:
    """In batches of 1 and 32, rows and candidates in reverse."""
    options = Options()
    if family in ("together", "left_to_right"):
        plain = small_xlmr.make_model("cloze", small_xlmr.make_config())
        directory, gap = small_xlmr.write_model(tmp_path, plain), " {answer}"
        options = Options(masks=family)  # type: ignore[arg-type]
    else:
        gap = ""
        if family.startswith("t5gemma2"):
            directory = small_t5gemma2.write_model(tmp_path, small_t5gemma2.make_model(small_t5gemma2.make_config()))
    if family.endswith("fixed"):
        task = task_of(kind, gap, candidates=[], labels=["a", "b", "c"], verbalizers=["yes", "no", "ja"])
        turned_task = task_of(kind, gap, candidates=[], labels=["a", "b", "c"], verbalizers=["ja", "no", "yes"])
    else:
        task = turned_task = task_of(kind, gap)
    groups = [
        replace(group, key=f"{group.key}/{number}", texts={"en": {"text": text + " at" * (number % 5)}})
        for number in range(8)
        for group, text in zip(groups_of(), TEXTS, strict=True)
    ]
    turned = [ParallelGroup(group.key, None, group.texts, {"en": group.candidates["en"][::-1]}) for group in groups]
    model = open_model(directory, answers_of(task, ["en"]), options)
    rows = model.encode(rows_of(task, groups, ["en"]))
    assert len(rows) == 32
    together = score(model, rows)
    alone = [score(model, [row])[0] for row in rows]
    other = open_model(directory, answers_of(turned_task, ["en"]), options)
    backwards = score(other, other.encode(rows_of(turned_task, turned, ["en"]))[::-1]).flip(0)
    for row, one, two, three in zip(rows, together, alone, backwards, strict=True):
        size = len(row.candidates)
        torch.testing.assert_close(one[:size], two, rtol=0, atol=1e-5)
        torch.testing.assert_close(one[:size], three[:size].flip(0), rtol=0, atol=1e-5)
        assert torch.isfinite(two).all() and (one[size:] == -torch.inf).all()


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"candidate_score": "pmi"}, "context_free_template is needed with candidate_score: pmi or mean_pmi"),
        (
            {"context_free_template": "is it"},
            "context_free_template is only used with candidate_score: pmi",
        ),
        ({"candidate_score": "pmi", "context_free_template": "{other}"}, r"context_free_template for default must use"),
    ],
)
def test_settings_that_do_not_fit(task: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TaskConfig.model_validate({"fields": ["text"], "template": "{text}", "labels": ["a", "b"]} | task)


def test_what_a_model_does_not_have(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(UserError, match=r"model\.masks: mT5 fills no masks; remove it"):
        open_model(directory, answers_of(task_of("sum", ""), ["en"]), Options(masks="left_to_right"))
    head = small_xlmr.write_model(tmp_path, small_xlmr.make_model("head", small_xlmr.make_config(num_labels=2)))
    base = {"fields": ["text"], "template": "{text}", "labels": ["a", "b"], "max_tokens": 24}
    with pytest.raises(UserError, match=r"model\.masks: is how a cloze is filled"):
        open_model(head, answers_of(TaskConfig.model_validate(base), ["en"]), Options(masks="left_to_right"))
    by_token = TaskConfig.model_validate(base | {"candidate_score": "mean"})
    with pytest.raises(UserError, match=r"task\.candidate_score: a head gives a candidate one number"):
        open_model(head, answers_of(by_token, ["en"]))
