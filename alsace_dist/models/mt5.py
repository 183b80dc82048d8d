"""mT5 as a scorer of candidate answers, and as a language model for pretraining; reading and checking weights.

The output head is kept apart from the body on purpose. transformers ties mT5's head to its input embedding although
the two differ in every released checkpoint, and under ZeRO-3 it then overwrites the head without a word. Here the body
(``MT5Model``) has no head at all; the rows that the answers need are a small parameter of their own, filled from the
checkpoint's ``lm_head.weight`` and spliced back into the whole head on export.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alsace_dist.errors import UserError
from alsace_dist.files.manifest import digest_bytes, digest_json, read_json
from alsace_dist.tasks.base import Answers

HEAD = "lm_head.weight"
EMBEDDING = "shared.weight"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class AnswerHead(nn.Module):
    """The rows of the output head that belong to the answers' tokens. ``weight``: [num_tokens, d_model]."""

    def __init__(self, num_tokens: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, d_model))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [batch, d_model] -> float32 logits [batch, num_tokens]; bf16 logits would quantise the loss."""
        return nn.functional.linear(hidden.float(), self.weight.float())


class CandidateScorer(nn.Module):
    """log P(candidate | prompt) over the candidates of each prompt: the encoder runs once, the decoder scores.

    One module with one ``forward``, because DeepSpeed hooks the root: calling a part of it would bypass the hooks.
    """

    head: AnswerHead

    def __init__(self, body: Any, answers: Answers) -> None:
        super().__init__()
        self.body: Any = body
        self.single_token = answers.single_token
        size, width = body.config.vocab_size, body.config.d_model
        self.head = AnswerHead(len(answers.vocabulary) if self.single_token else size, width)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, answer_ids: Tensor
    ) -> Tensor:
        """Score candidates.

        input_ids, attention_mask: [batch, length]. With single-token answers decoder_input_ids is [batch, prefix] and
        answer_ids [batch, K] indexes the head's rows. Otherwise decoder_input_ids is [batch, K, target] and answer_ids
        [batch, K, target] holds the token that each position predicts, -100 where it counts for nothing.
        Returns float32 log-probabilities [batch, K], normalised over the K candidates.
        """
        if self.single_token:
            output = self.body(
                input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids, use_cache=False
            )
            # The softmax over K logits is the full softmax renormalised over the candidates: exact without full logits.
            logits = self.head(output.last_hidden_state[:, -1]).gather(1, answer_ids)
            return torch.log_softmax(logits, dim=-1)
        return self._score_sequences(input_ids, attention_mask, decoder_input_ids, answer_ids)

    def _score_sequences(
        self, input_ids: Tensor, mask: Tensor, decoder_input_ids: Tensor, answer_ids: Tensor
    ) -> Tensor:
        batch, num_candidates, _ = decoder_input_ids.shape
        encoded = self.body.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        hidden = self.body.decoder(
            input_ids=decoder_input_ids.flatten(0, 1),
            encoder_hidden_states=encoded.repeat_interleave(num_candidates, dim=0),
            encoder_attention_mask=mask.repeat_interleave(num_candidates, dim=0),
            use_cache=False,
        ).last_hidden_state
        counted = answer_ids.flatten(0, 1) != -100
        tokens = answer_ids.flatten(0, 1)[counted]
        token_log_probs = -nn.functional.cross_entropy(self.head(hidden[counted]), tokens, reduction="none")
        # Not index_add, whose order, and so last bits, vary on GPUs.
        by_position = torch.zeros(counted.shape, device=hidden.device)
        by_position[counted] = token_log_probs
        return torch.log_softmax(by_position.sum(dim=1).view(batch, num_candidates), dim=-1)


class LanguageModel(nn.Module):
    """Body with a whole, untied head, for pretraining a nano model."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body: Any = body
        self.head = AnswerHead(body.config.vocab_size, body.config.d_model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, answer_ids: Tensor
    ) -> Tensor:
        """Mean cross-entropy of each row's target tokens (answer_ids [batch, target], -100 = not counted): [batch]."""
        hidden = self.body(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids, use_cache=False
        ).last_hidden_state
        # Over the whole vocabulary a float32 product would take too long; the loss is float32 all the same.
        logits = nn.functional.linear(hidden.flatten(0, 1), self.head.weight).float()
        losses = nn.functional.cross_entropy(logits, answer_ids.flatten(), ignore_index=-100, reduction="none").view(
            answer_ids.shape
        )
        return losses.sum(dim=1) / (answer_ids != -100).sum(dim=1).clamp(min=1)


def make_body(config: Any, dropout: float) -> Any:
    """An mT5 without a head. Encoder, decoder and ``shared`` hold one and the same embedding module."""
    from transformers import MT5Model

    config.dropout_rate = dropout
    config.use_cache = False
    body = MT5Model(config)
    body.set_input_embeddings(body.shared)
    return body


def initialise(module: LanguageModel, seed: int) -> None:
    """Initial values of a new model, the same for every rank and world size.

    T5's scheme as in transformers, except for the head: its stock initialisation (standard deviation 1) makes the
    first loss near 150; d_model ** -0.5 makes it ln(vocabulary).
    """
    torch.manual_seed(seed)
    # Not init_weights(): that leaves alone what the constructor has initialised, from whatever state torch was in.
    module.body.apply(module.body._init_weights)
    nn.init.normal_(module.head.weight, std=module.body.config.d_model**-0.5)


class Weights:
    """The tensors of a ``transformers`` directory, read one at a time: safetensors, whole or sharded, or torch files.

    Torch files are opened with ``weights_only=True``: nothing in them is executed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._torch: dict[str, dict[str, Tensor]] = {}
        self._files = self._index()

    def _index(self) -> dict[str, str]:
        for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
            index = self.directory / f"{stem}.{suffix}.index.json"
            single = self.directory / f"{stem}.{suffix}"
            if index.exists():
                value = read_json(index, "get a sound checkpoint")
                files = value.get("weight_map") if isinstance(value, dict) else None
                if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
                    raise UserError(f"{index}: holds no weight_map of file names; get a sound checkpoint")
                if bad := next((name for name in files.values() if Path(name).name != name), None):
                    raise UserError(f"{index}: names the file {bad!r} outside its directory; get a sound checkpoint")
                return files
            if single.exists():
                return dict.fromkeys(self._keys(single), single.name)
        raise UserError(
            f"{self.directory}: holds no model.safetensors and no pytorch_model.bin; "
            "model.path must name a transformers directory"
        )

    def _keys(self, file: Path) -> list[str]:
        if file.suffix == ".bin":
            return list(self._load_torch(file.name))
        with _open_safetensors(file) as opened:
            return list(opened.keys())

    def _load_torch(self, name: str) -> dict[str, Tensor]:
        if name not in self._torch:
            path = self.directory / name
            try:
                # Files in the format from before torch 1.6 are no zip archives and cannot be mapped.
                mapped = zipfile.is_zipfile(path)
                self._torch = {name: torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)}
            except Exception as error:  # torch raises many kinds; all of them mean that the file is not usable
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{path}: cannot be read as weights ({reason}); get the file again") from None
        return self._torch[name]

    def _missing(self, key: str) -> UserError:
        return UserError(f"{self.directory / self._files[key]}: lacks {key}, which the index lists; get the file again")

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def keys(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU. Raises ``UserError`` if the file is broken."""
        name = self._files[key]
        if name.endswith(".bin"):
            found = self._load_torch(name)
            if not isinstance(found, dict) or not isinstance(found.get(key), Tensor):
                raise self._missing(key)
            return found[key]
        with _open_safetensors(self.directory / name) as opened:
            if key not in opened.keys():  # noqa: SIM118 (not a mapping)
                raise self._missing(key)
            tensor: Tensor = opened.get_tensor(key)
        return tensor

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor without reading it (safetensors)."""
        name = self._files[key]
        if name.endswith(".bin"):
            return tuple(self.tensor(key).shape)
        with _open_safetensors(self.directory / name) as opened:
            if key not in opened.keys():  # noqa: SIM118 (not a mapping)
                raise self._missing(key)
            return tuple(opened.get_slice(key).get_shape())


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); get the file again") from None


def head_key(weights: Weights) -> str:
    """Where the output head is: its own tensor, or the embedding in a checkpoint that was saved tied."""
    return HEAD if HEAD in weights else EMBEDDING


def check_weights(module: CandidateScorer, weights: Weights) -> None:
    """Compare names and shapes of a checkpoint with the model. Raises ``UserError`` with all that do not fit.

    Tensors that transformers itself leaves out or duplicates are allowed.
    """
    needed = {key: tuple(getattr(p, "ds_shape", p.shape)) for key, p in module.body.named_parameters()}
    known = {HEAD, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    known.add("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")
    problems = [f"{key} is missing" for key in sorted(needed.keys() - weights.keys())]
    problems += [f"{key} is not of this model" for key in sorted(weights.keys() - needed.keys() - known)]
    problems += [
        f"{key} has shape {weights.shape(key)}, not {shape}"
        for key, shape in sorted(needed.items())
        if key in weights and weights.shape(key) != shape
    ]
    head_shape = weights.shape(head_key(weights)) if not problems else needed[EMBEDDING]
    if head_shape != needed[EMBEDDING]:
        problems.append(f"{HEAD} has shape {head_shape}, not {needed[EMBEDDING]}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        rows = "; ".join(problems[:5])
        raise UserError(f"{weights.directory}: does not fit its config.json: {rows}{more}; get a sound checkpoint")


def load_tokenizer(directory: Path) -> Any:
    """The model's tokenizer, always through AutoTokenizer. Raises ``UserError`` if there is none."""
    from transformers import AutoTokenizer

    remedy = "put the model's tokenizer files there"
    # Without any, transformers makes an empty tokenizer of the model's type and says nothing.
    if not any((directory / name).exists() for name in ("tokenizer.json", "spiece.model", "sentencepiece.model")):
        raise UserError(f"{directory}: has no usable tokenizer (no tokenizer.json, no spiece.model); {remedy}")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds for a broken file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{directory}: has no usable tokenizer ({reason}); {remedy}") from None


def load_model_config(directory: Path) -> Any:
    """The model's transformers config. Raises ``UserError`` for anything but an mT5."""
    from transformers import MT5Config

    path = directory / "config.json"
    value = read_json(path, "get a sound checkpoint")
    kind = value.get("model_type") if isinstance(value, dict) else None
    if kind != "mt5":
        raise UserError(f"{path}: model_type is {kind!r}; only 'mt5' is supported")
    try:
        return MT5Config.from_dict(value)
    except Exception as error:  # transformers' own validation, of several kinds
        raise UserError(f"{path}: {' '.join(str(error).split())[:200]}; get a sound checkpoint") from None


CONFIG_FILES = ["*.json", "*.model"]
MODEL_FILES = [*CONFIG_FILES, "*.safetensors", "pytorch_model*.bin"]


def resolve_model(path: str, revision: str | None = None, patterns: list[str] = MODEL_FILES) -> Path:
    """Local directory of a model, downloading the files that ``patterns`` name from the hub if it is not a directory.

    Raises ``UserError`` if it is neither here nor to be had.
    """
    if Path(path).is_dir():
        if revision:
            raise UserError(f"model.revision: {path} is a directory, which has no revisions; remove it")
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises dozens of kinds; to a person they are all this one
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.path: {path!r} is neither a directory nor to be had from the hub ({reason}); "
            "check the name, or download it beforehand and give its directory"
        ) from None


def model_identity(directory: Path) -> dict[str, Any]:
    """What tells a model's files from another's without reading gigabytes.

    Size and first and last mebibyte of each weight file, and the configs whole.
    """
    identity: dict[str, Any] = {}
    for file in sorted(directory.iterdir()):
        if file.suffix in (".json", ".model"):
            identity[file.name] = digest_bytes(file.read_bytes())
        elif file.suffix in (".safetensors", ".bin"):
            with file.open("rb") as opened:
                head = opened.read(1 << 20)
                opened.seek(max(0, file.stat().st_size - (1 << 20)))
                tail = opened.read()
            identity[file.name] = [file.stat().st_size, digest_bytes(head + tail)]
    return {"model": digest_json(identity)}
