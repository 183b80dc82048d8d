"""Section 7: what people's files and machines did to other tools, rebuilt.

| Case | Held in |
|---|---|
| sentinels without a blank before them | test_2_silently_wrong.py |
| labels that look the same | test_2_silently_wrong.py |
| control tokens in texts | tests/models/test_prompts.py |
| `random.py` in the working directory | tests/ranks/test_group.py |
| RANK and WORLD_SIZE without a group | test_4_hangs.py, tests/ranks/test_group.py |
| `submit` inside `salloc`; four submits at once | tests/cluster/test_submit.py |
| SIGUSR2 in the first moments of a job | tests/cluster/test_disturbed.py, tests/cluster/test_scripts.py |
| XNLI's `all_languages` layout | tests/tasks/test_published.py |
| the four real sets | tests/tasks/test_real_sets.py |
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from cases.case import Case

from alsace_dist.commands import what_next
from alsace_dist.files.shards import open_dataset, read_shard

ROOT = Path(__file__).parents[2]


def change_records(case: Case, change: Callable[[int, dict[str, Any]], None], file: str = "data.jsonl") -> None:
    """Change each record of the world's data, by its number."""
    lines = (case / "data.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for number, record in enumerate(records):
        change(number, record)
    case.put(file, "".join(json.dumps(record) + "\n" for record in records))


# --- ids and languages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spell", ["{language}_{id}", "{id}.{language}", "{id} ({language})"])
def test_ids_that_do_not_join(case: Case, spell: str) -> None:
    rows = [["id", "language", "text", "label"]]
    for line in (case / "data.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for language, fields in record["texts"].items():
            rows.append([spell.format(id=record["id"], language=language), language, fields["text"], record["label"]])
    case.put("a.csv", "\n".join(map(",".join, rows)))
    inputs = [{"path": "data.jsonl", "split": "labeled", "name": "x"}, {"path": "a.csv", "kind": "table"}]
    case.change(data={"inputs": inputs, "splits": {"unlabeled": 0.5, "test": 0.5}})
    words = ("groups of split unlabeled only 0 are in two languages", "data.columns.id: null", "data.min_parallel")
    case.refused("prepare", "run.yaml", says=words)


@pytest.mark.parametrize(
    "names", [("zh-CN", "zh_CN"), ("pt_BR", "pt-BR"), ("pt-BR", "pt-br"), ("DE", "de")], ids=" ".join
)
def test_a_language_that_is_spelt_two_ways(case: Case, names: tuple[str, str]) -> None:
    def spell(number: int, record: dict[str, Any]) -> None:
        record["texts"][names[number % 2]] = {"text": "x"}
        if "de" in record["texts"] and "de" not in names[number % 2 :]:
            del record["texts"]["de"]

    change_records(case, spell)
    words = ("one language has two names", *map(repr, names), "spell it one way")
    case.refused("prepare", "run.yaml", says=words)


def test_ids_that_start_anew_in_each_input(case: Case) -> None:
    """The bad records are listed; a name for each input is the remedy that loses nothing."""
    case.change(data={"inputs": [{"path": "data.jsonl"}, {"path": "data.jsonl", "split": "test"}]})
    case.refused("prepare", "run.yaml", says=("115 duplicate id", "give each a data.inputs.name"))
    inputs = [{"path": "data.jsonl", "name": "one"}, {"path": "data.jsonl", "split": "test", "name": "two"}]
    case.change(data={"inputs": inputs})
    case.done("prepare", "run.yaml")


# --- bad records ---------------------------------------------------------------------------------------------------


def write_tsv(case: Case, quoting: str | None = None) -> None:
    """German premises, one of which begins with a quote that nothing ends."""
    rows = ["id\tlanguage\ttext\tlabel"]
    for number in range(40):
        for language in ("en", "de"):
            text = f'"Haus {number}' if (language, number) == ("de", 7) else f"house {number}"
            rows.append(f"g{number}\t{language}\t{text}\t{'abc'[number % 3]}")
    case.put("a.tsv", "\n".join(rows) + "\n")
    own = {"path": "a.tsv", "kind": "table"} | ({"quoting": quoting} if quoting else {})
    case.change(data={"inputs": [own], "splits": {"labeled": 10, "unlabeled": 15, "test": 15}})


@pytest.mark.parametrize(
    "flags", [[], ["--data.on_bad=skip"], ["--data.on_bad=skip", "--data.max_skipped=1"]], ids=" ".join
)
def test_a_stray_quote_swallows_no_rows(case: Case, flags: list[str]) -> None:
    """Nobody knows which rows it hides, so that it cannot be skipped."""
    write_tsv(case)
    case.refused("prepare", "run.yaml", *flags, says=("open quote", "cannot be skipped"))
    assert "a.tsv:17: open quote" in (case / "run/bad-records.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("quoting", ["none", "auto"])
def test_a_quote_that_is_a_letter(case: Case, quoting: str) -> None:
    write_tsv(case, quoting)
    case.done("prepare", "run.yaml")
    found = {}
    for split in ("labeled", "unlabeled", "test"):
        dataset = open_dataset(case / "run/data" / split)
        found |= {group.key: group for shard in dataset.shards for group in read_shard(dataset, shard)}
    assert len(found) == 40
    assert found["g7"].texts["de"] == {"text": '"Haus 7'}


def test_skipping_may_not_empty_a_class(case: Case) -> None:
    def spoil(number: int, record: dict[str, Any]) -> None:
        if record["label"] == "b":
            record["texts"]["en"]["text"] = ""

    change_records(case, spoil)
    flags = ("--data.on_bad=skip", "--data.max_skipped=0.5")
    case.refused("prepare", "run.yaml", *flags, says=("data.on_bad: skip leaves out", "label 'b'", "data.max_skipped"))


def test_skipping_may_not_leave_a_handful(case: Case) -> None:
    def spoil(number: int, record: dict[str, Any]) -> None:
        if number % 10:
            record["texts"]["en"]["text"] = ""

    change_records(case, spoil)
    words = ("data.on_bad: skip leaves out", "of 115 records", "data.max_skipped")
    case.refused("prepare", "run.yaml", "--data.on_bad=skip", says=words)


def test_a_text_that_stands_for_a_missing_translation(case: Case) -> None:
    """As PAWS-X has NS: that language is missing in that group, and it is counted."""

    def spoil(number: int, record: dict[str, Any]) -> None:
        if number % 5 == 0 and "fr" in record["texts"]:
            record["texts"]["fr"]["text"] = "NS"

    change_records(case, spoil)
    done = case.done("prepare", "run.yaml", "--data.missing=[NS]")
    assert re.search(r"missing translations: fr \d+", done.stderr + done.stdout)
    dataset = open_dataset(case / "run/data/unlabeled")
    groups = [group for shard in dataset.shards for group in read_shard(dataset, shard)]
    assert groups and not any(fields == {"text": "NS"} for group in groups for fields in group.texts.values())


# --- files by their names ------------------------------------------------------------------------------------------


def test_a_folder_whose_name_looks_like_a_pattern(case: Case) -> None:
    case.put("[v2]/data.jsonl", (case / "data.jsonl").read_text(encoding="utf-8"))
    case.change(data={"inputs": [{"path": "[v2]/*.jsonl"}]})
    case.refused("prepare", "run.yaml", says=("[v2]/*.jsonl: no such file", "is written [[]"))
    case.change(data={"inputs": [{"path": "[[]v2]/*.jsonl"}]})
    case.done("prepare", "run.yaml")
    case.change(run_dir="other", data={"inputs": [{"path": "[v2]/data.jsonl"}]})
    case.done("prepare", "run.yaml")


@pytest.mark.parametrize("ending", ["tsv", "csv"])
def test_a_file_per_language_without_a_column_for_it(case: Case, ending: str) -> None:
    mark = "\t" if ending == "tsv" else ","
    for language in ("en", "de"):
        rows = [mark.join((f"g{number}", f"{language} {number}", "abc"[number % 3])) for number in range(40)]
        case.put(f"set/dev.{language}.{ending}", "\n".join([mark.join(("id", "text", "label")), *rows]))
    own = {"path": f"set/dev.{{language}}.{ending}", "kind": "table"}
    case.change(data={"inputs": [own], "splits": {"labeled": 10, "unlabeled": 15, "test": 15}})
    case.done("prepare", "run.yaml")
    assert open_dataset(case / "run/data/test").languages == ("de", "en")


def test_a_cache_of_the_hub_that_cannot_be_written_is_what_is_blamed(case: Case) -> None:
    """In a process of its own, for `datasets` reads HF_HOME when it is imported."""
    case.put("set/en.jsonl", (case / "data.jsonl").read_text(encoding="utf-8"))
    case.put("home")
    case.change(data={"inputs": [{"kind": "huggingface", "path": "set"}]})
    environment = tiny.environment() | {"HF_HOME": str(case / "home/cache")}
    done = subprocess.run(
        [sys.executable, "-m", "alsace_dist", "prepare", "run.yaml"],
        cwd=case.directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "home/cache" in line and "HF_HOME" in line, line
    assert "network" not in line


# --- machines ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a machine another name")
def test_a_host_name_that_does_not_resolve(case: Case) -> None:
    """On one machine only loopback is needed."""
    case.finish("data")
    done = case.alsace("finetune", "fresh.yaml", as_rank=False, host_name="nowhere.invalid", seconds=90)
    assert done.code == 0, done.stderr


def test_run_as_a_rank_is_refused(case: Case) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    case.refused("run", "run.yaml", says="run starts its ranks itself", environment=place)


def test_long_texts_are_learnt_from_as_well(case: Case) -> None:
    """SentencePiece passes over texts beyond 4,192 bytes without a word: of a script whose letters take three bytes,
    all of them."""
    words = ["घर", "पेड़", "नदी", "पुराना", "नया", "पत्थर"]

    def lengthen(number: int, record: dict[str, Any]) -> None:
        text = " ".join(words[(number + index) % len(words)] for index in range(600))
        assert len(text.encode()) > 4192
        record["texts"] = {"en": record["texts"]["en"], "hi": {"text": text}}

    change_records(case, lengthen)
    nano = {"vocab_size": 120, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 1}
    case.change(model={"path": None, "nano": nano}, pretrain={"num_steps": 1, "global_batch_size": 2})
    case.change(data={"splits": {"pretrain": 40, "labeled": 20, "unlabeled": 25, "test": 30}})
    case.done("prepare", "run.yaml")
    case.done("pretrain-nano", "run.yaml")
    path = min((case / "run").rglob("tokenizer.json"))
    known = {letter for piece, _ in json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"] for letter in piece}
    assert {letter for word in words for letter in word} <= known


# --- hints ---------------------------------------------------------------------------------------------------------

HOSTILE = ["a b", "$(touch executed)", "a;touch executed", "'", "`touch executed`"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hints_can_be_pasted(case: Case, name: str) -> None:
    case.finish()
    (case / "run").rename(case / name)
    shown = case.done("report", name).stdout
    (hint,) = re.findall(r"^TensorBoard +(.*)$", shown, re.MULTILINE)
    assert shlex.split(hint) == ["tensorboard", "--logdir", f"{name}/tensorboard"]
    wrote = case.done("init", "demo", f"{name}.yaml").stdout
    assert f"`alsace run {shlex.quote(f'{name}.yaml')}`" in wrote
    lines = what_next(Path(name, "alsace"), Path(name, "demo.yaml"), name).splitlines()
    first = shlex.split(next(line for line in lines if "--logdir" in line))
    assert first[:3] == [f"{name}/tensorboard", "--logdir", f"{name}/tensorboard"]
    second = shlex.split(next(line for line in lines if "--method" in line).partition("     ")[0])
    assert second[:3] == [f"{name}/alsace", "run", f"{name}/demo.yaml"]


def test_no_template_of_the_documentation_has_a_sentinel_without_a_blank() -> None:
    places = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("alsace_dist/presets/*.yaml")]
    assert len(places) > 10
    for path in places:
        templates = re.findall(r"template:? *[\"'].*|\S*\{\w+\}.*<extra_id_0>.*", path.read_text(encoding="utf-8"))
        assert not [one for one in templates if re.search(r"[^\s\"'`(]<extra_id_", one)], path
