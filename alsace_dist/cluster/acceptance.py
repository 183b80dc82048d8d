"""What Slurm would take and never start, or start nothing after: looked for before anything is submitted."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from alsace_dist.cluster import queue
from alsace_dist.cluster.profile import seconds_of
from alsace_dist.errors import UserError

# With what sbatch --test-only refuses a job that would wait and then start.
_NOT_NOW = ("partition not available", "node not available", "nodes are busy")
_NO_SUCH_NODES = "node configuration is not available"  # too much is asked for, or nodes are down
_AWAY = ("DOWN", "DRAIN", "FAIL", "MAINT", "NOT_RESPONDING", "UNKNOWN", "*")


def check_after(text: str) -> list[str]:
    """The ids in ``--after``. Raises ``UserError`` if they are none, or jobs after which nothing would ever start."""
    ids = text.split(",")
    if bad := next((one for one in ids if not re.fullmatch(r"[1-9][0-9]*", one)), None):
        raise UserError(f"--after={text}: {bad!r} is no job's id; give those that sbatch has printed, comma-separated")
    states = queue.job_states(ids)
    for one in ids:
        if one not in states:
            raise UserError(f"--after={one}: Slurm knows no such job; leave the flag out if it has ended")
        if not states[one].is_alive and states[one].state != "COMPLETED":
            ended = states[one].state.lower()
            raise UserError(f"--after={one}: that job has ended ({ended}), nothing would start after it; leave it out")
    return ids


def check_array(num_tasks: int) -> None:
    """Raises ``UserError`` if the cluster's arrays have no numbers for so many tasks."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", queue.call(["scontrol", "show", "config"]), re.MULTILINE)
    if found and num_tasks > int(found[1]):
        raise UserError(
            f"--seeds: the sweep would have {num_tasks} seeds, but Slurm numbers an array's tasks only up to "
            f"{int(found[1]) - 1} here (MaxArraySize); give fewer, or another run_dir"
        )


def check_scripts(scripts: Sequence[Path]) -> None:
    """Raises ``UserError`` if Slurm would take one of the scripts and never start it, for sbatch looks less closely at
    a job that is held or waits for another. That nodes are down now is no reason to refuse."""
    text = queue.call(["scontrol", "show", "partition", "--all", "--oneliner"])
    partitions = [_fields(line) for line in text.splitlines()]
    seen: list[dict[str, str]] = []
    for script in scripts:
        asked = _asked(script)
        request = {name: value for name, value in asked.items() if name not in ("job-name", "output")}
        if request not in seen:
            seen.append(request)
            wanted = asked.get("partition")
            its = [
                row
                for row in partitions
                if (row.get("PartitionName") in wanted.split(",") if wanted else row.get("Default") == "YES")
            ]
            problems = [_beyond(row, asked) for row in its]
            if problems and all(problems):
                raise UserError(f"{problems[0]}; nothing is submitted")
            _test(script, asked, {row["PartitionName"] for row in its})


def _asked(script: Path) -> dict[str, str]:
    """What a script's #SBATCH lines ask for: option without dashes -> value."""
    lines = script.read_text(encoding="utf-8").splitlines()
    options = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH --")]
    return {name: "".join(shlex.split(value)) for name, _, value in options}


def _beyond(partition: dict[str, str], asked: dict[str, str]) -> str:
    """In what a job is beyond a partition's limits, in words; empty if in nothing."""
    name, nodes = partition["PartitionName"], int(asked["nodes"])
    if nodes > (available := int(partition.get("TotalNodes", nodes))):
        return f"--nodes={nodes}: partition {name} has {available} nodes; ask for fewer"
    if "qos" in asked:  # which may lift the partition's other limits
        return ""
    if (most := partition.get("MaxNodes", "")).isdigit() and nodes > int(most):
        return f"--nodes={nodes}: partition {name} gives a job at most {most} nodes; ask for fewer"
    longest = partition.get("MaxTime", "")
    if longest[:1].isdigit() and seconds_of(asked["time"]) > seconds_of(longest):
        return f"time: {asked['time']} is beyond the limit of partition {name}, {longest}; ask for less"
    return ""


def _test(script: Path, asked: dict[str, str], partitions: set[str]) -> None:
    try:
        queue.call(["sbatch", "--test-only", str(script)])
    except queue.NoSlurm:
        raise
    except UserError as error:
        said = str(error).lower()
        is_waiting = any(phrase in said for phrase in _NOT_NOW)
        if not is_waiting and not (_NO_SUCH_NODES in said and _would_fit(asked, partitions)):
            raise UserError(f"{error} ({script.name}); nothing is submitted") from None
        print("some of the nodes are not available now; the jobs wait for them", file=sys.stderr)


def _would_fit(asked: dict[str, str], partitions: set[str]) -> bool:
    """Whether a job would fit on a partition's nodes if none were down, by what their configuration says of them."""
    rows = [_fields(line) for line in queue.call(["scontrol", "show", "node", "--all", "--oneliner"]).splitlines()]
    cpus = int(asked["cpus-per-task"]) * int(asked["ntasks-per-node"])
    gpus = _num_gpus("gpu:" + asked["gpus-per-node"]) if "gpus-per-node" in asked else _num_gpus(asked.get("gres", ""))
    able = [
        row.get("State", "")
        for row in rows
        if partitions & set(row.get("Partitions", "").split(","))
        and int(row.get("CPUTot", 0)) >= cpus
        and int(row.get("RealMemory", 0)) >= _megabytes(asked.get("mem", "0"))
        and _num_gpus(row.get("Gres", "")) >= gpus
    ]
    return len(able) >= int(asked["nodes"]) and any(word in state for state in able for word in _AWAY)


def _num_gpus(resources: str) -> int:
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^,:(]+)?:(\d+)", resources))


def _megabytes(memory: str) -> float:
    """Of memory as Slurm writes it; 0 if it is not to be read."""
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", memory.upper())
    return int(found[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[found[2]] if found else 0


def _fields(line: str) -> dict[str, str]:
    """A line of scontrol."""
    return dict(part.split("=", 1) for part in line.split() if "=" in part)
