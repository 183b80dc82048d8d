"""XCOPA (Ponti et al., 2020): which of two sentences is the cause, or the effect, of a premise, in 11 languages; and
COPA (Roemmele et al., 2011), which is its English.

Item i of a part is the same in all languages, and has the number i in COPA's part, too. The published files have
"effect" where COPA asks for the cause in five languages: ``question`` is what most languages say. XCOPA has no training
half; COPA's is English alone.
"""

from alsace_dist.tasks.base import Layout, Published

BY_INDEX = {"id": "idx"}
NAMES = {"dev": "val"}
HUB_NAMES = {"dev": "validation"}

DATASET = Published(
    name="XCOPA",
    fields=("premise", "question", "choice1", "choice2"),
    labels=("0", "1"),
    languages=("en", "et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh"),
    layouts=(
        # The original repository (data/LANGUAGE); and COPA in the same keys.
        Layout(("{language}/{part}.{language}.jsonl",), BY_INDEX, NAMES),
        Layout(("{part}.{language}.jsonl",), BY_INDEX, NAMES),
        # COPA as a part of SuperGLUE.
        Layout(("{part}.jsonl",), BY_INDEX, NAMES, language="en"),
        # The repositories on the hub.
        Layout(
            ("{language}/{part}-*.parquet", "{language}/{part}/*.parquet", "{language}/{part}.parquet"),
            BY_INDEX,
            HUB_NAMES,
        ),
        Layout(("copa/{part}-*.parquet", "copa/{part}/*.parquet"), BY_INDEX, HUB_NAMES, language="en"),
    ),
    hub_columns=BY_INDEX,
    hub_subsets={"super_glue": {"en": "copa"}},
    no_label=frozenset({"-1", ""}),
    shared=("question",),
)
