"""Operators on a CPU: calls of cpu.cpp through ctypes, where it takes them, and the captured step.

cpu.cpp takes few rows in bfloat16; in a product any number, on a CPU with AVX2 alone. Everything else is the reference
implementation in model.py.
"""

import ctypes
import struct
import sys
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import model
import sampling
from kernels.build import load_library

aten = torch.ops.aten
MAX_ROWS = 16  # for more rows, F.linear (oneDNN, MKL) is faster
# But not on a CPU with AVX2 alone, where oneDNN's bfloat16 takes four times as long as ours.
HAS_FAST_BFLOAT16 = torch.backends.cpu.get_cpu_capability() != "AVX2"
MAX_HEAD_DIM = 1024  # cpu.cpp has buffers for no more
BITS = {torch.bfloat16: 16, torch.int8: 8, torch.uint8: 4}
GROUPSIZES = (0, 32, 64, 128, 256)  # 0: no groups
DEQUANT_BUFFER = torch.empty(2**22)  # for a part of a dequantized weight, because fresh memory is slow


def has_cpu_kernel(x: Tensor) -> bool:
    """True if cpu.cpp has kernels for x [..., channels]: bfloat16, contiguous, at most MAX_ROWS rows."""
    is_supported = x.is_cpu and x.dtype == torch.bfloat16 and x.is_contiguous()
    return is_supported and x.numel() <= MAX_ROWS * x.shape[-1] and load_library() is not None


def word(argument: Tensor | float | None) -> int:
    """An argument as cpu.cpp reads it: 8 bytes, which are an address, an integer or a double."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return int.from_bytes(struct.pack("<d", argument), "little", signed=True)
    return argument or 0


def call(operation: str, *arguments: Tensor | float | None) -> tuple:
    """Run an operation of cpu.cpp: a pair of addresses, as `replay` takes it, and the words at the second."""
    words = (ctypes.c_int64 * len(arguments))(*map(word, arguments))
    phases = ctypes.c_char.in_dll(load_library(), operation)
    pair = (ctypes.c_void_p * 2)(ctypes.addressof(phases), ctypes.addressof(words))
    load_library().execute(pair)
    return pair, words


def run_op(operation: str, x: Tensor, n_out: int, *others: Tensor | float | None, dtype=torch.bfloat16) -> Tensor:
    """Run an operation on rows x [..., n_in]: y [..., n_out]. `others` are its arguments between n_out and y."""
    shape = (*x.shape[:-1], n_out)
    graph = CpuGraph.capturing[0] if CpuGraph.capturing else None
    y = graph.buffer(shape, dtype) if graph else torch.empty(shape, dtype=dtype)
    rows = x.numel() // x.shape[-1]
    pair, words = call(operation, x, rows, x.shape[-1], n_out, *others, y)
    if graph:
        graph.calls += pair
        graph.keep_alive.append(words)
    return y


def kernel_fits(x: Tensor, weight: Tensor, groupsize: int) -> bool:
    """True if cpu.cpp has kernels for a weight stored like this, and for the dtype of x."""
    n_in = x.shape[-1]
    is_stored = weight.dtype in BITS and weight.is_contiguous() and groupsize in GROUPSIZES and n_in % 32 == 0
    return is_stored and x.dtype in (torch.bfloat16, torch.float32) and load_library() is not None


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, minimum: Tensor | None, residual=None) -> Tensor:
    """torch.ops.llama.linear."""
    n_in, n_out = x.shape[-1], len(weight)
    groupsize = 0 if minimum is None else n_in // minimum.shape[1]
    if not kernel_fits(x, weight, groupsize):
        return model.linear(x, weight, scale, minimum, residual)
    # With more rows F.linear is faster for float weights; quantized ones would have to be dequantized for it.
    max_rows = MAX_ROWS if scale is None else 4 * MAX_ROWS
    if x.dtype == torch.bfloat16 and (x.numel() <= max_rows * n_in or not HAS_FAST_BFLOAT16):
        return run_op("linear", x, n_out, weight, scale, minimum, BITS[weight.dtype], groupsize, residual)
    if scale is None:
        return model.linear(x, weight, None, None, residual)
    y = linear_in_parts(x, weight, scale, minimum, groupsize)
    return y if residual is None else residual + y


def linear_in_parts(x: Tensor, weight: Tensor, scale: Tensor, minimum: Tensor | None, groupsize: int) -> Tensor:
    """F.linear with each part of a weight, dequantized into a buffer that stays in the CPU's cache."""
    n_in, n_out = x.shape[-1], len(weight)
    y = x.new_empty(*x.shape[:-1], n_out)
    count = max(1, len(DEQUANT_BUFFER) // n_in)  # output channels
    is_float32 = x.dtype == torch.float32
    for start in range(0, n_out, count):
        channels = slice(start, start + count)
        part = [None if tensor is None else tensor[channels] for tensor in (weight, scale, minimum)]
        buffer = DEQUANT_BUFFER.view(x.dtype)[: len(part[0]) * n_in].view(-1, n_in)
        call("dequantize", None, *buffer.shape, 0, *part, BITS[weight.dtype], groupsize, None, buffer, is_float32)
        y[..., channels] = F.linear(x, buffer)
    return y


def attention(qkv: Tensor, rope: Tensor, input_pos: Tensor, cache: Tensor) -> Tensor:
    """torch.ops.llama.attention."""
    _, batch, n_kv_head, positions, head_dim = cache.shape
    is_supported = batch == 1 and cache.dtype == qkv.dtype and cache.is_contiguous() and head_dim <= MAX_HEAD_DIM
    if not is_supported or not has_cpu_kernel(qkv):
        return model.attention(qkv, rope, input_pos, cache)
    n_out = qkv.shape[-1] - 2 * n_kv_head * head_dim
    return run_op("attention", qkv, n_out, rope, input_pos, n_kv_head, positions, head_dim, cache[0], cache[1])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch.ops.llama.rms_norm."""
    if not has_cpu_kernel(x):
        return model.rms_norm(x, weight, eps)
    return run_op("rms_norm", x, x.shape[-1], weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """torch.ops.llama.swiglu."""
    if not has_cpu_kernel(x):
        return model.swiglu(x)
    return run_op("swiglu", x, x.shape[-1] // 2, None, 0.0)


def sample(logits: Tensor, input_pos: Tensor, seed: Tensor, temperature: Tensor, *limits: float) -> Tensor:
    """torch.ops.llama.sample."""
    if not (logits.dtype == torch.bfloat16 and len(logits) <= MAX_ROWS and load_library()):
        return sampling.sample_reference(logits, input_pos, seed, temperature, *limits)
    others = logits.stride(0), input_pos, seed, temperature, *limits
    return run_op("sample", logits, 1, *others, dtype=torch.int64)[:, 0]


class CpuGraph(TorchDispatchMode):
    """The calls of a step, captured while it runs once, and replayed by one call of cpu.cpp.

    A step is `replayable` if nothing but cpu.cpp computes in it. Its results keep their addresses, and new inputs are
    copied to the addresses of the first ones.
    """

    NO_COMPUTE = (aten.slice.Tensor, aten.select.int, aten.unbind.int, aten.alias.default, aten.empty.memory_format)
    capturing: ClassVar[list["CpuGraph"]] = []  # at most one

    def run_operator(self, operator, types: list, args: tuple = (), kwargs: dict | None = None) -> object:
        """Run an operator of PyTorch, or cpu.cpp's embedding; notice an operator that cannot be replayed."""
        x, *others = args
        if operator == aten.embedding.default and has_cpu_kernel(x[:1]) and x.is_contiguous():
            return run_op("embedding", others[0][..., None], x.shape[1], x, 0.0)
        count = len(self.calls)
        result = operator(*args, **(kwargs or {}))
        if operator in self.NO_COMPUTE:
            self.keep_alive.append(args)  # a view needs the memory, although the tensor itself is gone
        elif len(self.calls) == count:
            self.replayable = False
        return result

    def buffer(self, shape: tuple, dtype: torch.dtype) -> Tensor:
        """Memory for a result: a buffer that is no longer referenced, or a new one."""
        counts = [sys.getrefcount(y) for y in self.buffers]
        for y, count in zip(self.buffers, counts, strict=True):
            # buffers[0] is never handed out, so its count is that of a free one.
            if count == counts[0] and y.shape == shape and y.dtype == dtype:
                return y
        self.buffers.append(torch.empty(shape, dtype=dtype))
        return self.buffers[-1]

    def capture(self, step: Callable[..., Tensor], inputs: Tensor, args: tuple) -> Tensor:
        """Run `step` (model, inputs, ...), in which `args` are the others, and note its calls: its result."""
        self.captured_args = args
        self.calls = []
        self.keep_alive = [inputs]
        self.buffers = [torch.empty(0)]
        self.replayable = True
        try:
            self.capturing.append(self)
            with self:
                self.samples = step(args[0], inputs, *args[1:])
        finally:
            self.capturing.clear()
        self.calls = (ctypes.c_void_p * len(self.calls))(*self.calls)
        return self.samples

    def replay(self, inputs: Tensor) -> Tensor:
        """Replay the calls with new inputs: the result, which the next replay overwrites."""
        self.keep_alive[0].copy_(inputs)
        threads = ctypes.c_long(torch.get_num_threads())
        load_library().replay(self.calls, ctypes.c_long(len(self.calls) // 2), threads)
        return self.samples


# Not a method of that name, because torch would wrap it in its compiler, which takes a second to import.
CpuGraph.__torch_dispatch__ = CpuGraph.run_operator
