"""The CPU kernels against float64 references, fast and portable; their promises about bits; their compilation."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_params, run_cli

import tp
from checkpoint import GROUPSIZES, load_model, read_checkpoint
from kernels import build, cpu
from kernels.build import load_library
from model import RMSNorm, dequantize
from quantize import quantize, quantize_int4, quantize_int8
from sampling import sample

SCHEMES = [(16, 0), (8, 0), *((4, groupsize) for groupsize in GROUPSIZES)]  # bits and group size
linear, attention, swiglu = torch.ops.llama.linear, torch.ops.llama.attention, torch.ops.llama.swiglu
COMPILER = os.environ.get("CXX") or "g++"
pytestmark = pytest.mark.skipif(shutil.which(COMPILER.split()[0]) is None, reason="the kernels need a C++ compiler")


BUILDS = {"fast": [], "portable": ["-DPORTABLE"]}
if platform.machine() == "x86_64":
    BUILDS |= {"AVX2": ["-march=haswell"], "SSE2": ["-march=x86-64"]}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name != "fast" else ()) for name in BUILDS])
def library(request, monkeypatch, tmp_path_factory) -> ctypes.CDLL:
    """The kernels for this CPU, and the loops for any CPU, with vectors of 16 and 8 lanes."""
    load_library.cache_clear()
    if BUILDS[request.param]:
        monkeypatch.setattr(build, "EXTRA_FLAGS", BUILDS[request.param])
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "builds"))
    yield load_library()
    load_library.cache_clear()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(weight: torch.Tensor, bits: int, groupsize: int) -> list[torch.Tensor | None]:
    """Weight, scale and minimum, as a layer stores them."""
    if bits == 16:
        return [weight.bfloat16(), None, None]
    parts = quantize_int8(weight) if bits == 8 else quantize_int4(weight, groupsize)
    return [parts["weight"].contiguous(), parts["scale"], parts.get("minimum")]


def product_error(x: torch.Tensor, weight: list[torch.Tensor | None]) -> float:
    """Largest error of a product against float64, over the bound for roundings of sums and of the result.

    Up to 16 rows, 64 of a quantized weight, the weight is not rounded at all; more take it in the activation's dtype,
    unless the kernels compute them, too.
    """
    max_rows = cpu.MAX_ROWS if weight[1] is None else 4 * cpu.MAX_ROWS
    if not cpu.HAS_FAST_BFLOAT16:
        max_rows = len(x)
    exact = dequantize(*weight, torch.float32 if len(x) <= max_rows else x.dtype).double()
    terms = x.double().abs() @ exact.abs().T
    error = (linear(x[None], *weight)[0].double() - x.double() @ exact.T).abs()
    return (error / (terms * 2**-16 + (x.double() @ exact.T).abs() * 2**-8 + 1e-30)).max().item()


@pytest.mark.parametrize("n_in", [32, 64, 96, 256, 768, 1376, 2752, 11008])
def test_products_are_exact_but_for_the_rounding_of_bfloat16(library, n_in: int) -> None:
    """1 to 17 rows, 64 and 65, every group size that divides, odd numbers of output channels."""
    for bits, groupsize in SCHEMES:
        if bits == 4 and n_in % groupsize:
            continue
        for n_out in (1, 2, 37):
            weight = stored(normal(n_out, n_in) * 0.02, bits, groupsize)
            for rows in (*range(1, 18), 64, 65) if n_out == 37 else (1, 9):
                error = product_error(normal(rows, n_in, seed=1).bfloat16(), weight)
                assert error < 1, (bits, groupsize, n_out, rows)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_products_with_extreme_scales(library, factor: float) -> None:
    for scheme in SCHEMES:
        weight = stored(normal(33, 512) * factor, *scheme)
        for rows in (1, 5, 16):
            assert product_error(normal(rows, 512).bfloat16(), weight) < 1


@pytest.mark.parametrize("bits", [8, 4])
def test_an_activation_is_multiplied_as_it_is_unless_another_is_128_times_larger(library, bits: int) -> None:
    """Products with the identity are the activations that the kernel multiplies. Magnitudes are those of bfloat16."""
    identity = torch.eye(256, dtype=torch.uint8)
    weight = [identity.to(torch.int8), torch.ones(256), None]
    if bits == 4:
        scale = torch.ones(256, 8).bfloat16()
        weight = [identity[:, 0::2] | identity[:, 1::2] << 4, scale, torch.zeros_like(scale)]
    for factor in (1e-30, 1.0, 1e30):
        x = normal(5, 256).sign() * normal(5, 256, seed=1).abs().clamp(0.03, 3.8) * factor
        x = x.bfloat16()
        assert torch.equal(linear(x[None], *weight)[0], x)
        x = (x.float() * 10.0 ** -normal(5, 256, seed=2).abs()).bfloat16()
        largest = x.float().abs().view(5, 2, 128).amax(-1, keepdim=True).expand(5, 2, 128).flatten(1)  # of a block
        error = (linear(x[None], *weight)[0].float() - x.float()).abs()
        assert (error <= largest * 2**-15 + x.float().abs() * 2**-8).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_product_with_an_activation_that_is_not_finite_is_not_finite(library, value: float) -> None:
    for scheme in SCHEMES:
        x = normal(1, 3, 256).bfloat16()
        x[0, 1, 77] = value
        finite = linear(x, *stored(normal(37, 256), *scheme))[0].isfinite()
        assert finite[[0, 2]].all() and not finite[1].any(), scheme


def test_weights_mapped_from_a_file_give_the_same_product(library, demo, tmp_path: Path) -> None:
    for scheme in ({"mode": "int8"}, {"mode": "int4", "groupsize": 64}):
        path = tmp_path / "model.pth"
        quantize(read_checkpoint(demo["target"]), scheme, "cpu", path)
        mapped = load_model(read_checkpoint(path), "cpu", torch.bfloat16).layers[0].feed_forward.w13
        weight = [mapped.weight, mapped.scale, mapped.minimum]
        copied = [None if tensor is None else tensor.clone() for tensor in weight]
        x = normal(1, 3, 256).bfloat16()
        assert torch.equal(linear(x, *weight), linear(x, *copied))


def attention_inputs(rows: int, filled: int, heads: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    """Projections, RoPE's table, positions and cache of a batch of one: (n_head, n_kv_head, head_dim) heads."""
    n_head, n_kv_head, head_dim = heads
    qkv = normal(1, rows, (n_head + 2 * n_kv_head) * head_dim).bfloat16()
    positions = torch.arange(filled - rows, filled)
    angles = torch.outer(torch.arange(720.0), 10000.0 ** -torch.linspace(0, 1, head_dim // 2))
    rope = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return qkv, rope, positions, normal(2, 1, n_kv_head, 720, head_dim, seed=2).bfloat16()


def reference_attention(qkv, rope, positions, cache) -> torch.Tensor:
    """In float64, from the definition, head by head; the cache gets the rows."""
    k_cache, v_cache = cache
    rows, n_kv_head, head_dim = qkv.shape[1], k_cache.shape[1], k_cache.shape[3]
    heads = qkv[0].view(rows, -1, head_dim).double()
    n_head = heads.shape[1] - 2 * n_kv_head
    cos, sin = rope[positions].double()[:, None].chunk(2, dim=-1)
    a, b = heads[:, : n_head + n_kv_head].chunk(2, dim=-1)
    rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).bfloat16()
    k_cache[0, :, positions] = rotated[:, n_head:].transpose(0, 1)
    v_cache[0, :, positions] = heads[:, n_head + n_kv_head :].bfloat16().transpose(0, 1)
    out = []
    for row, position in enumerate(positions.tolist()):
        for head in range(n_head):
            group = head // (n_head // n_kv_head)
            k, v = (half[0, group, : position + 1].double() for half in (k_cache, v_cache))
            out.append((k @ rotated[row, head].double() / head_dim**0.5).softmax(0) @ v)
    return torch.stack(out).view(1, rows, -1)


@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 80), (8, 1, 128), (8, 4, 32), (4, 2, 24), (4, 2, 100)], ids=str)
def test_attention_equals_the_definition(library, heads: tuple[int, int, int]) -> None:
    """1 to 16 rows, filled lengths 1 to 700, groups of 1, 2, 4 and 8; the cache gets the same keys and values."""
    for filled in (1, 2, 3, 16, 17, 100, 255, 256, 257, 511, 513, 700):
        for rows in (1, 2, 5, 16):
            if rows > filled:
                continue
            inputs = attention_inputs(rows, filled, heads)
            copies = [tensor.clone() for tensor in inputs]
            y, expected = attention(*inputs), reference_attention(*copies)
            assert (y.double() - expected).abs().max() < 2**-8 * expected.abs().max() + 1e-3, (filled, rows)
            different = inputs[3] != copies[3]
            assert different.float().mean() < 1e-3  # float32 against float64 at the middle of two bfloat16
            assert (inputs[3].float() - copies[3].float()).abs().max() < 2**-6


def test_a_residual_is_added_to_the_rounded_product(library) -> None:
    """In the kernels, and in the products of prompts, which they do not compute."""
    for scheme in SCHEMES:
        weight = stored(normal(41, 768) * 0.02, *scheme)
        for rows in (1, 16, 100):
            x, residual = normal(1, rows, 768).bfloat16(), normal(1, rows, 41).bfloat16()
            assert torch.equal(linear(x, *weight, residual), residual + linear(x, *weight)), (scheme, rows)


def test_row_i_of_many_is_bit_for_bit_that_row_alone(library) -> None:
    for scheme in SCHEMES:
        weight, x = stored(normal(41, 768) * 0.02, *scheme), normal(1, 16, 768).bfloat16()
        alone = torch.cat([linear(x[:, i : i + 1], *weight) for i in range(16)], dim=1)
        for rows in range(1, 17):
            assert torch.equal(linear(x[:, :rows], *weight), alone[:, :rows]), (scheme, rows)


def test_rows_of_attention_at_once_equal_one_by_one_and_do_not_see_later_positions(library) -> None:
    for filled in (16, 200, 260, 600):
        qkv, rope, positions, cache = attention_inputs(16, filled, (8, 2, 64))
        dirty = cache.clone()
        together = attention(qkv, rope, positions, cache)
        dirty[:, :, :, filled:] = float("nan")
        rows = [slice(i, i + 1) for i in range(16)]
        single = [attention(qkv[:, r], rope, positions[r], dirty) for r in rows]
        assert torch.equal(torch.cat(single, dim=1), together)
        assert torch.equal(dirty[:, :, :, :filled], cache[:, :, :, :filled])


def test_the_same_bits_on_every_run_and_any_number_of_threads(library) -> None:
    weight, x = stored(normal(555, 1376) * 0.02, 4, 32), normal(1, 5, 1376).bfloat16()
    inputs = attention_inputs(4, 600, (8, 2, 64))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8, 2):
            torch.set_num_threads(threads)
            results.append((linear(x, *weight), attention(*inputs)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("channels", [2, 30, 64, 768, 2050])
def test_norm_and_swiglu_equal_float64_within_their_rounding(library, channels: int) -> None:
    """RMSNorm, and SwiGLU, whose silu is rounded on its own, for values from 1e-3 to 1e4."""
    for scale in (1e-3, 1.0, 30.0, 1e4):
        x = (normal(1, 7, channels) * scale).bfloat16()
        norm = RMSNorm(channels, 1e-5).bfloat16().requires_grad_(False)
        norm.weight.copy_(normal(channels, seed=1))
        wide = x.double()
        exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.double()
        assert ((norm(x).double() - exact).abs() <= exact.abs() * 2**-8 + 1e-38).all()
        gate, up = wide.chunk(2, dim=-1)
        exact = gate.sigmoid() * gate * up
        least = (gate * up).abs() * 1e-37 + 1e-36  # exponentials end at e to the -87
        assert ((swiglu(x).double() - exact).abs() <= exact.abs() * 2**-7 + least).all()


def test_nan_and_infinity_pass_through_norm_and_swiglu(library) -> None:
    x = torch.ones(1, 1, 64, dtype=torch.bfloat16)
    for value in (float("nan"), float("inf")):
        x[..., 3] = value
        assert RMSNorm(64, 1e-5).bfloat16()(x)[0, 0, 3].isnan()
        assert not swiglu(x)[0, 0, 3].isfinite()


LIMITS = [(k, None, None) for k in (None, 1, 2, 40, 999, 2**64 + 1)]  # top_k, top_p, min_p
LIMITS += [(None, 0.9, None), (None, 1e-6, None), (None, 1.0, None), (None, None, 0.05), (None, None, 1.0)]
LIMITS += [(40, 0.8, None), (40, None, 0.1), (None, 0.95, 0.02), (100, 0.9, 0.01)]


@pytest.mark.parametrize("top_k, top_p, min_p", LIMITS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_samples_are_those_of_pytorch(library, temperature: float, top_k: int | None, top_p, min_p) -> None:
    """320 samples of 1,000 tokens: the same noise within float32's rounding, the same choice among equal logits."""
    for seed in range(20):
        logits = normal(16, 1000, seed=seed).bfloat16()
        if seed % 2:
            logits = (logits * 2).round() / 2  # many are equal
        params = make_params(seed, temperature, top_k, top_p, min_p, 990)
        positions = torch.arange(16) + 1000 * seed
        assert torch.equal(sample(logits, positions, params), sample(logits.float(), positions, params))


def test_the_sample_of_logits_that_are_not_finite_is_minus_1(library) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 5, slice(None)):
            for limits in LIMITS:
                logits = torch.zeros(2, 64, dtype=torch.bfloat16)
                logits[1, place] = value
                params = make_params(1, 0.8, *limits)
                ids = sample(logits, torch.arange(2), params).tolist()
                assert ids[0] >= 0
                some = value < 0 and place != slice(None)  # an impossible token among possible ones
                assert (ids[1] >= 0) == some, (value, place)


def test_row_i_of_many_is_that_row_alone_between_products(library) -> None:
    x, norm = normal(1, 16, 768).bfloat16(), RMSNorm(768, 1e-5).bfloat16()
    params = make_params(1, 0.8, 40, 0.9, 0.01)
    positions = torch.arange(16)
    for i in range(16):
        row = slice(i, i + 1)
        assert torch.equal(norm(x)[:, row], norm(x[:, row]))
        assert torch.equal(swiglu(x)[:, row], swiglu(x[:, row]))
        assert torch.equal(sample(x[0], positions, params)[row], sample(x[0, row], positions[row], params))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_weight_that_is_dequantized_in_parts_equals_pytorch(library, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "DEQUANT_BUFFER", torch.empty(5000))
    monkeypatch.setattr(cpu, "HAS_FAST_BFLOAT16", True)
    for scheme in SCHEMES[1:]:
        weight, x = stored(normal(77, 768), *scheme), torch.eye(768, dtype=dtype)
        assert torch.equal(linear(x, *weight), dequantize(*weight, dtype).T)


@pytest.mark.parametrize("has_fast_bfloat16", [True, False])
def test_products_of_a_prompt_are_exact(has_fast_bfloat16: bool, monkeypatch) -> None:
    """By PyTorch, or by the kernels where its bfloat16 is slow: there each row is bit for bit that row alone, too."""
    monkeypatch.setattr(cpu, "HAS_FAST_BFLOAT16", has_fast_bfloat16)
    for scheme in SCHEMES:
        weight, x = stored(normal(77, 768) * 0.02, *scheme), normal(1, 150, 768).bfloat16()
        found, exact = linear(x, *weight), x.double() @ dequantize(*weight, torch.float32).double().T
        assert (found - exact).abs().max() < 2**-7 * exact.abs().max(), scheme
        if not has_fast_bfloat16:
            assert torch.equal(found[:, 70:71], linear(x[:, 70:71], *weight)), scheme


@pytest.mark.parametrize("weights", ["target", "int8", "int4"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@torch.inference_mode()
def test_rows_verified_at_once_equal_rows_decoded_one_by_one(demo, weights: str, compiled: bool) -> None:
    """Logits of the whole model in bfloat16, bit for bit: 2 to 16 rows against single ones."""
    model = load_model(read_checkpoint(demo[weights]), "cpu", torch.bfloat16)
    forward = torch.compile(lambda *inputs: model(*inputs), fullgraph=True) if compiled else model
    tokens = torch.randint(3, 2048, (1, 64), generator=torch.Generator().manual_seed(0))

    def logits(sizes: list[int]) -> torch.Tensor:
        cache, start, out = model.make_cache(64), 0, []
        for size in sizes:
            rows, positions = tokens[:, start : start + size].clone(), torch.arange(start, start + size)
            if compiled and size > 1:
                torch._dynamo.mark_dynamic(rows, 1)
                torch._dynamo.mark_dynamic(positions, 0)
            out.append(forward(rows, positions, cache))
            start += size
        return torch.cat(out, dim=1)

    single = logits([1] * 64)
    assert torch.equal(logits([16] * 4), single)
    assert torch.equal(logits([2, 3, 5, 7, 11, 13, 16, 7]), single)


SIZES = {  # at and beyond the limits of the kernels: (n_in, groupsize), and head_dim
    "products": [(32, 32), (48, 0), (64, 0), (33, 0), (512, 16), (768, 48)],
    "heads": [2, 62, cpu.MAX_HEAD_DIM, cpu.MAX_HEAD_DIM + 2, 2048],
}


@pytest.mark.parametrize("n_in, groupsize", SIZES["products"])
def test_a_size_that_the_kernels_do_not_take_goes_to_pytorch(n_in: int, groupsize: int) -> None:
    """The product of the dequantized weight, of one row and many, in bfloat16, float32 and float64."""
    weight = stored(normal(2, n_in) * 0.02, 4 if groupsize else 8, groupsize)
    for rows in (1, 65):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            x = normal(rows, n_in).to(dtype)
            exact = x.double() @ dequantize(*weight, torch.float32).double().T
            error = (linear(x, *weight).double() - exact).abs().max()
            assert error <= 2**-6 * exact.abs().max() + 1e-3 * n_in**0.5 * 0.02, (rows, dtype)


@pytest.mark.parametrize("head_dim", SIZES["heads"])
def test_heads_of_any_size_give_the_definition(head_dim: int) -> None:
    inputs = attention_inputs(2, 300, (2, 1, head_dim))
    copies = [tensor.clone() for tensor in inputs]
    y, expected = attention(*inputs), reference_attention(*copies)
    assert (y.double() - expected).abs().max() < 2**-7 * expected.abs().max() + 1e-2


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch) -> Callable:
    """A function: flags -> the library, loaded anew; it is kept in a cache folder of its own."""

    def load(*flags: str) -> ctypes.CDLL | None:
        monkeypatch.setattr(build, "EXTRA_FLAGS", list(flags))
        load_library.cache_clear()
        return load_library()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield load
    load_library.cache_clear()


@pytest.mark.slow
def test_a_library_that_does_not_load_is_compiled_again(tmp_path: Path) -> None:
    """One line says so. Each run is a process, because a library is loaded once in a process."""
    code = "from kernels.build import load_library; print(load_library().replay)"
    run_cli("-c", code, XDG_CACHE_HOME=str(tmp_path))
    (path,) = tmp_path.glob("*/*.so")
    size = path.stat().st_size
    path.write_bytes(b"not a library")
    line, compiling = run_cli("-c", code, XDG_CACHE_HOME=str(tmp_path)).stderr.splitlines()
    assert "compiled again" in line and str(path) in line and compiling.startswith("compiling the CPU kernels")
    assert path.stat().st_size == size
    assert list(path.parent.iterdir()) == [path]
    assert run_cli("-c", code, XDG_CACHE_HOME=str(tmp_path)).stderr == ""


@pytest.mark.slow
def test_a_library_that_no_folder_can_keep_is_for_this_run(monkeypatch, compiled: Callable, capfd) -> None:
    """A cache folder that cannot be made, and a user without a home; one line names the cause."""
    for name, value in (("XDG_CACHE_HOME", "/dev/null/cache"), ("HOME", "")):
        monkeypatch.setenv(name, value)
        assert compiled().replay
        compiling, line = capfd.readouterr().err.splitlines()
        assert compiling.startswith("compiling the CPU kernels")
        assert "this run only" in line and "/dev/null" in line
        monkeypatch.setenv("XDG_CACHE_HOME", "")


@pytest.mark.slow
def test_the_compiler_is_a_command_line(monkeypatch, compiled: Callable) -> None:
    monkeypatch.setenv("CXX", f"env {COMPILER}")
    assert compiled().replay


@pytest.mark.parametrize(
    "files, cpus",
    [
        ({}, float("inf")),
        ({"cpu.max": "max 100000"}, float("inf")),
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "250000 100000"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
    ],
)
def test_a_containers_quota_is_seen(tmp_path: Path, monkeypatch, files: dict[str, str], cpus: float) -> None:
    """cgroup v2 and v1; at least one thread, and no more than the quota allows."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert tp.cgroup_cpus(tmp_path) == cpus
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tp, "cgroup_cpus", lambda: cpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {10_000, 10_001, 10_002})
    assert tp.num_threads() == min(3, int(cpus) if cpus < 3 else 3)


@pytest.mark.slow
def test_another_source_flag_or_cpu_gets_another_library(tmp_path: Path, monkeypatch, compiled: Callable) -> None:
    """/proc/cpuinfo is replaced by a file that another host in a shared home might have."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in build.FOLDER.glob("*.[ch]*"):
        shutil.copy(path, folder)
    compiled()
    compiled("-DPORTABLE")
    monkeypatch.setattr(build, "FOLDER", folder)
    compiled()
    assert len(list(tmp_path.glob("*/*.so"))) == 2  # the same source
    for path in (folder / "cpu.cpp", next(folder.glob("*.h"))):
        with path.open("a") as source:
            source.write("// another\n")
        compiled()
    (tmp_path / "cpuinfo").write_text("flags : another\n")
    monkeypatch.setattr(build, "CPUINFO", tmp_path / "cpuinfo")
    compiled()
    assert len(list(tmp_path.glob("*/*.so"))) == 5


@pytest.mark.slow
def test_two_processes_may_compile_at_once(tmp_path: Path) -> None:
    code = "from kernels.build import load_library; import sys; sys.exit(load_library() is None)"
    command, environment = [sys.executable, "-c", code], os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    codes: list[int] = []

    def start() -> None:
        codes.append(subprocess.run(command, cwd=ROOT, env=environment).returncode)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0]
    assert len(list((tmp_path / "llama_cpu_kernels").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_float32_text_is_the_same_and_one_line_says_that_it_is_slower(
    demo, tmp_path: Path, compiler: str
) -> None:
    """The line names the compiler, which is missing or fails."""
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": compiler}
    for precision in ("float32", "bfloat16"):
        flags = ["--checkpoint_path", demo["int8"], "--max_new_tokens", "20", "--precision", precision]
        usual, without = run_cli("generate.py", *flags), run_cli("generate.py", *flags, **environment)
        assert without.stdout == usual.stdout or precision == "bfloat16"
        compiling, line = [line for line in without.stderr.splitlines() if "kernels" in line]
        assert compiling.startswith("compiling the CPU kernels")
        assert line.startswith(f"no CPU kernels, so decoding is several times slower: {compiler}")
        assert len(without.stderr.splitlines()) == len(usual.stderr.splitlines()) + 2


SANITIZED = """
import sys, torch
sys.path.insert(0, "tests")
import test_kernels as t
for bits, groupsize in t.SCHEMES:
    for n_in in (256, 1376) if groupsize in (0, 32) else (256,):
        weight = t.stored(t.normal(37, n_in), bits, groupsize)
        for rows in (1, 3, 8, 16):
            t.product_error(t.normal(rows, n_in).bfloat16(), weight)
        t.linear(t.normal(1, 20, n_in), *weight)
for heads in ((4, 4, 64), (8, 1, 80), (4, 2, 24)):
    for filled, rows in ((1, 1), (257, 16), (700, 3), (720, 16)):
        t.attention(*t.attention_inputs(rows, filled, heads))
import test_replay as r
torch.set_num_threads(3)
for seed in range(2):
    r.test_any_sequence_of_passes_equals_eager_passes(seed)
print("clean")
"""


@pytest.mark.slow
@pytest.mark.parametrize("portable", [[], ["-DPORTABLE"]], ids=["fast", "portable"])
def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path, portable: list[str]) -> None:
    """Run the kernels under the address sanitizer, which knows the bounds of tensors, because malloc makes them."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("g++ has no address sanitizer here")
    flags = ["-fsanitize=address", "-g1", *portable]
    code = f"from kernels import build; build.EXTRA_FLAGS = {flags!r}\n{SANITIZED}"
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "XDG_CACHE_HOME": str(tmp_path),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("clean\n"), done.stderr[:2000]


EMULATED = ["-march=x86-64", f"-I{ROOT / 'tests' / 'emulated'}", "-D__AVX512BW__"]
OTHER_COMPILERS = {  # a command line, and the emulator that runs its program
    "GCC 11": (["g++-11", "-march=native"], []),
    "AVX512_BF16": (["g++", *EMULATED, "-D__AVX512BF16__", "-D__AVX512VL__"], []),
    "AVX512": (["g++", *EMULATED, "-D__AVX512F__"], []),
    "Clang": (["clang++", "-march=native"], []),
    "Arm": (["aarch64-linux-gnu-g++", "-static"], ["qemu-aarch64"]),
    "AVX2": (["g++", "-march=haswell"], []),
    "SSE2": (["g++", "-march=x86-64"], []),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_COMPILERS)
def test_other_compilers_and_cpus_compute_the_same(tmp_path: Path, name: str) -> None:
    """Products and attention are right, and their rows independent, in a program of their own."""
    command, emulator = OTHER_COMPILERS[name]
    for program in [command[0], *emulator]:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if name == "AVX2" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX2")
    source, program = ROOT / "tests" / "check_kernels.cpp", tmp_path / "check"
    flags = ["-std=c++20", "-O2", "-fopenmp", "-pthread", "-w"]
    subprocess.run([*command, *flags, source, "-o", program], check=True, capture_output=True)
    done = subprocess.run([*emulator, program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all as they should be\n")
