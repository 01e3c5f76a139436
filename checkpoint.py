"""The checkpoint file: its fields, how it is written, read and loaded.

It is a torch.save file of: config (ModelArgs), quantization (None for 16 bits, {"mode": "int8"}, or {"mode": "int4",
"groupsize": n}), tokenizer (the fields of a Tokenizer), id (of these very weights) and model (the tensors, as
kernels.Linear stores them). In an older file tokenizer is the sentencepiece model alone, beside chat: whether it talks
in Llama-2's template.
"""

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from terminal import delete_abandoned, progress, reading, replacing

import torch
from torch import Tensor
from torch.serialization import set_default_mmap_options, skip_data

from kernels import Linear
from model import ModelArgs, Transformer
from tokenizer import LLAMA_2, Tokenizer, of_sentencepiece

GROUPSIZES = (32, 64, 128, 256)
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]


@dataclass
class Checkpoint:
    """A checkpoint file, read: the weights are mapped, so nothing of them is in memory yet."""

    path: Path
    args: ModelArgs
    header: dict  # all fields but the model
    tokenizer: Tokenizer
    model: dict[str, Tensor]


def storage(layer: str, quantization: dict | None) -> tuple[int, int]:
    """Bits and group size (0: no groups) with which `layer` is stored. In int4 the output layer stays at 8 bits."""
    if quantization is None:
        return 16, 0
    if quantization["mode"] == "int8" or layer == "output":
        return 8, 0
    return 4, quantization["groupsize"]


def empty_model(args: ModelArgs, quantization: dict | None, dtype: torch.dtype) -> Transformer:
    """A Transformer on the meta device: shapes and dtypes, no memory. ValueError where groups do not divide a layer."""
    with torch.device("meta"):
        model = Transformer(args).to(dtype).eval().requires_grad_(False)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
        for name, layer in layers.items():
            bits, groupsize = storage(name, quantization)
            if bits == 4 and layer.n_in % groupsize != 0:
                fits = [size for size in GROUPSIZES if all(each.n_in % size == 0 for each in layers.values())]
                problem = f"group size {groupsize} does not divide the {layer.n_in} inputs of {name}"
                raise ValueError(f"{problem}; those that divide all: {fits or 'none, use int8'}")
            layer.lay_out(bits, groupsize)
    return model


def read_checkpoint(path: Path) -> Checkpoint:
    """Map the checkpoint at `path`. ValueError where it is not one of ours, or damaged."""
    with reading(path, "./scripts/prepare.sh REPO or quantize.py writes a checkpoint"):
        with open(path, "rb") as file:  # ask the disk for the weights while Python does other things
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        header = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        model = header.pop("model")
        args = ModelArgs(**header["config"])
        expected = empty_model(args, header["quantization"], torch.bfloat16).state_dict()
        kinds = [{n: (t.shape, t.is_floating_point()) for n, t in each.items()} for each in (model, expected)]
        if kinds[0] != kinds[1] or "id" not in header:
            raise ValueError("its tensors are not those of its own config: convert or quantize it again")
        if isinstance(header["tokenizer"], dict):
            tokenizer = Tokenizer(**header["tokenizer"])
        else:
            tokenizer = of_sentencepiece(header["tokenizer"], LLAMA_2 if header["chat"] else None)
        return Checkpoint(path, args, header, tokenizer, model)


def load_model(checkpoint: Checkpoint, device: str, dtype: torch.dtype, shard: Callable | None = None) -> Transformer:
    """The model of a checkpoint on `device`. Float weights become `dtype`; tensors that need no change stay mapped.

    `shard` (name, tensor) gives the part of a tensor that is loaded (all); `checkpoint.args` are those of the part.
    """
    model = empty_model(checkpoint.args, checkpoint.header["quantization"], dtype)
    expected = model.state_dict()
    weights = {}
    for name, tensor in progress(checkpoint.model.items(), "loading"):
        part = shard(name, tensor) if shard else tensor
        weights[name] = part.to(device, expected[name].dtype)
    model.load_state_dict(weights, assign=True)
    model.frequencies = model.frequencies.to(device)
    return model


def write_checkpoint(path: Path, header: dict, tensors: dict[str, Tensor], fill: Callable[[dict], None]) -> None:
    """Write a checkpoint to `path`, whole or not at all, in the memory that `fill` takes at a time.

    `header` has all fields but id and model. `tensors` are untouched torch.empty ones (a tensor under two names is
    stored once). The file is laid out with their shapes and its blocks are reserved, so that a full disk is an OSError
    here and not a signal later; then it is mapped, and `fill` (tensors) writes into the mapped ones.
    """
    delete_abandoned(path.resolve().parent, ".*.pth.[0-9]*.tmp")
    with replacing(path) as temporary:
        try:
            with skip_data():
                torch.save({**header, "id": os.urandom(16).hex(), "model": tensors}, temporary)
            with open(temporary, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        except (OSError, RuntimeError) as error:  # torch.save has only RuntimeError for a full disk
            size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
            raise OSError(f"{path} was not written: it takes {size:.2f} GB of disk ({str(error)[:99]})") from error
        with set_default_mmap_options(mmap.MAP_SHARED):
            fill(torch.load(temporary, mmap=True, weights_only=True)["model"])
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
