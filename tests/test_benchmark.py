"""The benchmark's arithmetic, against cases computed by hand, its switches, and that it runs with no peer installed."""

import json
from pathlib import Path

import pytest
import torch
from conftest import generated, make_sampling, new_engine, run_cli

import kernels
from benchmarks import benchmark
from benchmarks.benchmark import bytes_per_token, figure, kv_bytes, markdown, share, spread, switch_off, weight_bytes
from benchmarks.grow import shape_args
from checkpoint import empty_model, load_model, read_checkpoint
from kernels import cpu

ARGS = shape_args("1.1b", 32000)
LAYER = 2048 * (2048 + 2 * 256) + 2048 * 2048 + 3 * 2048 * 5632  # weights of the products of a layer
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


ROW = {
    "decode": spread([20.0, 21.0, 19.0]),
    "prefill": spread([200.0]),
    "time to first token": spread([0.6]),
    "share": 0.914,
    "rows over one": {2: 1.0, 4: 1.1, 8: 1.25, 16: 2.0},
    "beside others": {"ms": 50.0, "1": 1.8, "2": 2.4},
}
PROGRAMS = {"bf16": ROW, "llama.cpp F16": ROW | {"rows over one": None}}
RESULTS = [{"shape": "1.1b", "read bandwidth": spread([40.0]), "programs": PROGRAMS}]


def test_the_table_has_a_line_for_each_program() -> None:
    lines = markdown(RESULTS).splitlines()
    assert lines[2] == "| 1.1b | **bf16** | 20.0 (19.0 to 21.0) | 0.91 | 200 | 1.00 / 1.10 / 1.25 / 2.00 | 1.8 / 2.4 |"
    assert lines[3].startswith("| 1.1b | llama.cpp F16 | 20.0")
    assert lines[4] == "| | read bandwidth, GB/s | 40.0 (40.0 to 40.0) | | | | |"
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {8}


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    figure(RESULTS * 2, tmp_path / "shares.png")
    assert (tmp_path / "shares.png").stat().st_size > 10_000


def product() -> torch.Tensor:
    layer = kernels.Linear(64, 32).bfloat16()
    layer.load_state_dict({"weight": torch.ones(32, 64)})
    return layer(torch.ones(1, 1, 64, dtype=torch.bfloat16))


def attention() -> torch.Tensor:
    """Of one row with one head of 32 channels: its value, for it sees itself alone."""
    cache = torch.zeros(2, 1, 1, 4, 32, dtype=torch.bfloat16)
    return kernels.attention(torch.ones(1, 1, 96, dtype=torch.bfloat16), torch.ones(16), torch.tensor([0]), cache)


@pytest.mark.parametrize(
    "mechanism, operation, compute", [("products", "linear", product), ("attention", "attention", attention)]
)
def test_a_mechanism_is_there_until_it_is_switched_off(mechanism, operation, compute, monkeypatch) -> None:
    """Products and attention give the same without their kernels, and without them they are not called."""
    if cpu.library() is None:
        pytest.skip("no C++ compiler")
    called = []
    for name in ("GROUPSIZES", "MAX_HEAD_DIM"):
        monkeypatch.setattr(cpu, name, getattr(cpu, name))  # and put back
    with_kernel = compute()
    execute = cpu.execute
    monkeypatch.setattr(cpu, "execute", lambda name, *rest: called.append(name) or execute(name, *rest))
    compute()
    assert called == [operation]
    switch_off(mechanism)
    assert torch.equal(compute(), with_kernel)
    assert called == [operation]


def test_without_replay_every_step_runs_its_operations(demo, monkeypatch) -> None:
    """And gives the same text."""
    model, called, replay = load_model(read_checkpoint(demo["target"]), "cpu", torch.bfloat16), [], cpu.library().replay
    monkeypatch.setattr(cpu.library(), "replay", lambda *call: called.append(1) or replay(*call))
    ids = generated(new_engine(model), [1, 5, 7], 10, make_sampling())
    assert len(called) == 8
    monkeypatch.setattr(cpu.Program, "VIEWS", cpu.Program.VIEWS)  # and put back
    switch_off("replay")
    assert generated(new_engine(model), [1, 5, 7], 10, make_sampling()) == ids
    assert len(called) == 8


@pytest.mark.parametrize("mechanism, line", [("prefetch", "AHEAD = 0;"), ("threads", "execute(calls + i);")])
def test_what_is_switched_off_in_what_is_compiled(mechanism: str, line: str, monkeypatch) -> None:
    """The source that is compiled differs in these lines, and the library loads."""
    before, compiled = cpu.BUILD.with_name("cpu.cpp").read_text(), []
    monkeypatch.setattr(cpu, "BUILD", cpu.BUILD)

    def library() -> None:
        compiled.append(cpu.BUILD.with_name("cpu.cpp").read_text())

    library.cache_clear = lambda: None
    monkeypatch.setattr(cpu, "library", library)
    switch_off(mechanism)
    changed = [each for each in compiled[0].splitlines() if each not in before.splitlines()]
    assert line in changed[0]


def test_a_checkpoint_of_random_weights_is_made_once(tmp_path: Path) -> None:
    args = shape_args("68m", 2048)
    for scheme in (None, {"mode": "int4", "groupsize": 32}):
        path = benchmark.random_checkpoint(args, tmp_path, scheme)
        made = read_checkpoint(path)
        assert (made.args, made.header["quantization"]) == (args, scheme)
        assert made.model["norm.weight"].eq(1).all()
        assert 0.01 < made.model["tok_embeddings.weight"].float().std() < 0.03
        assert benchmark.random_checkpoint(args, tmp_path, scheme) == path
        assert read_checkpoint(path).header["id"] == made.header["id"]


@pytest.mark.slow
def test_it_runs_with_no_peer(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_cli("-m", "benchmarks.benchmark", "--quick", "--out", out, "--work", tmp_path / "work")
    report = json.loads((out / "results.json").read_text())
    row = report["results"][0]["programs"]["bf16"]
    assert 0 < row["decode"]["low"] <= row["decode"]["median"]
    assert set(row["rows over one"]) == {"2", "4", "8", "16"}
    assert report["start-up"].keys() == {"not compiled", "compiled, cold", "compiled, warm"}
    assert done.stdout.strip() == (out / "table.md").read_text().strip()
    assert "Traceback" not in done.stderr
