"""Model files with random weights: our checkpoints, and GGUF files for llama.cpp.

GGUF files need pip install llama-cpp-python gguf.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

import tp
from checkpoint import empty_model, read_checkpoint
from model import ModelArgs
from quantize import quantize
from scripts.convert_tokenizer import sentencepiece_tokenizer
from scripts.files import new_checkpoint

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "tests" / "demo" / "target"
OURS = {  # label: quantization
    "bf16": None,
    "int8": {"mode": "int8"},
    "int4 g32": {"mode": "int4", "groupsize": 32},
    "int4 g64": {"mode": "int4", "groupsize": 64},
}
POOL = 2**22  # random numbers, which are repeated


def is_installed(*modules: str) -> bool:
    """True if all of these modules can be imported."""
    return all(importlib.util.find_spec(module) for module in modules)


def random_checkpoint(args: ModelArgs, folder: Path, quantization: dict | None) -> Path:
    """The path of a checkpoint with random weights, written if there is none."""
    path = folder / "model.pth"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_random_checkpoint(args, path)
    if quantization is None:
        return path
    quantized = folder / f"model_{'_'.join(map(str, quantization.values()))}.pth"
    if not quantized.exists():
        quantize(read_checkpoint(path), quantization, "cpu", quantized)
    return quantized


def write_random_checkpoint(args: ModelArgs, path: Path) -> None:
    """Write a checkpoint with random weights in bfloat16, and the demo's tokenizer."""
    tokenizer = sentencepiece_tokenizer((DEMO / "tokenizer.model").read_bytes())
    header = {"config": asdict(args), "quantization": None, "tokenizer": asdict(tokenizer)}
    tensors = empty_model(args, None, torch.bfloat16).to_empty(device="cpu").state_dict()
    pool = (torch.randn(POOL) * 0.02).bfloat16()
    with new_checkpoint(path, header, tensors) as mapped:
        for name, tensor in mapped.items():
            for part in tensor.view(-1).split(POOL):
                part.copy_(torch.ones_like(part) if "norm" in name else pool[: len(part)])


def gguf_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The shapes of a Llama's tensors, by their names in GGUF."""
    heads, kv = args.n_head * args.head_dim, args.n_kv_head * args.head_dim
    layer = {
        "attn_q": (heads, args.dim),
        "attn_k": (kv, args.dim),
        "attn_v": (kv, args.dim),
        "attn_output": (args.dim, heads),
        "ffn_gate": (args.ffn_dim, args.dim),
        "ffn_up": (args.ffn_dim, args.dim),
        "ffn_down": (args.dim, args.ffn_dim),
        "attn_norm": (args.dim,),
        "ffn_norm": (args.dim,),
    }
    table = (args.vocab_size, args.dim)
    shapes = {"token_embd": table, "output": table, "output_norm": (args.dim,)}
    return shapes | {f"blk.{i}.{name}": shape for i in range(args.n_layer) for name, shape in layer.items()}


def add_vocabulary(writer, vocab_size: int) -> None:
    """Add a sentencepiece vocabulary of invented pieces to a gguf.GGUFWriter."""
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % i for i in range(256))]
    pieces += [b"piece%d" % i for i in range(vocab_size - len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (vocab_size - 259))


def write_gguf(args: ModelArgs, path: Path, array_of: Callable[[str, tuple[int, ...]], object]) -> None:
    """Write a GGUF file; `array_of` (name, shape) returns the numpy array of each tensor."""
    import gguf  # noqa: PLC0415  may be absent

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    fields = {
        "context_length": args.max_seq_length,
        "embedding_length": args.dim,
        "block_count": args.n_layer,
        "feed_forward_length": args.ffn_dim,
        "head_count": args.n_head,
        "head_count_kv": args.n_kv_head,
        "layer_norm_rms_eps": args.norm_eps,
        "rope_dimension_count": args.head_dim,
        "vocab_size": args.vocab_size,
        "file_type": 1,
    }
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    add_vocabulary(writer, args.vocab_size)
    for name, shape in gguf_shapes(args).items():
        writer.add_tensor(f"{name}.weight", array_of(name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(original: Path, path: Path, kind: str) -> None:
    """Quantize a GGUF file to a format of llama.cpp, by llama.cpp."""
    import llama_cpp  # noqa: PLC0415  may be absent

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, llama_cpp.ctypes.c_void_p(0))
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread = tp.num_threads()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    llama_cpp.llama_model_quantize(str(original).encode(), str(path).encode(), options)


def random_gguf(args: ModelArgs, folder: Path, kind: str) -> Path:
    """The path of a GGUF file with random weights, written if there is none: F16, or quantized from it."""
    import numpy as np  # noqa: PLC0415  comes with gguf

    original, path = folder / "F16.gguf", folder / f"{kind}.gguf"
    if not original.exists():
        pool = (np.random.default_rng(0).standard_normal(POOL) * 0.02).astype(np.float16)

        def array_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
            return np.ones(shape, np.float32) if len(shape) == 1 else np.resize(pool, shape)

        write_gguf(args, original, array_of)
    if not path.exists():
        quantize_gguf(original, path, kind)
    return path
