"""Quantize the linear layers of a checkpoint to 8 or 4 bits.

    python quantize.py --checkpoint_path checkpoints/$MODEL_REPO/model.pth --mode int8

The file belongs to checkpoint.py, multiplying to kernels/.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__" and getattr(sys.flags, "safe_path", False):
    sys.exit("PYTHONSAFEPATH keeps Python from finding the modules beside this script: unset it")

import terminal

import torch
from torch import Tensor

from checkpoint import (
    DEVICES,
    GROUPSIZES,
    Checkpoint,
    empty_model,
    load_model,
    read_checkpoint,
    storage,
    write_checkpoint,
)
from kernels import Linear

SLAB = {"cpu": 2**18, "cuda": 2**26}  # weights quantized at a time: they stay in the caches, or keep a GPU busy
ROUNDS = 5  # of least squares
PARTS = (1.0, 0.9, 0.8, 0.7)  # of a group's range, from which they begin
CALIBRATION = 512  # tokens: four times as many change the divergence by less than 1 %
CHUNK = 128  # of them at a time, which bounds the memory
TEXT = Path(__file__).with_name("README.md")
TINY = torch.finfo(torch.float32).tiny  # in place of a scale of zero: any level will do


def quantize_int8(weight: Tensor) -> dict[str, Tensor]:
    """Symmetric 8 bits for a float `weight` [out, in]: the largest of each output channel becomes 127."""
    scale = weight.abs().amax(dim=1).float() / 127
    levels = (weight / scale.clamp(min=TINY)[:, None]).round().clamp(-127, 127)
    return {"weight": levels.to(torch.int8), "scale": scale}


def quantize_int4(weight: Tensor, groupsize: int, importance: Tensor | None = None) -> dict[str, Tensor]:
    """4 bits for a float `weight` [out, in]: per group, 16 levels from `minimum` on in steps of `scale`.

    From several parts of the group's range, ROUNDS of alternating least squares: levels for (scale, minimum), then the
    regression line of the weights over their levels; per group the best of all is kept, in the bfloat16 that is stored.
    An error weighs as much as the `importance` [in] of its input channel (1): the mean square of what it multiplies.
    """
    w = weight.float().unflatten(1, (-1, groupsize))  # [out, groups, groupsize]
    if importance is None:
        importance = w.new_ones(weight.shape[1])
    share = importance + importance.mean() * 1e-6 + TINY  # a channel that was never active still has a weight
    share = (share / share.mean()).view(-1, groupsize)
    total = share.sum(dim=-1, keepdim=True)

    def mean(x: Tensor) -> Tensor:
        return x.mul(share).sum(dim=-1, keepdim=True) / total

    def nearest_levels(line: Tensor) -> Tensor:
        scale, minimum = line.float()
        return ((w - minimum) / scale.clamp(min=TINY)).round_().clamp_(0, 15)

    low, high = w.aminmax(dim=-1, keepdim=True)
    best_line, best_error = None, torch.full_like(low, torch.inf)
    for part in PARTS:
        minimum = low + (high / 2 - low / 2) * (1 - part)
        line = torch.stack([(high / 15 - low / 15) * part, minimum]).bfloat16()
        for _ in range(ROUNDS + 1):
            levels = nearest_levels(line)
            scale, minimum = line.float()
            error = mean(torch.addcmul(minimum, levels, scale).sub_(w).square_())
            best_line = line if best_line is None else torch.where(error < best_error, line, best_line)
            best_error = torch.minimum(error, best_error)
            line = regression(levels, w, mean)
    levels = nearest_levels(best_line).to(torch.uint8).flatten(1)
    scale, minimum = best_line.squeeze(-1)
    return {"weight": levels[:, ::2] | levels[:, 1::2] << 4, "scale": scale, "minimum": minimum}


def regression(x: Tensor, y: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """Slope and intercept [2, ..., 1] in bfloat16 of the line through `y` over `x`, by the `mean` over the last dim."""
    middle = mean(x)
    x = x - middle
    slope = (mean(x * y) / mean(x.square()).clamp(min=TINY)).bfloat16()
    return torch.stack([slope, (mean(y) - slope.float() * middle).bfloat16()])


def add_squares(found: dict[str, Tensor], name: str, layer: Linear, inputs: tuple[Tensor]) -> None:
    """A hook before a layer: add the squares of its input channels to `found`."""
    found[name] = inputs[0].float().square().sum((0, 1)) + found.get(name, 0)


@torch.inference_mode()
def measure_importance(checkpoint: Checkpoint, text: str, device: str) -> dict[str, Tensor]:
    """The mean square of each input channel [in] of the layers in the blocks, by layer, over the beginning of `text`.

    The weights stay mapped, and one block at a time is on `device`. ValueError where nothing finite can be measured.
    """
    tokenizer, args = checkpoint.tokenizer, checkpoint.args
    ids = [*tokenizer.start, *tokenizer.encode(text)][: min(CALIBRATION, args.max_seq_length)]
    if not ids:
        raise ValueError("--calibrate: the model has no tokens for this text: give another")
    model = load_model(checkpoint, "cpu", checkpoint.model["norm.weight"].dtype)
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            layer.register_forward_pre_hook(partial(add_squares, found, name))
    x = model.tok_embeddings(torch.tensor([ids])).to(device)
    input_pos = torch.arange(len(ids), device=device)
    cache = x.new_empty(2, 1, args.n_kv_head, len(ids), args.head_dim)
    frequencies = model.frequencies.to(device)
    for block in terminal.progress(model.layers, "calibrating"):
        block.to(device)
        parts = zip(x.split(CHUNK, dim=1), input_pos.split(CHUNK), strict=True)
        x = torch.cat([block(part, frequencies, positions, cache) for part, positions in parts], dim=1)
        block.to("meta")
    if not all(each.isfinite().all() for each in found.values()):
        raise ValueError(f"{checkpoint.path} computes NaN or infinity: get it again, or convert it with float32")
    return {name: squares / len(ids) for name, squares in found.items()}


def quantize(checkpoint: Checkpoint, quantization: dict, device: str, path: Path, text: str | None = None) -> None:
    """Write `checkpoint` under `quantization` to `path`, computed on `device` in slabs of a few rows.

    For 4 bits a `text` shows which input channels matter (None: all do alike).
    """
    if checkpoint.header["quantization"] is not None:
        raise ValueError(f"{checkpoint.path} is quantized already: give the original")
    dtype = checkpoint.model["norm.weight"].dtype
    tensors = empty_model(checkpoint.args, quantization, dtype).to_empty(device="cpu").state_dict()
    importance = measure_importance(checkpoint, text, device) if text and quantization["mode"] == "int4" else {}

    def fill(mapped: dict[str, Tensor]) -> None:
        for name, weight in terminal.progress(checkpoint.model.items(), "quantizing"):
            layer = name.removesuffix(".weight")
            bits, groupsize = storage(layer, quantization)
            count = max(1, SLAB[device] // weight[0].numel())
            for start in range(0, len(weight), count):
                slab = weight[start : start + count].to(device)
                if not slab.isfinite().all():
                    raise ValueError(f"{checkpoint.path}: {name} holds NaN or infinity: get the checkpoint again")
                if f"{layer}.scale" not in mapped:  # embeddings and norms stay as they are
                    parts = {"weight": slab}
                elif bits == 8:
                    parts = quantize_int8(slab)
                else:
                    parts = quantize_int4(slab, groupsize, importance.get(layer))
                for part, value in parts.items():
                    mapped[f"{layer}.{part}"][start : start + count].copy_(value)

    write_checkpoint(path, checkpoint.header | {"quantization": quantization}, tensors, fill)


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantize a checkpoint to 8 or 4 bits, beside it.", allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, as scripts/prepare.sh made it")
    add("--mode", choices=["int8", "int4"], default="int8", help="int8 per channel, or int4 in groups (int8)")
    add("--groupsize", type=int, choices=GROUPSIZES, default=32, help="of int4: smaller is better and larger (32)")
    add("--device", choices=DEVICES, default="cpu", help="what computes; names an int4 file, which runs on both (cpu)")
    add(
        "--calibrate",
        type=Path,
        default=TEXT,
        help="a text like those of the model, to measure what matters (README.md)",
    )
    args = parser.parse_args()
    checkpoint = read_checkpoint(args.checkpoint_path)
    quantization, suffix = {"mode": args.mode}, args.mode
    text = None
    if args.mode == "int4":
        text = terminal.read_text(f"@{args.calibrate}", "--calibrate")
        quantization["groupsize"] = args.groupsize
        suffix += f".g{args.groupsize}.{args.device}"
    path = args.checkpoint_path.with_name(f"{args.checkpoint_path.stem}_{suffix}.pth")
    quantize(checkpoint, quantization, args.device, path, text)
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    terminal.run(main)
