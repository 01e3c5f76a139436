"""The benchmark's arithmetic, against cases computed by hand, and that it runs with nothing else installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantize import build_model
from tests.benchmark import bytes_per_token, figure, kv_bytes, markdown, share, spread, weight_bytes
from tests.grow import shape_args

ROOT = Path(__file__).parents[1]
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
    assert weight_bytes(build_model(ARGS, quantization, torch.bfloat16)) == expected


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
    "decode": spread([20.0, 21.0, 19.0]), "prefill": spread([200.0]), "time to first token": spread([0.6]), "share": 0.914,
    "rows over one": {2: 1.0, 4: 1.1, 8: 1.25, 16: 2.0},
}  # fmt: skip
RESULTS = [
    {
        "shape": "1.1b",
        "read bandwidth": spread([40.0]),
        "programs": {"bf16": ROW, "llama.cpp F16": ROW | {"rows over one": None}},
    }
]


def test_the_table_has_a_line_for_each_program() -> None:
    lines = markdown(RESULTS).splitlines()
    assert lines[2] == "| 1.1b | **bf16** | 20.0 (19.0 to 21.0) | 0.91 | 200 | 1.00 / 1.10 / 1.25 / 2.00 |"
    assert lines[3].startswith("| 1.1b | llama.cpp F16 | 20.0")
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {7}


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    figure(RESULTS * 2, tmp_path / "shares.png")
    assert (tmp_path / "shares.png").stat().st_size > 10_000


@pytest.mark.slow
def test_it_runs_in_under_two_minutes_with_no_peer(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.benchmark",
        "--quick",
        "--out",
        tmp_path / "out",
        "--work",
        tmp_path / "work",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    row = report["results"][0]["programs"]["bf16"]
    assert 0 < row["decode"]["low"] <= row["decode"]["median"]
    assert set(row["rows over one"]) == {"2", "4", "8", "16"}
    assert report["start-up"].keys() == {"not compiled", "compiled, cold", "compiled, warm"}
    assert done.stdout.strip() == (tmp_path / "out" / "table.md").read_text().strip()
    assert "Traceback" not in done.stderr
