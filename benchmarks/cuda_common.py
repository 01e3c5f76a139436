"""Random weights on a GPU, and times of its work, for benchmarks/cuda.py."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.memory import bandwidth

SCHEMES = {"bf16": None, "int8": {"mode": "int8"}}
SCHEMES |= {f"g{size}": {"mode": "int4", "groupsize": size} for size in (32, 64, 128)}
DEVICE = "cuda"


def fill_random(module: torch.nn.Module) -> None:
    """Fill the weights of a module with random values of about the size of trained ones."""
    for name, tensor in module.state_dict().items():
        if "norm" in name:
            tensor.fill_(1)
        elif name.endswith("scale"):
            tensor.fill_(0.02 / 64 if tensor.dim() == 1 else 0.02 / 4)
        elif name.endswith("minimum"):
            tensor.fill_(-0.04)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.02)
        elif tensor.dtype == torch.int8:
            tensor.random_(-127, 128)
        else:
            tensor.random_(0, 256)


def read_speed() -> float:
    """Read bandwidth in GB/s, a median."""
    return statistics.median(bandwidth(DEVICE) for _ in range(7))


def milliseconds(work: Callable[[], object], repeats: int = 7) -> float:
    """Time from the call until the device has done all of it, a median."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def graph_milliseconds(work: Callable[[], object]) -> float:
    """Time of the device alone: in a CUDA graph, the host's work between kernels costs nothing."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    return milliseconds(graph.replay)
