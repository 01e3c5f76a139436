"""Convert a Llama checkpoint in Hugging Face layout to the model.pth that generate.py reads.

    python -m scripts.convert_hf_checkpoint --checkpoint_dir checkpoints/$MODEL_REPO [--precision float32]

It reads safetensors and .bin, whole or sharded, with torch alone. Models that this program cannot run are refused by
name.
"""

import argparse
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it may be run as a file, from any folder

import utils

import torch
from torch import Tensor

from checkpoint import empty_model, map_file, map_tensors
from model import ModelArgs
from scripts.convert_tokenizer import read_optional_json, read_tokenizer, require
from scripts.files import new_checkpoint

FORMATS = {"model.safetensors": "model[.-]*safetensors", "pytorch_model.bin": "pytorch_model[.-]*bin"}  # file: shards
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SUPPORTED = {  # values that config.json may have
    "model_type": ["llama", "mistral"],
    "hidden_act": ["silu"],
    "rope scaling": ["default", "linear", "llama3"],
}
SUPPORTED |= dict.fromkeys(["attention_bias", "mlp_bias", "quantization_config"], [False, None])
OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}  # ours: Hugging Face's
LAYER = {  # ours: Hugging Face's, in the order of their rows
    "attention.wqkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.wo": ["self_attn.o_proj"],
    "feed_forward.w13": ["mlp.gate_proj", "mlp.up_proj"],
    "feed_forward.w2": ["mlp.down_proj"],
    "attention_norm": ["input_layernorm"],
    "ffn_norm": ["post_attention_layernorm"],
}


def model_args(config: dict) -> ModelArgs:
    """The ModelArgs of a Hugging Face config.json, with RoPE in the spelling of transformers 4 or 5.

    ValueError for a model that this program cannot run; KeyError, TypeError and others if it is no config.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    require(config | {"rope scaling": rope_type}, SUPPORTED)
    n_head = config["num_attention_heads"]
    positions = config.get("max_position_embeddings", 2048)  # transformers' default
    if rope_type == "linear":  # FastChat's models have the scaled number in a field of their own
        positions = max(positions, config.get("max_sequence_length", 0))
    window = config.get("sliding_window", 4096) if config["model_type"] == "mistral" else None
    if window is not None and window < positions:
        print(f"context: {window} of {positions} positions, because of the sliding_window", file=sys.stderr)
        positions = window
    args = ModelArgs(
        dim=config["hidden_size"],
        n_layer=config["num_hidden_layers"],
        n_head=n_head,
        n_kv_head=config.get("num_key_value_heads") or n_head,
        head_dim=config.get("head_dim") or config["hidden_size"] // n_head,
        ffn_dim=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        rope_scale=1.0 if rope_type == "default" else rope["factor"],
        max_seq_length=positions,
    )
    if rope_type == "llama3":
        names = "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
        args = replace(args, **{f"rope_{name}": rope[name] for name in names})
    check_args(args)
    return args


def check_args(args: ModelArgs) -> None:
    """ValueError if this is not the shape of a model."""
    for field in fields(args):
        value = getattr(args, field.name)
        if not isinstance(value, int | field.type) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ValueError(f"{field.name} = {value!r} in the config: it must be a positive number below 2**31")
    if args.n_head % args.n_kv_head != 0 or args.head_dim % 2 != 0:
        raise ValueError(f"n_head must be a multiple of n_kv_head and head_dim even in the config: {args}")
    if args.rope_low_freq_factor >= args.rope_high_freq_factor:
        raise ValueError(f"low_freq_factor must be less than high_freq_factor in the config: {args}")


def eos_ids(config: dict) -> set[int]:
    """The end-of-sequence ids of a config, which has none, one, or a list."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    if value is not None and not all(isinstance(token, int) for token in ids):
        raise ValueError(f"eos_token_id = {value!r}: it must be a number or a list of numbers")
    return set(ids) - {None}


def read_safetensors(path: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Each tensor's name and a function that reads it: 8 bytes of length, a JSON header of that length, raw data.

    https://huggingface.co/docs/safetensors, "Format"
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, path.stat().st_size)))
    data = torch.frombuffer(map_file(path), dtype=torch.uint8)[8 + length :]

    def read(dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
        raw = data[data_offsets[0] : data_offsets[1]].clone()  # aligned
        return raw.view(DTYPES[dtype]).view(shape) if dtype in DTYPES else raw  # `copy` refuses bytes

    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield name, partial(read, **entry)


def read_bin(path: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The same for a torch.save file. One of torch before 1.6 is read into memory as a whole."""
    if zipfile.is_zipfile(path):
        content = map_tensors(path, torch.load(path, weights_only=True, map_location="meta"))
    else:
        content = torch.load(path, weights_only=True, map_location="cpu")
    for name, tensor in content.items():
        yield str(name), partial(torch.Tensor.detach, tensor)  # because a tensor may be a Parameter


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in `folder`, in the first format that is there: one whole file, as transformers prefers it,
    or the shards in an index, or all shards.
    """
    for whole, pattern in FORMATS.items():
        if (folder / whole).exists():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.exists():
            with utils.reading(index, "download it again"):
                return sorted(folder / name for name in set(json.loads(index.read_bytes())["weight_map"].values()))
        if found := sorted(folder.glob(pattern)):
            return found
    raise ValueError(f"{folder} has no weights in safetensors or .bin: download it again")


def read_weights(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """A function that reads each tensor, by Hugging Face's name. Nothing is in memory yet."""
    readers, paths = {}, weight_files(folder)
    others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    print(f"reading {paths[0]}{others}", file=sys.stderr)
    for path in paths:
        with utils.reading(path, "cut short, damaged or no file of weights: download it again"):
            for name, read in read_safetensors(path) if path.suffix == ".safetensors" else read_bin(path):
                if name in readers:
                    raise ValueError(f"{name} is in another file as well: delete those that are not of this model")
                if not name.endswith("rotary_emb.inv_freq"):  # computed from the config
                    readers[name] = read
    return readers


def destinations(args: ModelArgs, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of our `tensors` into which each of Hugging Face's goes, by its name."""
    found = {f"{theirs}.weight": tensors[f"{ours}.weight"] for ours, theirs in OUTER.items()}
    keys = args.n_kv_head * args.head_dim
    rows = {"attention.wqkv": [args.n_head * args.head_dim, keys, keys], "feed_forward.w13": args.ffn_dim}
    for i in range(args.n_layer):
        for ours, names in LAYER.items():
            tensor = tensors[f"layers.{i}.{ours}.weight"]
            for theirs, part in zip(names, tensor.split(rows.get(ours, len(tensor))), strict=True):
                found[f"model.layers.{i}.{theirs}.weight"] = part
    return found


def copy(name: str, read: Callable[[], Tensor], destination: Tensor) -> None:
    """Copy Hugging Face's tensor `name`. ValueError if it is not what config.json says."""
    with utils.reading(name, "its file is cut short or damaged: download it again"):
        tensor = read()
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise ValueError(f"{name} is not stored in floating point of 16 bits or more, which is all that is supported")
    if tensor.shape != destination.shape:
        problem = f"has the shape {list(tensor.shape)}, but config.json asks for {list(destination.shape)}"
        raise ValueError(f"{name} {problem}")
    destination.copy_(tensor)


def convert(folder: Path, precision: str) -> Path:
    """Write folder/model.pth from the Hugging Face files in `folder`. Takes the memory of the largest tensor."""
    with utils.reading(folder / "config.json", "give a directory in Hugging Face layout, downloaded whole"):
        config = json.loads((folder / "config.json").read_bytes())
        args = model_args(config)
        tensors = empty_model(args, None, getattr(torch, precision)).to_empty(device="cpu").state_dict()
        ids = eos_ids(config) | eos_ids(read_optional_json(folder / "generation_config.json"))
    tokenizer = read_tokenizer(folder, args.vocab_size, ids)
    if tokenizer.vocab_size > args.vocab_size:
        problem = f"{tokenizer.vocab_size} tokens, but config.json has a vocab_size of {args.vocab_size}"
        raise ValueError(f"{folder}: {problem}")
    readers = read_weights(folder)
    needed = set(destinations(args, tensors))
    # Tied embeddings are one tensor, under either name. If both are there, both are kept, because they may differ.
    absent = {"model.embed_tokens.weight", "lm_head.weight"} - readers.keys()
    if config.get("tie_word_embeddings") and len(absent) == 1:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
        needed -= absent
    for name in sorted(needed ^ readers.keys()):
        problem = "is missing: download it again" if name in needed else "is of no layer that config.json has"
        if name == "lm_head.weight":
            problem = "is missing: if it is the embeddings, set tie_word_embeddings to true in config.json"
        raise ValueError(f"{name} in {folder} {problem}")
    header = {"config": asdict(args), "quantization": None, "tokenizer": asdict(tokenizer)}
    with new_checkpoint(folder / "model.pth", header, tensors) as mapped:
        found = destinations(args, mapped)
        for name, read in utils.progress(readers.items(), "converting"):
            copy(name, read, found[name])
    return folder / "model.pth"


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a Hugging Face Llama checkpoint.", allow_abbrev=False)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="directory in Hugging Face layout")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights")
    args = parser.parse_args()
    print(f"wrote {convert(args.checkpoint_dir, args.precision)}", file=sys.stderr)


if __name__ == "__main__":
    utils.run(main)
