"""The candidate scorer against plain transformers, rows with unequal numbers of candidates, weights that do not fit."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.small_mt5 import END, PAD, VOCABULARY, full_log_probs, make_state, prompts, text_of, write_model
from safetensors.torch import load_file, save_file
from transformers import MT5ForConditionalGeneration

from alsace_dist.config import EngineConfig, TaskConfig
from alsace_dist.data.rows import Answers, EncodedRow, Example, answers_of
from alsace_dist.errors import UserError
from alsace_dist.models.decoding import CandidateForm
from alsace_dist.models.mt5 import HEAD, MT5, CandidateScorer, make_body
from alsace_dist.ranks.group import Ranks
from alsace_dist.training.engine import load_module
from alsace_dist.training.losses import FrozenTargetLoss

CPU = torch.device("cpu")
RANKS = Ranks(0, 1, 0, CPU, None)
ENGINE = EngineConfig(zero_stage=0, dtype="fp32")

Tokens = Mapping[str, tuple[tuple[int, ...], ...]]  # language -> candidates as tokens
TWO: Tokens = {"en": ((30,), (4,))}


def model_of(directory: Path, tokens: Tokens, prefix: Sequence[int] = (PAD,)) -> MT5:
    """The model with these candidates, and with this prefix for the decoder."""
    texts = {language: tuple(text_of(row) for row in rows) for language, rows in tokens.items()}
    every = tuple(text for row in texts.values() for text in row)
    return MT5(directory, Answers(texts, every, text_of(prefix[1:]), max_tokens=512))


def encoded(model: MT5, rows: list[list[int]], languages: list[str]) -> list[EncodedRow]:
    """Rows with these prompts, each with the candidates of its language."""
    fixed = model.answers.fixed
    return [
        EncodedRow(f"g{index}", language, None, ids, model.candidates(fixed[language], language), 0, False)
        for index, (ids, language) in enumerate(zip(rows, languages, strict=True))
    ]


def scorer(model: MT5) -> CandidateScorer:
    module = load_module(model, 0.0, ENGINE, RANKS).eval()
    assert isinstance(module, CandidateScorer)
    return module


@torch.no_grad()
def score(model: MT5, rows: list[list[int]], languages: list[str]) -> torch.Tensor:
    found: torch.Tensor = scorer(model)(*model.collate(encoded(model, rows, languages)).to(CPU))
    return found


# --- scores --------------------------------------------------------------------------------------------------------

LANGUAGES = ["en", "de", "de", "en", "xx", "de"]


@pytest.mark.parametrize("prefix", [(PAD,), (PAD, 5, 7)], ids=["start", "prefix"])
def test_single_tokens_get_the_full_softmax_renormalised_over_the_candidates(
    directory: Path, reference: MT5ForConditionalGeneration, prefix: tuple[int, ...]
) -> None:
    tokens = {"en": ((30,), (4,), (17,)), "de": ((8,), (4,), (39,)), "xx": ((4,), (30,), (8,))}
    model = model_of(directory, tokens, prefix)
    assert scorer(model).head.weight.shape == (5, 16)  # the rows that occur, and no other
    found = score(model, prompts(), LANGUAGES)
    for row, language, result in zip(prompts(), LANGUAGES, found, strict=True):
        whole = full_log_probs(reference, row, prefix)[-1]
        chosen = torch.stack([whole[token] for (token,) in tokens[language]])
        torch.testing.assert_close(result.double(), chosen - chosen.logsumexp(0), rtol=0, atol=1e-5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(6))
    assert (found[:, 0] - found[:, 1]).abs().max() > 0.5  # the head's own rows, not the embedding's, tell them apart


SEQUENCES = {
    "en": ((30, END), (30, 4, END), (17, 9, 5, END)),  # the first is the beginning of the second
    "de": ((8, 8, END), (4, END), (39, 3, END)),
    "xx": ((3, END), (4, END), (5, END)),
}


@pytest.mark.parametrize("prefix", [(PAD,), (PAD, 5, 7)], ids=["start", "prefix"])
def test_several_tokens_get_the_likelihood_of_the_whole_sequence_with_its_end(
    directory: Path, reference: MT5ForConditionalGeneration, prefix: tuple[int, ...]
) -> None:
    found = score(model_of(directory, SEQUENCES, prefix), prompts(), LANGUAGES)
    for row, language, result in zip(prompts(), LANGUAGES, found, strict=True):
        sums = []
        for answer in SEQUENCES[language]:
            steps = full_log_probs(reference, row, [*prefix, *answer[:-1]])[len(prefix) - 1 :]
            assert len(steps) == len(answer)
            sums.append(sum(step[token] for step, token in zip(steps, answer, strict=True)))
        expected = torch.log_softmax(torch.stack(sums), dim=0)
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-5)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("single", [True, False])
def test_neither_padding_nor_neighbours_change_a_row(directory: Path, single: bool) -> None:
    tokens = {name: tuple(row[:1] for row in rows) for name, rows in SEQUENCES.items()} if single else SEQUENCES
    tokens = tokens | {"en": ((30,), (4,), (17,))} if single else tokens
    model = model_of(directory, tokens)
    assert model.is_single_token == single
    together = score(model, prompts(), LANGUAGES)
    for index, (row, language) in enumerate(zip(prompts(), LANGUAGES, strict=True)):
        torch.testing.assert_close(score(model, [row], [language])[0], together[index], rtol=0, atol=1e-5)
    longer = score(model, [*prompts(), *prompts([30])], [*LANGUAGES, "en"])
    torch.testing.assert_close(longer[:-1], together, rtol=0, atol=1e-5)


def test_a_checkpoint_that_was_saved_tied_scores_with_its_embedding(tmp_path: Path) -> None:
    tied = write_model(tmp_path / "tied", make_state(tied=True)[1])
    plain = MT5ForConditionalGeneration.from_pretrained(tied).eval()
    found = score(model_of(tied, TWO), prompts(), ["en"] * 6)
    for row, result in zip(prompts(), found, strict=True):
        whole = full_log_probs(plain, row, [PAD])[-1][[30, 4]]
        torch.testing.assert_close(result.double(), whole - whole.logsumexp(0), rtol=0, atol=1e-5)


def test_the_gradient_reaches_every_parameter(directory: Path) -> None:
    for tokens in (TWO, {"en": ((30, END), (4, 5, END))}):
        model = model_of(directory, tokens)
        module = scorer(model).train()
        inputs = model.collate(encoded(model, prompts(), ["en"] * 6))
        module(*inputs.to(CPU))[:, 0].sum().backward()
        without = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        # With the start token alone, self-attention of the decoder sees one position: its softmax is constant.
        constant = ("SelfAttention.q.", "SelfAttention.k.", "SelfAttention.relative_attention_bias.")
        allowed = [name for name in without if model.is_single_token and ".decoder." in f".{name}"]
        assert without == [name for name in allowed if any(part in name for part in constant)]


@pytest.mark.parametrize("tokens", [TWO, SEQUENCES], ids=["single", "sequences"])
def test_parameters_start_with_the_values_of_the_file_whole_or_in_parts(directory: Path, tokens: Tokens) -> None:
    model = model_of(directory, tokens)
    stored = load_file(directory / "model.safetensors")
    for name, parameter in scorer(model).named_parameters():
        value = stored[HEAD][model.head_rows or slice(None)] if name == "head.weight" else stored[name[len("body.") :]]
        assert torch.equal(parameter, value)
        assert torch.equal(model.initial_value(name), value)
        assert torch.equal(model.initial_value(name, slice(1, 9)), value[1:9])


# --- rows with different numbers of candidates ---------------------------------------------------------------------

UNEQUAL: dict[str, Tokens] = {
    "single": {"en": ((30,), (4,), (17,)), "de": ((8,), (4,)), "xx": ((4,), (30,), (8,), (39,), (5,)), "yy": ((12,),)},
    "sequences": {
        "en": ((30, END), (30, 4, END), (17, 9, 5, END)),
        "de": ((8, 8, END), (4, END)),
        "xx": ((3, END), (4, END), (5, END), (6, 5, 4, 3, 8, END), (7, 3, END)),
        "yy": ((12, 13, END),),
    },
}
MIXED = ["en", "de", "xx", "en", "yy", "de"]
form = pytest.mark.parametrize("form", UNEQUAL)


def examples_of(rows: Sequence[EncodedRow]) -> list[Example]:
    """Soft targets, but for a one-hot one, and for the last, which is that of a group without teachers."""
    rng = np.random.default_rng(2)
    targets = [rng.dirichlet(np.ones(len(row.candidates))).astype(np.float32) for row in rows]
    targets[3] = np.array([0, 1, 0], dtype=np.float32)
    examples = [Example(row, targets[index], 0.5 + index, 0.1 * index) for index, row in enumerate(rows)]
    return [*examples[:-1], Example(rows[-1], np.zeros(1, dtype=np.float32), 0.0, 0.0)]


@form
@pytest.mark.parametrize("prefix", [(PAD,), (PAD, 5, 7)], ids=["start", "prefix"])
def test_a_row_scores_the_same_beside_rows_with_more_candidates(
    directory: Path, form: str, prefix: tuple[int, ...]
) -> None:
    model = model_of(directory, UNEQUAL[form], prefix)
    assert model.is_single_token == (form == "single")
    together = score(model, prompts(), MIXED)
    assert together.shape == (6, 5)
    for row, language, result in zip(prompts(), MIXED, together, strict=True):
        (alone,) = score(model, [row], [language])
        size = len(UNEQUAL[form][language])
        assert alone.shape == (size,)
        torch.testing.assert_close(result[:size], alone, rtol=0, atol=1e-5)
        assert alone.exp().sum().item() == pytest.approx(1, abs=1e-5)
        assert (result[size:] == -torch.inf).all()


def test_sequences_that_no_fixed_answer_has_may_be_longer_than_all_of_them(
    directory: Path, reference: MT5ForConditionalGeneration
) -> None:
    model = model_of(directory, {"en": ((30, END), (30, 4, END))})
    own = ((9, 8, 7, 6, 5, 4, END), (11, END), (12, 13, END))
    long = EncodedRow("own", "en", None, prompts()[0], model.candidates(tuple(map(text_of, own)), "en"), 0, False)
    rows = [*encoded(model, prompts()[1:3], ["en", "en"]), long]
    with torch.no_grad():
        together = scorer(model)(*model.collate(rows).to(CPU))
        without = scorer(model)(*model.collate(rows[:2]).to(CPU))
    steps = [full_log_probs(reference, long.input_ids, [PAD, *answer[:-1]]) for answer in own]
    sums = [
        sum(step[token] for step, token in zip(s, answer, strict=True)) for s, answer in zip(steps, own, strict=True)
    ]
    torch.testing.assert_close(together[2].double(), torch.log_softmax(torch.stack(sums), dim=0), rtol=0, atol=2e-5)
    torch.testing.assert_close(together[:2, :2], without, rtol=0, atol=1e-5)
    assert (together[:2, 2] == -torch.inf).all()


@form
def test_candidates_that_a_row_lacks_have_no_part_in_loss_and_gradient(directory: Path, form: str) -> None:
    """Those of a mixed batch are the sums of those of its rows."""
    model = model_of(directory, UNEQUAL[form])
    module = scorer(model).train()
    examples = examples_of(encoded(model, prompts(), MIXED))

    def loss_and_gradients(batch: list[Example]) -> dict[str, torch.Tensor]:
        module.zero_grad()
        loss = FrozenTargetLoss(model.collate([example.row for example in batch]), batch, CPU)(module)["loss"]
        loss.backward()
        found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        return found | {"loss": loss.detach()}

    together = loss_and_gradients(examples)
    alone = [loss_and_gradients([example]) for example in examples]
    assert together["loss"] > 1 and together["head.weight"].abs().max() > 0.1
    for name, value in together.items():
        assert torch.isfinite(value).all(), name
        torch.testing.assert_close(value, sum(one[name] for one in alone), rtol=1e-4, atol=1e-5)


# --- a checkpoint that does not fit --------------------------------------------------------------------------------


def check(directory: Path, state: dict[str, torch.Tensor]) -> str:
    """The complaint about a model directory with these tensors, without the directory's name."""
    model = model_of(write_model(directory, state), TWO)
    with pytest.raises(UserError) as caught:
        model.check_weights()
    message = str(caught.value)
    assert message.startswith(f"{directory}: does not fit its config.json: ")
    assert message.endswith("; get a sound checkpoint")
    return message


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    norm, wo = "encoder.final_layer_norm.weight", "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    _, state = make_state()
    assert f": {norm} is missing;" in check(tmp_path / "a", {k: v for k, v in state.items() if k != norm})
    assert ": classifier.weight is not of this model;" in check(
        tmp_path / "b", state | {"classifier.weight": torch.ones(3)}
    )
    message = check(tmp_path / "c", state | {wo: torch.zeros(16, 25)})
    assert f": {wo} has shape (16, 25), not (16, 24);" in message
    assert f": {HEAD} has shape (41, 16), not (40, 16);" in check(tmp_path / "d", state | {HEAD: torch.zeros(41, 16)})
    several = {k: v for k, v in state.items() if k != norm} | {"x": torch.ones(3), wo: torch.zeros(1)}
    assert f": {norm} is missing; x is not of this model; {wo} has shape (1,), not (16, 24);" in check(
        tmp_path / "e", several
    )
    encoder_only = {k: v for k, v in state.items() if not k.startswith("decoder.")}
    message = check(tmp_path / "f", encoder_only)
    num_missing = len(state) - len(encoder_only)
    assert message.count("is missing") == 5 and f" and {num_missing - 5} more; " in message


def test_tensors_that_transformers_doubles_or_leaves_out_are_allowed(tmp_path: Path) -> None:
    _, state = make_state()
    extra = {f"{part}.embed_tokens.weight": state["shared.weight"].clone() for part in ("encoder", "decoder")}
    extra["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(32, 4)
    model = model_of(write_model(tmp_path, state | extra), TWO)
    assert extra.keys() <= model.weights.keys() and not extra.keys() & state.keys()
    model.check_weights()


# --- the form of the candidates ------------------------------------------------------------------------------------


def task(verbalizers: Any, **more: Any) -> TaskConfig:
    return TaskConfig(fields=["text"], template="{text}", labels=["a", "b"], verbalizers=verbalizers, **more)


def candidates_of(model: MT5) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The tokens that are scored, by language."""
    return {name: model.candidates(texts, name).tokens for name, texts in model.answers.fixed.items()}


def test_answers_of_one_token_each(directory: Path) -> None:
    section = task({"de": ["ja", "nein"], "default": ["no", "yes"]}, decoder_prefix="<x> at")
    model = MT5(directory, answers_of(section, ["en", "de"]))
    assert candidates_of(model) == {"en": ((4,), (3,)), "de": ((8,), (9,))}
    assert model.form == CandidateForm(True, (3, 4, 8, 9), (0, 10, 6), PAD)
    assert model.is_single_token and model.answers.num_candidates == 2
    assert model.head_rows == [3, 4, 8, 9]


def test_one_longer_answer_makes_all_of_them_end_with_the_end_token(directory: Path) -> None:
    section = task({"de": ["ja", "nein"], "en": ["yes", "not at all"]})
    model = MT5(directory, answers_of(section, ["en", "de"]))
    assert candidates_of(model) == {"en": ((3, 1), (5, 6, 7, 1)), "de": ((8, 1), (9, 1))}
    assert not model.is_single_token and model.head_rows is None
    assert model.form == CandidateForm(False, (), (0,), PAD, longest=4)


def test_how_answers_are_scored_does_not_depend_on_the_languages_at_hand(directory: Path) -> None:
    section = task({"de": ["ja", "not nein"], "en": ["yes", "no"]})
    whole = MT5(directory, answers_of(section, ["en", "de"]))
    assert MT5(directory, answers_of(section, ["en"])).is_single_token == whole.is_single_token


def test_candidates_that_come_with_each_row_are_scored_as_sequences(directory: Path) -> None:
    """Of candidates that are not known beforehand nobody can say that all of them are one token long."""
    model = MT5(directory, Answers({}, (), "", max_tokens=512))
    assert model.form == CandidateForm(False, (), (0,), PAD)
    assert model.candidates(("yes", "not at all"), "en").tokens == ((3, 1), (5, 6, 7, 1))
    assert scorer(model).head.weight.shape == (VOCABULARY, 16)


def test_an_unknown_decoder_prefix(directory: Path) -> None:
    with pytest.raises(UserError, match=r"^task\.decoder_prefix: 'huh' holds unknown tokens; choose another"):
        MT5(directory, answers_of(task(["yes", "no"], decoder_prefix="huh"), ["en"]))


def test_a_head_that_is_missing_is_the_embedding_only_where_the_config_lets_it_be(tmp_path: Path) -> None:
    """Released checkpoints say ``tie_word_embeddings: false``, and so does every export; a tied one has no head."""
    directory = write_model(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    del tensors[HEAD]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    for is_tied in (True, False):
        (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": is_tied}))
        model = model_of(directory, {"en": [[3], [4]]})
        if is_tied:
            model.check_weights()
            continue
        with pytest.raises(UserError, match=r"lm_head\.weight is missing, and config\.json says that it is not"):
            model.check_weights()


def test_the_activation_is_one_kernel_of_the_same_function() -> None:
    from transformers import MT5Config
    from transformers.activations import ACT2FN

    body = make_body(MT5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2), 0.0)
    activation, x = body.encoder.block[0].layer[1].DenseReluDense.act, torch.linspace(-8, 8, 1001)
    assert type(activation) is not type(ACT2FN["gelu_new"])
    assert torch.allclose(activation(x), ACT2FN["gelu_new"](x), atol=1e-6)


def test_norms_are_one_kernel_of_the_same_function() -> None:
    from transformers import MT5Config
    from transformers.models.mt5.modeling_mt5 import MT5LayerNorm

    geometry = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    body = make_body(MT5Config(**geometry, layer_norm_epsilon=0.3), 0.0)
    assert not any(isinstance(one, MT5LayerNorm) for one in body.modules())
    norms = [one for one in body.modules() if isinstance(one, torch.nn.RMSNorm)]
    assert len(norms) == 2 + 3 + 2  # of the encoder's layer, the decoder's, and behind both
    theirs, x = MT5LayerNorm(16, eps=0.3), torch.randn(8, 16)
    with torch.no_grad():
        norms[0].weight.copy_(torch.randn(16))
        theirs.weight.copy_(norms[0].weight)
        exact = theirs(x)
        assert torch.allclose(norms[0](x), exact, atol=1e-6)
        rounded = norms[0].bfloat16()(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded.float(), exact, rtol=0.02, atol=1e-3)
