"""Published datasets in every layout, from their files to the shards: nothing lost, nothing changed, all that is wrong
said with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from data.preparing import by_key, make_config, problems
from tasks import publishing
from tasks.publishing import NLI, PARAPHRASES, PREMISES, SENTENCES, TOPIC_TEXTS, TOPICS

from alsace_dist import tasks
from alsace_dist.config import InputConfig
from alsace_dist.data import published
from alsace_dist.data.inputs import kind_of
from alsace_dist.errors import UserError
from alsace_dist.stages.prepare import fingerprint_of, prepare

RUN = Path("run/data")
DEV = {"hub_split": "dev", "split": "unlabeled"}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # if another test imported it before the line above
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def details() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RUN / "manifest.json").read_text())["details"]
    return found


def texts_by_language(split: str) -> dict[str, list[dict[str, str]]]:
    """Language -> its texts, in the order of ids."""
    groups = sorted(by_key(split).values(), key=lambda group: group.key)
    languages = {language for group in groups for language in group.texts}
    return {language: [group.texts[language] for group in groups if language in group.texts] for language in languages}


# --- every layout gives the same groups ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", publishing.XNLI)
def test_xnli(layout: str) -> None:
    publishing.XNLI[layout]("some/xnli")
    config = make_config([{"kind": "xnli", "path": "some/xnli", **DEV}], NLI, withhold_labels=[])
    prepare(config, RUN)
    expected = {language: publishing.texts_of(publishing.nli_rows(language), NLI["fields"]) for language in PREMISES}
    assert texts_by_language("unlabeled") == expected
    groups = sorted(by_key("unlabeled").values(), key=lambda group: group.key)
    assert [NLI["labels"][group.label or 0] for group in groups] == publishing.LABELS * 2
    first = "dev/70" if layout.startswith("original") else "dev/1"
    assert groups[0].key == first
    assert all(path.startswith("some/xnli/") for path in fingerprint_of(config)["sources"])


@pytest.mark.parametrize("layout", publishing.XNLI)
def test_labels_are_read_in_the_source_language_alone(layout: str) -> None:
    """Whether a file holds it or all languages."""
    publishing.XNLI[layout]("xnli")
    prepare(make_config([{"kind": "xnli", "path": "xnli", "hub_split": "dev", "split": "labeled"}], NLI), RUN)
    assert set(texts_by_language("labeled")) == {"en"}


@pytest.mark.parametrize("layout", publishing.XNLI)
def test_rows_of_one_premise_are_never_in_two_splits(layout: str) -> None:
    publishing.XNLI[layout]("xnli")
    source = {"kind": "xnli", "path": "xnli", "hub_split": "dev"}
    for seed in range(4):
        directory = Path(f"run{seed}/data")
        splits = {"test": 0.5, "unlabeled": 0.5}
        found = prepare(make_config([source], NLI, seed=seed, splits=splits), directory)
        assert {name: dataset.num_groups for name, dataset in found.items()} == {"test": 3, "unlabeled": 3}


@pytest.mark.parametrize("layout", publishing.PAWSX)
def test_pawsx(layout: str) -> None:
    """NS is a missing language, whatever the row's label; what the test hides leaves the test. Both are counted."""
    publishing.PAWSX[layout]("some/pawsx")
    inputs = [{"kind": "pawsx", "path": "some/pawsx", **DEV}, {"kind": "pawsx", "path": "some/pawsx", "split": "test"}]
    prepare(make_config(inputs, PARAPHRASES, withhold_labels=[]), RUN)
    for split, part, num_rows in (("unlabeled", "dev", 4), ("test", "test", 3)):
        expected = {
            language: [
                row
                for row in publishing.texts_of(publishing.paws_rows(language, part), PARAPHRASES["fields"])[:num_rows]
                if row["sentence1"] != "NS"
            ]
            for language in SENTENCES
        }
        assert texts_by_language(split) == expected
    assert [group.label for _, group in sorted(by_key("test").items())] == [1, 1, 0]
    assert details()["num_missing"] == {"de": 2, "ja": 2}
    assert details()["num_no_label"] == {"input some/pawsx": 1}
    if "without names" not in layout:
        assert sorted(by_key("unlabeled")) == ["dev/4", "dev/6", "dev/7", "dev/9"]


def test_a_hidden_label_does_not_keep_a_group_from_the_unlabeled() -> None:
    publishing.pawsx_original("pawsx")
    source = {"kind": "pawsx", "path": "pawsx", "hub_split": "test", "split": "unlabeled"}
    prepare(make_config([source], PARAPHRASES), RUN)
    assert len(by_key("unlabeled")) == 4
    assert details()["num_no_label"] == {}
    # Where a split that needs labels is filled from the same groups, nobody knows where it would go.
    undivided = {"kind": "pawsx", "path": "pawsx", "hub_split": "test"}
    prepare(make_config([undivided], PARAPHRASES, splits={"test": 1, "unlabeled": 2}), Path("other/data"))


def test_the_training_half_of_pawsx_is_english_and_translations_may_lack_rows() -> None:
    publishing.pawsx_original("pawsx")
    source = {"kind": "pawsx", "path": "pawsx", "hub_split": "train"}
    prepare(make_config([source | {"split": "labeled"}], PARAPHRASES), RUN)
    assert {tuple(group.texts) for group in by_key("labeled").values()} == {("en",)}
    assert len(by_key("labeled")) == 4
    config = make_config([source | {"split": "labeled", "languages": ["en", "ko"]}], PARAPHRASES)
    prepare(config, Path("other/data"))
    assert [len(group.texts) for group in _groups("other/data/labeled")] == [1, 2, 2, 2]


def _groups(directory: str) -> list[Any]:
    from alsace_dist.files.shards import open_dataset, read_shard

    dataset = open_dataset(directory)
    groups = [group for shard in dataset.shards for group in read_shard(dataset, shard)]
    return sorted(groups, key=lambda group: group.key)


@pytest.mark.parametrize("layout", publishing.SIB200)
def test_sib200(layout: str) -> None:
    publishing.SIB200[layout]("some/sib")
    config = make_config([{"kind": "sib200", "path": "some/sib", **DEV}], TOPICS, source_language="eng_Latn")
    prepare(config, RUN)
    expected = {language: [{"text": TOPIC_TEXTS[language][number]} for number in (1, 0, 2)] for language in TOPIC_TEXTS}
    assert texts_by_language("unlabeled") == expected  # ids 4, 5, 8
    assert sorted(by_key("unlabeled")) == ["dev/4", "dev/5", "dev/8"]


def test_only_the_languages_that_are_wanted_are_read() -> None:
    """Files of the others may be broken: with 205 languages that is not worth a look."""
    publishing.SIB200["files"]("sib")
    Path("sib/tha_Thai/dev.tsv").write_bytes(b"\xff\xfe broken")
    Path("sib/notes").mkdir()
    publishing.write_lines("sib/notes/dev.tsv", [["x"], ["y"]])
    languages = ["eng_Latn", "yor_Latn"]
    source = {"kind": "sib200", "path": "sib", **DEV}
    config = make_config([source], TOPICS, source_language="eng_Latn", languages=languages)
    prepare(config, RUN)
    assert set(texts_by_language("unlabeled")) == set(languages)
    assert list(fingerprint_of(config)["sources"]) == [f"sib/{name}/dev.tsv" for name in languages]
    with pytest.raises(UserError, match=r"SIB-200 is here in .*yor_Latn, and not in fra_Latn$"):
        prepare(make_config([source | {"languages": ["fra_Latn"]}], TOPICS, source_language="eng_Latn"), RUN)


# --- paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "languages"),
    [
        ("xnli/dev.{language}.tsv", set(PREMISES)),
        ("xnli/{split}.{language}.tsv", set(PREMISES)),
        ("xnli/dev.th.tsv", {"th"}),
        ("../{here}/xnli/dev.ar.tsv", {"ar"}),
    ],
)
def test_a_file_or_a_pattern_of_files_is_recognised_by_its_name(path: str, languages: set[str], tmp_path: Path) -> None:
    publishing.xnli_xtreme("xnli")
    one = {"kind": "xnli", "path": path.replace("{here}", tmp_path.name), "split": "unlabeled"}
    one |= {"hub_split": "dev"} if "{split}" in path else {}
    prepare(make_config([one], NLI, source_language=min(languages)), RUN)
    assert set(texts_by_language("unlabeled")) == languages
    assert sorted(by_key("unlabeled"))[0] == "dev/1"


def test_multinli_as_published_with_labels_that_nobody_agreed_on() -> None:
    """Gold label - : dropped and counted."""
    rows = [
        {"annotator_labels": [], "gold_label": label, "sentence1": f"p{number}", "sentence2": f"h{number}"}
        | {"pairID": f"{number}e", "promptID": str(number), "genre": "x"}
        for number, label in enumerate(["neutral", "-", "entailment", "-", "contradiction"])
    ]
    Path("multinli_1.0").mkdir()
    Path("multinli_1.0/multinli_1.0_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in ("multinli_1.0", "multinli_1.0/multinli_1.0_train.jsonl"):
        source = {"kind": "xnli", "path": path, "hub_split": "train", "split": "labeled"}
        prepare(make_config([source], NLI), RUN)
        assert sorted(by_key("labeled")) == ["train/0e", "train/2e", "train/4e"]
        assert details()["num_no_label"] == {f"input {path}": 2}
        assert details()["bad_records"] == {}


def test_labels_that_nobody_knows_are_named_for_data_of_your_own() -> None:
    lines = [{"id": n, "label": label, "texts": {"en": f"t{n}"}} for n, label in enumerate(["good", "?", "bad", "?"])]
    Path("a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(make_config([{"path": "a.jsonl", "split": "test"}], no_label=["?"]), RUN)
    assert sorted(by_key("test")) == ["0", "2"]
    assert details()["num_no_label"] == {"input a.jsonl": 2}


def test_a_folder_with_the_set_twice_is_refused() -> None:
    publishing.xnli_xtreme("sets/one")
    publishing.xnli_xtreme("sets/two")
    with pytest.raises(UserError, match=r"sets: XNLI is in more than one folder \(sets/one, sets/two\); name one$"):
        prepare(make_config([{"kind": "xnli", "path": "sets", **DEV}], NLI), RUN)
    publishing.pawsx_xtreme("sets/pawsx")  # the same names, with other columns
    with pytest.raises(UserError, match=r"\(sets/one, sets/two\)"):
        prepare(make_config([{"kind": "xnli", "path": "sets", **DEV}], NLI), RUN)
    prepare(make_config([{"kind": "pawsx", "path": "sets", **DEV}], PARAPHRASES), RUN)
    assert len(by_key("unlabeled")) == 4


def test_what_is_no_layout_is_said_in_one_line() -> None:
    publishing.write_lines("x/dev.en.tsv", [["id", "text"], ["1", "a"]])
    config = {"kind": "xnli", "path": "x", **DEV}
    said = r"^data\.inputs\.path: x: x/dev\.en\.tsv has the columns id, text, which XNLI has in none of its layouts"
    for path in ("x", "x/dev.{language}.tsv"):
        with pytest.raises(UserError, match=said.replace(": x:", f": {path.replace('{', '.').replace('}', '.')}:")):
            prepare(make_config([config | {"path": path}], NLI), RUN)
    with pytest.raises(UserError, match=r"no file of XNLI is here, part test, under any name .*xnli\.test\.tsv, .*"):
        prepare(make_config([{"kind": "xnli", "path": "x", "split": "test"}], NLI), RUN)
    with pytest.raises(UserError, match=r"hub_split: x: which part of XNLI is not said; set it to one of train, dev"):
        prepare(make_config([{"kind": "xnli", "path": "x", "split": "unlabeled"}], NLI), RUN)
    with pytest.raises(UserError, match=r"hub_split: x: 'trial' is no part of XNLI"):
        prepare(make_config([config | {"hub_split": "trial"}], NLI), RUN)
    with pytest.raises(UserError, match=r"x/nothing/here: no such file or folder .* and no name on the hub"):
        prepare(make_config([config | {"path": "x/nothing/here"}], NLI), RUN)
    publishing.xnli_xtreme("x")
    with pytest.raises(UserError, match=r"hub_split: x/dev\.en\.tsv is part dev, not test; remove it"):
        prepare(make_config([config | {"path": "x/dev.en.tsv", "hub_split": "test"}], NLI), RUN)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": ["0", "1", "2"]}, r"^task\.labels: kind xnli has entailment, neutral, contradiction"),
        (
            {"fields": ["text"], "template": "{text}"},
            r"^task\.fields: kind xnli has premise, hypothesis, and no 'text'",
        ),
    ],
)
def test_another_task_is_refused_before_reading(change: dict[str, Any], said: str) -> None:
    publishing.xnli_xtreme("x")
    with pytest.raises(UserError, match=said):
        prepare(make_config([{"kind": "xnli", "path": "x", **DEV}], NLI | change), RUN)


# --- the hub -------------------------------------------------------------------------------------------------------


def put_into_cache(name: str, config_name: str, split: str, columns: dict[str, Any], label: list[str]) -> None:
    """A configuration of a dataset as ``datasets`` keeps it once it has been fetched from the hub."""
    import datasets

    made = datasets.Dataset.from_dict(columns).cast_column("label", datasets.ClassLabel(names=label))
    owner, short = name.split("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}___{short}" / config_name / "0.0.0" / "0123abcd"
    folder.mkdir(parents=True)
    writer = datasets.arrow_writer.ArrowWriter(path=str(folder / f"{short}-{split}.arrow"), features=made.features)
    writer.write_table(made.data.table)
    num_examples, num_bytes = writer.finalize()
    info = datasets.SplitInfo(split, num_bytes=num_bytes, num_examples=num_examples, dataset_name=short)
    datasets.DatasetInfo(
        features=made.features,
        builder_name="parquet",
        dataset_name=short,
        config_name=config_name,
        version="0.0.0",
        splits=datasets.SplitDict({split: info}, dataset_name=short),
    ).write_to_directory(str(folder))


def test_a_name_on_the_hub_is_read_through_its_configurations() -> None:
    for language in ("en", "th", "ar"):
        columns = publishing._numbered(publishing.nli_rows(language))
        put_into_cache("facebook/xnli", language, "validation", columns, NLI["labels"])
    source = {"kind": "xnli", "path": "facebook/xnli", **DEV}
    config = make_config([source], NLI, languages=["en", "ar"])
    prepare(config, RUN)
    expected = {
        language: publishing.texts_of(publishing.nli_rows(language), NLI["fields"]) for language in ("en", "ar")
    }
    assert texts_by_language("unlabeled") == expected
    assert sorted(by_key("unlabeled"))[0] == "dev/1"  # the same ids as in the files, whatever the layout
    assert fingerprint_of(config)["sources"] == {"hub facebook/xnli None": {"name": "facebook/xnli", "revision": None}}
    prepare(make_config([source | {"split": "labeled"}], NLI), Path("other/data"))
    assert {tuple(group.texts) for group in _groups("other/data/labeled")} == {("en",)}


def test_hidden_labels_on_the_hub_are_counted_too() -> None:
    for language in SENTENCES:
        rows = publishing.paws_rows(language, "test")
        columns = publishing.columns_of(rows, publishing.PAWS_COLUMNS)
        columns |= {"id": [int(key) for key in columns["id"]], "label": [int(one) for one in columns["label"]]}
        put_into_cache("google-research-datasets/paws-x", language, "test", columns, ["0", "1"])
    source = {"kind": "pawsx", "path": "google-research-datasets/paws-x", "split": "test"}
    prepare(make_config([source], PARAPHRASES, languages=list(SENTENCES)), RUN)
    assert sorted(by_key("test")) == ["test/4", "test/6", "test/7"]
    assert details()["num_no_label"] == {"input google-research-datasets/paws-x": 1}


def test_a_name_on_the_hub_asks_for_its_parts_by_their_names_there() -> None:
    one = InputConfig(kind="xnli", path="facebook/xnli", hub_split="dev", languages=["en", "sw"])
    dataset = tasks.dataset("xnli")
    assert isinstance(dataset, tasks.Published)
    (found,) = published.locate(dataset, one)
    assert found.input.hub_split == "validation" and found.input.subsets == {"en": "en", "sw": "sw"}
    every = InputConfig(kind="xnli", path="facebook/xnli", hub_split="test")
    assert len(published.locate(dataset, every)[0].input.subsets) == 15
    assert kind_of(one).files(one) == []
    with pytest.raises(UserError, match=r"data\.languages: none of xx is a language of XNLI"):
        published.locate(dataset, one.model_copy(update={"languages": ["xx"]}))


# --- what is wrong with a file -------------------------------------------------------------------------------------


def spoil(path: str, number: int, line: bytes | None) -> None:
    """Replace a line of a file (from 1); None: remove it."""
    lines = Path(path).read_bytes().splitlines(keepends=True)
    lines[number - 1 : number] = [] if line is None else [line]
    Path(path).write_bytes(b"".join(lines))


def test_rows_that_are_wrong_in_a_set_joined_by_position() -> None:
    publishing.xnli_xtreme("xnli")
    spoil("xnli/dev.ar.tsv", 3, b"1\tp\th\tneutral\textra\r\n")
    spoil("xnli/dev.en.tsv", 4, b"2\tp\th\tmaybe\r\n")
    spoil("xnli/dev.hi.tsv", 5, b"3\tp\t \tneutral\r\n")
    spoil("xnli/dev.th.tsv", 6, b"4\tp\t\xff\tcontradiction\r\n")
    spoil("xnli/dev.ur.tsv", 6, b"4\tp\th\tneutral\r\n")
    config = make_config([{"kind": "xnli", "path": "xnli", **DEV}], NLI)
    with pytest.raises(UserError, match="1 broken row"):
        prepare(config, RUN)
    assert problems() == [
        "xnli/dev.ar.tsv:3: broken row: 5 cells under 4 columns",
        "xnli/dev.en.tsv:4: unknown label: 'maybe' is not one of task.labels",
        "xnli/dev.hi.tsv:5: empty text: hi.hypothesis",
        "xnli/dev.th.tsv:6: invalid UTF-8: in th.hypothesis: '\\udcff'",
        "xnli/dev.ur.tsv:6: conflicting labels: id 'dev/5' has 'neutral' here and 'contradiction' at xnli/dev.ar.tsv:6",
    ]
    prepare(make_config([{"kind": "xnli", "path": "xnli", **DEV}], NLI, on_bad="skip", max_skipped=1.0), RUN)
    assert sorted(by_key("unlabeled")) == ["dev/1", "dev/6"]


@pytest.mark.parametrize("kind", ["xnli", "pawsx"])
def test_a_language_with_another_number_of_rows(kind: str) -> None:
    """By position nobody knows which row is missing, so that nothing may be skipped; by id it is that group's."""
    task = {"xnli": NLI, "pawsx": PARAPHRASES}[kind]
    {"xnli": publishing.xnli_xtreme, "pawsx": publishing.pawsx_xtreme}[kind]("set")
    language = {"xnli": "th", "pawsx": "ko"}[kind]
    spoil(f"set/dev.{language}.tsv", 3, None)
    config = make_config([{"kind": kind, "path": "set", **DEV}], task, on_bad="skip", max_skipped=1.0)
    if kind == "xnli":
        with pytest.raises(UserError, match=r"of which a different row count cannot be skipped"):
            prepare(config, RUN)
        said = "row count: th ends here after 5 rows, where most languages have 6"
        assert f"set/dev.th.tsv:6: {said}" in problems()
    else:
        prepare(config, RUN)
        assert problems() == ["set/dev.ko.tsv:4: missing rows: ko ends here after 3 rows, where most languages have 4"]
        assert len(by_key("unlabeled")) == 4


def test_blank_lines_between_rows_that_are_joined_by_position_are_told() -> None:
    """Nobody knows whether one is a row that lacks a language, or nothing."""
    publishing.xnli_xtreme("xnli")
    for number, language in enumerate(PREMISES, start=2):
        spoil(
            f"xnli/dev.{language}.tsv",
            number,
            b"\r\n" + Path(f"xnli/dev.{language}.tsv").read_bytes().splitlines(True)[number - 1],
        )
    with pytest.raises(UserError, match=r"6 broken row"):
        prepare(make_config([{"kind": "xnli", "path": "xnli", **DEV}], NLI), RUN)
    blank = [line.split(": ")[0] for line in problems() if ": broken row: a blank line, and rows are joined by" in line]
    places = {f"xnli/dev.{language}.tsv:{number}" for number, language in enumerate(PREMISES, start=2)}
    assert set(blank) == places


def test_quotes_and_ids_that_are_wrong_in_a_quoted_set() -> None:
    publishing.SIB200["files"]("sib")
    spoil("sib/yor_Latn/dev.tsv", 2, '5\tsports\t"Ó ní "sá"\n'.encode())
    spoil("sib/nqo_Nkoo/dev.tsv", 4, "5\tsports\tߓߊ߯ߙߊ\n".encode())
    spoil("sib/tha_Thai/dev.tsv", 3, "4\ttravels\tน้ำใจ\n".encode())
    config = make_config([{"kind": "sib200", "path": "sib", **DEV}], TOPICS, source_language="eng_Latn")
    with pytest.raises(UserError):
        prepare(config, RUN)
    assert problems() == [
        "sib/nqo_Nkoo/dev.tsv:4: duplicate id: id 'dev/5' has language nqo_Nkoo at sib/nqo_Nkoo/dev.tsv:2 already",
        "sib/tha_Thai/dev.tsv:3: unknown label: 'travels' is not one of task.labels",
        "sib/yor_Latn/dev.tsv:2: broken row: '\\t' expected after '\"'",
    ]


def test_rows_that_are_wrong_in_parquet_and_in_mappings() -> None:
    columns = publishing.mappings()
    columns["hypothesis"][1]["translation"] = columns["hypothesis"][1]["translation"][:-1]
    columns["premise"][2]["ar"] = " "
    columns["label"][3] = 7
    publishing.write_parquet("xnli/all_languages/validation-00000-of-00001.parquet", columns)
    with pytest.raises(UserError):
        prepare(make_config([{"kind": "xnli", "path": "xnli", **DEV}], NLI), RUN)
    file = "xnli/all_languages/validation-00000-of-00001.parquet"
    assert problems() == [
        f"{file}:row 2: no texts: hypothesis must map languages to texts, or hold lists of language and translation",
        f"{file}:row 3: empty text: ar.premise",
        f"{file}:row 4: unknown label: '7' is not one of task.labels",
    ]


def test_a_file_that_breaks_off_is_one_line() -> None:
    publishing.xnli_hub("xnli")
    path = Path("xnli/ar/validation-00000-of-00002.parquet")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=rf"^{path}: cannot be read as Parquet \(.*\); restore the file$"):
        prepare(make_config([{"kind": "xnli", "path": "xnli", **DEV}], NLI), RUN)
