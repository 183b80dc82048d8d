"""XLM-R against plain transformers in both modes; heads that are there, new, or another's; what does not fit."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models.small_xlmr import END, FIRST, PAD, XL, make_config, make_model, write_model
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import XLMRobertaConfig, XLMRobertaModel

from alsace_dist.config import EngineConfig, TaskConfig
from alsace_dist.data.rows import Answers, EncodedRow, Part, Row, answers_of
from alsace_dist.errors import UserError
from alsace_dist.models.family import Options, family_of, open_model
from alsace_dist.models.xlmr import EMBEDDING, XLMR
from alsace_dist.ranks.group import Ranks
from alsace_dist.training.engine import load_module

CPU = torch.device("cpu")
RANKS = Ranks(0, 1, 0, CPU, None)
ENGINE = EngineConfig(zero_stage=0, dtype="fp32")
TYPES = pytest.mark.parametrize("model_type", ["xlm-roberta", XL])
TEXTS = ["word text", "Was it all text? word word no", "是", "it is", "a.b.c: yes it is not", "text"]
CLOZE = "{text} Was it <mask>?"


def answers(verbalizers: Any, template: Any = CLOZE, labels: Sequence[str] = "abc", **more: Any) -> Answers:
    """With room in the model's 32 positions for three masks."""
    more = {"max_tokens": 30, "verbalizers": verbalizers, "template": template, "labels": list(labels)} | more
    task = TaskConfig(fields=["text"], **more)
    return answers_of(task, [name for name in task.answers() if name != "default"] or ["en"])


def rows_of(found: Answers, template: str = CLOZE) -> list[Row]:
    """A row for each text, in the languages in turns."""
    languages = sorted(found.fixed)
    rows = []
    for index, text in enumerate(TEXTS):
        language = languages[index % len(languages)]
        before, after = template.split("{text}")
        parts = (Part(before, False), Part(text, True), Part(after, False))
        rows.append(Row(f"g{index}", language, None, parts, found.fixed[language]))
    return rows


@torch.no_grad()
def score(model: Any, rows: Sequence[EncodedRow]) -> torch.Tensor:
    module = load_module(model, 0.0, ENGINE, RANKS).eval()
    found: torch.Tensor = module(*model.collate(rows).to(CPU))
    assert found.dtype == torch.float32
    return found


@torch.no_grad()
def cloze_reference(plain: Any, model: XLMR, row: EncodedRow) -> torch.Tensor:
    """Log-probabilities of a row's candidates from logits of the whole vocabulary, one prompt per candidate."""
    at, mask = row.input_ids.index(model.tokenizer.mask_token_id), model.tokenizer.mask_token_id
    sums = []
    for tokens in row.candidates.tokens:
        ids = row.input_ids[:at] + [mask] * len(tokens) + row.input_ids[at + 1 :]
        whole = torch.log_softmax(plain(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
        sums.append(sum(whole[at + offset, token] for offset, token in enumerate(tokens)))
    return torch.log_softmax(torch.stack([torch.as_tensor(one) for one in sums]), dim=0)


# --- cloze ---------------------------------------------------------------------------------------------------------

VERBALIZERS = {
    "one token": {"en": ["yes", "maybe", "no"], "de": ["ja", "vielleicht", "nein"], "zh": ["是", "字", "否"]},
    "two tokens each": {"en": ["at all", "not yes", "yes no"], "de": ["ja", "vielleicht", "nein"]},
    "several": {"en": ["yes", "not at all", "yes no"], "de": ["ja", "not nein", "nein"], "zh": ["是", "否", "是否"]},
}
NUM_ROWS = {"one token": 9, "two tokens each": 5 + 3, "several": None}


@TYPES
@pytest.mark.parametrize("kind", VERBALIZERS)
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_cloze_scores_are_those_of_transformers(tmp_path: Path, model_type: str, kind: str, is_tied: bool) -> None:
    """Candidates of equal numbers of tokens need their own rows of the head alone: the softmax over all cancels."""
    plain = make_model("cloze", make_config(model_type, tie_word_embeddings=is_tied))
    model = open_model(write_model(tmp_path, plain), found := answers(VERBALIZERS[kind]))
    assert isinstance(model, XLMR) and (model.mode, model.is_tied) == ("cloze", is_tied)
    assert model.check_weights() == [] and model.num_head_rows == NUM_ROWS[kind]
    rows = model.encode(rows_of(found))
    scored = score(model, rows)
    assert (scored[:, 0] - scored[:, 1]).abs().max() > 0.5
    for row, result in zip(rows, scored, strict=True):
        torch.testing.assert_close(result.double(), cloze_reference(plain, model, row), rtol=0, atol=1e-5)


def test_neither_batch_nor_order_changes_a_row(tmp_path: Path) -> None:
    """Rows with numbers of candidates, and candidates with numbers of tokens, of their own."""
    model = open_model(
        write_model(tmp_path, plain := make_model("cloze", make_config())), Answers({}, (), "", 24, (CLOZE,))
    )
    assert isinstance(model, XLMR) and model.num_head_rows is None
    own = [
        ("yes", "no"),
        ("not at all", "是", "is it"),
        ("word",),
        ("ja", "nein", "all", "at all"),
        ("no", "yes"),
        ("a",),
    ]
    parts = [(Part(text, True), Part(" Was it <mask>?", False)) for text in TEXTS]
    rows = model.encode([Row("k", "en", None, part, texts) for part, texts in zip(parts, own, strict=True)])
    together, backwards = score(model, rows), score(model, rows[::-1]).flip(0)
    assert together.shape == (6, 4)
    torch.testing.assert_close(together, backwards, rtol=0, atol=1e-5)
    for row, result in zip(rows, together, strict=True):
        (alone,), size = score(model, [row]), len(row.candidates)
        torch.testing.assert_close(result[:size], alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.double(), cloze_reference(plain, model, row), rtol=0, atol=1e-5)
        assert (result[size:] == -torch.inf).all()
    turned = model.encode([Row("k", "en", None, parts[3], own[3][::-1])])
    torch.testing.assert_close(score(model, turned)[0].flip(0), together[3], rtol=0, atol=1e-5)


@TYPES
@pytest.mark.parametrize("kind", ["one token", "several"])
def test_the_gradient_is_that_of_the_tied_model(tmp_path: Path, model_type: str, kind: str) -> None:
    """Also with checkpointing; the embedding's is the sum of its two roles, and padding has the second alone."""
    plain = make_model("cloze", make_config(model_type))
    model = open_model(write_model(tmp_path, plain), found := answers(VERBALIZERS[kind]))
    assert isinstance(model, XLMR)
    rows, mask = model.encode(rows_of(found)), model.tokenizer.mask_token_id
    losses = []
    for row in rows:
        at, sums = row.input_ids.index(mask), []
        for tokens in row.candidates.tokens:
            ids = row.input_ids[:at] + [mask] * len(tokens) + row.input_ids[at + 1 :]
            log_probs = torch.log_softmax(plain(input_ids=torch.tensor([ids])).logits[0], dim=-1)
            sums.append(torch.stack([log_probs[at + offset, token] for offset, token in enumerate(tokens)]).sum())
        losses.append(-torch.log_softmax(torch.stack(sums), dim=0)[1])
    torch.stack(losses).sum().backward()
    expected = {name: value.grad for name, value in plain.named_parameters(remove_duplicate=False)}
    for checkpointing in (False, True):
        engine = ENGINE.model_copy(update={"gradient_checkpointing": checkpointing})
        module = load_module(model, 0.0, engine, RANKS).train()
        (-module(*model.collate(rows).to(CPU))[:, 1].sum()).backward()
        for name, parameter in module.named_parameters():
            key = next(iter(model.exported(name, model.initial_value(name))))
            gradient = expected[key]
            assert parameter.grad is not None and gradient is not None
            if name == "head.bias":
                gradient = gradient[list(model._vocabulary)]
            if name == EMBEDDING:
                assert gradient[END].abs().max() > 0.001 and (kind != "several" or gradient[PAD].abs().max() > 0.001)
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_blank_is_no_token_of_an_answer(tmp_path: Path) -> None:
    model = open_model(write_model(tmp_path, make_model("cloze", make_config())), answers(["yes", "是", "否"]))
    assert [len(tokens) for tokens in model.candidates(("yes", "是", "否"), "en").tokens] == [1, 1, 1]
    for texts, message in (
        (("yes", "ы"), "holds tokens that the model does not know"),
        (("yes", "▁"), "has no tokens"),
    ):
        with pytest.raises(UserError, match=message):
            model.candidates(texts, "en")


@pytest.mark.parametrize("most", [9, 11, 15])
def test_a_text_that_is_cut_leaves_the_mask_and_what_is_around_it(tmp_path: Path, most: int) -> None:
    model = open_model(
        write_model(tmp_path, make_model("cloze", make_config())), answers(["yes", "no", "maybe"], max_tokens=most)
    )
    (row,) = model.encode([Row("k", "en", None, (Part("word " * 40, True), Part(" Was it <mask>?", False)), ("yes",))])
    tokens = model.tokenizer.convert_ids_to_tokens(row.input_ids)
    assert row.is_cut and len(tokens) == most
    assert tokens[0] == "<s>" and tokens[-6:] == ["▁Was", "▁it", "<mask>", "▁", "?", "</s>"] and tokens[1] == "▁word"


def test_a_mask_in_a_text_is_text(tmp_path: Path) -> None:
    model = open_model(write_model(tmp_path, make_model("cloze", make_config())), answers(["yes", "no", "maybe"]))
    parts = (Part("a <mask> b</s> ＜mask＞", True), Part(" Was it <mask>?", False))
    (row,) = model.encode([Row("k", "en", None, parts, ("yes",))])
    assert row.input_ids.count(model.tokenizer.mask_token_id) == 1
    assert row.input_ids.index(model.tokenizer.mask_token_id) == len(row.input_ids) - 4
    assert row.input_ids.count(model.tokenizer.eos_token_id) == 1


# --- head ----------------------------------------------------------------------------------------------------------

HEAD = "it is: {text}"


@torch.no_grad()
def head_reference(plain: Any, ids: list[int], pooling: str) -> torch.Tensor:
    """Log-probabilities of the labels; with the mean by hand, for transformers has none."""
    whole = plain(input_ids=torch.tensor([ids]), output_hidden_states=True)
    logits = whole.logits
    if pooling == "mean":
        hidden = plain.roberta(input_ids=torch.tensor([ids])).last_hidden_state.mean(dim=1)
        logits = plain.classifier.out_proj(torch.tanh(plain.classifier.dense(hidden)))
    return torch.log_softmax(logits[0], dim=-1)


@TYPES
@pytest.mark.parametrize("pooling", ["first", "mean", None])
def test_head_scores_are_those_of_transformers(tmp_path: Path, model_type: str, pooling: Any) -> None:
    plain = make_model("head", make_config(model_type, num_labels=3))
    found = answers([], HEAD)
    model = open_model(write_model(tmp_path, plain), found, Options(pooling=pooling))
    assert (model.mode, model.num_head_rows) == ("head", 3) and model.check_weights() == []
    rows = model.encode(rows_of(found, HEAD))
    assert {row.input_ids[0] for row in rows} == {FIRST} and len({len(row.input_ids) for row in rows}) > 3
    scored = score(model, rows)
    assert scored.std(dim=0).min() > 0.01
    for row, result in zip(rows, scored, strict=True):
        torch.testing.assert_close(result, head_reference(plain, row.input_ids, pooling or "first"), rtol=0, atol=1e-5)


def test_a_mode_that_is_asked_for_counts_more_than_the_template(tmp_path: Path) -> None:
    model = open_model(
        write_model(tmp_path, make_model("head", make_config(num_labels=3))), answers([]), Options("head")
    )
    assert model.mode == "head"


@pytest.mark.parametrize("kind", ["encoder", "cloze"])
def test_a_new_head_depends_on_the_seed_alone_and_is_not_scored_with(tmp_path: Path, kind: str) -> None:
    if kind == "encoder":
        torch.manual_seed(3)
        write_model(tmp_path, XLMRobertaModel(make_config()))
    else:
        write_model(tmp_path, make_model("cloze", make_config()))
    models = []
    for seed, before in ((5, 1), (5, 2), (6, 2)):
        torch.manual_seed(before)
        models.append(open_model(tmp_path, answers([], HEAD), Options(seed=seed)))
        assert models[-1].check_weights(may_be_new=True) == []
        with pytest.raises(
            UserError, match=r"has no classification head \(classifier\.\*\), and a new one would answer"
        ):
            models[-1].check_weights()
    values = [
        {name: model.initial_value(name) for name in ("head.dense.weight", "head.out_proj.weight")} for model in models
    ]
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    assert not any(torch.equal(values[0][name], values[2][name]) for name in values[0])
    assert values[0]["head.dense.weight"].std() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(models[0].initial_value("head.dense.weight", slice(1, 3)), values[0]["head.dense.weight"][1:3])
    assert not models[0].initial_value("head.out_proj.bias").any()
    stored = load_file(tmp_path / "model.safetensors")
    key = "embeddings.word_embeddings.weight"
    assert torch.equal(models[0].initial_value(EMBEDDING), stored[key if kind == "encoder" else f"roberta.{key}"])


def with_labels(directory: Path, labels: Sequence[str]) -> Path:
    config = make_config(
        id2label=dict(enumerate(labels)), label2id={label: index for index, label in enumerate(labels)}
    )
    return write_model(directory, make_model("head", config))


def test_the_head_of_another_task_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    for labels in (["A", "b", "c"], ["LABEL_0", "LABEL_1", "LABEL_2"]):
        assert open_model(with_labels(tmp_path, labels), answers([], HEAD)).check_weights() == []
    model = open_model(with_labels(tmp_path, ["x", "y"]), answers([], HEAD))
    with pytest.raises(UserError, match="has a classification head with 2 outputs for 3 labels, and a new one would"):
        model.check_weights()
    (remark,) = model.check_weights(may_be_new=True)
    assert remark.endswith("with 2 outputs for 3 labels; finetuning starts with a new one for a, b, c")
    assert model.initial_value("head.out_proj.weight").shape == (3, 16)
    model = open_model(with_labels(tmp_path, ["x", "y", "z"]), answers([], HEAD))
    with pytest.raises(UserError, match="has a classification head for x, y, z, and a new one would answer at random"):
        model.check_weights()
    model = open_model(with_labels(tmp_path, ["c", "b", "a"]), answers([], HEAD))
    for may_be_new in (False, True):
        with pytest.raises(UserError, match=r"^task\.labels: a, b, c; .* for c, b, a: give task\.labels in that order"):
            model.check_weights(may_be_new)


def test_the_pooling_of_a_trained_head_is_that_of_its_config(tmp_path: Path) -> None:
    directory = write_model(tmp_path, make_model("head", make_config(num_labels=3)))
    model = open_model(directory, answers([], HEAD), Options(pooling="mean"))
    assert isinstance(model, XLMR) and model.config_changes["classifier_pooling"] == "mean"
    assert "classifier_pooling" not in open_model(directory, answers([], HEAD)).config_changes
    value = json.loads((directory / "config.json").read_text()) | dict(model.config_changes)
    (directory / "config.json").write_text(json.dumps(value))
    again = open_model(directory, answers([], HEAD))
    assert isinstance(again, XLMR) and again.pooling == "mean"
    with pytest.raises(UserError, match=r"^model\.pooling: first, and the head of .* was trained on the mean"):
        open_model(directory, answers([], HEAD), Options(pooling="first"))


# --- what does not fit ---------------------------------------------------------------------------------------------


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    plain = make_model("cloze", make_config())
    state = tensors(write_model(tmp_path, plain))
    query, norm = "roberta.encoder.layer.0.attention.self.query.weight", "lm_head.layer_norm.weight"

    def said(changed: Mapping[str, torch.Tensor]) -> str:
        with pytest.raises(UserError) as caught:
            open_model(write_model(tmp_path, plain, changed), answers(["yes", "no", "maybe"])).check_weights()
        return str(caught.value)

    assert f": {query} is missing;" in said({key: value for key, value in state.items() if key != query})
    assert f": {norm} is missing;" in said({key: value for key, value in state.items() if key != norm})
    assert "has shape (3, 3), not (16, 16);" in said(state | {query: torch.zeros(3, 3)})
    assert "lm_head.bias has shape (9,), not " in said(state | {"lm_head.bias": torch.zeros(9)})
    assert ": qa_outputs.weight is not of this model;" in said(state | {"qa_outputs.weight": torch.zeros(2, 16)})
    rows = torch.ones(plain.config.vocab_size, 16)
    assert "lm_head.decoder.weight differs from roberta.embeddings.word" in said(
        state | {"lm_head.decoder.weight": rows}
    )
    encoder = {key.removeprefix("roberta."): value for key, value in state.items() if key.startswith("roberta.")}
    assert "has no masked language model's head (lm_head.*)" in said(encoder)


def test_tensors_that_checkpoints_have_beside_are_allowed(tmp_path: Path) -> None:
    plain = make_model("cloze", make_config())
    state = tensors(write_model(tmp_path, plain))
    more = {
        "lm_head.decoder.weight": state["roberta.embeddings.word_embeddings.weight"].clone(),
        "lm_head.decoder.bias": state["lm_head.bias"].clone(),
        "roberta.pooler.dense.weight": torch.zeros(16, 16),
        "roberta.embeddings.position_ids": torch.arange(34)[None],
        "classifier.dense.weight": torch.zeros(16, 16),
    }
    model = open_model(write_model(tmp_path, plain, state | more), answers(["yes", "no", "maybe"]))
    assert model.check_weights() == []
    kept = dict(model.remaining([]))
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[key], state[key]) for key in state)


TWICE = "{text} <mask> <mask>"


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ({"template": TWICE}, {}, r"task\.template: '{text} <mask> <mask>' holds <mask> 2 times; write it once"),
        ({"template": {"en": CLOZE, "de": HEAD}}, {}, r"task\.template: .* holds <mask> 0 times; write it once"),
        ({"template": HEAD}, {"mode": "cloze"}, r"task\.template: .* holds <mask> 0 times; write it once"),
        ({"template": HEAD}, {}, r"task\.verbalizers: a classification head answers with labels and reads no words"),
        ({"decoder_prefix": "<extra_id_0>"}, {}, r"task\.decoder_prefix: XLM-R has no decoder; remove it"),
        (
            {"template": "{text} <extra_id_0>", "verbalizers": []},
            {},
            r"<extra_id_0> is no token of this .*; write <mask>",
        ),
        (
            {"template": "{text} [MASK]", "verbalizers": []},
            {},
            r"\[MASK\] is no token of this model, in .*; write <mask>",
        ),
        ({}, {"pooling": "mean"}, r"model\.pooling: is what a classification head reads, and this is cloze; remove it"),
        ({"max_tokens": 33}, {}, r"task\.max_tokens: 33 for a model of 32 positions; lower it"),
        (
            {"max_tokens": 31, "verbalizers": ["not at all", "no", "yes"]},
            {},
            r"room for the 3 masks .*; lower it to 30",
        ),
        ({"max_tokens": 7}, {}, r"task\.max_tokens: 7 leaves no room for texts"),
    ],
)
def test_tasks_that_do_not_fit(tmp_path: Path, task: dict[str, Any], options: dict[str, Any], message: str) -> None:
    directory = write_model(tmp_path, make_model("cloze", make_config()))
    fitting = {"verbalizers": ["yes", "no", "maybe"], "max_tokens": 24}
    with pytest.raises(UserError, match=message) as caught:
        open_model(directory, answers(**fitting | task), Options(**options))
    assert "\n" not in str(caught.value)


def test_the_longest_prompt_takes_the_last_position(tmp_path: Path) -> None:
    model = open_model(
        write_model(tmp_path, plain := make_model("cloze", make_config())),
        answers(["not at all", "no", "yes"], max_tokens=30),
    )
    assert isinstance(model, XLMR)
    parts = (Part("word " * 40, True), Part(" Was it <mask>?", False))
    (row,) = model.encode([Row("k", "en", None, parts, ("not at all", "no", "yes"))])
    assert len(row.input_ids) == 30
    torch.testing.assert_close(score(model, [row])[0].double(), cloze_reference(plain, model, row), rtol=0, atol=1e-5)


def test_tokenizers_and_configs_that_do_not_fit(tmp_path: Path) -> None:
    directory = write_model(tmp_path, make_model("cloze", make_config()))
    (directory / "config.json").write_text(json.dumps(make_config(pad_token_id=0).to_dict()))
    with pytest.raises(UserError, match=r"pad_token_id is 1 in the tokenizer and 0 in config\.json"):
        open_model(directory, answers(["yes", "no", "maybe"], max_tokens=24))
    (directory / "config.json").write_text(json.dumps(make_config(is_decoder=True).to_dict()))
    with pytest.raises(UserError, match=r"config\.json: is_decoder"):
        family_of(directory).load_config(directory)


# --- sizes ---------------------------------------------------------------------------------------------------------

RELEASED = {
    "base": ({"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}, 278_295_186),
    "large": ({"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}, 560_142_482),
}


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_counts_of_the_released_models(name: str) -> None:
    geometry, total = RELEASED[name]
    width = geometry["hidden_size"]
    config = XLMRobertaConfig(
        vocab_size=250002, intermediate_size=4 * width, max_position_embeddings=514, type_vocab_size=1, **geometry
    )
    found = XLMR.count_parameters(config, 3, "cloze")
    assert (found.total, found.embedding, found.vocabulary) == (total, 250002 * width, 250002 * width)
    assert found.kept == total - 250002 + 3
    assert XLMR.count_parameters(config, None, "cloze").kept == total
    head = XLMR.count_parameters(config, 7, "head")
    assert head.total == head.kept == found.body + width * width + width + 7 * width + 7


@TYPES
@pytest.mark.parametrize("mode", ["cloze", "head"])
def test_what_is_counted_is_what_the_module_has(tmp_path: Path, model_type: str, mode: Any) -> None:
    plain = make_model(mode, make_config(model_type, num_labels=3))
    found = answers(["yes", "no", "maybe"]) if mode == "cloze" else answers([], HEAD)
    model = open_model(write_model(tmp_path, plain), found)
    module = load_module(model, 0.0, ENGINE, RANKS)
    counted = XLMR.count_parameters(model.config, model.num_head_rows, mode)
    assert counted.kept == sum(parameter.numel() for parameter in module.parameters())
    assert counted.total == sum(parameter.numel() for parameter in plain.parameters())


@TYPES
def test_flops_of_a_forward_pass(model_type: str) -> None:
    plain = make_model("cloze", make_config(model_type)).roberta
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        plain(input_ids=torch.full((3, 11), 7))
    assert counted.get_total_flops() == XLMR.forward_flops(plain.config, [11] * 3, 1)


# --- losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cloze", "head"])
def test_dropout_drops(tmp_path: Path, mode: str) -> None:
    found = answers(["yes", "no", "maybe"]) if mode == "cloze" else answers([], HEAD)
    model = open_model(write_model(tmp_path, make_model(mode, make_config(num_labels=3))), found)
    inputs = model.collate(model.encode(rows_of(found, CLOZE if mode == "cloze" else HEAD))).to(CPU)
    module = load_module(model, 0.5, ENGINE, RANKS).train()
    assert not torch.equal(module(*inputs), module(*inputs))
    module.eval()
    assert torch.equal(module(*inputs), module(*inputs))
