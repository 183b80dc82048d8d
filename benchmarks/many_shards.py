"""What 10^5 shards cost where nothing is computed: starts, dealing, the end of scoring, and `select`.

    python benchmarks/many_shards.py [--shards 100000] [--groups-per-shard 66] [--languages 15] [--directory runs/many]

Generates the manifest of a dataset of so many shards (not the shards themselves, which none of these steps opens) and
the score files of all of them, with random scores; then takes each step in a process of its own, and prints its
seconds, those of the processor, and the most memory that the process ever had (interpreter and libraries, the first
row, included). 100,000 shards of 66 groups in 15 languages are 10^8 rows; to generate them takes most of an hour, and
`--keep` leaves them for the next time.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet  # noqa: F401 (before a step begins: to load it takes most of a second)

from alsace_dist.config import Config
from alsace_dist.data.dealing import Part, deal, most_batches
from alsace_dist.data.results import Results
from alsace_dist.data.stream import CanonicalOrder
from alsace_dist.data.texts import TEXTS, TextCounts
from alsace_dist.files import scores as score_files
from alsace_dist.files import shards as shard_files
from alsace_dist.files.manifest import FileEntry, file_entry, load_manifest, write_manifest
from alsace_dist.files.scores import Scores, write_scores
from alsace_dist.files.shards import open_dataset
from alsace_dist.files.written import Written, take_over
from alsace_dist.stages.select import make_selection

LABELS = ["no", "maybe", "yes"]
GLOBAL_BATCH = 1024
MEGABYTE = 1e6
FINGERPRINT = "0" * 64


def main() -> None:
    """Parse the flags; generate and measure, or, as a child, take one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--groups-per-shard", type=int, default=66)
    parser.add_argument("--languages", type=int, default=15)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--directory", type=Path, default=Path("runs/many-shards"))
    parser.add_argument("--keep", action="store_true", help="leave the files, and use those of the same size")
    parser.add_argument("--step", choices=list(STEPS), help="of the program itself: take this step alone")
    flags = parser.parse_args()
    if flags.step:
        take(STEPS[flags.step], flags.directory, flags.ranks)
        return
    size = f"{flags.shards}-{flags.groups_per_shard}-{flags.languages}"
    world = flags.directory / size
    begin = time.monotonic()
    if not (world / "scores/manifest.json").exists():
        generate(world, flags.shards, flags.groups_per_shard, flags.languages)
    rows = flags.shards * flags.groups_per_shard * flags.languages
    print(f"{flags.shards:,} shards, {rows:,} rows, {flags.ranks} ranks; generated in {time.monotonic() - begin:.0f} s")
    print("| step | seconds | of the processor | peak MB |\n|---|---|---|---|")
    for name in STEPS:
        command = [sys.executable, __file__, f"--step={name}", f"--directory={world}", f"--ranks={flags.ranks}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        found = json.loads(done.stdout)
        print(f"| {name} | {found['seconds']:.2f} | {found['cpu']:.2f} | {found['peak'] / MEGABYTE:.0f} |", flush=True)
    if not flags.keep:
        shutil.rmtree(world)


# --- files -----------------------------------------------------------------------------------------------------------


def generate(world: Path, num_shards: int, groups_per_shard: int, num_languages: int) -> None:
    """The manifest of a dataset and the scores of all of its shards."""
    languages = ["en", *(f"l{number:02d}" for number in range(1, num_languages))]
    num_examples = dict.fromkeys(sorted(languages), groups_per_shard)
    shards, entries = [], {}
    for number in range(num_shards):
        name = f"{number:06d}.tar"
        shards.append({"name": name, "num_groups": groups_per_shard, "num_examples": num_examples})
        entries[name] = FileEntry(bytes=10_000, sha256=f"{number:064x}")
    write_manifest(world / "data", shard_files.KIND, {}, [], {"shards": shards, "labels": LABELS}, entries)
    texts = json.dumps({name: TextCounts(num_rows=groups_per_shard).model_dump() for name in languages})
    rng = np.random.default_rng(0)
    entries = {}
    for number in range(num_shards):
        path = world / f"scores/{number:06d}.parquet"
        if not path.exists():  # a start that was ended goes on
            rows = random_scores(rng, number, groups_per_shard, sorted(languages))
            write_scores(path, rows, {"fingerprint": FINGERPRINT, "shard": f"{number:064x}", TEXTS: texts})
        entries[path.name] = file_entry(path)
    details = {"num_examples": num_shards * sum(num_examples.values()), TEXTS: {key: {} for key in languages}}
    take_over(world / "scores", entries)  # as if the scores were not complete
    write_manifest(world / "scores", score_files.KIND, {}, [], details, entries)


def random_scores(rng: np.random.Generator, shard: int, num_groups: int, languages: list[str]) -> Scores:
    """Rows whose languages are each biased in another way, so that there is something to calibrate."""
    truths = rng.integers(len(LABELS), size=num_groups)
    logits = rng.normal(size=(num_groups, len(languages), len(LABELS)))
    logits += 2 * np.eye(len(LABELS))[truths][:, None] + np.linspace(0, 2, len(languages))[:, None] * [1, 0, -1]
    log_probs = (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))).astype(np.float32)
    keys = [f"group-{shard}-{number}" for number in range(num_groups) for _ in languages]
    return Scores(keys, languages * num_groups, list(log_probs.reshape(-1, len(LABELS))), [None] * len(keys))


def config_of(world: Path) -> Config:
    """A config whose unlabeled groups these are."""
    return Config.model_validate(
        {
            "run_dir": str(world / "run"),
            "task": {"fields": ["text"], "template": "{text}", "labels": LABELS},
            "data": {"directory": str(world / "data"), "source_language": "en"},
            "model": {"path": str(world / "model")},
        }
    )


def results_of(world: Path) -> Results:
    """The score files, which say that they are of some model."""
    return Results(world / "scores", {"fingerprint": FINGERPRINT}, Written(world / "scores", 0))


# --- steps -----------------------------------------------------------------------------------------------------------


def take(step: Callable[[Path, int], Callable[[], object]], world: Path, num_ranks: int) -> None:
    """Prepare a step, take it and print what it took, as JSON."""
    run = step(world, num_ranks)
    begin, cpu_begin = time.monotonic(), time.process_time()
    run()
    found = {"seconds": time.monotonic() - begin, "cpu": time.process_time() - cpu_begin, "peak": peak_memory()}
    print(json.dumps(found))


def peak_memory() -> int:
    """In bytes. What ``getrusage`` says a child has from the process that started it, and keeps."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def nothing(world: Path, num_ranks: int) -> Callable[[], object]:
    """What every process of these takes before it begins."""
    return lambda: None


def opening(world: Path, num_ranks: int) -> Callable[[], object]:
    """Open the dataset, as every rank and every stage does."""
    return lambda: open_dataset(world / "data")


def opening_again(world: Path, num_ranks: int) -> Callable[[], object]:
    """Open it once more in the same process."""
    open_dataset(world / "data")
    return lambda: open_dataset(world / "data")


def dealing(world: Path, num_ranks: int) -> Callable[[], object]:
    """Deal all shards to the ranks."""
    shards = open_dataset(world / "data").shards
    config = config_of(world)

    return lambda: deal(shards, num_ranks, partial(most_batches, config))


def order(world: Path, num_ranks: int) -> Callable[[], object]:
    """Make the canonical order, and find the examples of the second last step of three passes."""
    counts = [sum(shard.num_examples.values()) for shard in open_dataset(world / "data").shards]

    def locate() -> None:
        found = CanonicalOrder(counts, GLOBAL_BATCH, seed=0)
        step = max(0, found.num_steps(3) - 2)
        for slot in range(GLOBAL_BATCH):
            found.locate(step, slot)

    return locate


def looking(world: Path, num_ranks: int) -> Callable[[], object]:
    """Find which shards of one rank's share have scores already."""
    parts = [Part(shard) for shard in open_dataset(world / "data").shards[::num_ranks]]
    results = results_of(world)

    def look() -> None:
        assert all(results.is_done(part) for part in parts)

    return look


def checking(world: Path, num_ranks: int) -> Callable[[], object]:
    """Check the files of one rank's share at the end of scoring."""
    shards = open_dataset(world / "data").shards[::num_ranks]
    return lambda: results_of(world).finish(shards, {})


def completing(world: Path, num_ranks: int) -> Callable[[], object]:
    """Write the manifest over the files of all ranks, and read it."""
    found = load_manifest(world / "scores", score_files.KIND)

    def complete() -> None:
        write_manifest(world / "complete", score_files.KIND, {}, [], found.details, found.files)
        assert load_manifest(world / "complete", score_files.KIND).digest == found.digest

    return complete


def selecting(world: Path, num_ranks: int) -> Callable[[], object]:
    """Select teachers, with calibration."""
    config = config_of(world)
    return lambda: make_selection(config, world / "scores")


STEPS: dict[str, Callable[[Path, int], Callable[[], object]]] = {
    "nothing": nothing,
    "open the dataset": opening,
    "open it again": opening_again,
    "deal its shards": dealing,
    "canonical order": order,
    "find what is done, one rank": looking,
    "check what is done, one rank": checking,
    "complete the scores": completing,
    "select": selecting,
}


if __name__ == "__main__":
    main()
