"""Convert a Llama checkpoint in Hugging Face layout, on disk, to the one file that generate.py reads.

    python -m scripts.convert_hf_checkpoint --checkpoint_dir checkpoints/$MODEL_REPO [--precision float32]

Reads safetensors and .bin, whole or sharded, with torch alone; what this program cannot run is refused by name.
"""

import signal
import warnings

if __name__ == "__main__":  # before torch, whose import takes a second (Ctrl-C) and warns where numpy is missing
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import argparse
import json
import pickle
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from model import ModelArgs
from quantize import build_model, load, progress, run, write_checkpoint

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LAYER = [  # Hugging Face's tensors of a layer, in the order in which `places` has ours
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
]  # fmt: skip


def read_json(path: Path) -> dict:
    """The object in a JSON file, ValueError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give a directory in Hugging Face layout") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object: download it again")
    return content


def model_args(config: dict) -> ModelArgs:
    """The shape that a Hugging Face config.json describes, in either spelling; ValueError for what we cannot run."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope scaling {rope!r} is not an object: download it again")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    unsupported = {
        "model_type": config.get("model_type") != "llama",
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "quantization_config": config.get("quantization_config"),
    }
    for key, refused in unsupported.items():
        if refused:
            raise ValueError(f"config.json: {key} = {config.get(key)!r} is not supported: this program runs plain Llama models")
    if rope_type not in ("default", "linear"):
        raise ValueError(f"config.json: rope scaling {rope_type!r} is not supported: only linear scaling is")
    try:
        dim, n_head = config["hidden_size"], config["num_attention_heads"]
        return ModelArgs(
            dim=dim, n_layer=config["num_hidden_layers"], n_head=n_head,
            n_kv_head=config.get("num_key_value_heads") or n_head, head_dim=config.get("head_dim") or dim // n_head,
            ffn_dim=config["intermediate_size"], vocab_size=config["vocab_size"], norm_eps=config["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
            rope_scale=rope["factor"] if rope_type == "linear" else 1.0,
            max_seq_length=config["max_position_embeddings"],
        )  # fmt: skip
    except KeyError as error:
        raise ValueError(f"config.json: {error} is missing: it is not a Llama's, or incomplete") from error
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"config.json: a number is not a number ({error}): download it again") from error


def read_tokenizer(folder: Path, vocab_size: int) -> bytes:
    path = folder / "tokenizer.model"
    try:
        content = path.read_bytes()
        if not content:
            raise RuntimeError("empty")
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=content)
        pieces = tokenizer.vocab_size()
    except (FileNotFoundError, RuntimeError) as error:
        raise ValueError(f"{path}: no sentencepiece tokenizer there; other tokenizers are not supported") from error
    if tokenizer.bos_id() < 0:
        raise ValueError(f"{path}: it has no token to begin with (BOS): it is not a Llama's")
    if pieces > vocab_size:
        raise ValueError(f"{path}: {pieces} pieces for a model of vocab_size {vocab_size}: it belongs to another model")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint in one format: safetensors before .bin, a sharded one by its index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            shards = sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, dict) else []
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing or not shards:
                raise ValueError(f"{folder / (missing or [index.name])[0]} is missing or empty: download it again")
            return [folder / shard for shard in shards]
        if (folder / name).is_file():
            return [folder / name]
    raise ValueError(f"{folder}: neither model.safetensors nor pytorch_model.bin (nor an index of shards) there")


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, mapped: 8 bytes of length, a JSON header of that length, raw data."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if 0 < length <= size - 8 else {}
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]
    header.pop("__metadata__", None)
    if not header or max(entry["data_offsets"][1] for entry in header.values()) > len(data):
        raise ValueError("cut short")
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        raw, dtype = data[start:end], DTYPES.get(entry["dtype"])
        if dtype is None:
            yield name, torch.empty(entry["shape"], dtype=torch.uint8, device="meta")
            continue
        aligned = raw if raw.storage_offset() % dtype.itemsize == 0 else raw.clone()
        yield name, aligned.view(dtype).view(entry["shape"])


def read_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """All (name, tensor) of the files; mapped, but for .bin in the legacy format, of which one file is in memory at a time."""
    for path in files:
        try:
            if path.suffix == ".safetensors":
                yield from read_safetensors(path)
            else:
                with open(path, "rb") as file:
                    zipped = file.read(2) == b"PK"
                content = load(path, mmap=zipped)
                if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()):
                    raise TypeError
                yield from content.items()
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
            reason = f"cut short, damaged or no file of weights ({type(error).__name__})"
            raise ValueError(f"{path} is {reason}: download it again") from error


def places(args: ModelArgs, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where in our `tensors` each of Hugging Face's belongs, by its name."""
    q, kv = args.n_head * args.head_dim, args.n_kv_head * args.head_dim
    names = ["model.embed_tokens", "model.norm", "lm_head"]
    ours = [tensors[f"{name}.weight"] for name in ("tok_embeddings", "norm", "output")]
    for i in range(args.n_layer):
        parts = ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2", "attention_norm", "ffn_norm")
        wqkv, wo, w13, *others = (tensors[f"layers.{i}.{name}.weight"] for name in parts)
        names += [f"model.layers.{i}.{name}" for name in LAYER]
        ours += [*wqkv.split([q, kv, kv]), wo, *w13.split(args.ffn_dim), *others]
    return {f"{name}.weight": tensor for name, tensor in zip(names, ours, strict=True)}


def check_tensors(files: list[Path], wanted: dict[str, Tensor], tied: bool) -> None:
    """ValueError unless the files hold a float tensor of the right shape for every wanted one, and nothing else."""
    found = set()
    for name, tensor in read_tensors(files):
        if name not in wanted and not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"{name}: a tensor that a Llama of this config.json does not have")
        if name in wanted and (tensor.shape != wanted[name].shape or not tensor.is_floating_point()):
            shape = list(wanted[name].shape)
            raise ValueError(f"{name}: {list(tensor.shape)} {tensor.dtype} where config.json says {shape} floats")
        if name in found:
            raise ValueError(f"{name}: it is there twice, in {', '.join(file.name for file in files)}: download them again")
        found.add(name)
    missing = [name for name in wanted if name not in found and not (tied and name == "lm_head.weight")]
    if missing:
        raise ValueError(f"{missing[0]}: missing from {files[0]} and its shards: download it again")


def convert(folder: Path, precision: str) -> Path:
    """Write folder/model.pth from the Hugging Face files in `folder`; takes the memory of the largest tensor."""
    config = read_json(folder / "config.json")
    args, tied = model_args(config), bool(config.get("tie_word_embeddings", False))
    tokenizer = read_tokenizer(folder, args.vocab_size)
    templates = [folder / name for name in ("tokenizer_config.json", "chat_template.jinja")]
    chat = any(path.is_file() and b"<<SYS>>" in path.read_bytes() for path in templates)
    dtype, files = getattr(torch, precision), weight_files(folder)
    shapes = build_model(args, None, dtype).state_dict()
    check_tensors(files, places(args, shapes), tied)
    tensors = {name: torch.empty_like(shape, device="cpu") for name, shape in shapes.items()}
    if tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]

    def fill(mapped: dict[str, Tensor]) -> None:
        wanted = places(args, mapped)
        counted = progress(range(len(wanted) - tied), "converting")
        for name, tensor in read_tensors(files):
            if name in wanted and not (tied and name == "lm_head.weight"):
                next(counted)
                wanted[name].copy_(tensor)

    header = {"config": asdict(args), "quantization": None, "chat": chat, "tokenizer": tokenizer}
    write_checkpoint(folder / "model.pth", header, tensors, fill)
    return folder / "model.pth"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Convert a Hugging Face Llama checkpoint to model.pth beside it.")
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="directory in Hugging Face layout")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights (bfloat16)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    print(f"wrote {convert(args.checkpoint_dir, args.precision)}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
