"""The checkpoint file: its fields, reading, loading, writing.

A checkpoint is a torch.save file with the fields
    config        the fields of ModelArgs
    quantization  None (16 bits), {"mode": "int8"}, or {"mode": "int4", "groupsize": n}
    tokenizer     the fields of Tokenizer
    id            a random name of these weights
    model         the tensors, as model.Linear stores them
"""

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from utils import atomic_write, delete_stale, progress, reading

import torch
from torch import Tensor
from torch.serialization import set_default_mmap_options, skip_data

from model import Linear, ModelArgs, Transformer
from tokenizer import Tokenizer

GROUPSIZES = (32, 64, 128, 256)
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]


@dataclass
class Checkpoint:
    """A checkpoint file. Its tensors are memory-mapped: nothing is read before it is used."""

    path: Path
    args: ModelArgs
    header: dict  # all fields but the model
    tokenizer: Tokenizer
    state_dict: dict[str, Tensor]


def bits_and_groupsize(layer: str, quantization: dict | None) -> tuple[int, int]:
    """Bits per weight and group size (0: no groups) of a linear layer. In int4 the output layer has 8 bits."""
    if quantization is None:
        return 16, 0
    if quantization["mode"] == "int8" or layer == "output":
        return 8, 0
    return 4, quantization["groupsize"]


def empty_model(args: ModelArgs, quantization: dict | None, dtype: torch.dtype) -> Transformer:
    """A Transformer on the meta device: shapes and dtypes, no memory. ValueError if groups do not divide a layer."""
    with torch.device("meta"):
        model = Transformer(args).to(dtype).eval().requires_grad_(False)
        for name, layer in model.named_modules():
            if isinstance(layer, Linear):
                bits, groupsize = bits_and_groupsize(name, quantization)
                if bits == 4 and layer.n_in % groupsize != 0:
                    problem = f"group size {groupsize} does not divide the {layer.n_in} inputs of {name}"
                    raise ValueError(f"{problem}: choose a smaller one, or int8")
                layer.set_storage(bits, groupsize)
    return model


def read_checkpoint(path: Path) -> Checkpoint:
    """Map the checkpoint at `path`. ValueError if it is damaged or not one of ours."""
    with reading(path, "./scripts/prepare.sh REPO or quantize.py writes a checkpoint"):
        with open(path, "rb") as file:  # the disk reads ahead while Python does other things
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        header = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        state_dict = header.pop("model")
        args = ModelArgs(*header["config"].values())  # in this order, because earlier versions had other names
        expected = empty_model(args, header["quantization"], torch.bfloat16).state_dict()
        if shapes(state_dict) != shapes(expected) or "id" not in header:
            raise ValueError("its tensors are not those of its own config: convert or quantize it again")
        return Checkpoint(path, args, header, Tokenizer.from_fields(header["tokenizer"]), state_dict)


def shapes(state_dict: dict[str, Tensor]) -> dict[str, tuple]:
    """The shape of each tensor, and whether it is floating point."""
    return {name: (tensor.shape, tensor.is_floating_point()) for name, tensor in state_dict.items()}


def load_model(checkpoint: Checkpoint, device: str, dtype: torch.dtype, shard: Callable | None = None) -> Transformer:
    """The model of a checkpoint on `device`; its float tensors become `dtype`. Unchanged tensors stay mapped.

    With tensor parallelism, `shard` (name, tensor) returns this rank's part, and `checkpoint.args` describes the part.
    """
    model = empty_model(checkpoint.args, checkpoint.header["quantization"], dtype)
    expected = model.state_dict()
    weights = {}
    for name, tensor in progress(checkpoint.state_dict.items(), "loading"):
        part = shard(name, tensor) if shard else tensor
        weights[name] = part.to(device, expected[name].dtype)
    model.load_state_dict(weights, assign=True)
    return model


@contextmanager
def new_checkpoint(path: Path, header: dict, tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Write a checkpoint to `path`, whole or not at all: yield its tensors, mapped to the file, for the block to fill.

    `header` has all fields but id and model. `tensors` are untouched torch.empty ones: only their shapes count, and
    a tensor under two names is stored once. The disk space is reserved first, because a disk that fills up under a
    mapped file kills the process: OSError.
    """
    delete_stale(path.resolve().parent, ".*.pth.[0-9]*.tmp")
    with atomic_write(path) as temporary:
        try:
            with skip_data():
                torch.save({**header, "id": os.urandom(16).hex(), "model": tensors}, temporary)
            with open(temporary, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        except (OSError, RuntimeError) as error:  # torch.save has only RuntimeError for a full disk
            size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
            raise OSError(f"{path} was not written: it takes {size:.2f} GB of disk ({str(error)[:99]})") from error
        with set_default_mmap_options(mmap.MAP_SHARED):
            yield torch.load(temporary, mmap=True, weights_only=True)["model"]
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
