"""Builds cpu.cpp once for this CPU, keeps it in the user's cache, and calls it on tensors through ctypes."""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import launch  # noqa: F401  before torch; so everybody imports what is ours before what is not

import torch
import torch.nn.functional as F
from torch import Tensor

COMPILER = os.environ.get("CXX", "g++")  # the rule of torch.compile
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-w"]
MAX_ROWS = 16  # beyond, a library product is faster
SCRATCH = 2**22  # weights that are dequantized at a time
BITS = {torch.bfloat16: 16, torch.int8: 8, torch.uint8: 4}


def cpu_features() -> str:
    """What -march=native depends on: a home directory may be shared between hosts."""
    return next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith(("flags", "Features"))), "")


def cores() -> int:
    """Physical cores that this process may use, shared out among the local ranks of torchrun: a product that waits for
    memory gains nothing from hyperthreads. A user's OMP_NUM_THREADS holds; that of torchrun does not."""
    if "OMP_NUM_THREADS" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ:
        return torch.get_num_threads()
    siblings = [Path(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in os.sched_getaffinity(0)]
    physical = {path.read_text() if path.exists() else str(path) for path in siblings}
    return max(1, len(physical) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def read_sealed(path: Path) -> bytes | None:
    """What write_sealed wrote; None where it is not there, was damaged, cut short or renamed."""
    data = path.read_bytes() if path.exists() else b""
    return data[:-32] if hashlib.sha256(path.name.encode() + data[:-32]).digest() == data[-32:] else None


def write_sealed(path: Path, data: bytes) -> None:
    """Write a file that ends with the SHA-256 of its name and of the rest, renamed into place, for this user alone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileNotFoundError), tempfile.NamedTemporaryFile(dir=path.parent) as file:  # it misses what is renamed
        file.write(data + hashlib.sha256(path.name.encode() + data).digest())
        file.flush()
        os.replace(file.name, path)


def build(folder: Path, flags: list[str]) -> ctypes.CDLL:
    """Load the library for `flags` from `folder`, built first where it is missing or not whole; two processes that start
    together only do the work twice. OSError, CalledProcessError where it fails."""
    source = Path(__file__).with_name("cpu.cpp").read_bytes()
    command = [COMPILER, *flags]
    key = hashlib.sha256(source + repr((command, cpu_features())).encode()).hexdigest()[:24]
    path = folder / f"cpu-{key}.so"
    if read_sealed(path) is None:
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / "cpu.so"
            subprocess.run([*command, "-x", "c++", "-", "-o", made], input=source, check=True, capture_output=True)
            write_sealed(path, made.read_bytes())
    return ctypes.CDLL(str(path))


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None with one line on stderr where they cannot be built."""
    try:  # Path.home: RuntimeError for a user without a home
        loaded = build(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_cpu_kernels", FLAGS)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"no CPU kernels, so decoding is several times slower: install a C++ compiler ({error})", file=sys.stderr)
        return None
    for name, count in (("linear", 10), ("dequantize", 9), ("attention", 11)):
        getattr(loaded, name).argtypes = [ctypes.c_void_p] * count  # numbers too: all but a flag are as wide as a pointer
    return loaded


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether cpu.cpp takes these activations [..., in] and this stored weight."""
    whole = x.shape[-1] % 32 == 0 and weight.dtype in BITS and weight.is_contiguous()
    return whole and x.dtype in (torch.bfloat16, torch.float32) and library() is not None


def _weight(n_in: int, weight: Tensor, scale: Tensor | None, minimum: Tensor | None) -> tuple:
    """A stored weight as cpu.cpp takes it: pointers, bits, group size, inputs, outputs."""
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (weight, scale, minimum)]
    groupsize = 0 if minimum is None else n_in // minimum.shape[1]
    return *pointers, BITS[weight.dtype], groupsize, n_in, weight.shape[0]


def few_rows(x: Tensor, *weight: Tensor | None) -> Tensor:
    """`kernels.linear` of up to MAX_ROWS rows in bfloat16."""
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], weight[0].shape[0])
    library().linear(x.data_ptr(), x.numel() // x.shape[-1], *_weight(x.shape[-1], *weight), y.data_ptr())
    return y


_scratch = cache(lambda dtype: torch.empty(SCRATCH, dtype=dtype))  # made once, because fresh memory is slow


def many_rows(x: Tensor, *weight: Tensor | None) -> Tensor:
    """`kernels.linear` by a library product on slabs of the dequantized weight, which stay in the last-level cache."""
    (n_out, _), n_in = weight[0].shape, x.shape[-1]
    y, slab = x.new_empty(*x.shape[:-1], n_out), max(1, SCRATCH // n_in)
    for start in range(0, n_out, slab):
        part = [None if tensor is None else tensor[start : start + slab] for tensor in weight]
        restored = _scratch(x.dtype)[: len(part[0]) * n_in].view(-1, n_in)
        library().dequantize(*_weight(n_in, *part), x.dtype == torch.float32, restored.data_ptr())
        y[..., start : start + slab] = F.linear(x, restored)
    return y


def attention(qkv: Tensor, rope: Tensor, input_pos: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """`kernels.attention` of a batch of one and up to MAX_ROWS rows in bfloat16."""
    (_, rows, width), (_, n_kv_head, positions, head_dim) = qkv.shape, k_cache.shape
    n_head, pointers = width // head_dim - 2 * n_kv_head, [k_cache.data_ptr(), v_cache.data_ptr()]
    qkv, rope, y = qkv.contiguous(), rope.contiguous(), qkv.new_empty(1, rows, n_head * head_dim)
    shape = int(input_pos[0]), rows, n_head, n_kv_head, head_dim, positions
    library().attention(qkv.data_ptr(), rope.data_ptr(), *shape, *pointers, y.data_ptr())
    return y
