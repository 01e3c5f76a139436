"""Tensor parallelism: each of torchrun's ranks holds a part of every layer, and what the parts yield is added up.

    torchrun --standalone --nproc_per_node=2 generate.py --compile --checkpoint_path checkpoints/$MODEL_REPO/model.pth

It owns the process group, the one rule by which weights are divided, and how ranks agree on what each would see
differently: text that is read, times, files. All run the same program; rank 0 alone reads the keyboard and writes.
"""

import os
from dataclasses import replace
from datetime import timedelta

import quantize
from model import ModelArgs, Transformer

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_gather_tensor


def ranks() -> tuple[int, int]:
    """This process's rank, and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join(device: str) -> None:
    """Become one of the ranks, where torchrun has started this process. ValueError where there is no GPU left for it."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node: this host has {torch.cuda.device_count()} GPUs: start no more ranks than that")
        torch.cuda.set_device(local)
    if "LOCAL_RANK" in os.environ:  # a conversation may rest for days; a rank that ends is noticed all the same
        dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=timedelta(weeks=52))


def gather(value: object) -> list:
    """What each of the ranks gives, in their order."""
    values = [value] * ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def part(name: str, tensor: torch.Tensor, args: ModelArgs) -> torch.Tensor:
    """This rank's part of a checkpoint's tensor, float, int8 or int4: output channels are dim 0, input channels dim 1 of each.

    wqkv and w13 are divided by outputs, q, k, v, w1 and w3 each by itself; wo and w2 by inputs; the rest is everybody's.
    """
    heads, (rank, count) = [args.n_head, args.n_kv_head, args.n_kv_head], ranks()
    rules = {"wqkv": (0, heads), "w13": (0, [1, 1]), "wo": (1, [1]), "w2": (1, [1])}
    dim, sizes = rules.get(name.split(".")[-2], (0, []))
    if not sizes or dim == tensor.ndim:
        return tensor
    pieces = tensor.unflatten(dim, (sum(sizes), -1)).split(sizes, dim)
    return torch.cat([piece.flatten(dim, dim + 1).chunk(count, dim)[rank] for piece in pieces], dim)


def add_up(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """The sum of the ranks' outputs [B, S, dim] of a module, added in float32 and in the ranks' order.

    An all-reduce's order depends on the size of what it adds: with it a row of many would not be that row alone, bit for bit,
    which speculation relies on. (On gloo it takes twice as long, too, for the few rows of decoding.)
    """
    return sum(all_gather_tensor(output, 0, dist.group.WORLD).float().chunk(ranks()[1])).to(output.dtype)


def load_model(checkpoint: quantize.Checkpoint, device: str, dtype: torch.dtype, draft: bool) -> Transformer:
    """This rank's part of a model; the whole of a `draft` that cannot be divided. ValueError before any weight is read."""
    args, count = checkpoint.args, ranks()[1]
    if len(set(gather(checkpoint.header["id"]))) > 1:
        raise ValueError(f"{checkpoint.path} is not the same file on every host: copy that of the first to the others")
    sizes = {name: getattr(args, name) for name in ("n_head", "n_kv_head", "ffn_dim")}
    group = (checkpoint.header["quantization"] or {}).get("groupsize", 1)
    groups = {"groups of wo's inputs": args.n_head * args.head_dim // group, "groups of w2's inputs": args.ffn_dim // group}
    uneven = [f"{name} = {size}" for name, size in (sizes | groups).items() if size % count]
    if count == 1 or (draft and uneven):
        return quantize.load_model(checkpoint, device, dtype)
    if uneven:
        raise ValueError(f"{checkpoint.path}: {uneven[0]} is no multiple of {count} ranks: choose another --nproc_per_node")
    mine = replace(checkpoint, args=replace(args, **{name: size // count for name, size in sizes.items()}))
    model = quantize.load_model(mine, device, dtype, lambda name, tensor: part(name, tensor, args))
    for module in [each for layer in model.layers for each in (layer.attention, layer.feed_forward)]:
        module.register_forward_hook(add_up)
    return model
