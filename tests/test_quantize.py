"""What 8 and 4 bits keep of a weight, of a product, of a text; and the memory that converting and quantizing take."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import DEMO, generated, make_sampling, new_engine
from demo.train import held_out_text
from test_generate import PROMPT, TOKENIZER, run_cli

import kernels
from generate import TextStream
from quantize import GROUPSIZES, Linear, compare, load_model, quantize, quantize_int4, quantize_int8, read_checkpoint

ROOT = Path(__file__).parents[1]
ROWS = (1, 2, 7, 8, 9, 16, 17, 64)
SCHEMES = {"int8": {"mode": "int8"}} | {f"g{g}": {"mode": "int4", "groupsize": g} for g in GROUPSIZES}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def student_t(*shape: int) -> torch.Tensor:
    """Student's t with 5 degrees of freedom: heavy tails, as trained weights have them."""
    chi = sum(torch.randn(*shape, generator=torch.Generator().manual_seed(i)) ** 2 for i in range(1, 6))
    return normal(*shape) / (chi / 5).sqrt()


def group_errors(weight: torch.Tensor, groupsize: int, rounds: int) -> torch.Tensor:
    restored = kernels.dequantize(*quantize_int4(weight, groupsize, rounds).values(), torch.float32)
    return (restored - weight).unflatten(1, (-1, groupsize)).square().sum(-1)


@pytest.mark.parametrize("draw", [normal, student_t])
@pytest.mark.parametrize("groupsize", GROUPSIZES)
def test_least_squares_is_never_worse_than_min_max_and_clearly_better_on_the_whole(draw, groupsize: int) -> None:
    weight = draw(256, 1024) * 0.02
    before, after = group_errors(weight, groupsize, 0), group_errors(weight, groupsize, 5)
    assert (after <= before).all()
    gain = 1 - (after.sum() / before.sum()).sqrt().item()
    assert gain >= {32: 0.06, 128: 0.04}.get(groupsize, 0.0)


def test_int8_error_is_half_a_step() -> None:
    weight = normal(64, 512)
    parts = quantize_int8(weight)
    assert parts["weight"].abs().amax(dim=1).eq(127).all()
    error = (kernels.dequantize(parts["weight"], parts["scale"], None, torch.float32) - weight).abs()
    assert (error <= parts["scale"][:, None] * 0.5001).all()


EXTREMES = {
    "constant": torch.full((4, 256), 0.375),
    "zero": torch.zeros(4, 256),
    "outlier": normal(4, 256).index_put((torch.tensor(1), torch.tensor(7)), torch.tensor(3e4)),
    "subnormal": normal(4, 256) * 1e-40,
    "largest": torch.full((4, 256), 3e38).index_fill(1, torch.arange(0, 256, 2), -3e38),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_weights_stay_finite_and_near(name: str) -> None:
    """A constant group, a zero row, one huge outlier, subnormal weights, the largest numbers."""
    weight = EXTREMES[name]
    for parts in (quantize_int8(weight), *(quantize_int4(weight, g) for g in GROUPSIZES)):
        restored = kernels.dequantize(parts["weight"], parts["scale"], parts.get("minimum"), torch.float32)
        assert restored.isfinite().all()
        step = (weight.amax(dim=1) / 15 - weight.amin(dim=1) / 15).clamp(min=1e-38)
        assert ((restored - weight).abs() <= step[:, None] + weight.abs() * 2**-8).all()
    if name in ("constant", "zero"):
        assert torch.equal(restored, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [768, 2048, 3072, 11008])
def test_products_equal_those_with_the_dequantized_weight(channels: int, dtype: torch.dtype) -> None:
    """For every row count and group size, within the rounding of the activation's dtype."""
    weight, x = normal(33, channels) * 0.02, normal(64, channels).to(dtype)
    for name, scheme in SCHEMES.items():
        groupsize = scheme.get("groupsize", 0)
        layer = Linear(channels, 33, groupsize, dtype)
        layer.load_state_dict(quantize_int4(weight, groupsize) if groupsize else quantize_int8(weight), strict=True)
        exact = x.double() @ kernels.dequantize(layer.weight, layer.scale, layer.minimum, torch.float32).double().T
        scale = (x.double().abs() @ weight.double().abs().T).max()
        for rows in ROWS:
            product = layer(x[None, :rows])
            assert product.dtype == dtype
            error = (product[0].double() - exact[:rows]).abs().max() / scale
            assert error < (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps, (name, rows)


@pytest.fixture(scope="module")
def quantized(demo, tmp_path_factory) -> dict[str, Path]:
    """The demo target under every scheme."""
    folder, paths = tmp_path_factory.mktemp("quantized"), {}
    for name, scheme in SCHEMES.items():
        paths[name] = folder / f"anything-{name}.pth"  # the name says nothing that matters
        quantize(read_checkpoint(demo["target"]), scheme, "cpu", paths[name])
    return paths


def figures(table: str) -> tuple[float, float, float]:
    """Perplexity of the original and of the result, and the mean KL divergence, of a --check table."""
    _, original, result = (line.split() for line in table.splitlines())
    return float(original[1]), float(result[1]), float(result[2])


def test_perplexity_on_held_out_text(demo, quantized, tmp_path: Path) -> None:
    """int8 within 0.5 %, g32 within 5 %, g128 within 10 %; least squares diverges less than min/max at every group size."""
    text, original = held_out_text(40_000), read_checkpoint(demo["target"])
    for name, path in quantized.items():
        before, after, divergence = figures(compare(original, read_checkpoint(path), text, "cpu"))
        assert after < before * (1 + {"int8": 0.005, "g32": 0.05, "g128": 0.10}.get(name, 0.5)), name
        if name != "int8":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("quantize.quantize_int4", lambda weight, groupsize: quantize_int4(weight, groupsize, 0))
                quantize(original, SCHEMES[name], "cpu", tmp_path / "min_max.pth")
            assert divergence < figures(compare(original, read_checkpoint(tmp_path / "min_max.pth"), text, "cpu"))[2], (
                name
            )


@pytest.mark.parametrize("name", ["int8", "g32"])
def test_compiled_equals_eager_and_text_streams(quantized, name: str) -> None:
    """As in float: the same tokens, greedy and sampled; the stream is the text."""
    model = load_model(read_checkpoint(quantized[name]), "cpu", torch.float32)
    compiled = new_engine(model)
    compiled.compile(["decode", "verify", "prefill"], make_sampling())
    for temperature in (0.0, 0.8):
        ids = generated(new_engine(model), PROMPT, 40, make_sampling(3, temperature))
        assert generated(compiled, PROMPT, 40, make_sampling(3, temperature)) == ids
    stream = TextStream(TOKENIZER)
    assert "".join(map(stream.push, ids)) + stream.push(None) == TOKENIZER.decode(PROMPT + ids).removeprefix(
        TOKENIZER.decode(PROMPT)
    )


def test_the_command_line_names_its_files_and_generate_takes_them(demo, tmp_path: Path) -> None:
    path, text = tmp_path / "model.pth", tmp_path / "text.txt"
    shutil.copyfile(demo["draft"], path)
    text.write_text(held_out_text(3000))
    for flags, name in (
        (["--mode", "int8"], "model_int8.pth"),
        (["--mode", "int4", "--groupsize", "64"], "model_int4.g64.cpu.pth"),
    ):
        command = [sys.executable, "quantize.py", "--checkpoint_path", path, "--device", "cpu", "--check", text, *flags]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=True)
        assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["model.pth", name]
        moved = tmp_path / "renamed" / "x.bin"
        moved.parent.mkdir(exist_ok=True)
        os.replace(tmp_path / name, moved)
        assert run_cli("--checkpoint_path", moved, "--max_new_tokens", "5", "--ignore_eos").stdout


def test_what_need_not_change_does_not(demo, quantized) -> None:
    """Embeddings and norms are the original's bits; the output layer is int8 in int4 files too; loading copies nothing."""
    original = read_checkpoint(demo["target"]).model
    for path in quantized.values():
        checkpoint = read_checkpoint(path)
        for name, tensor in checkpoint.model.items():
            if "norm" in name or "embeddings" in name:
                assert torch.equal(tensor, original[name])
        assert checkpoint.model["output.weight"].dtype == torch.int8
        model = load_model(checkpoint, "cpu", torch.bfloat16)
        loaded = model.state_dict()
        assert all(loaded[name].data_ptr() == tensor.data_ptr() for name, tensor in checkpoint.model.items())


MEASURE = """
import sys, threading, time
from pathlib import Path
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
from quantize import quantize, read_checkpoint
from scripts.convert_hf_checkpoint import convert
import torch
torch.zeros(1)
before, peak, folder = anonymous(), [0], Path(sys.argv[1])
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
checkpoint = read_checkpoint(convert(folder, "bfloat16"))
for scheme in ({"mode": "int8"}, {"mode": "int4", "groupsize": 32}):
    quantize(checkpoint, scheme, "cpu", folder / "out.pth")
print(peak[0] - before)
"""


@pytest.mark.slow
def test_converting_and_quantizing_take_the_memory_of_slabs(tmp_path: Path) -> None:
    """A random checkpoint of 1 GB: RssAnon stays under 400 MB above the start."""
    config = {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 16,
        "intermediate_size": 5632, "vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 1024,
    }  # fmt: skip
    shapes = {"model.embed_tokens": (32000, 2048), "lm_head": (32000, 2048), "model.norm": (2048,)}
    for i in range(8):
        parts = {"q": (2048, 2048), "k": (2048, 2048), "v": (2048, 2048), "o": (2048, 2048)}
        shapes |= {f"model.layers.{i}.self_attn.{name}_proj": shape for name, shape in parts.items()}
        shapes |= {f"model.layers.{i}.mlp.{name}_proj": (5632, 2048) for name in ("gate", "up")}
        shapes |= {f"model.layers.{i}.mlp.down_proj": (2048, 5632)}
        shapes |= {f"model.layers.{i}.{name}_layernorm": (2048,) for name in ("input", "post_attention")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copyfile(DEMO / "target" / "tokenizer.model", tmp_path / "tokenizer.model")
    noise, offset, header = normal(1 << 20).bfloat16(), 0, {}
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    with open(tmp_path / "model.safetensors", "wb") as file:
        encoded = json.dumps(header).encode()
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        block = noise.view(torch.uint8).numpy().tobytes()
        for start in range(0, offset, len(block)):
            file.write(block[: offset - start])
    assert offset > 1e9
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 400


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGTERM"])
def test_killed_while_quantizing_leaves_nothing_under_the_final_name(demo, tmp_path: Path, signal_name: str) -> None:
    shutil.copyfile(demo["draft"], tmp_path / "model.pth")
    code = (
        "import os, signal, quantize\n"
        f"quantize.quantize_int8 = lambda weight: os.kill(os.getpid(), signal.{signal_name})\n"
        "quantize.run(quantize.main)"
    )
    command = [sys.executable, "-c", code, "--checkpoint_path", str(tmp_path / "model.pth"), "--mode", "int8"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode < 0
    assert not (tmp_path / "model_int8.pth").exists()


def test_cross_entropy_of_the_table_is_that_of_a_plain_pass(demo) -> None:
    """The perplexity of a text of one window, computed here in one pass."""
    checkpoint, text = read_checkpoint(demo["draft"]), held_out_text(600)
    ids = torch.tensor([[TOKENIZER.bos_id(), *TOKENIZER.encode(text)]])
    model = load_model(checkpoint, "cpu", torch.float32)
    with torch.inference_mode():
        logits = model(ids[:, :-1], torch.arange(ids.shape[1] - 1), model.make_cache(1024))[0]
    before, after, divergence = figures(compare(checkpoint, checkpoint, text, "cpu"))
    assert before == after == pytest.approx(F.cross_entropy(logits, ids[0, 1:]).exp().item(), rel=1e-4)
    assert divergence == pytest.approx(0, abs=1e-5)
