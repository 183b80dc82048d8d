"""Write docs/config.md and docs/clusters.md from the pydantic models: ``python docs/make_config_reference.py``.

The texts are the field docstrings in ``alsace_dist/config/`` and ``cluster/profile.py``; a test checks that the
files are up to date.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alsace_dist import config
from alsace_dist.cluster import profile
from alsace_dist.cluster.profile import SiteProfile
from alsace_dist.config import METHODS, Config, Section

HEAD = """# Configuration reference

<!-- Made by docs/make_config_reference.py from alsace_dist/config/. Change it there, then run that script. -->

One YAML file describes a run. Unknown keys, wrong types and combinations that cannot work are refused with one line
that names the file, the key and the remedy. The resolved config, with every default filled in, is written to
`config.yaml` in the run directory before work starts. Examples are in [configs/](../configs); [data.md](data.md) says
how to describe data, [method.md](method.md) what the options of the method mean.

On the command line any key can be set by its dotted name: `alsace run CONFIG.yaml --distill.learning_rate=3e-5`.
With `--over=FILE.yaml` the sections of another file are laid over the config first; [configs/engine](../configs/engine)
holds such files for models that do not fit, which go by their names too: `--over=lora,gradient-checkpointing`.
Only `true` and `false` are truth values in the YAML: `no` is Norwegian and `yes` an answer. A key that is given twice
is an error.
"""
CLUSTERS_HEAD = """# Site profiles

<!-- Made by docs/make_config_reference.py from alsace_dist/cluster/profile.py. Change it there and run the script. -->

A site profile is a YAML file that says how one cluster's Slurm wants to be asked; `alsace submit CONFIG.yaml
--cluster=PROFILE.yaml` makes the job scripts from it. Examples to copy are in [slurm/clusters](../slurm/clusters);
[slurm/README.md](../slurm/README.md) explains the scripts, and what to do when a job fails. Unknown keys, wrong types
and values that cannot be printed are refused. Every value is quoted where it goes into a script: none is ever run.
"""
METHODS_HEAD = """## What `method` fills in

Keys of `select` and `distill` that a config does not give (or sets to `null`) come from the `method`:
"""
WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true` or `false`"}


def make_references() -> dict[str, str]:
    """Name of a file below docs -> its text."""
    schema = Config.model_json_schema()
    parts = [HEAD, _section("The run", "Config", schema, schema)]
    places: dict[str, list[str]] = {}  # a section that several hold is written once
    for path, name in _walk("", schema, schema["$defs"]):
        places.setdefault(name, []).append(f"`{path}`")
    for name, paths in places.items():
        parts.append(_section(", ".join(paths), name, schema["$defs"][name], schema))
        if paths == ["`distill`"]:
            parts.append(_methods())
    schema = SiteProfile.model_json_schema()
    clusters = [CLUSTERS_HEAD, _section("The profile", "SiteProfile", schema, schema)]
    for path, name in _walk("", schema, schema["$defs"]):
        clusters.append(_section(f"`{path}`", name, schema["$defs"][name], schema))
    return {"config.md": "\n".join(parts), "clusters.md": "\n".join(clusters)}


def _walk(path: str, section: dict[str, Any], definitions: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted path, name of the model) of every section below one, in the order of the fields."""
    for key, field in section["properties"].items():
        for name, is_list in _references(field):
            below = f"{path}.{key}".lstrip(".") + ("[]" if is_list else "")
            yield below, name
            yield from _walk(below, definitions[name], definitions)


def _references(field: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Names of the sections that a field holds, and whether it holds a list of them."""
    for choice in field.get("anyOf", [field]):
        if "$ref" in choice:
            yield choice["$ref"].rpartition("/")[2], False
        elif "$ref" in choice.get("items", {}):
            yield choice["items"]["$ref"].rpartition("/")[2], True


def _section(title: str, name: str, section: dict[str, Any], schema: dict[str, Any]) -> str:
    model: type[Section] = getattr(config if hasattr(config, name) else profile, name)
    lines = [f"## {title}", "", _plain(section["description"]), ""]
    lines += ["| Key | Type | Default | Constraint | Meaning |", "|---|---|---|---|---|"]
    required = section.get("required", [])
    for key, field in section["properties"].items():
        default = "**required**" if key in required else _default(field)
        cells = [f"`{key}`", _type(field), default, _constraint(field), _description(model, key, field, schema)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _description(model: type[Section], key: str, field: dict[str, Any], schema: dict[str, Any]) -> str:
    """The field's docstring; that of a base class where a field is declared again; else that of the section it is."""
    texts = [field.get("description"), *(base.model_fields[key].description for base in _bases(model, key))]
    texts += [schema["$defs"][name]["description"] for name, _ in _references(field)]
    found = next((text for text in texts if text), None)
    if found is None:
        raise ValueError(f"{model.__name__}.{key}: has no docstring; add one in alsace_dist/config/")
    return _plain(found)


def _bases(model: type[Section], key: str) -> Iterator[type[Section]]:
    for base in model.__mro__:
        if issubclass(base, Section) and key in base.model_fields:
            yield base


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(choice) for choice in field["anyOf"]))
    if "$ref" in field:
        return "section"
    if "const" in field or "enum" in field:
        values = [field["const"]] if "const" in field else field["enum"]
        return " or ".join(f"`{value}`" for value in values)
    kind = field.get("type")
    if kind == "null":
        return "`null`"
    if kind == "array":
        inner = _type(field["items"])
        return "list of sections" if inner == "section" else f"list of {inner}"
    if kind == "object":
        inner = field.get("additionalProperties", True)
        keys = field.get("propertyNames", {"type": "string"})
        values = "anything" if inner is True or "patternProperties" in field else _type(inner)
        return f"mapping of {_type(keys)} to {values}"
    return WORDS.get(str(kind), "anything")


BEYOND_REASON = 1e9  # bounds that only keep numbers within what computers count in


def _constraint(field: dict[str, Any]) -> str:
    """Bounds of numbers, least lengths and patterns, also of what lists and mappings hold."""
    parts = [_constraint(choice) for choice in field.get("anyOf", [])]
    for key, words in (
        ("minimum", "≥ {}"),
        ("exclusiveMinimum", "> {}"),
        ("maximum", "≤ {}"),
        ("exclusiveMaximum", "< {}"),
    ):
        if key in field and field[key] < BEYOND_REASON:
            parts.append(words.format(f"{field[key]:g}"))
    if "minItems" in field:
        parts.append(f"at least {field['minItems']}")
    for inner in (field.get("items"), field.get("additionalProperties")):
        if isinstance(inner, dict) and (found := _constraint(inner)):
            parts.append(f"each {found}")
    parts += [f"names match `{pattern}`" for pattern in field.get("patternProperties", {})]
    return ", ".join(part for part in parts if part)


def _default(field: dict[str, Any]) -> str:
    if any(True for _ in _references(field)) and field.get("default") not in (None, []):
        return "see there"
    if "default" not in field:
        return "see there"
    return f"`{json.dumps(field['default'], ensure_ascii=False)}`"


def _methods() -> str:
    names = list(METHODS)
    keys = sorted({(section, key) for parts in METHODS.values() for section, keys in parts.items() for key in keys})
    lines = [METHODS_HEAD, f"| Key | {' | '.join(f'`method: {name}`' for name in names)} |"]
    lines.append(f"|---{'|---' * len(names)}|")
    for section, key in keys:
        values = [f"`{METHODS[name][section][key]}`" for name in names]
        lines.append(f"| `{section}.{key}` | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """A docstring as one line of Markdown that can stand in a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    for file, text in make_references().items():
        Path(__file__).with_name(file).write_text(text, encoding="utf-8")
        print(f"wrote {file}")
