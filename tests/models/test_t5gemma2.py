"""T5Gemma 2 against plain transformers: values, gradients, files; what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from models.small_t5gemma2 import (
    END,
    END_OF_IMAGE,
    START,
    change_config,
    make_config,
    make_model,
    make_tokenizer,
    write_model,
)
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

from alsace_dist.config import EngineConfig, TaskConfig, TrainConfig
from alsace_dist.data.rows import GAP, Answers, EncodedRow, Part, Row, answers_of
from alsace_dist.errors import UserError
from alsace_dist.models.family import Options, family_of, open_model
from alsace_dist.models.t5gemma2 import COPIES, EMBEDDING, T5Gemma2
from alsace_dist.models.t5gemma2_module import GemmaScorer, prompt_masks
from alsace_dist.ranks.group import Ranks
from alsace_dist.training.engine import inference_module, load_module

CPU = torch.device("cpu")
RANKS = Ranks(0, 1, 0, CPU, None)
ENGINE = EngineConfig(zero_stage=0, dtype="fp32")
# Shorter and longer than what a sliding layer sees, to each side of a position.
TEXTS = [
    "word text",
    "Was it all text? word word no at all nein ja ja it is text",
    "是",
    "it is",
    "a.b.c: yes it is not",
]
VERBALIZERS = {
    "single": {"en": ["yes", "maybe", "no"], "de": ["ja", "not", "nein"]},
    "sequences": {"en": ["yes", "not at all", "yes no"], "de": ["ja", "nein is it", "是否"]},
}
form = pytest.mark.parametrize("form", VERBALIZERS)


def answers(verbalizers: Any, template: str = "{text} Was it? {answer}", **more: Any) -> Answers:
    more = {"max_tokens": 60, "verbalizers": verbalizers, "template": template, "labels": list("abc")} | more
    task = TaskConfig(fields=["text"], **more)
    return answers_of(task, [name for name in task.answers() if name != "default"] or ["en"])


def opened(directory: Path, found: Answers | None = None) -> T5Gemma2:
    model = open_model(directory, found or answers(VERBALIZERS["single"]))
    assert isinstance(model, T5Gemma2)
    return model


def rows_of(model: T5Gemma2, texts: Sequence[str] = TEXTS) -> list[EncodedRow]:
    """A row for each text, in the languages in turns."""
    fixed, languages = model.answers.fixed, sorted(model.answers.fixed)
    rows = []
    for index, text in enumerate(texts):
        language = languages[index % len(languages)]
        parts = (Part(text, True), Part(" Was it? ", False), GAP)
        rows.append(Row(f"g{index}", language, None, parts, fixed[language]))
    return model.encode(rows)


def scorer(model: T5Gemma2, **engine: Any) -> GemmaScorer:
    module = load_module(model, 0.0, ENGINE.model_copy(update=engine), RANKS).eval()
    assert isinstance(module, GemmaScorer)
    return module


@torch.no_grad()
def score(model: T5Gemma2, rows: Sequence[EncodedRow]) -> torch.Tensor:
    found: torch.Tensor = scorer(model)(*model.collate(rows).to(CPU))
    assert found.dtype == torch.float32
    return found


def plain_log_probs(plain: Any, model: T5Gemma2, row: EncodedRow) -> torch.Tensor:
    """Log-probabilities of a row's candidates from logits of the whole vocabulary, one pass per candidate."""
    prefix, sums = list(model.form.decoder_prefix), []
    for tokens in row.candidates.tokens:
        decoder = torch.tensor([[*prefix, *tokens[:-1]]])
        logits = plain(input_ids=torch.tensor([row.input_ids]), decoder_input_ids=decoder).logits[0]
        log_probs = torch.log_softmax(logits.double(), dim=-1)[len(prefix) - 1 :]
        sums.append(log_probs[torch.arange(len(tokens)), torch.tensor(tokens)].sum())
    return torch.log_softmax(torch.stack(sums), dim=0)


# --- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [None, 1.5], ids=["plain", "capped"])
@pytest.mark.parametrize("prefix", ["", "it is not at all no"], ids=["start", "longer than a window"])
@form
def test_scores_are_those_of_transformers(tmp_path: Path, form: str, prefix: str, cap: float | None) -> None:
    """In a padded batch, of single tokens from the rows of the answers alone."""
    plain = make_model(make_config(final_logit_softcapping=cap))
    model = opened(write_model(tmp_path, plain), answers(VERBALIZERS[form], decoder_prefix=prefix))
    assert model.check_weights() == [] and model.is_single_token == (form == "single")
    assert model.form.decoder_prefix[0] == START and len(model.form.decoder_prefix) == 1 + len(prefix.split())
    rows = rows_of(model)
    assert {len(row.input_ids) for row in rows} >= {5, 20}
    assert all(tokens[-1] == END for row in rows for tokens in row.candidates.tokens) == (form == "sequences")
    scored = score(model, rows)
    assert (scored[:, 0] - scored[:, 1]).abs().max() > 0.3
    with torch.no_grad():
        expected = torch.stack([plain_log_probs(plain, model, row) for row in rows])
    torch.testing.assert_close(scored.double(), expected, rtol=0, atol=1e-5)


def test_what_stands_for_the_end_of_an_image_is_not_its_row_of_the_head(tmp_path: Path) -> None:
    plain = make_model(make_config())
    model = opened(write_model(tmp_path, plain))
    (row,) = rows_of(model, TEXTS[:1])
    row.input_ids[2] = END_OF_IMAGE  # no text has it
    with torch.no_grad():
        expected = plain_log_probs(plain, model, row)
        torch.testing.assert_close(score(model, [row])[0].double(), expected, rtol=0, atol=1e-5)
        plain.model.encoder.text_model.embed_tokens.eoi_embedding.zero_()
        assert (plain_log_probs(plain, model, row) - expected).abs().max() > 1e-3


@form
def test_the_gradient_is_that_of_the_tied_model(tmp_path: Path, form: str) -> None:
    """Also with checkpointing; the embedding's is the sum of its three roles."""
    plain = make_model(make_config())
    model = opened(write_model(tmp_path, plain), answers(VERBALIZERS[form]))
    rows = rows_of(model)
    rows[0].input_ids[2] = END_OF_IMAGE
    torch.stack([-plain_log_probs(plain, model, row)[1] for row in rows]).sum().backward()
    expected = {name: value.grad for name, value in plain.named_parameters()}
    for checkpointing in (False, True):
        module = scorer(model, gradient_checkpointing=checkpointing).train()
        (-module(*model.collate(rows).to(CPU))[:, 1].sum()).backward()
        for name, parameter in module.named_parameters():
            key = model._key(name).replace("model.encoder.", "model.encoder.text_model.")
            gradient = expected[key]
            assert parameter.grad is not None and gradient is not None
            assert gradient.abs().max() > 1e-4, name
            scale = float(gradient.abs().max())
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=2e-5 * scale, msg=name)


@form
def test_in_bf16_it_computes_what_transformers_does_in_bf16(tmp_path: Path, form: str) -> None:
    """The frequencies of positions stay in float32, although the module is made for bf16; what is rounded is as near to
    float32 as transformers' own."""
    exact = make_model(make_config())
    write_model(tmp_path, exact)
    plain = T5Gemma2ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    model = opened(tmp_path, answers(VERBALIZERS[form]))
    module = scorer(model, dtype="bf16")
    assert not list(module.buffers()) and {value.dtype for value in module.parameters()} == {torch.bfloat16}
    (row,) = rows_of(model, TEXTS[1:2])
    ids = torch.tensor([row.input_ids * 8])  # positions at which rounded frequencies are far off
    with torch.no_grad():
        embedded, _ = module.embedding(ids.flatten(), None)
        given = plain.model.encoder.text_model.embed_tokens(ids)
        assert torch.equal(embedded.view_as(given), given)
        mine = {name: module.encoder.rotary_emb(embedded, torch.arange(3000)[None], name) for name in LAYER_KINDS}
        its = {
            name: plain.model.encoder.text_model.rotary_emb(embedded, torch.arange(3000)[None], name)
            for name in LAYER_KINDS
        }
        for name in LAYER_KINDS:
            assert all(torch.equal(one, other) for one, other in zip(mine[name], its[name], strict=True)), name
        rows = rows_of(model)
        found = module(*model.collate(rows).to(CPU)).double()
        rounded = torch.stack([plain_log_probs(plain, model, row) for row in rows])
        wanted = torch.stack([plain_log_probs(exact, model, row) for row in rows])
    assert 0 < (found - wanted).abs().max() < 1.5 * (rounded - wanted).abs().max() + 0.02


LAYER_KINDS = ("full_attention", "sliding_attention")


def test_masks_let_every_position_look_at_one_at_least() -> None:
    """Padding far from all tokens, too: a softmax over nothing is not a number on some kernels."""
    found = prompt_masks(torch.tensor([[1] * 20, [1, 1, *[0] * 18]]), 6)
    for name, mask in found.items():
        assert mask.expand(2, 1, 20, 20).any(dim=-1).all(), name
    assert found["sliding_attention"][0, 0, 10].nonzero().flatten().tolist() == list(range(8, 14))
    assert prompt_masks(torch.ones(2, 3), 6)["sliding_attention"].shape == (2, 1, 1, 3)


@form
def test_neither_padding_nor_neighbours_change_a_row(tmp_path: Path, form: str) -> None:
    model = opened(write_model(tmp_path, make_model(make_config())), answers(VERBALIZERS[form]))
    rows = rows_of(model)
    together = score(model, rows)
    for row, result in zip(rows, together, strict=True):
        torch.testing.assert_close(score(model, [row])[0], result, rtol=0, atol=1e-5)
    longer = rows_of(model, ["is " * 40])
    torch.testing.assert_close(score(model, [*rows, *longer])[:-1], together, rtol=0, atol=1e-5)


def test_dropout_drops_wherever_the_model_has_one(tmp_path: Path) -> None:
    model = opened(write_model(tmp_path, make_model(make_config())))
    inputs = model.collate(rows_of(model)).to(CPU)
    module = load_module(model, 0.5, ENGINE, RANKS).train()
    assert {part.p for part in module.modules() if isinstance(part, torch.nn.Dropout)} == {0.5}
    assert {part.attention_dropout for part in module.modules() if hasattr(part, "attention_dropout")} == {0.5}
    assert not torch.equal(module(*inputs), module(*inputs))
    module.eval()
    assert torch.equal(module(*inputs), module(*inputs))
    assert model.config.dropout_rate == model.config.decoder.dropout_rate == 0  # one build does not change another


def scores_at(group: Ranks, directory: str, form: str, dtype: str, stage: int) -> list[float]:
    """Scores of all rows as an engine of this kind computes them, on the ranks of a group."""
    raw = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    engine = EngineConfig.model_validate({"zero_stage": stage, "dtype": dtype, "deepspeed": raw})
    model = opened(Path(directory), answers(VERBALIZERS[form]))
    module = inference_module(load_module(model, 0.0, engine, group), engine, group)
    with torch.no_grad():
        found: list[float] = module(*model.collate(rows_of(model)).to(group.device)).flatten().tolist()
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@form
def test_scores_do_not_depend_on_the_zero_stage(tmp_path: Path, form: str, dtype: str) -> None:
    """``zero.Init`` would round what a module computes while it is built, frequencies of positions for one."""
    arguments = {"directory": str(write_model(tmp_path, make_model(make_config()))), "form": form, "dtype": dtype}
    plain, sharded = (tiny.run_ranks(scores_at, 2, stage=stage, **arguments) for stage in (1, 3))
    assert sharded[0] == sharded[1] == pytest.approx(plain[0], abs=1e-6)
    assert torch.tensor(plain[0]).std() > 0.1


# --- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        ("{text} {answer}", ["<bos>", "word"]),
        ("{text}{answer}", ["<bos>", "word"]),
        ("it {answer} is {text}", ["<bos>", "it", "▁is", "▁word"]),
        ("{text} is it? ", ["<bos>", "word", "▁is", "▁it", "?", "▁"]),
    ],
)
def test_the_place_of_the_answer_is_written_as_nothing(tmp_path: Path, template: str, pieces: list[str]) -> None:
    from alsace_dist.data.rows import rows_of as rows_of_task
    from alsace_dist.files.shards import ParallelGroup

    directory = write_model(tmp_path, make_model(make_config()))
    task = TaskConfig(fields=["text"], template=template, labels=["yes", "no"], max_tokens=20)
    model = opened(directory, answers_of(task, ["en"]))
    (row,) = model.encode(rows_of_task(task, [ParallelGroup("g", None, {"en": {"text": "word"}})], ["en"]))
    assert model.tokenizer.convert_ids_to_tokens(row.input_ids) == pieces
    assert model.form.decoder_prefix == (START,)


def test_what_a_text_says_is_text(tmp_path: Path) -> None:
    model = opened(write_model(tmp_path, make_model(make_config())))
    (row,) = rows_of(model, ["a <eos> b<bos> <end_of_image> <mask> <pad>"])
    assert row.input_ids[0] == START and set(row.input_ids[1:]).isdisjoint(range(3)) and 4 not in row.input_ids
    assert END_OF_IMAGE not in row.input_ids


@pytest.mark.parametrize("most", [7, 9])
def test_a_text_that_is_cut_leaves_what_is_around_it(tmp_path: Path, most: int) -> None:
    model = opened(write_model(tmp_path, make_model(make_config())), answers(VERBALIZERS["single"], max_tokens=most))
    (row,) = rows_of(model, ["word" + " word" * 40])
    tokens = model.tokenizer.convert_ids_to_tokens(row.input_ids)
    assert row.is_cut and len(tokens) == most
    assert tokens[:2] == ["<bos>", "word"] and tokens[-3:] == ["▁Was", "▁it", "?"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"template": "{text} <mask>"}, r"task\.template: .* holds <mask>, and this model answers after .*; remove it"),
        ({"template": "{text} <extra_id_0>"}, r"task\.template: .* holds <extra_id_0>, and this .*; remove it"),
        ({"decoder_prefix": "<extra_id_0>"}, r"task\.decoder_prefix: .* holds <extra_id_0>, and this .*; remove it"),
        ({"template": "{text} <MASK>"}, r"task\.template: <MASK> in .* is plain text to this model; remove it"),
        ({"template": "{text} <eos>"}, r"task\.template: .* holds <eos>, a token of control; remove it"),
        ({"decoder_prefix": "Ω"}, r"task\.decoder_prefix: 'Ω' holds unknown tokens; choose another"),
        ({"verbalizers": ["yes", "Ω", "no"]}, r"task\.verbalizers: the answer 'Ω' .* the model does not know"),
        ({"max_tokens": 4}, r"task\.max_tokens: 4 leaves no room for texts"),
    ],
)
def test_tasks_that_do_not_fit(tmp_path: Path, task: dict[str, Any], message: str) -> None:
    directory = write_model(tmp_path, make_model(make_config()))
    with pytest.raises(UserError, match=message) as caught:
        opened(directory, answers(**{"verbalizers": ["yes", "maybe", "no"]} | task))
    assert "\n" not in str(caught.value)


def test_options_that_it_does_not_have(tmp_path: Path) -> None:
    directory = write_model(tmp_path, make_model(make_config()))
    for options, message in (
        (Options("cloze"), r"^model\.mode: cloze is nothing that T5Gemma 2 has; remove it"),
        (Options(masks="left_to_right"), r"^model\.masks: T5Gemma 2 fills no masks; remove it"),
    ):
        with pytest.raises(UserError, match=message):
            open_model(directory, answers(VERBALIZERS["single"]), options)


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    """A token of control may lie beyond the embedding, for no text becomes one; a word may not."""
    directory = write_model(tmp_path, make_model(make_config()))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(directory)
    (row,) = rows_of(opened(directory), ["a <image_soft_token>"])
    assert max(row.input_ids) < len(tokenizer) - 1
    tokenizer.add_tokens(["beyond"])
    tokenizer.save_pretrained(directory)
    with pytest.raises(UserError, match=r"the tokenizer has 107 tokens, the model's embedding 105"):
        opened(directory)
    tokenizer = make_tokenizer()
    tokenizer.add_bos_token = False
    tokenizer.save_pretrained(directory)
    with pytest.raises(UserError, match=r"the tokenizer does not begin texts with its bos_token"):
        opened(directory)


# --- config.json ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("tie_word_embeddings", False, "tie_word_embeddings: false, and an output head that is not the embedding is"),
        ("decoder.tie_word_embeddings", False, r"decoder\.tie_word_embeddings: false, and an output head"),
        ("decoder.num_key_value_heads", 3, r"decoder: num_attention_heads: 4 is no multiple of num_key_value_heads, 3"),
        ("decoder.num_attention_heads", 0, r"decoder\.num_attention_heads: .* greater than or equal to 1, not 0"),
        ("decoder.head_dim", 7, "decoder: head_dim: 7 is odd"),
        ("decoder.num_hidden_layers", 3, "decoder: layer_types: names 2 layers of 3"),
        ("decoder.num_hidden_layers", 10**9, r"decoder\.num_hidden_layers: .* less than or equal to 1000"),
        ("decoder.hidden_size", 20, r"decoder\.hidden_size: 20, and the encoder's is 24"),
        ("decoder.vocab_size", 104, r"decoder\.vocab_size: 104, and the encoder's is 105"),
        ("vocab_size", 104, r"vocab_size: 104, and the decoder's is 105"),
        ("decoder.bos_token_id", None, r"decoder\.bos_token_id: .*valid integer, not None"),
        ("decoder.bos_token_id", 900, r"decoder: bos_token_id: 900 is no id of a vocabulary of 105"),
        ("decoder.eos_token_id", [1, 900], r"decoder: eos_token_id: 900 is no id of a vocabulary of 105"),
        ("decoder.sliding_window", None, r"decoder\.sliding_window: .*valid integer, not None"),
        ("decoder.layer_types", ["other", "full_attention"], r"decoder\.layer_types\.0: .*'full_attention'"),
        ("decoder.hidden_activation", "gulu", r"decoder\.hidden_activation: 'gulu' is no activation"),
        ("decoder.attn_logit_softcapping", 50.0, r"decoder\.attn_logit_softcapping: .* None, not 50.0"),
        ("decoder.rope_parameters.full_attention.rope_type", "yarn", r"rope_type: .*'default' or 'linear', not 'yarn'"),
        ("decoder.rope_parameters.full_attention.factor", None, "full_attention: factor is needed with rope_type"),
        ("encoder.text_config", None, r"encoder\.text_config: must be a mapping of keys to values, not None"),
        ("encoder.text_config.rms_norm_eps", 0.0, r"encoder\.text_config\.rms_norm_eps: .* greater than 0"),
        ("encoder.vision_config.hidden_size", 15, r"vision_config: hidden_size: 15 is no multiple of num_attention"),
        ("encoder.vision_config.model_type", "clip", r"vision_config\.model_type: .*'siglip_vision_model', not 'clip'"),
        ("decoder", [], "decoder: must be a mapping of keys to values"),
        ("is_encoder_decoder", False, "only support encoder-decoder"),
    ],
)
def test_a_broken_geometry_is_named_in_one_line(tmp_path: Path, path: str, value: Any, message: str) -> None:
    make_config().save_pretrained(tmp_path)
    change_config(tmp_path, path, value)
    with pytest.raises(UserError, match=message) as caught:
        family_of(tmp_path).load_config(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'config.json'}: ") and said.endswith("; get a sound checkpoint")
    assert "\n" not in said


def test_several_ends_and_a_kind_of_attention_in_the_config_are_allowed(tmp_path: Path) -> None:
    make_config().save_pretrained(tmp_path)
    change_config(tmp_path, "decoder.eos_token_id", [1, 6])
    change_config(tmp_path, "eos_token_id", [1, 6])
    change_config(tmp_path, "attn_implementation", "flash_attention_2")
    config = family_of(tmp_path).load_config(tmp_path)
    assert config.decoder.eos_token_id == [1, 6]
    with torch.device("meta"):
        module = GemmaScorer(config, None, 0.0, False)
    assert module.encoder.config._attn_implementation == module.decoder.config._attn_implementation == "sdpa"


# --- weights -------------------------------------------------------------------------------------------------------

QUERY = "model.decoder.layers.1.self_attn.q_proj.weight"
WORDS_KEY = "model.encoder.embed_tokens.weight"


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    plain = make_model(make_config())
    state = stored(write_model(tmp_path, plain))

    def said(changed: dict[str, torch.Tensor]) -> str:
        with pytest.raises(UserError) as caught:
            opened(write_model(tmp_path, plain, changed)).check_weights()
        return str(caught.value)

    assert f": {QUERY} is missing;" in said({key: value for key, value in state.items() if key != QUERY})
    assert f"{QUERY} has shape (3, 3), not (32, 24);" in said(state | {QUERY: torch.zeros(3, 3)})
    assert ": score.weight is not of this model;" in said(state | {"score.weight": torch.zeros(3, 24)})
    head = state | {"lm_head.out_proj.weight": torch.ones(105, 24)}
    assert f"lm_head.out_proj.weight differs from {WORDS_KEY}, and only tied ones are supported;" in said(head)


@pytest.mark.parametrize("is_nested", [False, True], ids=["as released", "as transformers names them"])
def test_names_of_both_kinds_are_read_and_copies_of_the_embedding_allowed(tmp_path: Path, is_nested: bool) -> None:
    plain = make_model(make_config())
    state = stored(write_model(tmp_path, plain))
    assert WORDS_KEY in state and not state.keys() & COPIES.keys()
    if is_nested:
        kept = ("model.encoder.vision_tower.", "model.encoder.multi_modal_projector.")
        state = {
            key if key.startswith(kept) else key.replace("model.encoder.", "model.encoder.text_model."): value
            for key, value in state.items()
        }
    else:  # released ones name the vision tower otherwise, which is not looked into
        state = {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in state.items()}
    words = next(value for key, value in state.items() if key.endswith("embed_tokens.weight"))
    more = {"lm_head.out_proj.weight": words.clone(), "model.decoder.embed_tokens.weight": words.clone()}
    model = opened(write_model(tmp_path, plain, state | more))
    assert model.check_weights() == []
    module = scorer(model)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, state[model._key(name)])
        assert torch.equal(model.initial_value(name, slice(1, 9)), parameter[1:9])
    written = {key for name in dict(module.named_parameters()) for key in model.exported(name, torch.zeros(1))}
    beside = dict(model.remaining(written))
    assert (
        beside.keys() == state.keys() - written
        and "model.encoder.multi_modal_projector.mm_soft_emb_norm.weight" in beside
    )
    assert dict(model.remaining(written - {model._key(EMBEDDING)})).keys() - beside.keys() == {model._key(EMBEDDING)}
    rows = rows_of(model)
    with torch.no_grad():
        expected = torch.stack([plain_log_probs(plain, model, row) for row in rows])
    torch.testing.assert_close(score(model, rows).double(), expected, rtol=0, atol=1e-5)


# --- sizes ---------------------------------------------------------------------------------------------------------


def released() -> T5Gemma2Config:
    """The geometry of T5Gemma 2 270M-270M."""
    stack = {"vocab_size": 262_144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18}
    stack |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 896}
    vision |= {"num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "vision_use_head": False}
    return T5Gemma2Config(encoder={"text_config": stack, "vision_config": vision}, decoder=stack)


def test_parameter_counts_are_those_of_transformers() -> None:
    config = released()
    with torch.device("meta"):
        plain = T5Gemma2ForConditionalGeneration(config)
    found = T5Gemma2.count_parameters(config, 3)
    assert found.total == sum(parameter.numel() for parameter in plain.parameters())
    vision = [*plain.model.encoder.vision_tower.parameters(), *plain.model.encoder.multi_modal_projector.parameters()]
    assert found.beside == sum(parameter.numel() for parameter in vision)
    assert (found.embedding, found.vocabulary) == (262_145 * 640, 262_144 * 640)
    assert (found.kept, f"{found.kept / 1e6:.0f} M") == (found.total - found.beside, "368 M")
    frozen = TrainConfig(num_steps=1, learning_rate=1.0, freeze_vocabulary=True)
    assert found.trained(frozen) == found.kept - 262_145 * 640
    assert T5Gemma2.describe(config) == "T5Gemma 2, width 640, 18 encoder and 18 decoder layers, vocabulary 262,144"


def test_what_is_counted_is_what_the_module_has(tmp_path: Path) -> None:
    model = opened(write_model(tmp_path, make_model(make_config())))
    counted = T5Gemma2.count_parameters(model.config, model.num_head_rows)
    assert counted.kept == sum(parameter.numel() for parameter in scorer(model).parameters())
    assert counted.total == sum(value.numel() for value in stored(tmp_path).values())


@pytest.mark.parametrize("num_answer_tokens", [1, 5])
def test_flops_of_a_forward_pass(num_answer_tokens: int) -> None:
    plain = make_model(make_config(num_hidden_layers=1, layer_types=["full_attention"], intermediate_size=20)).model
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        plain(input_ids=torch.full((3, 11), 7), decoder_input_ids=torch.full((3, num_answer_tokens), 7))
    assert counted.get_total_flops() == T5Gemma2.forward_flops(plain.config, [11] * 3, num_answer_tokens)


def test_the_first_t5gemma_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5gemma"}))
    with pytest.raises(UserError, match=r"model_type is 't5gemma': the first T5Gemma .*; use T5Gemma 2"):
        family_of(tmp_path)
