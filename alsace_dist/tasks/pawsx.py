"""PAWS-X (Yang et al., 2019): paraphrases in 7 languages.

A sentence ``NS`` was never translated, and such a row has label 0 whatever is true: that language is missing in the
group. A few test labels are hidden (-1). Ids start anew in each part.
"""

from alsace_dist.tasks.base import Layout, Published

BY_ID = {"id": "id"}
HUB_NAMES = {"dev": "validation"}

DATASET = Published(
    name="PAWS-X",
    fields=("sentence1", "sentence2"),
    labels=("0", "1"),
    languages=("de", "en", "es", "fr", "ja", "ko", "zh"),
    layouts=(
        # The original distribution, x-final; only English has a training half that is no translation.
        Layout(
            ("{language}/{part}.tsv", "{language}/translated_{part}.tsv"), BY_ID, {"dev": "dev_2k", "test": "test_2k"}
        ),
        # A file per language, as XTREME has it, with or without a first line of names (then also without ids).
        Layout(("{part}.{language}.tsv", "{part}-{language}.tsv"), BY_ID, quoting="auto"),
        Layout(
            ("{part}-{language}.tsv", "{part}.{language}.tsv"),
            {"id": None},
            header=("sentence1", "sentence2", "label"),
            quoting="auto",
        ),
        # The hub's repository, as its files have been named over the years; and as a part of XTREME's.
        Layout(
            (
                "{language}/{part}-*.parquet",
                "{language}/paws-x-{part}*.parquet",
                "{language}/{part}/*.parquet",
                "{language}/{part}.parquet",
                "PAWS-X.{language}/{part}-*.parquet",
            ),
            BY_ID,
            HUB_NAMES,
        ),
    ),
    hub_columns=BY_ID,
    no_label=frozenset({"-1", ""}),
    missing=frozenset({"NS"}),
)
