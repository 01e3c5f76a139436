"""CUDA: its kernels in Triton's interpreter (on a GPU if there is one), its machine code, its captured step.

Tests that need a card are marked cuda. The others show on a CPU that products and attention are right, that their rows
do not depend on each other, that their machine code for four GPUs keeps to limits, and that a captured step never waits
for the device.
"""

import functools
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import utils

import numpy as np
import pytest
import torch
from conftest import ROOT, Eager, generated, make_params, new_engine, random_model, run_cli
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import generate as generate_module
import kernels
from checkpoint import load_model, read_checkpoint
from generate import Engine
from model import Linear, ModelArgs, Transformer, attention, dequantize, rope_table
from quantize import quantize, quantize_int4, quantize_int8
from sampling import SamplingParams, sample_reference
from speculation import PromptLookup, Speculation

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from kernels import cuda  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def independent_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply without BLAS in the interpreter: its order of additions may depend on a row's place in a tile."""

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return np.einsum("...ij,...jk->...ik", a, b, dtype=dtype)

    if INTERPRETED:
        monkeypatch.setattr(np, "matmul", matmul)


@pytest.fixture(autouse=True, scope="module")
def rounding() -> None:
    """Round float32 to the nearest bfloat16, as a GPU does; Triton's interpreter truncates it."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self, source, kind):
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            numbers = torch.tensor(source.data).bfloat16().view(torch.uint16)
            return interpreter.TensorHandle(numbers.numpy(), tl.bfloat16)
        return cast(self, source, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)
        yield


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


# ---- Products

SCHEMES = ["bf16", "int8", "g32", "g64", "g128", "g256"]


def stored(n_out: int, n_in: int, scheme: str) -> list[Tensor | None]:
    """A weight in a stored layout: weight, scale, minimum."""
    weight = normal(n_out, n_in).to(DEVICE)
    if scheme == "bf16":
        return [weight.bfloat16(), None, None]
    parts = quantize_int8(weight) if scheme == "int8" else quantize_int4(weight, int(scheme[1:]))
    return [parts.get(name) for name in ("weight", "scale", "minimum")]


def check_product(n_out: int, n_in: int, scheme: str, sizes: list[int]) -> None:
    """Compare with float64 within the rounding of bfloat16, and some rows with all sixteen bit for bit."""
    weight = stored(n_out, n_in, scheme)
    x = normal(1, 16, n_in).bfloat16().to(DEVICE)
    found = cuda.linear(x, *weight)
    residual = normal(1, 16, n_out).bfloat16().to(DEVICE)
    assert torch.equal(cuda.linear(x, *weight, residual), residual + found)
    exact = dequantize(*weight, torch.float32).double()
    expected = x.double() @ exact.T
    bound = 2**-8 * (expected.abs() + x.double().abs() @ exact.abs().T / 16)
    assert ((found.double() - expected).abs() < bound).all()
    for rows in sizes:
        for start in {0, 16 - rows, (16 - rows) // 2}:
            part = x[:, start : start + rows].contiguous()
            assert torch.equal(cuda.linear(part, *weight), found[:, start : start + rows]), (rows, start)


@pytest.mark.parametrize(
    "scheme", [*SCHEMES[:3], *(pytest.param(name, marks=pytest.mark.slow) for name in SCHEMES[3:])]
)
def test_products_are_exact_and_their_rows_independent(scheme: str) -> None:
    """An odd number of output channels, and groups that no whole number of tiles holds."""
    check_product(33, 768, scheme, [1, 6, 9])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_of_every_number_of_rows(scheme: str) -> None:
    check_product(48, 768, scheme, list(range(1, 17)))
    check_product(17, 1280, scheme, [1, 16])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["bf16", "int8", "g32"])
def test_products_of_layers_that_no_power_of_two_divides(scheme: str) -> None:
    """llama-68m's and Llama-2-13B's feed-forward layers are 3,072 and 13,824 wide; a rank may hold 1,376 of 11,008."""
    check_product(24, 1376, scheme, [1, 2, 16])


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_a_weight_is_dequantized_as_on_a_cpu(scheme: str) -> None:
    """The last program has a part of its bytes only."""
    weight = stored(33, 768, scheme)
    found, expected = cuda.dequantize(*weight), dequantize(*weight, torch.float32)
    assert found.shape == (33, 768)
    assert ((found.float() - expected).abs() <= 2**-8 * expected.abs()).all()


@pytest.mark.parametrize("dim", [64, 768, 1376])
def test_a_norm_is_exact_and_its_rows_independent(dim: int) -> None:
    x, weight = normal(1, 16, dim).bfloat16().to(DEVICE), normal(dim).bfloat16().to(DEVICE)
    found = cuda.rms_norm(x, weight, 1e-5)
    expected = torch.nn.functional.rms_norm(x.double(), (dim,), weight.double(), 1e-5)
    assert ((found - expected).abs() <= 2**-8 * expected.abs()).all()
    assert torch.equal(cuda.rms_norm(x[:, 5:6].contiguous(), weight, 1e-5), found[:, 5:6])


@pytest.mark.parametrize("rows", [1, 5])
def test_swiglu_rounds_as_pytorch_does(rows: int) -> None:
    x = (4 * normal(1, rows, 2 * 1376)).bfloat16().to(DEVICE)
    gate, up = x.chunk(2, dim=-1)
    found, expected = cuda.swiglu(x), torch.nn.functional.silu(gate) * up
    assert (found != expected).float().mean() < 0.001
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


# ---- Samples

SAMPLING_LIMITS = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 7, "top_p": 0.5, "min_p": 0.01},
]


def check_samples(logits: Tensor, temperature: float, limits: dict) -> Tensor:
    """Compare with the reference, and each row with all rows: the samples."""
    rows, vocab_size = logits.shape
    positions = torch.arange(100, 100 + rows, device=DEVICE)
    params = SamplingParams.create(DEVICE, 5, temperature)
    all_limits = {"top_k": vocab_size, "top_p": 1.0, "min_p": 0.0} | limits
    args = params.seed, params.temperature, *all_limits.values()
    found = cuda.sample(logits, positions, *args)
    assert torch.equal(found, sample_reference(logits, positions, *args)), (temperature, limits)
    for row in range(rows):
        part = slice(row, row + 1)
        assert torch.equal(cuda.sample(logits[part], positions[part], *args), found[part])
    return found


@pytest.mark.parametrize("limits", SAMPLING_LIMITS, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8, 3.0])
def test_samples_are_those_of_pytorch(temperature: float, limits: dict) -> None:
    """A vocabulary that no block divides, in rows whose stride is larger."""
    check_samples((3 * normal(4, 3072)).bfloat16().to(DEVICE)[:, :3001], temperature, limits)


@pytest.mark.parametrize("limits", SAMPLING_LIMITS, ids=str)
def test_of_equal_logits_the_lower_ids_are_sampled(limits: dict) -> None:
    logits = normal(3, 1100).mul(2).round().bfloat16().to(DEVICE)
    logits[1] = 0.0
    logits[1, ::2] = -0.0
    logits[2, 1:] = -torch.inf
    for temperature in (0.0, 50.0):
        check_samples(logits, temperature, limits)


@pytest.mark.parametrize("limits", SAMPLING_LIMITS, ids=str)
def test_the_sample_of_logits_that_are_not_finite_is_minus_1(limits: dict) -> None:
    logits = normal(4, 1100).bfloat16().to(DEVICE)
    logits[0, 7] = torch.nan
    logits[1, 1099] = torch.inf
    logits[2] = -torch.inf
    assert (check_samples(logits, 0.8, limits) == -1).tolist() == [True, True, True, False]


# ---- Attention


def check_attention(
    n_head: int, n_kv_head: int, head_dim: int, capacity: int, starts: list[int], max_rows: int = 16
) -> None:
    """Compare with float32 in PyTorch, with NaN after the positions; and one call of many rows with calls of few."""
    shape = {"dim": 1, "n_layer": 1, "n_head": n_head, "n_kv_head": n_kv_head, "head_dim": head_dim, "ffn_dim": 1}
    args = ModelArgs(**shape, vocab_size=1, norm_eps=1e-5, rope_theta=1e4, rope_scale=1.0, max_seq_length=capacity)
    rope = rope_table(args, capacity).to(DEVICE)
    for start in starts:
        past = normal(2, 1, n_kv_head, capacity, head_dim).bfloat16().to(DEVICE)
        past[:, :, :, start:] = torch.nan
        rows = min(max_rows, capacity - start)
        positions = torch.arange(start, start + rows, device=DEVICE)
        qkv = normal(1, rows, (n_head + 2 * n_kv_head) * head_dim).bfloat16().to(DEVICE)
        cache, reference = past.clone(), past.float()
        found = cuda.attention(qkv, rope, positions, cache)
        expected = attention(qkv.float(), rope, positions, reference)
        assert (found.float() - expected).abs().max() < 0.02
        end = start + rows
        assert torch.equal(cache[1, :, :, :end], reference[1, :, :, :end].bfloat16())
        assert (cache[0, :, :, :end].float() - reference[0, :, :, :end]).abs().max() < 0.03
        assert cache[:, :, :, end:].isnan().all()
        for size in {1, min(6, rows)}:
            again, parts = past.clone(), []
            for first in range(0, rows - size + 1, size):
                some = slice(first, first + size)
                parts.append(cuda.attention(qkv[:, some].contiguous(), rope, positions[some], again))
            together = torch.cat(parts, dim=1)
            assert torch.equal(together, found[:, : together.shape[1]]), (start, size)


HEADS = {"multi-head": (2, 2, 64), "four to one": (4, 1, 128), "eight to one": (8, 1, 64), "of 80": (1, 1, 80)}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_attention_is_exact_and_its_rows_independent(heads: tuple) -> None:
    """Across a border between blocks, and up to the last position."""
    check_attention(*heads, 70, [54])


def test_attention_of_a_short_prompt() -> None:
    """More rows than are captured, across a border between blocks."""
    check_attention(1, 1, 16, 90, [50], max_rows=36)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [*HEADS.values(), (2, 1, 96), (2, 1, 48)])
def test_attention_at_every_border(heads: tuple) -> None:
    check_attention(*heads, 200, [0, 48, 63, 184, 199])


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="a constant of the compiled kernels")
def test_attention_of_more_blocks_than_splits(monkeypatch) -> None:
    """Each split then has several blocks, SPLITS blocks apart."""
    monkeypatch.setattr(cuda, "SPLITS", tl.constexpr(2))
    check_attention(2, 1, 32, 400, [0, 250])


# ---- The step, captured

ARGS = ModelArgs(32, 1, 2, 1, 16, 32, 48, 1e-5, 10000.0, 1.0, 64)  # an interpreter is slow
aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.item.default, aten.nonzero.default, aten.is_nonzero.default}
WAITS |= {aten.equal.default, aten.masked_select.default}


class Capture(TorchDispatchMode):
    """A stand-in for torch.cuda.CUDAGraph, of PyTorch's operators and Triton's launches on a CPU.

    Both are captured with their tensors, and replayed on these. An operator that makes the host wait is refused.
    """

    now: list["Capture"] = []

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in WAITS:
            raise RuntimeError(f"{operator} makes the host wait")
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, out))
        return out

    def replay(self) -> None:
        for call, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(call(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Launched:
    """A kernel whose launches are counted, and captured during a capture."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self.count = 0

    def __call__(self, *args, **kwargs):
        """Call a function of Triton from another one: no launch."""
        return self.kernel(*args, **kwargs)

    def __getitem__(self, grid):
        def launch(*args, **kwargs) -> None:
            self.count += 1
            with _disable_current_modes():  # the interpreter uses PyTorch, too
                self.kernel[grid](*args, **kwargs)
            if Capture.now:
                Capture.now[0].calls.append((self.kernel[grid], args, kwargs, None))

        return launch


@contextmanager
def capturing(graph: Capture, pool: object):
    Capture.now.append(graph)
    try:
        with graph:
            yield
    finally:
        Capture.now.pop()


@pytest.fixture
def like_cuda(monkeypatch) -> dict[str, Launched]:
    """Run CPU tensors as on CUDA: its kernels, interpreted, and its captured step. The kernels, by name."""
    if not INTERPRETED:
        pytest.skip("the path itself is tested where there is a GPU")

    def python(operator):
        """The operator as a Python function, in which a capture sees every call."""
        return lambda *args: operator(*args)

    monkeypatch.setattr(kernels, "cuda_kernels_for", lambda dtype: cuda if dtype == torch.bfloat16 else None)
    monkeypatch.setattr(kernels, "new_graph", lambda x: cuda.CudaGraph() if x.dtype == torch.bfloat16 else None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Capture)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(cuda, "pool", functools.cache(lambda: None))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: None)
    functions = {name: each for name, each in vars(cuda).items() if isinstance(each, interpreter.InterpretedFunction)}
    launched = {name: Launched(function) for name, function in functions.items()}
    for name, kernel in launched.items():
        monkeypatch.setattr(cuda, name, kernel)
    for name in ("linear", "attention", "rms_norm", "swiglu", "sample"):
        monkeypatch.setattr(torch.ops.llama, name, python(getattr(kernels, name)))
    return launched


def bfloat16_model(spread: float = 0.3) -> Transformer:
    return random_model(ARGS, spread).bfloat16()


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_captured_step_equals_an_eager_one(like_cuda, temperature: float) -> None:
    """Token by token, and with right and wrong guesses; nothing in the step makes the host wait."""
    model, params = bfloat16_model(), make_params(3, temperature)
    prompt = [5, 7, 9]
    expected = generated(Eager(model, 64), prompt, 8, params)
    engine = new_engine(model)
    for _ in range(2):  # the second time, everything has been captured
        assert generated(engine, prompt, 8, params) == expected
    counts = []  # of accepted guesses

    def guesses(ids: list[int], k: int, params: SamplingParams) -> list[int]:
        """Right guesses, and a last one that is wrong."""
        return [*(prompt + expected)[len(ids) :][: max(k - 1, 0)], 0][:k]

    draft = new_engine(random_model(ARGS))
    draft.draft = guesses
    speculation = Speculation(draft, 3)
    speculation.choose = lambda max_k, sources: ("draft", min(max_k, 3)) if max_k > 0 else ("none", 0)
    speculation.update = lambda source, k, accepted, *seconds: counts.append(accepted)
    assert generated(engine, prompt, 8, params, speculation=speculation) == expected
    assert set(counts) >= {0, 2}
    graphs = engine.decode_step.graphs.values()
    assert all(isinstance(graph, cuda.CudaGraph) and graph.replayable for graph in graphs)


@pytest.mark.slow
def test_a_draft_is_captured_too(like_cuda) -> None:
    """Equal guesses of a captured draft and an eager one."""
    model, params = bfloat16_model(), make_params(3, 0.8)
    draft, eager = new_engine(model), Eager(model, 64)
    for ids in ([5, 7, 9], [5, 7, 9, 11, 2]):
        assert draft.draft(ids, 4, params) == eager.draft(ids, 4, params)


def test_the_kernels_that_a_step_launches(like_cuda) -> None:
    """Four products, two norms, SwiGLU and two kernels of attention a layer."""
    model = bfloat16_model()
    model(torch.tensor([[3, 4]]), torch.tensor([0, 1]), model.make_cache(8))
    counts = {name: kernel.count for name, kernel in like_cuda.items() if kernel.count > 0}
    expected = {"_linear": 4 * ARGS.n_layer + 1, "_rms_norm": 2 * ARGS.n_layer + 1}
    assert counts == expected | dict.fromkeys(("_swiglu", "_attention_split", "_reduce_splits"), ARGS.n_layer)


def test_a_step_that_cannot_be_captured_runs_eagerly(like_cuda, monkeypatch, capsys) -> None:
    """The same text, and one line for each number of rows."""
    model = bfloat16_model()
    expected = generated(Eager(model, 64), [5, 7, 9], 3, make_params())
    monkeypatch.setitem(globals(), "WAITS", {aten.embedding.default})
    engine = new_engine(model)
    assert generated(engine, [5, 7, 9], 3, make_params()) == expected
    assert [graph.replayable for graph in engine.decode_step.graphs.values()] == [False, False]
    assert capsys.readouterr().err.count("a step cannot be captured, so decoding is slower: aten.embedding") == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompt", [[5, 7, 9], [5, 7, 9] * 20], ids=["short", "to the end of the context"])
def test_decoding_ahead_of_the_host_gives_the_same_text(dtype: torch.dtype, prompt: list[int], monkeypatch) -> None:
    """On a CPU, where a pass ends before the next one starts: the order of passes and copies, and the cached tokens."""
    empty = torch.empty
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **others: empty(*shape, **others))
    model, params = random_model(ARGS).to(dtype), make_params(3, 0.8)
    expected = generated(new_engine(model), prompt, 20, params)
    engine = new_engine(model)
    monkeypatch.setattr(engine, "decode", functools.partial(kernels.decode_ahead, engine))
    for _ in range(2):
        assert generated(engine, prompt, 20, params) == expected
        assert engine.cached_ids == prompt + expected[:-1]
    assert generated(engine, prompt, 20, params, [expected[2]]) == expected[: expected.index(expected[2])]
    engine.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        generated(engine, prompt, 20, params)


def test_a_draft_waits_for_the_device_twice(monkeypatch) -> None:
    """Once for the token after the prompt, and once for all others."""
    model, waits = random_model(ARGS), []
    engine = new_engine(model)
    read = engine.read
    monkeypatch.setattr(engine, "read", lambda samples: waits.append(1) or read(samples))
    guesses = engine.draft([5, 7, 9], 6, make_params())
    assert len(guesses) == 6 and len(waits) == 2
    assert guesses == generated(new_engine(model), [5, 7, 9], 6, make_params())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draft_whose_logits_are_not_finite_is_an_error(dtype: torch.dtype, monkeypatch) -> None:
    """An error also from the second guess on, although the device goes on with a sample that is no token."""
    engine = new_engine(random_model(ARGS).to(dtype))
    prefill = engine.prefill

    def prefill_and_break(ids: list[int], params: SamplingParams) -> list[int]:
        first = prefill(ids, params)
        engine.model.norm.weight.fill_(torch.nan)
        return first

    monkeypatch.setattr(engine, "prefill", prefill_and_break)
    with pytest.raises(ValueError, match="not finite"):
        engine.draft([5, 7, 9], 4, make_params())


# ---- Without kernels


def test_without_kernels_one_line_names_the_cause_and_the_cost(monkeypatch, capsys) -> None:
    """Another dtype, no Triton, an older GPU, no C compiler for Triton's own launcher."""
    zeros = torch.zeros

    def broken(*_) -> None:
        raise RuntimeError("Failed to find C compiler\nset CC")

    cases = {
        "compute capability 8.0": (torch.bfloat16, cuda, (7, 5), cuda.linear),
        "import of kernels.cuda halted": (torch.bfloat16, None, (9, 0), cuda.linear),
        "they take bfloat16": (torch.float32, cuda, (9, 0), cuda.linear),
        "Failed to find C compiler": (torch.bfloat16, cuda, (9, 0), broken),
        "": (torch.bfloat16, cuda, (8, 0), cuda.linear),
    }
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **kwargs: zeros(*shape, device=DEVICE, **kwargs))
    for cause, (dtype, found, capability, product) in cases.items():
        kernels.cuda_kernels_for.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
            patch.setattr(cuda, "linear", product)
            if found is None:
                patch.delattr(kernels, "cuda")
                patch.setitem(sys.modules, "kernels.cuda", None)
            assert [kernels.cuda_kernels_for(dtype) for _ in range(2)] == [None if cause else cuda] * 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == bool(cause) and cause in printed
        assert not cause or printed.startswith(f"no CUDA kernels for {dtype}, so decoding is several times slower: ")
    kernels.cuda_kernels_for.cache_clear()


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be",
        "CUDA error: all CUDA-capable devices are busy or unavailable\nFor debugging consider",
        "Unexpected error from cudaGetDeviceCount(). CUDA driver version is insufficient",
    ],
)
def test_an_error_of_cuda_is_one_line(message: str, capsys) -> None:
    def main() -> None:
        raise RuntimeError(message)

    assert utils.exit_status(main, lambda message: print(message, file=sys.stderr)) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith("the GPU or its driver failed, or is busy: ")


# ---- Machine code

COMPILE = """
import json, os, re, subprocess, sys, tempfile
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import cuda

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
TYPES = {torch.bfloat16: "*bf16", torch.int8: "*i8", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
launches = []

class Spy:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, num_warps=4, **options: launches.append((self.kernel, args, num_warps))

def compile(kernel, args, warps, arch):
    signature, constants, aligned = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args)):
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], aligned[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        open(f"{folder}/k.ptx", "w").write(made.asm["ptx"])
        name = re.search(r"\\.target (\\w+)", made.asm["ptx"]).group(1)
        ptxas = os.path.join(TOOLS, "ptxas-blackwell" if arch >= 100 else "ptxas")
        command = [ptxas, "-v", "--gpu-name", name, f"{folder}/k.ptx", "-o", f"{folder}/k.o"]
        figures = subprocess.run(command, capture_output=True, text=True).stderr
    return {
        "registers": int(re.search(r"Used (\\d+) registers", figures).group(1)),
        "spilled": sum(map(int, re.findall(r"(\\d+) bytes spill", figures))),
        "shared": made.metadata.shared,
        "loads": re.findall(r"cp\\.async\\.\\w+\\.shared\\.global.*?(0x\\w+), ", made.asm["ptx"]),
    }

for name in ("_linear", "_linear_int4", "_attention_split", "_reduce_splits", "_swiglu", "_sample"):
    setattr(cuda, name, Spy(getattr(cuda, name)))
labels = []
for scheme, rows in SHAPES:
    n_in, n_out = 4096, 4096
    x = torch.zeros(1, rows, n_in, dtype=torch.bfloat16)
    scale = minimum = None
    if scheme == "bf16":
        weight = torch.zeros(n_out, n_in, dtype=torch.bfloat16)
    elif scheme == "int8":
        weight, scale = torch.zeros(n_out, n_in, dtype=torch.int8), torch.zeros(n_out)
    else:
        weight = torch.zeros(n_out, n_in // 2, dtype=torch.uint8)
        scale = minimum = torch.zeros(n_out, n_in // int(scheme[1:]), dtype=torch.bfloat16)
    cuda.linear(x, weight, scale, minimum)
    labels.append(f"{scheme}, rows: {rows}")
for n_head, n_kv_head, head_dim in HEADS:
    qkv = torch.zeros(1, 6, (n_head + 2 * n_kv_head) * head_dim, dtype=torch.bfloat16)
    cache = torch.zeros(2, 1, n_kv_head, 4096, head_dim, dtype=torch.bfloat16)
    cuda.attention(qkv, torch.zeros(4096, head_dim), torch.zeros(6, dtype=torch.int64), cache)
    labels += [f"attention {n_head}/{n_kv_head} of {head_dim}", f"reduce {head_dim}"]
number = torch.zeros((), dtype=torch.int32)
cuda.swiglu(torch.zeros(1, 6, 22016, dtype=torch.bfloat16))
limits = 32000, 1.0, 0.0
cuda.sample(torch.zeros(6, 32000).bfloat16(), torch.zeros(6, dtype=torch.int64), number, number.float(), *limits)
labels += ["swiglu", "sample"]
print(json.dumps({label: compile(*each, ARCH) for label, each in zip(labels, launches)}))
"""
of_36 = pytest.mark.skipif(not triton.__version__.startswith("3.6"), reason="the limits are those of Triton 3.6")
LIMITS = {"registers": 128, "spilled": 0, "shared": 100 * 1024}


def machine_code(arch: int, shapes: list[tuple[str, int]], heads: list[tuple[int, int, int]]) -> dict[str, dict]:
    """Compile the kernels, as they are launched for these shapes, with Triton and ptxas: figures by name."""
    code = f"ARCH, SHAPES, HEADS = {arch}, {shapes}, {heads}\n{COMPILE}"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_machine_code(found: dict[str, dict]) -> None:
    for name, figures in found.items():
        limits = LIMITS | {"registers": 255} if name.startswith("g") and "rows: 1" not in name else LIMITS
        assert all(figures[limit] <= limits[limit] for limit in limits), (name, figures)
        if name.startswith(("bf16", "int8", "g")):
            of_words = {"0x8", "0x4"} if name.startswith("g") else set()  # scales, and pairs of x
            assert "0x10" in figures["loads"] and set(figures["loads"]) <= of_words | {"0x10"}, (name, figures)


@of_36
@pytest.mark.slow
def test_machine_code_of_the_kernels() -> None:
    """For an H100: no spills, registers and shared memory for several blocks a processor, weights read by 16 bytes."""
    check_machine_code(machine_code(90, [("bf16", 6), ("int8", 6), ("g32", 1), ("g32", 6)], [(32, 32, 128)]))


@of_36
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_machine_code_for_every_gpu(arch: int) -> None:
    """A100, L4 and RTX 40, H100, B200."""
    shapes = [(scheme, rows) for scheme in SCHEMES for rows in (1, 6)]
    check_machine_code(machine_code(arch, shapes, [(32, 32, 128), (32, 8, 128), (32, 4, 64), (32, 32, 80)]))


# ---- On a card


def on_card(path: Path, dtype: torch.dtype) -> Engine:
    return new_engine(load_model(read_checkpoint(path), "cuda", dtype))


def sampled(seed: int, temperature: float):
    params = make_params(seed, temperature)
    params.seed, params.temperature = params.seed.cuda(), params.temperature.cuda()
    return params


PROMPT = [1, 350, 17, 900, 44, 3, 1200]


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_float32_gives_the_text_of_a_cpu(demo, target, temperature: float) -> None:
    """Eager and compiled."""
    expected = generated(new_engine(target), PROMPT, 60, make_params(3, temperature))
    engine = on_card(demo["target"], torch.float32)
    assert generated(engine, PROMPT, 60, sampled(3, temperature)) == expected
    engine.truncate(0)
    engine.compile(True, True, sampled(3, temperature))
    assert generated(engine, PROMPT, 60, sampled(3, temperature)) == expected


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("weights", ["target", "int8", "int4"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_speculation_is_exact_in_bfloat16(demo, weights: str, temperature: float, compiled: bool) -> None:
    """With a draft, prompt lookup and both, for any number of rows that are verified at once.

    Each text starts with an empty cache, because a pass of many rows and passes of few leave different bits in it.
    """
    torch._dynamo.reset()  # it compiles a function eight times at most, and each test compiles two models
    engine, params = on_card(demo[weights], torch.bfloat16), sampled(3, temperature)
    draft = on_card(demo["draft"], torch.bfloat16)
    if compiled:
        for each in (engine, draft):
            each.compile(True, True, params)
    expected = generated(engine, PROMPT * 3, 60, params)
    for source, lookup in ((draft, None), (None, PromptLookup()), (draft, PromptLookup())):
        for k in (1, 3, 6, 15):
            speculation = Speculation(source, k, lookup)
            speculation.choose = lambda max_k, sources, k=k: (["none", *sources][-1], min(max_k, k))
            engine.truncate(0)
            assert generated(engine, PROMPT * 3, 60, params, speculation=speculation) == expected


@needs_cuda
@pytest.mark.cuda
@torch.inference_mode()
def test_every_number_of_rows_is_captured_and_equals_the_eager_step(demo) -> None:
    engine, params = on_card(demo["target"], torch.bfloat16), sampled(3, 0.8)
    eager = Eager(engine.model, 1024)
    for rows in range(1, 17):
        for _ in range(3):
            ids = [(7 * rows + len(engine.cached_ids) + i) % 2000 + 3 for i in range(rows)]
            positions = torch.arange(len(engine.cached_ids), len(engine.cached_ids) + rows)
            inputs = torch.stack([torch.tensor(ids), positions]).cuda()
            assert engine.forward(ids, params) == eager.start_pass(inputs, params).tolist()
    assert all(engine.decode_step.graphs[rows].replayable for rows in range(1, 17))


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_cache_that_grows_gives_the_same_text(demo, compiled: bool, monkeypatch) -> None:
    """Several times in the middle of an answer, while the host is a step behind; nothing is compiled anew."""
    torch._dynamo.reset()
    params = sampled(3, 0.8)
    engine = on_card(demo["target"], torch.bfloat16)
    if compiled:
        engine.compile(True, True, params)
    engine.reserve(512)
    expected = generated(engine, PROMPT * 3, 300, params)
    monkeypatch.setattr(generate_module, "MIN_CAPACITY", 32)
    growing = on_card(demo["target"], torch.bfloat16)
    if compiled:
        growing.compile(True, True, params)
    with torch._dynamo.config.patch(error_on_recompile=compiled):
        assert generated(growing, PROMPT * 3, 300, params) == expected
    assert growing.kv_cache[0].shape[3] > 256


@needs_cuda
@pytest.mark.cuda
def test_a_prefix_is_reused_in_memory(demo) -> None:
    engine, params = on_card(demo["target"], torch.bfloat16), sampled(3, 0.0)
    generated(engine, PROMPT * 10, 5, params)
    engine.match_prefix(PROMPT * 10 + [9, 8, 7])
    assert len(engine.cached_ids) == len(PROMPT * 10)


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize(
    "more", [[], ["--compile"], ["--compile", "--compile_prefill"]], ids=lambda more: " ".join(more)
)
def test_the_command_line_on_a_card(demo, more: list[str]) -> None:
    for script in ("generate.py", "generate_prefill.py"):
        done = run_cli(
            script, "--checkpoint_path", demo["int4"], "--device", "cuda", "--prompt", "def read_file(", *more
        )
        assert done.stdout and "Decode: " in done.stderr


@needs_cuda
@pytest.mark.cuda
def test_quantizing_on_a_card_equals_quantizing_on_a_cpu(demo, tmp_path: Path) -> None:
    for scheme in ("int8", "g32"):
        weight = normal(96, 512)
        for ours, theirs in zip(stored(96, 512, scheme), stored(96, 512, scheme), strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)
        found = quantize_int8(weight.cuda()) if scheme == "int8" else quantize_int4(weight.cuda(), 32)
        expected = quantize_int8(weight) if scheme == "int8" else quantize_int4(weight, 32)
        for name, part in expected.items():
            assert (found[name].cpu().float() - part.float()).abs().mean() < 1e-3


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("scheme, bound", [({"mode": "int8"}, 0.01), ({"mode": "int4", "groupsize": 32}, 0.05)])
def test_calibrating_on_a_card_equals_calibrating_on_a_cpu(scheme: dict, bound: float, demo, tmp_path: Path) -> None:
    """Except weights halfway between two levels, and the error feedback after them."""
    dequantized = {}
    for device in ("cpu", "cuda"):
        path = tmp_path / f"{device}.pth"
        quantize(read_checkpoint(demo["target"]), scheme, device, path, "def f(x):\n" * 200)
        model = load_model(read_checkpoint(path), "cpu", torch.float32)
        layers = [module for module in model.modules() if isinstance(module, Linear)]
        dequantized[device] = [dequantize(x.weight, x.scale, x.minimum, torch.float32) for x in layers]
    for found, expected in zip(dequantized["cuda"], dequantized["cpu"], strict=True):
        assert (found - expected).abs().mean() < bound * expected.abs().mean()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.cuda
def test_two_ranks_on_two_cards(demo) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "generate.py", "--device", "cuda"]
    flags = ["--checkpoint_path", demo["target"], "--prompt", "def read_file("]
    alone = run_cli("generate.py", "--device", "cuda", *flags, "--precision", "float32")
    assert run_cli(*command, *flags, "--precision", "float32").stdout == alone.stdout
    plain = run_cli(*command, *flags)  # in bfloat16 the step is captured with its collectives
    assert run_cli(*command, *flags, "--draft_checkpoint_path", demo["draft"]).stdout == plain.stdout
