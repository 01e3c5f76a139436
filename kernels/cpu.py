"""Loads cpu.cpp as build.sh builds it, and calls its operations on tensors, through ctypes.

A step of few rows in bfloat16 is a `Program`: recorded while it runs once, and repeated without Python from then on.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
BUILD = Path(__file__).with_name("build.sh")
FLAGS: list[str] = []  # of the compiler, beside those of build.sh
MAX_ROWS = 16  # beyond, a library product is faster
MAX_HEAD_DIM = 1024  # cpu.cpp has room for no more
BITS = {torch.bfloat16: 16, torch.int8: 8, torch.uint8: 4}
GROUPSIZES = (0, 32, 64, 128, 256)  # 0: no groups


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
    return max(1, int(min(len(physical), quota())) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@cache
def library() -> ctypes.CDLL | None:
    """The kernels as build.sh makes them; None without them, with a line on stderr that says why."""
    with tempfile.TemporaryDirectory() as scratch:
        for again in ([], ["--again"]):  # what was kept may be damaged, need other libraries, or lie where nothing runs
            made = subprocess.run(["bash", str(BUILD), scratch, *again, *FLAGS], capture_output=True, text=True)
            sys.stderr.write(made.stderr)
            if made.returncode != 0:
                return None
            with suppress(OSError):
                return ctypes.CDLL(made.stdout.strip())
    print("no CPU kernels, so decoding is several times slower: they do not load", file=sys.stderr)
    return None


def takes_rows(x: Tensor | float) -> bool:
    """Whether cpu.cpp does what a step does with x [..., channels] beside products: up to MAX_ROWS in bfloat16."""
    # The compiler is asked first: a compiled step is not to depend on the number of rows.
    known = not torch.compiler.is_compiling() and isinstance(x, Tensor) and x.is_cpu and x.dtype == torch.bfloat16
    return known and x.is_contiguous() and x.numel() <= MAX_ROWS * x.shape[-1] and library() is not None


def execute(operation: str, *arguments: Tensor | int | None) -> tuple:
    """Run an operation of cpu.cpp: the call, a pair of addresses, and the words that lie at the second."""
    numbers = [each.data_ptr() if isinstance(each, Tensor) else each or 0 for each in arguments]
    words = (ctypes.c_int64 * len(numbers))(*numbers)
    phases = ctypes.c_char.in_dll(library(), operation)
    call = (ctypes.c_void_p * 2)(ctypes.addressof(phases), ctypes.addressof(words))
    library().execute(call)
    return call, words


def compute(operation: str, x: Tensor, n_out: int, *others: Tensor | int | None, dtype=torch.bfloat16) -> Tensor:
    """Run an operation on x [..., n_in]: [..., n_out]. `others` are the arguments that not every operation has."""
    shape = (*x.shape[:-1], n_out)
    y = Program.recording[0].buffer(shape, dtype) if Program.recording else torch.empty(shape, dtype=dtype)
    call, words = execute(operation, x, x.numel() // x.shape[-1], x.shape[-1], n_out, *others, y)
    for program in Program.recording:
        program.calls += call
        program.kept.append(words)
    return y


class Program(TorchDispatchMode):
    """The operations of a step, recorded while it runs once.

    If nothing but operations of cpu.cpp has computed, it is `complete`: the same calls can be repeated on the same
    addresses. Results of the first time are kept for that, and new inputs are copied over the first ones.
    """

    VIEWS = (aten.slice.Tensor, aten.select.int, aten.unbind.int, aten.empty.memory_format)  # these compute nothing
    recording: ClassVar[list["Program"]] = []  # at most one

    def run_operator(self, operator, types: list, args: tuple = (), kwargs: dict | None = None) -> object:
        """Run an operator of PyTorch, two of them by cpu.cpp with equal bits; note one that cannot be repeated."""
        x, *others = args
        if operator == aten.embedding.default and takes_rows(x[:1]) and x.is_contiguous():
            return compute("embedding", others[0][..., None], x.shape[1], x, 0)
        if operator == aten.add.Tensor and all(map(takes_rows, args)) and x.shape == others[0].shape and not kwargs:
            return compute("add", x, x.shape[-1], *others, 0)
        count = len(self.calls)
        result = operator(*args, **(kwargs or {}))
        if operator in self.VIEWS:
            self.kept.append(args)  # somebody has its memory, though not the tensor itself
        elif len(self.calls) == count:
            self.complete = False
        return result

    def buffer(self, shape: tuple, dtype: torch.dtype) -> Tensor:
        """Memory for a result: that of an earlier one that nobody has any more, or new."""
        counts = [sys.getrefcount(y) for y in self.buffers]
        for y, count in zip(self.buffers, counts, strict=True):
            if count == counts[0] and y.shape == shape and y.dtype == dtype:  # nobody gets the first, which is empty
                return y
        self.buffers.append(torch.empty(shape, dtype=dtype))
        return self.buffers[-1]

    def record(self, step: Callable[..., Tensor], inputs: Tensor, given: tuple) -> Tensor:
        """Run a `step` (model, inputs, ...), of which the others are `given`, and note its calls: the samples."""
        self.given = given
        self.calls = []
        self.kept = [inputs]
        self.buffers = [torch.empty(0)]
        self.complete = True
        self.recording.append(self)
        try:
            with self:
                self.samples = step(given[0], inputs, *given[1:])
        finally:
            self.recording.pop()
        self.calls = (ctypes.c_void_p * len(self.calls))(*self.calls)
        return self.samples

    def replay(self, inputs: Tensor) -> Tensor:
        """Repeat the calls: the samples, which hold until the next time."""
        self.kept[0].copy_(inputs)
        library().replay(self.calls, ctypes.c_long(len(self.calls) // 2), ctypes.c_long(torch.get_num_threads()))
        return self.samples


# Not in the class: there torch would wrap it in its compiler, which takes a second to import.
Program.__torch_dispatch__ = Program.run_operator
