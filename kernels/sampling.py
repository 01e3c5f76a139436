"""From logits to token ids, by noise that is a pure function of seed, position and token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import cpu


@dataclass
class Sampling:
    """How logits become a token: the seed and the temperature (0 is greedy) as tensors, so that no graph holds them."""

    seed: Tensor  # int32 []
    temperature: Tensor  # float32 []
    top_k: int | None = None
    vocab_size: int | None = None  # ids from here on have no text: embeddings are often padded


def hash32(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers in which every input bit turns every output bit with probability near 1/2.

    Constants of Chris Wellons' "lowbias32" (https://nullprogram.com/blog/2018/07/31/). int32 products wrap; >> is made
    logical by masking.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


def gumbel_noise(seed: Tensor, input_pos: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [S, vocab_size], a pure function of (seed, position, token id): no state, no order."""
    key = hash32(hash32(seed) + input_pos.to(torch.int32))
    ids = torch.arange(vocab_size, dtype=torch.int32, device=input_pos.device) * -0x61C88647
    bits = hash32(hash32(key)[:, None] ^ ids) & 0x7FFFFF
    uniform = (bits.float() + 0.5) * 2.0**-23  # 23 bits and the half are exact in float32, and never 0 or 1
    return -torch.log(-torch.log(uniform))


def sample(logits: Tensor, input_pos: Tensor, sampling: Sampling) -> Tensor:
    """Token ids [S] for logits [S, vocab_size] computed at the positions `input_pos` [S]; -1 where not finite.

    By the Gumbel-max trick: argmax(logits + temperature * noise) follows softmax(logits / temperature), of the top_k
    most likely where given.
    """
    vocab_size = sampling.vocab_size or logits.shape[-1]
    if cpu.takes_rows(logits):
        others = (sampling.seed, sampling.temperature, sampling.top_k or vocab_size, vocab_size)
        return cpu.compute("sample", logits, 1, input_pos, *others, dtype=torch.int64)[:, 0]
    logits = logits[:, :vocab_size].float()
    if sampling.top_k is not None:
        largest, ids = logits.sort(dim=-1, descending=True, stable=True)  # of equal ones the lower ids stay
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ids[:, : sampling.top_k], largest[:, : sampling.top_k])
    noisy = logits + sampling.temperature * gumbel_noise(sampling.seed, input_pos, logits.shape[-1])
    ids = torch.argmax(noisy, dim=-1)  # NaN counts as the largest
    largest = noisy.gather(-1, ids[:, None])[:, 0]
    return torch.where(largest.isfinite(), ids, -1)
