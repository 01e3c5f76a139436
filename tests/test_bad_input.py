"""What a user can do wrong ends in one line on stderr that names cause and cure, and leaves no file half-written.

Every case is a command line as it is typed, run from the repository root. $DIR is the case's own copy of a tiny model:
Hugging Face files, and the model.pth that the converter made of them.
"""

import ctypes
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import pytest
import sentencepiece
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
CONTEXT = 64
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 96,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": CONTEXT,
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (300, 64), "model.norm.weight": (64,), "lm_head.weight": (300, 64),
    f"{LAYER}self_attn.q_proj.weight": (64, 64), f"{LAYER}self_attn.k_proj.weight": (64, 64),
    f"{LAYER}self_attn.v_proj.weight": (64, 64), f"{LAYER}self_attn.o_proj.weight": (64, 64),
    f"{LAYER}mlp.gate_proj.weight": (96, 64), f"{LAYER}mlp.up_proj.weight": (96, 64),
    f"{LAYER}mlp.down_proj.weight": (64, 96), f"{LAYER}input_layernorm.weight": (64,),
    f"{LAYER}post_attention_layernorm.weight": (64,),
}  # fmt: skip
Q_PROJ = f"{LAYER}self_attn.q_proj.weight"
DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}
PROGRESS = re.compile(
    r"(Load time|Compile time|Prompt tokens|Time to first token|Prefill|Decode|Weights read|Guesses|Tokens per pass|"
    r"Accepted lengths|Stopped|Peak memory): .*"
)
Spoil = Callable[[Path], object]  # what is done to a case's folder before


def weights() -> dict[str, Tensor]:
    """The tensors of the tiny model, by Hugging Face's names: the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    header, data = {}, b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += ctypes.string_at(tensor.contiguous().data_ptr(), tensor.nbytes)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_tokenizer(folder: Path, vocab_size: int = 300, **options) -> None:
    sentences = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 20
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, vocab_size=vocab_size, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", minloglevel=2, **options,
        )  # fmt: skip


# ---- Ways to spoil a folder. `write`, `remove`, `cut` take any file; the others know what is in theirs.


def nothing(folder: Path) -> None:
    pass


def write(name: str, content: bytes | str) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(*names: str) -> Spoil:
    return lambda folder: [(folder / name).unlink() for name in names]


def both(first: Spoil, second: Spoil) -> Spoil:
    return lambda folder: (first(folder), second(folder))


def cut(name: str, keep: Callable[[int], float]) -> Spoil:
    """Keep the first `keep(size)` bytes."""
    return lambda folder: os.truncate(folder / name, int(keep((folder / name).stat().st_size)))


def config(*without: str, **changes: object) -> Spoil:
    kept = {key: value for key, value in CONFIG.items() if key not in without}
    return write("config.json", json.dumps(kept | changes))


def tensors(change: Callable[[dict], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        content = weights()
        change(content)
        write_safetensors(folder / "model.safetensors", content)

    return spoil


def second_shard(second: Callable[[], dict[str, Tensor]]) -> Spoil:
    """Two shards: all tensors in the first, `second()` in the other."""

    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        write_safetensors(folder / "model-00002-of-00002.safetensors", second())

    return spoil


def bin_file(make: Callable[[Path], object], **options: bool) -> Spoil:
    """pytorch_model.bin instead of model.safetensors."""

    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(make(folder), folder / "pytorch_model.bin", **options)

    return spoil


def checkpoint(change: Callable[[dict], object]) -> Spoil:
    """Change the content of model.pth."""

    def spoil(folder: Path) -> None:
        content = torch.load(folder / "model.pth", weights_only=True)
        change(content)
        torch.save(content, folder / "model.pth")

    return spoil


def saved(make: Callable[[Path], object], **options: bool) -> Spoil:
    """Another torch.save file as model.pth."""
    return lambda folder: torch.save(make(folder), folder / "model.pth", **options)


def torch_script(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.pth", "w") as archive:
        archive.writestr("model/version", "3")
        archive.writestr("model/constants.pkl", "")


class Code:
    """What makes a file when it is unpickled by a program that trusts its input."""

    def __init__(self, folder: Path) -> None:
        self.marker = folder / "code was run"

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def unlike(name: str) -> Spoil:
    """A directory in the place of the file of that name."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


# ---- The cases


@dataclass(frozen=True)
class Case:
    """`says`: what the message has to contain, " ... " standing for any text."""

    command: str
    says: str
    spoil: Spoil = nothing
    env: dict[str, str] = field(default_factory=dict)
    skip: str = ""  # why it cannot be run here


GENERATE = "python generate.py --checkpoint_path $DIR/model.pth"
CONVERT = "python -m scripts.convert_hf_checkpoint --checkpoint_dir $DIR"
QUANTIZER = "python quantize.py --checkpoint_path $DIR/model.pth"
DOWNLOAD = "python -m scripts.download no-such-user/no-such-model"
OFFLINE = {"HF_ENDPOINT": "http://127.0.0.1:9"}
DAMAGED = "model.pth: ... prepare.sh"


def model_pth(says: str, spoil: Spoil) -> Case:
    return Case(GENERATE, says, spoil)


def hf(says: str, spoil: Spoil) -> Case:
    return Case(CONVERT, says, spoil)


CHECKPOINT = {
    "missing": model_pth("model.pth: No such file ... prepare.sh", remove("model.pth")),
    "a directory": Case("python generate.py --checkpoint_path $DIR", "Is a directory ... prepare.sh"),
    "a text file": model_pth(DAMAGED, write("model.pth", "version https://git-lfs.github.com/spec/v1\n" * 3)),
    "empty": model_pth(DAMAGED, write("model.pth", b"")),
    "safetensors": Case(
        "python generate.py --checkpoint_path $DIR/model.safetensors", "model.safetensors ... prepare.sh"
    ),
    "TorchScript": model_pth(DAMAGED, torch_script),
    "a state_dict": model_pth(DAMAGED, saved(lambda folder: weights())),
    "a state_dict, legacy": model_pth(DAMAGED, saved(lambda folder: weights(), _use_new_zipfile_serialization=False)),
    "a list": model_pth(DAMAGED, saved(lambda folder: [1, 2, 3])),
    "other keys": model_pth(DAMAGED, saved(lambda folder: {"state_dict": weights(), "epoch": 3})),
    "code": model_pth(DAMAGED, saved(Code)),
    "code, legacy": model_pth(DAMAGED, saved(Code, _use_new_zipfile_serialization=False)),
    "cut to 1 byte": model_pth(DAMAGED, cut("model.pth", lambda size: 1)),
    "cut to 1/10": model_pth(DAMAGED, cut("model.pth", lambda size: size / 10)),
    "cut to 1/2": model_pth(DAMAGED, cut("model.pth", lambda size: size / 2)),
    "cut to 9/10": model_pth(DAMAGED, cut("model.pth", lambda size: size * 0.9)),
    "cut by 1 byte": model_pth(DAMAGED, cut("model.pth", lambda size: size - 1)),
    "other dim": model_pth("model.pth ... config ... again", checkpoint(lambda c: c["config"].update(dim=32))),
    "other n_layer": model_pth("model.pth ... config ... again", checkpoint(lambda c: c["config"].update(n_layer=2))),
    "other vocab_size": model_pth(
        "model.pth ... config ... again", checkpoint(lambda c: c["config"].update(vocab_size=512))
    ),
    "negative dim": model_pth("model.pth ... dim = -64", checkpoint(lambda c: c["config"].update(dim=-64))),
    "huge dim": model_pth("model.pth", checkpoint(lambda c: c["config"].update(dim=10**13))),
    "unknown key in config": model_pth(DAMAGED, checkpoint(lambda c: c["config"].update(bias=True))),
    "config is a list": model_pth(DAMAGED, checkpoint(lambda c: c.update(config=[1]))),
    "a tensor less": model_pth("model.pth ... config ... again", checkpoint(lambda c: c["model"].pop("norm.weight"))),
    "a number for a tensor": model_pth("model.pth", checkpoint(lambda c: c["model"].update({"norm.weight": 3}))),
    "integer weights": model_pth(
        "model.pth", checkpoint(lambda c: c["model"].update({"norm.weight": torch.ones(64).int()}))
    ),
    "quantization of others": model_pth("model.pth", checkpoint(lambda c: c.update(quantization={"mode": "int8"}))),
    "quantization a string": model_pth(DAMAGED, checkpoint(lambda c: c.update(quantization="int8"))),
    "quantization empty": model_pth(DAMAGED, checkpoint(lambda c: c.update(quantization={}))),
    "quantization unknown": model_pth("model.pth", checkpoint(lambda c: c.update(quantization={"mode": "gptq"}))),
    "no group size": model_pth(DAMAGED, checkpoint(lambda c: c.update(quantization={"mode": "int4"}))),
    "group size 0": model_pth(
        "model.pth", checkpoint(lambda c: c.update(quantization={"mode": "int4", "groupsize": 0}))
    ),
    "group size 7": model_pth(
        "group size 7", checkpoint(lambda c: c.update(quantization={"mode": "int4", "groupsize": 7}))
    ),
    "garbage tokenizer": model_pth("model.pth", checkpoint(lambda c: c.update(tokenizer=b"garbage"))),
    "empty tokenizer": model_pth("model.pth", checkpoint(lambda c: c.update(tokenizer=b""))),
}
PROMPT = {
    "too long": Case(f"cat $DIR/full.txt $DIR/full.txt | {GENERATE} --prompt -", "context ... shorten"),
    "one token too long": Case(
        f"(cat $DIR/full.txt; echo -n z) | {GENERATE} --prompt -", "65 tokens ... 64 ... shorten"
    ),
    "not UTF-8": Case(f"{GENERATE} --prompt $'caf\\xe9'", "decode ... UTF-8"),
    "not UTF-8, on stdin": Case(f"echo $'caf\\xe9' | {GENERATE} --prompt -", "decode ... UTF-8"),
    "half a character, on stdin": Case(f"echo -n $'caf\\xc3' | {GENERATE} --prompt -", "decode ... UTF-8"),
    "system not UTF-8": Case(f"{GENERATE} --system $'caf\\xe9'", "decode ... UTF-8"),
    "system longer than the context": Case(
        f'{GENERATE} --interactive --system "$(cat $DIR/full.txt $DIR/full.txt)"', "shorten"
    ),
    "a context from where the conversation comes": Case(
        f"{GENERATE.replace('generate', 'generate_prefill')} --interactive --context -",
        "standard input ... give a text",
    ),
    "empty": Case(f"{GENERATE} --prompt ''", "prompt ... empty"),
    "empty, on stdin": Case(f"{GENERATE} --prompt - < /dev/null", "prompt ... empty"),
    "an empty line, on stdin": Case(f"echo | {GENERATE} --prompt -", "prompt ... empty"),
    "stdin closed": Case(f"{GENERATE} --prompt - <&-", "prompt"),
}
MACHINE = {
    "no memory": Case(
        f"ulimit -v 64000000; {GENERATE}", "memory", checkpoint(lambda c: c["config"].update(max_seq_length=10**9))
    ),
    "no compiler": Case(f"CXX=/no/such/g++ {GENERATE} --compile", "/no/such/g++ ... install"),
    "no compiler for the prompt": Case(f"CXX=no-such-g++ {GENERATE} --compile_prefill", "no-such-g++ ... install"),
    "empty PATH": Case(
        f"PYTHON=$(which python); PATH= $PYTHON {GENERATE.removeprefix('python')} --compile", "compiler ... install"
    ),
    "a compiler that fails": Case(f"CXX=false {GENERATE} --compile", "compile"),
    "trace into no directory": Case(f"{GENERATE} --profile $DIR/none/trace.json", "No such file ... none/trace.json"),
    "trace over a directory": Case(f"{GENERATE} --profile $DIR", "Is a directory"),
    "trace over a file, and no checkpoint": Case(
        f"{GENERATE.replace('model.pth', 'none.pth')} --profile $DIR/model.pth", "none.pth: No such file"
    ),
}
OUTPUT = {  # generation has begun: there may be text on stdout
    "disk full": Case(f"{GENERATE} > /dev/full", "No space left"),
    "reader gone": Case(
        f"{GENERATE} --num_samples 999 | head -c 1 > $DIR/../text; exit ${{PIPESTATUS[0]}}", "Broken pipe"
    ),
}
CONFIG_JSON = {
    "no directory": Case(f"{CONVERT}/none", "config.json: No such file ... directory"),
    "a file for the directory": Case(f"{CONVERT}/config.json", "config.json"),
    "missing": hf("config.json: No such file ... directory", remove("config.json")),
    "not JSON": hf("config.json: JSON ... downloaded whole", cut("config.json", lambda size: size / 2)),
    "empty": hf("config.json: JSON ... downloaded whole", write("config.json", "")),
    "not text": hf("config.json: ... downloaded whole", write("config.json", b"\xff\xfe\x00")),
    "a list": hf("config.json ... list ... downloaded whole", write("config.json", "[1, 2]")),
    **{f"{key} missing": hf(f"config.json ... {key}", config(key)) for key in CONFIG},
    "hidden_size a string": hf("config.json", config(hidden_size="64")),
    "hidden_size negative": hf("-64 ... positive", config(hidden_size=-64)),
    "hidden_size zero": hf("0 ... positive", config(hidden_size=0)),
    "hidden_size huge": hf(f"{10**13}", config(hidden_size=10**13)),
    "num_attention_heads zero": hf("config.json", config(num_attention_heads=0)),
    "num_attention_heads odd": hf("n_head=3", config(num_attention_heads=3)),
    "num_hidden_layers a fraction": hf("1.5 ... positive", config(num_hidden_layers=1.5)),
    "num_hidden_layers true": hf("True ... positive", config(num_hidden_layers=True)),
    "vocab_size negative": hf("-1 ... positive", config(vocab_size=-1)),
    "vocab_size null": hf("None ... positive", config(vocab_size=None)),
    "rms_norm_eps a string": hf("'1e-5' ... positive", config(rms_norm_eps="1e-5")),
    "rms_norm_eps not a number": hf("nan ... positive", config(rms_norm_eps=float("nan"))),
    "max_position_embeddings zero": hf("0 ... positive", config(max_position_embeddings=0)),
    "num_key_value_heads no divisor": hf("n_kv_head=3", config(num_key_value_heads=3)),
    "rope_theta a list": hf("[1] ... positive", config(rope_theta=[1])),
    "model_type": hf("model_type = 'mistral' is not supported", config(model_type="mistral")),
    "attention_bias": hf("attention_bias = True is not supported", config(attention_bias=True)),
    "mlp_bias": hf("mlp_bias = True is not supported", config(mlp_bias=True)),
    "hidden_act": hf("hidden_act = 'gelu' is not supported", config(hidden_act="gelu")),
    "quantization_config": hf("quantization_config ... not supported", config(quantization_config={"quant_method": "gptq"})),
    **{f"rope {kind}": hf(f"rope scaling = {kind!r} is not supported", config(rope_scaling={"type": kind, "factor": 2.0}))
       for kind in ("dynamic", "llama3", "yarn")},
    **{f"rope {kind}, new": hf(f"rope scaling = {kind!r} is not supported", config(rope_parameters={"rope_type": kind}))
       for kind in ("dynamic", "llama3", "yarn")},
    "rope linear without factor": hf("factor", config(rope_scaling={"type": "linear"})),
    "rope linear by 0": hf("0 ... positive", config(rope_scaling={"type": "linear", "factor": 0})),
    "rope a string": hf("config.json", config(rope_scaling="linear")),
}  # fmt: skip
TOKENIZER = {
    "missing": hf("tokenizer.model ... sentencepiece", remove("tokenizer.model")),
    "garbage": hf("tokenizer.model ... sentencepiece", write("tokenizer.model", b"\x00garbage" * 9)),
    "empty": hf("tokenizer.model", write("tokenizer.model", b"")),
    "a directory": hf("tokenizer.model", unlike("tokenizer.model")),
    "too many pieces": hf("310 pieces ... vocab_size 300", lambda folder: write_tokenizer(folder, 310)),
    "no token to begin with": hf("tokenizer.model", lambda folder: write_tokenizer(folder, bos_id=-1)),
}
BIN = bin_file(lambda folder: weights())
WEIGHTS = {
    "none": hf("missing ... safetensors and pytorch_model ... download it again", remove("model.safetensors")),
    "a shard less": hf("missing ... download", tensors(lambda t: [t.pop(name) for name in list(t)[::2]])),
    "a tensor in two shards": hf(f"{Q_PROJ} ... twice", second_shard(lambda: {Q_PROJ: weights()[Q_PROJ]})),
    "a tensor less": hf("norm.weight ... missing ... download", tensors(lambda t: t.pop("model.norm.weight"))),
    "no output layer": hf("weight ... missing ... download", tensors(lambda t: t.pop("lm_head.weight"))),
    "a tensor more": hf("q_proj.bias", tensors(lambda t: t.update({f"{LAYER}self_attn.q_proj.bias": torch.ones(64)}))),
    "a layer more": hf("layers.1.mlp", tensors(lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(96, 64)}))),
    "other shape": hf(f"{Q_PROJ} ... shape", tensors(lambda t: t.update({Q_PROJ: torch.ones(32, 64)}))),
    "integers": hf(Q_PROJ, tensors(lambda t: t.update({Q_PROJ: torch.ones(64, 64).long()}))),
    "8-bit floats": hf(Q_PROJ, tensors(lambda t: t.update({Q_PROJ: torch.ones(64, 64).to(torch.float8_e4m3fn)}))),
    "header cut short": hf("model.safetensors ... download it again", cut("model.safetensors", lambda size: 100)),
    "length cut short": hf("model.safetensors ... download it again", cut("model.safetensors", lambda size: 5)),
    "data cut short": hf("model.safetensors ... download it again", cut("model.safetensors", lambda size: size - 1)),
    "no bytes": hf("model.safetensors ... download it again", write("model.safetensors", b"")),
    "garbage": hf("model.safetensors ... download it again", write("model.safetensors", b"\xff" * 999)),
    "header a list": hf("model.safetensors ... download it again", write("model.safetensors", b"\2\0\0\0\0\0\0\0[]")),
    "bin with code": hf("pytorch_model.bin ... download it again", bin_file(Code)),
    "bin with code, legacy": hf("pytorch_model.bin ... again", bin_file(Code, _use_new_zipfile_serialization=False)),
    "bin a list": hf("pytorch_model.bin ... download it again", bin_file(lambda folder: [1, 2])),
    "bin without tensors": hf("model.embed_tokens.weight", bin_file(lambda folder: dict.fromkeys(SHAPES, 3))),
    "bin without names": hf("3 in", bin_file(lambda folder: {3: torch.ones(3)})),
    "bin of integers": hf(Q_PROJ, bin_file(lambda folder: {Q_PROJ: torch.ones(64, 64).long()})),
    "bin cut short": hf("pytorch_model.bin ... again", both(BIN, cut("pytorch_model.bin", lambda size: 9999))),
    "bin empty": hf("pytorch_model.bin ... again", both(BIN, write("pytorch_model.bin", b""))),
}  # fmt: skip
AS_USER = "setpriv --bounding-set=-dac_override --inh-caps=-dac_override" if os.geteuid() == 0 else ""
ALMIGHTY = "root may write everywhere here" if subprocess.run(["bash", "-c", f"{AS_USER} true"]).returncode else ""
DISK = {
    "full at once": Case(f"ulimit -f 1; {CONVERT}", "model.pth was not written"),
    "full": Case(f"ulimit -f 64; {CONVERT}", "model.pth was not written"),
    "full, nothing there before": Case(f"ulimit -f 64; {CONVERT}", "model.pth was not written", remove("model.pth")),
    "read-only": Case(
        f"chmod a-w $DIR; {AS_USER} {CONVERT}", "model.pth was not written (Permission denied)", skip=ALMIGHTY
    ),
    "a directory in the way": hf("model.pth", unlike("model.pth")),
}
QUANTIZED = QUANTIZER.replace("$DIR", "$DIR/../q")
QUANTIZED_AGAIN = QUANTIZED.replace("model.pth", "model_int8.pth")
QUANTIZE = {
    "missing": Case(QUANTIZER, "model.pth: No such file ... prepare.sh", remove("model.pth")),
    "cut short": Case(QUANTIZER, DAMAGED, cut("model.pth", lambda size: size / 2)),
    "quantized already": Case(f"cp -r $DIR $DIR/../q; {QUANTIZED} 2>/dev/null; {QUANTIZED_AGAIN}", "quantized already"),
    "group size": Case(f"{QUANTIZER} --mode int4 --groupsize 256", "group size 256 ... try another"),
    "NaN": Case(QUANTIZER, "NaN", checkpoint(lambda c: c["model"]["norm.weight"].fill_(float("nan")))),
    "text missing": Case(f"{QUANTIZER} --check $DIR/none.txt", "none.txt"),
    "text not UTF-8": Case(f"{QUANTIZER} --check $DIR/full.txt", "decode ... UTF-8", write("full.txt", b"\xff")),
    "text empty": Case(f"{QUANTIZER} --check $DIR/full.txt", "empty", write("full.txt", b"")),
    "disk full": Case(f"ulimit -f 64; {QUANTIZER}", "model_int8.pth was not written"),
}
PREPARE = {
    "nothing of that name": Case(
        "./scripts/prepare.sh no/such/directory", "no/such/directory ... repository ... directory"
    ),
    "no name": Case("./scripts/prepare.sh ''", "check the name ... repository ... directory"),
    "a parent directory": Case(
        "./scripts/prepare.sh ../no-such-directory", "check the name ... repository ... directory"
    ),
    "a file": Case("./scripts/prepare.sh $DIR/config.json", "config.json ... directory"),
    "an empty directory": Case("mkdir $DIR/../none; ./scripts/prepare.sh $DIR/../none", "config.json: No such file"),
    "another model": Case("cd $DIR; $ROOT/scripts/prepare.sh .", "model_type", config(model_type="mistral")),
    "no network": Case("./scripts/prepare.sh no-such-user/no-such-model", "no-such-model ... the network", env=OFFLINE),
    "no network, download": Case(DOWNLOAD, "the network", env=OFFLINE),
    "offline": Case(DOWNLOAD, "HF_HUB_OFFLINE", env={"HF_HUB_OFFLINE": "1"}),
}
USAGE = {
    **{flag: Case(f"{GENERATE} {flag}", flag.split()[0]) for flag in (
        "--max_new_tokens 0", "--max_new_tokens -1", "--max_new_tokens abc", "--max_new_tokens 1.5", "--max_new_tokens ''",
        "--temperature -1", "--temperature nan", "--temperature inf", "--temperature warm", "--top_k 0", "--top_k x",
        "--seed -1", "--seed 2147483648", "--num_samples 0", "--precision int3", "--device tpu", "--prompt", "--no_such_flag",
    )},
    "no CUDA": Case(f"{GENERATE} --device cuda", "--device: ... 'cuda' (choose from"),
    "no checkpoint named": Case("python generate.py", "--checkpoint_path"),
    "quantize, mode": Case(f"{QUANTIZER} --mode int3", "--mode"),
    "quantize, group size": Case(f"{QUANTIZER} --mode int4 --groupsize 33", "--groupsize"),
    "converter, precision": Case(f"{CONVERT} --precision int8", "--precision"),
    "converter, unknown flag": Case(f"{CONVERT} --mode int8", "--mode"),
    "converter, no directory named": Case("python -m scripts.convert_hf_checkpoint", "--checkpoint_dir"),
    "prepare, unknown flag": Case("./scripts/prepare.sh $DIR --mode int8", "--mode"),
    "download, no repository named": Case("python -m scripts.download", "repo"),
    "download, unknown flag": Case("python -m scripts.download a/b --token x", "--token"),
}  # fmt: skip
WORKS = {  # says: on stderr
    "one token": Case(f"{GENERATE} --max_new_tokens 1", "(1 tokens ... Stopped: max_new_tokens 1"),
    "the context is full": Case(f"{GENERATE} --prompt - < $DIR/full.txt", "(1 tokens ... Stopped: context"),
    "more of the top than there are": Case(f"{GENERATE} --top_k 1000000", "Stopped"),
    "last seed": Case(f"{GENERATE} --num_samples 2 --seed 2147483647", "Stopped"),
    "very hot": Case(f"{GENERATE} --temperature 1e39", "Stopped"),
    "a very long answer": Case(f"{GENERATE} --max_new_tokens {10**30}", "Stopped"),
    "prepare in a directory with a space": Case(
        "cp -r $DIR $DIR/../'a b'; ./scripts/prepare.sh $DIR/../'a b'", "wrote"
    ),
    "prepare --help": Case("./scripts/prepare.sh --help", "prepare.sh"),
    "a conversation in a locale without UTF-8": Case(
        f"printf 'caf\\xc3\\xa9\\n/stats' | LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {GENERATE} --interactive",
        "Prompt tokens: 7",
    ),
    "a locale without UTF-8": Case(
        f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {GENERATE} --prompt $'caf\\xc3\\xa9'", "Prompt tokens: 7"
    ),
    "no compiler, no kernels": Case(
        f"CXX=/no/such/g++ XDG_CACHE_HOME=$DIR/../cache {GENERATE}", "slower ... C++ compiler ... Stopped"
    ),
    "no place for kernels": Case(
        f"XDG_CACHE_HOME=/dev/null/cache {GENERATE}", "slower ... /dev/null/cache ... Stopped"
    ),
    "a conversation in which nobody speaks": Case(f"{GENERATE} --interactive < /dev/null", ""),
    "a conversation without standard input": Case(f"{GENERATE} --interactive <&-", ""),
    "a line longer than the context": Case(
        f"cat $DIR/full.txt $DIR/full.txt | {GENERATE} --interactive", "context ... shorten"
    ),
    "a line of a conversation not UTF-8": Case(
        f"printf 'caf\\xe9\\na' | {GENERATE} --interactive", "what was said ... UTF-8"
    ),
    "stdout closed": Case(f"{GENERATE} --max_new_tokens 1 >&-", "Stopped"),
    "stderr closed": Case(f"{GENERATE} --max_new_tokens 1 2>&-", ""),
}
REFUSED = {
    f"{group}: {name}": case
    for group, cases in {
        "checkpoint": CHECKPOINT, "prompt": PROMPT, "machine": MACHINE, "config.json": CONFIG_JSON, "tokenizer": TOKENIZER,
        "weights": WEIGHTS, "disk": DISK, "quantize": QUANTIZE, "prepare": PREPARE,
    }.items()
    for name, case in cases.items()
}  # fmt: skip
KILL = (
    "-c 'import os, signal, scripts.convert_hf_checkpoint as convert; {} = lambda *_: os.kill(os.getpid(), signal.{}); "
)
KILL += "convert.run(convert.main)'"
KILLED = {  # the converter, to which a signal comes at a call of what is named
    f"{by} in {call}": Case(CONVERT.replace("-m scripts.convert_hf_checkpoint", KILL.format(call, by)), "")
    for by in ("SIGINT", "SIGKILL")
    for call in ("convert.progress", "os.fsync", "os.replace")
}
CASES = {"refused": REFUSED, "output": OUTPUT, "usage": USAGE, "works": WORKS, "killed": KILLED}


# ---- Running them


@dataclass
class Outcome:
    status: int  # 128 + the signal that ended it
    stdout: bytes
    stderr: list[str]  # lines, without progress and empty ones
    all_stderr: str
    before: dict[str, str]  # what is in the folder: SHA-256, or "directory"
    after: dict[str, str]


def content(folder: Path) -> dict[str, str]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "directory" for n, p in files.items()}


def start(command: str, folder: Path, env: dict[str, str]) -> subprocess.Popen:
    """Start a command line in a process group of its own."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "TORCH"))}
    mine = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DIR": str(folder),
        "ROOT": str(ROOT),
        "HF_HOME": str(folder.parent),
        "TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "*",
    }
    return subprocess.Popen(
        ["bash", "-c", command], cwd=ROOT, env=inherited | mine | env, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, bytes, str]:
    """Exit status, rest of stdout, stderr. A process that hangs is a failure."""
    try:
        stdout, stderr = process.communicate(timeout=100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode % 256 if process.returncode >= 0 else 128 - process.returncode, stdout, stderr.decode()


FORKS = """
import gc, json, os, runpy, signal, sys
import sentencepiece, torch
gc.freeze()
while line := sys.stdin.readline():
    words, files = json.loads(line)
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    signal.alarm(100)
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_CREAT | os.O_RDWR), number)
    sys.argv = words[2:] if words[1] == "-m" else words[1:]
    if words[1] == "-m":
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[1], run_name="__main__")
    break
"""


class Forks:
    """Runs a script in a process forked from one that has imported torch: that import is most of the time of a bad input."""

    def __init__(self, folder: Path) -> None:
        self.process = start('exec python -c "$FORKS"', folder, {"FORKS": FORKS})

    def run(self, command: str, folder: Path) -> tuple[int, bytes, str]:
        files = [Path(os.devnull), folder.parent / "stdout", folder.parent / "stderr"]
        words = shlex.split(command.replace("$DIR", str(folder)))
        self.process.stdin.write(json.dumps([words, [str(file) for file in files]]).encode() + b"\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return status, files[1].read_bytes(), files[2].read_text()


def run_case(case: Case, base: Path, folder: Path, idle: SimpleQueue[Forks]) -> Outcome:
    shutil.copytree(base, folder)
    case.spoil(folder)
    before = content(folder)
    if re.fullmatch(r"python ([^$|<>;&]|[$]DIR)*", case.command) and "download" not in case.command and not case.env:
        forks = idle.get()
        status, stdout, stderr = forks.run(case.command, folder)
        idle.put(forks)
    else:
        status, stdout, stderr = finish(start(case.command, folder, case.env))
    lines = [line for line in stderr.splitlines() if line.strip() and not PROGRESS.fullmatch(line)]
    outcome = Outcome(status, stdout, lines, stderr, before, content(folder))
    shutil.rmtree(folder.parent)
    return outcome


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its model.pth, and a prompt that fills its context to the last token."""
    folder = tmp_path_factory.mktemp("base") / "model"
    folder.mkdir()
    write_tokenizer(folder)
    config()(folder)
    write_safetensors(folder / "model.safetensors", weights())
    full = "\N{LATIN SMALL LETTER Y WITH DIAERESIS}" * ((CONTEXT - 2) // 2)
    assert len(sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).encode(full)) == CONTEXT - 1
    (folder / "full.txt").write_text(full)
    assert finish(start(CONVERT, folder, {}))[0] == 0
    return folder


@pytest.fixture(scope="module")
def outcomes(
    base: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[Outcome]]]:
    """The outcomes of the cases that are selected, two at a time."""
    callspecs = [getattr(item, "callspec", None) for item in request.session.items if item.path == Path(__file__)]
    selected = {callspec.params.get("name") for callspec in callspecs if callspec}
    cases = {f"{kind}: {name}": case for kind, group in CASES.items() for name, case in group.items()}
    processes = [Forks(base) for _ in range(2)]
    idle: SimpleQueue[Forks] = SimpleQueue()
    for forks in processes:
        idle.put(forks)
    with ThreadPoolExecutor(len(processes)) as pool:
        yield {
            name: pool.submit(run_case, case, base, tmp_path_factory.mktemp("case") / "model", idle)
            for name, case in cases.items()
            if name in selected
        }
        pool.shutdown(cancel_futures=True)
    for forks in processes:
        finish(forks.process)


def names(kind: str) -> pytest.MarkDecorator:
    skips = {name: [pytest.mark.skip(case.skip)] if case.skip else [] for name, case in CASES[kind].items()}
    return pytest.mark.parametrize(
        "name", [pytest.param(f"{kind}: {name}", marks=marks) for name, marks in skips.items()]
    )


def assert_says(text: str, says: str) -> None:
    assert re.search(".*".join(map(re.escape, says.split(" ... "))), text), f"{says!r} is not in: {text}"


# ---- The properties


@names("refused")
def test_bad_input_ends_in_one_line_and_status_1(name: str, outcomes: dict[str, Future[Outcome]]) -> None:
    """One line on stderr that names cause and cure, status 1, nothing on stdout, and every file as it was."""
    outcome = outcomes[name].result()
    assert outcome.status == 1, outcome.all_stderr
    assert len(outcome.stderr) == 1, outcome.all_stderr
    assert_says(outcome.stderr[0], CASES["refused"][name.partition(": ")[2]].says)
    assert outcome.stdout == b""
    assert outcome.after == outcome.before


@names("usage")
def test_bad_flags_are_named_with_the_usage_and_status_2(name: str, outcomes: dict[str, Future[Outcome]]) -> None:
    """The last line says which flag is wrong, behind the usage; nothing has been read or written."""
    outcome = outcomes[name].result()
    assert outcome.status == 2, outcome.all_stderr
    program = re.match(r"usage: (.+?) (\[-h\]|REPO)", outcome.stderr[0])[1]
    assert outcome.stderr[-1].startswith(f"{program}: error: ")
    assert_says(outcome.stderr[-1], CASES["usage"][name.partition(": ")[2]].says)
    assert outcome.stdout == b""
    assert outcome.after == outcome.before


@names("output")
def test_output_that_nobody_takes_ends_in_one_line_and_status_1(
    name: str, outcomes: dict[str, Future[Outcome]]
) -> None:
    """A full disk or a closed pipe behind stdout ends generation without a traceback, and it does not hang."""
    outcome = outcomes[name].result()
    assert outcome.status == 1, outcome.all_stderr
    assert len(outcome.stderr) == 1, outcome.all_stderr
    assert_says(outcome.stderr[0], CASES["output"][name.partition(": ")[2]].says)


@names("works")
def test_what_is_only_unusual_works(name: str, outcomes: dict[str, Future[Outcome]]) -> None:
    """The edges of what is allowed: status 0, and nothing but progress on stderr."""
    outcome = outcomes[name].result()
    assert outcome.status == 0, outcome.all_stderr
    assert_says(outcome.all_stderr.replace("\n", " "), CASES["works"][name.partition(": ")[2]].says)


@names("killed")
def test_a_converter_that_is_killed_leaves_the_old_model(name: str, outcomes: dict[str, Future[Outcome]]) -> None:
    """SIGKILL at any moment leaves the old model.pth, Ctrl-C no temporary file either."""
    outcome = outcomes[name].result()
    assert outcome.status == (130 if "SIGINT" in name else 128 + signal.SIGKILL), outcome.all_stderr
    assert outcome.stderr == []
    left = {file: data for file, data in outcome.after.items() if not (file.endswith(".tmp") and "SIGKILL" in name)}
    assert left == outcome.before


def test_prepare_without_arguments_shows_its_usage() -> None:
    """Status 2, as argparse has it."""
    result = subprocess.run(["./scripts/prepare.sh"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"usage: ./scripts/prepare.sh .*\n", result.stderr)


def test_an_interrupt_ends_generation_with_status_130(base: Path) -> None:
    """Ctrl-C after the first byte of text: no traceback, no message."""
    process = start(f"exec {GENERATE} --num_samples 99999 --max_new_tokens 99999 --ignore_eos", base, {})
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    status, _, stderr = finish(process)
    assert status == 130
    assert all(PROGRESS.fullmatch(line) for line in stderr.splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "command, library", [(GENERATE, "libtorch"), (CONVERT, "libtorch"), (QUANTIZER, "libtorch"), (DOWNLOAD, "_ssl")]
)
def test_an_interrupt_while_libraries_are_imported_shows_no_traceback(base: Path, command: str, library: str) -> None:
    """Ctrl-C in the first second, before anything is seen."""
    process = start(f"exec {command}", base, OFFLINE)
    while library not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, b"", "")


@pytest.mark.parametrize(
    "pipe", ["2>/dev/null | head -c 1", "2>&1 >/dev/null | head -c 1", "2>&1 | head -c 1", "2>/dev/full | cat"]
)
def test_a_closed_pipe_does_not_hang(base: Path, pipe: str) -> None:
    """Whoever reads stdout or stderr may go away at any time."""
    status, _, stderr = finish(start(f"{GENERATE} --num_samples 20 {pipe}; exit ${{PIPESTATUS[0]}}", base, {}))
    assert status in (0, 1, 120)  # 120: Python could not write to stderr
    assert stderr == ""
