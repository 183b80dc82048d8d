"""Sweeps of seeds: which runs they are, what is refused, and the runs one after another on this machine."""

import json
from pathlib import Path

import pytest
import tiny
import yaml

from alsace_dist import sweep
from alsace_dist.errors import EXIT_USER_ERROR, UserError


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("1,2,3", [1, 2, 3]), ("1-5", [1, 2, 3, 4, 5]), ("0", [0]), ("7,1-2, 9", [7, 1, 2, 9]), ("42,1337", [42, 1337])],
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert sweep.wanted(text, {}) == seeds


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "'a' is no seed; give whole numbers from 0 on"),
        ("", "'' is no seed"),
        ("1,,2", "'' is no seed"),
        ("-1", "'-1' is no seed"),
        ("1.5", "'1.5' is no seed"),
        ("٣", "'٣' is no seed"),
        ("1,2,1", "1 is given twice; give it once"),
        ("0,0", "0 is given twice"),
        ("1-3,2", "2 is given twice"),
        ("3-1", "'3-1' runs backwards; write 1-3"),
        ("9223372036854775808", "beyond the largest seed"),
        ("1-1000000000", "more than 1000 seeds"),
    ],
)
def test_seeds_that_are_none(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        sweep.wanted(text, {})
    assert words in str(caught.value) and str(caught.value).startswith(f"--seeds={text}: ")


def test_without_the_flag_there_are_no_seeds_and_beside_it_no_seed() -> None:
    assert sweep.wanted(None, {"seed": "1"}) == []
    with pytest.raises(UserError, match="--seed and --seeds: give one of them"):
        sweep.wanted("1,2", {"seed": "1"})


def test_a_seed_keeps_its_place(tmp_path: Path) -> None:
    sweep.claim(tmp_path, [3, 1])
    assert [(one.seed, one.place) for one in sweep.claim(tmp_path, [2, 1])] == [(3, 0), (1, 1), (2, 2)]
    (tmp_path / "seed-1").mkdir()
    whole, member = sweep.sweep_of(tmp_path / "seed-1") or pytest.fail("it is of the sweep")
    assert (whole, member.seed, member.place) == (tmp_path.resolve(), 1, 1)
    (tmp_path / "link").symlink_to("seed-1")
    assert sweep.sweep_of(tmp_path / "link") == (whole, member)
    assert sweep.sweep_of(tmp_path / "seed-9") is None and sweep.sweep_of(tmp_path) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"seeds": []}', '{"seeds": ["1"]}', '{"seeds": [1, 1]}', '{"seeds": [-1]}']
)
def test_a_list_of_seeds_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    for ask in (lambda: sweep.members(tmp_path), lambda: sweep.claim(tmp_path, [1])):
        with pytest.raises(UserError, match=r"sweep\.json: .*move it out of run_dir"):
            ask()
    assert (tmp_path / "sweep.json").read_text() == text


def test_a_directory_is_a_runs_or_a_sweeps(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny.write_config(tmp_path / "config.yaml", tiny.make_config(world, run_dir="run"))
    sweep.claim(Path("run"), [1])
    for command in (["run"], ["finetune"], ["submit", "--cluster=" + str(_site(tmp_path)), "--dry-run"]):
        done = tiny.alsace(command[0], str(config), *command[1:], check=False)
        assert done.returncode == EXIT_USER_ERROR
        assert done.stderr == "error: run: holds a sweep of seeds; give --seeds, or another run_dir\n"
    assert [path.name for path in Path("run").iterdir()] == ["sweep.json"]
    Path("own").mkdir()
    Path("own/config.yaml").write_text("")
    with pytest.raises(UserError, match="own is the directory of a run; give a sweep of seeds a run_dir of its own"):
        sweep.claim(Path("own"), [1])
    Path("mine").mkdir()
    Path("mine/report.md").write_text("mine")
    with pytest.raises(UserError, match=r"mine/report\.md: is not alsace_dist's"):
        sweep.claim(Path("mine"), [1])


def _site(directory: Path) -> Path:
    path = directory / "site.yaml"
    path.write_text("ranks_per_node: 1\n")
    return path


def test_seeds_one_after_another(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration alone, which scores and does not train."""
    monkeypatch.chdir(tmp_path)
    sections = {"finetune": None, "rounds": 0, "evaluate": {"calibrate": True}, "engine": {"num_processes": 1}}
    value = tiny.make_config(world, run_dir="runs", data={"directory": str(world / "run/data")}, **sections)
    path = str(tiny.write_config(tmp_path / "config.yaml", value))
    lines = tiny.alsace("run", path, "--seeds=5,6", "--dry-run").stdout.splitlines()
    assert lines[0] == "seed 5: to do     score" and lines[-1] == "seed 6: to do     evaluate"
    assert not Path("runs").exists()
    tiny.alsace("run", path, "--seeds=5,6")
    for seed in (5, 6):
        config = yaml.safe_load(Path(f"runs/seed-{seed}/config.yaml").read_text())
        assert (config["seed"], config["run_dir"]) == (seed, f"runs/seed-{seed}")
        fingerprint = json.loads(Path(f"runs/seed-{seed}/evaluation/manifest.json").read_text())["fingerprint"]
        assert fingerprint["seed"] == seed
        assert Path(f"runs/seed-{seed}/report.json").exists()
    again = tiny.alsace("run", path, "--seeds=5")
    assert again.stderr.count("complete, skipped") == 3
    assert (
        again.stdout.rstrip().splitlines()[-1].startswith("| **main** | **2** |")
    )  # both seeds, whichever was run now
    assert json.loads(Path("runs/seeds.json").read_text())["main"]["seeds"] == [5, 6]
    assert tiny.alsace("report", "runs").stdout == Path("runs/seeds.md").read_text()
    text = tiny.alsace("status", "runs").stdout
    assert text.splitlines()[0].split("  ")[0] == "stage" and text.count("done") == 8


@pytest.mark.parametrize("name", ["seeds.md", "seeds.json"])
def test_the_report_over_all_seeds_takes_no_file_of_somebody_elses_place(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("theirs")
    with pytest.raises(UserError, match=rf"{name}: would be written over; move it, or choose another run_dir"):
        sweep.claim(tmp_path, [1])
    (tmp_path / name).unlink()
    sweep.claim(tmp_path, [1])
    (tmp_path / name).write_text("ours, from an earlier seed")
    sweep.claim(tmp_path, [2])
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="would be written over"):
        sweep.claim(tmp_path, [3])
