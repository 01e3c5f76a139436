"""The Llama architecture: weights, and the arithmetic that one forward pass does with them.

It owns no sequence: the cache is the caller's. It knows nothing of files, sampling, quantization or devices.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

import kernels


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
    rope_scale: float  # RoPE's slow frequencies are divided by it; 1.0 is none
    max_seq_length: int  # positions that the model was trained for: prompt and answer together
    # Slow is what turns less than rope_low times within rope_positions, and up to rope_high times less and less so.
    rope_low: float = 2.0**29  # all are slow
    rope_high: float = 2.0**30
    rope_positions: int = 1

    def __post_init__(self) -> None:
        """ValueError where this is no shape of a model."""
        for field, value in zip(fields(self), vars(self).values(), strict=True):
            if not isinstance(value, int | field.type) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ValueError(f"{field.name} = {value!r} in the config: it must be a positive number below 2**31")
        if self.n_head % self.n_kv_head != 0 or self.head_dim % 2 != 0:
            raise ValueError(f"n_head must be a multiple of n_kv_head and head_dim even in the config: {self}")
        if self.rope_low >= self.rope_high:
            raise ValueError(f"low_freq_factor must be less than high_freq_factor in the config: {self}")


def rope_frequencies(args: ModelArgs) -> Tensor:
    """Radians [head_dim / 2] by which channel i turns with channel i + head_dim / 2 from one position to the next.

    theta ** (-2 i / head_dim), https://arxiv.org/abs/2104.09864, divided by rope_scale as far as they are slow: all in
    linear scaling, https://arxiv.org/abs/2306.15595; by the number of turns in that of Llama 3, as
    https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py has it. In float32 on the CPU.
    """
    exponent = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device="cpu") / args.head_dim
    frequencies = 1.0 / args.rope_theta**exponent
    turns = args.rope_positions * frequencies / (2 * math.pi)
    fast = ((turns - args.rope_low) / (args.rope_high - args.rope_low)).clamp(0, 1)
    return frequencies * fast + frequencies / args.rope_scale * (1 - fast)


class Attention(nn.Module):
    """Grouped-query attention; the three input projections are one product, `wqkv` = rows of q, then k, then v."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.wqkv = kernels.Linear(args.dim, (args.n_head + 2 * args.n_kv_head) * args.head_dim)
        self.wo = kernels.Linear(args.n_head * args.head_dim, args.dim)

    def forward(self, x: Tensor, frequencies: Tensor, input_pos: Tensor, cache: Tensor) -> Tensor:
        """`x` [B, S, dim] to [B, S, dim]; the others as kernels.attention has them."""
        return self.wo(kernels.attention(self.wqkv(x), frequencies, input_pos, cache))


class FeedForward(nn.Module):
    """SwiGLU, https://arxiv.org/abs/2002.05202; `w13` = rows of the gate w1, then of w3, for both are one product."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w13 = kernels.Linear(args.dim, 2 * args.ffn_dim)
        self.w2 = kernels.Linear(args.ffn_dim, args.dim)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, S, dim] to [B, S, dim]."""
        return self.w2(kernels.swiglu(self.w13(x)))


class TransformerBlock(nn.Module):
    """Attention, then the feed-forward layer, each behind an RMSNorm and added to its input."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = kernels.RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = kernels.RMSNorm(args.dim, args.norm_eps)

    @torch.compiler.nested_compile_region  # compiled once for all layers: compile time does not grow with depth
    def forward(self, x: Tensor, frequencies: Tensor, input_pos: Tensor, cache: Tensor) -> Tensor:
        """`x` [B, S, dim] to [B, S, dim]; the others as kernels.attention has them."""
        h = x + self.attention(self.attention_norm(x), frequencies, input_pos, cache)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """Embeddings, the blocks, a last RMSNorm, and the output layer."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        # from_pretrained draws no random weights, which on the meta device would import the compiler (2 s)
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(args.vocab_size, args.dim))
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layer))
        self.norm = kernels.RMSNorm(args.dim, args.norm_eps)
        self.output = kernels.Linear(args.dim, args.vocab_size)
        # No buffer: it stays in float32, and on the CPU until the weights are loaded.
        self.frequencies = rope_frequencies(args)

    def make_cache(self, max_seq_length: int, batch: int = 1) -> Tensor:
        """An empty cache [n_layer, 2, batch, n_kv_head, max_seq_length, head_dim] of keys and values.

        Its memory is not touched before a position is written: on a CPU an unused tail costs nothing.
        """
        shape = (self.args.n_layer, 2, batch, self.args.n_kv_head, max_seq_length, self.args.head_dim)
        return self.tok_embeddings.weight.new_empty(shape)

    def forward(self, tokens: Tensor, input_pos: Tensor, cache: Tensor, last_only: bool = False) -> Tensor:
        """Logits of `tokens` [B, S] at the positions `input_pos` [S], which are consecutive.

        Keys and values are written to `cache` at these positions; positions behind them are not looked at. Returns
        [B, S, vocab_size], or [B, 1, vocab_size] of the last position where `last_only`.
        """
        x = self.tok_embeddings(tokens)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, self.frequencies, input_pos, layer_cache)
        x = x[:, -1:] if last_only else x
        return self.output(self.norm(x))
