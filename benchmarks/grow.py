"""Grow a checkpoint to a larger Llama shape with the same vocabulary, without changing the function that it computes.

    python -m benchmarks.grow --checkpoint_path checkpoints/demo/target/model.pth --shape 1.1b --out grown/target.pth

So speculation and prefix caching, which depend on the text, are measured at the cost of a real model on text with real
statistics, with nothing to download. Added channels, heads and layers are zeros, which are multiplied all the same.
"""

import argparse
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import utils

import torch
from torch import Tensor

from checkpoint import Checkpoint, empty_model, read_checkpoint
from model import ModelArgs
from scripts.files import new_checkpoint

SHAPES = {  # n_layer, dim, n_head, n_kv_head, head_dim, ffn_dim, vocab_size, max_seq_length
    "68m": (2, 768, 12, 12, 64, 3072, 32000, 2048),
    "160m": (12, 768, 12, 12, 64, 3072, 32000, 2048),
    "1.1b": (22, 2048, 32, 4, 64, 5632, 32000, 2048),  # TinyLlama
    "1b": (16, 2048, 32, 8, 64, 8192, 128256, 2048),  # Llama 3.2 1B, with a short context
    "7b": (32, 4096, 32, 32, 128, 11008, 32000, 4096),  # Llama 2 7B
}


def shape_args(shape: str, vocab_size: int | None = None) -> ModelArgs:
    """The ModelArgs of one of SHAPES, with its own vocabulary or one of `vocab_size` tokens."""
    n_layer, dim, n_head, n_kv_head, head_dim, ffn_dim, own_vocab_size, max_seq_length = SHAPES[shape]
    vocab_size = vocab_size or own_vocab_size
    return ModelArgs(dim, n_layer, n_head, n_kv_head, head_dim, ffn_dim, vocab_size, 1e-5, 10000.0, 1.0, max_seq_length)


def match_heads(old: ModelArgs, new: ModelArgs) -> tuple[list[int], list[int]]:
    """For each new query head, and each new KV head, the index of its old one, or -1. ValueError if there are too few.

    Query heads that shared a KV head share one again if the new groups are large enough; otherwise it is repeated.
    """
    group, new_group = old.n_head // old.n_kv_head, new.n_head // new.n_kv_head
    copies = math.ceil(group / new_group)
    if old.n_kv_head * copies > new.n_kv_head:
        raise ValueError(f"{new.n_head} heads and {new.n_kv_head} KV heads are too few for the checkpoint's")
    q, kv = [-1] * new.n_head, [-1] * new.n_kv_head
    for head in range(old.n_head):
        old_kv, index = divmod(head, group)
        new_kv = old_kv * copies + index // new_group
        kv[new_kv] = old_kv
        q[new_kv * new_group + index % new_group] = head
    return q, kv


def match_channels(heads: list[int], old: ModelArgs, new: ModelArgs) -> tuple[Tensor, Tensor]:
    """New and old indices of the channels of the heads that `match_heads` found.

    RoPE rotates channel i of a half by theta^(-2 i / head_dim): if head_dim is m times as large, that is channel m i.
    """
    half = torch.arange(old.head_dim // 2) * (new.head_dim // old.head_dim)
    in_new_head = torch.cat([half, half + new.head_dim // 2])
    in_old_head = torch.arange(old.head_dim)
    used = [(i, head) for i, head in enumerate(heads) if head >= 0]
    new_indices = [in_new_head + i * new.head_dim for i, _ in used]
    old_indices = [in_old_head + head * old.head_dim for _, head in used]
    return torch.cat(new_indices), torch.cat(old_indices)


def grown_args(checkpoint: Checkpoint, shape: ModelArgs) -> ModelArgs:
    """`shape` with norm_eps and RoPE of the checkpoint. ValueError if the checkpoint does not fit into it."""
    old = checkpoint.args
    for name in ("dim", "n_layer", "ffn_dim", "head_dim"):
        if getattr(shape, name) < getattr(old, name):
            raise ValueError(f"{name} {getattr(shape, name)} is less than the checkpoint's {getattr(old, name)}")
    if shape.head_dim % old.head_dim or shape.vocab_size != old.vocab_size or checkpoint.header["quantization"]:
        raise ValueError("head_dim must be a multiple, the vocabulary the same, and the checkpoint not quantized")
    rope = {name: value for name, value in asdict(old).items() if name.startswith("rope")}
    return replace(shape, norm_eps=old.norm_eps * old.dim / shape.dim, **rope)


def head_rows(args: ModelArgs) -> list[int]:
    """Output channels of q, k and v in wqkv."""
    return [heads * args.head_dim for heads in (args.n_head, args.n_kv_head, args.n_kv_head)]


@dataclass
class Growth:
    """Fills the weights of `new` from the weights of `old`. ValueError if `new` has too few heads."""

    old: ModelArgs
    new: ModelArgs

    def __post_init__(self) -> None:
        q, kv = match_heads(self.old, self.new)
        self.q = match_channels(q, self.old, self.new)
        self.kv = match_channels(kv, self.old, self.new)

    def fill(self, name: str, tensor: Tensor, weight: Tensor | None) -> None:
        """Fill the `tensor` of the grown model with the small model's `weight`, and zeros; there is none in new layers.

        RMSNorm divides by the root of the mean over more channels, so its weight and eps become smaller.
        """
        dim, ffn_dim = self.old.dim, self.old.ffn_dim
        tensor.zero_()
        if weight is None:
            if "norm" in name:
                tensor.fill_(1)
        elif "norm" in name:
            tensor[:dim] = weight.float() * math.sqrt(dim / self.new.dim)
        elif name.endswith("wqkv.weight"):
            self.fill_wqkv(tensor, weight.float())
        elif name.endswith("wo.weight"):
            new_channels, old_channels = self.q
            tensor[:dim, new_channels] = weight[:, old_channels].to(tensor.dtype)
        elif name.endswith("w13.weight"):
            for new_part, old_part in zip(tensor.chunk(2), weight.chunk(2), strict=True):
                new_part[:ffn_dim, :dim] = old_part
        else:
            tensor[: len(weight), : weight.shape[1]] = weight

    def fill_wqkv(self, tensor: Tensor, weight: Tensor) -> None:
        """Copy the heads; queries grow, because attention divides by the root of head_dim."""
        factors = [math.sqrt(self.new.head_dim / self.old.head_dim), 1.0, 1.0]
        parts = zip(tensor.split(head_rows(self.new)), weight.split(head_rows(self.old)), strict=True)
        for (new_part, old_part), indices, factor in zip(parts, [self.q, self.kv, self.kv], factors, strict=True):
            new_channels, old_channels = indices
            new_part[new_channels, : self.old.dim] = (old_part[old_channels] * factor).to(tensor.dtype)


def grow(checkpoint: Checkpoint, shape: ModelArgs, path: Path, dtype: torch.dtype) -> None:
    """Write `checkpoint` in the dimensions of `shape` to `path`. ValueError if it does not fit into them."""
    new = grown_args(checkpoint, shape)
    growth = Growth(checkpoint.args, new)
    header = {"config": asdict(new), "quantization": None, "tokenizer": asdict(checkpoint.tokenizer)}
    tensors = empty_model(new, None, dtype).to_empty(device="cpu").state_dict()
    with new_checkpoint(path, header, tensors) as mapped:
        for name, tensor in utils.progress(mapped.items(), "growing"):
            growth.fill(name, tensor, checkpoint.state_dict.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description="Grow a checkpoint without changing the function that it computes.")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, as scripts/prepare.sh wrote it")
    add("--shape", choices=SHAPES, required=True, help="of the Llama with about this number of parameters")
    add("--out", type=Path, required=True, help="the file to write")
    add("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights (bfloat16)")
    args = parser.parse_args()
    checkpoint = read_checkpoint(args.checkpoint_path)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    grow(checkpoint, shape_args(args.shape, checkpoint.args.vocab_size), args.out, getattr(torch, args.precision))
    print(f"wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    utils.run(main)
