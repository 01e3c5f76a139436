"""Tensor parallelism: each rank that torchrun starts holds a part of every layer; the outputs of the parts are added.

    torchrun --standalone --nproc_per_node=2 generate.py --compile --checkpoint_path checkpoints/$MODEL_REPO/model.pth

All ranks run the same program. Rank 0 reads the keyboard and prints; it sends texts, and choices that depend on time,
to the others.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import utils

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor
from torch.distributed.rendezvous import rendezvous

from checkpoint import Checkpoint, bits_and_groupsize, load_model
from model import Linear, ModelArgs, Transformer

# torchrun sets all of these. LOCAL_RANK alone may be left in a shell from a job that has ended.
STARTED_BY_TORCHRUN = os.environ.keys() >= {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
RANK = int(os.environ["RANK"]) if STARTED_BY_TORCHRUN else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if STARTED_BY_TORCHRUN else 1


def init(device: str) -> None:
    """Join the process group if torchrun has started this process. ValueError if there is no GPU for it."""
    if not STARTED_BY_TORCHRUN:
        return
    if device == "cuda":
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node: this host has {torch.cuda.device_count()} GPUs: start no more ranks")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, *_ = next(rendezvous("env://?world_size=-1"))  # with a size it would wait for all ranks, without a word
    if store.add("joined", 1) == WORLD_SIZE:
        store.set("complete", "")
    try:
        store.wait(["complete"], timedelta(seconds=10))
    except RuntimeError:
        print(f"waiting for {WORLD_SIZE - store.add('joined', 0)} of {WORLD_SIZE} ranks", file=sys.stderr)
        store.wait(["complete"])  # at most half an hour, torch's default
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    # This timeout is long, because a conversation may rest for days; a rank that ends is noticed at once.
    dist.init_process_group(backend, None, timedelta(weeks=52), WORLD_SIZE, RANK, store)


def report(message: str) -> None:
    """Print the first error of this host's ranks; what follows is its consequence, or the same on another rank."""
    is_first = os.environ["LOCAL_RANK"] == "0"
    with suppress(RuntimeError, ValueError):  # there is no store yet, or no more
        is_first = dist.distributed_c10d._get_default_store().add(f"errors {os.environ.get('GROUP_RANK')}", 1) == 1
    if is_first:
        print(message, file=sys.__stderr__)


def run(main: Callable[[], None]) -> None:
    """utils.run; only rank 0 reads and prints."""
    if not STARTED_BY_TORCHRUN:
        utils.run(main)
    if RANK > 0:
        sys.stdin = sys.stdout = sys.stderr = open(os.devnull, "r+")  # noqa: SIM115  open until the process ends
    # A plain exit waits for threads of the process group, and aborts.
    os._exit(utils.exit_status(main, report, "a rank has ended, or is out of reach"))


def cgroup_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs that the container's quota allows; infinity without one. cgroup v2 has one file, v1 has two."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        if all((cgroup / file).exists() for file in files):
            quota, period = " ".join((cgroup / file).read_text() for file in files).split()
            return float("inf") if quota in ("max", "-1") else int(quota) / int(period)
    return float("inf")


def num_threads() -> int:
    """One thread per physical core that affinity and the container's quota allow, divided among the local ranks.

    Hyperthreads gain nothing, because decoding waits for memory. OMP_NUM_THREADS overrides this, but not under
    torchrun, which always sets it.
    """
    if "OMP_NUM_THREADS" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ:
        return torch.get_num_threads()
    siblings = [Path(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in os.sched_getaffinity(0)]
    physical = {path.read_text() if path.exists() else str(path) for path in siblings}
    return max(1, int(min(len(physical), cgroup_cpus())) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def broadcast(tensor: Tensor, rank: int = 0) -> Tensor:
    """Broadcast `tensor` from `rank`, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, rank)
    return tensor


def from_rank(compute: Callable, rank: int = 0) -> object:
    """The result of `compute` on one rank, sent to all ranks as JSON."""
    if WORLD_SIZE == 1:
        return compute()
    data = json.dumps(compute()).encode() if rank == RANK else b""
    size = int(broadcast(torch.tensor(len(data)), rank))
    data = broadcast(torch.tensor(list(data.ljust(size)), dtype=torch.uint8), rank)
    return json.loads(bytes(data.tolist()))


def shard(name: str, tensor: Tensor, args: ModelArgs) -> Tensor:
    """This rank's part of a tensor of the checkpoint. In all layouts dim 0 is output channels, dim 1 input channels.

    wqkv and w13 are split by output channels (q, k, v, w1 and w3 each by itself), wo and w2 by input channels; the rest
    is on every rank. `args` describes the whole model.
    """
    layer = name.split(".")[-2]
    if layer in ("wqkv", "w13"):
        sizes = [args.n_head, args.n_kv_head, args.n_kv_head] if layer == "wqkv" else [1, 1]
        parts = tensor.unflatten(0, (sum(sizes), -1)).split(sizes)
        return torch.cat([part.flatten(0, 1).chunk(WORLD_SIZE)[RANK] for part in parts])
    if layer in ("wo", "w2") and tensor.ndim == 2:  # an int8 scale is per output channel
        return tensor.chunk(WORLD_SIZE, dim=1)[RANK].contiguous()
    return tensor


class RowParallelLinear(torch.nn.Module):
    """A linear layer that is split by input channels: its output is the sum of the ranks' outputs.

    The sum is in float32 and in the order of the ranks. The order of additions in dist.all_reduce depends on the size
    of its input, so a row of many would not be that row alone, bit for bit, and speculation could change the text. On
    gloo it also takes twice as long for few rows.
    """

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """`x` [B, S, n_in / WORLD_SIZE] to [B, S, n_out], plus `residual`."""
        outputs = all_gather_tensor(self.linear(x), 0, dist.group.WORLD).float()
        return residual + sum(outputs.chunk(WORLD_SIZE)).to(x.dtype)


def load_sharded(checkpoint: Checkpoint, device: str, dtype: torch.dtype, is_draft: bool = False) -> Transformer:
    """This rank's part of a model, or all of a draft that cannot be divided.

    ValueError, before any weight is read, if the number of ranks does not divide a model.
    """
    args = checkpoint.args
    heads = {"n_head": args.n_head, "n_kv_head": args.n_kv_head, "ffn_dim": args.ffn_dim}
    inputs = {"wo": args.n_head * args.head_dim, "w2": args.ffn_dim}
    _, groupsize = bits_and_groupsize("wo", checkpoint.header["quantization"])
    groups = {f"groups of {layer}'s inputs": size // (groupsize or 1) for layer, size in inputs.items()}
    indivisible = [f"{name} = {size}" for name, size in (heads | groups).items() if size % WORLD_SIZE != 0]
    if WORLD_SIZE == 1 or (is_draft and indivisible):
        return load_model(checkpoint, device, dtype)
    if indivisible:
        problem = f"{indivisible[0]} is no multiple of {WORLD_SIZE} ranks"
        raise ValueError(f"{checkpoint.path}: {problem}: choose another number")
    part = replace(args, **{name: size // WORLD_SIZE for name, size in heads.items()})
    model = load_model(replace(checkpoint, args=part), device, dtype, lambda name, tensor: shard(name, tensor, args))
    for layer in model.layers:
        layer.attention.wo = RowParallelLinear(layer.attention.wo)
        layer.feed_forward.w2 = RowParallelLinear(layer.feed_forward.w2)
    return model
