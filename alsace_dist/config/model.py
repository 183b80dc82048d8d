"""The section ``model``."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from alsace_dist.config.base import Location, Section


class NanoConfig(Section):
    """Geometry of a small mT5 that is built and pretrained here."""

    vocab_size: Annotated[int, Field(ge=10, le=1_000_000)] = 4000
    """Pieces of the Unigram tokenizer that is trained on the pretraining texts."""
    d_model: Annotated[int, Field(ge=1, le=100_000)] = 128
    """Width."""
    d_kv: Annotated[int, Field(ge=1, le=100_000)] = 32
    """Width of an attention head."""
    d_ff: Annotated[int, Field(ge=1, le=100_000)] = 256
    """Width of the feed-forward layers."""
    num_heads: Annotated[int, Field(ge=1, le=100_000)] = 4
    """Attention heads."""
    num_layers: Annotated[int, Field(ge=1, le=100)] = 3
    """Encoder layers."""
    num_decoder_layers: Annotated[int, Field(ge=1, le=100)] = 1
    """Decoder layers."""


Mode = Literal["auto", "cloze", "head"]
Pooling = Literal["first", "mean"]
Masks = Literal["together", "left_to_right"]


class ModelConfig(Section):
    """The multilingual model."""

    path: Location | None = None
    """Local directory or hub name of a checkpoint of mT5, T5Gemma 2 or XLM-R; null: the nano model is pretrained
    first."""
    revision: str | None = None
    """Revision on the hub."""
    nano: NanoConfig | None = None
    """Build and pretrain a nano mT5 of this geometry instead of loading one."""
    mode: Mode = "auto"
    """How XLM-R answers. cloze: the template holds <mask> once, and the answers are scored there by the masked language
    model; head: a classification head over task.labels, which finetuning trains from nothing where the checkpoint has
    none, so the template needs no question. auto: cloze if the template holds <mask>, else head. mT5 and
    T5Gemma 2 have no choice: their decoders score the answers."""
    pooling: Pooling | None = None
    """What a classification head reads. first: the first token, as transformers' own head does (the default); mean: the
    mean over all tokens, as sentence encoders are trained."""

    masks: Masks = "together"
    """How XLM-R reads a candidate of several tokens, each at a mask of its own. together: all of them in one pass;
    left_to_right: each one where those before it are filled in, a pass for each."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.path is None) == (self.nano is None):
            raise ValueError("give either path or nano")
        if self.nano and (self.mode != "auto" or self.pooling or self.masks != "together"):
            raise ValueError("mode, pooling and masks are XLM-R's, and the nano model is an mT5; remove them")
        if self.pooling and self.mode == "cloze":
            raise ValueError("pooling is what a classification head reads, and mode: cloze has none; remove it")
        if self.revision and not self.path:
            raise ValueError("revision needs path")
        return self
