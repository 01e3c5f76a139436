"""Memory speed: the bytes that a token reads, and the bandwidth at which this machine reads.

Decoding a token reads all weights but the embedding table once, and the keys and values so far. These bytes over read
bandwidth are the least time that a token takes; that over the measured time is the share of memory speed.
"""

import os
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

import tp
from model import ModelArgs

SOURCE = Path(__file__).with_name("read_bandwidth.cpp")


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights that decoding a token reads: all but the embedding table."""
    return sum(t.nbytes for name, t in model.state_dict().items() if name != "tok_embeddings.weight")


def kv_bytes(args: ModelArgs, positions: float, itemsize: int = 2) -> float:
    """Bytes of the keys and values of n positions."""
    return 2 * args.n_layer * args.n_kv_head * args.head_dim * itemsize * positions


def bytes_per_token(weights: int, args: ModelArgs, prompt: int, tokens: int) -> float:
    """Bytes that decoding one token reads, on average over `tokens` after `prompt`: weights, and the cache halfway."""
    return weights + kv_bytes(args, prompt + tokens / 2)


def share(tokens_per_second: float, bytes_per_token: float, bandwidth: float) -> float:
    """The share of memory speed, of a `bandwidth` in GB/s."""
    return tokens_per_second * bytes_per_token / (bandwidth * 1e9)


def process_memory() -> dict[str, float]:
    """GB of memory that this process holds: anonymous, and mapped from files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    keys = {"anonymous": "RssAnon", "mapped": "RssFile"}
    return {name: int(lines[key].split()[0]) / 1e6 for name, key in keys.items()}


def bandwidth(device: str) -> float:
    """GB/s at which the memory of `device` is read."""
    if device == "cuda":
        return cuda_bandwidth()
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        return torch_bandwidth()
    program = Path(tempfile.gettempdir()) / f"read_bandwidth-{os.getuid()}"
    if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
        subprocess.run([*compiler, "-O3", "-march=native", "-fopenmp", SOURCE, "-o", program], check=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(tp.num_threads())}
    output = subprocess.check_output([program, "3"], env=environment, text=True)
    return statistics.median(map(float, output.split()))


def torch_bandwidth() -> float:
    """GB/s of a sum by PyTorch, if there is no C++ compiler."""
    data = torch.zeros(2**27, dtype=torch.int64)
    start = time.perf_counter()
    data.sum()
    return data.nbytes / (time.perf_counter() - start) / 1e9


def cuda_bandwidth() -> float:
    """GB/s of a sum of a GiB on a GPU."""
    data = torch.zeros(2**28, device="cuda")
    start, end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    data.sum()
    start.record()
    data.sum()
    end.record()
    torch.cuda.synchronize()
    return data.nbytes / start.elapsed_time(end) / 1e6
