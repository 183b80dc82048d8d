"""What is refused, and what is said, on a real Slurm: nothing is half submitted, and every failure has its reason."""

import json
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
from cluster.local_slurm import LocalSlurm
from cluster.runs import SITE, log, make_run, site, submit, wrap

from alsace_dist.cluster import jobs
from alsace_dist.errors import EXIT_USER_ERROR, UserError

SPLITS = {"labeled": 40, "unlabeled": 45, "test": 30}


def refusal(config: Path, *flags: str, profile: Path = SITE) -> str:
    """The one line with which a submission is refused."""
    done = tiny.alsace("submit", str(config), f"--cluster={profile}", *flags, check=False)
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({"partition": "nope"}, [], "error: sbatch: sbatch: error: invalid partition specified: nope"),
        ({}, ["--nodes=9"], "--nodes=9: partition main has 2 nodes; ask for fewer"),
        (
            {"memory": "9000G"},
            [],
            "Requested node configuration is not available; correct the site profile",
        ),
        ({"time": "02:00:00"}, [], "time: 02:00:00 is beyond the limit of partition main, 01:00:00; ask for less"),
        ({"small": {"cpus": 1, "memory": "9000G"}}, [], "asked for (03-select-round-1.sh); nothing is submitted"),
        ({}, ["--after=x"], "--after=x: 'x' is no job's id"),
        ({}, ["--after=999999"], "--after=999999: Slurm knows no such job"),
        ({"reservation": "nope"}, [], "reservation is invalid"),
        # The first job is accepted, the second is not.
        (
            {"small": {"cpus": 1, "partition": "nope"}},
            ["--stages=finetune,score,select"],
            "invalid partition specified: nope",
        ),
        ({}, ["--nodes=-1"], "--nodes=-1: must be 1 or more"),
        ({}, ["--stages=score,selct"], "--stages: no 'selct'; there are prepare"),
        ({}, ["--stages=finetune,distill"], "--stages: distill round 1 needs score, which is not complete; add score"),
    ],
)
def test_what_slurm_refuses_leaves_nothing_in_the_queue(
    slurm: LocalSlurm, world: Path, tmp_path: Path, changes: dict[str, Any], flags: list[str], words: str
) -> None:
    line = refusal(make_run(world, tmp_path), *flags, profile=site(tmp_path, **changes))
    assert words in line
    assert slurm.jobs() == {} or set(slurm.jobs().values()) == {"COMPLETING"}
    jobs = tmp_path / "run/slurm/jobs.json"
    assert not jobs.exists() or json.loads(jobs.read_text()) == {"jobs": []}


def test_nodes_that_are_down_are_waited_for(slurm: LocalSlurm, world: Path, tmp_path: Path) -> None:
    """Slurm's own check says the same of them as of nodes that are too small."""
    config = make_run(world, tmp_path)
    slurm.client("scontrol", "update", "NodeName=beta", "State=DRAIN", "Reason=test")  # a down one comes back
    try:
        line = refusal(config, "--stages=finetune", profile=site(tmp_path, memory="9000G"))
        assert "node configuration is not available" in line
        submit(config, "--stages=finetune")
        assert list(slurm.jobs().values()) == ["PENDING"]
    finally:
        slurm.client("scontrol", "update", "NodeName=beta", "State=RESUME")


def test_what_the_session_says_does_not_reach_the_jobs(
    slurm: LocalSlurm, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a shell inside another job, of somebody who has set options for sbatch and squeue."""
    session = {"SLURM_MEM_PER_CPU": "1", "SLURM_EXPORT_ENV": "NONE", "SLURM_NTASKS": "7", "SLURM_CPU_BIND": "none"}
    for name, value in (session | {"SBATCH_PARTITION": "nope", "SQUEUE_STATES": "FAILED"}).items():
        monkeypatch.setenv(name, value)
    config = make_run(world, tmp_path, finetune={"num_steps": 2})
    submit(config, "--stages=finetune", site=site(tmp_path, memory="8G"))
    assert "has jobs in the queue" in refusal(config)
    for name in (*session, "SBATCH_PARTITION", "SQUEUE_STATES"):
        monkeypatch.delenv(name)
    slurm.wait_for_jobs(100)
    assert (tmp_path / "run/finetune/manifest.json").exists(), log(tmp_path, "finetune")


def test_of_four_submits_at_once_one_is_accepted(slurm: LocalSlurm, world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        command = ("submit", str(config), f"--cluster={SITE}", "--stages=finetune")
        done = list(pool.map(lambda _: tiny.alsace(*command, check=False), range(4)))
    assert sorted(one.returncode for one in done) == [0, 2, 2, 2], [one.stderr for one in done]
    for one in done:
        assert one.returncode == 0 or "is being submitted by" in one.stderr or "has jobs in the queue" in one.stderr
    assert len(slurm.jobs()) == 1


def test_the_lock_follows_no_link(world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path)
    (tmp_path / "run/slurm").mkdir(parents=True)
    (tmp_path / "run/slurm/submit.lock").symlink_to(tmp_path / "other")
    assert "submit.lock: is a symbolic link or a directory, not the lock of alsace; remove it" in refusal(
        config, "--dry-run"
    )
    assert not (tmp_path / "other").exists()


def test_a_run_may_follow_another_job(slurm: LocalSlurm, world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path)
    first = slurm.client("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=exit 1").strip()
    done = tiny.alsace(
        "submit", str(config), f"--cluster={SITE}", "--stages=finetune", f"--after={first}", "--run_dir=my run"
    )
    assert "alsace status 'my run' " in done.stdout and "--logdir 'my run/tensorboard'" in done.stdout
    (job,) = (job for job in slurm.jobs() if job != first)
    assert f"Dependency=afterok:{first}" in slurm.client("scontrol", "show", "job", job)
    slurm.client("scontrol", "release", first)
    slurm.wait_for_jobs(60)
    assert "cancelled: the job that it was to follow has not succeeded" in tiny.alsace("status", "my run").stdout
    assert "that job has ended (failed), nothing would start after it" in refusal(config, f"--after={first}")


def test_a_changed_config_is_not_written_under_jobs_that_wait(slurm: LocalSlurm, world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path)
    slurm.client("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        submit(config, "--stages=finetune")
        before = Path("run/config.yaml").read_bytes()
        for command in ("run", "finetune"):
            done = tiny.alsace(command, str(config), "--finetune.learning_rate=0.5", check=False)
            assert done.returncode == EXIT_USER_ERROR and "has jobs in the queue" in done.stderr
        assert Path("run/config.yaml").read_bytes() == before
    finally:
        slurm.client("scontrol", "update", "PartitionName=main", "State=UP")


def test_a_controller_that_is_down(slurm: LocalSlurm, world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path)
    submit(config, "--stages=finetune")
    tiny.alsace("cancel", "run")
    slurm.clear()
    before = (tmp_path / "run/slurm/jobs.json").read_text()
    slurm.stop_controller()
    assert "is the Slurm controller up? Try again later" in refusal(config, "--stages=finetune")
    assert (tmp_path / "run/slurm/jobs.json").read_text() == before
    done = tiny.alsace("status", "run")
    assert "Slurm is not asked: squeue: " in done.stderr
    assert "unknown: Slurm is not asked" in done.stdout
    assert "is the Slurm controller up?" in tiny.alsace("cancel", "run", check=False).stderr


def test_a_controller_that_goes_away_during_a_submission(
    slurm: LocalSlurm, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes before the second job: what cannot be cancelled is named, waits, and is cancelled later."""
    config = make_run(world, tmp_path)
    pid = slurm.daemons["slurmctld"].pid
    away = f"kill {pid}; while grep -q 'State:.[^Z]' /proc/{pid}/status; do sleep 0.1; done"  # as for maintenance
    with monkeypatch.context() as patched:
        wrap(patched, tmp_path, f"[[ $* != *--parsable*-score.sh ]] || {{ {away}; }}")
        line = refusal(config, "--stages=finetune,score")
    (job,) = json.loads((tmp_path / "run/slurm/jobs.json").read_text())["jobs"]
    assert f"; and {job['job_id']} cannot be cancelled: " in line and "is the Slurm controller up?" in line
    slurm.daemons.pop("slurmctld").wait()
    slurm.mend()
    assert list(slurm.jobs().values()) == ["PENDING"]  # it is held, for its chain is not whole
    assert f"{job['job_id']}  finetune: cancelled" in tiny.alsace("cancel", "run").stdout
    tiny.wait_for(lambda: slurm.jobs() == {})


def test_a_job_that_sbatch_does_not_name_is_found_and_cancelled(
    slurm: LocalSlurm, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(world, tmp_path)
    wrap(monkeypatch, tmp_path, '[[ $* != *--parsable*-score.sh ]] || exec > >(sed "s/.*/Welcome/")')
    line = refusal(config, "--stages=finetune,score")
    assert "sbatch: answered 'Welcome', which is no job's id" in line and "nothing is submitted" in line
    tiny.wait_for(lambda: slurm.jobs() == {})


def test_a_cancellation_waits_for_a_submission(
    slurm: LocalSlurm, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that none of its jobs is left."""
    config = make_run(world, tmp_path)
    wrap(monkeypatch, tmp_path, "[[ $* != *--parsable* ]] || sleep 1")
    listed = tmp_path / "run/slurm/jobs.json"
    with tiny.started("submit", str(config), f"--cluster={SITE}", "--stages=finetune,score,select") as process:
        tiny.wait_for(listed.exists)
        gone = tiny.alsace("cancel", "run").stdout
        assert process.wait(30) == 0
    assert gone.count(": cancelled") == 3, gone
    tiny.wait_for(lambda: slurm.jobs() == {})


def test_a_cancellation_says_who_submits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "CANCEL_SECONDS", 0.2)
    with jobs.alone(tmp_path), pytest.raises(UserError) as caught:
        jobs.cancel(tmp_path)
    who = f"process {os.getpid()} on {socket.gethostname()}"
    assert str(caught.value) == f"{tmp_path}: is being submitted by {who}; wait for that one, or stop it"
    assert jobs.cancel(tmp_path) == []


def test_a_lock_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "slurm/submit.lock"
    path.parent.mkdir()
    path.write_text("my notes\n")
    with (
        pytest.raises(UserError, match=r"submit\.lock: is not the lock that alsace writes; move it"),
        jobs.alone(tmp_path),
    ):
        pass
    assert path.read_text() == "my notes\n"
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"submit\.lock: is a symbolic link or a directory"), jobs.alone(tmp_path):
        pass


def test_settings_of_slurm_that_are_not_there(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's own programs would look for them for a minute."""
    monkeypatch.setenv("SLURM_CONF", "/nonexistent/slurm.conf")
    (tmp_path / "sbatch").write_text("#!/bin/bash\nsleep 100\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    line = refusal(make_run(world, tmp_path), "--stages=finetune")
    assert line == "error: SLURM_CONF=/nonexistent/slurm.conf: no such file; correct the variable, or unset it"


def test_a_site_with_gres_modules_containers_and_named_nodes(
    slurm: LocalSlurm, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small jobs get neither nodes nor GPUs of the others; the user's profile does what users' profiles do."""
    program = tmp_path / "apptainer"
    program.write_text(f"""\
#!/bin/bash
echo "container: $* on GPUs ${{CUDA_VISIBLE_DEVICES:-none}}" >&2
until [[ $1 == /x.sif ]]; do shift; done
export CUDA_VISIBLE_DEVICES= PATH={Path(sys.executable).parent}:$PATH # Slurm's GPUs here are none
exec "${{@:2}}"
""")
    program.chmod(0o755)
    profile = 'module() { echo "module $*"; }; echo welcome; false; set -fu; IFS=/; PATH=/nonexistent\n'
    (tmp_path / ".bash_profile").write_text(profile)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SBATCH_ACCOUNT", "nobody")
    changes = {"gpus_per_node": 2, "gpus_as": "gres", "cpus_per_node": 2, "sbatch": ["--nodelist=alpha,beta"]}
    container = {"kind": "apptainer", "image": "/x.sif", "program": str(program)}
    path = site(tmp_path, **changes, container=container, modules=["cuda/12"])
    config = make_run(world, tmp_path, finetune={"num_steps": 2})
    done = tiny.alsace("submit", str(config), f"--cluster={path}", "--stages=finetune,score,select")
    assert "SBATCH_ACCOUNT: not used, only the site profile counts" in done.stderr
    text = slurm.client("squeue", "--noheader", "--sort=i", "--format=%n|%b")
    assert text.split() == ["alpha,beta|gres:gpu:2", "alpha,beta|gres:gpu:2", "|N/A"]
    tiny.wait_for(lambda: any(tmp_path.glob("run/slurm/logs/*")))
    tiny.wait_for(lambda: log(tmp_path, "finetune").count("container: ") == 2)
    text = log(tmp_path, "finetune")
    assert text.index("welcome") < text.index("module purge") < text.index("module load cuda/12")
    assert text.count("container: exec --nv") == 2 and text.count("on GPUs 0,1") == 2, text


def test_without_slurm(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    config = make_run(world, tmp_path)
    assert "scontrol: not found; run this where Slurm's programs are" in refusal(config, "--stages=finetune")
    done = tiny.alsace("status", "run")
    assert "finetune" in done.stdout and "to do" in done.stdout
    assert "has no jobs in the queue" in tiny.alsace("cancel", "run").stdout


def test_what_was_submitted_by_hand_is_known(slurm: LocalSlurm, world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path)
    tiny.alsace("submit", str(config), f"--cluster={SITE}", "--dry-run")
    (script,) = tmp_path.glob("run/slurm/*-finetune.sh")
    jobs = [
        slurm.client("sbatch", "--parsable", "--hold", *array, str(script.relative_to(tmp_path))).strip()
        for array in ([], ["--array=0-3%1"])
    ]
    assert f"has jobs in the queue: {jobs[0]} ({script.stem}), {jobs[1]} ({script.stem}); wait" in refusal(config)
    before = Path("run/config.yaml").read_bytes()
    flags = (f"--cluster={SITE}", "--dry-run", "--finetune.learning_rate=0.5")
    changed = tiny.alsace("submit", str(config), *flags, check=False)
    assert changed.returncode == 2 and "has jobs in the queue" in changed.stderr
    assert Path("run/config.yaml").read_bytes() == before
    (row,) = (line for line in tiny.alsace("status", "run").stdout.splitlines() if line.startswith("finetune"))
    assert jobs[1] in row and "pending (JobHeldUser)" in row
    assert tiny.alsace("cancel", "run").stdout.count("cancelled") == 2
    tiny.wait_for(lambda: slurm.jobs() == {})
    assert "has no jobs in the queue" in tiny.alsace("cancel", "run").stdout


def test_a_stage_that_fails_ends_the_chain_and_the_mended_run_goes_on(
    slurm: LocalSlurm, world: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    tiny.write_data(data, 115)
    config = make_run(world, tmp_path, data={"directory": None, "inputs": [{"path": str(data)}], "splits": SPLITS})
    tiny.alsace("prepare", str(config))
    (shard, *_) = sorted((tmp_path / "run/data/unlabeled").glob("*.tar"))
    good = shard.read_bytes()
    shard.write_bytes(good[:2000] + b"x" + good[2001:])
    jobs = submit(config)
    assert "prepare" not in jobs  # it is complete
    slurm.wait_for_jobs(200)
    text = tiny.alsace("status", "run").stdout
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "done" in rows["finetune"]
    assert "failed: " in rows["score"] and shard.name in rows["score"], text
    assert "cancelled: score has not succeeded" in rows["select round 1"], text
    assert "not requeued" in log(tmp_path, "score")
    assert "Last lines of run/slurm/logs/" in text and "-score.log" in text
    assert shard.name in log(tmp_path, "score").strip().splitlines()[-1]  # the cause, last
    shard.write_bytes(good)
    assert "finetune" not in submit(config)
    slurm.wait_for_jobs(200)
    assert (tmp_path / "run/report.json").exists()


def test_three_failures_at_the_same_point_are_enough(slurm: LocalSlurm, world: Path, tmp_path: Path) -> None:
    """Rank 1 is killed whenever it starts: as if its node lacked memory."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    code = "import os, signal\nif os.environ.get('RANK') == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    (hooks / "sitecustomize.py").write_text(code)
    environment = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(hooks)}
    config = make_run(world, tmp_path)
    submit(config, "--stages=finetune", site=site(tmp_path, environment=environment))
    slurm.wait_for_jobs(200)
    lines = log(tmp_path, "finetune").strip().splitlines()
    assert lines[-2].endswith(
        "not requeued: failed 3 times in a row at the same point (before it began); find out why first"
    )
    assert "rank 1 was killed by SIGKILL" in lines[-1]
    assert sum("restart" in line and line.startswith("== ") for line in lines) == 3
    assert "failed: rank 1 was killed by SIGKILL" in tiny.alsace("status", "run").stdout


def test_the_doctor_looks_at_every_node_and_pair(slurm: LocalSlurm, world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path)
    done = tiny.alsace("doctor", str(config), f"--cluster={SITE}")
    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert list(lines) == ["nodes", "versions", "GPUs", "clocks", "pairs"], done.stdout
    assert all(line.startswith("ok ") for line in lines.values())
    assert lines["nodes"].endswith("alpha, beta") and "2 of 2" in lines["nodes"]
    assert "between alpha and beta" in lines["pairs"]


def test_the_doctor_names_the_bad_node(slurm: LocalSlurm, world: Path, tmp_path: Path) -> None:
    """On beta another version is installed, the clock goes wrong, and connections to others than the store fail."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('SLURMD_NODENAME') == 'beta':\n"
        "    import importlib.metadata, time\n"
        "    version, now = importlib.metadata.version, time.time\n"
        "    importlib.metadata.version = lambda name: '0.0' if name == 'deepspeed' else version(name)\n"
        "    time.time = lambda: now() + 100\n"
        "    os.environ['GLOO_SOCKET_IFNAME'] = 'nonexistent'\n"
    )
    environment = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(hooks)}
    done = tiny.alsace(
        "doctor", str(make_run(world, tmp_path)), f"--cluster={site(tmp_path, environment=environment)}", check=False
    )
    assert done.returncode == EXIT_USER_ERROR
    bad = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert "beta: deepspeed 0.0, elsewhere" in bad[0], done.stdout
    assert "clocks" in bad[1] and "beta: +100." in bad[1]
    assert "pairs" in bad[2]
    assert done.stderr.strip().splitlines()[-1].startswith("error: doctor: beta: deepspeed 0.0")


def test_the_doctor_misses_a_node_that_does_not_start(slurm: LocalSlurm, world: Path, tmp_path: Path) -> None:
    """The first one, which the others would meet at."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[[ $SLURMD_NODENAME == alpha ]] && exit 127\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    config = make_run(world, tmp_path)
    done = tiny.alsace("doctor", str(config), f"--cluster={site(tmp_path, python=str(python))}", check=False)
    assert done.returncode == EXIT_USER_ERROR
    assert "1 of 2 write into" in done.stdout and "not seen: alpha" in done.stdout, done.stdout
    assert "doctor: 1 of 2 write into" in done.stderr.strip().splitlines()[-1]
