"""The real sets go through prepare with the counts that their README tells.

They lie in ../shared/data, beside the checkout, if at all: their rows may not be part of this repository.
"""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data.preparing import by_key, make_config
from tasks.publishing import CHOICES, GAPS, NLI, PARAPHRASES, TOPICS

from alsace_dist.config import InputConfig
from alsace_dist.files.shards import golds
from alsace_dist.stages.prepare import prepare
from alsace_dist.tasks import geomlama
from alsace_dist.tasks.base import FoundRow

SETS = next((folder / "shared/data" for folder in Path(__file__).parents if (folder / "shared/data").is_dir()), None)
pytestmark = pytest.mark.skipif(SETS is None, reason="there is no ../shared/data beside the checkout")
RUN = Path("run/data")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def prepared(inputs: list[dict[str, Any]], task: dict[str, Any], **data: Any) -> dict[str, Any]:
    """The details of the manifest of these inputs, whose paths are below the sets' folder."""
    config = make_config([one | {"path": f"{SETS}/{one['path']}"} for one in inputs], task, **data)
    prepare(config, RUN)
    details: dict[str, Any] = json.loads((RUN / "manifest.json").read_text())["details"]
    assert details["bad_records"] == {}
    return details


def test_xnli() -> None:
    test = {"kind": "xnli", "path": "xnli", "split": "test"}
    dev = {"kind": "xnli", "path": "xnli", "hub_split": "dev"}
    shots = {"kind": "xnli", "path": "mnli_kshot", "hub_split": "train", "split": "labeled"}
    details = prepared([test, dev, shots], NLI, splits={"unlabeled": 2490})
    splits = details["audit"]["splits"]
    assert splits["test"]["languages_per_group"] == {"15": 5010}
    assert splits["unlabeled"]["languages_per_group"] == {"15": 2490}
    assert splits["labeled"]["labels"] == {"en": dict.fromkeys(sorted(NLI["labels"]), 160)}
    assert set(splits["test"]["labels"]["sw"].values()) == {1670}


def test_xnli_keeps_the_rows_of_a_premise_together() -> None:
    dev = {"kind": "xnli", "path": "xnli", "hub_split": "dev", "languages": ["en", "sw"]}
    prepared([dev], NLI, splits={"test": 501, "labeled": 128, "unlabeled": 1500})
    premises = {
        split: {group.texts["en"]["premise"] for group in by_key(split).values()}
        for split in ("test", "labeled", "unlabeled")
    }
    assert [len(by_key(split)) for split in premises] == [501, 128, 1500]
    assert [len(found) for found in premises.values()] == [167, 43, 500]
    assert len(set().union(*premises.values())) == 167 + 43 + 500


def test_pawsx() -> None:
    test = {"kind": "pawsx", "path": "pawsx", "split": "test"}
    dev = {"kind": "pawsx", "path": "pawsx", "hub_split": "dev", "split": "unlabeled"}
    details = prepared([test, dev], PARAPHRASES)
    splits = details["audit"]["splits"]
    assert splits["test"]["num_groups"] == 1994
    assert list(details["num_no_label"].values()) == [6]
    assert splits["unlabeled"]["num_groups"] == 2000
    sizes = splits["unlabeled"]["languages_per_group"]
    assert sum(number for size, number in sizes.items() if size != "7") == 151
    assert len(splits["unlabeled"]["rows"]) == 7
    assert details["num_missing"] == {"de": 100, "es": 39, "fr": 22, "ja": 74, "ko": 63, "zh": 41}


def test_xcopa() -> None:
    """The question is wrong in five languages, by as many rows as the repository's files have."""
    places = {"kind": "xcopa", "path": "xcopa", "also": [f"{SETS}/copa_en"]}
    inputs = [places | {"split": "test"}, places | {"hub_split": "dev", "split": "unlabeled"}]
    inputs.append({"kind": "xcopa", "path": "copa_en", "hub_split": "train", "split": "labeled"})
    details = prepared(inputs, CHOICES)
    splits = {split: found["languages_per_group"] for split, found in details["audit"]["splits"].items()}
    assert splits == {"test": {"12": 500}, "unlabeled": {"12": 100}, "labeled": {"1": 400}}
    assert details["num_changed"] == {"id": 9, "it": 9, "sw": 43, "th": 302, "tr": 103}
    for group in by_key("test").values():
        assert len({texts["question"] for texts in group.texts.values()}) == 1
    first = by_key("unlabeled")["dev/0"].texts["en"]
    assert first["premise"].endswith("turned on the faucet.") and first["question"] == "effect"


def test_geomlama() -> None:
    """Answers agree in all languages once candidates are in one order: else prepare would call labels conflicting."""
    details = prepared([{"kind": "geomlama", "path": "geomlama", "split": "test"}], GAPS)
    counts = details["audit"]["splits"]["test"]
    assert counts["languages_per_group"] == {"5": 625} and counts["apart"] == {"hi": 4 * 25}
    groups = by_key("test")
    right = Counter(group.category for group in groups.values() for _ in golds(group.label))
    assert right == {"United States": 145, "China": 140, "India": 165, "Iran": 145, "Kenya": 160}
    chance = [len(golds(group.label)) / len(group.candidates["en"]) for group in groups.values()]
    assert round(sum(chance) / len(chance), 3) == 0.314
    assert all(text["prompt"].count("<mask>") == 1 for group in groups.values() for text in group.texts.values())


def test_no_order_of_geomlama_is_for_nothing() -> None:
    """An entry that is not needed, or a language that stands apart for nothing, would be found here."""
    one = InputConfig(kind="geomlama", path=f"{SETS}/geomlama")
    found = {(row.key, row.language): row for row in geomlama.rows(one) if isinstance(row, FoundRow)}
    assert len(found) == 5 * 625
    for number, about in enumerate(geomlama.concepts()):
        for order in about.get("order", {}).values():
            assert sorted(order) == list(range(about["num"])) != list(order)
        for language in about.get("apart", {}):
            keys = [geomlama._keys_of(5 * number + country)[0] for country in range(5)]
            rows = [(found[key, language], found[key, "en"]) for key in keys]
            is_short = len(rows[0][0].candidates) != about["num"]
            # Of two candidates there are two orders: in the one that the words have, the answers are the opposite.
            assert is_short or all(set(own.label) == set(english.label) for own, english in rows)


def test_sib200() -> None:
    parts = [("train", None), ("dev", "pretrain"), ("test", "test")]
    inputs = [{"kind": "sib200", "path": "sib200", "hub_split": part, "split": split} for part, split in parts]
    details = prepared(inputs, TOPICS, source_language="eng_Latn", splits={"labeled": 200, "unlabeled": 501})
    sizes = {split: found["languages_per_group"] for split, found in details["audit"]["splits"].items()}
    assert sizes == {"labeled": {"24": 200}, "unlabeled": {"24": 501}, "pretrain": {"24": 99}, "test": {"24": 204}}
    groups = by_key("test")
    for language in details["audit"]["splits"]["test"]["rows"]:
        with Path(f"{SETS}/sib200/{language}/test.tsv").open(encoding="utf-8", newline="") as file:
            expected = {f"test/{row['index_id']}": row["text"] for row in csv.DictReader(file, delimiter="\t")}
        assert {key: group.texts[language]["text"] for key, group in groups.items()} == expected
