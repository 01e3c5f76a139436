"""Tensor parallelism: each of torchrun's ranks holds a part of every layer, and the outputs of the parts are added up.

    torchrun --standalone --nproc_per_node=2 generate.py --compile --checkpoint_path checkpoints/$MODEL_REPO/model.pth

It owns the process group, the one rule by which weights are divided, and how ranks agree where each would see
something else: text that is read, times, files. All run the same program; rank 0 alone reads the keyboard and writes.
"""

import json
import os
import sys
import terminal
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor

from checkpoint import Checkpoint, load_model, storage
from model import ModelArgs, Transformer

# Whether torchrun has started this process: it sets all of these.
IS_RANK = os.environ.keys() >= {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def ranks() -> tuple[int, int]:
    """This process's rank, and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join(device: str) -> None:
    """Become one of the ranks, where torchrun has started this process. ValueError where no GPU is left for it."""
    if not IS_RANK:
        return
    if device == "cuda":
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node: this host has {torch.cuda.device_count()} GPUs: start no more ranks")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A conversation may rest for days; a rank that ends is noticed all the same.
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=timedelta(weeks=52))


def run(main: Callable[[], None]) -> None:
    """`terminal.run` for a script that torchrun may start: of the ranks the first alone reads and writes.

    The first rank of each host tells errors.
    """
    if not IS_RANK:
        terminal.run(main)
    nothing = open(os.devnull, "r+")  # noqa: SIM115  until the process ends
    errors = sys.stderr if os.environ["LOCAL_RANK"] == "0" else nothing
    if os.environ["RANK"] != "0":
        sys.stdin = sys.stdout = sys.stderr = nothing
    status = terminal.status_of(main, errors, "a rank has ended, or is out of reach")
    os._exit(status)  # the threads of a process group abort an interpreter that winds up


def agree(compute: Callable, rank: int = 0) -> object:
    """The result of `compute`, which JSON can hold, on that rank; the others wait for it."""
    data = json.dumps(compute()).encode() if ranks()[0] == rank else b""
    size = int(share(torch.tensor(len(data)), rank))
    data = share(torch.tensor(list(data.ljust(size)), dtype=torch.uint8), rank)
    return json.loads(bytes(data.tolist()))


def gather(value: object) -> list:
    """`value` of each of the ranks, in their order."""
    return [agree(lambda: value, rank) for rank in range(ranks()[1])]


def share(tensor: Tensor, rank: int = 0) -> Tensor:
    """That rank's `tensor`, in its place on every rank."""
    if dist.is_initialized():
        dist.broadcast(tensor, rank)
    return tensor


def shard(name: str, tensor: Tensor, args: ModelArgs) -> Tensor:
    """This rank's part of a checkpoint's tensor in any layout: output channels are dim 0, input channels dim 1 of each.

    wqkv and w13 are divided by outputs, q, k, v, w1 and w3 each by itself; wo and w2 by inputs; the rest is
    everybody's. `args` are those of the whole model.
    """
    rank, count = ranks()
    layer = name.split(".")[-2]
    if layer in ("wqkv", "w13"):
        proportions = [args.n_head, args.n_kv_head, args.n_kv_head] if layer == "wqkv" else [1, 1]
        parts = tensor.unflatten(0, (sum(proportions), -1)).split(proportions)
        return torch.cat([part.flatten(0, 1).chunk(count)[rank] for part in parts])
    if layer in ("wo", "w2") and tensor.ndim == 2:  # the scales of int8 are of outputs
        return tensor.chunk(count, dim=1)[rank].contiguous()
    return tensor


def add_up(module: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """A forward hook: the sum of the ranks' outputs [B, S, dim], added in float32 and in the ranks' order.

    An all-reduce's order depends on the size of its input: with it a row of many would not be that row alone, bit
    for bit, which speculation relies on. (On gloo it takes twice as long, too, for the few rows of decoding.)
    """
    outputs = all_gather_tensor(output, 0, dist.group.WORLD).float()
    return sum(outputs.chunk(dist.get_world_size())).to(output.dtype)


def load_share(checkpoint: Checkpoint, device: str, dtype: torch.dtype, draft: bool = False) -> Transformer:
    """This rank's share of a model; all of a `draft` that cannot be divided. ValueError before any weight is read."""
    _, count = ranks()
    if len(set(gather(checkpoint.header["id"]))) > 1:
        raise ValueError(f"{checkpoint.path} is not the same file on every host: copy that of the first to the others")
    whole = checkpoint.args
    sizes = {"n_head": whole.n_head, "n_kv_head": whole.n_kv_head, "ffn_dim": whole.ffn_dim}
    inputs = {"wo": whole.n_head * whole.head_dim, "w2": whole.ffn_dim}
    _, groupsize = storage("wo", checkpoint.header["quantization"])
    groups = {f"groups of {layer}'s inputs": size // (groupsize or 1) for layer, size in inputs.items()}
    uneven = [f"{name} = {size}" for name, size in (sizes | groups).items() if size % count != 0]
    if count == 1 or (draft and uneven):
        return load_model(checkpoint, device, dtype)
    if uneven:
        raise ValueError(f"{checkpoint.path}: {uneven[0]} is no multiple of {count} ranks: start another number")
    args = replace(whole, **{name: size // count for name, size in sizes.items()})
    model = load_model(replace(checkpoint, args=args), device, dtype, lambda name, tensor: shard(name, tensor, whole))
    for layer in model.layers:
        layer.attention.register_forward_hook(add_up)
        layer.feed_forward.register_forward_hook(add_up)
    return model
