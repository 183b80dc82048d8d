"""The candidate scorer against plain transformers, and what is refused as a model: nothing in it is executed."""

import json
import math
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import MT5Config, MT5ForConditionalGeneration, PreTrainedTokenizerFast

from alsace_dist.config import EngineConfig, TaskConfig
from alsace_dist.errors import UserError
from alsace_dist.models.collate import AnswerCollator
from alsace_dist.models.mt5 import (
    HEAD,
    CandidateScorer,
    LanguageModel,
    Weights,
    check_weights,
    initialise,
    load_model_config,
    load_tokenizer,
    make_body,
    model_identity,
    resolve_model,
)
from alsace_dist.ranks.group import Runtime
from alsace_dist.tasks.base import Answers, encode_answers
from alsace_dist.training.engine import load_scorer

VOCABULARY = 40
PAD, END = 0, 1
RUNTIME = Runtime(0, 1, 0, torch.device("cpu"), None)
ENGINE = EngineConfig(zero_stage=0, dtype="fp32")


def make_state(seed: int = 0, tied: bool = False) -> tuple[MT5Config, dict[str, torch.Tensor]]:
    config = MT5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        architectures=["MT5ForConditionalGeneration"],
    )
    torch.manual_seed(seed)
    names = MT5ForConditionalGeneration(config).state_dict()
    state = {name: value.clone() for name, value in names.items() if not name.endswith("embed_tokens.weight")}
    state[HEAD] = 0.5 * torch.randn(VOCABULARY, 16)
    if tied:
        del state[HEAD]
    return config, state


def write_model(directory: Path, tied: bool = False) -> Path:
    config, state = make_state(tied=tied)
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(directory: Path) -> MT5ForConditionalGeneration:
    """Plain transformers, with the head that the file holds."""
    model = MT5ForConditionalGeneration.from_pretrained(directory).eval()
    stored = load_file(directory / "model.safetensors")
    assert torch.equal(model.lm_head.weight, stored[HEAD])
    assert not torch.equal(stored[HEAD], stored["shared.weight"])
    return model


def prompts(lengths: Sequence[int] = (3, 9, 1, 6, 9, 4)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [[*torch.randint(3, VOCABULARY, (length,), generator=generator).tolist(), END] for length in lengths]


def scorer(directory: Path, answers: Answers) -> CandidateScorer:
    return load_scorer(directory, answers, ENGINE, 0.0, RUNTIME)[0].eval()


@torch.no_grad()
def score(directory: Path, answers: Answers, rows: list[list[int]], languages: list[str]) -> torch.Tensor:
    inputs = AnswerCollator(answers, PAD)(rows, languages)
    return scorer(directory, answers)(*inputs.to(torch.device("cpu")))


@torch.no_grad()
def full_log_probs(model: Any, row: list[int], decoder: Sequence[int]) -> torch.Tensor:
    """log-softmax over the whole vocabulary at every decoder position, of one prompt without padding."""
    logits = model(input_ids=torch.tensor([row]), decoder_input_ids=torch.tensor([list(decoder)])).logits
    return torch.log_softmax(logits[0].double(), dim=-1)


# --- scores --------------------------------------------------------------------------------------------------------

LANGUAGES = ["en", "de", "de", "en", "xx", "de"]


@pytest.mark.parametrize("prefix", [(PAD,), (PAD, 5, 7)], ids=["start", "prefix"])
def test_single_tokens_get_the_full_softmax_renormalised_over_the_candidates(
    directory: Path, reference: MT5ForConditionalGeneration, prefix: tuple[int, ...]
) -> None:
    tokens = {"en": ((30,), (4,), (17,)), "de": ((8,), (4,), (39,)), "xx": ((4,), (30,), (8,))}
    answers = Answers(tokens, prefix, True)
    assert scorer(directory, answers).head.weight.shape == (5, 16)  # the rows that occur, and no other
    found = score(directory, answers, prompts(), LANGUAGES)
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
    found = score(directory, Answers(SEQUENCES, prefix, False), prompts(), LANGUAGES)
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
    answers = Answers(tokens, (PAD,), single)
    together = score(directory, answers, prompts(), LANGUAGES)
    for index, (row, language) in enumerate(zip(prompts(), LANGUAGES, strict=True)):
        torch.testing.assert_close(score(directory, answers, [row], [language])[0], together[index], rtol=0, atol=1e-5)
    longer = score(directory, answers, [*prompts(), *prompts([30])], [*LANGUAGES, "en"])
    torch.testing.assert_close(longer[:-1], together, rtol=0, atol=1e-5)


def test_a_checkpoint_that_was_saved_tied_scores_with_its_embedding(tmp_path: Path) -> None:
    tied = write_model(tmp_path / "tied", tied=True)
    model = MT5ForConditionalGeneration.from_pretrained(tied).eval()
    found = score(tied, Answers({"en": ((30,), (4,))}, (PAD,), True), prompts(), ["en"] * 6)
    for row, result in zip(prompts(), found, strict=True):
        whole = full_log_probs(model, row, [PAD])[-1][[30, 4]]
        torch.testing.assert_close(result.double(), whole - whole.logsumexp(0), rtol=0, atol=1e-5)


def test_the_gradient_reaches_every_parameter(directory: Path) -> None:
    for answers in (
        Answers({"en": ((30,), (4,))}, (PAD,), True),
        Answers({"en": ((30, END), (4, 5, END))}, (0,), False),
    ):
        module = scorer(directory, answers).train()
        inputs = AnswerCollator(answers, PAD)(prompts(), ["en"] * 6)
        module(*inputs.to(torch.device("cpu")))[:, 0].sum().backward()
        without = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        # With the start token alone, self-attention of the decoder sees one position: its softmax is constant.
        constant = ("SelfAttention.q.", "SelfAttention.k.", "SelfAttention.relative_attention_bias.")
        allowed = [name for name in without if answers.single_token and ".decoder." in f".{name}"]
        assert without == [name for name in allowed if any(part in name for part in constant)]


# --- the language model --------------------------------------------------------------------------------------------


def test_language_model_loss_is_that_of_transformers(directory: Path, reference: MT5ForConditionalGeneration) -> None:
    module = LanguageModel(make_body(load_model_config(directory), 0.0)).eval()
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
    module = LanguageModel(make_body(load_model_config(directory), 0.0)).eval()
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


# --- a checkpoint that does not fit --------------------------------------------------------------------------------


def check(directory: Path, state: dict[str, torch.Tensor]) -> str:
    """The complaint about a model directory with these tensors, without the directory's name."""
    config, _ = make_state()
    directory.mkdir(exist_ok=True)
    config.save_pretrained(directory)
    save_file(state, directory / "model.safetensors")
    answers = Answers({"en": ((30,), (4,))}, (PAD,), True)
    with pytest.raises(UserError) as caught:
        load_scorer(directory, answers, ENGINE, 0.0, RUNTIME)
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
    config, state = make_state()
    extra = {f"{part}.embed_tokens.weight": state["shared.weight"].clone() for part in ("encoder", "decoder")}
    extra["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(32, 4)
    save_file(state | extra, tmp_path / "model.safetensors")
    module = CandidateScorer(make_body(config, 0.0), Answers({"en": ((30,), (4,))}, (PAD,), True))
    weights = Weights(tmp_path)
    assert extra.keys() <= weights.keys() and not extra.keys() & state.keys()
    check_weights(module, weights)


# --- weight files --------------------------------------------------------------------------------------------------


def split(directory: Path, suffix: str) -> dict[str, torch.Tensor]:
    """Write tensors over two files and an index."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    state = {f"t{index}": torch.full((2, index + 1), float(index)) for index in range(4)}
    weight_map = {}
    for number, names in enumerate((("t0", "t2"), ("t1", "t3"))):
        file = f"{stem}-{number}.{suffix}"
        part = {name: state[name] for name in names}
        weight_map |= dict.fromkeys(names, file)
        if suffix == "safetensors":
            save_file(part, directory / file)
        else:
            torch.save(part, directory / file)
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return state


def check_tensors(directory: Path, state: dict[str, torch.Tensor]) -> None:
    weights = Weights(directory)
    assert weights.keys() == state.keys()
    assert "t0" in weights and "t9" not in weights
    for name, tensor in state.items():
        assert weights.shape(name) == tuple(tensor.shape)
        assert torch.equal(weights.tensor(name), tensor)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_tensors_from_several_files(tmp_path: Path, suffix: str) -> None:
    check_tensors(tmp_path, split(tmp_path, suffix))


def test_tensors_from_one_file(tmp_path: Path) -> None:
    state = {"t0": torch.arange(6.0).view(2, 3), "t1": torch.ones(4)}
    save_file(state, tmp_path / "model.safetensors")
    check_tensors(tmp_path, state)


@pytest.mark.parametrize("as_zip", [True, False], ids=["since torch 1.6", "before"])
def test_tensors_from_one_torch_file(tmp_path: Path, as_zip: bool) -> None:
    state = {"t0": torch.arange(6.0).view(2, 3), "t1": torch.ones(4)}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=as_zip)
    check_tensors(tmp_path, state)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"holds no model\.safetensors and no pytorch_model\.bin; model\.path must name"
    ):
        Weights(tmp_path)


class Evil:
    """A pickle that makes a directory when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("plain", [False, True], ids=["torch", "pickle"])
@pytest.mark.parametrize(
    "indexed",
    [
        True,
        pytest.param(
            False,
        ),
    ],
)
def test_nothing_in_a_torch_file_is_executed(tmp_path: Path, plain: bool, indexed: bool) -> None:
    marker = tmp_path / "executed"
    file = tmp_path / ("part.bin" if indexed else "pytorch_model.bin")
    if plain:
        file.write_bytes(pickle.dumps({"t0": Evil(marker)}))
    else:
        torch.save({"t0": Evil(marker)}, file)
    if indexed:
        (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"t0": "part.bin"}}')
    try:
        with pytest.raises(UserError, match=rf"{file.name}: cannot be read as weights \(.*\); get the file again"):
            Weights(tmp_path).tensor("t0")
    finally:
        assert not marker.exists()
    if not plain:
        torch.load(file, weights_only=False)
        assert marker.exists()  # it would have


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..\\..\\x/y"])
@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_names_no_file_elsewhere(tmp_path: Path, name: str, stem: str) -> None:
    (tmp_path / f"{stem}.index.json").write_text(json.dumps({"weight_map": {"a": "part", "t0": name}}))
    with pytest.raises(UserError, match=rf"{stem}\.index\.json: names the file .* outside its directory; get a sound"):
        Weights(tmp_path)


def test_broken_weight_files(tmp_path: Path) -> None:
    state = split(tmp_path, "safetensors")
    path = tmp_path / "model-0.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-8], b"", b"junk" * 100):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"model-0\.safetensors: cannot be read as safetensors \(.*\); get the file"
        ):
            Weights(tmp_path).tensor("t0")
    path.unlink()
    with pytest.raises(UserError, match=r"model-0\.safetensors: cannot be read as safetensors"):
        Weights(tmp_path).shape("t0")
    (tmp_path / "model.safetensors.index.json").unlink()
    torch.save(state, tmp_path / "part.bin")
    (tmp_path / "part.bin").write_bytes((tmp_path / "part.bin").read_bytes()[:-50])
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"t0": "part.bin"}}')
    with pytest.raises(UserError, match=r"part\.bin: cannot be read as weights"):
        Weights(tmp_path).tensor("t0")


@pytest.mark.parametrize(
    "index",
    [{}, [], {"weight_map": []}, {"weight_map": {"t0": 3}}, {"weight_map": {"t9": "model-0.safetensors"}}],
    ids=str,
)
def test_a_broken_index(tmp_path: Path, index: Any) -> None:
    split(tmp_path, "safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError):
        Weights(tmp_path).shape("t9")


# --- configs, tokenizers, names ------------------------------------------------------------------------------------


def test_anything_but_mt5_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_model_config(tmp_path)
    for value in ({"model_type": "t5"}, {"model_type": "xlm-roberta"}, {}):
        (tmp_path / "config.json").write_text(json.dumps(value))
        with pytest.raises(UserError, match=r"config\.json: model_type is .*; only 'mt5' is supported"):
            load_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mt5", "d_model": 24, "num_layers": 3}')
    config = load_model_config(tmp_path)
    assert (config.d_model, config.num_layers, config.num_decoder_layers) == (24, 3, 3)


@pytest.mark.parametrize("text", ["[]", '{"model_type": "mt5", "d_model": "x"}'])
def test_a_broken_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError):
        load_model_config(tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no usable tokenizer \(.*\); put the model's tokenizer files there"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", [None, "{}"], ids=["none beside a config", "broken"])
def test_a_tokenizer_that_is_none(tmp_path: Path, text: str | None) -> None:
    make_state()[0].save_pretrained(tmp_path)
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_names_of_models(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match=r"^model\.revision: .* is a directory, which has no revisions; remove it"):
        resolve_model(str(tmp_path), "main")
    with pytest.raises(
        UserError, match=r"^model\.path: 'a/b/c' is neither a directory nor to be had from the hub \(.*\)"
    ):
        resolve_model("a/b/c")  # not even a possible name, so the hub is not asked


def test_the_identity_of_a_model_changes_with_its_files(tmp_path: Path) -> None:
    write_model(tmp_path)
    found = [model_identity(tmp_path)]
    assert model_identity(write_model(tmp_path)) == found[0]
    save_file(make_state(seed=1)[1], tmp_path / "model.safetensors")
    found.append(model_identity(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    found.append(model_identity(tmp_path))
    assert len({json.dumps(one) for one in found}) == 3


# --- answers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = ["<pad>", "</s>", "<unk>", "yes", "no", "not", "at", "all", "ja", "nein", "<x>"]
    fast = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    fast.normalizer = normalizers.Replace("\u200b", "")  # as SentencePiece's own does
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def task(verbalizers: Any, **more: Any) -> TaskConfig:
    return TaskConfig(fields=["text"], template="{text}", labels=["a", "b"], verbalizers=verbalizers, **more)


def test_answers_of_one_token_each(tokenizer: Any) -> None:
    section = task({"de": ["ja", "nein"], "default": ["no", "yes"]}, decoder_prefix="<x> at")
    answers = encode_answers(section, tokenizer, ["en", "de"], 0)
    assert answers.tokens == {"en": ((4,), (3,)), "de": ((8,), (9,))}
    assert answers.decoder_prefix == (0, 10, 6)
    assert answers.single_token and answers.num_candidates == 2
    assert answers.vocabulary == [3, 4, 8, 9]


def test_one_longer_answer_makes_all_of_them_end_with_the_end_token(tokenizer: Any) -> None:
    answers = encode_answers(task({"de": ["ja", "nein"], "en": ["yes", "not at all"]}), tokenizer, ["en", "de"], 0)
    assert answers.tokens == {"en": ((3, 1), (5, 6, 7, 1)), "de": ((8, 1), (9, 1))}
    assert not answers.single_token and answers.decoder_prefix == (0,)


def test_how_answers_are_scored_does_not_depend_on_the_languages_at_hand(tokenizer: Any) -> None:
    section = task({"de": ["ja", "not nein"], "en": ["yes", "no"]})
    whole = encode_answers(section, tokenizer, ["en", "de"], 0)
    assert encode_answers(section, tokenizer, ["en"], 0).single_token == whole.single_token


@pytest.mark.parametrize(
    ("verbalizers", "message"),
    [
        (["yes", "\u200b"], r"the answer '.u200b' for 'en' has no tokens; give it text"),
        (["yes", "oui"], r"the answer 'oui' for 'en' holds tokens that the model does not know; choose words"),
        (["yes", "not oui"], r"the answer 'not oui' for 'en' holds tokens that the model does not know"),
        (["yes", "yes "], r"two answers for 'en' have the same tokens: \['yes', 'yes '\]; change one"),
        ({"de": ["ja", "nein"]}, r"has nothing for language 'en' and no default; add one"),
    ],
)
def test_answers_that_cannot_be_told_apart(tokenizer: Any, verbalizers: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^task\.verbalizers: {message}"):
        encode_answers(task(verbalizers), tokenizer, ["en"], 0)


def test_an_unknown_decoder_prefix(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"^task\.decoder_prefix: 'huh' holds unknown tokens; choose another"):
        encode_answers(task(["yes", "no"], decoder_prefix="huh"), tokenizer, ["en"], 0)
