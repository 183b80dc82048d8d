"""What watching costs a training: the share of its steps that is none of their parts; and by itself.

    python benchmarks/monitor_cost.py RUN [RUN ...]

Of every training in a run's directory: from its metrics.jsonl the share of a step outside its parts, median over the
readings. All that the monitor does is in there but what losses observe, and so are the exchange of flags between ranks
and what checkpoints make a step wait: an upper bound. Beside it, in milliseconds, medians of 200: what a loss of 64
rows of 24 languages observes, and a reading of as many languages, written to metrics.jsonl and TensorBoard; and what
the stopwatch adds to a phase with 100 collectives.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from alsace_dist.monitor.sinks import METRICS, Places, ScalarWriter, read_scalars
from alsace_dist.monitor.training import PHASES

PARTS = tuple(f"{name}_seconds" for name in PHASES)
NUM_TIMES, NUM_LANGUAGES, NUM_ROWS, NUM_ANSWERS, NUM_COLLECTIVES = 200, 24, 64, 7, 100


def main() -> None:
    """Parse the flags, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    print("| training | milliseconds a step | share outside its parts |")
    print("|---|---|---|")
    for run in parser.parse_args().runs:
        for path in sorted(run.rglob(METRICS)):
            rows = [row for row in read_scalars(path) if all(name in row for name in (*PARTS, "step_seconds"))]
            if rows:
                shares = [1 - sum(row[name] for name in PARTS) / row["step_seconds"] for row in rows]
                step = 1000 * median(row["step_seconds"] for row in rows)
                print(f"| {path.parent.relative_to(run.parent)} | {step:.1f} | {median(shares):.1%} |")
    print(f"\nobserving {NUM_ROWS} rows: {median_ms(observing()):.2f} ms; a reading: {median_ms(reading()):.2f} ms")
    print(f"timing a phase with {NUM_COLLECTIVES} collectives: {timing_ms():.2f} ms")


def median_ms(action: Callable[[], object]) -> float:
    """Milliseconds that it takes."""
    return median(elapsed_ms(action) for _ in range(NUM_TIMES))


def elapsed_ms(action: Callable[[], object]) -> float:
    """Milliseconds that it takes once."""
    begin = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - begin)


def observing() -> Callable[[], object]:
    """What a loss observes of a micro-batch."""
    import torch

    from alsace_dist.training.observer import Observer

    torch.set_num_threads(1)
    observer = Observer([f"l{number}" for number in range(NUM_LANGUAGES)], NUM_ANSWERS)
    places, counts = torch.arange(NUM_ROWS) % NUM_LANGUAGES, torch.ones(NUM_ROWS)
    log_probs = torch.randn(NUM_ROWS, NUM_ANSWERS).log_softmax(-1)
    return lambda: observer.sums(places, counts, log_probs, log_probs.exp())


def timing_ms() -> float:
    """Milliseconds that the stopwatch adds to a phase with collectives, of one process with itself."""
    import torch
    import torch.distributed as dist

    from alsace_dist.monitor.stopwatch import Stopwatch

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    watch, numbers = Stopwatch(torch.device("cpu")), torch.ones(3)

    def collectives() -> None:
        for _ in range(NUM_COLLECTIVES):
            dist.all_reduce(numbers)

    def timed() -> None:
        with watch.phase("forward"):
            collectives()

    found = median(
        elapsed_ms(timed) - elapsed_ms(collectives) for _ in range(NUM_TIMES)
    )  # in turns: machines are noisy
    dist.destroy_process_group()
    return found


def reading() -> Callable[[], object]:
    """What is written at a reading."""
    directory = Path(tempfile.mkdtemp(prefix="monitor-cost-"))
    writer, values = ScalarWriter(Places(directory, directory / "board"), 0, is_main=True), dict.fromkeys(PARTS, 0.5)
    values |= {
        f"{name}/l{number}": 0.5 for name in ("agreement_of", "divergence_of") for number in range(NUM_LANGUAGES)
    }
    steps = iter(range(1, NUM_TIMES + 1))
    return lambda: writer.write(next(steps), values)


if __name__ == "__main__":
    main()
