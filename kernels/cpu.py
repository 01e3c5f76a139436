"""Builds cpu.cpp once for this CPU, keeps it in the user's cache, and calls it on tensors through ctypes."""

import ctypes
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

COMPILER = os.environ.get("CXX") or "g++"  # a command line, as for make: "ccache g++"
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-w"]
SOURCE = Path(__file__).with_name("cpu.cpp")
MAX_ROWS = 16  # beyond, a library product is faster
MAX_HEAD_DIM = 1024  # cpu.cpp has room for no more
SCRATCH = 2**22  # weights that are dequantized at a time
BITS = {torch.bfloat16: 16, torch.int8: 8, torch.uint8: 4}


def cpu_features() -> str:
    """The features that -march=native depends on: a home directory may be shared between hosts."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def quota(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs that the container's quota allows; infinity without one. cgroup v2 has one file, v1 has two."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        if all((cgroup / file).exists() for file in files):
            allowed, period = " ".join((cgroup / file).read_text() for file in files).split()
            return float("inf") if allowed in ("max", "-1") else int(allowed) / int(period)
    return float("inf")


def cores() -> int:
    """Threads to use: physical cores that affinity and quota leave us, shared out among torchrun's local ranks.

    A product that waits for memory gains nothing from hyperthreads. OMP_NUM_THREADS holds, but
    not under torchrun, which sets it.
    """
    if "OMP_NUM_THREADS" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ:
        return torch.get_num_threads()
    siblings = [Path(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in os.sched_getaffinity(0)]
    physical = {path.read_text() if path.exists() else str(path) for path in siblings}
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, int(min(len(physical), quota())) // ranks)


def compile_to(path: Path, flags: list[str]) -> None:
    """Compile cpu.cpp into the shared library `path`. ValueError names the compiler's fault."""
    try:
        command = [*shlex.split(COMPILER), *flags, str(SOURCE), "-o", str(path)]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{COMPILER}: {reason}: install a C++ compiler, or name one in CXX") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.splitlines() or [f"status {error.returncode}"])[-1]
        raise ValueError(f"{COMPILER} does not compile cpu.cpp ({said}): it takes GCC 11 or later") from error


def build(folder: Path, flags: list[str]) -> ctypes.CDLL:
    """Load the library for `flags` from `folder`, built first where it is missing or does not load.

    Two processes that start together only do the work twice. OSError where the folder is no place for it.
    """
    key = repr((SOURCE.read_text(), COMPILER, flags, cpu_features()))
    path = folder / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # not there, damaged, or of an image with other libraries
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            compile_to(made, flags)
            loaded = ctypes.CDLL(str(made))
            os.replace(made, path)
        return loaded


def build_in_memory(flags: list[str]) -> ctypes.CDLL:
    """Build and load the library for this process alone, where no folder can be written to or executed from."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "cpu.so"
        compile_to(made, flags)
        memory = os.memfd_create(made.name)
        os.write(memory, made.read_bytes())
    return ctypes.CDLL(f"/proc/self/fd/{memory}")


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None with one line on stderr where they cannot be built."""
    try:
        try:
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            loaded = build(home / "llama_cpu_kernels", FLAGS)
        except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
            print(f"CPU kernels built for this run only: {error}: set XDG_CACHE_HOME to a folder", file=sys.stderr)
            loaded = build_in_memory(FLAGS)
    except (OSError, ValueError) as error:
        print(f"no CPU kernels, so decoding is several times slower: {error}", file=sys.stderr)
        return None
    for name, count in (("linear", 10), ("dequantize", 9), ("attention", 11)):
        getattr(loaded, name).argtypes = [ctypes.c_void_p] * count  # numbers too: all are as wide as a pointer
    return loaded


def takes_product(x: Tensor, weight: Tensor, minimum: Tensor | None) -> bool:
    """Whether cpu.cpp multiplies these activations [..., in] with this stored weight."""
    n_in = x.shape[-1]
    groupsize = 32 if minimum is None else n_in // minimum.shape[1]
    sizes = n_in % 32 == 0 and 0 < n_in <= SCRATCH and groupsize >= 32 and groupsize.bit_count() == 1
    dtypes = x.dtype in (torch.bfloat16, torch.float32) and weight.dtype in BITS
    return sizes and dtypes and weight.is_contiguous() and library() is not None


def takes_attention(qkv: Tensor, cache: Tensor) -> bool:
    """Whether cpu.cpp computes attention for these projections [B, S, channels] and this cache."""
    batch, rows, _ = qkv.shape
    sizes = batch == 1 and rows <= MAX_ROWS and cache.shape[4] <= MAX_HEAD_DIM
    return sizes and qkv.is_cpu and qkv.dtype == cache.dtype == torch.bfloat16 and library() is not None


def _stored(n_in: int, weight: Tensor, scale: Tensor | None, minimum: Tensor | None) -> tuple:
    """A stored weight as cpu.cpp takes it: three pointers, bits, group size, inputs, outputs."""
    groupsize = 0 if minimum is None else n_in // minimum.shape[1]
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (weight, scale, minimum)]
    return *pointers, BITS[weight.dtype], groupsize, n_in, weight.shape[0]


def multiply_few(x: Tensor, *weight: Tensor | None) -> Tensor:
    """`x` [..., in] in bfloat16, a few rows, times a stored weight (weight, scale, minimum), which is read once."""
    n_in = x.shape[-1]
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], weight[0].shape[0])
    library().linear(x.data_ptr(), x.numel() // n_in, *_stored(n_in, *weight), y.data_ptr())
    return y


@cache
def _scratch(dtype: torch.dtype) -> Tensor:
    """Where weights are restored; made once, because fresh memory is slow."""
    return torch.empty(SCRATCH, dtype=dtype)


def multiply_many(x: Tensor, *weight: Tensor | None) -> Tensor:
    """`x` [..., in], many rows, times a stored weight: library products on slabs, restored within the cache."""
    n_in, n_out = x.shape[-1], weight[0].shape[0]
    y = x.new_empty(*x.shape[:-1], n_out)
    slab = SCRATCH // n_in
    for start in range(0, n_out, slab):
        rows = slice(start, start + slab)
        part = [None if tensor is None else tensor[rows] for tensor in weight]
        restored = _scratch(x.dtype)[: len(part[0]) * n_in].view(-1, n_in)
        library().dequantize(*_stored(n_in, *part), x.dtype == torch.float32, restored.data_ptr())
        y[..., rows] = F.linear(x, restored)
    return y


def attend(qkv: Tensor, rope: Tensor, input_pos: Tensor, cache: Tensor) -> Tensor:
    """`kernels.attention` of a batch of one and up to MAX_ROWS rows in bfloat16."""
    _, rows, channels = qkv.shape
    _, _, n_kv_head, positions, head_dim = cache.shape
    n_head = channels // head_dim - 2 * n_kv_head
    qkv, rope = qkv.contiguous(), rope.contiguous()
    y = qkv.new_empty(1, rows, n_head * head_dim)
    shape = (int(input_pos[0]), rows, n_head, n_kv_head, head_dim, positions)
    caches = (cache[0].data_ptr(), cache[1].data_ptr())
    library().attention(qkv.data_ptr(), rope.data_ptr(), *shape, *caches, y.data_ptr())
    return y
