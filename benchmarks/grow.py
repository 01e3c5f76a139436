"""Grow a checkpoint to a larger Llama shape with the same vocabulary, without changing what it computes.

    python -m benchmarks.grow --checkpoint_path checkpoints/demo/target/model.pth --shape 1.1b --out grown/target.pth

So what depends on text (speculation, prefix caching) is measured at the cost of a real model on text with real
statistics, with nothing to download. Added channels, heads and layers are zeros that are multiplied all the same.
"""

import argparse
import math
import sys
import terminal
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import Checkpoint, empty_model, read_checkpoint, write_checkpoint
from model import ModelArgs

SHAPES = {  # n_layer, dim, n_head, n_kv_head, head_dim, ffn_dim, max_seq_length
    "68m": (2, 768, 12, 12, 64, 3072, 2048),
    "160m": (12, 768, 12, 12, 64, 3072, 2048),
    "1.1b": (22, 2048, 32, 4, 64, 5632, 2048),
    "7b": (32, 4096, 32, 32, 128, 11008, 4096),
}


def shape_args(shape: str, vocab_size: int) -> ModelArgs:
    """The ModelArgs of one of SHAPES."""
    n_layer, dim, n_head, n_kv_head, head_dim, ffn_dim, context = SHAPES[shape]
    return ModelArgs(dim, n_layer, n_head, n_kv_head, head_dim, ffn_dim, vocab_size, 1e-5, 10000.0, 1.0, context)


def head_places(old: ModelArgs, new: ModelArgs) -> tuple[list[int], list[int]]:
    """For each new query head, and each new KV head, the old one that it is, or -1. ValueError where there are too few.

    Query heads that shared a KV head share one again where the new groups are large enough; else it is repeated.
    """
    group, new_group = old.n_head // old.n_kv_head, new.n_head // new.n_kv_head
    copies = math.ceil(group / new_group)
    if old.n_kv_head * copies > new.n_kv_head:
        raise ValueError(f"{new.n_head} heads and {new.n_kv_head} KV heads are too few for those of the checkpoint")
    q, kv = [-1] * new.n_head, [-1] * new.n_kv_head
    for head in range(old.n_head):
        shared, place = head // group, head % group
        copy = shared * copies + place // new_group
        kv[copy] = shared
        q[copy * new_group + place % new_group] = head
    return q, kv


def channel_places(heads: list[int], old: ModelArgs, new: ModelArgs) -> tuple[Tensor, Tensor]:
    """New and old indices of the channels that the heads have in common.

    RoPE turns channel i of a half by theta^(-2 i / head_dim): with head_dim m times as large, that is channel m i.
    """
    half = torch.arange(old.head_dim // 2) * (new.head_dim // old.head_dim)
    inside_new = torch.cat([half, half + new.head_dim // 2])
    inside_old = torch.arange(old.head_dim)
    taken = [(i, head) for i, head in enumerate(heads) if head >= 0]
    indices_new = [inside_new + i * new.head_dim for i, _ in taken]
    indices_old = [inside_old + head * old.head_dim for _, head in taken]
    return torch.cat(indices_new), torch.cat(indices_old)


def grow(checkpoint: Checkpoint, shape: ModelArgs, path: Path, dtype: torch.dtype) -> None:
    """Write `checkpoint` in the dimensions of `shape` to `path`. ValueError where it does not fit into them.

    RMSNorm divides by the root of the mean over more channels: its weight and eps take that back.
    """
    old = checkpoint.args
    for name in ("dim", "n_layer", "ffn_dim", "head_dim"):
        if getattr(shape, name) < getattr(old, name):
            raise ValueError(f"{name} {getattr(shape, name)} is less than the checkpoint's {getattr(old, name)}")
    if shape.head_dim % old.head_dim or shape.vocab_size != old.vocab_size or checkpoint.header["quantization"]:
        raise ValueError("head_dim must be a multiple, the vocabulary the same, and the checkpoint not quantized")
    norm_eps = old.norm_eps * old.dim / shape.dim
    new = replace(shape, norm_eps=norm_eps, rope_theta=old.rope_theta, rope_scale=old.rope_scale)
    q, kv = head_places(old, new)
    q_new, q_old = channel_places(q, old, new)
    kv_new, kv_old = channel_places(kv, old, new)
    norm = math.sqrt(old.dim / new.dim)
    sharpness = math.sqrt(new.head_dim / old.head_dim)  # attention divides by the root of head_dim
    projections = [(q_new, q_old, sharpness), (kv_new, kv_old, 1.0), (kv_new, kv_old, 1.0)]

    def channels(args: ModelArgs) -> list[int]:
        return [heads * args.head_dim for heads in (args.n_head, args.n_kv_head, args.n_kv_head)]

    def fill(mapped: dict[str, Tensor]) -> None:
        for name, tensor in terminal.progress(mapped.items(), "growing"):
            tensor.zero_()
            weight = checkpoint.model.get(name)
            if weight is None:
                if "norm" in name:
                    tensor.fill_(1)
            elif "norm" in name:
                tensor[: old.dim] = weight.float() * norm
            elif name.endswith("wqkv.weight"):
                places, parts = tensor.split(channels(new)), weight.float().split(channels(old))
                for place, part, (i, j, factor) in zip(places, parts, projections, strict=True):
                    place[i, : old.dim] = (part[j] * factor).to(dtype)
            elif name.endswith("wo.weight"):
                tensor[: old.dim, q_new] = weight[:, q_old].to(dtype)
            elif name.endswith("w13.weight"):
                for place, part in zip(tensor.chunk(2), weight.chunk(2), strict=True):
                    place[: old.ffn_dim, : old.dim] = part
            else:
                tensor[: len(weight), : weight.shape[1]] = weight

    header = {"config": asdict(new), "quantization": None, "tokenizer": asdict(checkpoint.tokenizer)}
    write_checkpoint(path, header, empty_model(new, None, dtype).to_empty(device="cpu").state_dict(), fill)


def main() -> None:
    parser = argparse.ArgumentParser(description="Grow a checkpoint without changing what it computes.")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, as scripts/prepare.sh made it")
    add("--shape", choices=SHAPES, required=True, help="that of the Llama with so many parameters")
    add("--out", type=Path, required=True, help="the file to write")
    add("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights (bfloat16)")
    args = parser.parse_args()
    checkpoint = read_checkpoint(args.checkpoint_path)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    grow(checkpoint, shape_args(args.shape, checkpoint.args.vocab_size), args.out, getattr(torch, args.precision))
    print(f"wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    terminal.run(main)
