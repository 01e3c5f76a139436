"""Convert a Llama checkpoint in Hugging Face layout, on disk, to the one file that generate.py reads.

    python -m scripts.convert_hf_checkpoint --checkpoint_dir checkpoints/$MODEL_REPO [--precision float32]

Reads safetensors and .bin, whole or sharded, with torch alone; what this program cannot run is refused by name.
"""

import argparse
import json
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from model import ModelArgs
from quantize import build_model, progress, reading, run, write_checkpoint

import sentencepiece
import torch
from torch import Tensor

WEIGHTS = ["model[.-]*safetensors", "pytorch_model[.-]*bin"]  # whole or in shards; the first format that is there
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SUPPORTED = {"model_type": ["llama"], "attention_bias": [False, None], "mlp_bias": [False, None], "hidden_act": ["silu"],
             "quantization_config": [None], "rope scaling": ["default", "linear"]}  # fmt: skip
# Hugging Face's tensors of a layer, in the order in which `places` has ours.
LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]  # fmt: skip


def model_args(config: dict) -> ModelArgs:
    """The shape that a Hugging Face config.json describes, in either spelling. ValueError for what we cannot run, KeyError,
    TypeError and others for what is no config."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for key, value in ({"model_type": config["model_type"], "rope scaling": rope_type} | config).items():
        if key in SUPPORTED and value not in SUPPORTED[key]:
            raise ValueError(f"{key} = {value!r} is not supported: this program runs plain Llama models")
    dim, n_head = config["hidden_size"], config["num_attention_heads"]
    return ModelArgs(dim=dim, n_layer=config["num_hidden_layers"], n_head=n_head, vocab_size=config["vocab_size"],
                     n_kv_head=config.get("num_key_value_heads") or n_head, head_dim=config.get("head_dim") or dim // n_head,
                     ffn_dim=config["intermediate_size"], max_seq_length=config["max_position_embeddings"],
                     rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0, norm_eps=config["rms_norm_eps"],
                     rope_scale=rope["factor"] if rope_type == "linear" else 1.0)  # fmt: skip


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, one in memory: 8 bytes of length, a JSON header of that length, raw data."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)[8 + length :]
    header.pop("__metadata__", None)
    for name, entry in header.items():
        raw, dtype = data[slice(*entry["data_offsets"])].clone(), DTYPES.get(entry["dtype"], torch.uint8)  # clones are aligned
        yield name, raw.view(dtype).view(entry["shape"] if entry["dtype"] in DTYPES else -1)


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All (name, tensor) in a folder; one is in memory at a time, or of .bin in the legacy format one file."""
    formats = [sorted(folder.glob(pattern)) for pattern in WEIGHTS]
    for path in progress(formats[0] or formats[1], "converting file"):
        with reading(path, "cut short, damaged or no file of weights: download it again"):
            if path.suffix == ".safetensors":
                yield from read_safetensors(path)
            else:
                content = torch.load(path, mmap=zipfile.is_zipfile(path), weights_only=True, map_location="cpu")
                yield from ((str(name), tensor) for name, tensor in content.items())


def places(args: ModelArgs, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where in our `tensors`, a state_dict, each of Hugging Face's belongs, by its name."""
    embeddings, *layers, norm, output = tensors.values()
    names, ours = ["model.embed_tokens", "model.norm", "lm_head"], [embeddings, norm, output]
    q, kv = args.n_head * args.head_dim, args.n_kv_head * args.head_dim
    for i in range(args.n_layer):
        wqkv, wo, w13, *others = layers[6 * i : 6 * i + 6]
        names += [f"model.layers.{i}.{name}" for name in LAYER]
        ours += [*wqkv.split([q, kv, kv]), wo, *w13.split(args.ffn_dim), *others]
    return {f"{name}.weight": tensor for name, tensor in zip(names, ours, strict=True)}


def convert(folder: Path, precision: str) -> Path:
    """Write folder/model.pth from the Hugging Face files in `folder`; takes the memory of the largest tensor."""
    path, dtype = folder / "config.json", getattr(torch, precision)
    with reading(path, "give a directory in Hugging Face layout, downloaded whole"):
        config = json.loads(path.read_bytes())
        args, tied = model_args(config), bool(config.get("tie_word_embeddings", False))
        tensors = build_model(args, None, dtype).to_empty(device="cpu").state_dict()
    path = folder / "tokenizer.model"
    with reading(path, "only models with their own sentencepiece tokenizer are supported"):
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
        if tokenizer.bos_id() < 0 or tokenizer.vocab_size() > args.vocab_size:
            raise ValueError(f"{tokenizer.vocab_size()} pieces, BOS {tokenizer.bos_id()}, vocab_size {args.vocab_size}")
    templates = [*folder.glob("tokenizer_config.json"), *folder.glob("chat_template.jinja")]
    chat = any(b"<<SYS>>" in path.read_bytes() for path in templates)
    if tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]

    def fill(mapped: dict[str, Tensor]) -> None:
        computed = ("rotary_emb.inv_freq", *["lm_head.weight"] * tied)
        wanted = {name: place for name, place in places(args, mapped).items() if name not in computed}
        for name, tensor in read_tensors(folder):
            if name.endswith(computed):
                continue
            place = wanted.pop(name, None)
            if place is None or not isinstance(tensor, Tensor) or place.shape != tensor.shape or not tensor.is_floating_point():
                raise ValueError(f"{name} in {folder}: twice, or not of the shape and type that config.json asks for")
            place.copy_(tensor)
        if wanted:
            raise ValueError(f"{next(iter(wanted))} is missing from {' and '.join(WEIGHTS)} in {folder}: download it again")

    header = {"config": asdict(args), "quantization": None, "chat": chat, "tokenizer": tokenizer.serialized_model_proto()}
    write_checkpoint(folder / "model.pth", header, tensors, fill)
    return folder / "model.pth"


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a Hugging Face Llama checkpoint to model.pth beside it.")
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="directory in Hugging Face layout")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights (bfloat16)")
    args = parser.parse_args()
    print(f"wrote {convert(args.checkpoint_dir, args.precision)}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
