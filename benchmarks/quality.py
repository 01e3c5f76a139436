"""The loss of quantization: each mode and group size of quantize.py, compared with the original on a text.

    python -m benchmarks.quality --checkpoint_path checkpoints/demo/target/model.pth --text FILE [--modes int8 int4.g32]

Each with calibration and without. The formats of llama.cpp are compared too, if it is installed (pip install
llama-cpp-python gguf): it quantizes the same weights, and the linear layers that `gguf` dequantizes run in our model.
Quantized files are written to a temporary folder (TMPDIR) and deleted again. Models run in float32, in windows of 512
tokens that start with BOS if texts do; the original and one other are in memory at a time.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import utils

import torch
import torch.nn.functional as F

from benchmarks.model_files import is_installed, quantize_gguf, write_gguf
from checkpoint import DEVICES, GROUPSIZES, Checkpoint, empty_model, load_model, read_checkpoint
from model import Linear, ModelArgs, Transformer
from quantize import TEXT, quantize

WINDOW = 512  # tokens
MODES = {"int8": {"mode": "int8"}} | {f"int4.g{size}": {"mode": "int4", "groupsize": size} for size in GROUPSIZES}
PEERS = ["Q8_0", "Q4_0", "Q4_1", "Q4_K_S"]
HEADINGS = f"{'':20}{'perplexity':>12}{'mean KL':>10}{'same top':>10}{'bytes':>16}{'bits/weight':>13}{'seconds':>9}"


@dataclass
class Figures:
    """Two checkpoints on one text: means over the positions of all its tokens."""

    original: float  # perplexity
    perplexity: float  # of the other
    divergence: float  # Kullback-Leibler, of the other's distribution from the original's, in nats
    same_top: float  # share of the positions at which both have the same most likely token


@torch.inference_mode()
def compare(original: Checkpoint, quantized: Checkpoint | Transformer, text: str, device: str) -> Figures:
    """Compare `quantized` with `original` on `text`. ValueError if the text has no tokens."""
    ids = original.tokenizer.encode(original.tokenizer.escape(text))
    if not ids:
        raise ValueError("the text is empty: give a longer one")
    window = min(WINDOW, original.args.max_seq_length)
    if isinstance(quantized, Checkpoint):
        quantized = load_model(quantized, device, torch.float32)
    models = [load_model(original, device, torch.float32), quantized]
    sums = torch.zeros(5, dtype=torch.float64)
    for start in utils.progress(range(0, len(ids), window - 1), "comparing"):
        tokens = torch.tensor([*original.tokenizer.bos_ids, *ids[start : start + window - 1]], device=device)
        input_pos = torch.arange(len(tokens) - 1, device=device)
        p, q = [m(tokens[None, :-1], input_pos, m.make_cache(window))[0].log_softmax(dim=-1) for m in models]
        losses = [F.nll_loss(logs, tokens[1:], reduction="sum") for logs in (p, q)]
        divergence = (p.exp() * (p - q)).sum()
        same = (p.argmax(dim=-1) == q.argmax(dim=-1)).sum()
        sums += torch.stack([*losses, divergence, same, torch.tensor(len(input_pos), device=device)]).cpu()
    loss, quantized_loss, divergence, same = sums[:4] / sums[4]
    return Figures(loss.exp().item(), quantized_loss.exp().item(), divergence.item(), same.item())


def linear_layers(model: Transformer) -> dict[str, Linear]:
    """The linear layers of a model, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}


def bits_per_weight(checkpoint: Checkpoint) -> float:
    """Bits per weight of the linear layers, scales and minima included."""
    dtype = checkpoint.state_dict["norm.weight"].dtype
    layers = linear_layers(empty_model(checkpoint.args, checkpoint.header["quantization"], dtype)).values()
    stored = sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())
    return 8 * stored / sum(layer.n_in * layer.n_out for layer in layers)


def possible(args: ModelArgs, modes: list[str] | None) -> list[str]:
    """`modes`, ValueError if one does not divide the layers of a model; without any, all modes that do."""
    found = []
    for mode in modes or MODES:
        try:
            empty_model(args, MODES[mode], torch.bfloat16)
            found.append(mode)
        except ValueError:
            if modes:
                raise
    return found


def print_row(name: str, figures: Figures, bits: float, size: int, seconds: float) -> None:
    """Print a line of the table."""
    columns = f"{figures.perplexity:12.4f}{figures.divergence:10.5f}{figures.same_top:10.2%}"
    print(f"{name:20}{columns}{size:16,}{bits:13.3f}{seconds:9.2f}", flush=True)


def gguf_parts(layer: str, args: ModelArgs) -> dict[str, int]:
    """The names in GGUF of the parts of one of our linear layers, and the rows of each."""
    if layer == "output":
        return {"output": args.vocab_size}
    _, number, _, name = layer.split(".")
    keys = args.n_kv_head * args.head_dim
    parts = {
        "wqkv": {"attn_q": args.n_head * args.head_dim, "attn_k": keys, "attn_v": keys},
        "wo": {"attn_output": args.dim},
        "w13": {"ffn_gate": args.ffn_dim, "ffn_up": args.ffn_dim},
        "w2": {"ffn_down": args.dim},
    }
    return {f"blk.{number}.{part}": rows for part, rows in parts[name].items()}


def write_original(original: Checkpoint, path: Path) -> None:
    """Write the linear layers to a GGUF file in float32. (The order of channels within a head is ours.)"""
    import numpy as np  # noqa: PLC0415  comes with gguf

    tensors = {}
    for name, layer in linear_layers(load_model(original, "cpu", torch.float32)).items():
        parts = gguf_parts(name, original.args)
        tensors |= dict(zip(parts, layer.weight.split(list(parts.values())), strict=True))

    def array_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return tensors[name].numpy() if name in tensors else np.ones(shape, np.float32)

    write_gguf(original.args, path, array_of)


def read_quantized(original: Checkpoint, path: Path) -> tuple[Transformer, int]:
    """The float32 model with the linear layers that llama.cpp has quantized to `path`, and their bytes there."""
    import gguf  # noqa: PLC0415  may be absent

    model, size = load_model(original, "cpu", torch.float32), 0
    tensors = {tensor.name.removesuffix(".weight"): tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, layer in linear_layers(model).items():
        found = [tensors[part] for part in gguf_parts(name, original.args)]
        weights = [gguf.dequantize(tensor.data, tensor.tensor_type).reshape(-1, layer.n_in) for tensor in found]
        layer.weight = torch.cat([torch.from_numpy(weight) for weight in weights])
        size += sum(int(tensor.n_bytes) for tensor in found)
    return model, size


def measure_mode(original: Checkpoint, mode: str, calibration: str | None, text: str, device: str) -> None:
    """Print the row of a mode of quantize.py."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{mode}.pth"
        start = time.perf_counter()
        quantize(original, MODES[mode], device, path, calibration)
        seconds = time.perf_counter() - start
        quantized = read_checkpoint(path)
        figures = compare(original, quantized, text, device)
        name = mode if calibration else f"{mode}, no text"
        print_row(name, figures, bits_per_weight(quantized), path.stat().st_size, seconds)


def measure_llama_cpp(original: Checkpoint, kind: str, text: str, device: str) -> None:
    """Print the row of a format of llama.cpp."""
    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder) / "F32.gguf", Path(folder) / f"{kind}.gguf"
        write_original(original, source)
        start = time.perf_counter()
        quantize_gguf(source, path, kind)
        seconds = time.perf_counter() - start
        model, size = read_quantized(original, path)
        figures = compare(original, model.to(device), text, device)
        bits = 8 * size / sum(layer.weight.numel() for layer in linear_layers(model).values())
        print_row(f"llama.cpp {kind}", figures, bits, path.stat().st_size, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare quantized versions of a checkpoint with the original.")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, as scripts/prepare.sh wrote it")
    add("--text", type=Path, required=True, help="a file of text in UTF-8 that the model was not trained on")
    add("--calibrate", type=Path, default=TEXT, help="another text, for calibration (README.md)")
    add("--modes", nargs="+", choices=MODES, help="modes to compare (all whose groups divide the layers)")
    add("--peers", nargs="*", choices=PEERS, default=PEERS, help="formats of llama.cpp (all, if it is installed)")
    add("--device", choices=DEVICES, default=DEVICES[0], help="quantizes and runs the models")
    args = parser.parse_args()
    original = read_checkpoint(args.checkpoint_path)
    text = utils.read_text(f"@{args.text}", "--text")
    calibration = utils.read_text(f"@{args.calibrate}", "--calibrate")
    print(HEADINGS)
    same = compare(original, original, text, args.device)
    print_row("original", same, bits_per_weight(original), original.path.stat().st_size, 0.0)
    for mode in possible(original.args, args.modes):
        measure_mode(original, mode, calibration, text, args.device)
        measure_mode(original, mode, None, text, args.device)
    if is_installed("llama_cpp", "gguf"):
        for kind in args.peers:
            measure_llama_cpp(original, kind, text, args.device)


if __name__ == "__main__":
    utils.run(main)
