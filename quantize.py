"""Linear layers of 16, 8 and 4 bits, and the checkpoint file that holds them: writing, reading, quantizing.

    python quantize.py --checkpoint_path checkpoints/$MODEL_REPO/model.pth --mode int8

Multiplying is the business of kernels/, the architecture that of model.py.
"""

import argparse
import mmap
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import kernels
from model import ModelArgs, Transformer

import sentencepiece
import torch
from torch import Tensor, nn
from torch.serialization import set_default_mmap_options, skip_data

DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
GROUPSIZES = (32, 64, 128, 256)
SLAB = 2**18  # weights quantized at a time: what they need stays in the caches
TINY = torch.finfo(torch.float32).tiny  # in place of a scale of zero: any level will do


class Linear(nn.Module):
    """A product with a stored weight of 16, 8 or 4 bits; takes the place of every nn.Linear of a model.

    `groupsize` None: float. 0: int8, symmetric per output channel. Else int4 with a scale and a minimum for each group of
    input channels. Layouts: kernels.dequantize. What is stored is what is multiplied: loading packs nothing.
    """

    def __init__(self, n_in: int, n_out: int, groupsize: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        stored = dtype if groupsize is None else torch.uint8 if groupsize else torch.int8
        groups = torch.empty(n_out, n_in // groupsize, dtype=torch.bfloat16) if groupsize else None
        self.register_buffer("weight", torch.empty(n_out, n_in // 2 if groupsize else n_in, dtype=stored))
        self.register_buffer("scale", torch.empty(n_out) if groupsize == 0 else groups)
        self.register_buffer("minimum", None if groups is None else torch.empty_like(groups))

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.scale, self.minimum)


def groupsize_of(layer: str, quantization: dict | None) -> int | None:
    """How Linear stores `layer` in a checkpoint of that quantization. The output layer stays at 8 bits in int4."""
    return quantization and (0 if quantization["mode"] == "int8" or layer == "output" else quantization["groupsize"])


def build_model(args: ModelArgs, quantization: dict | None, dtype: torch.dtype) -> Transformer:
    """A Transformer on the meta device, in eval mode: shapes and dtypes, no memory."""
    with torch.device("meta"):
        model = Transformer(args).to(dtype).eval().requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                groupsize = groupsize_of(name, quantization)
                if groupsize and module.in_features % groupsize:
                    raise ValueError(f"group size {groupsize}: no divisor of {name}'s {module.in_features} inputs; try another")
                model.set_submodule(name, Linear(module.in_features, module.out_features, groupsize, dtype))
    return model


@dataclass
class Checkpoint:
    """A checkpoint file, read: the weights are mapped, so nothing of them is in memory yet."""

    path: Path
    args: ModelArgs
    header: dict  # config, quantization, id, chat, tokenizer: what the file says of itself
    tokenizer: sentencepiece.SentencePieceProcessor
    model: dict[str, Tensor]


@contextmanager
def reading(name: Path | str, cure: str) -> Iterator[None]:
    """What missing, foreign or damaged input makes us or a library raise becomes one ValueError: name, reason, cure."""
    try:
        yield
    except Exception as error:  # there is no end to what damaged files make parsers raise
        reason = getattr(error, "strerror", 0) or f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
        raise ValueError(f"{name}: {reason[:200]}; {cure}") from error


def utf8(data: bytes, name: str) -> str:
    """The text of `data`. ValueError, which calls it `name`, where it is not UTF-8 or empty."""
    with reading(name, "give some text in UTF-8"):
        if not data:
            raise ValueError("empty")
        return data.decode()


def read_checkpoint(path: Path) -> Checkpoint:
    """Map the checkpoint at `path`. ValueError where it is not one of ours, or damaged."""
    with reading(path, "./scripts/prepare.sh REPO or quantize.py writes a checkpoint"):
        with open(path, "rb") as file:  # ask the disk for the weights while Python does other things
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        content = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        args, tokenizer = ModelArgs(**content["config"]), sentencepiece.SentencePieceProcessor(model_proto=content["tokenizer"])
        model, expected = content.pop("model"), build_model(args, content["quantization"], torch.bfloat16).state_dict()
        kinds = [{n: (t.shape, t.is_floating_point()) for n, t in tensors.items()} for tensors in (expected, model)]
        if kinds[0] != kinds[1] or not {"id", "chat"} <= content.keys():
            raise ValueError("its tensors are not those of its own config: convert or quantize it again")
    return Checkpoint(path, args, content, tokenizer, model)


def load_model(checkpoint: Checkpoint, device: str, dtype: torch.dtype, part: Callable = lambda _, t: t) -> Transformer:
    """The model of a checkpoint on `device`. Float weights become `dtype`; all that need not change stays mapped."""
    model = build_model(checkpoint.args, checkpoint.header["quantization"], dtype)
    expected = model.state_dict()
    weights = {n: part(n, t).to(device, expected[n].dtype) for n, t in progress(checkpoint.model.items(), "loading")}
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
        temporary.touch()  # says what is wrong with the folder; torch.save would not
        with skip_data():
            torch.save({**header, "id": os.urandom(16).hex(), "model": tensors}, temporary)
        with open(temporary, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))
            with set_default_mmap_options(mmap.MAP_SHARED):
                mapped = torch.load(temporary, mmap=True, weights_only=True)["model"]
            fill(mapped)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save knows only RuntimeError
        size, reason = sum(t.nbytes for t in tensors.values()), getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"{path} was not written ({reason}): it needs {size / 1e9:.2f} GB in a folder to write to") from error
    finally:
        temporary.unlink(missing_ok=True)


def quantize_int8(weight: Tensor) -> dict[str, Tensor]:
    """Symmetric 8 bits for a float `weight` [out, in]: the largest of each output channel becomes 127."""
    scale = weight.abs().amax(dim=1).float() / 127
    levels = (weight / scale.clamp(min=TINY)[:, None]).round().clamp(-127, 127)
    return {"weight": levels.to(torch.int8), "scale": scale}


def quantize_int4(weight: Tensor, groupsize: int, rounds: int = 5) -> dict[str, Tensor]:
    """4 bits for a float `weight` [out, in]: per group, 16 levels from `minimum` on in steps of `scale`.

    From the group's extremes, `rounds` of alternating least squares: levels for (scale, minimum), then the regression
    line of the weights over their levels; per group the best of all rounds is kept, in the bfloat16 that is stored.
    """
    w = weight.float().unflatten(1, (-1, groupsize))
    mean = w.mean(dim=-1, keepdim=True)

    def levels_of(scale: Tensor, minimum: Tensor) -> Tensor:
        return ((w - minimum.float()) / scale.float().clamp(min=TINY)).round_().clamp_(0, 15)

    low, high = w.amin(dim=-1, keepdim=True), w.amax(dim=-1, keepdim=True)
    scale, minimum = (high / 15 - low / 15).bfloat16(), low.bfloat16()
    best = (torch.full_like(mean, torch.inf), scale, minimum)
    for _ in range(rounds + 1):
        levels = levels_of(scale, minimum)
        error = torch.addcmul(minimum.float(), levels, scale.float()).sub_(w).square_().sum(dim=-1, keepdim=True)
        best = tuple(torch.where(error < best[0], new, old) for new, old in zip((error, scale, minimum), best, strict=True))
        middle = levels.mean(dim=-1, keepdim=True)
        levels -= middle
        scale = ((levels * w).sum(dim=-1, keepdim=True) / levels.square().sum(dim=-1, keepdim=True).clamp(min=TINY)).bfloat16()
        minimum = (mean - scale.float() * middle).bfloat16()
    _, scale, minimum = best
    pairs = levels_of(scale, minimum).to(torch.uint8).flatten(1)
    return {"weight": pairs[:, ::2] | pairs[:, 1::2] << 4, "scale": scale.squeeze(-1), "minimum": minimum.squeeze(-1)}


def quantize(checkpoint: Checkpoint, quantization: dict, device: str, path: Path) -> None:
    """Write to `path` what `checkpoint` becomes under `quantization`, computed on `device` in slabs of a few rows."""
    if checkpoint.header["quantization"]:
        raise ValueError(f"{checkpoint.path} is quantized already: give the original")
    dtype = checkpoint.model["norm.weight"].dtype
    tensors = build_model(checkpoint.args, quantization, dtype).to_empty(device="cpu").state_dict()

    def fill(mapped: dict[str, Tensor]) -> None:
        for name, weight in progress(checkpoint.model.items(), "quantizing"):
            layer = name.removesuffix(".weight")
            group = groupsize_of(layer, quantization) if f"{layer}.scale" in mapped else None
            rows = max(1, SLAB // weight[0].numel())
            for start in range(0, len(weight), rows):
                slab = weight[start : start + rows].to(device)
                if not slab.isfinite().all():
                    raise ValueError(f"{checkpoint.path}: {name} holds NaN or infinity: get the checkpoint again")
                parts = {"weight": slab} if group is None else quantize_int4(slab, group) if group else quantize_int8(slab)
                for part, value in parts.items():
                    mapped[f"{layer}.{part}"][start : start + rows].copy_(value)

    write_checkpoint(path, checkpoint.header | {"quantization": quantization}, tensors, fill)


@torch.inference_mode()
def compare(original: Checkpoint, quantized: Checkpoint, text: str, device: str) -> str:
    """What quantizing costs on `text`: a table of perplexity, mean KL divergence from the original, share of positions
    whose most likely token is the same, bytes, and bits per weight of the linear layers. In float32, in windows of 512."""
    tokenizer, window = original.tokenizer, min(512, original.args.max_seq_length)
    ids, sums = tokenizer.encode(text), torch.zeros(2, 3, dtype=torch.float64, device=device)
    models = [load_model(checkpoint, device, torch.float32) for checkpoint in (original, quantized)]
    for start in progress(range(0, len(ids), window - 1), "checking"):
        tokens = torch.tensor([[tokenizer.bos_id(), *ids[start : start + window - 1]]], device=device)
        positions = torch.arange(tokens.shape[1] - 1, device=device)
        logs = torch.cat([m(tokens[:, :-1], positions, m.make_cache(window)).log_softmax(-1) for m in models])
        loss = -logs.gather(2, tokens[:, 1:, None].expand(2, -1, -1)).sum((1, 2))
        divergence = (logs[0].exp() * (logs[0] - logs)).sum((1, 2))
        sums += torch.stack([loss, divergence, (logs.argmax(-1) == logs[0].argmax(-1)).sum(1)], dim=1)
    linear = [[t for n, t in c.model.items() if "norm" not in n and "embeddings" not in n] for c in (original, quantized)]
    lines = [f"{'':24}{'perplexity':>12}{'mean KL':>10}{'same top':>10}{'bytes':>16}{'bits/weight':>13}"]
    for c, weights, (loss, divergence, same) in zip((original, quantized), linear, sums / len(ids), strict=True):
        size, bits = c.path.stat().st_size, 8 * sum(t.nbytes for t in weights) / sum(t.numel() for t in linear[0])
        lines.append(f"{c.path.name:24}{loss.exp():12.4f}{divergence:10.5f}{same:10.2%}{size:16,}{bits:13.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantize the weights of a checkpoint to 8 or 4 bits, into a file beside it.")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, as scripts/prepare.sh made it")
    add("--mode", choices=["int8", "int4"], default="int8", help="int8 per channel, or int4 in groups (int8)")
    add("--groupsize", type=int, choices=GROUPSIZES, default=32, help="of int4: smaller is better and larger (32)")
    add("--device", choices=DEVICES, default="cpu", help="what computes; names an int4 file, which runs on both (cpu)")
    add("--check", type=Path, metavar="TEXT_FILE", help="then say what was lost: perplexity and more on this text")
    args = parser.parse_args()
    text = args.check and utf8(args.check.read_bytes(), str(args.check))
    checkpoint = read_checkpoint(args.checkpoint_path)
    quantization = {"mode": "int8"} if args.mode == "int8" else {"mode": "int4", "groupsize": args.groupsize}
    suffix = "int8" if args.mode == "int8" else f"int4.g{args.groupsize}.{args.device}"
    path = args.checkpoint_path.with_name(f"{args.checkpoint_path.stem}_{suffix}.pth")
    quantize(checkpoint, quantization, args.device, path)
    print(f"wrote {path}", file=sys.stderr)
    if args.check:
        print(compare(checkpoint, read_checkpoint(path), text, args.device))


def progress(items: Sequence, what: str) -> Iterator:
    """The items, with a line on a terminal's stderr that counts them."""
    for i, item in enumerate(items, 1):
        if sys.stderr.isatty():
            print(f"\r{what} {i}/{len(items)}", end="" if i < len(items) else "\r\033[K", file=sys.stderr, flush=True)
        yield item


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`; what a user can cause ends in one line on stderr and status 1, Ctrl-C in status 130."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout, sys.stderr = (s or open(os.devnull, "r+") for s in (sys.stdin, sys.stdout, sys.stderr))  # noqa: SIM115
    status = 0
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        lacking = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if isinstance(error, RuntimeError) and not lacking and "LOCAL_RANK" not in os.environ:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what stdout does not take, the interpreter would complain of as well
        status, cure = 1, "there is not enough memory for this model and its context: quantize it, or use a smaller one"
        reason = "a rank has ended, or is out of reach: " * isinstance(error, RuntimeError) + " ".join(str(error).split())
        # Of silent ranks the first of each host says why.
        print(cure if lacking else reason, file=sys.__stderr__ if os.environ.get("LOCAL_RANK") == "0" else sys.stderr)
    (os._exit if "LOCAL_RANK" in os.environ else sys.exit)(status)  # threads of a group abort an interpreter that winds up


if __name__ == "__main__":
    run(main)
