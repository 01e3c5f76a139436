"""What quantizing costs: each mode and group size of quantize.py, compared with the original on a text.

    python -m benchmarks.quality --checkpoint_path checkpoints/demo/target/model.pth --text FILE [--modes int8 int4.g32]

Each is quantized into a temporary folder (TMPDIR) and deleted again. Models run in float32, in windows of 512 tokens
that begin with BOS; the original and one other are in memory at a time.
"""

import argparse
import tempfile
import terminal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint import DEVICES, GROUPSIZES, Checkpoint, empty_model, load_model, read_checkpoint
from kernels import Linear
from model import ModelArgs
from quantize import quantize

WINDOW = 512  # tokens
MODES = {"int8": {"mode": "int8"}} | {f"int4.g{size}": {"mode": "int4", "groupsize": size} for size in GROUPSIZES}
HEADINGS = f"{'':10}{'perplexity':>12}{'mean KL':>10}{'same top':>10}{'bytes':>16}{'bits/weight':>13}{'seconds':>9}"


@dataclass
class Figures:
    """Two checkpoints on one text: means over the positions of all its tokens."""

    original: float  # perplexity
    perplexity: float  # of the other
    divergence: float  # Kullback-Leibler, of the other's distribution from the original's, in nats
    same_top: float  # share of the positions at which both have the same most likely token


@torch.inference_mode()
def compare(original: Checkpoint, quantized: Checkpoint, text: str, device: str) -> Figures:
    """What `quantized` has lost of `original` on `text`. ValueError where there are no tokens in it."""
    ids = original.tokenizer.encode(text)
    if not ids:
        raise ValueError("the text is empty: give a longer one")
    window = min(WINDOW, original.args.max_seq_length)
    models = [load_model(checkpoint, device, torch.float32) for checkpoint in (original, quantized)]
    sums = torch.zeros(5, dtype=torch.float64)
    for start in terminal.progress(range(0, len(ids), window - 1), "comparing"):
        tokens = torch.tensor([*original.tokenizer.start, *ids[start : start + window - 1]], device=device)
        positions = torch.arange(len(tokens) - 1, device=device)
        p, q = [m(tokens[None, :-1], positions, m.make_cache(window))[0].log_softmax(dim=-1) for m in models]
        losses = [F.nll_loss(logs, tokens[1:], reduction="sum") for logs in (p, q)]
        divergence = (p.exp() * (p - q)).sum()
        same = (p.argmax(dim=-1) == q.argmax(dim=-1)).sum()
        sums += torch.stack([*losses, divergence, same, torch.tensor(len(positions), device=device)]).cpu()
    loss, quantized_loss, divergence, same = sums[:4] / sums[4]
    return Figures(loss.exp().item(), quantized_loss.exp().item(), divergence.item(), same.item())


def bits_per_weight(checkpoint: Checkpoint) -> float:
    """Of the linear layers, scales and minima included."""
    dtype = checkpoint.model["norm.weight"].dtype
    model = empty_model(checkpoint.args, checkpoint.header["quantization"], dtype)
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    stored = sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())
    return 8 * stored / sum(layer.n_in * layer.n_out for layer in layers)


def possible(args: ModelArgs, modes: list[str] | None) -> list[str]:
    """The `modes`, ValueError where one does not divide the layers of that shape; without any, those that do."""
    found = []
    for mode in modes or MODES:
        try:
            empty_model(args, MODES[mode], torch.bfloat16)
            found.append(mode)
        except ValueError:
            if modes:
                raise
    return found


def row(name: str, checkpoint: Checkpoint, figures: Iterable[float]) -> str:
    """A line of the table; `figures` are perplexity, divergence, share of the same top, seconds."""
    perplexity, divergence, same_top, seconds = figures
    size, bits = checkpoint.path.stat().st_size, bits_per_weight(checkpoint)
    return f"{name:10}{perplexity:12.4f}{divergence:10.5f}{same_top:10.2%}{size:16,}{bits:13.3f}{seconds:9.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare what quantizing makes of a checkpoint with the original.")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, as scripts/prepare.sh made it")
    add("--text", type=Path, required=True, help="a file of text in UTF-8 that the model was not trained on")
    add("--modes", nargs="+", choices=MODES, help="what to compare (all whose groups divide the layers)")
    add("--device", choices=DEVICES, default=DEVICES[0], help="what quantizes and runs the models")
    args = parser.parse_args()
    original = read_checkpoint(args.checkpoint_path)
    text = terminal.decode_text(args.text.read_bytes(), str(args.text))
    for i, mode in enumerate(possible(original.args, args.modes)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{mode}.pth"
            start = time.perf_counter()
            quantize(original, MODES[mode], args.device, path)
            seconds = time.perf_counter() - start
            quantized = read_checkpoint(path)
            found = compare(original, quantized, text, args.device)
            if i == 0:
                print(HEADINGS)
                print(row("original", original, (found.original, 0.0, 1.0, 0.0)))
            print(row(mode, quantized, (found.perplexity, found.divergence, found.same_top, seconds)), flush=True)


if __name__ == "__main__":
    terminal.run(main)
