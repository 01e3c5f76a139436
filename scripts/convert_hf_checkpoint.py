"""Convert a Llama checkpoint in Hugging Face layout, on disk, to the one file that generate.py reads.

    python -m scripts.convert_hf_checkpoint --checkpoint_dir checkpoints/$MODEL_REPO [--precision float32]

Reads safetensors and .bin, whole or sharded, with torch alone; models that this program cannot run are refused by name.
"""

import argparse
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

if not __package__:  # run as a file: Python finds our modules when it is run as a module
    os.environ["PYTHONPATH"] = f"{Path(__file__).resolve().parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    os.execv(sys.executable, [sys.executable, "-m", "scripts.convert_hf_checkpoint", *sys.argv[1:]])

import terminal

import torch
from torch import Tensor

from checkpoint import empty_model, write_checkpoint
from model import ModelArgs
from scripts.convert_tokenizer import check, read_json, read_tokenizer

FORMATS = {"model.safetensors": "model[.-]*safetensors", "pytorch_model.bin": "pytorch_model[.-]*bin"}  # whole: shards
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Values that config.json may have.
SUPPORTED = {
    "model_type": ["llama", "mistral"],
    "hidden_act": ["silu"],
    "rope scaling": ["default", "linear", "llama3"],
}
SUPPORTED |= dict.fromkeys(["attention_bias", "mlp_bias", "quantization_config"], [False, None])
ENDS = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}  # ours: Hugging Face's
LAYER = {  # our tensors of a layer: Hugging Face's, in the order of their rows
    "attention.wqkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.wo": ["self_attn.o_proj"],
    "feed_forward.w13": ["mlp.gate_proj", "mlp.up_proj"],
    "feed_forward.w2": ["mlp.down_proj"],
    "attention_norm": ["input_layernorm"],
    "ffn_norm": ["post_attention_layernorm"],
}


def model_args(config: dict) -> ModelArgs:
    """The shape that a Hugging Face config.json describes, with RoPE in either spelling.

    ValueError for a model that this program cannot run; KeyError, TypeError and others if it is no config.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    said = {"model_type": config["model_type"], "rope scaling": rope_type} | config
    check(said, SUPPORTED)
    required = "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size rms_norm_eps"
    dim, n_layer, n_head, ffn_dim, vocab_size, norm_eps = [config[name] for name in required.split()]
    n_kv_head = config.get("num_key_value_heads") or n_head
    head_dim = config.get("head_dim") or dim // n_head
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    scale = 1.0 if rope_type == "default" else rope["factor"]
    positions = config.get("max_position_embeddings", 2048)  # transformers' default
    if rope_type == "linear":  # FastChat's models have the scaled number in a field of their own
        positions = max(positions, config.get("max_sequence_length", 0))
    if config["model_type"] == "mistral" and (config.get("sliding_window", 4096) or positions) < positions:
        raise ValueError(f"a sliding_window that is less than {positions} positions is not supported")
    args = ModelArgs(dim, n_layer, n_head, n_kv_head, head_dim, ffn_dim, vocab_size, norm_eps, theta, scale, positions)
    if rope_type == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        args = replace(args, rope_low=low, rope_high=high, rope_positions=rope["original_max_position_embeddings"])
    return args


def eos_ids(config: dict) -> set[int]:
    """The tokens that end an answer, of which a config has none, one or a list."""
    said = config.get("eos_token_id")
    ids = said if isinstance(said, list) else [said]
    if said is not None and not all(isinstance(token, int) for token in ids):
        raise ValueError(f"eos_token_id = {said!r}: it must be a number or a list of numbers")
    return set(ids) - {None}


def read_safetensors(path: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name and reader of each tensor: 8 bytes of length, a JSON header of that length, raw data.

    https://huggingface.co/docs/safetensors, "Format"
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, path.stat().st_size)))
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)[8 + length :]

    def read(dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
        raw = data[data_offsets[0] : data_offsets[1]].clone()  # which is aligned
        return raw.view(DTYPES[dtype]).view(shape) if dtype in DTYPES else raw  # bytes are refused later, by name

    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield name, partial(read, **entry)


def read_bin(path: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name and reader of each tensor of a torch.save file; in the format of before torch 1.6 all are read at once."""
    content = torch.load(path, mmap=zipfile.is_zipfile(path), weights_only=True, map_location="cpu")
    for name, tensor in content.items():
        yield str(name), partial(torch.Tensor.detach, tensor)  # it may be a Parameter


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in `folder`: those that an index names, else all of the first format that is there."""
    for whole, pattern in FORMATS.items():
        index = folder / f"{whole}.index.json"
        if index.exists():
            with terminal.reading(index, "download it again"):
                return [folder / name for name in set(json.loads(index.read_bytes())["weight_map"].values())]
        if found := sorted(folder.glob(pattern)):
            return found
    raise ValueError(f"{folder} has no weights in safetensors or .bin: download it again")


def read_weights(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """A reader for each tensor in `folder`, by Hugging Face's names; nothing of it is in memory yet."""
    readers = {}
    for path in weight_files(folder):
        with terminal.reading(path, "cut short, damaged or no file of weights: download it again"):
            for name, read in read_safetensors(path) if path.suffix == ".safetensors" else read_bin(path):
                if name in readers:
                    raise ValueError(f"{name} is in another file as well: delete those that are not of this model")
                if not name.endswith("rotary_emb.inv_freq"):  # which is computed
                    readers[name] = read
    return readers


def places(args: ModelArgs, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where in our `tensors` each of Hugging Face's belongs, by its name."""
    found = {f"{theirs}.weight": tensors[f"{ours}.weight"] for ours, theirs in ENDS.items()}
    keys = args.n_kv_head * args.head_dim
    rows = {"attention.wqkv": [args.n_head * args.head_dim, keys, keys], "feed_forward.w13": args.ffn_dim}
    for i in range(args.n_layer):
        for ours, names in LAYER.items():
            tensor = tensors[f"layers.{i}.{ours}.weight"]
            for theirs, part in zip(names, tensor.split(rows.get(ours, len(tensor))), strict=True):
                found[f"model.layers.{i}.{theirs}.weight"] = part
    return found


def copy(name: str, read: Callable[[], Tensor], place: Tensor) -> None:
    """Copy Hugging Face's tensor `name` to its place. ValueError where it does not fit config.json."""
    with terminal.reading(name, "its file is cut short or damaged: download it again"):
        tensor = read()
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise ValueError(f"{name} is not stored in floating point of 16 bits or more, which is all that is supported")
    if tensor.shape != place.shape:
        raise ValueError(f"{name} has the shape {list(tensor.shape)}, but config.json asks for {list(place.shape)}")
    place.copy_(tensor)


def convert(folder: Path, precision: str) -> Path:
    """Write folder/model.pth from the Hugging Face files in `folder`; takes the memory of the largest tensor."""
    with terminal.reading(folder / "config.json", "give a directory in Hugging Face layout, downloaded whole"):
        config = json.loads((folder / "config.json").read_bytes())
        args = model_args(config)
        tensors = empty_model(args, None, getattr(torch, precision)).to_empty(device="cpu").state_dict()
        ends = eos_ids(config) | eos_ids(read_json(folder / "generation_config.json"))
    tokenizer = read_tokenizer(folder, args.vocab_size, ends)
    if tokenizer.size > args.vocab_size:
        raise ValueError(f"{folder}: {tokenizer.size} tokens, but config.json has a vocab_size of {args.vocab_size}")
    readers = read_weights(folder)
    wanted = set(places(args, tensors))
    # Tied embeddings are one tensor, under either name. Where both are there, both are kept: they may differ.
    absent = {"model.embed_tokens.weight", "lm_head.weight"} - readers.keys()
    if config.get("tie_word_embeddings") and len(absent) == 1:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
        wanted -= absent
    for name in sorted(wanted ^ readers.keys()):
        problem = "is missing: download it again" if name in wanted else "is of no layer that config.json has"
        raise ValueError(f"{name} in {folder} {problem}")

    def fill(mapped: dict[str, Tensor]) -> None:
        found = places(args, mapped)
        for name, read in terminal.progress(readers.items(), "converting"):
            copy(name, read, found[name])

    header = {"config": asdict(args), "quantization": None, "tokenizer": asdict(tokenizer)}
    write_checkpoint(folder / "model.pth", header, tensors, fill)
    return folder / "model.pth"


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a Hugging Face Llama checkpoint.", allow_abbrev=False)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="directory in Hugging Face layout")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights")
    args = parser.parse_args()
    print(f"wrote {convert(args.checkpoint_dir, args.precision)}", file=sys.stderr)


if __name__ == "__main__":
    terminal.run(main)
