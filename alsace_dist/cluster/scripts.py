"""Job scripts: a run's stages as plain sbatch scripts, from a site profile."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alsace_dist.cluster.profile import SiteProfile, is_for_small
from alsace_dist.config import Config
from alsace_dist.errors import UserError
from alsace_dist.files.layout import CONFIG_FILE, Layout
from alsace_dist.files.manifest import write_text
from alsace_dist.stages.base import Stage

PACKAGE = Path(__file__).parent
TEMPLATE = PACKAGE / "stage.sh.j2"
TASK_SCRIPT = PACKAGE / "slurm_task.sh"

Tasks = Literal["one", "ranks", "nodes"]


@dataclass(frozen=True)
class Job:
    """A stage as a job: ``arguments`` of the command line; ``stage`` is None for the report and the doctor, which have
    no outputs to be complete. ``tasks``: one, the stage's ranks, or one on every node."""

    number: int
    name: str
    command: str
    arguments: tuple[str, ...]
    tasks: Tasks
    stage: Stage | None

    @property
    def file_name(self) -> str:
        """Of its script and its log, without suffix."""
        return f"{self.number:02d}-" + "".join(c if c.isalnum() or c in "-_" else "-" for c in self.name).strip("-")


def jobs_of(config: Config, found: Sequence[Stage]) -> list[Job]:
    """One job per stage of the run, and the report, in order."""
    layout = Layout(Path(config.run_dir))
    jobs = []
    for number, stage in enumerate(found, 1):
        arguments = (stage.command, str(layout.config), *stage.flags)
        jobs.append(Job(number, stage.name, stage.command, arguments, "ranks" if stage.on_ranks else "one", stage))
    arguments = ("report", str(layout.run))
    return [*jobs, Job(len(found) + 1, "report", "report", arguments, "one", None)]


def doctor_job() -> Job:
    """The check of the cluster's nodes, which reads no config."""
    return Job(0, "doctor", "doctor", ("doctor",), "nodes", None)


@dataclass(frozen=True)
class Array:
    """What makes an array of a job. ``runs``: the run directory of every task, by its number; ``tasks``: the numbers
    of those that are asked for; ``at_once``: how many of them may run, 0 for all."""

    runs: tuple[Path, ...]
    tasks: tuple[int, ...]
    at_once: int = 0


def write_scripts(
    config: Config, profile: SiteProfile, jobs: Sequence[Job], num_nodes: int, array: Array | None = None
) -> dict[str, Path]:
    """Write the jobs' scripts into the run directory, which is a sweep's if there is an array; job name -> script.

    Raises ``UserError`` if a value cannot stand in a script, or the number of ranks is not to be known here.
    """
    directory = Layout(Path(config.run_dir)).slurm.absolute()
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    paths = {job.name: directory / f"{job.file_name}.sh" for job in jobs}
    for path in (directory / TASK_SCRIPT.name, *paths.values()):
        _check_own(path)
    # Copy the task's script to where nodes and containers can read it.
    write_text(directory / TASK_SCRIPT.name, TASK_SCRIPT.read_text(encoding="utf-8"))
    scripts = {}
    for job in jobs:
        path = paths[job.name]
        write_text(path, render(config, profile, job, num_nodes, array))
        path.chmod(0o755)
        scripts[job.name] = path
    return scripts


def _check_own(path: Path) -> None:
    """Raises ``UserError`` if a file that is there is none of this program's scripts: it would be written over."""
    if path.is_symlink() or path.exists():
        text = "" if path.is_symlink() or not path.is_file() else path.read_text(encoding="utf-8", errors="replace")
        if not text.startswith("#!/bin/bash\n#") or "alsace" not in text[:400]:
            raise UserError(f"{path}: is not a script of alsace, and would be written over; move it")


def render(config: Config, profile: SiteProfile, job: Job, num_nodes: int, array: Array | None = None) -> str:
    """A job's script. Every value is quoted: none is ever more than one word of a command.

    Raises ``UserError`` if a value cannot stand in a script, or the number of ranks is not to be known here.
    """
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        finalize=_quoted,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    directory = Layout(Path(config.run_dir)).slurm.absolute()
    num_ranks = _ranks_per_node(config, profile) if job.tasks == "ranks" else 1
    launcher = {"one": "none", "ranks": profile.launcher, "nodes": "srun"}[job.tasks]
    num_tasks = num_ranks if launcher == "srun" else 1
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=_Plain(f"alsace_dist: {job.name}"),
        options=[
            _Plain(option) for option in _options(profile, job, num_nodes, num_ranks, num_tasks, directory, array)
        ],
        runs=[run.absolute() for run in array.runs] if array else [],
        profile=profile,
        directory=Path.cwd(),
        attempts=directory / "attempts",
        launcher=launcher,
        ranks_per_node=num_ranks,
        # Trying again mends none of the doctor's findings.
        max_requeues=0 if job.tasks == "nodes" else profile.max_requeues,
        # In a doctor job the other nodes must survive a bad one, to report it.
        kill_on_bad_exit=int(job.tasks != "nodes"),
        srun_options=_words(_srun_options(profile)),
        container=_words(_container(profile)),
        task_script=directory / TASK_SCRIPT.name,
        command=_Plain(_command(profile, job, array)),
    )


def _command(profile: SiteProfile, job: Job, array: Array | None) -> str:
    """What the step runs; in an array ``$run`` is the run directory of the task."""
    words = [shlex.quote(word) for word in (_python(profile), "-m", "alsace_dist", *job.arguments)]
    if array:
        words[4] = '"$run"' if job.command == "report" else f'"$run"/{CONFIG_FILE}'
    return " ".join(words)


class _Plain(str):
    """What is quoted already, or stands in a comment."""

    __slots__ = ()


def _words(words: Sequence[str]) -> _Plain:
    """Words of a command, each followed by a space."""
    return _Plain("".join(f"{shlex.quote(word)} " for word in words))


def _quoted(value: Any) -> str:
    text = str(value)
    _check_printable(text)
    return text if isinstance(value, _Plain) else shlex.quote(text)


def _check_printable(text: str) -> None:
    if bad := next((char for char in text if not char.isprintable()), None):
        raise UserError(f"{text!r} holds {bad!r}, for which a job script has no place; rename what is called so")


def _option(name: str, value: object) -> str:
    """An option as sbatch reads it from a script: quotes as in a shell, but a backslash counts within them too."""
    return f"--{name}=" + shlex.quote(str(value)).replace("\\", "\\\\")


def _options(
    profile: SiteProfile,
    job: Job,
    num_nodes: int,
    num_ranks: int,
    num_tasks: int,
    directory: Path,
    array: Array | None,
) -> Iterator[str]:
    log = str(directory / "logs" / job.file_name)
    if "\\" in log:
        raise UserError(f"run_dir: {directory.parent}: Slurm's log files cannot have a backslash; rename it")
    yield _option("job-name", f"{directory.parent.name}: {job.name}")
    yield _option("output", log.replace("%", "%%") + ("-%a.log" if array else ".log"))
    if array:
        yield _option("array", ",".join(map(str, array.tasks)) + (f"%{array.at_once}" if array.at_once else ""))
    yield "--open-mode=append"
    yield "--requeue"
    yield f"--signal=B:{profile.signal}@{profile.lead_seconds}"
    yield _option("time", profile.time_of(job.command))
    is_small = job.tasks == "one"
    partition = (profile.small.partition if is_small else None) or profile.partition
    common = {"partition": partition, "account": profile.account, "qos": profile.qos}
    common |= {
        "exclude": profile.exclude,
        "reservation": profile.reservation,
        "mail-user": profile.mail_user,
        "mail-type": profile.mail_type,
    }
    for name, value in common.items():
        if value is not None:
            yield _option(name, value)
    if is_small:
        yield from ("--nodes=1", "--ntasks-per-node=1", f"--cpus-per-task={profile.small.cpus}")
        if profile.small.memory is not None:
            yield _option("mem", profile.small.memory)
    else:
        yield from _options_of_many(profile, num_nodes, num_ranks, num_tasks)
    raw = profile.sbatch
    if is_small:
        own = profile.small.sbatch
        raw = own if own is not None else [line for line in profile.sbatch if is_for_small(line)]
    elif profile.gpus_per_node and profile.gpus_as == "gres":
        # One option for all generic resources, for of two the last would win.
        others = [line.removeprefix("--gres=") for line in raw if line.startswith("--gres=")]
        yield _option("gres", ",".join([f"gpu:{_gpus(profile)}", *others]))
        raw = [line for line in raw if not line.startswith("--gres=")]
    yield from (
        name if not equals else _option(name.removeprefix("--"), value)
        for name, equals, value in (line.partition("=") for line in raw)
    )


def _options_of_many(profile: SiteProfile, num_nodes: int, num_ranks: int, num_tasks: int) -> Iterator[str]:
    yield f"--nodes={num_nodes}"
    yield f"--ntasks-per-node={num_tasks}"
    cpus = profile.cpus_per_node or (8 * profile.gpus_per_node or num_ranks)
    yield f"--cpus-per-task={max(1, cpus // num_tasks)}"
    if profile.gpus_per_node and profile.gpus_as == "gpus-per-node":
        yield _option("gpus-per-node", _gpus(profile))
    for name, value in {"mem": profile.memory, "constraint": profile.constraint}.items():
        if value is not None:
            yield _option(name, value)
    if profile.exclusive:
        yield "--exclusive"


def _gpus(profile: SiteProfile) -> str:
    return f"{profile.gpu_type}:{profile.gpus_per_node}" if profile.gpu_type else str(profile.gpus_per_node)


def _srun_options(profile: SiteProfile) -> list[str]:
    if profile.container is None or profile.container.kind != "pyxis":
        return []
    options = [f"--container-image={profile.container.image}"]
    options += [f"--container-mounts={','.join(profile.container.mounts)}"] if profile.container.mounts else []
    return [*options, f"--container-workdir={Path.cwd()}"]


def _container(profile: SiteProfile) -> list[str]:
    """What stands before a task's command."""
    if profile.container is None or profile.container.kind != "apptainer":
        return []
    words = [profile.container.program, "exec", *(["--nv"] if profile.gpus_per_node else [])]
    for mount in profile.container.mounts:
        words += ["--bind", mount]
    return [*words, "--pwd", str(Path.cwd()), profile.container.image]


def _python(profile: SiteProfile) -> str:
    has_own = profile.modules or profile.venv or profile.conda or profile.container
    return profile.python or ("python" if has_own else sys.executable)


def _ranks_per_node(config: Config, profile: SiteProfile) -> int:
    if profile.ranks_per_node or profile.gpus_per_node:
        return profile.ranks_per_node or profile.gpus_per_node
    if config.engine.num_processes == "auto":
        raise UserError("engine.num_processes: auto is not known here; set ranks_per_node in the site profile")
    return config.engine.num_processes
