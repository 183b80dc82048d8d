"""What differs between clusters: a site profile, one YAML that says how a cluster's Slurm wants to be asked."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from alsace_dist.config import Count, Section
from alsace_dist.config_file import read_yaml, validate
from alsace_dist.pipeline import COMMANDS
from alsace_dist.reading import shorten

# The commands that a job can be for.
JOB_COMMANDS = (*COMMANDS, "report", "doctor")
_SBATCH_LINE = re.compile(r"--[a-z][a-z-]*(=.*)?")
_DURATION = re.compile(r"\d{1,9}(-\d{1,9}(:\d{1,9}){0,2})?|\d{1,9}(:\d{1,9}){1,2}", re.ASCII)  # sbatch(1), --time
_MEMORY = re.compile(r"\d{1,12}[KMGT]?B?", re.ASCII | re.IGNORECASE)  # sbatch(1), --mem
MAX_SECONDS = 10 * 366 * 86_400


def _on_one_line(text: str) -> str:
    if bad := next((char for char in text if not char.isprintable()), None):
        raise ValueError(f"holds {bad!r}; a job script has no place for what cannot be printed")
    return text


def _is_given(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank; give a value, or leave the key out")
    return text


def _number_as_text(value: Any) -> Any:
    return str(value) if type(value) is int else value


def _is_duration(text: str) -> str:
    if not _DURATION.fullmatch(text):
        form = "write minutes, hours:minutes:seconds or days-hours:minutes:seconds"
        raise ValueError(f"{shorten(text)!r} is no duration; {form}")
    if seconds_of(text) > MAX_SECONDS:
        raise ValueError(f"{text} is longer than ten years; give less")
    return text


def _is_memory(text: str) -> str:
    if not _MEMORY.fullmatch(text):
        raise ValueError(
            f"{shorten(text)!r} is no memory as Slurm writes it; write 480G, 16000M, or 0 for all of a node"
        )
    return text


def _is_option(line: str) -> str:
    if not _SBATCH_LINE.fullmatch(line):
        raise ValueError(f"{shorten(line)!r} is no option of sbatch; write --name=value")
    name = line.partition("=")[0]
    # sbatch completes a name that is cut short; --gpus is a whole one.
    if owned := next((one for one in sorted(OWNED, key=len) if one.startswith(name) and name != "--gpus"), None):
        is_short = f" ({owned})" if name != owned else ""
        raise ValueError(
            f"{shorten(name)}{is_short} is set from this profile's own keys or by alsace itself; remove it"
        )
    return line


def seconds_of(duration: str) -> int:
    """Seconds of a duration as sbatch reads it: minutes, minutes:seconds, hours:minutes:seconds, days-hours..."""
    days, dash, rest = duration.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


Line = Annotated[str, Field(min_length=1), AfterValidator(_on_one_line), AfterValidator(_is_given)]
Option = Annotated[Line, AfterValidator(_is_option)]
File = Annotated[Line, AfterValidator(os.path.expanduser)]
Memory = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_is_memory)]
Number = Annotated[int, Field(ge=0, le=10**9)]
Duration = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_is_duration)]


class ContainerConfig(Section):
    """Container that every task runs in."""

    kind: Literal["pyxis", "apptainer"]
    """pyxis: srun's plugin of that name; apptainer: that program."""
    image: File
    """A .sif file for apptainer; for pyxis what --container-image takes: a registry's name or a .sqsh file."""
    mounts: list[Line] = []
    """Directories as outside:inside or outside:inside:ro; this one, the run's and the data's must be among them."""
    program: Line = "apptainer"
    """Name or path of apptainer, such as singularity on older sites."""

    @field_validator("mounts")
    @classmethod
    def _check_mounts(cls, value: list[str]) -> list[str]:
        if bad := next((one for one in value if "," in one), None):
            raise ValueError(f"{shorten(bad)!r} holds a comma, which both programs take for the end; give one a line")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "pyxis" and "program" in self.model_fields_set:
            raise ValueError("program is apptainer's; remove it")
        return self


class SmallConfig(Section):
    """What stages of one task without GPUs ask for: prepare, select, calibrate, evaluate, report."""

    partition: Line | None = None
    """Partition for jobs on CPUs; null: the partition of the other jobs."""
    cpus: Count = 2
    """CPU cores."""
    memory: Memory | None = None
    """Memory as Slurm writes it, such as 16G; null: the partition's default."""
    sbatch: list[Option] | None = None
    """Further sbatch options for jobs on CPUs; null: those of the other jobs that name no nodes and ask for no GPUs."""


class SiteProfile(Section):
    """How to ask a cluster for the jobs of a run. Where a key is null, nothing is asked for and the cluster decides."""

    partition: Line | None = None
    """Partition."""
    account: Line | None = None
    """Account to charge."""
    qos: Line | None = None
    """Quality of service."""
    constraint: Line | None = None
    """Features that the nodes must have."""
    exclude: Line | None = None
    """Nodes to stay away from."""
    reservation: Line | None = None
    """Reservation."""
    mail_user: Line | None = None
    """Where mail goes."""
    mail_type: Line | None = None
    """When mail is sent, such as END,FAIL."""
    nodes: Count = 1
    """Nodes of the stages that compute on ranks; `alsace submit --nodes` wins."""
    gpus_per_node: Number = 0
    """GPUs of each node that a job gets."""
    gpus_as: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How sbatch is asked for them: --gpus-per-node; gres: --gres=gpu:...; none: not at all, for nodes come with theirs
    or `sbatch` below asks."""
    gpu_type: Line | None = None
    """Kind of GPU, as the cluster names it."""
    ranks_per_node: Count | None = None
    """Ranks on each node; null: one per GPU, without GPUs as many as the run's engine.num_processes says."""
    cpus_per_node: Count | None = None
    """CPU cores of each node; null: one per rank, eight per GPU."""
    memory: Memory | None = None
    """Memory of each node as Slurm writes it, such as 480G; 0: all of it."""
    exclusive: bool = False
    """Ask for whole nodes."""
    time: Duration | dict[str, Duration] = "02:00:00"
    """Time limit of a job; or a mapping from stage to limit, with a `default`."""
    small: SmallConfig = SmallConfig()
    """What stages of one task without GPUs ask for."""
    modules: list[Line] = []
    """Environment modules to load."""
    purge_modules: bool = True
    """Unload the submitter's modules before: false where that unloads what a site needs, such as Slurm's own."""
    venv: File | None = None
    """Virtual environment to activate: its directory."""
    conda: Line | None = None
    """Conda environment to activate: its name or directory."""
    python: File | None = None
    """Python to call; null: `python` of the modules, venv, conda or container, without any of them the submitter's."""
    container: ContainerConfig | None = None
    """Container that the tasks run in."""
    environment: dict[str, str] = {}
    """Environment variables of the jobs, such as those of NCCL. Not for secrets: they stand in the job scripts."""
    launcher: Literal["torchrun", "srun"] = "torchrun"
    """torchrun: srun starts one task per node, which starts the node's ranks. srun: it starts one task per rank."""
    signal: Literal["USR1", "USR2"] = "USR2"
    """What Slurm sends before the time is up, and before a preemption where the site says so."""
    lead_seconds: Annotated[int, Field(ge=0, le=65535)] = 300
    """How long before the end it is sent: longer than two steps and a checkpoint take together."""
    max_requeues: Number = 20
    """How often a job goes back into the queue, at most."""
    sbatch: list[Option] = []
    """Further options of sbatch, one a line, as they would stand after #SBATCH."""

    @field_validator("environment")
    @classmethod
    def _check_environment(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{shorten(name)!r} is no name of an environment variable")
            if name in NOT_TO_SET or name.upper().startswith("ALSACE_"):
                raise ValueError(f"{name} is bash's own or set by the job script; remove it")
            _on_one_line(text)
        return value

    @field_validator("environment", mode="before")
    @classmethod
    def _numbers_as_text(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: str(one) if type(one) in (int, float) else one for key, one in value.items()}

    @field_validator("time")
    @classmethod
    def _check_stages(cls, value: str | dict[str, str]) -> str | dict[str, str]:
        if isinstance(value, dict):
            if unknown := sorted(value.keys() - {*JOB_COMMANDS, "default"}):
                raise ValueError(f"{unknown[0]!r} is no stage; there are default, {', '.join(JOB_COMMANDS)}")
            if "default" not in value:
                raise ValueError("needs a `default`")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        limits = [self.time] if isinstance(self.time, str) else list(self.time.values())
        shortest = min(limits, key=seconds_of)
        if seconds_of(shortest) < self.lead_seconds + 60:
            raise ValueError(
                f"time {shortest} is not a minute more than lead_seconds ({self.lead_seconds}): a job would be told to "
                "stop as soon as it starts; give it more time, or lower lead_seconds"
            )
        if self.gpu_type and not self.gpus_per_node:
            raise ValueError("gpu_type needs gpus_per_node")
        asking = next((line for line in self.sbatch if asks_for_gpus(line)), None)
        if asking and (not self.gpus_per_node or self.gpus_as != "none"):
            raise ValueError(
                f"sbatch: {asking} asks for GPUs; say how many a node has in gpus_per_node, and gpus_as: gres for "
                "--gres=gpu:..., or gpus_as: none to leave the asking to sbatch"
            )
        if self.mail_type and not self.mail_user:
            raise ValueError("mail_type needs mail_user")
        if self.venv and self.conda:
            raise ValueError("give either venv or conda")
        if self.container and (self.venv or self.conda):
            raise ValueError("a container has its own environment; remove venv and conda")
        return self

    def time_of(self, stage: str) -> str:
        """Time limit of a stage's job."""
        return self.time if isinstance(self.time, str) else self.time.get(stage, self.time["default"])


# Options that only jobs of many nodes get: sbatch refuses a job of one task that names several nodes.
NAMING_NODES = {"--nodelist", "--nodefile", "--contiguous", "--switches"}
_GPU_OPTION = re.compile(r"--(gpus|gpus-per-[a-z]+|gpu-bind|gpu-freq|mem-per-gpu|cpus-per-gpu|ntasks-per-gpu)(=.*)?")
_GPU_REQUEST = re.compile(r"--(gpus|gpus-per-task|gpus-per-socket|ntasks-per-gpu)(=.*)?")
_GPU_RESOURCE = re.compile(r"--(gres|tres-per-[a-z]+)=(.*[,/:])?gpu([:=,].*)?")


def asks_for_gpus(line: str) -> bool:
    """Whether an option of sbatch asks for GPUs."""
    return bool(_GPU_REQUEST.fullmatch(line) or _GPU_RESOURCE.fullmatch(line))


def is_for_small(line: str) -> bool:
    """Whether an option of sbatch also suits a job of one task without GPUs."""
    return line.partition("=")[0] not in NAMING_NODES and not (
        _GPU_OPTION.fullmatch(line) or _GPU_RESOURCE.fullmatch(line)
    )


# Options that the scripts set themselves: a second one would win or lose by its place.
OWNED = {
    *("--partition", "--account", "--qos", "--constraint", "--exclude", "--reservation", "--mail-user", "--mail-type"),
    *("--nodes", "--ntasks", "--ntasks-per-node", "--cpus-per-task", "--mem", "--gpus-per-node", "--exclusive"),
    *("--time", "--signal", "--requeue", "--no-requeue", "--open-mode", "--output", "--error", "--job-name"),
    *("--dependency", "--kill-on-invalid-dep", "--array", "--chdir", "--wrap", "--export", "--parsable", "--wait"),
    *("--test-only", "--tasks-per-node"),
}
# Variables that bash does not let be set, or that tell a task where it stands.
NOT_TO_SET = {
    "BASHOPTS",
    "BASH_VERSINFO",
    "EUID",
    "IFS",
    "PPID",
    "SHELLOPTS",
    "UID",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
}


def load_profile(path: str | Path) -> SiteProfile:
    """Read a site profile. Raises ``UserError`` that names the file, the key and the remedy."""
    return validate(SiteProfile, read_yaml(Path(path), "give a site profile, see slurm/clusters"), f"{path}: ")
