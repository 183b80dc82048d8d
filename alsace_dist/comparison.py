"""Several runs in one table: those that differ in nothing but the seed are one row, tested over all of them."""

import json
from collections.abc import Sequence
from pathlib import Path

from alsace_dist import sweep
from alsace_dist.config import Config
from alsace_dist.errors import NotReady, UserError
from alsace_dist.files.evaluation import Evaluation
from alsace_dist.outcome import evaluations_of
from alsace_dist.reporting import markdown, seeds
from alsace_dist.reporting.seeds import Pooled

TITLE = "In percent, mean ± standard deviation over the seeds of a row."
NOTE = (
    "Better and worse count the languages that changed significantly over all seeds of a row together (exact McNemar "
    "test, Holm-corrected). Rows of different configs may have different test groups."
)
OWN_KEYS = {"seed", "run_dir", "variants"}  # that runs of one row may differ in


def compare(configs: Sequence[Config]) -> str:
    """Markdown: a row for the start of each config, for itself and for each variant, over all its runs.

    Raises ``NotReady`` for a run without an evaluation, ``UserError`` for two runs of one config and seed.
    """
    by_config: dict[str, list[Config]] = {}
    for config in configs:
        key = json.dumps(config.model_dump(mode="json", exclude=OWN_KEYS), sort_keys=True)
        by_config.setdefault(key, []).append(config)
    ways: dict[str, Pooled] = {}
    names = [_name(same) for same in by_config.values()]
    if len(set(names)) < len(names):
        names = [", ".join(config.run_dir for config in same) for same in by_config.values()]
    for title, same in zip(names, by_config.values(), strict=True):
        _check_variants(same)
        found: dict[int, dict[str, Evaluation]] = {}
        for config in same:
            if config.seed in found:
                raise UserError(
                    f"{config.run_dir}: has the config and the seed of another of these runs; leave one out"
                )
            found[config.seed] = evaluations_of(config)
            if "main" not in found[config.seed]:
                raise NotReady(f"{config.run_dir}: holds no evaluation yet; `alsace run` makes one")
        pooled = seeds.pooled(found, same[0].evaluate.alpha)
        ways |= {f"{title}: {way}" if len(by_config) > 1 else way: one for way, one in pooled.items()}
    return f"{TITLE}\n\n{markdown.table(seeds.seeds_table(ways))}\n\n{NOTE}"


def _check_variants(same: Sequence[Config]) -> None:
    """Raises ``UserError`` if a variant's name means one thing in a run and another in another."""
    known: dict[str, tuple[str, object]] = {}
    for config in same:
        for name, settings in config.variants.items():
            run, others = known.setdefault(name, (config.run_dir, settings))
            if settings != others:
                raise UserError(
                    f"{config.run_dir}: its variant {name} has other settings than that of {run}; leave one out"
                )


def _name(same: Sequence[Config]) -> str:
    """Of runs of one config: that of the one, or of the sweep that they are in, or all of them."""
    paths = [Path(config.run_dir).resolve() for config in same]
    if len(paths) > 1 and len({path.parent for path in paths}) == 1 and sweep.is_sweep(paths[0].parent):
        return paths[0].parent.name
    return ", ".join(path.name for path in paths)
