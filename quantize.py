"""Quantize the linear layers of a checkpoint to 8 or 4 bits.

    python quantize.py --checkpoint_path checkpoints/$MODEL_REPO/model.pth --mode int8

The file belongs to checkpoint.py, multiplying to kernels/.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__" and getattr(sys.flags, "safe_path", False):
    sys.exit("PYTHONSAFEPATH keeps Python from finding the modules beside this script: unset it")

import terminal

import torch
from torch import Tensor

from checkpoint import DEVICES, GROUPSIZES, Checkpoint, empty_model, read_checkpoint, storage, write_checkpoint

SLAB = {"cpu": 2**18, "cuda": 2**26}  # weights quantized at a time: they stay in the caches, or keep a GPU busy
ROUNDS = 5  # of least squares
TINY = torch.finfo(torch.float32).tiny  # in place of a scale of zero: any level will do


def quantize_int8(weight: Tensor) -> dict[str, Tensor]:
    """Symmetric 8 bits for a float `weight` [out, in]: the largest of each output channel becomes 127."""
    scale = weight.abs().amax(dim=1).float() / 127
    levels = (weight / scale.clamp(min=TINY)[:, None]).round().clamp(-127, 127)
    return {"weight": levels.to(torch.int8), "scale": scale}


def quantize_int4(weight: Tensor, groupsize: int) -> dict[str, Tensor]:
    """4 bits for a float `weight` [out, in]: per group, 16 levels from `minimum` on in steps of `scale`.

    From the group's extremes, ROUNDS of alternating least squares: levels for (scale, minimum), then the regression
    line of the weights over their levels; per group the best of all rounds is kept, in the bfloat16 that is stored.
    """
    w = weight.float().unflatten(1, (-1, groupsize))  # [out, groups, groupsize]
    mean = w.mean(dim=-1, keepdim=True)

    def nearest_levels(line: Tensor) -> Tensor:
        scale, minimum = line.float()
        return ((w - minimum) / scale.clamp(min=TINY)).round_().clamp_(0, 15)

    low, high = w.aminmax(dim=-1, keepdim=True)
    line = torch.stack([high / 15 - low / 15, low]).bfloat16()  # scale and minimum
    best_line, best_error = line, torch.full_like(low, torch.inf)
    for _ in range(ROUNDS + 1):
        levels = nearest_levels(line)
        scale, minimum = line.float()
        error = torch.addcmul(minimum, levels, scale).sub_(w).square_().sum(dim=-1, keepdim=True)
        best_line = torch.where(error < best_error, line, best_line)
        best_error = torch.minimum(error, best_error)
        middle = levels.mean(dim=-1, keepdim=True)
        levels -= middle
        variance = levels.square().sum(dim=-1, keepdim=True).clamp(min=TINY)
        scale = ((levels * w).sum(dim=-1, keepdim=True) / variance).bfloat16()
        line = torch.stack([scale, (mean - scale.float() * middle).bfloat16()])
    levels = nearest_levels(best_line).to(torch.uint8).flatten(1)
    scale, minimum = best_line.squeeze(-1)
    return {"weight": levels[:, ::2] | levels[:, 1::2] << 4, "scale": scale, "minimum": minimum}


def quantize(checkpoint: Checkpoint, quantization: dict, device: str, path: Path) -> None:
    """Write `checkpoint` under `quantization` to `path`, computed on `device` in slabs of a few rows."""
    if checkpoint.header["quantization"] is not None:
        raise ValueError(f"{checkpoint.path} is quantized already: give the original")
    dtype = checkpoint.model["norm.weight"].dtype
    tensors = empty_model(checkpoint.args, quantization, dtype).to_empty(device="cpu").state_dict()

    def fill(mapped: dict[str, Tensor]) -> None:
        for name, weight in terminal.progress(checkpoint.model.items(), "quantizing"):
            layer = name.removesuffix(".weight")
            bits, groupsize = storage(layer, quantization)
            count = max(1, SLAB[device] // weight[0].numel())
            for start in range(0, len(weight), count):
                slab = weight[start : start + count].to(device)
                if not slab.isfinite().all():
                    raise ValueError(f"{checkpoint.path}: {name} holds NaN or infinity: get the checkpoint again")
                parts = {"weight": slab}
                if f"{layer}.scale" in mapped:  # embeddings and norms stay as they are
                    parts = quantize_int8(slab) if bits == 8 else quantize_int4(slab, groupsize)
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
    args = parser.parse_args()
    checkpoint = read_checkpoint(args.checkpoint_path)
    quantization, suffix = {"mode": args.mode}, args.mode
    if args.mode == "int4":
        quantization["groupsize"] = args.groupsize
        suffix += f".g{args.groupsize}.{args.device}"
    path = args.checkpoint_path.with_name(f"{args.checkpoint_path.stem}_{suffix}.pth")
    quantize(checkpoint, quantization, args.device, path)
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    terminal.run(main)
