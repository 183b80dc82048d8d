"""The work of a run: what its stages go through, as the prepared data tells it or as it is assumed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from alsace_dist import pipeline
from alsace_dist.config import Config, DistillConfig, EngineConfig, FinetuneConfig, Mode, Split, TrainConfig
from alsace_dist.data.stream import CanonicalOrder
from alsace_dist.errors import UserError
from alsace_dist.files.layout import data_url
from alsace_dist.files.shards import Dataset, open_dataset
from alsace_dist.plan import assumptions as given
from alsace_dist.stages import distill, finetune, pretrain, score
from alsace_dist.stages.base import Stage, TrainingStageModule


def training_stages(config: Config) -> list[tuple[Stage, TrainingStageModule]]:
    """The stages of the run and its variants that train a model."""
    modules: dict[str, TrainingStageModule] = {one.KIND: one for one in (pretrain, finetune, distill)}
    return [(stage, modules[stage.module.KIND]) for stage in pipeline.stages(config) if stage.module.KIND in modules]


def prompts_per_example(config: Config, mode: Mode) -> tuple[int, str]:
    """How many prompts a model reads of one example, and in words why; of candidates in any number the fewest."""
    if mode == "head" and config.task.candidates:
        number = config.task.num_candidates
        return (number, "one for each candidate") if number else (2, "one for each candidate, at least")
    return (2, "one with context and one without") if config.task.needs_context_free else (1, "")


def dataset_of(config: Config, split: Split) -> Dataset | None:
    """A split's dataset; None if it is not prepared yet."""
    try:
        return open_dataset(data_url(config, split))
    except UserError:
        if config.data.directory is not None:  # no stage is going to prepare the dataset
            raise
        return None


def num_steps(section: TrainConfig, num_examples: int) -> int:
    """Optimizer steps of a training, as the training loop counts them."""
    order = CanonicalOrder([num_examples], section.global_batch_size, 0)
    return section.num_steps or order.num_steps(section.num_epochs or 0)


def num_rows(data: Dataset) -> int:
    """Rows of all languages."""
    return sum(sum(shard.num_examples.values()) for shard in data.shards)


@dataclass(frozen=True)
class Counts:
    """Groups of a split that is not prepared yet, and its languages. ``splits``: of these, what the config says."""

    num_groups: int = given.NUM_GROUPS
    num_languages: int = given.NUM_LANGUAGES
    splits: Mapping[Split, int] = field(default_factory=dict)

    def of(self, split: Split) -> int:
        """Groups of a split."""
        return self.splits.get(split, self.num_groups)


@dataclass(frozen=True)
class Work:
    """One stage. ``section``: of a training, None for scoring; ``num_examples``: that it goes through once;
    ``rows_per_example``: prompts that the model reads of each; ``times``: how often it is done in the run."""

    name: str
    section: TrainConfig | None
    engine: EngineConfig
    num_examples: int
    rows_per_example: int
    times: int
    is_counted: bool

    @property
    def num_steps(self) -> int:
        """Optimizer steps of a training."""
        assert self.section is not None
        return max(1, num_steps(self.section, self.num_examples))


def work_of(config: Config, mode: Mode, counts: Counts) -> list[Work]:
    """The stages of the run itself, without its variants, that compute on ranks.

    ``counts``: of what is not prepared.
    """
    num_prompts, _ = prompts_per_example(config, mode)
    found = []
    stages = [stage for stage in pipeline.stages(config) if not stage.variant]
    for stage, module in training_stages(config):
        if stage.variant or stage.round > 1 or module is pretrain:
            continue
        data, section = dataset_of(config, module.SPLIT), module.section_of(config)
        times = sum(one.module is stage.module for one in stages)
        examples = sum(module.most_examples(data, config)) if data else _assumed(config, section, counts)
        is_live = isinstance(section, DistillConfig) and section.teachers == "live"
        languages = (len(data.languages) if data else counts.num_languages) if is_live else 1
        rows = num_prompts * languages
        found.append(Work(module.KIND, section, module.engine_of(config), examples, rows, times, data is not None))
    passes = Counter(output.directory.name for stage in stages if stage.module is score for output in stage.outputs)
    splits: tuple[Split, ...] = ("unlabeled", "test")
    for split in splits:
        data = dataset_of(config, split)
        examples = num_rows(data) if data else counts.of(split) * counts.num_languages
        about = (None, config.engine, examples, num_prompts, passes[split], data is not None)
        found.append(Work(f"score {split}", *about))
    return found


def _assumed(config: Config, section: TrainConfig, counts: Counts) -> int:
    """Examples of a training whose data is not prepared."""
    if isinstance(section, DistillConfig):
        groups = min(counts.of("unlabeled"), config.select.num_groups or counts.of("unlabeled"))
        if section.teachers == "live":
            return groups
        if section.languages == "source":
            return groups
        return groups * (len(section.languages) if section.languages else counts.num_languages)
    limit = None
    if isinstance(section, FinetuneConfig):
        limit = section.num_examples or (section.shots or 0) * len(config.task.labels)
    return min(counts.of("labeled"), limit or counts.of("labeled"))
