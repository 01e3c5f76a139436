"""Faster implementations of the operators of model.py and sampling.py, and the captured step. Nothing depends on them.

Importing this package registers the operators of cpu.py for a CPU, and those of cuda.py for CUDA.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import cache
from operator import is_not
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model
import sampling
from kernels import cpu
from kernels.build import load_library

CUDA_ROWS = 4 * cpu.MAX_ROWS  # attention, norms, SwiGLU and sampling have kernels on CUDA up to here


@cache
def cuda_kernels_for(dtype: torch.dtype) -> ModuleType | None:
    """kernels/cuda.py if the GPU runs it for rows of `dtype`; None, with a line on stderr, if not."""
    reason = "they take bfloat16, and a GPU of compute capability 8.0"
    try:
        from kernels import cuda  # noqa: PLC0415  Triton may be absent

        if dtype == torch.bfloat16 and torch.cuda.get_device_capability() >= (8, 0):
            weight = torch.zeros(16, 32, dtype=dtype, device="cuda")
            cuda.linear(weight[:1], weight, None, None)
            return cuda
    except Exception as error:  # Triton also needs a C compiler, Python's headers and the driver
        reason = str(error).partition("\n")[0]
    print(f"no CUDA kernels for {dtype}, so decoding is several times slower: {reason}", file=sys.stderr)
    return None


def compile_kernels(model: model.Transformer) -> None:
    """Compile kernels/cpu.cpp, or find out if the GPU runs kernels/cuda.py, before an answer waits for it."""
    weight = model.layers[0].attention.wqkv.weight
    if weight.is_cuda:
        cuda_kernels_for(model.norm.weight.dtype)
    elif weight.dtype in cpu.BITS:
        load_library()


def is_small(x: Tensor, max_rows: int) -> bool:
    """True if x [..., channels] has at most `max_rows` rows."""
    return x.numel() <= max_rows * x.shape[-1]


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, minimum: Tensor | None, residual=None) -> Tensor:
    """torch.ops.llama.linear on CUDA."""
    cuda = cuda_kernels_for(x.dtype)
    if cuda and x.shape[-1] % 32 == 0 and is_small(x, cpu.MAX_ROWS):
        return cuda.linear(x, weight, scale, minimum, residual)
    if cuda and scale is not None:
        weight, scale, minimum = cuda.dequantize(weight, scale, minimum), None, None
    return model.linear(x, weight, scale, minimum, residual)


def attention(qkv: Tensor, rope: Tensor, input_pos: Tensor, cache: Tensor) -> Tensor:
    """torch.ops.llama.attention on CUDA."""
    _, batch, _, _, head_dim = cache.shape
    is_supported = batch == 1 and cache.dtype == qkv.dtype and cache.is_contiguous() and head_dim <= 256
    if is_supported and is_small(qkv, CUDA_ROWS) and (cuda := cuda_kernels_for(qkv.dtype)):
        return cuda.attention(qkv, rope, input_pos, cache)
    if is_small(qkv, cpu.MAX_ROWS):
        return model.attention(qkv, rope, input_pos, cache)
    return prompt_attention(qkv, rope, input_pos, cache)


def prompt_attention(qkv: Tensor, rope: Tensor, input_pos: Tensor, cache: Tensor) -> Tensor:
    """The same for many rows: SDPA takes a causal bias object, so that no mask is in memory."""
    from torch.nn.attention.bias import causal_lower_right  # noqa: PLC0415  it imports the compiler

    q = model.update_cache(qkv, rope, input_pos, cache)
    length = int(input_pos[-1]) + 1
    keys, values = cache[:, :, :, :length]
    mask = causal_lower_right(q.shape[2], length)
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch.ops.llama.rms_norm on CUDA."""
    cuda = cuda_kernels_for(x.dtype) if is_small(x, CUDA_ROWS) else None
    return cuda.rms_norm(x, weight, eps) if cuda else model.rms_norm(x, weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """torch.ops.llama.swiglu on CUDA."""
    cuda = cuda_kernels_for(x.dtype) if is_small(x, CUDA_ROWS) else None
    return cuda.swiglu(x) if cuda else model.swiglu(x)


def sample(logits: Tensor, input_pos: Tensor, seed: Tensor, temperature: Tensor, *limits: float) -> Tensor:
    """torch.ops.llama.sample on CUDA."""
    cuda = cuda_kernels_for(logits.dtype) if is_small(logits, CUDA_ROWS) else None
    implementation = cuda.sample if cuda else sampling.sample_reference
    return implementation(logits, input_pos, seed, temperature, *limits)


library = torch.library.Library("llama", "IMPL")
for name in ("linear", "attention", "rms_norm", "swiglu", "sample"):
    library.impl(name, getattr(cpu, name), "CPU")
    library.impl(name, globals()[name], "CUDA")


def new_graph(x: Tensor):
    """A CUDA graph or CPU program for steps with rows like x [..., channels], or None."""
    if x.is_cuda:
        cuda = cuda_kernels_for(x.dtype)
        return cuda.CudaGraph() if cuda else None
    return cpu.CpuGraph() if cpu.has_cpu_kernel(x) else None


def decode_ahead(engine, token: int, params) -> Iterator[int]:
    """generate.Engine.decode on CUDA: each pass starts before the sample of the one before is read.

    So the device never waits for the host. When an answer ends, one pass too many has run; its position is not cached.
    """
    host_samples = torch.empty(2, 1, dtype=torch.int64, pin_memory=True)  # used in turn
    inputs = torch.tensor([[token], [len(engine.cached_ids)]], device=engine.device)
    engine.reserve(len(engine.cached_ids) + 1)
    samples = engine.start_pass(inputs, params)
    for i in itertools.count():
        host_samples[i % 2].copy_(samples, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        if len(engine.cached_ids) + 1 < engine.max_seq_length:
            if len(engine.cached_ids) + 2 > engine.kv_cache[-1].shape[3]:
                torch.cuda.synchronize()  # because a larger cache drops a graph that may still run
            engine.reserve(len(engine.cached_ids) + 2)
            inputs = torch.stack([samples.clamp(min=0), inputs[1] + 1])  # -1 means non-finite logits; read() raises
            samples = engine.start_pass(inputs, params)
        copied.synchronize()
        engine.cached_ids.append(token)
        [token] = engine.read(host_samples[i % 2])
        yield token


class CapturedStep:
    """`step` (model, inputs [2, S], ...), captured once for each number of rows S, and replayed from then on.

    The inputs may be on the CPU, wherever the model is. A step is captured again if another model, cache or parameters
    are given than before. What cannot be captured runs eagerly.
    """

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self.step = step
        self.graphs: dict = {}  # the key is the number of rows

    def __call__(self, model: nn.Module, inputs: Tensor, *others: object) -> Tensor:
        """Run the step. The result is overwritten by the next call."""
        args = (model, *others)
        graph = self.graphs.get(inputs.shape[1])
        if graph is None or any(map(is_not, graph.captured_args, args)):
            graph = new_graph(model.norm.weight)
            if graph is not None:
                samples = graph.capture(self.step, inputs, args)
                self.graphs[inputs.shape[1]] = graph  # not if it was interrupted
                return samples
        elif graph.replayable:
            return graph.replay(inputs)
        return self.step(model, inputs.to(model.norm.weight.device), *others)
