"""The operators that decide the speed of decoding: products with stored weights, and attention; a kernel for each.

`Linear` and `attention` hold for every device and number of rows. Where there is no kernel, they are PyTorch's
operators.
"""

import sys
from collections.abc import Callable
from functools import cache
from operator import is_not
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import cpu

CUDA_ROWS = 4 * cpu.MAX_ROWS  # for so few attention and norms have kernels on CUDA: fewer launches by the host
SLAB = torch.empty(2**22)  # where weights are dequantized, so many at a time: fresh memory is slow


class Linear(nn.Module):
    """A product with a weight that is stored in 16, 8 or 4 bits: see `dequantize` for the layouts.

    The stored form is multiplied as it is, so loading packs nothing. Until `lay_out` is called it is a float weight.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.n_in = n_in
        self.n_out = n_out
        self.register_buffer("weight", torch.empty(n_out, n_in))
        self.register_buffer("scale", None)
        self.register_buffer("minimum", None)

    def lay_out(self, bits: int, groupsize: int) -> None:
        """Say how the weight is stored, before it is loaded: in 16 bits (as it is), 8, or 4 by groups."""
        if bits == 8:
            self.weight = torch.empty(self.n_out, self.n_in, dtype=torch.int8)
            self.scale = torch.empty(self.n_out, dtype=torch.float32)
        elif bits == 4:
            self.weight = torch.empty(self.n_out, self.n_in // 2, dtype=torch.uint8)
            self.scale = torch.empty(self.n_out, self.n_in // groupsize, dtype=torch.bfloat16)
            self.minimum = torch.empty_like(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., n_in] times the transpose of the weight: [..., n_out] in the dtype of `x`."""
        return torch.ops.llama.linear(x.contiguous(), self.weight, self.scale, self.minimum)


class RMSNorm(nn.RMSNorm):
    """Root mean square normalization of the channels, https://arxiv.org/abs/1910.07467"""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., dim] to the same shape."""
        if cpu.takes_rows(x):
            return cpu.compute("rms_norm", x, x.shape[-1], self.weight, round(self.eps * 1e12))
        if x.is_cuda and x.numel() <= CUDA_ROWS * x.shape[-1]:
            return torch.ops.llama.rms_norm(x.contiguous(), self.weight, self.eps)
        return super().forward(x)


def swiglu(x: Tensor) -> Tensor:
    """silu of the first half of the channels times the second half, https://arxiv.org/abs/2002.05202"""
    if cpu.takes_rows(x):
        return cpu.compute("swiglu", x, x.shape[-1] // 2, None, 0)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def dequantize(weight: Tensor, scale: Tensor | None, minimum: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in `dtype`, from any of the three stored layouts.

    16 bits: `weight` [out, in] is float. 8 bits: `weight` int8 [out, in] * `scale` [out]. 4 bits: `weight` uint8
    [out, in / 2], the even input channel in the low nibble, * `scale` + `minimum`, both [out, in / groupsize].
    Rounded once, at the end.
    """
    if scale is None:
        return weight.to(dtype)
    if minimum is None:
        return torch.mul(weight, scale[:, None], out=torch.empty_like(weight, dtype=dtype))
    pairs = torch.stack([weight & 15, weight >> 4], dim=-1)
    levels = pairs.view(*scale.shape, -1)  # [out, groups, groupsize]
    wide = torch.promote_types(dtype, scale.dtype)
    restored = torch.addcmul(minimum.to(wide)[..., None], levels, scale.to(wide)[..., None])
    return restored.flatten(1).to(dtype)


@cache
def cuda_kernels(dtype: torch.dtype) -> ModuleType | None:
    """kernels/cuda.py where the GPU runs it for rows of `dtype`; None, with a line on stderr, where not."""
    reason = "they take bfloat16, and a GPU of compute capability 8.0"
    try:
        from kernels import cuda  # noqa: PLC0415  Triton may be absent

        if dtype == torch.bfloat16 and torch.cuda.get_device_capability() >= (8, 0):
            weight = torch.zeros(16, 32, dtype=dtype, device="cuda")
            cuda.linear(weight[:1], weight, None, None)
            return cuda
    except Exception as error:  # Triton also wants a C compiler, Python's headers and the driver, each in its own way
        reason = str(error).partition("\n")[0]
    print(f"no CUDA kernels for {dtype}, so decoding is several times slower: {reason}", file=sys.stderr)
    return None


def on_cuda(x: Tensor, most: int) -> ModuleType | None:
    """kernels/cuda.py where it takes x [..., channels], up to `most` rows; None where PyTorch's operators do."""
    few = x.is_cuda and x.numel() <= most * x.shape[-1]
    return cuda_kernels(x.dtype) if few else None


def new_program(x: Tensor) -> cpu.Program | None:
    """What can record a step of rows like x [..., channels]; None where nothing can."""
    if cuda := on_cuda(x, cpu.MAX_ROWS):
        return cuda.Graph()
    return cpu.Program() if cpu.takes_rows(x) else None


class Recorded:
    """`step` (model, inputs [2, S], ...) of few rows, repeated without Python between its kernels where possible.

    The inputs may lie on the CPU, wherever the model does. Each number of rows is recorded when it first occurs, and
    again where anything that the step is given beside the inputs is another object than before.
    """

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self.step = step
        self.programs: dict[int, cpu.Program] = {}  # by the number of rows

    def __call__(self, model: nn.Module, inputs: Tensor, *others: object) -> Tensor:
        """What the step returns, which holds until the next one."""
        given = (model, *others)
        program = self.programs.get(inputs.shape[1])
        if program is None or any(map(is_not, program.given, given)):
            program = new_program(model.norm.weight)
            if program is not None:
                samples = program.record(self.step, inputs, given)
                self.programs[inputs.shape[1]] = program  # unless it was interrupted
                return samples
        elif program.complete:
            return program.replay(inputs)
        return self.step(model, inputs.to(model.norm.weight.device), *others)


def _linear(x: Tensor, weight: Tensor, scale: Tensor | None, minimum: Tensor | None) -> Tensor:
    """The operator llama.linear."""
    n_in, n_out = x.shape[-1], len(weight)
    if n_in % 32 == 0 and (cuda := on_cuda(x, cpu.MAX_ROWS)):
        return cuda.linear(x, weight, scale, minimum)
    if scale is not None and x.is_cuda and (cuda := cuda_kernels(x.dtype)):
        return F.linear(x, cuda.dequantize(weight, scale, minimum))
    groupsize = 0 if minimum is None else n_in // minimum.shape[1]
    stored = weight.dtype in cpu.BITS and weight.is_contiguous() and groupsize in cpu.GROUPSIZES and n_in % 32 == 0
    if not x.is_cpu or x.dtype not in (torch.bfloat16, torch.float32) or not stored or cpu.library() is None:
        return F.linear(x, dequantize(weight, scale, minimum, x.dtype))
    form = (cpu.BITS[weight.dtype], groupsize)
    # From so many rows on the library reads a float weight faster; a quantized one would have to be restored first.
    most = cpu.MAX_ROWS if scale is None else 4 * cpu.MAX_ROWS
    if x.dtype == torch.bfloat16 and x.numel() <= most * n_in:
        return cpu.compute("linear", x, n_out, weight, scale, minimum, *form)
    if scale is None:
        return F.linear(x, weight.to(x.dtype))
    y = x.new_empty(*x.shape[:-1], n_out)
    count = max(1, len(SLAB) // n_in)  # library products on slabs, restored within the cache
    for start in range(0, n_out, count):
        slab = slice(start, start + count)
        part = [None if tensor is None else tensor[slab] for tensor in (weight, scale, minimum)]
        restored = SLAB.view(x.dtype)[: len(part[0]) * n_in].view(-1, n_in)
        cpu.execute("dequantize", None, *restored.shape, 0, *part, *form, restored, x.dtype == torch.float32)
        y[..., slab] = F.linear(x, restored)
    return y


def _attention(qkv: Tensor, frequencies: Tensor, input_pos: Tensor, cache: Tensor) -> Tensor:
    """The operator llama.attention."""
    batch, rows, channels = qkv.shape
    _, _, n_kv_head, _, head_dim = cache.shape
    plain = batch == 1 and cache.dtype == qkv.dtype and cache.is_contiguous()
    if plain and head_dim <= 256 and (cuda := on_cuda(qkv, CUDA_ROWS)):
        return cuda.attention(qkv, frequencies, input_pos, cache)
    if plain and head_dim <= cpu.MAX_HEAD_DIM and cpu.takes_rows(qkv):
        n_out = channels - 2 * n_kv_head * head_dim
        return cpu.compute("attention", qkv, n_out, frequencies, input_pos, *cache.shape[2:], cache[0], cache[1])
    heads = qkv.view(batch, rows, -1, head_dim).transpose(1, 2)  # [B, heads, S, head_dim]
    n_head = heads.shape[1] - 2 * n_kv_head
    q, k, v = heads.split([n_head, n_kv_head, n_kv_head], dim=1)
    angles = torch.outer(input_pos.float(), frequencies)
    cache[0].index_copy_(2, input_pos, _rotate(k, angles))
    cache[1].index_copy_(2, input_pos, v)
    filled = int(input_pos[-1]) + 1
    keys, values = cache[:, :, :, :filled]
    q = _rotate(q, angles)
    mask = input_pos[:, None] >= torch.arange(filled, device=qkv.device)  # [S, filled]
    if qkv.is_cpu:
        # Heads that share a KV head become rows of one product: SDPA's enable_gqa is ten times slower on a CPU.
        mask = mask.repeat(n_head // n_kv_head, 1)
        q = q.reshape(batch, n_kv_head, -1, head_dim)
    elif rows > cpu.MAX_ROWS:
        from torch.nn.attention.bias import causal_lower_right  # noqa: PLC0415  it imports the compiler

        mask = causal_lower_right(rows, filled)  # which takes no memory
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=not qkv.is_cpu)
    y = y.reshape(batch, n_head, rows, head_dim).transpose(1, 2)
    return y.reshape(batch, rows, n_head * head_dim)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE in float32, half-split as Hugging Face has it: `x` [B, heads, S, head_dim] by `angles` [S, head_dim / 2]."""
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The operator llama.rms_norm, which a compiled step cannot round otherwise for other numbers of rows."""
    cuda = on_cuda(x, CUDA_ROWS)
    return cuda.rms_norm(x, weight, eps) if cuda else F.rms_norm(x, weight.shape, weight, eps)


def _empty_attention(qkv: Tensor, frequencies: Tensor, input_pos: Tensor, cache: Tensor) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] - 2 * cache.shape[2] * cache.shape[4])


_library = torch.library.Library("llama", "DEF")
_library.define("linear(Tensor x, Tensor weight, Tensor? scale, Tensor? minimum) -> Tensor")
_library.impl("linear", _linear, "CompositeExplicitAutograd")
_library.impl("linear", lambda x, weight, scale, minimum: x.new_empty(*x.shape[:-1], len(weight)), "Meta")
_library.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
_library.impl("rms_norm", _rms_norm, "CompositeExplicitAutograd")
_library.impl("rms_norm", lambda x, weight, eps: torch.empty_like(x), "Meta")
# The write to the cache is not declared: torch 2.13 refuses alias annotations inside nested_compile_region. It is safe
# because in a compiled step nothing but this operator touches a cache, once a layer, and its result is always used.
_library.define("attention(Tensor qkv, Tensor frequencies, Tensor input_pos, Tensor cache) -> Tensor")
_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention", _empty_attention, "Meta")


def attention(qkv: Tensor, frequencies: Tensor, input_pos: Tensor, cache: Tensor) -> Tensor:
    """Causal grouped-query attention of new rows over the filled part of a cache, with RoPE and the cache's update.

    `qkv` [B, S, (n_head + 2 n_kv_head) * head_dim] are the projections of the positions `input_pos` [S], consecutive;
    `frequencies` [head_dim / 2] those of RoPE; `cache` [2, B, n_kv_head, T, head_dim] has keys and
    values. Those of the rows are written to it, then row i sees positions 0 to input_pos[i]. Returns [B, S, n_head *
    head_dim].
    """
    return torch.ops.llama.attention(qkv.contiguous(), frequencies, input_pos.contiguous(), cache)
