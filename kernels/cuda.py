"""Few rows in bfloat16 on CUDA: Triton kernels for products with stored weights, attention, norms; the captured step.

Row i of many is bit for bit that row alone: it passes through the same instructions, whatever else is in its tile.
Positions are read on the device, so one CUDA graph of a step holds for all of them.
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

TILE = constexpr(8)  # rows of a product on tensor cores: the fewest that they take
WORDS = constexpr(128)  # words of 8 weights in 4 bits that are multiplied at once
SIXTEEN = 0x41800000  # the bits of 16.0 in float32
HEADS = constexpr(16)  # rows of attention, the same
BLOCK = constexpr(64)  # positions that are attended to at once
SPLITS = constexpr(128)  # programs that share out the blocks of a long sequence
# Triton's interpreter, by which a CPU tests these kernels, does not multiply bfloat16.
TYPE = constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


@triton.jit(do_not_specialize=["rows"])  # the same code for every number of rows
def _linear(x, weight, scale, y, rows, n_in, n_out, SIZE: constexpr, G: constexpr, N: constexpr):
    """N output channels of TILE rows on tensor cores: a batch of G products of SIZE input channels each at a time."""
    channel = (tl.program_id(0) * N + tl.arange(0, N))[None, :]
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    parts = n_in // SIZE
    sums = tl.zeros([G, N, TILE], tl.float32)
    for first in tl.range(0, parts, G, num_stages=3):
        part = first + tl.arange(0, G)[:, None]
        known = (part < parts) & (channel < n_out)
        at = channel * parts + part
        w = tl.load(weight + at[:, :, None] * SIZE + tl.arange(0, SIZE), known[:, :, None], 0)
        at_x = row * n_in + part[:, :, None] * SIZE + tl.arange(0, SIZE)[:, None]
        v = tl.load(x + at_x, (part[:, :, None] < parts) & (row < rows), 0)
        sums = tl.dot(w.to(TYPE), v.to(TYPE), sums)
    out = tl.sum(sums, 0)  # [N, TILE]
    channel = tl.program_id(0) * N + tl.arange(0, N)[:, None]
    if scale is not None:
        out *= tl.load(scale + channel, channel < n_out, 0)
    tl.store(y + row * n_out + channel, out.to(tl.bfloat16), (row < rows) & (channel < n_out))


@triton.jit
def _pair(word):
    """The two bfloat16 numbers in each word, the low one first, in float32."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _word_sums(w, x, inside, sixteen):
    """For words w [N, WORDS] of 8 levels, and the pairs of one row at x [WORDS]: sums of level * x, and of x.

    A level is put into the mantissa of 256.0 or of 16.0, whose bits are given as an argument: so masking and adding
    them is one instruction.
    """
    products = tl.zeros(w.shape, tl.float32)
    evens = tl.zeros([WORDS], tl.float32)
    odds = tl.zeros([WORDS], tl.float32)
    for i in tl.static_range(4):  # levels 2 i and 2 i + 1
        even, odd = _pair(tl.load(x + i, inside, 0))
        bits = w << 15 - 8 * i if i < 2 else w >> 8 * i - 15  # the levels at bits 15 and 19
        products += (bits & 0x78000 | sixteen + 0x2000000).to(tl.float32, bitcast=True) * even[None, :]
        products += (bits & 0x780000 | sixteen).to(tl.float32, bitcast=True) * odd[None, :]
        evens += even
        odds += odd
    return products - (256 * evens + 16 * odds)[None, :], evens + odds


@triton.jit(do_not_specialize=["rows", "sixteen"])
def _linear_int4(
    x, weight, scale, minimum, y, rows, words, n_out, sixteen, PER: constexpr, ROWS: constexpr, N: constexpr
):
    """N output channels of ROWS rows, from words of 8 levels, PER of them in a group, by additions in float32.

    No tensor cores: with them one row took 1.75 times as long on an H100 (BENCHMARKS.md). Of a group, sum x (scale *
    level + minimum) = scale * sum x level + minimum * sum x.
    """
    channel = tl.program_id(0) * N + tl.arange(0, N)[:, None]
    row = tl.program_id(1) * ROWS
    groups = words // PER
    sums = ()  # of each row
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros([N, WORDS // PER], tl.float32),)
    for first in tl.range(0, words, WORDS, num_stages=3):
        word = first + tl.arange(0, WORDS)
        w = tl.load(weight + channel * words + word, (channel < n_out) & (word < words), 0)
        group = first // PER + tl.arange(0, WORDS // PER)
        known = (channel < n_out) & (group < groups)
        step = tl.load(scale + channel * groups + group, known, 0).to(tl.float32)
        base = tl.load(minimum + channel * groups + group, known, 0).to(tl.float32)
        added = ()
        for r in tl.static_range(ROWS):
            inside = (word < words) & (row + r < rows)
            products, total = _word_sums(w, x + 4 * ((row + r) * words + word), inside, sixteen)
            products = tl.sum(tl.reshape(products, (N, WORDS // PER, PER)), 2)
            total = tl.sum(tl.reshape(total, (WORDS // PER, PER)), 1)
            added += (sums[r] + products * step + total[None, :] * base,)
        sums = added
    channel = tl.program_id(0) * N + tl.arange(0, N)
    for r in tl.static_range(ROWS):
        inside = (row + r < rows) & (channel < n_out)
        tl.store(y + (row + r) * n_out + channel, tl.sum(sums[r], 1).to(tl.bfloat16), inside)


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, minimum: Tensor | None) -> Tensor:
    """`kernels.Linear` of contiguous rows x [..., n_in]; n_in is a multiple of 32."""
    n_in, n_out = x.shape[-1], len(weight)
    rows = x.numel() // n_in
    y = x.new_empty(*x.shape[:-1], n_out)
    channels = 16  # so few that there are as many programs as keep a large GPU busy
    programs = triton.cdiv(n_out, channels)
    if minimum is None:
        size = math.gcd(n_in, 64)
        grid = programs, triton.cdiv(rows, TILE.value)
        _linear[grid](x, weight, scale, y, rows, n_in, n_out, size, 512 // size, channels)
        return y
    tiles = triton.cdiv(rows, 8)
    words, per = n_in // 8, n_in // minimum.shape[1] // 8
    given = x.view(torch.int32), weight.view(torch.int32), scale, minimum, y, rows, words, n_out, SIXTEEN
    _linear_int4[programs, tiles](*given, per, triton.cdiv(rows, tiles), channels)
    return y


@triton.jit
def _dequantize(weight, scale, minimum, y, groups, SHARE: constexpr, BYTES: constexpr, G: constexpr):
    """G groups of BYTES bytes each, of which SHARE have a scale in common."""
    group = tl.program_id(0) * G + tl.arange(0, G)[:, None]
    known = group < groups
    at = group * BYTES + tl.arange(0, BYTES)
    levels = tl.load(weight + at, known, 0)
    step = tl.load(scale + group // SHARE, known, 0).to(tl.float32)
    if minimum is None:
        tl.store(y + at, (levels * step).to(tl.bfloat16), known)
    else:
        base = tl.load(minimum + group, known, 0).to(tl.float32)
        numbers = tl.join((levels & 15) * step + base, (levels >> 4) * step + base)
        at = group * 2 * BYTES + tl.arange(0, 2 * BYTES)
        tl.store(y + at, tl.reshape(numbers, (G, 2 * BYTES)).to(tl.bfloat16), known)


def dequantize(weight: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """`kernels.dequantize` to bfloat16, of a contiguous weight."""
    n_out, width = weight.shape  # in bytes
    size = math.gcd(width, 64) if minimum is None else width // minimum.shape[1]
    share = width // size if minimum is None else 1
    y = weight.new_empty(n_out, width if minimum is None else 2 * width, dtype=torch.bfloat16)
    groups, count = weight.numel() // size, 4096 // size
    _dequantize[triton.cdiv(groups, count),](weight, scale, minimum, y, groups, share, size, count)
    return y


@triton.jit
def _rms_norm(x, weight, y, eps, D: constexpr, WIDE: constexpr):
    """One row, in float32."""
    d = tl.arange(0, WIDE)
    at = tl.program_id(0) * D + d
    row = tl.load(x + at, d < D, 0).to(tl.float32)
    scaled = row * tl.rsqrt(tl.sum(row * row) / D + eps) * tl.load(weight + d, d < D, 0)
    tl.store(y + at, scaled.to(tl.bfloat16), d < D)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.RMSNorm` of contiguous rows x [..., dim]."""
    dim, y = x.shape[-1], torch.empty_like(x)
    _rms_norm[x.numel() // dim,](x, weight, y, eps, dim, triton.next_power_of_2(dim))
    return y


@triton.jit
def _turned(x, known, position, frequencies, D: constexpr, WIDE: constexpr):
    """The `known` ones of the heads [HEADS, WIDE] that begin at `x`, turned to their positions by RoPE in float32."""
    d = tl.arange(0, WIDE)
    inside = known[:, None] & (d < D)
    angle = position[:, None].to(tl.float32) * tl.load(frequencies + d % (D // 2), d < D, 0)
    here = tl.load(x[:, None] + d, inside, 0).to(tl.float32)
    there = tl.load(x[:, None] + (d + D // 2) % D, inside, 0).to(tl.float32)
    there = tl.where(d < D // 2, -there, there)
    return (here * tl.cos(angle) + there * tl.sin(angle)).to(tl.bfloat16)


@triton.jit
def _update(new, step, frequencies, keys, values, start, end, D: constexpr, WIDE: constexpr):
    """Write those of the keys at `new` [HEADS], and of the values `step` behind, whose blocks are this program's."""
    d = tl.arange(0, WIDE)
    position = start + tl.arange(0, HEADS)
    mine = (position < end) & (position // BLOCK % SPLITS == tl.program_id(1))
    at = position[:, None] * D + d
    inside = mine[:, None] & (d < D)
    tl.store(keys + at, _turned(new, mine, position, frequencies, D, WIDE), inside)
    tl.store(values + at, tl.load(new[:, None] + step + d, inside, 0), inside)
    tl.debug_barrier()  # other threads read next what these have written


@triton.jit
def _online_softmax(q, position, keys, values, end, D: constexpr, WIDE: constexpr):
    """Attention of q [HEADS, WIDE] to every SPLITS-th block: the mean of its values, the log of the sum of weights.

    https://arxiv.org/abs/2205.14135
    """
    d, t = tl.arange(0, WIDE), tl.arange(0, BLOCK)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    sums = tl.zeros([HEADS, WIDE], tl.float32)
    for block in tl.range(tl.program_id(1) * BLOCK, end, SPLITS * BLOCK, num_stages=2):
        at = (block + t)[:, None] * D + d
        filled = (block + t < end)[:, None] & (d < D)
        scores = tl.dot(q, tl.trans(tl.load(keys + at, filled, 0).to(TYPE))) * D**-0.5
        scores = tl.where(block + t <= position[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        mean = tl.dot(weights.to(tl.bfloat16).to(TYPE), tl.load(values + at, filled, 0).to(TYPE))
        sums = sums * shrink[:, None] + mean
        top = higher
    return sums / total[:, None], top + tl.log(total)


@triton.jit(do_not_specialize=["rows"])
def _attend(
    qkv, rope, input_pos, cache, partial, logs, rows, capacity, D: constexpr, WIDE: constexpr, GROUP: constexpr
):
    """One KV head and split, for the GROUP query heads of each row; first its new keys and values."""
    h, split, n_kv_head = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    start = tl.load(input_pos).to(tl.int32)
    end = tl.minimum(start + rows, capacity)
    if split * BLOCK >= end:
        return
    n_head = n_kv_head * GROUP
    width = (n_head + 2 * n_kv_head) * D  # of a row of qkv
    keys = cache + h * capacity * D
    values = keys + n_kv_head * capacity * D
    r, d = tl.arange(0, HEADS), tl.arange(0, WIDE)
    for first in range(0, rows, HEADS):
        new = qkv + (first + r) * width + (n_head + h) * D
        _update(new, n_kv_head * D, rope, keys, values, start + first, end, D, WIDE)
    for first in range(0, rows * GROUP, HEADS):
        row = (first + r) // GROUP
        head = h * GROUP + (first + r) % GROUP
        q = _turned(qkv + row * width + head * D, row < rows, start + row, rope, D, WIDE)
        mean, log = _online_softmax(q.to(TYPE), start + row, keys, values, end, D, WIDE)
        at = (row * n_head + head) * SPLITS + split
        tl.store(partial + at[:, None] * D + d, mean, (row < rows)[:, None] & (d < D))
        tl.store(logs + at, log, row < rows)


@triton.jit
def _combine(partial, logs, input_pos, y, n_head, D: constexpr, WIDE: constexpr):
    """One head of one row: the mean over its splits, up to its own position."""
    i, split, d = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, WIDE)
    position = tl.load(input_pos).to(tl.int32) + i // n_head
    used = split <= position // BLOCK
    at = i * SPLITS + split
    log = tl.load(logs + at, used, float("-inf"))
    share = tl.exp(log - tl.max(log, 0))[:, None]
    parts = tl.load(partial + at[:, None] * D + d, used[:, None] & (d < D), 0)
    tl.store(y + i * D + d, (tl.sum(parts * share, 0) / tl.sum(share)).to(tl.bfloat16), d < D)


def attention(qkv: Tensor, frequencies: Tensor, input_pos: Tensor, cache: Tensor) -> Tensor:
    """`kernels.attention` of a batch of one, with a contiguous cache."""
    _, rows, channels = qkv.shape
    _, _, n_kv_head, capacity, head_dim = cache.shape
    n_head = channels // head_dim - 2 * n_kv_head
    wide = max(16, triton.next_power_of_2(head_dim))
    partial = frequencies.new_empty(rows * n_head, SPLITS.value, head_dim)
    logs = frequencies.new_empty(rows * n_head, SPLITS.value)
    y = qkv.new_empty(1, rows, n_head * head_dim)
    grid = n_kv_head, min(SPLITS.value, triton.cdiv(capacity, BLOCK.value))
    shape = rows, capacity, head_dim, wide, n_head // n_kv_head
    _attend[grid](qkv, frequencies, input_pos, cache, partial, logs, *shape, num_warps=8)
    _combine[rows * n_head,](partial, logs, input_pos, y, n_head, head_dim, wide)
    return y


pool = cache(torch.cuda.graph_pool_handle)  # graphs run one after the other, so they share their memory


class CudaGraph:
    """A step as one CUDA graph. https://docs.nvidia.com/cuda, "CUDA Graphs" """

    def capture(self, step: Callable[..., Tensor], inputs: Tensor, args: tuple) -> Tensor:
        """Run `step` (model, inputs, ...), which compiles its kernels, then capture it: the result of the run."""
        self.captured_args = args
        self.rope = args[0].rope  # kept alive, because the model may replace it by a larger one
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
