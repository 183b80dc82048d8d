"""The job scripts: compared whole with golden copies, checked by shellcheck, and read by bash and sbatch with hostile
values in every place.

``PYTHONPATH=tests python tests/cluster/test_scripts.py`` writes the golden copies anew.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from cluster.local_slurm import BIG, LocalSlurm, why_not

from alsace_dist.cluster.profile import JOB_COMMANDS, SiteProfile, load_profile
from alsace_dist.cluster.scripts import Array, Job, jobs_of, render, write_scripts
from alsace_dist.config_file import load_config, validate
from alsace_dist.errors import UserError
from alsace_dist.pipeline import stages

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
CLUSTERS = ROOT / "slurm/clusters"
FULL: dict[str, Any] = {
    **{"partition": "gpu", "account": "nlp", "qos": "high", "constraint": "a100&ib", "exclude": "node[7,9]"},
    **{"reservation": "us", "mail_user": "me@example.org", "mail_type": "END,FAIL", "nodes": 3, "gpus_per_node": 4},
    **{"gpu_type": "a100", "ranks_per_node": 2, "cpus_per_node": 64, "memory": "480G", "exclusive": True},
    "time": {"default": "02:00:00", "score": 90, "distill": "1-12:00:00"},
    "small": {"partition": "cpu", "cpus": 4, "memory": "16G"},
    **{"modules": ["cuda/12.8", "gcc"], "conda": "/envs/alsace", "python": "python3.12"},
    **{"environment": {"NCCL_SOCKET_IFNAME": "ib0", "NCCL_IB_TIMEOUT": 22}, "launcher": "srun", "signal": "USR1"},
    **{
        "lead_seconds": 600,
        "max_requeues": 3,
        "sbatch": ["--comment=two words", "--licenses=scratch:1", "--spread-job"],
    },
}

HOSTILE = [
    "two words",
    "it's",
    'say "so"',
    "$(touch pwned)",
    "`touch pwned`",
    "back\\slash",
    "a;touch pwned",
    "#no",
    "%j",
]
HOSTILE += ["&& touch pwned", "{{ 7 * 7 }}", "ключ", "-rf", "a\\", "'; touch pwned; '", "${HOME}"]


def profiles() -> dict[str, SiteProfile]:
    found = {path.stem: load_profile(path) for path in sorted(CLUSTERS.glob("*.yaml"))}
    return found | {"full": validate(SiteProfile, FULL, "full: ")}


def scripts(num_nodes: int = 64) -> dict[str, str]:
    """Golden copy's name -> script: a distributed stage and a small one of the XXL run, for every profile."""
    config = load_config(ROOT / "configs/xnli-mt5-xxl.yaml", {"run_dir": "/shared/runs/xxl"})
    jobs = {job.name: job for job in jobs_of(config, stages(config))}
    made = {}
    for name, profile in profiles().items():
        if not (profile.venv or profile.modules or profile.container):
            profile = profile.model_copy(update={"python": "/shared/python"})
        if profile.venv:
            profile = profile.model_copy(update={"venv": "/home/me/alsace_dist/.venv"})
        for job in (jobs["distill round 1"], jobs["select round 1"]):
            made[f"{name}-{job.command}.sh"] = render(config, profile, job, num_nodes)
            if name == "pyxis":
                array = Array((Path("/shared/runs/xxl/seed-1"), Path("/shared/runs/xxl/seed-2")), (0, 1), at_once=1)
                made[f"sweep-{job.command}.sh"] = render(config, profile, job, num_nodes, array)
    return made


def test_golden_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    made = scripts()
    assert made.keys() == {path.name for path in GOLDEN.glob("*.sh")}
    for name, text in made.items():
        assert text == (GOLDEN / name).read_text(), f"{name}: look at it, then run this file to write it anew"


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    """A controller with the nodes of a large cluster in its configuration: it takes jobs and starts none."""
    if reason := why_not():
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    slurm = LocalSlurm(tmp_path_factory.mktemp("big"), BIG)
    try:
        slurm.start_munge()
        slurm.start_controller()
        tiny.wait_for(lambda: "gpu" in slurm.client("sinfo", check=False))
        yield slurm
    finally:
        slurm.stop()


def test_slurm_takes_the_scripts_of_64_nodes(big: LocalSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["submit", str(ROOT / "configs/xnli-mt5-xxl.yaml"), "--nodes=64", "--dry-run", "--run_dir=run"]
    tiny.alsace(*command, f"--cluster={CLUSTERS / 'generic.yaml'}")
    scripts = sorted((tmp_path / "run/slurm").glob("*-*.sh"))
    assert len(scripts) == 8
    for script in scripts:
        big.client("sbatch", "--test-only", str(script))
    distill = str(tmp_path / "run/slurm/05-distill-round-1.sh")
    for more in ("--nodes=65", "--gpus-per-node=9", "--cpus-per-task=97"):
        done = subprocess.run(["sbatch", "--test-only", more, distill], env=big.environment, check=False)
        assert done.returncode == 1, more


def shown(slurm: LocalSlurm, script: str, directory: Path) -> dict[str, str]:
    """What Slurm has understood of a script, as ``scontrol show job`` says it."""
    path = directory / "script.sh"
    path.write_text(script)
    job = slurm.client("sbatch", "--parsable", "--hold", str(path)).strip()
    text = slurm.client("scontrol", "show", "job", job)
    long = r"^ *(?:JobId=\d+ )?(JobName|Comment|StdOut|WorkDir)=(.*?) ?$"  # one to a line, and may hold spaces
    rest = re.sub(long, "", text, flags=re.MULTILINE)
    return dict(word.split("=", 1) for word in rest.split() if "=" in word) | dict(re.findall(long, text, re.MULTILINE))


def test_slurm_reads_every_field_of_a_profile(big: LocalSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    reservation = ("ReservationName=us", "StartTime=now", "Duration=60", "Nodes=ALL", "Users=root")
    big.client("scontrol", "create", "reservation", *reservation)
    made = scripts(num_nodes=FULL["nodes"])
    both = {"Account": "nlp", "Reservation": "us", "ExcNodeList": "node[7,9]", "Requeue": "1", "WorkDir": "/"}
    both |= {"MailUser": "me@example.org", "MailType": "END,FAIL", "Comment": "two words", "Licenses": "scratch:1"}
    both |= {"SpreadJob": "Yes"}
    distill = {"Partition": "gpu", "TimeLimit": "1-12:00:00", "NumNodes": "3-3", "NumTasks": "6", "CPUs/Task": "32"}
    distill |= {"MinMemoryNode": "480G", "Features": "a100&ib", "TresPerNode": "gres:gpu:a100:4", "OverSubscribe": "NO"}
    distill |= {"JobName": "xxl: distill round 1", "StdOut": "/shared/runs/xxl/slurm/logs/05-distill-round-1.log"}
    select = {"Partition": "cpu", "TimeLimit": "02:00:00", "NumNodes": "1-1", "NumTasks": "1", "CPUs/Task": "4"}
    select |= {"MinMemoryNode": "16G", "Features": "(null)", "JobName": "xxl: select round 1"}
    select |= {"StdOut": "/shared/runs/xxl/slurm/logs/04-select-round-1.log"}
    for name, own in {"distill": distill, "select": select}.items():
        seen = shown(big, made[f"full-{name}.sh"], tmp_path)
        assert {key: seen.get(key) for key in both | own} == both | own
    # Without accounting a controller keeps no qos: sbatch itself must have read it.
    done = subprocess.run(
        ["sbatch", "-v", "--test-only", str(tmp_path / "script.sh")],
        env=big.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"^sbatch: qos +: high$", done.stderr, re.MULTILINE)


def test_slurm_reads_hostile_values_as_they_are(
    big: LocalSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in HOSTILE:
        run = str(tmp_path / value.replace("/", "").replace("\\", ""))  # a log file cannot have a backslash
        config = load_config(ROOT / "configs/demo.yaml", {"run_dir": run})
        profile = validate(SiteProfile, {"account": value, "mail_user": value, "sbatch": [f"--comment={value}"]}, "")
        job = Job(1, f"score {value}", "score", ("score",), "one", None)
        seen = shown(big, render(config, profile, job, 1), tmp_path)
        assert seen["Comment"] == value
        assert seen["JobName"] == f"{Path(run).name}: score {value}"
        if "%" not in value:  # scontrol shows %%j as if it were %j; slurmd writes into the right file
            assert seen["StdOut"].startswith(f"{run}/slurm/logs/01-score-")
    assert list(tmp_path.rglob("pwned")) == []


def test_a_profile_knows_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / "configs/demo.yaml", {"evaluate.calibrate": True})
    assert {job.command for job in jobs_of(config, stages(config))} | {"doctor"} == set(JOB_COMMANDS)


def needs(program: str) -> None:
    if shutil.which(program) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{program} is not installed")
        pytest.skip(f"{program} is not installed")


def test_shellcheck_finds_nothing() -> None:
    needs("shellcheck")
    files = [*GOLDEN.glob("*.sh"), *(ROOT / "launchers").glob("*.sh"), ROOT / ".ci/run"]
    done = subprocess.run(["shellcheck", *map(str, files)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def run_script(
    script: Path, srun: str, scontrol: str = "exit 1", profile: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a job script with bash; ``srun``, ``scontrol``: scripts in their places; ``profile``: the user's, which a
    login shell reads."""
    tools, home = script.parent / "tools", script.parent / "home"
    for directory in (tools, home):
        directory.mkdir(exist_ok=True)
    # Nobody waits here for a controller that is away.
    for name, text in {"srun": srun, "scontrol": scontrol, "sleep": f'echo "$1" >>{script.parent}/slept'}.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    (home / ".bash_profile").write_text(f"export PATH={tools}:$PATH\n{profile}\n")  # /etc/profile sets it anew
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x", "SLURM_JOB_NODELIST": "n", "SLURM_CPUS_PER_TASK": "2"}
    env = os.environ | slurm | {"HOME": str(home), "PATH": f"{tools}:{os.environ['PATH']}"} | (environment or {})
    return subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job script of a run below ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / "configs/demo.yaml", {"run_dir": "run"})
    path = tmp_path / "script.sh"
    job = Job(1, "score", "score", ("score", "config.yaml"), "ranks", None)
    path.write_text(render(config, SiteProfile(ranks_per_node=1), job, 1))
    return path


def test_a_signal_while_the_users_profile_is_read_requeues(script: Path) -> None:
    """Also one that comes before srun can take it."""
    done = run_script(script, f"touch {script}.begun", "exit 0", profile="kill -USR2 $$")
    assert done.returncode == 75, done.stderr
    assert "exit code 75, requeued, 1 of at most 20 times" in done.stderr
    assert not Path(f"{script}.begun").exists()


@pytest.mark.parametrize("end", ["kill -USR2 $$", "exit 0", "exit 7", "sleep 0.1; exit 75"])
def test_a_signal_as_srun_ends_requeues(script: Path, end: str) -> None:
    """bash 5.2 now and then loses the status of a process that ends while a trap runs."""
    done = run_script(script, f"kill -USR2 $PPID; {end}", "exit 0")
    if end in ("exit 0", "exit 7") and "75" not in done.stderr:  # it has not lost it
        assert done.returncode == int(end[-1])
        return
    assert done.returncode == 75, done.stderr
    assert "requeued, 1 of at most 20 times" in done.stderr


@pytest.mark.parametrize(
    "profile",
    [
        "echo hello; false",
        "set -euf -o pipefail -C; set -o posix",
        "shopt -s failglob nullglob nocasematch expand_aliases; alias mkdir=false",
        "IFS=/; trap 'exit 9' USR2 EXIT; trap : ERR DEBUG RETURN",
        "PATH=/nonexistent",
        "unset PATH",
        "cd /; CDPATH=/tmp; step=1; status=9; job=x; run=y",
    ],
)
def test_the_users_profile_does_not_change_how_a_job_goes_on(script: Path, profile: str) -> None:
    """The step is told to stop and requeued, which takes the whole script."""
    done = run_script(script, f"touch {script}.begun; kill -USR2 $PPID; exit 75", "exit 0", profile=profile)
    assert done.returncode == 75, done.stderr
    assert "exit code 75, requeued, 1 of at most 20 times" in done.stderr
    assert Path(f"{script}.begun").exists()


@pytest.mark.parametrize("profile", ["exit 3", "exit 0", "set -e; false", "set -u; echo $nothing"])
def test_a_users_profile_that_ends_the_job_is_named(script: Path, profile: str) -> None:
    done = run_script(script, f"touch {script}.begun", profile=profile)
    assert done.returncode == 2
    assert f"error: {script.parent}/home/.bash_profile ends the job" in done.stderr
    assert not Path(f"{script}.begun").exists()


def test_a_node_without_srun_is_not_tried_again(script: Path) -> None:
    script.write_text(script.read_text().replace("command -v srun", "command -v no-such-srun"))
    done = run_script(script, f"touch {script}.begun")
    assert done.returncode == 2 and "error: srun is not on the PATH of this node" in done.stderr
    assert not Path(f"{script}.begun").exists()


def test_scratch_space_that_is_not_on_the_node() -> None:
    task = ["bash", str(ROOT / "launchers/slurm_task.sh"), "bash", "-c", "echo $TMPDIR"]
    for given, seen in {"/nonexistent": "/tmp", "/var/tmp": "/var/tmp"}.items():
        env = os.environ | {"SLURM_JOB_ID": "7", "MASTER_ADDR": "x", "TMPDIR": given, "ALSACE_LAUNCHER": "none"}
        env |= {"ALSACE_ATTEMPT_DIR": "/tmp"}
        done = subprocess.run(task, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == seen


def array_of(script: Path, *names: str, command: str = "score") -> Path:
    """The script of a sweep with runs of these names."""
    config = load_config(ROOT / "configs/demo.yaml", {"run_dir": "run"})
    job = Job(1, command, command, (command, "config.yaml", "--round=0"), "one", None)
    array = Array(tuple(script.parent / name for name in names), tuple(range(len(names))))
    script.write_text(render(config, SiteProfile(python="python"), job, 1, array))
    return script


def test_a_task_of_a_sweep_does_its_own_run(script: Path) -> None:
    array_of(script, *HOSTILE)
    for task, name in enumerate(HOSTILE):
        ids = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": str(task)}
        done = run_script(script, f'printf "%s\\0" "$@" >{script.parent}/called', environment=ids)
        assert done.returncode == 0, done.stderr
        called = (script.parent / "called").read_text().split("\0")
        assert called[-4:-1] == ["score", f"{script.parent}/{name}/config.yaml", "--round=0"]
        assert (script.parent / f"run/slurm/attempts/9_{task}/0").is_dir()
    assert list(script.parent.rglob("pwned")) == []


def test_the_report_of_a_sweeps_run(script: Path) -> None:
    ids = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "1"}
    array_of(script, "a", "b", command="report")
    done = run_script(script, f'printf "%s\\0" "$@" >{script.parent}/called', environment=ids)
    assert done.returncode == 0, done.stderr
    assert f"\0report\0{script.parent}/b\0" in (script.parent / "called").read_text()


@pytest.mark.parametrize("task", ["", "2", "-1", "00", "a[$(touch pwned)]", "runs", "99999999999999999999"])
def test_a_task_that_the_sweep_does_not_have(script: Path, task: str) -> None:
    done = run_script(array_of(script, "a", "b"), "exit 0", environment={"SLURM_ARRAY_TASK_ID": task})
    assert done.returncode == 2, done.stderr
    assert "is not a number" in done.stderr or "no task of the sweep" in done.stderr
    assert list(script.parent.rglob("pwned")) == []


def test_requeues_are_counted_for_each_task(script: Path) -> None:
    """Three failures of one task at the same point do not count for another."""
    array_of(script, "a", "b")
    for task, restarts, words in (
        ("0", 0, "requeued, 1 of at most 20"),
        ("0", 1, "requeued, 2 of at most 20"),
        ("1", 0, "requeued, 1 of at most 20"),
        ("0", 2, "not requeued: failed 3 times in a row"),
        ("1", 1, "requeued, 2 of at most 20"),
    ):
        ids = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": task, "SLURM_RESTART_COUNT": str(restarts)}
        done = run_script(script, "exit 1", f'[[ "$*" != requeue* ]] || [[ $2 == 9_{task} ]]', environment=ids)
        assert words in done.stderr, done.stderr
    ids["SLURM_RESTART_COUNT"] = "21"
    assert "requeued 21 times; submit again" in run_script(script, "exit 0", environment=ids).stderr


def test_a_persons_file_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / "configs/demo.yaml", {"run_dir": "run"})
    job = Job(1, "score", "score", ("score", "config.yaml"), "one", None)
    (path,) = write_scripts(config, SiteProfile(), [job], 1).values()
    write_scripts(config, SiteProfile(), [job], 1)
    for make in (lambda: path.write_text("#!/bin/bash\necho mine\n"), lambda: path.symlink_to("elsewhere")):
        path.unlink()
        make()
        with pytest.raises(UserError, match=r"01-score.sh: is not a script of alsace, and would be written over"):
            write_scripts(config, SiteProfile(), [job], 1)
    assert path.is_symlink() and not (tmp_path / "run/slurm/elsewhere").exists()


def test_a_controller_that_is_away_is_asked_again(script: Path) -> None:
    count = f'echo "$1" >>{script}.asked; (($(wc -l <{script}.asked) > 7))'
    done = run_script(script, "exit 1", count)
    assert "exit code 1, requeued, 1 of at most 20 times" in done.stderr
    assert Path(f"{script}.asked").read_text().split() == [
        *["requeue", "show"] * 4,
        "requeue",
    ]  # the last show is answered
    assert (script.parent / "slept").read_text().split() == ["2", "4", "8", "16"]


def test_a_controller_that_refuses_is_asked_once_more(script: Path) -> None:
    done = run_script(script, "exit 1", f'echo "$1" >>{script}.asked; [[ $1 == show ]]')
    assert "not requeued: Slurm refused" in done.stderr
    assert Path(f"{script}.asked").read_text().split() == ["requeue", "show", "requeue"]


@pytest.mark.parametrize(
    "name", ["cause-0-1-code[$(touch pwned)]-x", "cause-0-1-09-x", "cause-0-1-0-x", "cause-\n-2-3-4"]
)
def test_names_of_causes_are_never_evaluated(script: Path, name: str) -> None:
    start = script.parent / "run/slurm/attempts/7/0"
    start.mkdir(parents=True)
    (start / name).write_text("$(touch pwned)\n")
    (start / "position").write_text("a[$(touch pwned)]\n")
    done = run_script(script, "exit 9", "exit 0")
    assert done.returncode == 9 and "exit code 9, requeued" in done.stderr, done.stderr
    assert "arithmetic" not in done.stderr and "value too great" not in done.stderr
    (start / "cause-0-2-2-rank0").write_text("a mistake\n")
    done = run_script(script, "exit 9", "exit 0")
    assert done.returncode == 2 and done.stderr.endswith("not requeued\na mistake\n"), done.stderr
    assert list(script.parent.rglob("pwned")) == []


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID"])
def test_only_digits_are_computed_with(script: Path, name: str) -> None:
    done = run_script(script, "exit 0", environment={name: "a[$(touch pwned)]"})
    assert done.returncode == 2 and "is not a number" in done.stderr, done.stderr
    assert list(script.parent.rglob("pwned")) == []


def test_small_jobs_get_neither_nodes_nor_gpus_of_the_others() -> None:
    config = load_config(ROOT / "configs/xnli-mt5-xxl.yaml", {"run_dir": "/shared/runs/xxl"})
    jobs = {job.name: job for job in jobs_of(config, stages(config))}
    options = ["--nodelist=a,b", "--gres=tmp:9", "--gpu-bind=closest", "--comment=x"]
    container = {"kind": "apptainer", "image": "/x.sif"}
    given = {"gpus_per_node": 4, "gpus_as": "gres", "gpu_type": "a100", "sbatch": options, "container": container}
    profile = validate(SiteProfile, given, "")
    many = render(config, profile, jobs["distill round 1"], 2)
    assert "#SBATCH --gres=gpu:a100:4,tmp:9\n" in many and many.count("--gres") == 1
    assert "#SBATCH --nodelist=a,b\n" in many and "--gpus-per-node" not in many
    assert "--cpus-per-task=32\n" in many and " --nv " in many and "ALSACE_GPUS_PER_NODE=4" in many
    small = render(config, profile, jobs["select round 1"], 2)
    assert "--nodelist" not in small and "gpu:" not in small and "--gpu-bind" not in small
    assert "#SBATCH --gres=tmp:9\n" in small and "#SBATCH --comment=x\n" in small
    own = validate(SiteProfile, given | {"small": {"sbatch": ["--gres=gpu:1"]}}, "")
    assert "#SBATCH --gres=gpu:1\n" in render(config, own, jobs["select round 1"], 2)
    asking = validate(SiteProfile, {"gpus_per_node": 4, "gpus_as": "none", "sbatch": ["--gpus-per-task=1"]}, "")
    assert render(config, asking, jobs["distill round 1"], 2).count("#SBATCH --gpus") == 1


def test_the_submitters_modules_are_unloaded() -> None:
    config = load_config(ROOT / "configs/demo.yaml", {"run_dir": "run"})
    job = Job(1, "score", "score", ("score",), "one", None)
    text = render(config, SiteProfile(modules=["cuda"]), job, 1)
    assert text.index("module purge") < text.index("module load cuda")
    assert "module purge" not in render(config, SiteProfile(modules=["cuda"], purge_modules=False), job, 1)
    assert "module purge" not in render(config, SiteProfile(), job, 1)


def test_hostile_values_stay_in_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is run by bash with an srun and a scontrol that write down what they are called with."""
    needs("shellcheck")
    run = tmp_path / "a b'c\"d$(touch pwned);#%j" / "run"
    run.parent.mkdir()
    monkeypatch.chdir(run.parent)
    text = yaml.safe_load((ROOT / "configs/demo.yaml").read_text()) | {"run_dir": str(run)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(text))
    config = load_config(tmp_path / "config.yaml")
    environment = {f"HOSTILE_{number}": value for number, value in enumerate(HOSTILE)}
    container = {"kind": "apptainer", "image": HOSTILE[4], "mounts": HOSTILE, "program": "env"}
    profile = validate(SiteProfile, {"environment": environment, "container": container, "ranks_per_node": 2}, "")
    job = Job(1, "score " + " ".join(HOSTILE), "score", ("score", *HOSTILE), "ranks", None)
    script = tmp_path / "script.sh"
    script.write_text(render(config, profile, job, 2))
    # What a session says of itself must not reach srun, but what the job says of itself must.
    session = {"SLURM_MEM_PER_CPU": "1", "SLURM_EXPORT_ENV": "NONE", "SLURM_CPU_BIND_TYPE": "x", "SRUN_DEBUG": "9"}
    record = f'printf "%s\\0" "$@" >{tmp_path}/called\nenv -0 >{tmp_path}/environment\n'
    done = run_script(script, record, environment=session)
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "called").read_text().split("\0")
    assert called[-len(HOSTILE) - 1 : -1] == HOSTILE
    assert [called[at + 1] for at, word in enumerate(called) if word == "--bind"] == HOSTILE
    seen = dict(row.split("=", 1) for row in (tmp_path / "environment").read_text().split("\0") if "=" in row)
    assert {name: seen[name] for name in environment} == environment
    assert session.keys() & seen.keys() == set()
    assert seen["SLURM_JOB_ID"] == "7" and seen["SLURM_CPUS_PER_TASK"] == "2"
    assert list(tmp_path.rglob("pwned")) == []
    # 1090, 1091: an environment's activate script cannot be followed.
    check = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout


@pytest.mark.parametrize("key", ["partition", "account", "modules", "venv", "environment", "sbatch", "container"])
def test_a_line_break_is_refused(key: str) -> None:
    value: Any = "a\nb"
    if key in ("modules", "sbatch"):
        value = [f"--comment={value}"]
    if key == "environment":
        value = {"NAME": value}
    if key == "container":
        value = {"kind": "apptainer", "image": value}
    with pytest.raises(UserError, match=rf"site: {key}.*cannot be printed"):
        validate(SiteProfile, {key: value}, "site: ")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"partitoin": "x"}, "partitoin: unknown key; known here: account"),
        ({"time": "soon"}, "time: 'soon' is no duration"),
        ({"time": {"score": 50}}, "time: needs a `default`"),
        ({"time": {"default": 50, "scoring": 50}}, "time: 'scoring' is no stage"),
        ({"time": 5}, "time 5 is not a minute more than lead_seconds (300)"),
        ({"small": {"sbatch": ["-N 4"]}}, "small.sbatch.0: '-N 4' is no option of sbatch"),
        ({"gpu_type": "a100"}, "gpu_type needs gpus_per_node"),
        ({"mail_type": "END"}, "mail_type needs mail_user"),
        ({"venv": "/v", "conda": "c"}, "either venv or conda"),
        ({"venv": "/v", "container": {"kind": "pyxis", "image": "x"}}, "a container has its own environment"),
        ({"container": {"kind": "docker", "image": "x"}}, "container.kind: Input should be 'pyxis' or 'apptainer'"),
        ({"container": {"kind": "pyxis", "image": "x", "program": "y"}}, "container: program is apptainer's"),
        ({"sbatch": ["--nodes=4"]}, "sbatch.0: --nodes is set from this profile's own keys"),
        ({"sbatch": ["--gres=gpu:4"]}, "--gres=gpu:4 asks for GPUs; say how many a node has in gpus_per_node"),
        ({"sbatch": ["--gpus=8"], "gpus_per_node": 4}, "--gpus=8 asks for GPUs; say how many"),
        ({"sbatch": ["rm -rf x"]}, "sbatch.0: 'rm -rf x' is no option of sbatch"),
        ({"environment": {"A B": "x"}}, "environment: 'A B' is no name"),
        ({"nodes": 0}, "nodes: Input should be greater than or equal to 1"),
        ({"signal": "KILL"}, "signal: Input should be 'USR1' or 'USR2'"),
        ({"max_requeues": True}, "max_requeues: must be a number, not true"),
        ({"max_requeues": 2**70}, "max_requeues: Input should be less than or equal to"),
        ({"partition": "  "}, "partition: is blank"),
        ({"memory": "-1"}, "memory: '-1' is no memory as Slurm writes it; write 480G"),
        ({"small": {"memory": "lots"}}, "small.memory: 'lots' is no memory"),
        ({"time": "9" * 5000}, "' is no duration; write minutes"),
        ({"time": "999999999"}, "time: 999999999 is longer than ten years"),
        ({"time": "٣٠"}, "time: '٣٠' is no duration"),
        ({"sbatch": ["--part=x"]}, "sbatch.0: --part (--partition) is set from this profile's own keys"),
        ({"sbatch": ["--arr=1-9"]}, "sbatch.0: --arr (--array) is set"),
        ({"environment": {"UID": "0"}}, "environment: UID is bash's own or set by the job script"),
        ({"environment": {"WORLD_SIZE": 4}}, "environment: WORLD_SIZE is bash's own or set"),
        ({"environment": {"alsace_told": 1}}, "environment: alsace_told is bash's own or set"),
        ({"container": {"kind": "pyxis", "image": "x", "mounts": ["/a,/b"]}}, "mounts: '/a,/b' holds a comma"),
    ],
)
def test_a_mistake_in_a_profile_names_the_key(value: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(SiteProfile, value, "site: ")
    assert words in str(caught.value) and len(str(caught.value)) < 600


def test_the_number_of_ranks_must_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "configs/xnli-mt5-large.yaml")
    (job,) = (job for job in jobs_of(config, stages(config)) if job.name == "finetune")
    with pytest.raises(UserError, match=r"engine.num_processes: auto is not known here; set ranks_per_node"):
        render(config, SiteProfile(), job, 1)
    assert "ALSACE_RANKS_PER_NODE=4" in render(config, SiteProfile(gpus_per_node=4), job, 1)


if __name__ == "__main__":
    os.chdir("/")
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir()
    for name, text in scripts().items():
        (GOLDEN / name).write_text(text)
