"""The section ``data``: where parallel groups come from, and how they are divided."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from alsace_dist.config.base import (
    MAX_NAME,
    Count,
    Fraction,
    Language,
    Location,
    LocationIfAny,
    Positive,
    Section,
    Split,
)


class ColumnsConfig(Section):
    """Which columns of a table, keys of a JSON line or columns of a Hugging Face dataset hold what."""

    id: str | None = "id"
    """Column with the group's id; null: the row's number is the id, counted anew for each language, so that row N of
    each language is one group; then all languages must have equally many rows. A Hugging Face dataset without the
    column has row numbers anyway."""
    language: str | None = "language"
    """Column with the language (long form: one row per group and language); null: a row holds all languages, and the
    columns of its fields are mappings language -> text, or lists of languages and translations."""
    label: str | None = "label"
    """Column with the label; null: unlabeled."""
    fields: dict[str, str] = {}
    """Field -> column; a field that is not named here has the column of its own name."""
    unit: str | None = None
    """Column with what a group belongs to, such as its document or premise: groups of one unit are never in two
    splits. Where languages differ in it, the source language's counts."""


class InputConfig(Section):
    """Where some parallel groups come from."""

    kind: Annotated[str, Field(max_length=MAX_NAME)] = "jsonl"
    """jsonl (plain or .gz), table (Parquet or CSV in long form), huggingface (through `datasets`), or the name of a
    published dataset: xnli, pawsx, xcopa, geomlama, sib200 (in any form in which they are published), demo (which is
    generated)."""
    path: LocationIfAny = ""
    """File, or glob pattern of files, or a path with {language} in it, such as xnli/test.{language}.tsv: a file per
    language; {split} stands for hub_split, or else for split. For huggingface a hub name or a local path; for a
    published dataset any of these, or the folder that holds it."""
    also: list[Location] = []
    """Published datasets: further places, each as in path, that hold other languages of the same set; XCOPA has no
    English of its own, which is COPA."""
    name: Annotated[str, Field(pattern=r"^[^/\s]*$", max_length=MAX_NAME)] = ""
    """Put before the ids of this input, as NAME/ID: for inputs whose ids start anew."""
    split: Split | None = None
    """All groups of this input go to that split; null: divided as `data.splits` says."""
    languages: list[Language] | None = None
    """Languages to read of this input; null: `data.languages`. A published dataset with split: labeled is read in the
    source language alone."""
    columns: ColumnsConfig = ColumnsConfig()
    """Columns of a table or a Hugging Face dataset, or keys of JSON lines that are a row each."""
    header: list[str] = []
    """table: names of the columns of CSV and TSV files whose first line is a row already; empty: the first line has
    the names."""
    quoting: Literal["csv", "none", "auto"] = "csv"
    """table: what a " means in CSV and TSV files. csv: it encloses cells, and is doubled within; none: it is a letter,
    and every line a row; auto: what each file's own quotes tell."""
    subsets: dict[str, str] = {}
    """huggingface: language -> configuration name, joined by id or row number; empty: one table in long form."""
    hub_split: str | None = None
    """The split to read, by the name that the dataset gives it. huggingface: null is train; a single split that
    `save_to_disk` wrote has none to choose from. Published datasets: train, dev (or validation) or test; null is test
    where split is. geomlama: prompts or paraphrases; null is both."""
    revision: str | None = None
    """huggingface: the revision (branch, tag or commit) to read."""
    num_groups: Count = 1000
    """demo: how many groups to generate."""

    def located(self) -> str:
        """The path, with {split} filled in. Raises ``ValueError`` if nothing says what it stands for."""
        if "{split}" not in self.path:
            return self.path
        name = self.hub_split or self.split
        if name is None:
            raise ValueError("{split} in the path stands for hub_split, or else for split: give one of them")
        return self.path.replace("{split}", name)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.located()
        if len(set(self.header)) != len(self.header):
            raise ValueError("header holds a name twice")
        return self


class DataConfig(Section):
    """Where parallel groups come from and how they are divided."""

    directory: Location | None = None
    """An existing prepared dataset (directory or fsspec URL); then nothing is prepared.
    Of stores (s3, gs, https, hdfs, abfs) see docs/data.md; a URL holds no user, password or query."""
    cache: Location | None = None
    """Directory on a disk of each node in whose folder alsace-shards the shards of a store are kept, shared by the
    node's ranks; may hold variables that jobs set, such as $SLURM_TMPDIR. Null: shards are fetched each time they are
    read."""
    cache_gb: Positive = 100.0
    """Most that the cache holds, in GB (1e9 bytes); the shards least recently used go."""
    inputs: list[InputConfig] = []
    """Where parallel groups come from."""
    splits: dict[Split, Annotated[float, Field(gt=0, le=1e12)]] = {}
    """Share (below 1) or number (from 1) of the groups of undivided inputs that each split gets, by hash of the id."""
    withhold_labels: list[Split] = ["pretrain", "unlabeled"]
    """Splits that are written without labels, whatever the inputs say."""
    source_language: Language = "en"
    """The language that has labels."""
    languages: list[Language] | None = None
    """Languages to keep; null: all that the data has."""
    exposure: dict[Language, Fraction] = {}
    """Language -> share of its texts that the pretrain split keeps (default 1): large corpora, too, hold far more of
    some languages than of others."""
    groups_per_shard: Count = 256
    """Parallel groups per shard."""
    missing: list[str] = []
    """Texts that stand for a missing translation, such as [n/a]: that language is missing in that group."""
    no_label: list[str] = []
    """Labels that say that the true one is not known, such as [-] where annotators disagreed: such groups stay out of
    splits that need labels, and are counted."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do with bad records: stop and list them all, or skip and count them in the manifest."""
    max_skipped: Fraction = 0.2
    """Most that on_bad: skip may leave out, as a share of the records of a split, or of a label in it."""
    min_parallel: Fraction = 0.1
    """Least share of the unlabeled and test groups that must have two languages or more."""
    max_unknown: Fraction = 0.2
    """Most of the tokens of a language's prompts that may be unknown to the model. A script that the vocabulary lacks
    gives up to 0.5, for each of its words is a blank and one unknown token."""
    max_cut: Fraction = 0.9
    """Most of a language's prompts whose texts may be cut at task.max_tokens."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.directory is None) == (not self.inputs):
            raise ValueError("give either inputs or directory")
        if self.directory is not None:
            preparing = ("splits", "withhold_labels", "languages", "exposure", "groups_per_shard", "on_bad")
            for name in (*preparing, "missing", "no_label"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} says how inputs are prepared, and there are none; remove it")
        if self.cache is None and self.cache_gb != type(self).model_fields["cache_gb"].default:
            raise ValueError("cache_gb says how much data.cache holds, and there is none; give cache, or remove it")
        scheme, separator, _ = (self.directory or "").partition("://")
        if self.cache is not None and (not separator or scheme == "file"):
            raise ValueError("cache keeps the shards of a store, and directory is not the URL of one; remove it")
        wanted = {one.split for one in self.inputs} | self.splits.keys()
        if self.exposure and "pretrain" not in wanted:
            raise ValueError("exposure thins out the pretrain split, and nothing goes there; remove it")
        if self.languages is not None and len(set(self.languages)) != len(self.languages):
            raise ValueError("languages holds a language twice; remove one")
        if self.languages is not None and self.source_language not in self.languages:
            raise ValueError(f"languages must hold the source_language {self.source_language!r}; add it")
        if any(one.split is None for one in self.inputs) and not self.splits:
            raise ValueError("splits is needed for inputs without a split of their own")
        shares = [value for value in self.splits.values() if value < 1]
        if sum(shares) > 1 + 1e-9:
            raise ValueError("the shares in splits add up to more than 1")
        return self
