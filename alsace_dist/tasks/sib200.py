"""SIB-200 (Adelani et al., 2024): the topic of a sentence, in 205 languages and scripts.

Languages have FLORES' names (eng_Latn). Ids, labels and order are the same in all of them. There is no training half
apart from the parallel one: give labels and unlabeled groups to disjoint shares of ``train`` (``data.splits``).
"""

import re

from alsace_dist.tasks.base import Layout, Published

COLUMNS = {"id": "index_id", "label": "category"}
HUB_NAMES = {"dev": "validation"}

DATASET = Published(
    name="SIB-200",
    fields=("text",),
    labels=("science/technology", "travel", "politics", "sports", "health", "entertainment", "geography"),
    languages=re.compile("[a-z]{3}_[A-Z][a-z]{3}"),
    layouts=(
        # The original repository (data/annotated/LANGUAGE), and the hub's (data/LANGUAGE): quoted as CSV.
        Layout(
            ("{language}/{part}.tsv", "data/{language}/{part}.tsv", "data/annotated/{language}/{part}.tsv"), COLUMNS
        ),
        Layout(
            ("{language}/{part}-*.parquet", "{language}/{part}/*.parquet", "{language}/{part}.parquet"),
            COLUMNS,
            HUB_NAMES,
        ),
    ),
    hub_columns=COLUMNS,
)
