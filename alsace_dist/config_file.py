"""A run's YAML: read, overridden by dotted names, validated with errors that name the key, written when resolved."""

import re
from collections.abc import Hashable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from alsace_dist.config import METHODS, OPTION_OF, Config, KeysOf, Section
from alsace_dist.errors import UserError
from alsace_dist.reading import MAX_DEPTH, depth_of, half_character, read_text, shorten

MAX_YAML_BYTES = 1 << 20  # a second of PyYAML's time takes 100 kB
MAX_PROBLEMS = 5  # that an error lists
MAX_ALIASES = 30  # one of eight aliases within another has 16 million values
OVER = "over"  # beside the names of settings: files that are laid over a config
SectionType = TypeVar("SectionType", bound=Section)


def variant(config: Config, name: str) -> Config:
    """The config of one variant. Raises ``UserError`` if there is none of that name or its settings do not fit."""
    if name not in config.variants:
        raise UserError(f"variants.{name}: no such variant; the config has {', '.join(config.variants) or 'none'}")
    overrides = config.variants[name]
    base = config.model_dump(mode="json", exclude={"variants"}, exclude_unset=True)
    if "method" in overrides:  # the variant's preset replaces the choices of the run's preset
        for section, parts in METHODS[config.method].items():
            base[section] = {key: value for key, value in base[section].items() if value != parts.get(key)}
    given = overrides.get("select")
    chosen = given if isinstance(given, Mapping) else {}
    for option, (choice, _, _) in OPTION_OF.items():  # a choice that the variant makes anew has options of its own
        if ("method" in overrides or choice in chosen) and option not in chosen:
            base.get("select", {}).pop(option, None)
    return validate(Config, _merge(base, overrides), f"variants.{name}: ")


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML file, lay dotted overrides (``{"distill.learning_rate": 3e-5}``) over it and validate.

    Raises ``UserError`` that names the file, the key and the remedy.
    """
    file = Path(path)
    value = read_yaml(file, "give the path of a run's YAML")
    settings = dict(overrides or {})
    for name in _names(settings.pop(OVER, "")):
        value = _merge(value, _laid_over(value, name))
    for key, item in settings.items():
        value = _merge(value, _nest(key, item))
    config = validate(Config, value, f"{file}: ")
    for name in config.variants:
        try:
            variant(config, name)  # an impossible variant is an error now, not after hours of training
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
    return config


def _names(value: Any) -> list[str]:
    found = value.split(",") if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise UserError(f"--{OVER}: {shorten(repr(value))} is no name of a file; give one, or several with commas")
    return [one for one in found if one]


def _laid_over(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The sections of a file that are to be laid over a config, but for those that the config leaves out (null)."""
    presets, file = resources.files("alsace_dist.presets.engine"), Path(name)
    known = sorted(one.name.removesuffix(".yaml") for one in presets.iterdir() if one.name.endswith(".yaml"))
    if name in known and not file.exists():
        found: Any = yaml.safe_load((presets / f"{name}.yaml").read_text(encoding="utf-8"))
    else:
        found = read_yaml(file, f"--{OVER} takes the path of a YAML file, or one of {', '.join(known)}")
    return {key: section for key, section in found.items() if key not in value or value[key] is not None}


def read_yaml(file: Path, remedy: str) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises ``UserError``; ``remedy``: what to do if there is no such file."""
    try:
        text = read_text(file, "give the path of a YAML file", MAX_YAML_BYTES)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {remedy}") from None
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror or error}); correct the path or its permissions"
        ) from None
    value = _parse(text, f"{file}: ")
    if not isinstance(value, dict):
        raise UserError(f"{file}: must be a mapping of keys to values; write `key: value`, one a line")
    return value


def _parse(text: str, prefix: str) -> Any:
    """YAML of bounded depth, without aliases that multiply. Raises ``UserError``."""
    try:
        value = yaml.load(text, _Loader)
    except RecursionError:
        raise UserError(f"{prefix}nested too deeply; a config needs no more than {MAX_DEPTH} levels") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        reason = ", ".join(str(part) for part in (error.context, error.problem) if part)
        raise UserError(f"{prefix}cannot be read as YAML: {shorten(reason, 200)}{where}; correct it there") from None
    except yaml.reader.ReaderError as error:
        raise UserError(
            f"{prefix}cannot be read as YAML: character {error.position + 1} (#x{error.character:04x}) is none that a "
            "text holds; remove it"
        ) from None
    if depth_of(value) > MAX_DEPTH:
        raise UserError(f"{prefix}nested more than {MAX_DEPTH} deep, or within itself; write it flatter")
    return value


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, and takes fewer words for something else than text, much as YAML 1.2 does:
    `no` is Norwegian, `01` a name, `12:00:00` a time, not 43,200."""

    yaml_implicit_resolvers: dict[Any, Any] = {
        first: [rule for rule in rules if rule[0] in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        seen: set[Any] = set()
        for key_node in own:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # PyYAML says so
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {shorten(repr(key))} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A tag that the text does not fit, such as `!!int foo`, fails within Python, without a place."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, AttributeError, OverflowError, KeyError):
            what = f"{shorten(repr(node.value), 60)} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from None

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count what aliases stand for: nine that refer to nine others nine times are a billion."""
        if self.check_event(yaml.AliasEvent):
            self.num_aliases = getattr(self, "num_aliases", 0) + 1
            if self.num_aliases > MAX_ALIASES:
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, f"more than {MAX_ALIASES} aliases", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


# These patterns take no more words for numbers and truth values than PyYAML's resolver does, so that what PyYAML writes
# is read back unchanged.
_FLOAT = r"[-+]?((0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def parse_value(text: str) -> Any:
    """An override's value as YAML would read it; what is not YAML stays text, and so does what only looks like a
    mapping: ``a: b``, or a template's ``{text}``."""
    try:
        value = _parse(text, "")
    except UserError:
        return text
    if not isinstance(value, dict):
        return value
    is_flow = text.lstrip().startswith("{")
    is_template = bool(value) and ":" not in text and all(one is None for one in value.values())
    return value if is_flow and not is_template else text


def _nest(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _merge(base: Any, overrides: Any) -> Any:
    """Overrides laid over base, mapping by mapping; anything else replaces."""
    if not isinstance(base, dict) or not isinstance(overrides, Mapping):
        return overrides
    merged = dict(base)
    for key, value in overrides.items():
        merged[key] = _merge(merged.get(key), value)
    return merged


def validate(model: type[SectionType], value: Any, prefix: str, remedy: str = "") -> SectionType:
    """The section that a mapping describes. Raises ``UserError``: after ``prefix``, each key that is wrong, and how;
    then the ``remedy``, if it is not to correct these keys, for people have not written them."""
    if where := half_character(value):
        raise UserError(f"{prefix}{where}; {remedy or 'write the whole character'}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = list(_problems(error, value, model, "" if remedy else "; add it (docs/ says what it holds)"))
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise UserError(prefix + "; ".join(problems[:MAX_PROBLEMS] + more + [remedy] * bool(remedy))) from None


def _problems(error: ValidationError, value: Any, model: type[Section], if_missing: str) -> Iterator[str]:
    """One phrase per problem: the dotted key, what is wrong, and for an unknown key the keys that exist.

    ``if_missing``: what to do about a key that is missing.
    """
    told: set[tuple[int | str, ...]] = set()
    rows = [
        (".".join(shorten(one, 60) for one in _as_written(row["loc"], value, row["type"])), row)
        for row in error.errors()
    ]
    for number, (key, row) in enumerate(rows):
        message = row["msg"].removeprefix("Value error, ")
        if row["type"] == "literal_error" and any(other == key for other, _ in rows[:number]):
            continue  # the other way to fill a key that takes a number or a word: said with the number
        words = [
            one["ctx"]["expected"]
            for other, one in rows[number + 1 :]
            if (other, one["type"]) == (key, "literal_error")
        ]
        message = ", or ".join([message, *words])
        if row["type"] == "extra_forbidden":
            section = row["loc"][:-1]
            known = ", ".join(_known_keys(model, section) if section not in told else ())  # once is enough
            message = f"unknown key; known here: {known}" if known else "unknown key; remove it"
            told.add(section)
        elif row["type"] == "missing":
            message = f"is needed and missing{if_missing}"
        elif row["type"] in ("model_type", "dict_type"):
            message = f"must be a mapping of keys to values, not {shorten(repr(row['input']))}"
        elif row["type"] != "value_error":
            message = f"{message}, not {shorten(repr(row['input']))}"
        yield f"{key}: {message}" if key else message


def _as_written(location: tuple[int | str, ...], value: Any, kind: str) -> Iterator[str]:
    """The parts of a location that stand in the YAML: pydantic adds the names of the types of a union."""
    for number, part in enumerate(location):
        is_item = isinstance(value, list) and isinstance(part, int) and part < len(value)  # a pair may lack its second
        if is_item or (isinstance(value, dict) and part in value):
            value = value[part]
            yield str(part)
        elif kind == "missing" and number == len(location) - 1:
            yield str(part)


def _known_keys(model: type[Section], location: tuple[int | str, ...]) -> list[str]:
    section: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        annotation = field.annotation if field else None
        keys = [one.section for one in field.metadata if isinstance(one, KeysOf)] if field else []
        candidates = [annotation, *getattr(annotation, "__args__", ()), *keys]
        section = next((one for one in candidates if isinstance(one, type) and issubclass(one, Section)), None)
        if section is None:
            return []
    return sorted(section.model_fields)


def config_text(config: Config) -> str:
    """The resolved config, every default filled in, as YAML."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text
