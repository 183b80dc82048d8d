"""What every section of the YAML is made of: its base class, bounded numbers, names and places."""

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from alsace_dist.reading import WHERE_SECRETS_GO, secret_in, shorten

Split = Literal["pretrain", "labeled", "unlabeled", "dev", "test"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Size = Annotated[int, Field(ge=0, le=10**15)]  # in elements
Steps = Annotated[int, Field(ge=1, le=10**8)]  # more than anyone waits for
Seconds = Annotated[float, Field(ge=1.0, le=1e6)]


MAX_PATH_BYTES = 4096  # PATH_MAX of Linux
MAX_NAME = 64  # characters of what stands in many lines for people, or names a directory


def quote(value: Any) -> str:
    """A value of a person's as an error shows it."""
    return shorten(repr(value), 80)


def _is_location(text: str) -> str:
    if not text.strip():
        raise ValueError("must name a place, and is blank")
    if "\0" in text or not text.isprintable():
        raise ValueError(f"{shorten(ascii(text), 80)} holds a character that no path should; rename it")
    if len(text.encode()) > MAX_PATH_BYTES:
        raise ValueError(f"{quote(text)} is longer than a path can be ({MAX_PATH_BYTES:,} bytes); correct it")
    if secret := secret_in(text):  # would be in the run's copy of its config, for all who read the run
        raise ValueError(f"a URL that holds {secret}; {WHERE_SECRETS_GO}")
    return os.path.expanduser(text)  # noqa: PTH111 (a URL keeps its slashes); ~ as shells read it


def _is_location_if_any(text: str) -> str:
    return _is_location(text) if text else text


def _is_local(text: str) -> str:
    if "://" in text or "::" in text:
        raise ValueError(f"{quote(text)} is a URL; a run is written to a directory of this machine's disks")
    return text


def _is_language(text: str) -> str:
    if not text.isprintable() or text.split() != [text] or len(text) > MAX_NAME:
        raise ValueError(f"{shorten(ascii(text), 80)} does not name a language; use one word, such as en or zh-CN")
    return text


Location = Annotated[str, Field(min_length=1), AfterValidator(_is_location)]  # of files or a store
LocationIfAny = Annotated[str, AfterValidator(_is_location_if_any)]
LocalDirectory = Annotated[Location, AfterValidator(_is_local)]
Language = Annotated[str, AfterValidator(_is_language)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take ``true`` for 1, also within a mapping."""
        truths = [one for one in (value.values() if isinstance(value, Mapping) else [value]) if isinstance(one, bool)]
        if truths:
            kinds = list(_types_in(cls.model_fields[str(info.field_name)].annotation))
            if Any not in kinds and bool not in kinds and (int in kinds or float in kinds):
                raise ValueError(f"must be a number, not {str(truths[0]).lower()}")
        return value


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)
