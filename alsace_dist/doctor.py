"""Is this machine fit for a run? Versions, devices, process group, directories, and with a config its data and model.

Each check is one line that says ok, warning or FAILED, with the remedy. Nothing of the environment is printed, and of a
URL nothing that could be a secret.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from alsace_dist.config import Config, InputConfig
from alsace_dist.errors import UserError
from alsace_dist.files.layout import Layout, data_url
from alsace_dist.files.manifest import atomic_path

GROUP_SECONDS = 120.0  # time for two processes to import torch on a busy machine
MIN_FREE_BYTES = 5 * 10**9
ALL_REDUCE = "import sys; from alsace_dist.doctor import all_reduce_as_rank; all_reduce_as_rank(*sys.argv[1:])"


class Finding(NamedTuple):
    """Outcome of one check; ``text`` names the remedy where one is needed."""

    state: Literal["ok", "warning", "FAILED"]
    name: str
    text: str


def run_checks(config: Config | None) -> None:
    """Run all checks and print a line for each. Raises ``UserError`` at the end if one failed."""
    num_failed = num_warnings = 0
    for name, check in _checks(config):
        for finding in _run(name, check):
            num_failed += finding.state == "FAILED"
            num_warnings += finding.state == "warning"
            print(f"{finding.state:<8} {finding.name:<14} {finding.text}", flush=True)
    if num_failed:
        checks = "1 check" if num_failed == 1 else f"{num_failed} checks"
        raise UserError(f"doctor: {checks} FAILED; mend what those lines name, then run `alsace doctor` again")
    print(f"No check failed, {num_warnings} to look at." if num_warnings else "All checks are ok.")


def _checks(config: Config | None) -> Iterator[tuple[str, Callable[[], Iterator[Finding]]]]:
    run_dir = config.run_dir if config else "runs"
    yield "versions", lambda: check_versions(config)
    yield "devices", lambda: check_devices(config)
    yield "process group", check_group
    yield "run_dir", lambda: check_directory("run_dir", Path(run_dir))
    yield "temporary", lambda: check_directory("temporary", Path(tempfile.gettempdir()))
    if config is not None:
        yield "data", lambda: check_data(config)
        yield "model", lambda: check_model(config)


def _run(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; an exception in the check is a finding, so that later checks still run."""
    try:
        yield from check()
    except UserError as error:
        yield Finding("FAILED", name, _one_line(error))
    except Exception as error:  # a broken installation may raise anything
        yield Finding("FAILED", name, f"{type(error).__name__}: {_one_line(error)}")


# --- machine -------------------------------------------------------------------------------------------------------


def check_versions(config: Config | None) -> Iterator[Finding]:
    """Python and every package that the project declares, against the declared ranges; of what is optional, what the
    config needs."""
    from packaging.requirements import Requirement

    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("ok", "python", version)
    try:
        lines = importlib.metadata.requires("alsace_dist") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("FAILED", "alsace_dist", "not installed; run `pip install -e .` where its pyproject.toml is")
        return
    extras = ["", *(["lora"] if config and any(one and one.lora for one in (config.finetune, config.distill)) else [])]
    for requirement in map(Requirement, lines):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            yield _check_package(requirement)


def _check_package(requirement: Any) -> Finding:
    remedy = f"run `pip install '{requirement.name}{requirement.specifier}'`"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("FAILED", requirement.name, f"not installed; {remedy}")
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding("FAILED", requirement.name, f"{version} is not {requirement.specifier}; {remedy}")
    return Finding("ok", requirement.name, version)


def check_devices(config: Config | None) -> Iterator[Finding]:
    """Cores, memory and GPUs of this machine, and whether they suit the engine section."""
    import torch

    from alsace_dist.ranks import launcher

    num_cores, num_gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    num_ranks = launcher.num_local_processes(config.engine) if config else 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{num_cores} cores, {memory / 1e9:.0f} GB memory"
    if num_ranks > num_cores:
        text += f", fewer cores than the {num_ranks} ranks; lower engine.num_processes"
    yield Finding("warning" if num_ranks > num_cores else "ok", "CPU", text)
    if num_gpus == 0 and (config is None or config.engine.dtype == "bf16"):
        yield _check_cpu_bf16()
    for index in range(num_gpus):
        yield _check_gpu(index, config)
    if num_gpus == 0:
        yield Finding("ok", "GPU", "none; the CPU computes")
    elif num_ranks > num_gpus:
        yield Finding("FAILED", "GPU", f"{num_gpus} for {num_ranks} ranks; set engine.num_processes: {num_gpus}")


def _check_cpu_bf16() -> Finding:
    from alsace_dist.monitor.health import MOST_BF16_SLOWDOWN, bf16_slowdown

    slowdown = bf16_slowdown()
    if slowdown > MOST_BF16_SLOWDOWN:
        return Finding("warning", "bf16", f"takes this CPU {slowdown:.0f} times as long; set engine.dtype: fp32")
    return Finding("ok", "bf16", f"takes this CPU {slowdown:.1f} times as long as fp32")


def _check_gpu(index: int, config: Config | None) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(index)
    text = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    with torch.cuda.device(index):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if not has_bf16 and (config is None or config.engine.dtype == "bf16"):
        return Finding("warning", f"GPU {index}", f"{text}, no bf16 of its own; set engine.dtype: fp32")
    return Finding("ok", f"GPU {index}", f"{text}, {'bf16' if has_bf16 else 'no bf16'}")


def check_group(timeout_seconds: float = GROUP_SECONDS) -> Iterator[Finding]:
    """Two processes form a gloo group and sum a number; with GPUs, NCCL must be there as well."""
    import torch

    if torch.cuda.is_available():
        if torch.distributed.is_nccl_available():
            version = ".".join(map(str, torch.cuda.nccl.version()))
            yield Finding("ok", "nccl", version)
        else:
            yield Finding("FAILED", "nccl", "this build of torch has none; install a build of torch for CUDA")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="alsace-") as directory:
        store = str(Path(directory) / "store")
        problem = _run_two_ranks([sys.executable, "-c", ALL_REDUCE, store], timeout_seconds)
    if problem:
        yield Finding("FAILED", "gloo", f"{problem}; see that this host's own name resolves and localhost is open")
    else:
        yield Finding("ok", "gloo", f"two processes summed a number in {time.monotonic() - start:.1f} s")


def _run_two_ranks(command: list[str], timeout_seconds: float) -> str:
    """Start a command as ranks 0 and 1; what went wrong, or nothing."""
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    deadline = time.monotonic() + timeout_seconds
    try:
        for rank in ranks:
            output, errors = rank.communicate(timeout=max(0.1, deadline - time.monotonic()))
            if rank.returncode != 0 or output.strip() != "3":
                last = (errors.strip().splitlines() or [f"exit code {rank.returncode}"])[-1]
                return f"the sum over two processes failed ({_one_line(last)})"
    except subprocess.TimeoutExpired:
        return f"two processes did not find each other within {timeout_seconds:.0f} s"
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return ""


def all_reduce_as_rank(store: str, rank: str) -> None:
    """One of the two processes of ``check_group``: print the sum of 1 and 2."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    timeout = timedelta(seconds=GROUP_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2, timeout=timeout)
    value = torch.tensor([float(rank) + 1])
    dist.all_reduce(value)
    print(int(value.item()), flush=True)
    dist.destroy_process_group()


def check_directory(name: str, directory: Path) -> Iterator[Finding]:
    """Write, fsync and rename a small file as the stages do, and look at the free space. Leaves nothing behind.

    A directory that does not exist yet is not made: the nearest one above it is tried.
    """
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    where = str(directory) if existing == directory.absolute() else f"{directory} (to be made in {existing})"
    probe = existing / f".alsace-doctor-{uuid.uuid4().hex}"
    try:
        with atomic_path(probe) as temporary:
            temporary.write_bytes(b"alsace" * 1000)
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        yield Finding("FAILED", name, f"{where}: cannot be written ({reason}); free space or choose another directory")
        return
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_BYTES:
        text = f"{where}: only {free / 1e9:.1f} GB are free; `alsace plan` says what a run takes"
        yield Finding("warning", name, text)
    else:
        yield Finding("ok", name, f"{where}: writable, {free / 1e9:.0f} GB free")


# --- what the config names -----------------------------------------------------------------------------------------


def check_data(config: Config) -> Iterator[Finding]:
    """Prepared data opens, or the inputs are there."""
    from alsace_dist.files.manifest import MANIFEST

    if config.data.directory is not None:
        yield from _check_datasets(config)
        return
    if (Layout(Path(config.run_dir)).data / MANIFEST).exists():
        yield Finding("ok", "data", f"prepared already, in {Layout(Path(config.run_dir)).data}")
        return
    yield from map(_check_input, config.data.inputs)


def _check_input(one: InputConfig) -> Finding:
    from alsace_dist.data.inputs import kind_of

    try:
        files = kind_of(one).files(one)
    except UserError as error:  # go on with the inputs after this one
        return Finding("FAILED", "data", _one_line(error))
    if not files and one.path:
        return _check_hub("data", one.path, one.revision, "dataset")
    if not files:
        return Finding("ok", "data", f"{one.kind}: {one.num_groups:,} groups are generated")
    if unreadable := [path for path in files if not os.access(path, os.R_OK)]:
        return Finding("FAILED", "data", f"{unreadable[0]}: not readable for you; change its permissions")
    size = sum(path.stat().st_size for path in files)
    return Finding("ok", "data", f"{one.path}: {len(files)} file{'s' * (len(files) > 1)}, {size / 1e6:,.1f} MB")


def _check_datasets(config: Config) -> Iterator[Finding]:
    from alsace_dist.data.config_check import check_datasets
    from alsace_dist.files.shards import open_dataset
    from alsace_dist.files.store import ONE_LOOK

    opened = {}
    wanted = {"pretrain": config.model.nano, "labeled": config.finetune, "unlabeled": True, "test": True}
    for split in (split for split, is_needed in wanted.items() if is_needed):
        url = data_url(config, split)
        try:
            dataset = open_dataset(url, patience=ONE_LOOK)
        except UserError as error:
            yield Finding("FAILED", "data", _one_line(error))
            continue
        opened[split] = dataset
        text = f"{dataset.num_groups:,} groups in {len(dataset.languages)} languages"
        yield Finding("ok", "data", f"{url}: {text}")
    try:
        check_datasets(config, opened)
    except UserError as error:
        yield Finding("FAILED", "data", _one_line(error))


def check_model(config: Config) -> Iterator[Finding]:
    """The model's config, tokenizer, answers and weights fit together, without the weights being loaded."""
    path = config.model.path
    if path is None:
        yield Finding("ok", "model", "a nano mT5 is pretrained in the run")
    elif Path(path).is_dir():
        yield from _check_model_directory(config, Path(path))
    else:
        yield _check_hub("model", path, config.model.revision, "model")


def _check_model_directory(config: Config, directory: Path) -> Iterator[Finding]:
    from alsace_dist.data.rows import answers_of
    from alsace_dist.models.family import Options, family_of

    family = family_of(directory)
    yield Finding("ok", "model", f"{directory}: {family.describe(family.load_config(directory))}")
    answers = answers_of(config.task, config.data.languages or sorted(config.task.answers()))
    model = family(directory, answers, Options.of(config))
    yield Finding("ok", "answers", f"{answers.num_candidates or 'any number'} per example, {model.answers_in_words}")
    for remark in model.check_weights(may_be_new=config.finetune is not None):
        yield Finding("warning", "weights", remark)
    yield Finding("ok", "weights", "names and shapes are those of config.json")


def _check_hub(name: str, path: str, revision: str | None, kind: Literal["model", "dataset"]) -> Finding:
    """Ask the hub for a name. Without a network this is only a warning: the files may be in the cache."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().repo_info(path, revision=revision, repo_type=kind, timeout=20)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        remedy = f"correct the name or the revision, log in if it is not public, or give a local path ({_kind(error)})"
        return Finding("FAILED", name, f"{path}: neither a local path nor a {kind} on the hub; {remedy}")
    except Exception as error:  # no network, a proxy, offline mode: the client raises dozens of kinds
        text = f"{path}: the hub cannot be asked ({_kind(error)}); it works if the {kind} is in the cache already"
        return Finding("warning", name, text)
    return Finding("ok", name, f"{path}: on the hub; downloaded when the run starts")


def _kind(error: Exception) -> str:
    """The kind of an error without its text, which may quote addresses with what is secret in them."""
    return type(error).__name__


def _one_line(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 300 else text[:297] + "..."
