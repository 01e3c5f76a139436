"""The checkpoint file: its fields, reading, loading. scripts/files.py writes it.

A checkpoint is a torch.save file with the fields
    config        the fields of ModelArgs
    quantization  None (16 bits), {"mode": "int8"}, or {"mode": "int4", "groupsize": n}
    tokenizer     the fields of Tokenizer
    id            a random name of these weights
    model         the tensors, as model.Linear stores them
"""

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils import progress, reading

import torch
from torch import Tensor

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


def map_file(path: Path) -> mmap.mmap:
    """The bytes of a file, mapped. Read-only and shared, because Linux counts a writable private mapping as memory."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def map_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that torch.load has put on the meta device, mapped to their bytes in the file.

    Each has a storage of its own, because the compiler refuses tensors that share one.
    """
    data = map_file(path)
    mapped = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        count, offset = storage.nbytes() // tensor.itemsize, storage._checkpoint_offset
        content = torch.frombuffer(data, dtype=tensor.dtype, count=count, offset=offset)
        mapped[name] = content.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return mapped


def read_checkpoint(path: Path) -> Checkpoint:
    """Map the checkpoint at `path`. ValueError if it is damaged or not one of ours."""
    with reading(path, "./scripts/prepare.sh REPO or quantize.py writes a checkpoint"):
        with open(path, "rb") as file:  # the disk reads ahead while Python does other things
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        header = torch.load(path, weights_only=True, map_location="meta")
        state_dict = map_tensors(path, header.pop("model"))
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
