"""Quantize the linear layers of a checkpoint to 8 or 4 bits.

    python quantize.py --checkpoint_path checkpoints/$MODEL_REPO/model.pth --mode int8

A calibration text runs through the model. Each weight is rounded so that the outputs of its layer on that text change
little (GPTQ), after the inputs of the layer were scaled (AWQ).
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import utils

import torch
from torch import Tensor

from checkpoint import DEVICES, GROUPSIZES, Checkpoint, bits_and_groupsize, empty_model, load_model, read_checkpoint
from model import Linear, rope_table
from scripts.files import new_checkpoint

ROUND_SIZE = {"cpu": 2**21, "cuda": 2**26}  # weights rounded at a time: long columns, so that Python costs little
FIT_SIZE = {"cpu": 2**20, "cuda": 2**26}  # weights fitted at a time: they stay in the cache, or fill a GPU
ITERATIONS = 5  # least squares are repeated
CLIP_RATIOS = (1.0, 0.9, 0.8, 0.7)  # parts of a group's range, from which least squares starts
CALIBRATION_TOKENS = 2048  # half as many give 5 % more KL divergence, twice as many no less
CHUNK_TOKENS = 128  # tokens in a pass; bounds the memory
TEXT = Path(__file__).with_name("README.md")
NORMS = {"attention.wqkv": "attention_norm", "feed_forward.w13": "ffn_norm"}  # layer of a block: the norm before it
AWQ_ALPHA = 0.25  # 0 scales no channel, 1 makes all of them equally large
GPTQ_BLOCK = 128  # columns that are rounded one by one between two matrix products
TINY = torch.finfo(torch.float32).tiny  # replaces a scale of zero


@dataclass
class InputStats:
    """Statistics of the inputs of a linear layer, for the rounding of its weight [out, in]."""

    awq_scale: Tensor  # [in]: columns of the weight are multiplied by it, and the norm before the layer divided
    importance: Tensor  # [in]: mean square of each input channel, after that
    order: Tensor  # [in]: channels, from the least to the most important
    ldl_factor: Tensor  # [in, in]: unit lower triangular L of the inputs' second moments L D L^T, in that order


def analyze(hessian: Tensor, count: int, norm: Tensor | None) -> InputStats:
    """Statistics from the sum of x x^T [in, in] over `count` tokens, which is overwritten.

    `norm` is the weight [in] of the norm before the layer, if there is one. Large channels are made smaller, and their
    columns larger, https://arxiv.org/abs/2306.00978. This is exact, because the scale is computed from the rounded
    weight of the new norm. Correlations are shrunk by count / (count + channels), because few tokens overstate them.
    """
    hessian.div_(count)
    importance = hessian.diagonal() + hessian.diagonal().mean() * 1e-6 + TINY  # also of a channel that is never active
    awq_scale = torch.ones_like(importance)
    if norm is not None:
        size = (importance / importance.mean()).sqrt()
        new_norm = (norm / size**AWQ_ALPHA).to(norm.dtype)
        awq_scale = torch.where(new_norm == 0, awq_scale, norm.float() / new_norm)
    importance = importance / awq_scale.square()
    order = importance.argsort()
    hessian.div_(awq_scale).div_(awq_scale[:, None]).mul_(count / (count + len(hessian)))
    hessian.diagonal().copy_(importance)
    hessian = hessian[order[:, None], order]
    factor = torch.linalg.cholesky(hessian)
    return InputStats(awq_scale, importance, order, factor.div_(factor.diagonal().clone()))


def nearest_levels(weight: Tensor, scale: Tensor, minimum: Tensor, bounds: tuple[int, int]) -> Tensor:
    """Round a weight to levels between `bounds`."""
    return ((weight - minimum) / scale.clamp(min=TINY)).round_().clamp_(*bounds)


def gptq_round(
    weight: Tensor, scale: Tensor, minimum: Tensor, bounds: tuple[int, int], stats: InputStats | None
) -> Tensor:
    """Levels [out, in] of a float32 `weight` [out, in], in groups with a `scale` and a `minimum` [out, groups].

    Without `stats` the nearest. With them, columns are rounded one by one, the most important first, and the error of
    each is compensated by those after it: GPTQ, https://arxiv.org/abs/2210.17323, in the form of LDLQ,
    https://arxiv.org/abs/2307.13304. With errors E [out, in] and moments L D L^T the square error of the product is the
    sum of D_k (E L)_k^2, so column k is rounded from its weights plus the sum of E_j L_jk over the columns j before it.
    """
    groupsize = weight.shape[1] // scale.shape[1]
    if stats is None:
        grouped = weight.unflatten(1, (-1, groupsize))
        return nearest_levels(grouped, scale[:, :, None], minimum[:, :, None], bounds).flatten(1)
    groups = (stats.order // groupsize).tolist()
    scale, minimum = scale.T.contiguous(), minimum.T.contiguous()
    weight = weight.T[stats.order]
    errors = torch.zeros_like(weight)
    levels = torch.empty_like(weight)
    for end in range(len(weight), 0, -GPTQ_BLOCK):
        start = max(0, end - GPTQ_BLOCK)
        targets = weight[start:end] + stats.ldl_factor[end:, start:end].T @ errors[end:]
        for k in reversed(range(start, end)):
            target = targets[k - start] + stats.ldl_factor[k + 1 : end, k] @ errors[k + 1 : end]
            levels[k] = nearest_levels(target, scale[groups[k]], minimum[groups[k]], bounds)
            errors[k] = weight[k] - levels[k] * scale[groups[k]] - minimum[groups[k]]
    return levels[stats.order.argsort()].T


def quantize_int8(weight: Tensor, stats: InputStats | None = None) -> dict[str, Tensor]:
    """Symmetric int8 for a float `weight` [out, in]: the largest weight of each output channel becomes 127."""
    scale = weight.abs().amax(dim=1, keepdim=True).float() / 127
    levels = gptq_round(weight.float(), scale, torch.zeros_like(scale), (-127, 127), stats)
    return {"weight": levels.to(torch.int8), "scale": scale[:, 0]}


def quantize_int4(weight: Tensor, groupsize: int, stats: InputStats | None = None) -> dict[str, Tensor]:
    """int4 for a float `weight` [out, in]: 16 levels per group, from `minimum` on in steps of `scale` (bfloat16)."""
    weight = weight.float()
    importance = weight.new_ones(weight.shape[1]) if stats is None else stats.importance
    rows = max(1, FIT_SIZE[weight.device.type] // weight.shape[1])
    scale, minimum = torch.cat([fit_scales(part, groupsize, importance) for part in weight.split(rows)], dim=1)
    levels = gptq_round(weight, scale.float(), minimum.float(), (0, 15), stats).to(torch.uint8)
    return {"weight": levels[:, ::2] | levels[:, 1::2] << 4, "scale": scale, "minimum": minimum}


def fit_scales(weight: Tensor, groupsize: int, importance: Tensor) -> Tensor:
    """Scales and minima [2, out, in / groupsize] in bfloat16 for a float32 `weight` [out, in].

    Least squares, weighted by the `importance` [in] of the input channels, in turn: levels for (scale, minimum), then
    the regression line of the weights over their levels. Starts from several ranges and keeps the best per group, in
    the bfloat16 that is stored.
    """
    w = weight.unflatten(1, (-1, groupsize))  # [out, groups, groupsize]
    share = (importance / importance.mean()).view(-1, groupsize)
    total = share.sum(dim=-1, keepdim=True)

    def mean(x: Tensor) -> Tensor:
        return x.mul(share).sum(dim=-1, keepdim=True) / total

    low, high = w.aminmax(dim=-1, keepdim=True)
    best, best_error = None, torch.full_like(low, torch.inf)
    for ratio in CLIP_RATIOS:
        minimum = low + (high / 2 - low / 2) * (1 - ratio)
        scale_and_minimum = torch.stack([(high / 15 - low / 15) * ratio, minimum]).bfloat16()
        for _ in range(ITERATIONS + 1):
            scale, minimum = scale_and_minimum.float()
            levels = nearest_levels(w, scale, minimum, (0, 15))
            error = mean(torch.addcmul(minimum, levels, scale).sub_(w).square_())
            best = scale_and_minimum if best is None else torch.where(error < best_error, scale_and_minimum, best)
            best_error = torch.minimum(error, best_error)
            scale_and_minimum = fit_line(levels, w, mean)
    return best.squeeze(-1)


def fit_line(x: Tensor, y: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """Slope and intercept [2, ..., 1] (bfloat16) of the regression line of `y` over `x` by `mean` over the last dim."""
    center = mean(x)
    x = x - center
    slope = (mean(x * y) / mean(x.square()).clamp(min=TINY)).bfloat16()
    return torch.stack([slope, (mean(y) - slope.float() * center).bfloat16()])


def preceding_norm(layer: str) -> str | None:
    """The name of the norm that only `layer` reads, if there is one."""
    for name, norm in NORMS.items():
        if layer.endswith(name):
            return layer.removesuffix(name) + norm
    return None


def add_hessian(hessians: dict[str, Tensor], name: str, layer: Linear, inputs: tuple[Tensor]) -> None:
    """A forward pre-hook: add x^T x [in, in] of a layer's inputs to `hessians`."""
    x = inputs[0].flatten(0, 1).float()
    if name not in hessians:
        hessians[name] = x.new_zeros(layer.n_in, layer.n_in)
    hessians[name].addmm_(x.T, x)


@torch.inference_mode()
def calibrate(checkpoint: Checkpoint, text: str, device: str) -> Iterator[tuple[str, InputStats]]:
    """Yield each linear layer's name and InputStats over the first tokens of `text`, in the order in which layers run.

    The weights stay mapped; one block at a time is on `device`, with the Hessians of its layers. ValueError if the
    model computes NaN or infinity.
    """
    tokenizer, args = checkpoint.tokenizer, checkpoint.args
    ids = (tokenizer.bos_ids + tokenizer.encode(tokenizer.escape(text)))[: min(CALIBRATION_TOKENS, args.max_seq_length)]
    if not ids:
        raise ValueError("--calibrate: the model has no tokens for this text: give another")
    model = load_model(checkpoint, "cpu", checkpoint.state_dict["norm.weight"].dtype)
    hessians = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            layer.register_forward_pre_hook(partial(add_hessian, hessians, name))

    def analyzed() -> Iterator[tuple[str, InputStats]]:
        for name in list(hessians):
            if not hessians[name].diagonal().isfinite().all():
                raise ValueError(f"{checkpoint.path} computes NaN or infinity: get it again, or convert in float32")
            norm = preceding_norm(name)
            yield name, analyze(hessians.pop(name), len(ids), model.get_submodule(norm).weight if norm else None)

    x = model.tok_embeddings(torch.tensor([ids])).to(device)
    input_pos = torch.arange(len(ids), device=device)
    cache = x.new_empty(2, 1, args.n_kv_head, len(ids), args.head_dim)
    rope = rope_table(args, len(ids)).to(device)
    for block in model.layers:
        block.to(device)
        chunks = zip(x.split(CHUNK_TOKENS, dim=1), input_pos.split(CHUNK_TOKENS), strict=True)
        x = torch.cat([block(chunk, rope, positions, cache) for chunk, positions in chunks], dim=1)
        yield from analyzed()
        block.to("meta")
    add_hessian(hessians, "output", model.output, (model.norm.to(device)(x),))
    yield from analyzed()


def row_slices(checkpoint: Checkpoint, name: str, device: str) -> Iterator[tuple[slice, Tensor]]:
    """A tensor of the checkpoint on `device`, a few rows at a time. ValueError if it holds NaN or infinity."""
    tensor = checkpoint.state_dict[name]
    count = max(1, ROUND_SIZE[device] // tensor[0].numel())
    for start in range(0, len(tensor), count):
        rows = slice(start, start + count)
        part = tensor[rows].to(device)
        if not part.isfinite().all():
            raise ValueError(f"{checkpoint.path}: {name} holds NaN or infinity: get the checkpoint again")
        yield rows, part


def quantize_layer(
    checkpoint: Checkpoint, layer: str, quantization: dict, stats: InputStats | None, device: str, mapped: dict
) -> None:
    """Write the quantized weight of a layer, and the scaled norm before it, to the `mapped` tensors of the new file."""
    bits, groupsize = bits_and_groupsize(layer, quantization)
    for rows, weight in row_slices(checkpoint, f"{layer}.weight", device):
        scaled = weight if stats is None else weight * stats.awq_scale
        parts = quantize_int8(scaled, stats) if bits == 8 else quantize_int4(scaled, groupsize, stats)
        for name, part in parts.items():
            mapped[f"{layer}.{name}"][rows].copy_(part)
    norm = preceding_norm(layer)
    if norm and stats:
        weight = mapped[f"{norm}.weight"]
        weight.copy_(weight.float() / stats.awq_scale.cpu())


def quantize(checkpoint: Checkpoint, quantization: dict, device: str, path: Path, text: str | None = None) -> None:
    """Write `checkpoint` under `quantization` to `path`, computed on `device`, a few rows at a time.

    `text` is for calibration; without one each weight is rounded by itself.
    """
    if checkpoint.header["quantization"] is not None:
        raise ValueError(f"{checkpoint.path} is quantized already: give the original")
    dtype = checkpoint.state_dict["norm.weight"].dtype
    tensors = empty_model(checkpoint.args, quantization, dtype).to_empty(device="cpu").state_dict()
    layers = [name.removesuffix(".scale") for name in tensors if name.endswith(".scale")]
    with new_checkpoint(path, checkpoint.header | {"quantization": quantization}, tensors) as mapped:
        for name in checkpoint.state_dict:
            if name.removesuffix(".weight") not in layers:  # embeddings and norms
                for rows, part in row_slices(checkpoint, name, device):
                    mapped[name][rows].copy_(part)
        stats_of_layers = calibrate(checkpoint, text, device) if text else dict.fromkeys(layers).items()
        for layer, stats in utils.progress(stats_of_layers, "quantizing", len(layers)):
            quantize_layer(checkpoint, layer, quantization, stats, device, mapped)


def calibration_text(path: Path) -> str | None:
    """The text of --calibrate; None for "none". ValueError if there is no text."""
    if path == Path("none"):
        return None
    if path == TEXT and not path.exists():  # an installation may lack *.md
        raise ValueError(f"{TEXT}, the default of --calibrate, is not there: give another text, or none")
    return utils.read_text(f"@{path}", "--calibrate")


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantize a checkpoint to 8 or 4 bits, beside it.", allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, as scripts/prepare.sh wrote it")
    add("--mode", choices=["int8", "int4"], default="int8", help="int8 per output channel, or int4 in groups (int8)")
    add(
        "--groupsize",
        type=int,
        choices=GROUPSIZES,
        default=32,
        help="input channels per group of int4; smaller groups lose less and take more (32)",
    )
    add("--device", choices=DEVICES, default="cpu", help="where it is computed; part of the name of an int4 file (cpu)")
    add(
        "--calibrate",
        type=Path,
        default=TEXT,
        help="calibration text, like the texts that the model will see (README.md); none rounds each weight by itself: "
        "seconds instead of minutes, and 3 to 5 times the KL divergence",
    )
    args = parser.parse_args()
    checkpoint = read_checkpoint(args.checkpoint_path)
    text = calibration_text(args.calibrate)
    quantization, suffix = {"mode": args.mode}, args.mode
    if args.mode == "int4":
        quantization["groupsize"] = args.groupsize
        suffix += f".g{args.groupsize}.{args.device}"
    path = args.checkpoint_path.with_name(f"{args.checkpoint_path.stem}_{suffix}.pth")
    quantize(checkpoint, quantization, args.device, path, text)
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    utils.run(main)
