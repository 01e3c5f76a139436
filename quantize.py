"""Quantize the linear layers of a checkpoint to 8 or 4 bits.

    python quantize.py --checkpoint_path checkpoints/$MODEL_REPO/model.pth --mode int8

A text shows what each layer multiplies; its weight is rounded so that the products change little. The file belongs to
checkpoint.py, multiplying to kernels/.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

SLAB = {"cpu": 2**21, "cuda": 2**26}  # weights that are rounded at a time: columns so long that Python does not count
FITTED = {"cpu": 2**20, "cuda": 2**26}  # weights that are fitted at a time: they stay in the caches, or keep a GPU busy
ROUNDS = 5  # of least squares
PARTS = (1.0, 0.9, 0.8, 0.7)  # of a group's range, from which they begin
CALIBRATION = 2048  # tokens: with half of them the divergence is some 5 % larger, with twice as many the same
CHUNK = 128  # of them at a time, which bounds the memory
TEXT = Path(__file__).with_name("README.md")
NORMS = {"attention.wqkv": "attention_norm", "feed_forward.w13": "ffn_norm"}  # before the layers of a block
SPREAD = 0.25  # the power of its inputs' size by which a channel is scaled: 0 not at all, 1 until they are all alike
COLUMNS = 128  # rounded one by one, between products of matrices
TINY = torch.finfo(torch.float32).tiny  # in place of a scale of zero: any level will do


@dataclass
class Inputs:
    """What a linear layer was seen to multiply: what the rounding of its weight [out, in] is to keep."""

    gain: Tensor  # [in]: columns of the weight are multiplied by it, for the norm before the layer is divided by it
    importance: Tensor  # [in]: the mean square of each channel, as it is then
    order: Tensor  # [in]: the channels, the least important first
    feedback: Tensor  # [in, in], unit lower triangular, in that order: how errors are made good, see `round_levels`


def inputs_of(moments: Tensor, count: int, norm: Tensor | None) -> Inputs:
    """From the products [in, in] of two channels, summed over `count` tokens, whose memory is used.

    `norm` is the weight [in] of the norm before the layer, if it has one. Large channels are made smaller and their
    columns larger, https://arxiv.org/abs/2306.00978, exactly: the gain is what the rounding of the norm's new weight
    makes of it. So few tokens overstate what channels have in common: it counts as if in as many tokens more as there
    are channels they had nothing.
    """
    moments.div_(count)
    importance = moments.diagonal() + moments.diagonal().mean() * 1e-6 + TINY  # also of a channel that is never active
    gain = torch.ones_like(importance)
    if norm is not None:
        size = (importance / importance.mean()).sqrt()
        smaller = (norm / size**SPREAD).to(norm.dtype)
        gain = torch.where(smaller == 0, gain, norm.float() / smaller)
    importance = importance / gain.square()
    order = importance.argsort()
    moments.div_(gain).div_(gain[:, None]).mul_(count / (count + len(moments)))
    moments.diagonal().copy_(importance)
    moments = moments[order[:, None], order]
    feedback = torch.linalg.cholesky(moments)
    return Inputs(gain, importance, order, feedback.div_(feedback.diagonal().clone()))


def nearest_levels(weight: Tensor, scale: Tensor, minimum: Tensor, bounds: tuple[int, int]) -> Tensor:
    return ((weight - minimum) / scale.clamp(min=TINY)).round_().clamp_(*bounds)


def round_levels(
    weight: Tensor, scale: Tensor, minimum: Tensor, bounds: tuple[int, int], inputs: Inputs | None
) -> Tensor:
    """Levels [out, in] for a float32 `weight` [out, in], by groups that have a `scale` and a `minimum` [out, groups].

    Without `inputs` the nearest. With them, columns are rounded one after another, the most important first, each
    after what it can make good of the errors before: GPTQ, https://arxiv.org/abs/2210.17323, as LDLQ has it,
    https://arxiv.org/abs/2307.13304. With errors E [out, in] and moments F D F^T the product's square error is the sum
    of D_k (E F)_k^2, so column k is rounded from its weights plus the sum of E_j F_jk over the columns j before it.
    """
    groupsize = weight.shape[1] // scale.shape[1]
    if inputs is None:
        grouped = weight.unflatten(1, (-1, groupsize))
        return nearest_levels(grouped, scale[:, :, None], minimum[:, :, None], bounds).flatten(1)
    groups = (inputs.order // groupsize).tolist()
    scale, minimum = scale.T.contiguous(), minimum.T.contiguous()
    weight = weight.T[inputs.order]
    errors, levels = torch.zeros_like(weight), torch.empty_like(weight)
    for end in range(len(weight), 0, -COLUMNS):
        start = max(0, end - COLUMNS)
        wanted = weight[start:end] + inputs.feedback[end:, start:end].T @ errors[end:]
        for k in reversed(range(start, end)):
            column = wanted[k - start] + inputs.feedback[k + 1 : end, k] @ errors[k + 1 : end]
            levels[k] = nearest_levels(column, scale[groups[k]], minimum[groups[k]], bounds)
            errors[k] = weight[k] - levels[k] * scale[groups[k]] - minimum[groups[k]]
    return levels[inputs.order.argsort()].T


def quantize_int8(weight: Tensor, inputs: Inputs | None = None) -> dict[str, Tensor]:
    """Symmetric 8 bits for a float `weight` [out, in]: the largest of each output channel becomes 127."""
    scale = weight.abs().amax(dim=1, keepdim=True).float() / 127
    levels = round_levels(weight.float(), scale, torch.zeros_like(scale), (-127, 127), inputs)
    return {"weight": levels.to(torch.int8), "scale": scale[:, 0]}


def quantize_int4(weight: Tensor, groupsize: int, inputs: Inputs | None = None) -> dict[str, Tensor]:
    """4 bits for a float `weight` [out, in]: per group, 16 levels from `minimum` on in steps of `scale` (bfloat16)."""
    weight = weight.float()
    importance = weight.new_ones(weight.shape[1]) if inputs is None else inputs.importance
    rows = max(1, FITTED[weight.device.type] // weight.shape[1])
    scale, minimum = torch.cat([fit_int4(part, groupsize, importance) for part in weight.split(rows)], dim=1)
    levels = round_levels(weight, scale.float(), minimum.float(), (0, 15), inputs).to(torch.uint8)
    return {"weight": levels[:, ::2] | levels[:, 1::2] << 4, "scale": scale, "minimum": minimum}


def fit_int4(weight: Tensor, groupsize: int, importance: Tensor) -> Tensor:
    """Scales and minima [2, out, in / groupsize] in bfloat16 for a float32 `weight` [out, in].

    From several parts of the group's range, ROUNDS of alternating least squares: levels for (scale, minimum), then the
    regression line of the weights over their levels; per group the best of all is kept, in the bfloat16 that is stored.
    An error weighs as much as the `importance` [in] of its input channel.
    """
    w = weight.unflatten(1, (-1, groupsize))  # [out, groups, groupsize]
    share = (importance / importance.mean()).view(-1, groupsize)
    total = share.sum(dim=-1, keepdim=True)

    def mean(x: Tensor) -> Tensor:
        return x.mul(share).sum(dim=-1, keepdim=True) / total

    low, high = w.aminmax(dim=-1, keepdim=True)
    best_line, best_error = None, torch.full_like(low, torch.inf)
    for part in PARTS:
        minimum = low + (high / 2 - low / 2) * (1 - part)
        line = torch.stack([(high / 15 - low / 15) * part, minimum]).bfloat16()
        for _ in range(ROUNDS + 1):
            scale, minimum = line.float()
            levels = nearest_levels(w, scale, minimum, (0, 15))
            error = mean(torch.addcmul(minimum, levels, scale).sub_(w).square_())
            best_line = line if best_line is None else torch.where(error < best_error, line, best_line)
            best_error = torch.minimum(error, best_error)
            line = regression(levels, w, mean)
    return best_line.squeeze(-1)


def regression(x: Tensor, y: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """Slope and intercept [2, ..., 1] in bfloat16 of the line through `y` over `x`, by the `mean` over the last dim."""
    middle = mean(x)
    x = x - middle
    slope = (mean(x * y) / mean(x.square()).clamp(min=TINY)).bfloat16()
    return torch.stack([slope, (mean(y) - slope.float() * middle).bfloat16()])


def norm_before(layer: str) -> str | None:
    """The norm of which `layer` multiplies the output, with no other layer that does."""
    for name, norm in NORMS.items():
        if layer.endswith(name):
            return layer.removesuffix(name) + norm
    return None


def add_moments(found: dict[str, Tensor], name: str, layer: Linear, inputs: tuple[Tensor]) -> None:
    """A hook before a layer: add the products [in, in] of its input channels to `found`."""
    x = inputs[0].flatten(0, 1).float()
    if name not in found:
        found[name] = x.new_zeros(layer.n_in, layer.n_in)
    found[name].addmm_(x.T, x)


@torch.inference_mode()
def measure_inputs(checkpoint: Checkpoint, text: str, device: str) -> Iterator[tuple[str, Inputs]]:
    """Each linear layer's name and Inputs in turn, over the beginning of `text`.

    The weights stay mapped; one block at a time is on `device`, and the products of channels of its layers are in
    memory. ValueError where nothing finite can be measured.
    """
    tokenizer, args = checkpoint.tokenizer, checkpoint.args
    ids = [*tokenizer.start, *tokenizer.encode(text)][: min(CALIBRATION, args.max_seq_length)]
    if not ids:
        raise ValueError("--calibrate: the model has no tokens for this text: give another")
    model = load_model(checkpoint, "cpu", checkpoint.model["norm.weight"].dtype)
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            layer.register_forward_pre_hook(partial(add_moments, found, name))

    def measured() -> Iterator[tuple[str, Inputs]]:
        for name in list(found):
            if not found[name].diagonal().isfinite().all():
                raise ValueError(f"{checkpoint.path} computes NaN or infinity: get it again, or convert in float32")
            norm = norm_before(name)
            yield name, inputs_of(found.pop(name), len(ids), model.get_submodule(norm).weight if norm else None)

    x = model.tok_embeddings(torch.tensor([ids])).to(device)
    input_pos = torch.arange(len(ids), device=device)
    cache = x.new_empty(2, 1, args.n_kv_head, len(ids), args.head_dim)
    frequencies = model.frequencies.to(device)
    for block in model.layers:
        block.to(device)
        parts = zip(x.split(CHUNK, dim=1), input_pos.split(CHUNK), strict=True)
        x = torch.cat([block(part, frequencies, positions, cache) for part, positions in parts], dim=1)
        yield from measured()
        block.to("meta")
    add_moments(found, "output", model.output, (model.norm.to(device)(x),))
    yield from measured()


def finite_slabs(checkpoint: Checkpoint, name: str, device: str) -> Iterator[tuple[slice, Tensor]]:
    """A tensor of the checkpoint on `device`, a few rows at a time. ValueError where it holds NaN or infinity."""
    tensor = checkpoint.model[name]
    count = max(1, SLAB[device] // tensor[0].numel())
    for start in range(0, len(tensor), count):
        rows = slice(start, start + count)
        slab = tensor[rows].to(device)
        if not slab.isfinite().all():
            raise ValueError(f"{checkpoint.path}: {name} holds NaN or infinity: get the checkpoint again")
        yield rows, slab


def quantize(checkpoint: Checkpoint, quantization: dict, device: str, path: Path, text: str | None = None) -> None:
    """Write `checkpoint` under `quantization` to `path`, computed on `device` in slabs of a few rows.

    A `text` shows what its layers multiply (None: each weight is rounded by itself).
    """
    if checkpoint.header["quantization"] is not None:
        raise ValueError(f"{checkpoint.path} is quantized already: give the original")
    dtype = checkpoint.model["norm.weight"].dtype
    tensors = empty_model(checkpoint.args, quantization, dtype).to_empty(device="cpu").state_dict()
    layers = [name.removesuffix(".scale") for name in tensors if name.endswith(".scale")]

    def fill_layer(mapped: dict[str, Tensor], layer: str, inputs: Inputs | None) -> None:
        bits, groupsize = storage(layer, quantization)
        for rows, slab in finite_slabs(checkpoint, f"{layer}.weight", device):
            weight = slab if inputs is None else slab * inputs.gain
            parts = quantize_int8(weight, inputs) if bits == 8 else quantize_int4(weight, groupsize, inputs)
            for part, value in parts.items():
                mapped[f"{layer}.{part}"][rows].copy_(value)
        norm = norm_before(layer)
        if norm and inputs:
            weight = mapped[f"{norm}.weight"]
            weight.copy_(weight.float() / inputs.gain.cpu())

    def fill(mapped: dict[str, Tensor]) -> None:
        for name in checkpoint.model:
            if name.removesuffix(".weight") not in layers:  # embeddings and norms
                for rows, slab in finite_slabs(checkpoint, name, device):
                    mapped[name][rows].copy_(slab)
        measured = measure_inputs(checkpoint, text, device) if text else dict.fromkeys(layers).items()
        for layer, inputs in terminal.progress(measured, "quantizing", len(layers)):
            fill_layer(mapped, layer, inputs)

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
    text = terminal.read_text(f"@{args.calibrate}", "--calibrate")
    quantization, suffix = {"mode": args.mode}, args.mode
    if args.mode == "int4":
        quantization["groupsize"] = args.groupsize
        suffix += f".g{args.groupsize}.{args.device}"
    path = args.checkpoint_path.with_name(f"{args.checkpoint_path.stem}_{suffix}.pth")
    quantize(checkpoint, quantization, args.device, path, text)
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    terminal.run(main)
