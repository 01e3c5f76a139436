"""Linear layers of 16, 8 and 4 bits, and the checkpoint file that holds them: writing, reading, quantizing.

    python quantize.py --checkpoint_path checkpoints/$MODEL_REPO/model.pth --mode int8

Multiplying is the business of kernels/, the architecture that of model.py.
"""

import signal
import warnings

if __name__ == "__main__":  # before torch, whose import takes a second (Ctrl-C) and warns where numpy is missing
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import mmap
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.serialization import set_default_mmap_options, skip_data

import kernels
from model import ModelArgs, Transformer

GROUPSIZES = (32, 64, 128, 256)


class Linear(nn.Module):
    """A product with a stored weight of 16, 8 or 4 bits; takes the place of every nn.Linear of a model.

    `groupsize` None: float. 0: int8, symmetric per output channel. Else int4 with a scale and a minimum for each group of
    input channels. Layouts: kernels.dequantize. What is stored is what is multiplied: loading packs nothing.
    """

    def __init__(self, n_in: int, n_out: int, groupsize: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = self.minimum = None
        if groupsize is None:
            tensors = {"weight": torch.empty(n_out, n_in, dtype=dtype)}
        elif groupsize == 0:
            tensors = {"weight": torch.empty(n_out, n_in, dtype=torch.int8), "scale": torch.empty(n_out)}
        else:
            groups = torch.empty(n_out, n_in // groupsize, dtype=torch.bfloat16)
            weight = torch.empty(n_out, n_in // 2, dtype=torch.uint8)
            tensors = {"weight": weight, "scale": groups, "minimum": torch.empty_like(groups)}
        for name, tensor in tensors.items():
            self.__dict__.pop(name, None)
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.scale, self.minimum)


def groupsize_of(layer: str, quantization: dict | None) -> int | None:
    """How Linear stores `layer` in a checkpoint of that quantization. The output layer stays at 8 bits in int4."""
    if quantization is None:
        return None
    return 0 if quantization["mode"] == "int8" or layer == "output" else quantization["groupsize"]


def build_model(args: ModelArgs, quantization: dict | None, dtype: torch.dtype) -> Transformer:
    """A Transformer on the meta device, in eval mode: shapes and dtypes, no memory."""
    with torch.device("meta"):
        model = Transformer(args).to(dtype).eval().requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                groupsize = groupsize_of(name, quantization)
                if groupsize and module.in_features % groupsize:
                    raise ValueError(
                        f"group size {groupsize} does not divide the {module.in_features} inputs of {name}: "
                        f"choose one of {[g for g in GROUPSIZES if module.in_features % g == 0]}"
                    )
                model.set_submodule(name, Linear(module.in_features, module.out_features, groupsize, dtype))
    return model


@dataclass
class Checkpoint:
    """A checkpoint file, read: the weights are mapped, so nothing of them is in memory yet."""

    path: Path
    args: ModelArgs
    quantization: dict | None
    id: str
    chat: bool
    tokenizer: bytes
    model: dict[str, Tensor]


def read_checkpoint(path: Path) -> Checkpoint:
    """Map the checkpoint at `path`. ValueError where it is not one of ours, or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; ./scripts/prepare.sh REPO downloads and converts a checkpoint")
    try:
        content = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        config, quantization, model = content["config"], content["quantization"], content["model"]
        if quantization is not None and quantization["mode"] != "int8":
            quantization["groupsize"] // 1
        checkpoint = Checkpoint(
            path, ModelArgs(**config), quantization, str(content["id"]), bool(content["chat"]),
            bytes(content["tokenizer"]), dict(model),
        )  # fmt: skip
        expected = build_model(checkpoint.args, quantization, torch.bfloat16).state_dict()
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path} is not a checkpoint of this program, or is cut short or damaged: write it again with "
            f"./scripts/prepare.sh or quantize.py ({type(error).__name__})"
        ) from error
    shapes = {name: tensor.shape for name, tensor in checkpoint.model.items()}
    if shapes != {name: tensor.shape for name, tensor in expected.items()}:
        raise ValueError(f"{path}: its tensors are not those of its own config: convert or quantize it again")
    return checkpoint


def load_model(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> Transformer:
    """The model of a checkpoint on `device`. Float weights become `dtype`; all that need not change stays mapped."""
    model = build_model(checkpoint.args, checkpoint.quantization, dtype)
    expected, moved, weights = model.state_dict(), {}, {}
    for name, tensor in progress(checkpoint.model.items(), "loading"):
        key = (tensor.data_ptr(), expected[name].dtype)  # tied embeddings are one tensor under two names
        moved[key] = weights[name] = moved.get(key, tensor.to(device, expected[name].dtype))
    model.load_state_dict(weights, assign=True)
    return model


def write_checkpoint(path: Path, header: dict, tensors: dict[str, Tensor], fill: Callable[[dict[str, Tensor]], None]) -> None:
    """Write a checkpoint to `path`, whole or not at all, in the memory of what `fill` holds at a time.

    `header` is everything but id and model. `tensors` are untouched torch.empty ones (a tensor under two names is stored
    once): the file is laid out with their shapes, its blocks are reserved, so that a full disk is an OSError here and not
    a signal later, then it is mapped and `fill` writes into the mapped tensors.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with skip_data():
            torch.save({**header, "id": os.urandom(16).hex(), "model": tensors}, temporary)
        with open(temporary, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))
            with set_default_mmap_options(mmap.MAP_SHARED):
                mapped = torch.load(temporary, mmap=True, weights_only=True)["model"]
            fill(mapped)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def progress(items: Sequence, what: str) -> Iterator:
    """The items, with a line on a terminal's stderr that counts them."""
    for i, item in enumerate(items, 1):
        if sys.stderr.isatty():
            print(f"\r{what} {i}/{len(items)}", end="" if i < len(items) else "\r\033[K", file=sys.stderr, flush=True)
        yield item


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`; what a user can cause ends in one line on stderr and status 1, Ctrl-C in status 130."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains while it ends
        sys.exit("stdout was closed before the end")
    except torch.OutOfMemoryError:
        sys.exit("the device is too small for this model: quantize it, or use --device cpu")
    except (ValueError, OSError, MemoryError) as error:
        sys.exit(" ".join(str(error).split()))
