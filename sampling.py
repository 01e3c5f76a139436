"""From logits to token ids, with noise that is a pure function of seed, position and token id.

So the same seed gives the same text, and a draft that samples with the noise of its target often guesses right.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model import define


@dataclass
class SamplingParams:
    """The parameters of sampling. The tensors may be changed in place: a captured step reads their current values."""

    seed: Tensor  # int32 []
    temperature: Tensor  # float32 []; 0 is greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    vocab_size: int | None = None  # ids from here on have no text, because embeddings are often padded

    @classmethod
    def create(cls, device: str, seed: int, temperature: float, **limits: float | None) -> "SamplingParams":
        """SamplingParams on `device`, from numbers."""
        seed = torch.tensor(seed, dtype=torch.int32, device=device)
        temperature = torch.tensor(temperature, dtype=torch.float32, device=device)
        return cls(seed, temperature, **limits)


def hash32(x: Tensor) -> Tensor:
    """A bijection of int32 in which every input bit flips every output bit with a probability near 1/2.

    The constants are those of Chris Wellons' "lowbias32", https://nullprogram.com/blog/2018/07/31/. Products of int32
    wrap; >> is made logical by a mask.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


def gumbel_noise(seed: Tensor, input_pos: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [S, vocab_size] for the positions `input_pos` [S]: a function of seed, position and id."""
    key = hash32(hash32(seed) + input_pos.to(torch.int32))
    ids = torch.arange(vocab_size, dtype=torch.int32, device=input_pos.device) * -0x61C88647
    bits = hash32(hash32(key)[:, None] ^ ids) & 0x7FFFFF
    uniform = (bits.float() + 0.5) * 2.0**-23  # 23 bits and the half are exact in float32, and never 0 or 1
    return -torch.log(-torch.log(uniform))


def filter_logits(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Set float logits [S, vocab_size] to minus infinity if top_k, then top_p, then min_p leave them out.

    top_k keeps the k largest, of equal ones those of lower ids. top_p (https://arxiv.org/abs/1904.09751) keeps the
    fewest largest whose probabilities at temperature 1 sum to top_p. min_p (https://arxiv.org/abs/2407.01082) keeps
    those with at least min_p times the probability of the largest.
    """
    if top_k < logits.shape[-1] or top_p < 1:
        largest, ids = logits.sort(dim=-1, descending=True, stable=True)
        largest[:, top_k:] = -torch.inf
        if top_p < 1:
            probabilities = largest.double().softmax(dim=-1)
            sum_before = probabilities.cumsum(dim=-1) - probabilities
            largest = torch.where(sum_before < top_p, largest, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, ids, largest)
    if min_p > 0:
        threshold = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
        logits = torch.where(logits < threshold, -torch.inf, logits)
    return logits


def sample_reference(logits: Tensor, input_pos: Tensor, seed: Tensor, temperature: Tensor, *limits: float) -> Tensor:
    """torch.ops.llama.sample in plain PyTorch; `limits` are those of `filter_logits`."""
    logits = filter_logits(logits.float(), *limits)
    noisy = logits + temperature * gumbel_noise(seed, input_pos, logits.shape[-1])
    ids = torch.argmax(noisy, dim=-1)  # NaN counts as the largest
    largest = noisy.gather(-1, ids[:, None])[:, 0]
    return torch.where(largest.isfinite(), ids, -1)


schema = "sample(Tensor logits, Tensor input_pos, Tensor seed, Tensor temperature, int top_k, float top_p, float min_p)"
# len(logits) would make a symbolic size constant.
define(schema, sample_reference, lambda logits, *_: logits.new_empty(logits.shape[0], dtype=torch.int64))


def sample(logits: Tensor, input_pos: Tensor, params: SamplingParams) -> Tensor:
    """Token ids [S] for logits [S, vocab_size] at the positions `input_pos` [S]; -1 if they are not finite.

    The Gumbel-max trick: argmax(logits + temperature * noise) is distributed as softmax(logits / temperature).
    """
    logits = logits[:, : params.vocab_size]
    top_k = min(params.top_k or logits.shape[-1], logits.shape[-1])
    tensors = logits, input_pos, params.seed, params.temperature
    return torch.ops.llama.sample(*tensors, top_k, params.top_p or 1.0, params.min_p or 0.0)
