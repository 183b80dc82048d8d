"""Prompts as token ids: the template whole, the example's texts as nothing but text, cut where they are too long.

What a template says (the question, the gap for the answer) must reach the model whatever the texts are, and what a text
says must not steer the model: ``</s>`` in a text is four characters, no end of sequence.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from alsace_dist.data.rows import Part
from alsace_dist.errors import UserError

SENTINEL = re.compile(r"<extra_id_\d+>")
_NEIGHBOURS = ("word", "字", "1.")  # what a field may end with, for a sentinel right behind it


def control_tokens(tokenizer: Any) -> "re.Pattern[str]":
    """Matches what the tokenizer would take for a token of control, wherever it stands."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join([SENTINEL.pattern, *map(re.escape, sorted(special, key=len, reverse=True))]))


def as_plain_text(text: str, control: "re.Pattern[str]") -> str:
    """A text in which no token of control is left: a blank after its first character takes it apart."""
    if "<" not in text and "[" not in text and not control.search(text):
        return text
    return control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


def check_sentinels(tokenizer: Any, templates: Iterable[str], decoder_prefix: str, max_tokens: int) -> None:
    """Every sentinel of a template or of the decoder's prefix must be one token, wherever a text may end before it.

    mT5's vocabulary holds them as pieces with a blank in front, so that "text<extra_id_0>" silently becomes seven
    tokens. Raises ``UserError`` that says what to write, also if the templates alone leave no room for a text.
    """
    for where, text in [("template", one) for one in templates] + [("decoder_prefix", decoder_prefix)]:
        for sentinel in SENTINEL.findall(text):
            known = _sentinel_id(tokenizer, sentinel)
            if known is None:
                raise UserError(
                    f"task.{where}: {sentinel} is no token of this model, in {text!r}; the first is <extra_id_0>"
                )
            for neighbour in _NEIGHBOURS:
                rendered = re.sub(r"{\w+}", neighbour, text)
                ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
                if ids.count(known) != rendered.count(sentinel):
                    raise UserError(
                        f"task.{where}: {sentinel} does not become one token in {text!r}: this model needs a blank "
                        "before it"
                    )
        if where == "template":
            length = len(tokenizer(re.sub(r"{\w+}", "", text))["input_ids"])
            if length + len(re.findall(r"{\w+}", text)) > max_tokens:
                raise UserError(
                    f"task.max_tokens: {max_tokens} leaves no room for texts: the template {text!r} alone takes "
                    f"{length} tokens; raise it"
                )


def _sentinel_id(tokenizer: Any, sentinel: str) -> int | None:
    for name in (sentinel, "▁" + sentinel):
        found = tokenizer.convert_tokens_to_ids(name)
        if found is not None and found != tokenizer.unk_token_id:
            return int(found)
    return None


def cut(tokenizer: Any, parts: Sequence[Part], encoding: Any, max_tokens: int) -> Any:
    """The encoding of a prompt whose texts are cut, the longest first, so that it has at most ``max_tokens`` tokens.

    ``encoding``: of the whole prompt. Raises ``UserError`` if the template leaves no room.
    """
    excess = len(encoding.ids) - max_tokens
    contents = [part.content for part in parts]
    while excess > 0:
        ends = _token_ends(parts, contents, encoding)
        lengths = {index: len(tokens) for index, tokens in ends.items()}
        room = sum(lengths.values()) - excess
        if room < len(lengths):
            raise UserError(f"task.max_tokens: {max_tokens} leaves no room for texts beside the template; raise it")
        cap = _cap(list(lengths.values()), room)
        for index, tokens in ends.items():
            if len(tokens) > cap:
                contents[index] = contents[index][: tokens[cap - 1]]
        encoding = tokenizer("".join(contents)).encodings[0]
        # Pieces may merge otherwise at a cut; then a little more goes.
        excess = len(encoding.ids) - max_tokens
    return encoding


def _token_ends(parts: Sequence[Part], contents: Sequence[str], encoding: Any) -> dict[int, list[int]]:
    """Index of a text -> where its tokens end, in characters of the text."""
    ends: dict[int, list[int]] = {}
    start = 0
    for index, (part, content) in enumerate(zip(parts, contents, strict=True)):
        if part.is_text:
            stop = start + len(content)
            ends[index] = [end - start for begin, end in encoding.offsets if start < end <= stop and begin >= start - 1]
        start += len(content)
    return ends


def _cap(lengths: Sequence[int], room: int) -> int:
    """The largest cap, at least 1, under which lengths cut to it add up to at most ``room``."""
    return next((cap for cap in range(max(lengths), 0, -1) if sum(min(length, cap) for length in lengths) <= room), 1)
