"""Tasks as a language model sees them: prompts per language and candidate answers as token ids."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from alsace_dist.config import TaskConfig
from alsace_dist.errors import UserError
from alsace_dist.files.shards import Group

Value = TypeVar("Value")


@dataclass(frozen=True)
class Answers:
    """Candidate answers of all languages as token ids.

    ``tokens``: language -> one tuple of ids per candidate. ``single_token``: all of them are one token long; then
    ``vocabulary`` (sorted ids of all answers) are the only rows of the output head that scoring needs. Otherwise each
    ends with the end-of-sequence token, so that an answer does not win for being the beginning of another.
    """

    tokens: dict[str, tuple[tuple[int, ...], ...]]
    decoder_prefix: tuple[int, ...]
    single_token: bool

    @property
    def vocabulary(self) -> list[int]:
        """Sorted token ids that occur in answers."""
        return sorted({token for rows in self.tokens.values() for row in rows for token in row})

    @property
    def num_candidates(self) -> int:
        """Candidates per example."""
        return len(next(iter(self.tokens.values())))


def prompt(task: TaskConfig, language: str, fields: dict[str, str]) -> str:
    """The model's input for one example. Raises ``UserError`` if there is no template or a field is missing."""
    try:
        return for_language(task.templates(), language, "template").format_map(fields)
    except KeyError as error:
        raise UserError(
            f"task.fields: an example in {language!r} lacks the field {error}; prepare the data with this task"
        ) from None


def for_language(values: dict[str, Value], language: str, name: str) -> Value:
    """A language's own value or the default one. Raises ``UserError`` if there is neither."""
    if language in values:
        return values[language]
    if "default" in values:
        return values["default"]
    raise UserError(f"task.{name}: has nothing for language {language!r} and no default; add one")


def encode_answers(task: TaskConfig, tokenizer: Any, languages: Iterable[str], decoder_start: int) -> Answers:
    """Tokenise the candidate answers of each language.

    Raises ``UserError`` if an answer is empty, holds unknown tokens, or two answers of a language are the same tokens.
    """
    tokens: dict[str, tuple[tuple[int, ...], ...]] = {}
    for language in languages:
        answers = for_language(task.answers(), language, "verbalizers")
        rows = tuple(tuple(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers)
        for answer, row in zip(answers, rows, strict=True):
            _check_answer(answer, row, language, tokenizer.unk_token_id)
        if len(set(rows)) != len(rows):
            raise UserError(
                f"task.verbalizers: two answers for {language!r} have the same tokens: {answers}; change one"
            )
        tokens[language] = rows
    # Of all languages of the task: finetuning sees the source alone, and must train the score that scoring uses.
    every = [answer for answers in task.answers().values() for answer in answers]
    single_token = all(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) == 1 for answer in every)
    if not single_token:
        end = (tokenizer.eos_token_id,)
        tokens = {language: tuple(row + end for row in rows) for language, rows in tokens.items()}
    prefix = tuple(tokenizer(task.decoder_prefix, add_special_tokens=False)["input_ids"]) if task.decoder_prefix else ()
    if tokenizer.unk_token_id in prefix:
        raise UserError(f"task.decoder_prefix: {task.decoder_prefix!r} holds unknown tokens; choose another")
    return Answers(tokens, (decoder_start, *prefix), single_token)


def _check_answer(answer: str, row: tuple[int, ...], language: str, unknown: int | None) -> None:
    if not row:
        raise UserError(f"task.verbalizers: the answer {answer!r} for {language!r} has no tokens; give it text")
    if unknown in row:
        raise UserError(
            f"task.verbalizers: the answer {answer!r} for {language!r} holds tokens that the model does not know; "
            "choose words of its vocabulary"
        )


@dataclass(frozen=True)
class EncodedText:
    """One example in one language as token ids; ``num_unknown``: tokens that the vocabulary lacks."""

    key: str
    language: str
    label: int | None
    input_ids: list[int]
    num_unknown: int
    is_cut: bool


def encode_groups(
    task: TaskConfig, tokenizer: Any, groups: Iterable[Group], languages: Iterable[str]
) -> list[EncodedText]:
    """Prompts of all groups in the given languages (where a group has them), in the groups' order, tokenised."""
    wanted = sorted(languages)
    rows = [(group, language) for group in groups for language in wanted if language in group.texts]
    if not rows:
        return []
    prompts = [prompt(task, language, group.texts[language]) for group, language in rows]
    cut = tokenizer(prompts, truncation=True, max_length=task.max_tokens, return_attention_mask=False).encodings
    unknown = tokenizer.unk_token_id
    return [
        EncodedText(group.key, language, group.label, one.ids, one.ids.count(unknown), bool(one.overflowing))
        for (group, language), one in zip(rows, cut, strict=True)
    ]
