"""Is a cluster fit for a run? One task on every node of a job says what it sees; rank 0 compares and names bad nodes.

Nodes meet in a shared directory first, which needs no network, then at the first node's port, then in pairs.
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alsace_dist.errors import UserError
from alsace_dist.files.manifest import read_json, write_json
from alsace_dist.ranks.job import GPUS_PER_NODE

if TYPE_CHECKING:
    import torch

MEET_SECONDS = 60.0  # time for every node to start and to be seen
PAIR_SECONDS = 30.0
CLOCK_SECONDS = 10.0
PAIR_BYTES = 32 * 2**20
MAX_CLOCK_SECONDS = 2.0  # more, and make, rsync and the order of log lines are fooled
MAX_USED_BYTES = 2 * 10**9  # bytes in use on a free GPU; the driver alone takes some hundred MB
PACKAGES = ("alsace_dist", "torch", "deepspeed", "transformers", "tokenizers", "safetensors")
Finding = tuple[bool, str, str]  # ok, what was checked, what was found


def check_node(directory: Path) -> None:
    """One node's part, as rank RANK of WORLD_SIZE tasks; ``directory``: one that all nodes share, of this job alone.

    The first rank that is there prints the findings of all. Raises ``UserError`` there if something is wrong.
    """
    rank, num_nodes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    write_json(directory / f"node{rank:04d}.json", {"name": name, "versions": _versions(), "gpus": list(_gpus())})
    present = _collect(directory, "node", num_nodes, MEET_SECONDS).keys()
    network: dict[str, Any] = {"store": "", "clock": None, "pairs": {}}
    try:
        if 0 not in present:
            raise UserError("the first node is not there to open it")
        store = _store(rank)
        network["clock"] = _clock(store, rank, present)
        for other in opponents(rank, num_nodes):
            if other in present:
                network["pairs"][other] = _try_pair(store, rank, other)
    except (RuntimeError, UserError) as error:
        network["store"] = " ".join(str(error).split())[:200] or type(error).__name__
    write_json(directory / f"network{rank:04d}.json", network)
    if rank == min(present):
        findings = list(_compare(directory, num_nodes))
        for is_ok, what, text in findings:
            print(f"{'ok' if is_ok else 'FAILED':<8} {what:<14} {text}", flush=True)
        if bad := [text for is_ok, _, text in findings if not is_ok]:
            raise UserError(f"doctor: {bad[0]}; keep bad nodes away with `exclude` in the site profile")


# --- what a node sees ----------------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def _gpus() -> Iterator[dict[str, Any]]:
    """Name, bytes in use, memory errors, and what is wrong with a product computed on it, of every GPU."""
    import torch

    errors = _memory_errors()
    for index in range(torch.cuda.device_count()):
        gpu = {"name": "", "used_bytes": 0, "errors": errors.get(index, 0), "problem": ""}
        try:
            free, total = torch.cuda.mem_get_info(index)
            gpu |= {"name": torch.cuda.get_device_name(index), "used_bytes": total - free}
            ones = torch.ones(512, 512, device=f"cuda:{index}")
            if not bool(((ones @ ones) == 512).all()):
                gpu["problem"] = "computes wrongly"
        except RuntimeError as error:
            gpu["problem"] = f"fails: {' '.join(str(error).split())[:100]}"
        yield gpu


def _memory_errors() -> dict[int, int]:
    """GPU -> uncorrected memory errors since the driver was loaded, where nvidia-smi tells."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
    text = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False).stdout
    rows = [line.split(",") for line in text.splitlines() if "," in line]
    return {int(index): int(count) for index, count in rows if count.strip().isdigit()}


# --- the network ---------------------------------------------------------------------------------------------------


def _store(rank: int) -> Any:
    """The store at the first node's port, where a run's ranks would meet."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=MEET_SECONDS)
    return TCPStore(address, port, is_master=rank == 0, timeout=timeout, wait_for_workers=False)


def _clock(store: Any, rank: int, present: Iterable[int]) -> float:
    """How far this node's clock is ahead of rank 0's, in seconds, to within half a message's way there and back."""
    if rank:
        store.get(f"ask{rank}")
        store.set(f"time{rank}", repr(time.time()))
        return float(store.get(f"ahead{rank}"))
    for other in sorted(set(present) - {0}):
        begin = time.time()
        store.set(f"ask{other}", "?")
        try:
            store.wait([f"time{other}"], timedelta(seconds=CLOCK_SECONDS))
        except RuntimeError:  # that node does not reach the port, and says so in its own findings
            continue
        theirs = float(store.get(f"time{other}"))
        store.set(f"ahead{other}", repr(theirs - (begin + time.time()) / 2))
    return 0.0


def opponents(rank: int, num_nodes: int) -> Iterator[int]:
    """The nodes that this one is paired with, in turn: every node meets every other once, all pairs of a turn at the
    same time (round-robin by the circle method)."""
    size = num_nodes + num_nodes % 2
    for turn in range(size - 1):
        if rank == size - 1:
            other = turn * (size // 2) % (size - 1)  # the node that would meet itself: 2 x = turn
        else:
            other = (turn - rank) % (size - 1)
            other = size - 1 if other == rank else other
        if other < num_nodes:
            yield other


def _try_pair(store: Any, rank: int, other: int) -> dict[str, Any]:
    """An all-reduce between two nodes, on the GPU if there is one: bytes per second, or what went wrong."""
    import torch
    from torch import distributed as dist

    pair = dist.PrefixStore(f"pair{min(rank, other)}-{max(rank, other)}", store)
    place, timeout = int(rank > other), timedelta(seconds=PAIR_SECONDS)
    store.set_timeout(timeout)
    try:
        group: Any
        if torch.cuda.is_available():
            torch.cuda.set_device(0)
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            group, device = dist.ProcessGroupNCCL(pair, place, 2, options), torch.device("cuda", 0)
        else:
            group, device = dist.ProcessGroupGloo(pair, place, 2, timeout), torch.device("cpu")
        data = torch.ones(PAIR_BYTES // 4, device=device)
        _all_reduce(group, data)  # the first all-reduce connects, so it is not timed
        begin = time.monotonic()
        _all_reduce(group, data)
        seconds = time.monotonic() - begin
        return {"bytes_per_second": PAIR_BYTES / seconds, "error": "" if bool((data == 4).all()) else "a wrong sum"}
    except RuntimeError as error:
        return {"bytes_per_second": 0.0, "error": " ".join(str(error).split())[:200] or type(error).__name__}


def _all_reduce(group: Any, data: "torch.Tensor") -> None:
    import torch

    group.allreduce([data]).wait()
    if data.is_cuda:
        torch.cuda.synchronize()


# --- the comparison ------------------------------------------------------------------------------------------------


def _compare(directory: Path, num_nodes: int) -> Iterator[Finding]:
    nodes = _collect(directory, "node", num_nodes, 0)
    names = {rank: node["name"] for rank, node in nodes.items()}
    hosts = _host_names()
    missing = [dict(enumerate(hosts)).get(rank, f"rank {rank}") for rank in range(num_nodes) if rank not in nodes]
    text = f"{len(nodes)} of {num_nodes} write into {directory}: {', '.join(names.values())}"
    yield (
        not missing,
        "nodes",
        text + (f"; not seen: {', '.join(missing)} (of this job's other nodes)" if missing else ""),
    )
    yield from _compare_versions(nodes, names)
    yield from _compare_gpus(nodes, names)
    network = _collect(directory, "network", len(nodes), MEET_SECONDS + num_nodes * PAIR_SECONDS)
    yield from _compare_network(network, names)


def _host_names() -> list[str]:
    """The job's nodes, in the order of their tasks; none where Slurm's programs are not, as in a container."""
    if shutil.which("scontrol") is None or "SLURM_JOB_NODELIST" not in os.environ:
        return []
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.split()


def _collect(directory: Path, kind: str, num_nodes: int, seconds: float) -> dict[int, dict[str, Any]]:
    """Rank -> what the rank has written, of all ranks that have written within some seconds."""
    deadline = time.monotonic() + seconds
    while len(found := sorted(directory.glob(f"{kind}[0-9]*.json"))) < num_nodes and time.monotonic() < deadline:
        time.sleep(0.2)
    return {int(path.stem.removeprefix(kind)): read_json(path) for path in found}


def _compare_versions(nodes: dict[int, dict[str, Any]], names: dict[int, str]) -> Iterator[Finding]:
    usual = Counter(json.dumps(node["versions"]) for node in nodes.values()).most_common(1)[0][0]
    is_same = True
    for rank, node in nodes.items():
        for package, version in json.loads(usual).items():
            if node["versions"][package] != version:
                is_same = False
                yield False, "versions", f"{names[rank]}: {package} {node['versions'][package]}, elsewhere {version}"
    if is_same:
        yield True, "versions", ", ".join(f"{package} {version}" for package, version in json.loads(usual).items())


def _compare_gpus(nodes: dict[int, dict[str, Any]], names: dict[int, str]) -> Iterator[Finding]:
    wanted = int(os.environ.get(GPUS_PER_NODE, 0))
    are_well = True
    for rank, node in nodes.items():
        problems = [f"torch sees {len(node['gpus'])} GPUs of {wanted}"] if len(node["gpus"]) < wanted else []
        for index, gpu in enumerate(node["gpus"]):
            if gpu["used_bytes"] > MAX_USED_BYTES:
                problems.append(f"GPU {index} is in use, {gpu['used_bytes'] / 1e9:.0f} GB")
            if gpu["errors"]:
                problems.append(f"GPU {index} has {gpu['errors']} uncorrected memory errors")
            if gpu["problem"]:
                problems.append(f"GPU {index} {gpu['problem']}")
        for problem in problems:
            are_well = False
            yield False, "GPUs", f"{names[rank]}: {problem}"
    if are_well:
        kinds = sorted({gpu["name"] for node in nodes.values() for gpu in node["gpus"]})
        yield True, "GPUs", f"{wanted} a node, free and well: {', '.join(kinds)}" if kinds else "none; the CPUs compute"


def _compare_network(network: dict[int, dict[str, Any]], names: dict[int, str]) -> Iterator[Finding]:
    port = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    for rank, node in network.items():
        if node["store"]:
            yield False, "network", f"{names[rank]}: cannot use {port}: {node['store']}"
    clocks = {rank: node["clock"] for rank, node in network.items() if node["clock"] is not None}
    if wrong := {rank: ahead for rank, ahead in clocks.items() if abs(ahead) > MAX_CLOCK_SECONDS}:
        for rank, ahead in wrong.items():
            yield False, "clocks", f"{names[rank]}: {ahead:+.1f} s from the first node's"
    elif clocks:
        yield True, "clocks", f"within {max(map(abs, clocks.values())):.3f} s"
    pairs = {
        (rank, int(other)): result
        for rank, node in network.items()
        for other, result in node["pairs"].items()
        if rank < int(other)
    }
    failed = [pair for pair, result in pairs.items() if result["error"]]
    if failed:
        times = Counter(rank for pair in failed for rank in pair)
        rank, count = times.most_common(1)[0]
        first = pairs[failed[0]]["error"]
        worst = f"{names.get(rank, f'rank {rank}')}: in {count} of {len(failed)} pairs that fail"
        yield False, "pairs", f"{worst} ({len(pairs)} pairs tried); {first}"
    elif pairs:
        slowest = min(pairs, key=lambda pair: pairs[pair]["bytes_per_second"])
        speed = pairs[slowest]["bytes_per_second"] / 1e9
        ends = " and ".join(names[rank] for rank in slowest)
        text = f"{len(pairs)} all-reduced {PAIR_BYTES / 2**20:.0f} MiB; slowest {speed:.2f} GB/s, between {ends}"
        yield True, "pairs", text
