"""The model of a run, as far as its config.json tells: of known ones it is built in."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from alsace_dist.config import Config, Mode
from alsace_dist.config_file import read_yaml
from alsace_dist.data.rows import answers_of
from alsace_dist.files.layout import MODEL, Layout

if TYPE_CHECKING:
    from alsace_dist.models.family import Family


GEOMETRIES = Path(__file__).with_name("geometries.yaml")


class PlannedModel(NamedTuple):
    """What is known of a model without its weights. ``num_head_rows``: rows of its head that are kept (None: all);
    ``mode``: in which it scores; ``notes``: what to say to people."""

    family: "type[Family]"
    config: Any
    num_head_rows: int | None
    mode: Mode
    notes: list[str]


def planned_model(config: Config) -> PlannedModel:
    """The model that the run starts from. Raises ``UserError`` if its config.json is not to be had."""
    from alsace_dist.models import nano, weights
    from alsace_dist.models.family import Options, family_of
    from alsace_dist.models.mt5 import MT5

    options = Options.of(config)
    distinct = {answer for answers in config.task.answers().values() for answer in answers}
    num_rows = len(distinct) or None  # candidates of each example's own take the whole head
    if config.model.nano:
        directory = Layout(Path(config.run_dir)).pretrain / MODEL
        if (directory / "config.json").exists():
            return PlannedModel(MT5, MT5.load_config(directory), num_rows, "auto", [])
        note = "The nano model's vocabulary is as configured; sentinels and answers are added to its tokenizer."
        return PlannedModel(MT5, nano.model_config(config.model.nano), num_rows, "auto", [note])
    assert config.model.path is not None
    answers = answers_of(config.task, config.data.languages or sorted(config.task.answers()))
    if not Path(config.model.path).is_dir() and (known := known_config(config.model.path)):
        family, model_config = load_known(known)
        note = (
            f"{config.model.path}: its geometry is built in; without its tokenizer every answer is taken for one token."
        )
        return PlannedModel(family, model_config, num_rows, family.mode_of(answers, options), [note])
    directory = weights.resolve_model(config.model.path, config.model.revision, weights.CONFIG_FILES)
    family = family_of(directory)
    model_config = family.load_config(directory)
    if not any(path.suffix == ".model" or path.name == "tokenizer.json" for path in directory.iterdir()):
        note = "There is no tokenizer beside config.json: every answer is taken for one token."
        return PlannedModel(family, model_config, num_rows, family.mode_of(answers, options), [note])
    model = family(directory, answers, options)
    notes = [] if model.num_head_rows else ["Answers of several tokens take the whole output head."]
    return PlannedModel(family, model_config, model.num_head_rows, model.mode, notes)


def known_config(name: str) -> dict[str, Any] | None:
    """The config.json of a released model by its name on the hub, as far as its geometry goes; None: not known."""
    table = read_yaml(GEOMETRIES, "install alsace_dist again")
    name = table["aliases"].get(name, name)
    for family in table["families"]:
        if name in family["models"]:
            return {**family["config"], **family["models"][name]}
    return None


def known_names() -> list[str]:
    """Names of the models whose geometry is built in."""
    table = read_yaml(GEOMETRIES, "install alsace_dist again")
    return [name for family in table["families"] for name in family["models"]] + list(table["aliases"])


def load_known(value: dict[str, Any]) -> "tuple[type[Family], Any]":
    """The family and the ``transformers`` config that a config.json with this content stands for."""
    from alsace_dist.models.family import family_of

    with TemporaryDirectory() as name:  # families read directories, and check what they read
        (Path(name) / "config.json").write_text(json.dumps(value), encoding="utf-8")
        family = family_of(Path(name))
        return family, family.load_config(Path(name))
