"""XNLI (Conneau et al., 2018): natural language inference in 15 languages, and MultiNLI, its training half.

Three hypotheses follow each premise, so a premise is a unit. The English premise names it: promptIDs are only in the
original files, and the same premise in two layouts must be the same unit. Rows have an id in the original files alone
(``pairID``); elsewhere row N of each language is one group.
"""

from alsace_dist.tasks.base import Layout, Published

BY_POSITION = {"id": None, "unit": "premise"}
ORIGINAL = {
    "id": "pairID",
    "label": "gold_label",
    "fields": {"premise": "sentence1", "hypothesis": "sentence2"},
    "unit": "sentence1",
}
HUB_NAMES = {"dev": "validation"}

DATASET = Published(
    name="XNLI",
    fields=("premise", "hypothesis"),
    labels=("entailment", "neutral", "contradiction"),
    languages=("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh"),
    layouts=(
        # XNLI-1.0: one file for all languages. Its quotes are letters.
        Layout(("xnli.{part}.tsv",), {**ORIGINAL, "language": "language"}, quoting="none"),
        Layout(("xnli.{part}.jsonl",), {**ORIGINAL, "language": "language"}),
        # XNLI-MT-1.0: the machine-translated training half.
        Layout(
            ("multinli.{part}.{language}.tsv",),
            {**BY_POSITION, "fields": {"hypothesis": "hypo"}},
            quoting="none",
        ),
        # MultiNLI 1.0, in English.
        Layout(("multinli_1.0_{part}.jsonl",), ORIGINAL, language="en"),
        # A file per language, as XTREME has it, with or without a first line of names; few-shot splits likewise.
        Layout(("{part}.{language}.tsv", "{part}-{language}.tsv"), BY_POSITION, quoting="auto"),
        Layout(
            ("{part}-{language}.tsv", "{part}.{language}.tsv"),
            BY_POSITION,
            header=("premise", "hypothesis", "label"),
            quoting="auto",
        ),
        # The hub's repository, as its files have been named over the years.
        Layout(
            (
                "{language}/{part}-*.parquet",
                "{language}/xnli-{part}*.parquet",
                "{language}/{part}/*.parquet",
                "{language}/{part}.parquet",
            ),
            BY_POSITION,
            HUB_NAMES,
        ),
        Layout(
            (
                "all_languages/{part}-*.parquet",
                "all_languages/xnli-{part}*.parquet",
                "all_languages/{part}/*.parquet",
                "{part}-*.parquet",
            ),
            {**BY_POSITION, "language": None},
            HUB_NAMES,
        ),
    ),
    hub_columns=BY_POSITION,
    spellings={"0": "entailment", "1": "neutral", "2": "contradiction", "contradictory": "contradiction"},
    no_label=frozenset({"-", ""}),
)
