"""The section ``task``: what an example is."""

import math
import string
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from alsace_dist.config.base import MAX_NAME, Section, quote
from alsace_dist.reading import appearance, shorten

ANSWER = "answer"  # in braces, in a template: the place of the answer


class TaskConfig(Section):
    """Multi-class classification of one text, or of several, as answers of a language model."""

    fields: list[str] = Field(min_length=1)
    """Names of the text fields of an example, such as [premise, hypothesis]."""
    template: str | dict[str, str]
    """Prompt with {field} in braces; or a mapping language -> prompt, with a `default`. {answer} marks the place of the
    answer, which each model writes in its own way: <extra_id_0>, <mask>. english or native: the prompts that come with
    the published dataset of `data.inputs`, in English for all languages or in each one's own; SET/native where the data
    does not say which set it is."""
    prompts: str = ""
    """Where the prompts come from, as SET/native; `template` fills it in."""
    words: dict[str, dict[str, str]] | dict[str, dict[str, dict[str, str]]] = {}
    """What a prompt says for the values of a field, such as {question: {cause: "What was the cause?", effect: "What
    happened then?"}}; or a mapping language -> this, with a `default`. Other values of such a field are bad records."""
    labels: list[str]
    """Label names as the data spells them, in a fixed order, two or more; none where every group has candidates of its
    own."""
    verbalizers: list[str] | dict[str, list[str]] = []
    """Candidate answers, one per label; or a mapping language -> answers, with a `default`. Empty: the labels."""
    candidates: list[str] | Literal["own"] = []
    """Fields that hold each example's own candidates, one per label, such as [choice1, choice2]; then there are no
    verbalizers, and a label says which of the fields is right. own: every group holds candidates, as many as it likes,
    and its label is the number of the right one, from 0, or a list of several."""
    gap: str = ""
    """What stands in the texts for the place of the answer, such as <mask>: once in every prompt; then no template has
    {answer}."""
    decoder_prefix: str = ""
    """Text that the decoder has already produced before the answer, such as the sentinel <extra_id_0>."""
    candidate_score: Literal["sum", "mean", "pmi", "mean_pmi"] = "sum"
    """What a candidate scores. sum: the log-likelihood of its tokens; mean: the same by token, for candidates of
    different lengths; pmi and mean_pmi: these, less what the candidate scores in a prompt without context, so that none
    wins for being common."""
    context_free_template: str | dict[str, str] = ""
    """pmi and mean_pmi: the prompt without context, as in template, such as "{question} {answer}"."""
    max_tokens: Annotated[int, Field(ge=2, le=100_000)] = 256
    """Longest prompt in tokens; in longer ones the texts are cut, the longest first, and counted."""

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_as_text(cls, value: Any) -> Any:
        """YAML reads true and 1 as what they are; data spells them as text."""
        if not isinstance(value, list):  # a set has no order, and the order of labels counts
            raise ValueError(f"must be a list, in the order that answers have, not {quote(value)}")
        for label in value:
            is_number = isinstance(label, int | float) and math.isfinite(label)
            if not is_number and not (isinstance(label, str) and label.strip() == label and label.isprintable()):
                raise ValueError(f"holds {quote(label)}, which is no name; write each label as the data spells it")
        return [str(label).lower() if isinstance(label, bool) else str(label) for label in value]

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_names()
        self._check_words()
        self._check_answers()
        shown = set(self._checked_candidates()) | self._checked_templates()
        if unused := sorted(set(self.fields) - shown):
            raise ValueError(f"fields: no template uses {unused[0]}; remove it or use it")
        return self

    def _check_names(self) -> None:
        for name in ("labels", "fields"):
            given = getattr(self, name)
            if twice := next((one for number, one in enumerate(given) if one in given[:number]), None):
                raise ValueError(f"{name} holds {quote(twice)} twice; remove one")
        seen: dict[str, str] = {}
        for label in self.labels:
            if (other := seen.setdefault(appearance(label), label)) != label:
                shown = f"{shorten(ascii(other), 80)} and {shorten(ascii(label), 80)}"
                raise ValueError(f"labels {shown} look the same; spell them apart, as the data does")
        if wrong := [field for field in self.fields if not field.isidentifier() or len(field) > MAX_NAME]:
            name = quote(wrong[0])
            raise ValueError(f"fields: {name} is not a name that a template can hold; use a few letters, digits and _")
        if len(self.labels) < 2 and not self.has_own_candidates:
            raise ValueError(f"labels must hold two or more, not {len(self.labels)}")

    def _check_answers(self) -> None:
        for language, answers in self.answers().items():
            if len(answers) != len(self.labels):
                raise ValueError(f"verbalizers for {language} must hold one answer per label ({len(self.labels)})")
            if not all(answer.strip() for answer in answers) or len(set(answers)) != len(answers):
                raise ValueError(
                    f"verbalizers for {language} must be different answers, none of them empty: {quote(answers)}"
                )

    def _checked_templates(self) -> set[str]:
        """The fields that the templates use."""
        used_anywhere: set[str] = set()
        if self.needs_context_free != bool(self.context_free_template):
            said = "is needed with" if self.needs_context_free else "is only used with"
            raise ValueError(f"context_free_template {said} candidate_score: pmi or mean_pmi")
        every = [("template", language, one) for language, one in self.templates().items()]
        every += [("context_free_template", language, one) for language, one in self.context_free_templates().items()]
        for name, language, template in every:
            try:
                parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
            except ValueError as error:
                raise ValueError(f"{name} for {language} is broken ({error}); write {{{{ for a brace") from None
            if any(form or conversion for _, _, form, conversion in parts):
                raise ValueError(f"{name} for {language} must hold bare {{field}}s, without ':' or '!'")
            used = [one or "" for _, one, _, _ in parts]
            if used.count(ANSWER) > 1 and ANSWER not in self.fields:
                raise ValueError(f"{name} for {language} holds {{{ANSWER}}} twice; there is one answer")
            if self.gap and ANSWER in used and ANSWER not in self.fields:
                raise ValueError(f"{name} for {language} holds {{{ANSWER}}}, and gap says that the texts do")
            used = [one for one in used if one != ANSWER or one in self.fields]
            if (not used and name == "template") or set(used) - set(self.fields):
                fields, found = quote(self.fields), quote(used)
                raise ValueError(f"{name} for {language} must use {{field}} of fields {fields}, it uses {found}")
            used_anywhere |= set(used)
        return used_anywhere

    def _check_words(self) -> None:
        for language, fields in self.words_of().items():
            if unknown := sorted(fields.keys() - set(self.fields) | fields.keys() & set(self.candidate_fields)):
                raise ValueError(
                    f"words for {language}: {quote(unknown[0])} is no field that a prompt shows; remove it"
                )
            for field, words in fields.items():
                if not words or any("{" in text or "}" in text for text in words.values()):
                    raise ValueError(f"words for {language}: {field} must map its values to words without braces")

    def _checked_candidates(self) -> list[str]:
        if not self.candidates:
            return []
        if self.verbalizers:
            raise ValueError("verbalizers are the same for every example; remove them, or candidates")
        if isinstance(self.candidates, str):
            if self.labels:
                raise ValueError("labels name what candidates stand for, and candidates: own are each group's; use []")
            return []
        if unknown := sorted(set(self.candidates) - set(self.fields)):
            raise ValueError(f"candidates: {unknown[0]!r} is not one of fields {self.fields}; add it there")
        if len(set(self.candidates)) != len(self.candidates) or len(self.candidates) != len(self.labels):
            raise ValueError(f"candidates must name one field per label ({len(self.labels)}), each once")
        return self.candidates

    @property
    def candidate_fields(self) -> list[str]:
        """The fields that hold candidates."""
        return [] if isinstance(self.candidates, str) else self.candidates

    @property
    def has_own_candidates(self) -> bool:
        """Whether every group holds its candidates, in any number."""
        return self.candidates == "own"

    @property
    def num_candidates(self) -> int | None:
        """Candidates of every group; None if groups bring their own in any number."""
        return len(self.labels) or None

    def templates(self) -> dict[str, str]:
        """Language -> prompt template, always with a `default` unless the mapping in the YAML lacks one."""
        return {"default": self.template} if isinstance(self.template, str) else self.template

    @property
    def needs_context_free(self) -> bool:
        """Whether a candidate's score is compared with its score without context."""
        return self.candidate_score in ("pmi", "mean_pmi")

    def context_free_templates(self) -> dict[str, str]:
        """As ``templates``; empty without such a prompt."""
        given = self.context_free_template
        return {} if not given else {"default": given} if isinstance(given, str) else given

    def prompt_templates(self, language: str) -> list[str]:
        """The templates of all prompts that are made for a language."""
        found = [
            every.get(language, every.get("default")) for every in (self.templates(), self.context_free_templates())
        ]
        return [template for template in found if template is not None]

    def words_of(self) -> dict[str, dict[str, dict[str, str]]]:
        """Language -> field -> value -> what a prompt says for it; with a `default` as in ``templates``, or empty."""
        is_mapping = any(isinstance(text, dict) for values in self.words.values() for text in values.values())
        words: dict[str, Any] = dict(self.words)
        return words if is_mapping or not words else {"default": words}

    def answers(self) -> dict[str, list[str]]:
        """Language -> candidate answers; empty if every example has its own."""
        if self.candidates:
            return {}
        if isinstance(self.verbalizers, list):
            return {"default": self.verbalizers or self.labels}
        return self.verbalizers
