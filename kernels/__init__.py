"""The three operators that decide the speed of decoding, and the one place where a device's kernel is chosen for each.

`linear`, `attention`, `dequantize` hold for every device and number of rows; where there is no kernel, they are PyTorch.
"""

from kernels import cpu

import torch
import torch.nn.functional as F
from torch import Tensor


def dequantize(weight: Tensor, scale: Tensor | None, minimum: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in `dtype`, from any of the three stored layouts.

    Float: `weight` [out, in]. int8: `weight` int8 [out, in] * `scale` [out]. int4: `weight` uint8 [out, in / 2], the
    even input channel in the low nibble, * `scale` + `minimum`, both [out, in / groupsize]. Rounded once, at the end.
    """
    if scale is None:
        return weight.to(dtype)
    if minimum is None:
        return (weight.float() * scale[:, None]).to(dtype)
    nibbles = torch.stack([weight & 15, weight >> 4], dim=-1).view(*scale.shape, -1)
    return torch.addcmul(minimum.float()[..., None], nibbles.float(), scale.float()[..., None]).flatten(1).to(dtype)


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, minimum: Tensor | None = None) -> Tensor:
    """`x` [..., in] times the transpose of a stored weight (see `dequantize`): [..., out] in the dtype of `x`."""
    if x.device.type == "cpu":
        return torch.ops.llama.linear(x, weight, scale, minimum)
    return F.linear(x, dequantize(weight, scale, minimum, x.dtype))


def _linear_cpu(x: Tensor, weight: Tensor, scale: Tensor | None, minimum: Tensor | None) -> Tensor:
    if cpu.suits(x, weight):
        # So many rows are verified, or read faster as they are stored than dequantized.
        if x.dtype == torch.bfloat16 and x.numel() <= (cpu.MAX_ROWS if scale is None else 4 * cpu.MAX_ROWS) * x.shape[-1]:
            return cpu.few_rows(x, weight, scale, minimum)
        if scale is not None:
            return cpu.many_rows(x, weight, scale, minimum)
    return F.linear(x, dequantize(weight, scale, minimum, x.dtype))


def _attention(qkv: Tensor, rope: Tensor, input_pos: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    batch, rows, _ = qkv.shape
    if batch == 1 and rows <= cpu.MAX_ROWS and qkv.dtype == torch.bfloat16 and qkv.is_cpu and cpu.library() is not None:
        return cpu.attention(qkv, rope, input_pos, k_cache, v_cache)
    n_kv_head, head_dim = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.view(batch, rows, -1, head_dim).transpose(1, 2)
    q, k, v = heads.split([heads.shape[1] - 2 * n_kv_head, n_kv_head, n_kv_head], dim=1)
    k_cache.index_copy_(2, input_pos, _rotate(k, rope))
    v_cache.index_copy_(2, input_pos, v)
    filled = int(input_pos[-1]) + 1
    mask = input_pos[:, None] >= torch.arange(filled, device=qkv.device)
    # The query heads that share a KV head become rows of one product: SDPA's own enable_gqa is ten times slower on CPU.
    group = q.shape[1] // n_kv_head
    q = _rotate(q, rope).reshape(batch, n_kv_head, group * rows, head_dim)
    y = F.scaled_dot_product_attention(q, k_cache[:, :, :filled], v_cache[:, :, :filled], attn_mask=mask.repeat(group, 1))
    return y.reshape(batch, -1, rows, head_dim).transpose(1, 2).reshape(batch, rows, -1)


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE in float32: the two halves of the channels of `x` [B, heads, S, head_dim] turn by `rope` [S, head_dim]."""
    cos, sin = rope.chunk(2, dim=-1)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


_library = torch.library.Library("llama", "DEF")
_library.define("linear(Tensor x, Tensor weight, Tensor? scale, Tensor? minimum) -> Tensor")
_library.impl("linear", _linear_cpu, "CPU")
_library.impl("linear", lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]), "Meta")
# The write to the cache is not declared: torch 2.13 refuses alias annotations inside nested_compile_region. It is safe
# because in a compiled step nothing but this operator touches a cache, once a layer, and its result is always used.
_library.define("attention(Tensor qkv, Tensor rope, Tensor input_pos, Tensor k_cache, Tensor v_cache) -> Tensor")
_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention", lambda x, _, __, k, v: x.new_empty(*x.shape[:2], x.shape[2] - 2 * k.shape[1] * k.shape[3]), "Meta")


def attention(qkv: Tensor, rope: Tensor, input_pos: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """Causal grouped-query attention of new rows over the filled part of a cache, with RoPE and the cache's update.

    `qkv` [B, S, (n_head + 2 n_kv_head) * head_dim] are the projections of the positions `input_pos` [S], consecutive;
    `rope` [S, head_dim] their angles (model.rope_table); the caches are [B, n_kv_head, T, head_dim]. Keys and values of
    the rows are written to the caches, then row i sees positions 0 to input_pos[i]. Returns [B, S, n_head * head_dim].
    """
    return torch.ops.llama.attention(qkv, rope, input_pos, k_cache, v_cache)
