"""Prompts as token ids: the template whole, the example's texts as nothing but text, cut where they are too long.

What a template says (the question, the gap for the answer) must reach the model whatever the texts are, and what a text
says must not steer the model: ``</s>`` in a text is four characters, no end of sequence.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from alsace_dist.data.rows import Part
from alsace_dist.errors import UserError

SENTINEL = re.compile(r"<extra_id_\d+>")
# How templates mark the place of the answer, in the words of one family or another.
GAP = re.compile(rf"{SENTINEL.pattern}|<mask>|\[MASK\]")
_ANSWER = re.compile(r"(?<!\{){answer}(?!\})")
# The same as people misspell it, without blanks, dashes and capitals: <MASK>, <extra id 0>, [mask].
_IN_BRACKETS = re.compile(r"[<\[][^<>\[\]{}]{1,20}[>\]]")
_LIKE_A_GAP = re.compile(r"[<\[](extraid\d+|mask)[>\]]")
_NEIGHBOURS = ("word", "字", "1.")  # what a field may end with, for a sentinel right behind it


def control_tokens(tokenizer: Any) -> "re.Pattern[str]":
    """Matches what the tokenizer would take for a token of control, wherever it stands."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join([SENTINEL.pattern, *map(re.escape, sorted(special, key=len, reverse=True))]))


def as_plain_text(text: str, control: "re.Pattern[str]") -> str:
    """A text in which no token of control is left: a blank after its first character takes it apart."""
    if not control.search(text):
        # Tokenizers that look for ``<mask>`` in the normalised text find it in full-width letters, too.
        if text.isascii() or not control.search(normal := unicodedata.normalize("NFKC", text)):
            return text
        text = normal
    return control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


def check_controls(control: "re.Pattern[str]", gap: str, templates: Iterable[str], decoder_prefix: str) -> None:
    """Raises ``UserError`` for a token of control in a template or the decoder's prefix that is no gap, and for what
    looks like one to a person and is plain text to the tokenizer: <MASK>, <extra_id 0>, full-width letters."""
    for where, text in [("template", one) for one in templates] + [("decoder_prefix", decoder_prefix)]:
        for found in control.finditer(text):
            if not GAP.fullmatch(found[0]):
                raise UserError(f"task.{where}: {text!r} holds {found[0]}, a token of control; remove it")
        rest = unicodedata.normalize("NFKC", control.sub("", text))
        for found in _IN_BRACKETS.finditer(rest):
            if _LIKE_A_GAP.fullmatch(re.sub(r"[\s_-]", "", found[0]).casefold()):
                remedy = f"write {gap}" if gap else "remove it"
                raise UserError(f"task.{where}: {found[0]} in {text!r} is plain text to this model; {remedy}")


def check_gaps(tokenizer: Any, templates: Iterable[str], decoder_prefix: str, max_tokens: int, gap: str) -> None:
    """Every gap of a template or of the decoder's prefix must be one token, wherever a text may end before it.

    mT5's vocabulary holds its sentinels as pieces with a blank in front, so that "text<extra_id_0>" silently becomes
    seven tokens. ``gap``: how this family writes its (first) gap; empty if it has none. Raises ``UserError`` that says
    what to write, also if the templates alone leave no room for a text.
    """
    for where, text in [("template", one) for one in templates] + [("decoder_prefix", decoder_prefix)]:
        for found in GAP.findall(text):
            if not gap:
                raise UserError(
                    f"task.{where}: {text!r} holds {found}, and this model answers after the prompt, where nothing "
                    "marks a gap; remove it"
                )
            known = _token_id(tokenizer, found)
            if known is None:
                raise UserError(f"task.{where}: {found} is no token of this model, in {text!r}; write {gap}")
            for neighbour in _NEIGHBOURS:
                rendered = re.sub(r"{\w+}", neighbour, text)
                ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
                if ids.count(known) != rendered.count(found):
                    raise UserError(
                        f"task.{where}: {found} does not become one token in {text!r}: this model needs a blank "
                        "before it"
                    )
        if where == "template":
            length = len(tokenizer(re.sub(r"{\w+}", "", text))["input_ids"])
            if length + len(re.findall(r"{\w+}", text)) > max_tokens:
                raise UserError(
                    f"task.max_tokens: {max_tokens} leaves no room for texts: the template {text!r} alone takes "
                    f"{length} tokens; raise it"
                )


def with_gap(template: str, gap_after: Callable[[str], str]) -> str:
    """A template in which ``{answer}`` is written as a model writes it. ``gap_after``: behind the text before it."""
    before, *rest = _ANSWER.split(template, maxsplit=1)
    return before + gap_after(before) + rest[0] if rest else template


def _token_id(tokenizer: Any, text: str) -> int | None:
    for name in (text, "▁" + text):
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
                # Several tokens may be of one character (℃, or bytes), at whose end nothing would be cut off.
                kept = max((end for end in tokens[:cap] if end < tokens[-1]), default=0)
                contents[index] = contents[index][:kept]
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
