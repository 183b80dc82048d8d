"""A finished model for other people: the ``transformers`` directory with a model card, apart from its run."""

import tempfile
from pathlib import Path

from alsace_dist.config import Config
from alsace_dist.config_file import variant as variant_of
from alsace_dist.errors import NotReady, UserError
from alsace_dist.files import manifest
from alsace_dist.files.evaluation import KIND as EVALUATION
from alsace_dist.files.evaluation import read_evaluation
from alsace_dist.files.layout import MODEL, Layout, data_url
from alsace_dist.files.shards import open_dataset
from alsace_dist.outcome import check_is_of_model
from alsace_dist.stages.base import Output, model_after

CARD = "README.md"


def export(config: Config, into: Path, variant: str = "") -> None:
    """Copy the model of a run, or of a variant of it, and write its card.

    Raises ``NotReady`` if the run has not been evaluated, ``UserError`` if its files are not what it wrote, or there is
    something where the copy would go.
    """
    from alsace_dist.models.heads import POOLING_KEY
    from alsace_dist.reporting.model_card import model_card

    config = variant_of(config, variant) if variant else config
    layout = Layout(Path(config.run_dir), variant)
    model, evaluated = model_after(config, layout, config.rounds), Output(layout.evaluation, EVALUATION)
    if model is None:
        raise UserError(f"{config.run_dir}: nothing was trained in it, so there is nothing to export")
    for output in (model, evaluated):
        if not output.exists:
            raise NotReady(f"{output.directory}: not complete; `alsace run` goes on with it")
    check_is_of_model(config, variant)
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise UserError(f"{into}: is there already; choose another directory, or remove it")
    found = model.manifest()
    manifest.verify_files(model.directory, found)
    splits = ["unlabeled", "test"] + ["labeled"] * bool(config.finetune)
    fingerprints = {"model": found.digest} | {
        f"data, split {split}": open_dataset(data_url(config, split)).digest for split in sorted(splits)
    }
    pooling = manifest.read_json(model.directory / MODEL / "config.json").get(POOLING_KEY)
    card = model_card(config, variant, read_evaluation(evaluated.directory), fingerprints, pooling)
    into = into.resolve()  # a link to an empty directory stays one
    into.parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own until it is whole, so that nobody takes half a model for one.
    with tempfile.TemporaryDirectory(prefix=f".{into.name}.", dir=into.parent) as directory:
        whole = Path(directory) / MODEL
        for name in found.files:
            if name.startswith(f"{MODEL}/"):
                manifest.copy_file(model.directory / name, whole / name.removeprefix(f"{MODEL}/"))
        manifest.write_text(whole / CARD, card)
        whole.rename(into)
