"""The doctor finds what is wrong, says so in one line each, and never shows a secret."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import MT5Config, MT5ForConditionalGeneration, PreTrainedTokenizerFast

from alsace_dist import doctor
from alsace_dist.config import Config
from alsace_dist.doctor import Finding, check_data, check_devices, check_directory, check_group, check_model
from alsace_dist.errors import UserError
from alsace_dist.stages.prepare import prepare

Findings = list[Finding]


def make_config(model: str | Path = "nobody/nothing", **sections: Any) -> Config:
    value = {
        "run_dir": "run",
        "task": {"fields": ["text"], "template": "{text}", "labels": ["good", "bad"]},
        "data": {"inputs": [{"path": "texts.jsonl"}], "splits": {"labeled": 4, "unlabeled": 4, "test": 2}},
        "model": {"path": str(model)},
        "engine": {"num_processes": 1},
    }
    return Config.model_validate(value | sections)


@pytest.fixture(autouse=True)
def _in_directory_with_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [{"en": {"text": f"one {number}"}, "de": {"text": f"eins {number}"}} for number in range(10)]
    rows = [{"id": str(number), "label": "good", "texts": pair} for number, pair in enumerate(texts)]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    words = ["<pad>", "</s>", "<unk>", "good", "bad", "one", "eins"]
    fast = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = ("</s>", words.index("</s>"))
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = MT5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=1, num_decoder_layers=1)
    directory = tmp_path / "model"
    MT5ForConditionalGeneration(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def states(findings: Findings) -> list[str]:
    return [finding.state for finding in findings]


def failure(findings: Findings) -> str:
    """The text of the only finding that is FAILED; always one line."""
    (text,) = [finding.text for finding in findings if finding.state == "FAILED"]
    assert "\n" not in text
    return text


def run_model_check(config: Config) -> Findings:
    return list(doctor._run("model", lambda: check_model(config)))


# --- the whole -----------------------------------------------------------------------------------------------------


def test_a_machine_that_is_fit(model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    doctor.run_checks(make_config(model))
    lines = capsys.readouterr().out.splitlines()
    names = {line.split()[1] for line in lines}
    assert {"python", "torch", "deepspeed", "transformers", "webdataset", "CPU", "gloo", "run_dir"} <= names
    assert {"data", "model", "answers", "weights"} <= names
    assert not [line for line in lines if line.startswith("FAILED")]
    assert f"torch          {torch.__version__}" in "\n".join(lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # nothing is left behind, nothing made


def test_all_that_failed_is_counted_and_the_other_checks_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "check_group", lambda: iter([Finding("ok", "gloo", "")]))
    inputs = [{"path": "none.jsonl", "split": "test"}, {"path": "nothing.jsonl", "split": "labeled"}]
    config = make_config(tmp_path, run_dir="texts.jsonl/run", data={"inputs": inputs})
    with pytest.raises(UserError, match=r"^doctor: 4 checks FAILED; "):
        doctor.run_checks(config)
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert [line.split()[1] for line in failed] == ["run_dir", "data", "data", "model"]


def test_the_command_ends_with_exit_code_2_and_the_error_last(tmp_path: Path) -> None:
    Path("run.yaml").write_text(json.dumps(make_config().model_dump(exclude_unset=True)))
    Path("texts.jsonl").unlink()
    secret = "hunter2-hunter2"
    environment = os.environ | {"HF_TOKEN": secret, "ALSACE_TEST_SECRET": secret}
    command = [sys.executable, "-m", "alsace_dist", "doctor", "run.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: doctor: 1 check FAILED;")
    assert "texts.jsonl: no such file" in done.stdout
    assert secret not in done.stdout + done.stderr


def test_without_a_config_only_the_machine_is_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "check_group", lambda: iter([Finding("ok", "gloo", "")]))
    doctor.run_checks(None)
    names = {line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert "run_dir" in names and not names & {"data", "model"}


# --- machine -------------------------------------------------------------------------------------------------------


def test_a_package_that_is_too_old_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "tensorboard":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "rich" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {finding.name: finding for finding in doctor.check_versions(None)}
    assert found["rich"] == Finding("FAILED", "rich", "1.0 is not >=13.7; run `pip install 'rich>=13.7'`")
    assert found["tensorboard"].text == "not installed; run `pip install 'tensorboard>=2.18'`"
    assert {name for name, finding in found.items() if finding.state == "FAILED"} == {"rich", "tensorboard"}
    assert "pytest" not in found and "peft" not in found  # what only the tests need, or adapters
    adapters = doctor.check_versions(make_config(distill={"lora": {}}))
    assert "peft" in {finding.name for finding in adapters}


def test_more_ranks_than_the_machine_has_room_for() -> None:
    config = make_config(engine={"num_processes": 10_000})
    assert {"warning", "FAILED"} & set(states(list(check_devices(config))))
    assert "10000" in " ".join(finding.text for finding in check_devices(config))
    config = make_config(engine={"num_processes": 1, "dtype": "fp32"})
    assert set(states(list(check_devices(config)))) <= {"ok"}


@pytest.mark.parametrize(("slowdown", "state"), [(0.5, "ok"), (40.0, "warning")])
def test_a_cpu_that_is_slow_in_bf16(monkeypatch: pytest.MonkeyPatch, slowdown: float, state: str) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("alsace_dist.monitor.health.bf16_slowdown", lambda: slowdown)
    found = {finding.name: finding for finding in check_devices(make_config())}
    assert found["bf16"].state == state
    assert ("set engine.dtype: fp32" in found["bf16"].text) == (state == "warning")
    config = make_config(engine={"num_processes": 1, "dtype": "fp32"})
    assert "bf16" not in {finding.name for finding in check_devices(config)}


def test_two_processes_really_sum_a_number() -> None:
    command = [sys.executable, "-c", doctor.ALL_REDUCE]
    assert doctor._run_two_ranks([*command, str(Path("store").absolute())], 200) == ""


def test_a_group_that_does_not_form_ends_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ALL_REDUCE", "import time; time.sleep(100)")
    start = time.monotonic()
    text = failure(list(check_group(1.5)))
    assert time.monotonic() - start < 30
    assert text.startswith("two processes did not find each other within 2 s; ")


def test_a_wrong_sum_and_a_dead_process_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ALL_REDUCE", "print(2)")
    assert "failed (exit code 0)" in failure(list(check_group(30)))
    monkeypatch.setattr(doctor, "ALL_REDUCE", "import sys; sys.exit('no route to host')")
    assert "failed (no route to host)" in failure(list(check_group(30)))


@pytest.mark.parametrize("directory", ["texts.jsonl/run", "/proc/run"])
def test_a_directory_that_cannot_be_written(directory: str) -> None:
    text = failure(list(check_directory("run_dir", Path(directory))))
    assert text.startswith(f"{directory} (to be made in ")
    assert text.endswith("free space or choose another directory")


def test_a_directory_is_tried_without_leaving_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    assert states(list(check_directory("run_dir", tmp_path / "there"))) == ["ok"]
    assert states(list(check_directory("run_dir", tmp_path / "a" / "b" / "c"))) == ["ok"]
    assert list((tmp_path / "there").iterdir()) == [] and not (tmp_path / "a").exists()
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 1 << 62)
    assert states(list(check_directory("run_dir", tmp_path))) == ["warning"]


# --- data ----------------------------------------------------------------------------------------------------------


def test_inputs_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = check_data(make_config())
    assert finding.state == "ok" and finding.text.startswith("texts.jsonl: 1 file, ")
    config = make_config(data={"inputs": [{"kind": "demo", "num_groups": 1200}], "splits": {"test": 0.5}})
    assert [finding.text for finding in check_data(config)] == ["demo: 1,200 groups are generated"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "not readable" in failure(list(check_data(make_config())))


def test_data_that_is_prepared_needs_no_inputs() -> None:
    config = make_config()
    prepare(config, Path("run/data"))
    Path("texts.jsonl").unlink()
    assert [finding.text for finding in check_data(config)] == ["prepared already, in run/data"]


def test_a_prepared_dataset_elsewhere() -> None:
    prepare(make_config(), Path("run/data"))
    config = make_config(data={"directory": "run/data"})
    assert [finding.text for finding in check_data(config)] == [
        "run/data/labeled: 4 groups in 2 languages",
        "run/data/unlabeled: 4 groups in 2 languages",
        "run/data/test: 2 groups in 2 languages",
    ]
    Path("run/data/test/manifest.json").unlink()
    assert failure(list(check_data(config))).startswith("run/data/test/manifest.json: no such file")
    other = make_config(data={"directory": "run/data", "source_language": "sw"}, finetune=None)
    found = list(check_data(other))
    assert states(found) == ["ok", "FAILED", "FAILED"]  # the test split is still not there
    assert found[2].text.startswith("data.source_language: split unlabeled has nothing in 'sw'")


def test_a_prepared_dataset_with_other_labels() -> None:
    prepare(make_config(), Path("run/data"))
    task = {"fields": ["text"], "template": "{text}", "labels": ["bad", "good"]}
    other = make_config(data={"directory": "run/data"}, task=task)
    assert failure(list(check_data(other))).startswith(
        "task.labels: split labeled was prepared with good, bad, in this"
    )


def test_a_store_that_cannot_be_reached_is_a_failure_for_each_split() -> None:
    found = list(check_data(make_config(data={"directory": "https://127.0.0.1:1/data"})))
    assert states(found) == ["FAILED"] * 3
    assert found[0].text.startswith("https://127.0.0.1:1/data/labeled/manifest.json: cannot be read (Cannot connect to")
    assert "tried 2 times in" in found[0].text


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    source = {"kind": "huggingface", "path": "nobody/data", "split": "test"}
    config = make_config(data={"inputs": [source]})
    (finding,) = check_data(config)  # no network in tests
    assert finding.state == "warning" and "the hub cannot be asked (OfflineModeIsEnabled)" in finding.text

    def answer(self: Any, path: str, *, revision: str | None, repo_type: str, timeout: float) -> None:
        asked.append((path, repo_type))
        if path == "nobody/nothing":
            raise errors.RevisionNotFoundError.__new__(errors.RevisionNotFoundError)

    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", answer)
    assert states(list(check_data(config))) == ["ok"]
    text = failure(run_model_check(config))
    assert text.startswith("nobody/nothing: neither a local path nor a model on the hub")
    assert asked == [("nobody/data", "dataset"), ("nobody/nothing", "model")]


# --- model ---------------------------------------------------------------------------------------------------------


def test_a_model_that_fits(model: Path) -> None:
    found = run_model_check(make_config(model))
    assert states(found) == ["ok"] * 3
    assert "2 per example, single tokens" in found[1].text
    task = {"fields": ["text"], "template": "{text}", "labels": ["0", "1"], "verbalizers": ["good one", "bad"]}
    assert "several tokens" in run_model_check(make_config(model, task=task))[1].text


def test_answers_that_the_model_does_not_know(model: Path) -> None:
    task = {"fields": ["text"], "template": "{text}", "labels": ["0", "1"], "verbalizers": ["good", "fine"]}
    assert "the answer 'fine' for 'default'" in failure(run_model_check(make_config(model, task=task)))


def test_weights_that_do_not_fit_or_are_broken(model: Path) -> None:
    file = model / "model.safetensors"
    state = load_file(file)
    removed = next(name for name in state if name.endswith("wo.weight"))
    save_file({name: value for name, value in state.items() if name != removed}, file, metadata={"format": "pt"})
    assert f"{removed} is missing" in failure(run_model_check(make_config(model)))
    file.write_bytes(file.read_bytes()[:100])
    assert "cannot be read as safetensors" in failure(run_model_check(make_config(model)))
    file.unlink()
    assert "holds no model.safetensors" in failure(run_model_check(make_config(model)))


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    assert failure(run_model_check(make_config(tmp_path))).startswith(f"{tmp_path}/config.json: no such file")


def test_a_nano_model_needs_nothing() -> None:
    config = Config.model_validate(make_config().model_dump(exclude_unset=True) | {"model": {"nano": {}}})
    assert states(run_model_check(config)) == ["ok"]
