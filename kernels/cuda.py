"""Few rows in bfloat16 on CUDA: Triton kernels for products, attention, norms and sampling, and CUDA graphs.

Row i of many is bit for bit that row alone: it passes through the same instructions, whatever else is in its tile.
Positions are read on the device, so one CUDA graph of a step serves all of them.
"""

import math
import sys
from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

import sampling

TILE = constexpr(8)  # rows of a product on tensor cores: the fewest that they take
WORDS = constexpr(128)  # words of 8 weights in 4 bits that are multiplied at once
SIXTEEN = 0x41800000  # the bits of 16.0 in float32
HEADS = constexpr(16)  # (row, query head) pairs of a tl.dot in attention: the fewest that it takes
BLOCK = constexpr(64)  # positions that are attended to at once
SPLITS = constexpr(128)  # programs that share the blocks of a long sequence, as in flash decoding
# Triton's interpreter, by which a CPU tests these kernels, does not multiply bfloat16.
TYPE = constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


@triton.jit
def _store_sum(product, residual, y, offsets, mask):
    """Store a product, rounded, plus the residual."""
    product = product.to(tl.bfloat16)
    if residual is not None:
        addend = tl.load(residual + offsets, mask, 0).to(tl.float32)
        product = (addend + product.to(tl.float32)).to(tl.bfloat16)
    tl.store(y + offsets, product, mask)


@triton.jit(do_not_specialize=["rows"])  # the same code for every number of rows
def _linear(x, weight, scale, residual, y, rows, n_in, n_out, SIZE: constexpr, G: constexpr, N: constexpr):
    """N output channels of TILE rows on tensor cores: a batch of G products of SIZE input channels each at a time."""
    channel = (tl.program_id(0) * N + tl.arange(0, N))[None, :]
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    parts = n_in // SIZE
    acc = tl.zeros([G, N, TILE], tl.float32)
    for first in tl.range(0, parts, G, num_stages=3):
        part = first + tl.arange(0, G)[:, None]
        mask = (part < parts) & (channel < n_out)
        offsets = channel * parts + part
        w = tl.load(weight + offsets[:, :, None] * SIZE + tl.arange(0, SIZE), mask[:, :, None], 0)
        offsets = row * n_in + part[:, :, None] * SIZE + tl.arange(0, SIZE)[:, None]
        v = tl.load(x + offsets, (part[:, :, None] < parts) & (row < rows), 0)
        acc = tl.dot(w.to(TYPE), v.to(TYPE), acc)
    out = tl.sum(acc, 0)  # [N, TILE]
    channel = tl.program_id(0) * N + tl.arange(0, N)[:, None]
    if scale is not None:
        out *= tl.load(scale + channel, channel < n_out, 0)
    _store_sum(out, residual, y, row * n_out + channel, (row < rows) & (channel < n_out))


@triton.jit
def _pair(word):
    """Unpack the two bfloat16 numbers in each word to float32, the low one first."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _word_sums(w, x, mask, sixteen):
    """Sums of level * x, and of x, for words w [N, WORDS] of 8 levels and the pairs of one row at x [WORDS].

    A level is put into the mantissa of 256.0 or of 16.0. The bits of 16.0 are an argument, so that masking and adding
    them is one instruction.
    """
    products = tl.zeros(w.shape, tl.float32)
    evens = tl.zeros([WORDS], tl.float32)
    odds = tl.zeros([WORDS], tl.float32)
    for i in tl.static_range(4):  # levels 2 i and 2 i + 1
        even, odd = _pair(tl.load(x + i, mask, 0))
        bits = w << 15 - 8 * i if i < 2 else w >> 8 * i - 15  # the levels at bits 15 and 19
        products += (bits & 0x78000 | sixteen + 0x2000000).to(tl.float32, bitcast=True) * even[None, :]
        products += (bits & 0x780000 | sixteen).to(tl.float32, bitcast=True) * odd[None, :]
        evens += even
        odds += odd
    return products - (256 * evens + 16 * odds)[None, :], evens + odds


@triton.jit(do_not_specialize=["rows", "sixteen"])
def _linear_int4(
    x, weight, scale, minimum, residual, y, rows, words, n_out, sixteen, PER: constexpr, ROWS: constexpr, N: constexpr
):
    """N output channels of ROWS rows in float32, from words of 8 levels, PER of them in a group.

    No tensor cores, because one row took 1.75 times as long with them on an H100 (BENCHMARKS.md). For each group,
    sum x (scale * level + minimum) = scale * sum x level + minimum * sum x.
    """
    channel = tl.program_id(0) * N + tl.arange(0, N)[:, None]
    row = tl.program_id(1) * ROWS
    groups = words // PER
    acc = ()  # one for each row
    for _ in tl.static_range(ROWS):
        acc += (tl.zeros([N, WORDS // PER], tl.float32),)
    for first in tl.range(0, words, WORDS, num_stages=3):
        word = first + tl.arange(0, WORDS)
        w = tl.load(weight + channel * words + word, (channel < n_out) & (word < words), 0)
        group = first // PER + tl.arange(0, WORDS // PER)
        mask = (channel < n_out) & (group < groups)
        group_scale = tl.load(scale + channel * groups + group, mask, 0).to(tl.float32)
        group_minimum = tl.load(minimum + channel * groups + group, mask, 0).to(tl.float32)
        next_acc = ()
        for r in tl.static_range(ROWS):
            mask = (word < words) & (row + r < rows)
            products, total = _word_sums(w, x + 4 * ((row + r) * words + word), mask, sixteen)
            products = tl.sum(tl.reshape(products, (N, WORDS // PER, PER)), 2)
            total = tl.sum(tl.reshape(total, (WORDS // PER, PER)), 1)
            next_acc += (acc[r] + products * group_scale + total[None, :] * group_minimum,)
        acc = next_acc
    channel = tl.program_id(0) * N + tl.arange(0, N)
    for r in tl.static_range(ROWS):
        mask = (row + r < rows) & (channel < n_out)
        _store_sum(tl.sum(acc[r], 1), residual, y, (row + r) * n_out + channel, mask)


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, minimum: Tensor | None, residual=None) -> Tensor:
    """model.linear for contiguous rows x [..., n_in]; n_in is a multiple of 32."""
    n_in, n_out = x.shape[-1], len(weight)
    rows = x.numel() // n_in
    y = x.new_empty(*x.shape[:-1], n_out)
    channels = 16  # few, so that there are enough programs to keep a large GPU busy
    programs = triton.cdiv(n_out, channels)
    if minimum is None:
        size = math.gcd(n_in, 64)
        grid = programs, triton.cdiv(rows, TILE.value)
        _linear[grid](x, weight, scale, residual, y, rows, n_in, n_out, size, 512 // size, channels)
        return y
    tiles = triton.cdiv(rows, 8)
    words, per = n_in // 8, n_in // minimum.shape[1] // 8
    args = x.view(torch.int32), weight.view(torch.int32), scale, minimum, residual, y, rows, words, n_out, SIXTEEN
    _linear_int4[programs, tiles](*args, per, triton.cdiv(rows, tiles), channels)
    return y


@triton.jit
def _dequantize(weight, scale, minimum, y, groups, SHARE: constexpr, BYTES: constexpr, G: constexpr):
    """G groups of BYTES bytes each, of which SHARE have a scale in common."""
    group = tl.program_id(0) * G + tl.arange(0, G)[:, None]
    mask = group < groups
    offsets = group * BYTES + tl.arange(0, BYTES)
    levels = tl.load(weight + offsets, mask, 0)
    step = tl.load(scale + group // SHARE, mask, 0).to(tl.float32)
    if minimum is None:
        tl.store(y + offsets, (levels * step).to(tl.bfloat16), mask)
    else:
        base = tl.load(minimum + group, mask, 0).to(tl.float32)
        numbers = tl.join((levels & 15) * step + base, (levels >> 4) * step + base)
        offsets = group * 2 * BYTES + tl.arange(0, 2 * BYTES)
        tl.store(y + offsets, tl.reshape(numbers, (G, 2 * BYTES)).to(tl.bfloat16), mask)


def dequantize(weight: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """model.dequantize to bfloat16, for a contiguous weight."""
    n_out, width = weight.shape  # in bytes
    size = math.gcd(width, 64) if minimum is None else width // minimum.shape[1]
    share = width // size if minimum is None else 1
    y = weight.new_empty(n_out, width if minimum is None else 2 * width, dtype=torch.bfloat16)
    groups, count = weight.numel() // size, 4096 // size
    _dequantize[triton.cdiv(groups, count),](weight, scale, minimum, y, groups, share, size, count)
    return y


@triton.jit
def _rms_norm(x, weight, y, eps, D: constexpr, WIDE: constexpr):
    """One row of D channels, padded to the power of two WIDE, in float32."""
    d = tl.arange(0, WIDE)
    mask = d < D
    offsets = tl.program_id(0) * D + d
    row = tl.load(x + offsets, mask, 0).to(tl.float32)
    scaled = row * tl.rsqrt(tl.sum(row * row) / D + eps) * tl.load(weight + d, mask, 0)
    tl.store(y + offsets, scaled.to(tl.bfloat16), mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """model.rms_norm for contiguous rows x [..., dim]."""
    dim, y = x.shape[-1], torch.empty_like(x)
    wide = triton.next_power_of_2(dim)
    _rms_norm[x.numel() // dim,](x, weight, y, eps, dim, wide, num_warps=8 if wide > 2048 else 4)
    return y


@triton.jit(do_not_specialize=["rows"])
def _swiglu(x, y, rows, ffn, BLOCK: constexpr):
    """silu of the gates, rounded, times the second half, for BLOCK channels of all rows in one."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < rows * ffn
    gates = x + offsets // ffn * ffn + offsets  # skips the second half of earlier rows
    gate = tl.load(gates, mask, 0).to(tl.float32)
    up = tl.load(gates + ffn, mask, 0).to(tl.float32)
    gate = (gate / (1 + tl.exp(-gate))).to(tl.bfloat16).to(tl.float32)
    tl.store(y + offsets, (gate * up).to(tl.bfloat16), mask)


def swiglu(x: Tensor) -> Tensor:
    """model.swiglu for contiguous rows x [..., 2 * ffn]."""
    ffn = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], ffn)
    _swiglu[triton.cdiv(y.numel(), 256),](x, y, y.numel() // ffn, ffn, 256, num_warps=1)
    return y


@triton.jit
def _apply_rope(x, mask, position, rope, D: constexpr, WIDE: constexpr):
    """Rotate the heads [HEADS, WIDE] at `x` to their positions, in float32, where `mask` is set."""
    d = tl.arange(0, WIDE)[None, :]
    mask = mask[:, None] & (d < D)
    angle = rope + position[:, None] * D + d % (D // 2)
    cos = tl.load(angle, mask, 0)
    sin = tl.load(angle + D // 2, mask, 0)
    here = tl.load(x[:, None] + d, mask, 0).to(tl.float32)
    there = tl.load(x[:, None] + (d + D // 2) % D, mask, 0).to(tl.float32)
    there = tl.where(d < D // 2, -there, there)
    return (here * cos + there * sin).to(tl.bfloat16)


@triton.jit
def _update_cache(new, v_offset, rope, keys, values, start, end, D: constexpr, WIDE: constexpr):
    """Write the keys at `new` [HEADS] and their values, v_offset further, if this program owns their blocks."""
    d = tl.arange(0, WIDE)
    position = start + tl.arange(0, HEADS)
    mine = (position < end) & (position // BLOCK % SPLITS == tl.program_id(1))
    offsets = position[:, None] * D + d
    mask = mine[:, None] & (d < D)
    tl.store(keys + offsets, _apply_rope(new, mine, position, rope, D, WIDE), mask)
    tl.store(values + offsets, tl.load(new[:, None] + v_offset + d, mask, 0), mask)
    tl.debug_barrier()  # because other threads read these keys and values next


@triton.jit
def _online_softmax(q, position, keys, values, end, D: constexpr, WIDE: constexpr):
    """Attention of q [HEADS, WIDE] to every SPLITS-th block: the weighted mean of the values, and the log-sum-exp.

    https://arxiv.org/abs/2205.14135
    """
    d, t = tl.arange(0, WIDE), tl.arange(0, BLOCK)
    m_i = tl.full([HEADS], float("-inf"), tl.float32)
    l_i = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, WIDE], tl.float32)
    for block in tl.range(tl.program_id(1) * BLOCK, end, SPLITS * BLOCK, num_stages=2):
        offsets = (block + t)[:, None] * D + d
        mask = (block + t < end)[:, None] & (d < D)
        scores = tl.dot(q, tl.trans(tl.load(keys + offsets, mask, 0).to(TYPE))) * D**-0.5
        scores = tl.where(block + t <= position[:, None], scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        weights = tl.exp(scores - m_new[:, None])
        alpha = tl.exp(m_i - m_new)
        l_i = l_i * alpha + tl.sum(weights, 1)
        mean = tl.dot(weights.to(tl.bfloat16).to(TYPE), tl.load(values + offsets, mask, 0).to(TYPE))
        acc = acc * alpha[:, None] + mean
        m_i = m_new
    return acc / l_i[:, None], m_i + tl.log(l_i)


@triton.jit(do_not_specialize=["rows"])
def _attention_split(
    qkv, rope, input_pos, cache, partial, logs, rows, capacity, D: constexpr, WIDE: constexpr, GROUP: constexpr
):
    """One KV head and split, for the GROUP query heads of each row; first its new keys and values."""
    h, split, n_kv_head = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    start = tl.load(input_pos).to(tl.int32)
    end = tl.minimum(start + rows, capacity)
    if split * BLOCK >= end:
        return
    n_head = n_kv_head * GROUP
    width = (n_head + 2 * n_kv_head) * D  # channels in a row of qkv
    keys = cache + h * capacity * D
    values = keys + n_kv_head * capacity * D
    r, d = tl.arange(0, HEADS), tl.arange(0, WIDE)
    for first in range(0, rows, HEADS):
        new = qkv + (first + r) * width + (n_head + h) * D
        _update_cache(new, n_kv_head * D, rope, keys, values, start + first, end, D, WIDE)
    for first in range(0, rows * GROUP, HEADS):
        row = (first + r) // GROUP
        head = h * GROUP + (first + r) % GROUP
        q = _apply_rope(qkv + row * width + head * D, row < rows, start + row, rope, D, WIDE)
        mean, log = _online_softmax(q.to(TYPE), start + row, keys, values, end, D, WIDE)
        offsets = (row * n_head + head) * SPLITS + split
        tl.store(partial + offsets[:, None] * D + d, mean, (row < rows)[:, None] & (d < D))
        tl.store(logs + offsets, log, row < rows)


@triton.jit
def _reduce_splits(partial, logs, input_pos, y, n_head, D: constexpr, WIDE: constexpr, COUNT: constexpr):
    """One head of one row: the mean over its COUNT splits or fewer, up to its own position."""
    i, split, d = tl.program_id(0), tl.arange(0, COUNT), tl.arange(0, WIDE)
    position = tl.load(input_pos).to(tl.int32) + i // n_head
    used = split <= position // BLOCK
    offsets = i * SPLITS + split
    log = tl.load(logs + offsets, used, float("-inf"))
    share = tl.exp(log - tl.max(log, 0))[:, None]
    parts = tl.load(partial + offsets[:, None] * D + d, used[:, None] & (d < D), 0)
    tl.store(y + i * D + d, (tl.sum(parts * share, 0) / tl.sum(share)).to(tl.bfloat16), d < D)


def attention(qkv: Tensor, rope: Tensor, input_pos: Tensor, cache: Tensor) -> Tensor:
    """model.attention for a batch of one, with a contiguous cache."""
    _, rows, channels = qkv.shape
    _, _, n_kv_head, capacity, head_dim = cache.shape
    n_head = channels // head_dim - 2 * n_kv_head
    wide = max(16, triton.next_power_of_2(head_dim))
    partial = rope.new_empty(rows * n_head, SPLITS.value, head_dim)
    logs = rope.new_empty(rows * n_head, SPLITS.value)
    y = qkv.new_empty(1, rows, n_head * head_dim)
    splits = min(SPLITS.value, triton.cdiv(capacity, BLOCK.value))
    shape = rows, capacity, head_dim, wide, n_head // n_kv_head
    _attention_split[n_kv_head, splits](qkv, rope, input_pos, cache, partial, logs, *shape, num_warps=8)
    shape = n_head, head_dim, wide, triton.next_power_of_2(splits)
    _reduce_splits[rows * n_head,](partial, logs, input_pos, y, *shape)
    return y


@triton.jit
def _hash32(x):
    """`sampling.hash32` of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _gumbel_noise(seed, position, ids):
    """`sampling.gumbel_noise` [len(ids)] of one position."""
    key = _hash32(_hash32(seed.to(tl.uint32, bitcast=True)) + position.to(tl.uint32))
    bits = _hash32(_hash32(key) ^ (ids.to(tl.uint32, bitcast=True) * 0x9E3779B9)) & 0x7FFFFF
    uniform = (bits.to(tl.float32) + 0.5) * 2.0**-23
    return -tl.log(-tl.log(uniform))


@triton.jit
def _load_logits(logits, ids, vocab_size):
    """Load logits as float32, NaN as infinity, because neither is ever sampled."""
    values = tl.load(logits + ids, ids < vocab_size, float("-inf")).to(tl.float32)
    return tl.where(values != values, float("inf"), values)


@triton.jit
def _largest(noisy, ids):
    """The largest number, and the lowest of its ids."""
    largest = tl.max(noisy)
    return largest, tl.min(tl.where(noisy == largest, ids, 0x7FFFFFFF))


@triton.jit
def _reduce_best(best, samples, row, parts, COUNT: constexpr):
    """Write the sample of a row, from the largest noisy logit and its id of each part, best [S, parts, 2]."""
    part = tl.arange(0, COUNT)
    mask = part < parts
    offsets = (row * parts + part) * 2
    noisy = tl.load(best + offsets, mask, -0x800000, cache_modifier=".cg").to(
        tl.float32, bitcast=True
    )  # -0x800000 is minus infinity
    ids = tl.load(best + offsets + 1, mask, 0, cache_modifier=".cg")
    largest, first = _largest(noisy, ids)
    tl.store(samples + row, tl.where(tl.abs(largest) < float("inf"), first, -1).to(tl.int64))


@triton.jit(do_not_specialize=["stride"])
def _sample(
    logits, stride, input_pos, seed, temperature, best, counts, samples, vocab_size, SIZE: constexpr, COUNT: constexpr
):
    """The largest noisy logit of SIZE ids of a row. The last program of a row reduces them to the sample."""
    row, part = tl.program_id(0), tl.program_id(1)
    parts = tl.num_programs(1)
    ids = part * SIZE + tl.arange(0, SIZE)
    values = _load_logits(logits + row * stride, ids, vocab_size)
    noise = _gumbel_noise(tl.load(seed), tl.load(input_pos + row), ids)
    largest, first = _largest(values + tl.load(temperature) * noise, ids)
    tl.store(best + (row * parts + part) * 2, largest.to(tl.int32, bitcast=True))
    tl.store(best + (row * parts + part) * 2 + 1, first)
    tl.debug_barrier()  # because the count below publishes the results
    if tl.atomic_add(counts + row, 1) == parts - 1:
        _reduce_best(best, samples, row, parts, COUNT)
        tl.store(counts + row, 0)


@cache
def program_counts(device: torch.device) -> Tensor:
    """The number of finished programs of each row of a sample; the last program sets it to 0 again."""
    return torch.zeros(4096, dtype=torch.int32, device=device)


def sample(logits: Tensor, input_pos: Tensor, seed: Tensor, temperature: Tensor, *limits: float) -> Tensor:
    """sampling.sample_reference in one kernel, after filter_logits if there are limits. A row may have any stride."""
    rows, vocab_size = logits.shape
    if limits != (vocab_size, 1.0, 0.0):
        logits = sampling.filter_logits(logits.float(), *limits)
    size = 1024
    parts = triton.cdiv(vocab_size, size)
    best = seed.new_empty(rows, parts, 2)
    samples = input_pos.new_empty(rows)
    args = logits, logits.stride(0), input_pos, seed, temperature, best, program_counts(seed.device), samples
    # Without fused multiply-adds, as PyTorch rounds.
    _sample[rows, parts](*args, vocab_size, size, triton.next_power_of_2(parts), enable_fp_fusion=False)
    return samples


pool = cache(torch.cuda.graph_pool_handle)  # graphs run one after the other, so they share their memory


class CudaGraph:
    """A step as one CUDA graph. https://docs.nvidia.com/cuda, "CUDA Graphs" """

    def capture(self, step: Callable[..., Tensor], inputs: Tensor, args: tuple) -> Tensor:
        """Run `step` (model, inputs, ...), which compiles its kernels, then capture it: the result of the run."""
        self.captured_args = args
        self.inputs = inputs.to(args[0].norm.weight.device)
        samples = step(args[0], self.inputs, *args[1:])
        self.graph = torch.cuda.CUDAGraph()
        self.replayable = True
        try:
            with torch.cuda.graph(self.graph, pool=pool()):
                self.samples = step(args[0], self.inputs, *args[1:])
        except RuntimeError as error:  # a collective of an older NCCL, for example
            cause = str(error.__context__ or error).partition("\n")[0]
            print(f"a step cannot be captured, so decoding is slower: {cause}", file=sys.stderr)
            self.replayable = False
            pool.cache_clear()  # because a broken capture may still use this pool
            torch.cuda.set_stream(torch.cuda.default_stream())  # because its own stream may still be the current one
        return samples

    def replay(self, inputs: Tensor) -> Tensor:
        """Launch the graph with new inputs: the result, which the next replay overwrites."""
        self.inputs.copy_(inputs, non_blocking=True)  # the only copy of a pass
        self.graph.replay()
        return self.samples
