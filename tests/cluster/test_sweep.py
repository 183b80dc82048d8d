"""A sweep of seeds as a chain of arrays, on a real Slurm: every seed goes on by itself."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import yaml
from cluster.local_slurm import LocalSlurm
from cluster.runs import LONG, SITE, losses, make_run, wrap

from alsace_dist.cluster import jobs, submit
from alsace_dist.cluster.jobs import Chain
from alsace_dist.cluster.queue import job_states
from alsace_dist.errors import EXIT_USER_ERROR, UserError

NAME = "a b'c\"$(touch pwned) 100% %j ключ"
STAGES = "--stages=finetune,score,calibrate,evaluate"
CALIBRATION = {"rounds": 0, "evaluate": {"calibrate": True}}


def make_sweep(world: Path, directory: Path, name: str = NAME, **sections: Any) -> Path:
    config = yaml.safe_load(make_run(world, directory, **sections).read_text()) | {"run_dir": name}
    return tiny.write_config(directory / "config.yaml", config)


def submit_seeds(config: Path, *flags: str, profile: Path = SITE) -> list[jobs.Submitted]:
    tiny.alsace("submit", str(config), f"--cluster={profile}", "--nodes=1", *flags)
    return jobs.submitted(Path(yaml.safe_load(config.read_text())["run_dir"]))


def table(*run: str) -> dict[str, list[str]]:
    """Stage -> the words of its row, of the table that ``alsace status`` prints first."""
    rows = tiny.alsace("status", *run).stdout.partition("\n\n")[0].splitlines()
    width = rows[0].index("seed ")
    return {row[:width].strip(): row[width:].split() for row in rows if not row.startswith("seed ")}


def rank_of_task(task: int) -> psutil.Process | None:
    """A rank of an array's task in this test's directory."""
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        is_own = environment.get("ALSACE_ATTEMPT_DIR", "").startswith(str(Path.cwd()))
        if is_own and "RANK" in environment and environment.get("SLURM_ARRAY_TASK_ID") == str(task):
            return process
    return None


@pytest.fixture
def closed(slurm: LocalSlurm) -> Iterator[LocalSlurm]:
    """The cluster takes jobs and starts none."""
    slurm.client("scontrol", "update", "PartitionName=main", "State=DOWN")
    yield slurm
    slurm.client("scontrol", "update", "PartitionName=main", "State=UP")


def test_two_seeds_of_which_one_is_killed_and_one_fails(slurm: LocalSlurm, world: Path, tmp_path: Path) -> None:
    """A rank of seed 12 is killed: its task is requeued and ends with the losses of an undisturbed run, while seed 11
    goes on. Then a stage of seed 12 finds something in its way: what is missing is submitted again, and only that."""
    config = make_sweep(world, tmp_path, finetune=LONG | {"num_steps": 60}, **CALIBRATION)
    run = tmp_path / NAME
    first, second = run / "seed-11", run / "seed-12"
    arrays = submit_seeds(config, "--seeds=11,12", STAGES)
    assert [job.name for job in arrays] == ["finetune", "score", "calibrate", "evaluate"]
    assert all(job.tasks == (0, 1) for job in arrays)
    tiny.wait_for(lambda: any(second.glob("finetune/checkpoints/*/manifest.json")))
    rank_of_task(1).kill()  # type: ignore[union-attr]
    (second / "calibration").mkdir()
    (second / "calibration/mine.txt").write_text("mine")
    rows = table(NAME)
    assert [len(row) for row in rows.values()] and rows["score"] == ["pending", "pending"], rows
    left_out = tiny.alsace("submit", str(config), f"--cluster={SITE}", "--nodes=1", "--seeds=11,12", STAGES)
    assert left_out.stderr.count("has jobs in the queue, left out: ") == 2
    changed = tiny.alsace("run", str(config), "--seeds=12", "--score.tokens_per_batch=100", check=False)
    assert changed.returncode == EXIT_USER_ERROR and f"{arrays[1].job_id}_1 (score)" in changed.stderr, changed.stderr
    slurm.wait_for_jobs(240)
    log = (run / "slurm/logs/01-finetune-1.log").read_text()
    assert f"job {arrays[0].job_id}_1, restart 1" in log and "was killed by SIGKILL" in log
    assert "restart 1" not in (run / "slurm/logs/01-finetune-0.log").read_text()
    for directory in (first, second):  # the same without Slurm
        other = tmp_path / "other" / directory.name
        value = yaml.safe_load((directory / "config.yaml").read_text()) | {"run_dir": str(other / "run")}
        tiny.do("finetune", tiny.write_config(other / "config.yaml", value))
        link = tmp_path / "seen" / directory.name
        link.mkdir(parents=True)
        (link / "run").symlink_to(directory)
        assert losses(link) == losses(other)
    assert losses(tmp_path / "seen/seed-11") != losses(tmp_path / "seen/seed-12")
    rows = table(NAME)
    assert rows["calibrate"] == ["done", "failed"] and rows["evaluate"] == ["done", "cancelled"], rows
    text = tiny.alsace("status", NAME).stdout
    assert f"seed 12  calibrate  {arrays[2].job_id}_1  failed: " in text and "calibration" in text, text
    assert f"seed 12  evaluate  {arrays[3].job_id}_1  cancelled: calibrate has not succeeded" in text
    assert "cancelled: calibrate has not succeeded" in tiny.alsace("status", f"{NAME}/seed-12").stdout
    (second / "calibration/mine.txt").unlink()
    again = submit_seeds(config, "--seeds=11,12", STAGES)[len(arrays) :]
    assert [(job.name, job.tasks) for job in again] == [(name, (1,)) for name in ("calibrate", "evaluate")]
    slurm.wait_for_jobs(100)
    assert all(row == ["done", "done"] for name, row in table(NAME).items() if name not in ("stage", "report"))
    last = tiny.alsace("submit", str(config), f"--cluster={SITE}", "--seeds=11-12", STAGES)
    assert "nothing is left to submit" in last.stdout and "seed 12: complete, skipped" in last.stderr
    assert list(tmp_path.rglob("pwned")) == []


def test_a_sweep_that_waits_is_shown_and_cancelled(closed: LocalSlurm, world: Path, tmp_path: Path) -> None:
    """Through a symbolic link as well."""
    config = make_sweep(world, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / NAME).symlink_to("elsewhere")
    arrays = submit_seeds(config, "--seeds=42,1337,7", "--at-once=2", "--stages=finetune,score,select")
    shown = closed.client("scontrol", "show", "job", arrays[0].job_id)
    assert "ArrayTaskId=0-2%2" in shown
    assert f"Dependency=aftercorr:{arrays[0].job_id}_*" in closed.client("scontrol", "show", "job", arrays[1].job_id)
    for name in (NAME, "elsewhere"):
        rows = table(name)
        assert rows["stage"] == ["seed", "42", "seed", "1337", "seed", "7"]
        assert rows["finetune"] == rows["select round 1"] == ["pending"] * 3 and rows["evaluate"] == ["to", "do"] * 3
    (row,) = (
        line for line in tiny.alsace("status", f"{NAME}/seed-7").stdout.splitlines() if line.startswith("score  ")
    )
    assert f"{arrays[1].job_id}_2" in row and "pending (Dependency)" in row
    by_hand = closed.client("sbatch", "--parsable", "--array=1", arrays[0].script).strip()
    assert by_hand in tiny.alsace("status", f"{NAME}/seed-1337").stdout
    gone = tiny.alsace("cancel", "elsewhere/seed-7").stdout
    assert [line.split()[0] for line in gone.splitlines()] == [f"{job.job_id}_2" for job in arrays]
    states = job_states([f"{arrays[0].job_id}_{task}" for task in range(3)])
    alive = [task for task in range(3) if f"{arrays[0].job_id}_{task}" in states]  # Slurm forgets the third one
    assert alive == [0, 1] and {one.state for one in states.values()} == {"PENDING"}
    # The seed that is free may be submitted again while the other two wait.
    assert [job.tasks for job in submit_seeds(config, "--seeds=7", "--stages=finetune")[-1:]] == [(2,)]
    assert tiny.alsace("cancel", NAME).stdout.count("cancelled") == 5
    tiny.wait_for(lambda: closed.jobs() == {})
    assert "has no jobs in the queue" in tiny.alsace("cancel", NAME).stdout
    assert list(tmp_path.rglob("pwned")) == []


def test_more_seeds_than_an_array_has_numbers(closed: LocalSlurm, world: Path, tmp_path: Path) -> None:
    config = make_sweep(world, tmp_path, "runs")
    done = tiny.alsace("submit", str(config), f"--cluster={SITE}", "--seeds=1-21", check=False)
    assert done.returncode == EXIT_USER_ERROR
    assert "the sweep would have 21 seeds, but Slurm numbers an array's tasks only up to 19 here" in done.stderr
    assert not Path("runs").exists() and closed.jobs() == {}
    # Of 20 tasks no more than ten are in an array, whose dependencies Slurm looks at.
    arrays = submit_seeds(config, "--seeds=1-20", "--stages=finetune,score")
    assert [job.tasks for job in arrays] == [tuple(range(10))] * 2 + [tuple(range(10, 20))] * 2
    assert f"aftercorr:{arrays[2].job_id}_*" in closed.client("scontrol", "show", "job", arrays[3].job_id)


def test_a_sweep_of_which_slurm_refuses_a_job(
    closed: LocalSlurm, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arrays before it are cancelled, and what was known of other seeds stays known."""
    config = make_sweep(world, tmp_path, "runs")
    before = submit_seeds(config, "--seeds=1", "--stages=finetune")
    (alive,) = closed.jobs()
    wrap(monkeypatch, tmp_path, "[[ $* != *--parsable*02-score.sh ]] || { echo 'no more jobs' >&2; exit 1; }")
    command = ("submit", str(config), f"--cluster={SITE}", "--nodes=1", "--seeds=2,3", "--stages=finetune,score")
    done = tiny.alsace(*command, check=False)
    assert done.returncode == EXIT_USER_ERROR
    assert "error: sbatch: no more jobs; " in done.stderr and "nothing is submitted" in done.stderr
    assert jobs.submitted(Path("runs")) == before
    tiny.wait_for(lambda: list(closed.jobs()) == [alive])


@pytest.mark.parametrize(
    ("lacking", "at_once", "expected"),
    [
        ({"ab": 3}, 0, [("ab", 3, 0)]),
        ({"ab": 25}, 0, [("ab", 10, 0), ("ab", 10, 0), ("ab", 5, 0)]),
        ({"ab": 25}, 6, [("ab", 10, 2), ("ab", 10, 2), ("ab", 5, 2)]),
        ({"ab": 25}, 2, [("ab", 13, 1), ("ab", 12, 1)]),
        ({"ab": 25}, 1, [("ab", 25, 1)]),
        ({"ab": 2, "b": 1}, 4, [("ab", 2, 2), ("b", 1, 2)]),
        ({"ab": 2, "b": 1}, 1, [("ab", 2, 1), ("b", 1, 1)]),
    ],
)
def test_seeds_at_once(
    lacking: dict[str, int], at_once: int, expected: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    written = {name: Path(name) for name in "ab"}
    groups = {tuple(names): list(range(count)) for names, count in lacking.items()}
    chains: list[Chain] = list(submit._chains(groups, written, at_once))
    found = [("".join(name for name, _ in one.scripts), len(one.tasks), one.at_once) for one in chains]
    assert found == expected
    assert sum(one.at_once for one in chains) <= at_once or "may run at once" in capsys.readouterr().err


def test_flags_that_do_not_fit(world: Path, tmp_path: Path) -> None:
    config = make_sweep(world, tmp_path, "runs")
    for flags, words in (
        (["--at-once=2"], "--at-once=2: is for --seeds"),
        (["--seeds=1", "--at-once=-1"], "--at-once=-1: must be 1 or more"),
        (["--seeds="], "--seeds=: '' is no seed"),
        (["--seeds=1,2", "--seed=3"], "--seed and --seeds: give one of them"),
    ):
        done = tiny.alsace("submit", str(config), f"--cluster={SITE}", *flags, check=False)
        assert done.returncode == EXIT_USER_ERROR and done.stderr.startswith(f"error: {words}"), done.stderr
    assert not Path("runs").exists()


def test_a_dry_run_writes_the_scripts_of_all_seeds(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    config = make_sweep(world, tmp_path)
    done = tiny.alsace("submit", str(config), f"--cluster={SITE}", "--seeds=3,4", "--dry-run")
    assert "nothing is submitted" in done.stdout
    scripts = sorted((tmp_path / NAME / "slurm").glob("[0-9]*.sh"))
    assert len(scripts) == 7
    for script in scripts:
        lines = script.read_text().splitlines()
        assert "#SBATCH --array=0,1" in lines
        begin = lines.index("runs=(")
        assert [shlex.split(line) for line in lines[begin + 1 : begin + 3]] == [
            [f"{tmp_path}/{NAME}/seed-{seed}"] for seed in (3, 4)
        ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"jobs": {}}',
        '{"jobs": [1]}',
        '{"jobs": [{"job_id": "1"}]}',
        '{"jobs": [{"name": "a", "job_id": "--user=root", "script": "s", "log": "l"}]}',
        '{"jobs": [{"name": "a", "job_id": 7, "script": "s", "log": "l"}]}',
        '{"jobs": [{"name": "a", "job_id": "7", "script": "s", "log": "l", "tasks": ["x"]}]}',
        '{"jobs": [{"name": "a", "job_id": "7", "script": "s", "log": "l", "other": 1}]}',
    ],
)
def test_a_list_of_jobs_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "slurm/jobs.json"
    path.parent.mkdir()
    path.write_text(text)
    for ask in (jobs.submitted, jobs.alive_jobs, jobs.cancel):
        with pytest.raises(UserError, match=r"jobs\.json: .*remove it: jobs that are in the queue are known by their"):
            ask(tmp_path)
    assert path.read_text() == text
