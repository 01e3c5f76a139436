"""Decoding beside processes that keep a core busy each."""

import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.worker import Worker

COUNTS = (0, 1, 2)  # of busy processes


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run n processes that compute without end, for the block."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def load_test(workers: dict[str, Worker], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a token alone, and the factor of that beside one and two busy processes: medians, in turn."""
    seconds: dict[str, dict[int, list[float]]] = {label: {count: [] for count in COUNTS} for label in workers}
    for _ in range(rounds):
        for count in COUNTS:
            with busy_processes(count):
                for label, worker in workers.items():
                    seconds[label][count].append(worker.ask("answer", 16, 16)["decode"])
    results = {}
    for label, by_count in seconds.items():
        alone, one, two = [statistics.median(values) for values in by_count.values()]
        results[label] = {"ms": 1000 * alone, "1": one / alone, "2": two / alone}
    return results
