"""The Llama architecture in plain PyTorch: weights, and the arithmetic of a forward pass.

The hot operations are custom operators of torch.library (torch.ops.llama). Their implementations here run on every
device; kernels/ registers faster ones, if it is there. The KV cache belongs to the caller.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelArgs:
    """The shape of a Llama: the fields of `config.json`, in our names."""

    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scale: float  # low RoPE frequencies are divided by it; 1.0 for no scaling
    max_seq_length: int  # positions that the model was trained for: prompt and answer together
    # Llama 3's RoPE scaling, in config.json's words. By default all frequencies are low.
    rope_low_freq_factor: float = 2.0**29
    rope_high_freq_factor: float = 2.0**30
    rope_original_max_position_embeddings: int = 1


def rope_frequencies(args: ModelArgs) -> Tensor:
    """Radians [head_dim / 2] by which each pair of channels is rotated from one position to the next, in float32.

    theta ** (-2 i / head_dim), https://arxiv.org/abs/2104.09864, the low ones divided by rope_scale: all
    of them in linear scaling, https://arxiv.org/abs/2306.15595; smoothly by the number of rotations in Llama 3's,
    https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py
    """
    exponent = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device="cpu") / args.head_dim
    frequencies = 1.0 / args.rope_theta**exponent
    rotations = args.rope_original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
    smooth = ((rotations - low) / (high - low)).clamp(0, 1)
    return frequencies * smooth + frequencies / args.rope_scale * (1 - smooth)


def rope_table(args: ModelArgs, positions: int) -> Tensor:
    """Cosines and sines [positions, head_dim] of RoPE's angles in float32, the cosines in the first half of a row."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32, device="cpu"), rope_frequencies(args))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# ---- Operators


def define(schema: str, implementation: Callable, meta: Callable) -> None:
    """Define torch.ops.llama.NAME. `meta` returns an empty tensor of the result's shape, for torch.compile."""
    name = schema.partition("(")[0]
    library.define(f"{schema} -> Tensor")
    library.impl(name, implementation, "CompositeExplicitAutograd")
    library.impl(name, meta, "Meta")


def dequantize(weight: Tensor, scale: Tensor | None, minimum: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in `dtype`, rounded once.

    16 bits: `weight` [out, in] is float. 8 bits: int8 [out, in] * `scale` [out]. 4 bits: uint8 [out, in / 2], the even
    input channel in the low nibble, * `scale` + `minimum`, both [out, in / groupsize].
    """
    if scale is None:
        return weight.to(dtype)
    if minimum is None:
        return (weight * scale[:, None]).to(dtype)
    levels = torch.stack([weight & 15, weight >> 4], dim=-1).view(*scale.shape, -1)  # [out, groups, groupsize]
    return torch.addcmul(minimum.float()[..., None], levels, scale.float()[..., None]).flatten(1).to(dtype)


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, minimum: Tensor | None, residual=None) -> Tensor:
    """torch.ops.llama.linear: `x` [..., in] times the transpose of a weight as `dequantize` has it: [..., out].

    `residual` [..., out] is added to the rounded product.
    """
    y = F.linear(x, dequantize(weight, scale, minimum, x.dtype))
    return y if residual is None else residual + y


def linear_meta(x: Tensor, weight: Tensor, *others: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate channel i of `x` [B, heads, S, head_dim] with i + head_dim / 2, by `rope` [S, head_dim], in float32."""
    cos, sin = rope.chunk(2, dim=-1)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def update_cache(qkv: Tensor, rope: Tensor, input_pos: Tensor, cache: Tensor) -> Tensor:
    """Apply RoPE to queries and keys, write keys and values to `cache`: the queries [B, n_head, S, head_dim]."""
    batch, rows, _ = qkv.shape
    _, _, n_kv_head, _, head_dim = cache.shape
    heads = qkv.view(batch, rows, -1, head_dim).transpose(1, 2)  # [B, n_head + 2 n_kv_head, S, head_dim]
    n_head = heads.shape[1] - 2 * n_kv_head
    q, k, v = heads.split([n_head, n_kv_head, n_kv_head], dim=1)
    rope = rope[input_pos]
    cache[0].index_copy_(2, input_pos, apply_rope(k, rope))
    cache[1].index_copy_(2, input_pos, v)
    return apply_rope(q, rope)


def attention(qkv: Tensor, rope: Tensor, input_pos: Tensor, cache: Tensor) -> Tensor:
    """torch.ops.llama.attention: RoPE, the update of the KV cache, causal grouped-query attention.

    `qkv` [B, S, (n_head + 2 n_kv_head) * head_dim] are the projections of the positions `input_pos` [S], which are
    consecutive; `rope` is the table of all positions; `cache` [2, B, n_kv_head, T, head_dim] has keys and values. Those
    of the S positions are written to it, then each attends to the positions up to its own: [B, S, n_head * head_dim].
    """
    q = update_cache(qkv, rope, input_pos, cache)
    batch, n_head, rows, head_dim = q.shape
    n_kv_head = cache.shape[2]
    length = int(input_pos[-1]) + 1
    keys, values = cache[:, :, :, :length]
    # Heads that share a KV head become rows of one product, because SDPA's enable_gqa is ten times slower on a CPU.
    q = q.reshape(batch, n_kv_head, -1, head_dim)
    mask = input_pos[:, None] >= torch.arange(length, device=q.device)  # [S, length]
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask.repeat(n_head // n_kv_head, 1))
    return y.reshape(batch, n_head, rows, head_dim).transpose(1, 2).flatten(2)


def attention_meta(qkv: Tensor, rope: Tensor, input_pos: Tensor, cache: Tensor) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] - 2 * cache.shape[2] * cache.shape[4])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch.ops.llama.rms_norm: root mean square normalization, https://arxiv.org/abs/1910.07467"""
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """torch.ops.llama.swiglu, silu of the first half times the second. https://arxiv.org/abs/2002.05202"""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


library = torch.library.Library("llama", "DEF")
define("linear(Tensor x, Tensor weight, Tensor? scale, Tensor? minimum, Tensor? residual=None)", linear, linear_meta)
# The write to the cache is not declared, because torch 2.13 refuses alias annotations inside nested_compile_region. It
# is safe: in a compiled step nothing but this operator touches a cache, once a layer, and its result is always used.
define("attention(Tensor qkv, Tensor rope, Tensor input_pos, Tensor cache)", attention, attention_meta)
define("rms_norm(Tensor x, Tensor weight, float eps)", rms_norm, lambda x, weight, eps: torch.empty_like(x))
define("swiglu(Tensor x)", swiglu, lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))


# ---- Modules


class Linear(nn.Module):
    """A linear layer whose weight is stored, and multiplied, in 16, 8 or 4 bits, as `dequantize` has it."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.n_in = n_in
        self.n_out = n_out
        self.register_buffer("weight", torch.empty(n_out, n_in))
        self.register_buffer("scale", None)
        self.register_buffer("minimum", None)

    def set_storage(self, bits: int, groupsize: int) -> None:
        """Choose 16, 8 or 4 bits, before the weight is loaded."""
        if bits == 8:
            self.weight = torch.empty(self.n_out, self.n_in, dtype=torch.int8)
            self.scale = torch.empty(self.n_out, dtype=torch.float32)
        elif bits == 4:
            self.weight = torch.empty(self.n_out, self.n_in // 2, dtype=torch.uint8)
            self.scale = torch.empty(self.n_out, self.n_in // groupsize, dtype=torch.bfloat16)
            self.minimum = torch.empty_like(self.scale)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`x` [..., n_in] to [..., n_out], plus `residual` [..., n_out]."""
        return torch.ops.llama.linear(x.contiguous(), self.weight, self.scale, self.minimum, residual)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., dim] to the same shape."""
        return torch.ops.llama.rms_norm(x.contiguous(), self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention; q, k and v are one product, `wqkv`."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.wqkv = Linear(args.dim, (args.n_head + 2 * args.n_kv_head) * args.head_dim)
        self.wo = Linear(args.n_head * args.head_dim, args.dim)

    def forward(self, x: Tensor, residual: Tensor, rope: Tensor, input_pos: Tensor, cache: Tensor) -> Tensor:
        """`x` [B, S, dim] to the same shape, plus `residual`; the rest as `attention` has it."""
        y = torch.ops.llama.attention(self.wqkv(x), rope, input_pos.contiguous(), cache)
        return self.wo(y, residual)


class FeedForward(nn.Module):
    """SwiGLU; the gate w1 and w3 are one product, `w13`."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w13 = Linear(args.dim, 2 * args.ffn_dim)
        self.w2 = Linear(args.ffn_dim, args.dim)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """`x` [B, S, dim] to the same shape, plus `residual`."""
        return self.w2(torch.ops.llama.swiglu(self.w13(x)), residual)


class TransformerBlock(nn.Module):
    """Attention, then the feed-forward layer, each after an RMSNorm and added to its input."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    @torch.compiler.nested_compile_region  # compiled once for all layers, so compile time does not grow with depth
    def forward(self, x: Tensor, rope: Tensor, input_pos: Tensor, cache: Tensor) -> Tensor:
        """`x` [B, S, dim] to the same shape; the rest as `attention` has it."""
        h = self.attention(self.attention_norm(x), x, rope, input_pos, cache)
        return self.feed_forward(self.ffn_norm(h), h)


class Transformer(nn.Module):
    """Embeddings, the blocks, a last RMSNorm, and the output layer."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        # from_pretrained draws no random weights, which on the meta device would import the compiler (2 s).
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(args.vocab_size, args.dim))
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layer))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, args.vocab_size)
        self.rope: Tensor | None = None  # no buffer, so that .to(dtype) leaves it in float32; see make_cache

    def make_cache(self, positions: int, batch: int = 1) -> list[Tensor]:
        """An empty KV cache, [2, batch, n_kv_head, positions, head_dim] for each layer, and the RoPE table."""
        if self.rope is None:  # of the whole context at once, because compiled code takes its size as a constant
            self.rope = rope_table(self.args, self.args.max_seq_length).to(self.tok_embeddings.weight.device)
        shape = 2, batch, self.args.n_kv_head, positions, self.args.head_dim
        return [self.tok_embeddings.weight.new_empty(shape) for _ in self.layers]

    def forward(self, tokens: Tensor, input_pos: Tensor, cache: list[Tensor], last_only: bool = False) -> Tensor:
        """Logits [B, S, vocab_size] of `tokens` [B, S] at the consecutive positions `input_pos` [S].

        With `last_only` those of the last one, [B, 1, vocab_size]. Keys and values are written to `cache`.
        """
        x = self.tok_embeddings(tokens)  # [B, S, dim]
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, self.rope, input_pos, layer_cache)
        x = x[:, -1:] if last_only else x
        return self.output(self.norm(x))
