"""From logits to token ids, by noise that is a pure function of seed, position and token."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels import cpu


@dataclass
class Sampling:
    """How logits become a token. What is a tensor may change; a graph does not hold it."""

    seed: Tensor  # int32 []
    temperature: Tensor  # float32 []; 0 is greedy
    top_k: int | None = None
    vocab_size: int | None = None  # ids from here on have no text: embeddings are often padded
    top_p: Tensor | None = None  # float32 []
    log_min_p: Tensor | None = None  # float32 [], the logarithm of min_p

    @classmethod
    def on(cls, device: str, seed: int, temperature: float, top_p=None, min_p=None, **others: object) -> "Sampling":
        """From numbers."""
        tensor = partial(torch.tensor, dtype=torch.float32, device=device)
        top_p = None if top_p is None else tensor(top_p)
        log_min_p = None if min_p is None else tensor(min_p).log()
        seed = torch.tensor(seed, dtype=torch.int32, device=device)
        return cls(seed, tensor(temperature), top_p=top_p, log_min_p=log_min_p, **others)


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


def keep_likely(logits: Tensor, sampling: Sampling) -> Tensor:
    """Float logits [S, vocab_size], minus infinity where top_k, then top_p, then min_p leave a token out.

    top_k keeps so many of the largest, of equal ones the lower ids; top_p (https://arxiv.org/abs/1904.09751) the fewest
    of the largest that have so much of the probability, at temperature 1; min_p (https://arxiv.org/abs/2407.01082) what
    has so much of the largest one's. All are functions of the logits alone, so guesses change nothing.
    """
    if sampling.top_k is not None or sampling.top_p is not None:
        largest, ids = logits.sort(dim=-1, descending=True, stable=True)
        if sampling.top_k is not None:
            largest[:, sampling.top_k :] = -torch.inf
        if sampling.top_p is not None:
            share = largest.double().softmax(dim=-1)
            largest = torch.where(share.cumsum(dim=-1) - share < sampling.top_p, largest, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, ids, largest)
    if sampling.log_min_p is not None:
        least = logits.amax(dim=-1, keepdim=True) + sampling.log_min_p
        logits = torch.where(logits < least, -torch.inf, logits)
    return logits


def sample(logits: Tensor, input_pos: Tensor, sampling: Sampling) -> Tensor:
    """Token ids [S] for logits [S, vocab_size] computed at the positions `input_pos` [S]; -1 where not finite.

    By the Gumbel-max trick: argmax(logits + temperature * noise) follows softmax(logits / temperature), of those that
    keep_likely keeps.
    """
    vocab_size = sampling.vocab_size or logits.shape[-1]
    if cpu.takes_rows(logits):
        top_k = min(sampling.top_k or vocab_size, vocab_size)
        likely = (sampling.top_p, sampling.log_min_p, top_k, vocab_size)
        others = (input_pos, sampling.seed, sampling.temperature, *likely)
        return cpu.compute("sample", logits, 1, *others, dtype=torch.int64)[:, 0]
    logits = keep_likely(logits[:, :vocab_size].float(), sampling)
    noisy = logits + sampling.temperature * gumbel_noise(sampling.seed, input_pos, logits.shape[-1])
    ids = torch.argmax(noisy, dim=-1)  # NaN counts as the largest
    largest = noisy.gather(-1, ids[:, None])[:, 0]
    return torch.where(largest.isfinite(), ids, -1)
