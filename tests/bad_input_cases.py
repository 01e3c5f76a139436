"""The cases of test_bad_input.py: command lines as they are typed, the damage done before, and the expected outcome.

$DIR is the case's own copy of a tiny model: Hugging Face files, and the model.pth that the converter made of them.
"""

import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from checkpoint import read_checkpoint
from quantize import quantize
from scripts.convert_tokenizer import sentencepiece_tokenizer

CONTEXT = 64
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 96,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
}
LLAMA_3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3_ROPE |= {"original_max_position_embeddings": 16}
LAYER = "model.layers.0."
HEAD, EMBEDDINGS, Q_PROJ = "lm_head.weight", "model.embed_tokens.weight", f"{LAYER}self_attn.q_proj.weight"
SHAPES = {
    EMBEDDINGS: (300, 64),
    "model.norm.weight": (64,),
    HEAD: (300, 64),
    f"{LAYER}self_attn.k_proj.weight": (64, 64),
    f"{LAYER}self_attn.v_proj.weight": (64, 64),
    Q_PROJ: (64, 64),
    f"{LAYER}self_attn.o_proj.weight": (64, 64),
    f"{LAYER}mlp.down_proj.weight": (64, 96),
    f"{LAYER}mlp.gate_proj.weight": (96, 64),
    f"{LAYER}mlp.up_proj.weight": (96, 64),
    f"{LAYER}input_layernorm.weight": (64,),
    f"{LAYER}post_attention_layernorm.weight": (64,),
}
FULL = "\N{LATIN SMALL LETTER Y WITH DIAERESIS}" * ((CONTEXT - 2) // 2)  # with BOM and a space: CONTEXT tokens
Spoil = Callable[[Path], object]  # damages the folder of a case


@dataclass(frozen=True)
class Case:
    """A command line, the damage done before it, and the expected outcome: nothing on stdout if it fails."""

    command: str
    says: str = ""  # in the one line on stderr that is no figure; " ... " stands for any text; none where it is empty
    spoil: Spoil = lambda folder: None
    status: int = 1
    stdin: bytes = b""
    shows: str = ""  # anywhere on stderr
    writes: tuple[str, ...] = ()  # the files that are new or changed
    same_as: str = ""  # a command line that has the same text on stdout
    left: Callable[[Path], bool] = lambda folder: True  # afterwards
    interrupt: tuple[str, str] = ()  # a signal that comes when this function is called
    marks: tuple = ()


# ---- Ways to spoil a folder


def weights() -> dict[str, Tensor]:
    """The tensors of the tiny model, by Hugging Face's names: the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write_tokenizer(folder: Path, vocab_size: int = 300, **options) -> None:
    sentences = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 20
    options |= {"byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2, "model_type": "bpe"}
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, vocab_size=vocab_size, **options
        )


def byte_level(
    size: int = 300, split: str = "", turned: bool = False, without: str = "", model: dict | None = None, **changes
) -> Spoil:
    """A tokenizer.json of byte-level BPE instead of tokenizer.model, with something changed in it or in its model."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    trained.decoder = decoders.ByteLevel()
    trained.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    content = json.loads(trained.to_str()) | changes
    content["model"] |= model or {}
    content["model"].pop(without, None)
    if turned:
        content["model"]["merges"].reverse()
    if split:
        splitting = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [splitting, content["pre_tokenizer"]]}
    return all_of(remove("tokenizer.model"), write("tokenizer.json", json.dumps(content)))


def all_of(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


def write(name: str, content: bytes | str) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def directory(name: str) -> Spoil:
    """A directory in the place of the file of that name."""
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


def cut(name: str, keep: float) -> Spoil:
    """Keep the first `keep` bytes; a float is a share of all, a negative number is taken off the end."""

    def spoil(folder: Path) -> None:
        size = (folder / name).stat().st_size
        os.truncate(folder / name, int(keep * size) if isinstance(keep, float) else keep if keep >= 0 else size + keep)

    return spoil


def config(*without: str, **changes: object) -> Spoil:
    kept = {"max_position_embeddings": CONTEXT} | CONFIG | changes
    return write("config.json", json.dumps({key: value for key, value in kept.items() if key not in without}))


def tensors(change: Callable[[dict], object] = lambda tensors: None, name: str = "model.safetensors") -> Spoil:
    """A file of weights with something changed."""

    def spoil(folder: Path) -> None:
        content = weights()
        change(content)
        save_file(content, folder / name)

    return spoil


def shards(index: dict | str | None, **files: list[str]) -> Spoil:
    """These tensors in model-NAME.safetensors instead of all in one file, and an index with that map."""

    def spoil(folder: Path) -> None:
        content = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        for name, names in files.items():
            save_file({each: content[each] for each in names}, folder / f"model-{name}.safetensors")
        if index is not None:
            text = index if isinstance(index, str) else json.dumps({"weight_map": index})
            (folder / "model.safetensors.index.json").write_text(text)

    return spoil


def bin_file(make: Callable[[Path], object], **options: bool) -> Spoil:
    """pytorch_model.bin instead of model.safetensors."""
    save = lambda folder: torch.save(make(folder), folder / "pytorch_model.bin", **options)  # noqa: E731
    return all_of(remove("model.safetensors"), save)


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


def linked(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "model.pth").rename(folder / "elsewhere" / "real.pth")
    (folder / "model.pth").symlink_to("elsewhere/real.pth")


class Code:
    """Makes a directory when it is unpickled by a program that trusts its input."""

    def __init__(self, folder: Path) -> None:
        self.marker = folder / "code was run"

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def stored(folder: Path) -> dict:
    """The content of model.pth."""
    return torch.load(folder / "model.pth", weights_only=True)


def holds(**expected: Tensor) -> Callable[[Path], bool]:
    """A function: folder -> True if model.pth holds these weights as its embeddings and its output layer."""
    return lambda folder: all(
        torch.equal(stored(folder)["model"][f"{name}.weight"], tensor.bfloat16()) for name, tensor in expected.items()
    )


# ---- The cases

GENERATE = "python generate.py --device cpu --checkpoint_path $DIR/model.pth"
F32 = "--precision float32"
PREFILL = GENERATE.replace("generate", "generate_prefill")
CONVERT = "python -m scripts.convert_hf_checkpoint --checkpoint_dir $DIR"
QUANTIZE = "python quantize.py --checkpoint_path $DIR/model.pth"
PREPARE = "./scripts/prepare.sh"


OURS = "prepare.sh REPO or quantize.py writes a checkpoint"
AGAIN = "its tensors are not those of its own config: convert or quantize it again"
POSITIVE = "must be a positive number below 2**31"
WHOLE = "give a directory in Hugging Face layout, downloaded whole"
DOWNLOAD = "damaged or no file of weights: download it again"
PIECES = "a tokenizer.model of sentencepiece is needed, or a tokenizer.json of BPE"
TOKENIZER_FILES = "the files of its tokenizer are damaged: download them again"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SHORTEN = "but a context of 64: shorten"
SHAPES_OF_16 = "floating point of 16 bits or more, which is all that is supported"
UTF8 = "'utf-8' codec can't decode ... give some text in UTF-8"
CONVERTED = {"status": 0, "writes": ("model.pth",), "shows": "wrote "}
SLOW = (pytest.mark.slow,)
NO_CUDA = (pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),)
AS_USER = "setpriv --bounding-set=-dac_override --inh-caps=-dac_override" if os.geteuid() == 0 else ""
ALMIGHTY = subprocess.run(["bash", "-c", f"{AS_USER} true"], capture_output=True).returncode != 0
NOT_ROOT = (pytest.mark.skipif(ALMIGHTY, reason="root may write everywhere here"),)


def header(**changes: object) -> Spoil:
    return checkpoint(lambda content: content.update(changes))


def shape(**changes: object) -> Spoil:
    return checkpoint(lambda content: content["config"].update(changes))


def tokenizer(**changes: object) -> Spoil:
    return checkpoint(lambda content: content["tokenizer"].update(changes))


def earlier_version(**changes: object) -> Spoil:
    """A copy of model.pth with the names of earlier versions."""

    def rename(content: dict) -> None:
        names = {"rope_low_freq_factor": "rope_low", "rope_high_freq_factor": "rope_high"}
        names["rope_original_max_position_embeddings"] = "rope_positions"
        content["config"] = {names.get(name, name): value for name, value in content["config"].items()}
        new = content["tokenizer"]
        old = {"proto": new["model"]["model_proto"], "added": new["added_tokens"], "special": new["special_tokens"]}
        old |= {"bos": new["bos_token"], "eos": new["eos_token"], "begins": new["add_bos_token"]}
        old |= {"ends": new["eos_ids"], "template": new["chat_template"], "splits": None, "whole_words": False}
        content["tokenizer"] = old | {"legacy": new["legacy"]} | changes

    return all_of(lambda folder: shutil.copy(folder / "model.pth", folder / "new.pth"), checkpoint(rename))


def norm(weight: object) -> Spoil:
    return checkpoint(lambda content: content["model"].update({"norm.weight": weight}))


CHECKPOINT = {  # the lines of generate.py about model.pth
    "missing": (f"model.pth: No such file or directory ... {OURS}", remove("model.pth")),
    "a directory": (f"model.pth: Is a directory ... {OURS}", directory("model.pth")),
    "a text file": (f"model.pth: ... {OURS}", write("model.pth", "version https://git-lfs.github.com/spec/v1\n" * 3)),
    "empty": (f"model.pth: ... {OURS}", write("model.pth", b"")),
    "safetensors": (f"model.pth: ... {OURS}", lambda f: shutil.copy(f / "model.safetensors", f / "model.pth")),
    "TorchScript": (f"model.pth: ... {OURS}", torch_script),
    "a state_dict": (f"model.pth: KeyError: 'model'; ./scripts/{OURS}", saved(lambda folder: weights())),
    "a legacy state_dict": (f"model.pth: ... {OURS}", saved(lambda f: weights(), _use_new_zipfile_serialization=False)),
    "a list": (f"model.pth: ... {OURS}", saved(lambda folder: [1, 2, 3])),
    "other keys": (
        f"model.pth: KeyError: 'model'; ./scripts/{OURS}",
        saved(lambda folder: {"state_dict": weights(), "epoch": 3}),
    ),
    "code": (f"model.pth: ... {OURS}", saved(Code)),
    "legacy code": (f"model.pth: ... {OURS}", saved(Code, _use_new_zipfile_serialization=False)),
    "cut to 1 byte": (f"model.pth: ... {OURS}", cut("model.pth", 1)),
    "cut to 1/10": (f"model.pth: ... {OURS}", cut("model.pth", 0.1)),
    "cut to 1/2": (f"model.pth: ... {OURS}", cut("model.pth", 0.5)),
    "cut to 9/10": (f"model.pth: ... {OURS}", cut("model.pth", 0.9)),
    "cut by 1 byte": (f"model.pth: ... {OURS}", cut("model.pth", -1)),
    "other dim": (f"model.pth: {AGAIN}", shape(dim=32)),
    "other n_layer": (f"model.pth: {AGAIN}", shape(n_layer=2)),
    "other vocab_size": (f"model.pth: {AGAIN}", shape(vocab_size=512)),
    "negative dim": (f"model.pth: ... {OURS}", shape(dim=-64)),
    "huge dim": (f"model.pth: {AGAIN}", shape(dim=10**13)),
    "dim a string": (f"model.pth: TypeError ... {OURS}", shape(dim="64")),
    "unknown key in config": (f"model.pth: TypeError: ... positional arguments ... {OURS}", shape(bias=True)),
    "config is a list": (f"model.pth: AttributeError: 'list' ... {OURS}", header(config=[1])),
    "no config": (f"model.pth: KeyError: 'config' ... {OURS}", checkpoint(lambda c: c.pop("config"))),
    "no id": (f"model.pth: {AGAIN}", checkpoint(lambda c: c.pop("id"))),
    "a tensor less": (f"model.pth: {AGAIN}", checkpoint(lambda c: c["model"].pop("norm.weight"))),
    "a number for a tensor": (f"model.pth: ... 'int' ... {OURS}", norm(3)),
    "integer weights": (f"model.pth: {AGAIN}", norm(torch.ones(64).int())),
    "quantization of others": (f"model.pth: {AGAIN}", header(quantization={"mode": "int8"})),
    "quantization a string": (f"model.pth: TypeError ... {OURS}", header(quantization="int8")),
    "quantization empty": (f"model.pth: KeyError: 'mode' ... {OURS}", header(quantization={})),
    "quantization unknown": (f"model.pth: ... {OURS}", header(quantization={"mode": "gptq"})),
    "no group size": (f"model.pth: KeyError: 'groupsize' ... {OURS}", header(quantization={"mode": "int4"})),
    "group size 0": (f"model.pth: ZeroDivisionError ... {OURS}", header(quantization={"mode": "int4", "groupsize": 0})),
    "group size 7": ("group size 7 does not divide", header(quantization={"mode": "int4", "groupsize": 7})),
    "garbage tokenizer": (f"model.pth: ... {OURS}", header(tokenizer=b"garbage")),
    "empty tokenizer": (f"model.pth: ... {OURS}", header(tokenizer={})),
    "garbage for a model of sentencepiece": (f"model.pth: ... {OURS}", tokenizer(model={"model_proto": b"garbage"})),
    "unknown key in tokenizer": (f"model.pth: ... unexpected keyword argument 'size' ... {OURS}", tokenizer(size=300)),
    "byte-level BPE of an earlier version": (
        "model.pth: an earlier version wrote its tokenizer: convert it again with ./scripts/prepare.sh",
        earlier_version(splits=[""]),
    ),
    "NaN": (
        "logits are not finite: try --precision bfloat16, or another checkpoint",
        norm(torch.full((64,), torch.nan)),
    ),
}
LARGE = checkpoint(lambda content: content["model"]["layers.0.feed_forward.w2.weight"].mul_(1e6))
PROMPT = {
    "too long": Case(f"{GENERATE} --prompt -", SHORTEN, stdin=2 * FULL.encode()),
    "one token too long": Case(f"{GENERATE} --prompt -", f"65 tokens, {SHORTEN}", stdin=FULL.encode() + b"z"),
    "the second too long": Case(f"{GENERATE} --prompt a --prompt -", SHORTEN, stdin=2 * FULL.encode()),
    "not UTF-8": Case(f"{GENERATE} --prompt caf\udce9", f"--prompt: ... {UTF8}"),
    "not UTF-8, on stdin": Case(f"{GENERATE} --prompt -", f"--prompt: ... {UTF8}", stdin=b"caf\xe9"),
    "half a character, on stdin": Case(f"{GENERATE} --prompt -", f"--prompt: ... {UTF8}", stdin=b"caf\xc3"),
    "system not UTF-8": Case(f"{GENERATE} --system caf\udce9", f"--system: ... {UTF8}"),
    "system too long": Case(f"{GENERATE} --interactive --system {2 * FULL}", SHORTEN, stdin=b"a"),
    "system from where the conversation comes": Case(
        f"{GENERATE} --interactive --system -", "--system -: standard input is the conversation; give a text, or @FILE"
    ),
    "empty": Case(f"{GENERATE} --prompt ''", "--prompt is empty: give some text in UTF-8"),
    "empty, on stdin": Case(f"{GENERATE} --prompt -", "--prompt is empty: give some text in UTF-8"),
    "an empty line, on stdin": Case(f"{GENERATE} --prompt -", "--prompt is empty: give some text", stdin=b"\n"),
    "standard input twice": Case(f"{GENERATE} --prompt - --prompt -", "--prompt is empty: give some text", stdin=b"a"),
    "stdin closed": Case(f"{GENERATE} --prompt - <&-", "--prompt is empty: give some text in UTF-8"),
    "file missing": Case(
        f"{GENERATE} --prompt @$DIR/none", "--prompt @ ... No such file ... give some text in UTF-8, or @FILE"
    ),
    "file a directory": Case(
        f"{GENERATE} --prompt @$DIR", "--prompt @ ... Is a directory; give some text in UTF-8, or @FILE"
    ),
    "no file": Case(f"{GENERATE} --prompt @", "--prompt @: Is a directory; give some text in UTF-8, or @FILE"),
    "file empty": Case(f"{GENERATE} --prompt @$DIR/p", "--prompt is empty: give some text", write("p", "")),
    "file not UTF-8": Case(f"{GENERATE} --prompt @$DIR/p", f"--prompt @ ... {UTF8}", write("p", b"caf\xe9")),
    "no stop text": Case(f"{GENERATE} --stop ''", "--stop is empty: give some text in UTF-8"),
    "part of a character as stop text": Case(
        f"{GENERATE} --stop \"$(printf '\\342')\"", "--stop: ... give some text in UTF-8"
    ),
    "system missing": Case(
        f"{GENERATE} --system @$DIR/none", "--system @ ... No such file ... give some text in UTF-8, or @FILE"
    ),
    "float16 overflows": Case(f"{GENERATE} --precision float16", "not finite: try --precision bfloat16", LARGE),
    "bfloat16 does not": Case(f"{GENERATE} --precision bfloat16", spoil=LARGE, status=0, shows="Stopped"),
}
DRAFT = f"{GENERATE} --draft_checkpoint_path $DIR/draft.pth"


def other_draft(folder: Path) -> None:
    write_tokenizer(folder, 299)
    other = {"tokenizer": asdict(sentencepiece_tokenizer((folder / "tokenizer.model").read_bytes()))}
    torch.save(stored(folder) | other, folder / "draft.pth")


MACHINE = {
    "draft missing": Case(DRAFT, f"draft.pth: No such file ... {OURS}"),
    "draft of another vocabulary": Case(DRAFT, "draft.pth has another vocabulary: choose a draft", other_draft),
    "no memory": Case(
        f"ulimit -v 64000000; {GENERATE} --max_new_tokens 1000000000",
        "there is not enough memory: a smaller or quantized model, or a shorter --context, takes less",
        shape(max_seq_length=10**9),
    ),
    "no compiler": Case(
        f"CXX=/no/such/g++ {GENERATE} {F32} --compile_prefill",
        "torch.compile: ... /no/such/g++ ... do without --compile[_prefill]",
        marks=SLOW,
    ),
    "no compiler, and no need of one": Case(
        f"CXX=no-such-g++ {GENERATE} {F32} --compile", status=0, shows="Decode: ", marks=SLOW
    ),
    "empty PATH": Case(
        f"P=$(which python); PATH= $P {GENERATE[7:]} {F32} --compile_prefill",
        "torch.compile: ... 'g++' ... do without --compile[_prefill]",
        marks=SLOW,
    ),
    "a compiler that fails": Case(
        f"CXX=false {GENERATE} {F32} --compile_prefill",
        "torch.compile: ... 'false' ... do without --compile[_prefill]",
        marks=SLOW,
    ),
    "prefixes of no model": Case(PREFILL, f"model.pth: No such file ... {OURS}", remove("model.pth")),
}
OUTPUT = {
    "disk full": Case(f"{GENERATE} > /dev/full", "No space left on device"),
    "reader gone": Case(
        f"{GENERATE} --num_samples 999 | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}", "Broken pipe"
    ),
    **{
        f"errors {pipe}": Case(
            f"{GENERATE} --num_samples 20 {pipe} > /dev/null; exit ${{PIPESTATUS[0]}}", status=120
        )  # Python's, where stderr takes nothing
        for pipe in ("2>&1 >/dev/null | head -c 1", "2>&1 | head -c 1", "2>/dev/full | cat")
    },
    "stdout closed": Case(f"{GENERATE} --max_new_tokens 1 >&-", status=0, shows="Stopped"),
    "stderr closed": Case(f"{GENERATE} --max_new_tokens 1 2>&-", status=0),
}
CONFIG_JSON = {  # the lines of the converter about config.json
    "missing": (f"config.json: No such file or directory; {WHOLE}", remove("config.json")),
    "a directory": (f"config.json: Is a directory; {WHOLE}", directory("config.json")),
    "not JSON": (f"config.json: JSONDecodeError: ... {WHOLE}", cut("config.json", 0.5)),
    "empty": (f"config.json: JSONDecodeError: ... {WHOLE}", write("config.json", "")),
    "not text": (f"config.json: UnicodeDecodeError: ... {WHOLE}", write("config.json", b"\xff\xfe\x00")),
    "a list": (f"config.json: ... 'list' ... {WHOLE}", write("config.json", "[1, 2]")),
    **{f"{key} missing": (f"config.json: KeyError: '{key}'; {WHOLE}", config(key)) for key in CONFIG},
    "hidden_size a string": (f"config.json: TypeError: ... {WHOLE}", config(hidden_size="64")),
    "hidden_size negative": (f"dim = -64 in the config: it {POSITIVE}", config(hidden_size=-64)),
    "hidden_size zero": (f"dim = 0 in the config: it {POSITIVE}", config(hidden_size=0)),
    "hidden_size huge": (f"dim = {10**13} in the config: it {POSITIVE}", config(hidden_size=10**13)),
    "num_attention_heads zero": (f"config.json: ZeroDivisionError: ... {WHOLE}", config(num_attention_heads=0)),
    "num_attention_heads odd": ("head_dim even in the config: ... n_head=3", config(num_attention_heads=3)),
    "num_hidden_layers a fraction": (f"n_layer = 1.5 in the config: it {POSITIVE}", config(num_hidden_layers=1.5)),
    "num_hidden_layers true": (f"n_layer = True in the config: it {POSITIVE}", config(num_hidden_layers=True)),
    "vocab_size negative": (f"vocab_size = -1 in the config: it {POSITIVE}", config(vocab_size=-1)),
    "vocab_size null": (f"vocab_size = None in the config: it {POSITIVE}", config(vocab_size=None)),
    "rms_norm_eps a string": (f"norm_eps = '1e-5' in the config: it {POSITIVE}", config(rms_norm_eps="1e-5")),
    "rms_norm_eps not a number": (f"norm_eps = nan in the config: it {POSITIVE}", config(rms_norm_eps=float("nan"))),
    "no positions": (f"max_seq_length = 0 in the config: it {POSITIVE}", config(max_position_embeddings=0)),
    "num_key_value_heads no divisor": ("n_head must be a multiple of n_kv_head", config(num_key_value_heads=3)),
    "rope_theta a list": (f"rope_theta = [1] in the config: it {POSITIVE}", config(rope_theta=[1])),
    "model_type": ("model_type = 'qwen2' is not supported: this program runs plain Llama", config(model_type="qwen2")),
    **{
        f"eos_token_id {value!r}": ("it must be a number or a list of numbers", config(eos_token_id=value))
        for value in ("</s>", [2, None], 2.5, {"id": 2})
    },
    "attention_bias": ("attention_bias = True is not supported: this program runs", config(attention_bias=True)),
    "mlp_bias": ("mlp_bias = True is not supported: this program runs plain Llama", config(mlp_bias=True)),
    "hidden_act": ("hidden_act = 'gelu' is not supported: this program runs plain", config(hidden_act="gelu")),
    "quantization_config": (
        "quantization_config = {'quant_method': 'gptq'} is not supported: this program",
        config(quantization_config={"quant_method": "gptq"}),
    ),
    **{
        f"{key} {name}": (
            f"rope scaling = '{name}' is not supported: this program",
            config(**{key: {field: name, "factor": 2.0}}),
        )
        for name in ("dynamic", "longrope", "yarn")
        for key, field in (("rope_scaling", "type"), ("rope_parameters", "rope_type"))
    },
    "rope linear without factor": (
        f"config.json: KeyError: 'factor'; {WHOLE}",
        config(rope_scaling={"type": "linear"}),
    ),
    "rope llama3 without its factors": (
        f"config.json: KeyError: 'low_freq_factor'; {WHOLE}",
        config(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
    ),
    "rope llama3 that is turned round": (
        "low_freq_factor must be less than high_freq_factor in the config",
        config(rope_scaling=LLAMA_3_ROPE | {"low_freq_factor": 4.0}),
    ),
    "rope linear by 0": (
        f"rope_scale = 0 in the config: it {POSITIVE}",
        config(rope_scaling={"type": "linear", "factor": 0}),
    ),
    "rope a string": (f"config.json: AttributeError: 'str' ... {WHOLE}", config(rope_scaling="linear")),
}
TOKENIZER = {  # the lines of the converter about the tokenizer's files
    "missing": (f"tokenizer.model: No such file or directory; {PIECES}", remove("tokenizer.model")),
    "garbage": (f"tokenizer.model: RuntimeError: ... {PIECES}", write("tokenizer.model", b"\x00garbage" * 9)),
    "empty": (f"tokenizer.model: RuntimeError: ... {PIECES}", write("tokenizer.model", b"")),
    "a directory": (f"tokenizer.model: Is a directory; {PIECES}", directory("tokenizer.model")),
    "too many pieces": (
        "310 tokens, but config.json has a vocab_size of 300",
        lambda folder: write_tokenizer(folder, 310),
    ),
    "no token to begin with": ("the ids of BOS and EOS are [-1, 2]", lambda folder: write_tokenizer(folder, bos_id=-1)),
    **{
        f"{name} cut short": (f"{name}: JSONDecodeError: ... download it again", write(name, '{"a'))
        for name in ("tokenizer_config.json", "tokenizer.json", "added_tokens.json")
    },
    "tokenizer_config a list": ("tokenizer_config.json: ... download it again", write("tokenizer_config.json", "[1]")),
    "a template of no Jinja": (
        "the chat template: TemplateSyntaxError: ... mend or delete it",
        write("chat_template.jinja", "{% for %}"),
    ),
    "a template of another engine's": (
        "the chat template: TemplateSyntaxError: Encountered unknown tag 'think' ... mend or delete it",
        write("chat_template.jinja", "{% think %}{% endthink %}"),
    ),
    "a template without the question": (
        "the chat template: it does not show a question",
        write("chat_template.jinja", "hello"),
    ),
    "a template that is not text": (
        f"'utf-8' codec can't decode ... {TOKENIZER_FILES}",
        write("chat_template.jinja", b"\xff"),
    ),
    "a template with half a character": (
        "the chat template: UnicodeEncodeError: ... mend or delete it",
        write("tokenizer_config.json", r'{"chat_template": "\ud800"}'),
    ),
    "an added token that takes spaces": (
        "rstrip = True is not supported",
        write("tokenizer_config.json", '{"added_tokens_decoder": {"3": {"content": "<x>", "rstrip": true}}}'),
    ),
    "Unigram": ("tokenizer.json: type = 'Unigram' is not supported", byte_level(model={"type": "Unigram"})),
    "WordPiece": ("tokenizer.json: type = 'WordPiece' is not supported", byte_level(model={"type": "WordPiece"})),
    "byte_fallback": ("byte_fallback with pieces that are not", byte_level(model={"byte_fallback": True})),
    "dropout": ("dropout = 0.1 is not supported", byte_level(model={"dropout": 0.1})),
    "a normalizer": ("normalizer = {'type': 'NFC'} is not supported", byte_level(normalizer={"type": "NFC"})),
    "no pre-tokenizer": (f"tokenizer.json: KeyError: 'pre_tokenizer'; {PIECES}", byte_level(pre_tokenizer=None)),
    "a pre-tokenizer with ByteLevel before its end": (
        "is not supported: ByteLevel must be its end",
        byte_level(pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTES, {"type": "Digits"}]}),
    ),
    "a pre-tokenizer without ByteLevel": (
        "is not supported: ByteLevel must be its end",
        byte_level(pre_tokenizer={"type": "Digits", "individual_digits": True}),
    ),
    "an unknown token, and bytes without one": (
        "unk_token with a vocabulary that lacks some bytes is not supported",
        byte_level(model={"unk_token": "a", "vocab": {"a": 0, "b": 1}, "merges": []}),
    ),
    **{
        f"{name} {content}": (says, all_of(byte_level(), write(name, content)))
        for name, content, says in (
            ("tokenizer_config.json", '{"added_tokens_decoder": {"3": "x"}}', TOKENIZER_FILES),
            ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "x"}}}', "invalid literal for int()"),
            ("tokenizer_config.json", '{"added_tokens_decoder": {"-3": {"content": "x"}}}', "is no token"),
            ("tokenizer_config.json", '{"bos_token": {"x": 1}}', TOKENIZER_FILES),
            ("tokenizer_config.json", '{"chat_template": ["x"]}', TOKENIZER_FILES),
            ("tokenizer_config.json", '{"chat_template": 3}', TOKENIZER_FILES),
            ("added_tokens.json", '{"x": "3"}', "is no token"),
        )
    },
    "chat_template.jinja a directory": (
        f"Is a directory; {TOKENIZER_FILES}",
        lambda folder: (folder / "chat_template.jinja").mkdir(),
    ),
    "an unknown pre-tokenizer": (
        "the pre-tokenizer {'type': 'Metaspace'} is not supported",
        byte_level(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Metaspace"}, BYTES]}),
    ),
    "a pre-tokenizer that adds a space": (
        "the pre-tokenizer {'type': 'ByteLevel', 'add_prefix_space': True} is not supported",
        byte_level(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
    ),
    "BPE of characters": ("type = 'Metaspace' is not supported", byte_level(decoder={"type": "Metaspace"})),
    **{
        f"a split by {pattern}": (f"{says} in the pre-tokenizer's ... is not supported", byte_level(split=pattern))
        for pattern, says in (
            (r"\w+", r"\w"),
            ("[[:alpha:]]", "[["),
            ("[a-z&&b]", "&&"),
            (r"\bx", r"\b"),
            ("[a[b]]", "[a["),
            (r"[^\S\r\n]+", r"[^\S"),
        )
    },
    "a split with a group": ("the group in the pre-tokenizer's ... is not supported", byte_level(split="(a)|b")),
    "a split by a script": (f"tokenizer.json: error: bad escape \\p ... {PIECES}", byte_level(split=r"\p{Han}+")),
    "vocabulary a list": (f"tokenizer.json: AttributeError: 'list' ... {PIECES}", byte_level(model={"vocab": [1]})),
    "a merge that makes no token": (
        "the merge of 'b' and 'a' makes no token of the vocabulary",
        byte_level(model={"vocab": {"a": 0, "b": 1}, "merges": ["b a"], "unk_token": None}),
    ),
    "no merges": (f"tokenizer.json: KeyError: 'merges'; {PIECES}", byte_level(without="merges")),
    "more tokens than the model": ("400 tokens, but config.json has a vocab_size of 300", byte_level(size=400)),
}
HALF = list(SHAPES)[::2], list(SHAPES)[1::2]
INDEX = dict.fromkeys(HALF[0], "model-a.safetensors") | dict.fromkeys(HALF[1], "model-b.safetensors")
BIN = bin_file(lambda folder: weights())
Q_NAMES = f"{LAYER}self_attn.q_proj.bias"
WEIGHTS = {  # the lines of the converter about the weights
    "none": ("has no weights in safetensors or .bin: download it again", remove("model.safetensors")),
    "a shard less": ("weight in ... is missing: download it again", shards(None, a=HALF[0])),
    "a shard that only the index has": (
        "model-b.safetensors: No such file ... download it again",
        shards(INDEX, a=HALF[0]),
    ),
    "an index cut short": ("index.json: JSONDecodeError: ... download it again", shards('{"weight_map": {', a=HALF[0])),
    "an index without a map": ("index.json: KeyError: 'weight_map'; download it again", shards("{}", a=HALF[0])),
    "an index of numbers": ("index.json: TypeError: ... download it again", shards({Q_PROJ: 3}, a=HALF[0])),
    "a tensor in two shards": (
        f"{Q_PROJ} is in another file as well: delete those that are not of this model",
        shards(None, a=list(SHAPES), b=[Q_PROJ]),
    ),
    "a tensor less": (
        "model.norm.weight in ... is missing: download it again",
        tensors(lambda t: t.pop("model.norm.weight")),
    ),
    "no output layer": (
        f"{HEAD} in ... is missing: if it is the embeddings, set tie_word_embeddings to true",
        tensors(lambda t: t.pop(HEAD)),
    ),
    "a tensor more": (
        f"{Q_NAMES} in ... is of no layer that config.json has",
        tensors(lambda t: t.update({Q_NAMES: torch.ones(64)})),
    ),
    "a layer more": (
        "model.layers.1.mlp.up_proj.weight in ... is of no layer that config.json has",
        tensors(lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(96, 64)})),
    ),
    "other shape": (
        f"{Q_PROJ} has the shape [32, 64], but config.json asks for [64, 64]",
        tensors(lambda t: t.update({Q_PROJ: torch.ones(32, 64)})),
    ),
    "header cut short": (f"model.safetensors: ... {DOWNLOAD}", cut("model.safetensors", 100)),
    "length cut short": (f"model.safetensors: ... {DOWNLOAD}", cut("model.safetensors", 5)),
    "data cut short": ("its file is cut short or damaged: download it again", cut("model.safetensors", -1)),
    "no bytes": (f"model.safetensors: ... {DOWNLOAD}", write("model.safetensors", b"")),
    "garbage": (f"model.safetensors: ... {DOWNLOAD}", write("model.safetensors", b"\xff" * 999)),
    "header a list": (f"model.safetensors: ... {DOWNLOAD}", write("model.safetensors", b"\2\0\0\0\0\0\0\0[]")),
    "header without shapes": (
        f"model.safetensors: ... {DOWNLOAD}",
        write("model.safetensors", b'\7\0\0\0\0\0\0\0{"a":1}'),
    ),
    "bin with code": (f"pytorch_model.bin: ... {DOWNLOAD}", bin_file(Code)),
    "legacy bin with code": (
        f"pytorch_model.bin: ... {DOWNLOAD}",
        bin_file(Code, _use_new_zipfile_serialization=False),
    ),
    "bin a list": (f"pytorch_model.bin: ... {DOWNLOAD}", bin_file(lambda folder: [1, 2])),
    "bin without tensors": (
        "cut short, damaged or no file of weights: download it again",
        bin_file(lambda folder: dict.fromkeys(SHAPES, 3)),
    ),
    "bin without names": ("3 in ... is of no layer", bin_file(lambda folder: {3: torch.ones(3)})),
    "bin of integers": (
        f"{Q_PROJ} is not stored in {SHAPES_OF_16}",
        bin_file(lambda f: weights() | {Q_PROJ: torch.ones(64, 64).long()}),
    ),
    "bin cut short": (f"pytorch_model.bin: ... {DOWNLOAD}", all_of(BIN, cut("pytorch_model.bin", 9999))),
    "bin empty": (f"pytorch_model.bin: ... {DOWNLOAD}", all_of(BIN, write("pytorch_model.bin", b""))),
}
INTEGERS = {
    str(dtype): Case(
        CONVERT,
        f"{Q_PROJ} is not stored in {SHAPES_OF_16}",
        tensors(lambda t, dtype=dtype: t.update({Q_PROJ: torch.ones(64, 64).to(dtype)})),
    )
    for dtype in (torch.int64, torch.int8, torch.float8_e4m3fn)
}
FOLDER = {
    "no directory": Case(f"{CONVERT}/none", f"none/config.json: No such file or directory; {WHOLE}"),
    "a file for the directory": Case(f"{CONVERT}/config.json", f"config.json/config.json: Not a directory; {WHOLE}"),
    "full at once": Case(f"ulimit -f 1; {CONVERT}", "model.pth was not written: it takes 0.00 GB of disk"),
    "full": Case(f"ulimit -f 64; {CONVERT}", "model.pth was not written: it takes 0.00 GB of disk"),
    "full, nothing there before": Case(
        f"ulimit -f 64; {CONVERT}", "model.pth was not written: it takes", remove("model.pth")
    ),
    "read-only": Case(f"chmod a-w $DIR; {AS_USER} {CONVERT}", "Permission denied: ... model.pth", marks=NOT_ROOT),
    "a directory in the way": Case(CONVERT, "Is a directory: ... model.pth", directory("model.pth")),
    "tokenizer_config.json a directory": Case(
        CONVERT, "tokenizer_config.json: Is a directory; download", lambda f: (f / "tokenizer_config.json").mkdir()
    ),
}
QUANTIZED = {
    "missing": Case(QUANTIZE, f"model.pth: No such file or directory ... {OURS}", remove("model.pth")),
    "cut short": Case(QUANTIZE, f"model.pth: ... {OURS}", cut("model.pth", 0.5)),
    "calibration text missing": Case(
        f"{QUANTIZE} --mode int4 --calibrate $DIR/none",
        "--calibrate @ ... No such file ... give some text in UTF-8, or @FILE",
    ),
    "calibration text empty": Case(
        f"{QUANTIZE} --mode int4 --calibrate $DIR/p", "--calibrate is empty: give some text in UTF-8", write("p", "\n")
    ),
    "calibration text not UTF-8": Case(
        f"{QUANTIZE} --mode int4 --calibrate $DIR/p", f"--calibrate @ ... {UTF8}", write("p", b"caf\xe9")
    ),
    "calibration text a directory": Case(
        f"{QUANTIZE} --mode int4 --calibrate $DIR", "--calibrate @ ... Is a directory"
    ),
    "quantized already": Case(
        QUANTIZE,
        "model.pth is quantized already: give the original",
        lambda f: quantize(read_checkpoint(f / "model.pth"), {"mode": "int8"}, "cpu", f / "model.pth"),
    ),
    "group size": Case(
        f"{QUANTIZE} --mode int4 --groupsize 256",
        "group size 256 does not divide the 64 inputs of ... choose a smaller one, or int8",
    ),
    "an empty name": Case(f"{QUANTIZE} --checkpoint_path ''", f"Is a directory; ./scripts/{OURS}"),
    "NaN": Case(
        QUANTIZE, "norm.weight holds NaN or infinity: get the checkpoint again", norm(torch.full((64,), torch.nan))
    ),
    "infinity": Case(QUANTIZE, "norm.weight holds NaN or infinity: get the", norm(torch.full((64,), torch.inf))),
    "disk full": Case(f"ulimit -f 64; {QUANTIZE}", "model_int8.pth was not written: it takes 0.00 GB of disk"),
    "a directory in the way": Case(
        QUANTIZE, "Is a directory: ... model_int8.pth", lambda f: (f / "model_int8.pth").mkdir()
    ),
}
PREPARED = {
    "an empty directory": Case(
        f"mkdir $DIR/../none; {PREPARE} $DIR/../none", f"config.json: No such file or directory; {WHOLE}"
    ),
    "another model": Case(
        f"cd $DIR; $ROOT/{PREPARE} .", "model_type = 'qwen2' is not supported", config(model_type="qwen2")
    ),
    "no arguments": Case(PREPARE, shows="usage: ./scripts/prepare.sh REPO_OR_DIRECTORY", status=2),
    "--help": Case(f"{PREPARE} --help", shows="usage: ./scripts/prepare.sh REPO_OR_DIRECTORY", status=0),
    "unknown flag": Case(f"{PREPARE} $DIR --mode int8", "error: unrecognized arguments: --mode int8", status=2),
    "a directory with a space": Case(
        f"cp -r $DIR $DIR/../'a b'; rm $DIR/../'a b/model.pth'; {PREPARE} $DIR/../'a b'",
        status=0,
        shows="a b/model.pth",
    ),
    "CDPATH": Case(f"cd $DIR/..; CDPATH=/:. $ROOT/{PREPARE} model", **CONVERTED),
}
USAGE = {
    f"{flag}": Case(f"{GENERATE} {flag}", f"error: argument {flag.split()[0]}: {says}", status=2, shows="usage: ")
    for flag, says in {
        "--max_new_tokens 0": "0: must be from 1",
        "--max_new_tokens -1": "-1: must be from 1",
        "--temperature -1": "-1: must be from 0 to",
        "--temperature nan": "nan: must be from 0 to",
        "--temperature inf": "inf: must be from 0 to",
        "--temperature 1e39": "1e39: must be from 0 to 1e+30",
        "--top_k 0": "0: must be from 1",
        "--top_p 0": "0: must be from 1e-06 to 1",
        "--top_p 1.5": "1.5: must be from 1e-06 to 1",
        "--min_p -0.1": "-0.1: must be from 0 to 1",
        "--min_p nan": "nan: must be from 0 to 1",
        "--speculate_k 99": "99: must be from 1 to 15",
        "--seed -1": "-1: must be from 0 to 2147483647",
        "--seed 2147483648": "2147483648: must be from 0 to 2147483647",
        "--num_samples 0": "0: must be from 1",
        "--precision int3": "invalid choice: 'int3' (choose from",
        "--device tpu": "invalid choice: 'tpu' (choose from",
        "--prompt": "expected one argument",
        "--draft_checkpoint_path": "expected one argument",
    }.items()
}
USAGE |= {
    name: Case(command, f"error: {says}", status=2, shows="usage: ", marks=tuple(marks))
    for name, (command, says, *marks) in {
        "an unknown flag": (f"{GENERATE} --no_such_flag", "unrecognized arguments: --no_such_flag"),
        "no CUDA": (f"{GENERATE} --device cuda", "argument --device: invalid choice: 'cuda' (choose from", *NO_CUDA),
        "no checkpoint": ("python generate.py", "the following arguments are required: --checkpoint_path"),
        "a context that is no number": (f"{PREFILL} --context a", "argument --context: a: must be from 1 to inf (int)"),
        "a prompt in a conversation": (
            f"{GENERATE} --interactive --prompt a",
            "argument --prompt: not allowed with argument --interactive",
        ),
        "no context": (f"{GENERATE} --context 0", "argument --context: 0: must be from 1 to inf (int)"),
        "no room for prefixes": (f"{PREFILL} --cache_gb 0", "argument --cache_gb: 0: must be from 0.001 to"),
        "quantize, mode": (f"{QUANTIZE} --mode int3", "argument --mode: invalid choice: 'int3' (choose from"),
        "quantize, group size": (
            f"{QUANTIZE} --mode int4 --groupsize 33",
            "argument --groupsize: invalid choice: 33 (choose",
        ),
        "quantize, check": (f"{QUANTIZE} --check x", "unrecognized arguments: --check x"),
        "converter, precision": (f"{CONVERT} --precision int8", "argument --precision: invalid choice: 'int8' (choose"),
        "converter, unknown flag": (f"{CONVERT} --mode int8", "unrecognized arguments: --mode int8"),
        "converter, no directory": (
            "python -m scripts.convert_hf_checkpoint",
            "the following arguments are required: --checkpoint_dir",
        ),
    }.items()
}
USAGE |= {
    f"not a number: {flag}": Case(f"{GENERATE} {flag}", f"error: argument {flag.split()[0]}: ... ({kind})", status=2)
    for flag, kind in {
        "--max_new_tokens abc": "int",
        "--max_new_tokens 1.5": "int",
        "--max_new_tokens ''": "int",
        "--temperature warm": "float",
        "--top_k x": "int",
    }.items()
}
OLD_LOCALE = "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"
PROMPT_FILES = all_of(
    write("plain", "a\nb"), write("crlf", "a\r\nb\r\n"), write("bom", "\ufeffa\nb"), write("lf", "a\nb\n")
)
ANSWERS = {"status": 0, "shows": "Stopped"}
UNUSUAL = {
    "one token": Case(f"{GENERATE} --max_new_tokens 1", status=0, shows="(1 tokens ... Stopped: limit of 1 tokens"),
    "the context is full": Case(
        f"{GENERATE} --prompt -", status=0, stdin=FULL.encode(), shows="(1 tokens ... Stopped: limit of 1 tokens"
    ),
    "more of the top than there are": Case(f"{GENERATE} --top_k 1000000", **ANSWERS),
    "last seed": Case(f"{GENERATE} --num_samples 2 --seed 2147483647", **ANSWERS),
    "very hot": Case(f"{GENERATE} --temperature 1e30", **ANSWERS),
    "a very long answer": Case(f"{GENERATE} --max_new_tokens {10**30}", **ANSWERS),
    **{
        f"a prompt file, {name}": Case(
            f"{GENERATE} --prompt @$DIR/{name}",
            spoil=PROMPT_FILES,
            same_as=f"{GENERATE} --prompt @$DIR/plain",
            **ANSWERS,
        )
        for name in ("crlf", "bom", "lf")
    },
    "CRLF on stdin": Case(
        f"{GENERATE} --prompt -",
        spoil=PROMPT_FILES,
        stdin=b"\xef\xbb\xbfa\r\nb\r\n",
        same_as=f"{GENERATE} --prompt @$DIR/plain",
        **ANSWERS,
    ),
    "a locale without UTF-8": Case(f"{OLD_LOCALE} {GENERATE} --prompt caf\u00e9", status=0, shows="Prompt tokens: 7 "),
    "a conversation in it": Case(
        f"{OLD_LOCALE} {GENERATE} --interactive --max_new_tokens 1",
        "the answer was cut at its limit of 1 tokens: /clear starts anew",
        status=0,
        stdin=b"caf\xc3\xa9\n/stats",
        shows="Prompt tokens: 7 ",
    ),
    "a conversation in which nobody speaks": Case(f"{GENERATE} --interactive", status=0, shows="Load time"),
    "a conversation without standard input": Case(f"{GENERATE} --interactive <&-", status=0, shows="Load time"),
    "a line longer than the context": Case(
        f"{GENERATE} --interactive", SHORTEN, status=0, stdin=2 * FULL.encode() + b"\n/stats", shows="no answer yet"
    ),
    "a line not UTF-8": Case(
        f"{GENERATE} --interactive --max_new_tokens 1",
        f"the line: ... {UTF8}",
        status=0,
        stdin=b"caf\xe9\n/stats",
        shows="no answer yet",
    ),
    "a conversation with NaN": Case(
        f"{GENERATE} --interactive", "not finite: try", norm(torch.full((64,), torch.nan)), status=0, stdin=b"a"
    ),
    "a checkpoint of an earlier version": Case(
        GENERATE, spoil=earlier_version(), same_as=GENERATE.replace("model.pth", "new.pth"), **ANSWERS
    ),
    "torch.compile is disabled": Case(f"TORCH_COMPILE_DISABLE=1 {GENERATE} --compile --compile_prefill", **ANSWERS),
    "LOCAL_RANK is left": Case(f"LOCAL_RANK=0 {GENERATE}", **ANSWERS),
    "run as a file": Case(
        "cd $DIR/..; python $ROOT/scripts/convert_hf_checkpoint.py --checkpoint_dir $DIR", **CONVERTED
    ),
    "a compiler of two words": Case(
        f"CXX='env g++' XDG_CACHE_HOME=$DIR/../cache {GENERATE}; ls $DIR/../cache/*/cpu-*.so > /dev/null",
        marks=SLOW,
        **ANSWERS,
    ),
    "no compiler, no kernels": Case(
        f"CXX=/no/such/g++ XDG_CACHE_HOME=$DIR/../cache {GENERATE}",
        "no CPU kernels ... slower: /no/such/g++: ... CXX names a C++ compiler",
        **ANSWERS,
    ),
    "half a command for a compiler": Case(
        f"CXX='g++ \"' XDG_CACHE_HOME=$DIR/../cache {GENERATE}",
        "no CPU kernels ... slower: ... No closing quotation: CXX names a C++ compiler",
        **ANSWERS,
    ),
    "no place for kernels": Case(
        f"env -u HOME XDG_CACHE_HOME=/dev/null/x {GENERATE}",
        "CPU kernels are compiled for this run only: ... /dev/null/x ... set XDG_CACHE_HOME",
        marks=SLOW,
        **ANSWERS,
    ),
    "a file that the index does not name": Case(
        CONVERT, spoil=all_of(shards(INDEX, a=HALF[0], b=HALF[1]), tensors(name="model-extra.safetensors")), **CONVERTED
    ),
    "merges in another order": Case(CONVERT, spoil=byte_level(turned=True), **CONVERTED),
    "shards without an index": Case(CONVERT, spoil=shards(None, a=HALF[0], b=HALF[1]), **CONVERTED),
    "tied, both there and different": Case(
        CONVERT,
        spoil=config(tie_word_embeddings=True),
        left=holds(tok_embeddings=weights()[EMBEDDINGS], output=weights()[HEAD]),
        **CONVERTED,
    ),
    "tied, only the output layer there": Case(
        CONVERT,
        spoil=all_of(config(tie_word_embeddings=True), tensors(lambda t: t.pop(EMBEDDINGS))),
        left=holds(tok_embeddings=weights()[HEAD], output=weights()[HEAD]),
        **CONVERTED,
    ),
    "tied, only the embeddings there": Case(
        CONVERT,
        spoil=all_of(config(tie_word_embeddings=True), tensors(lambda t: t.pop(HEAD))),
        left=holds(tok_embeddings=weights()[EMBEDDINGS], output=weights()[EMBEDDINGS]),
        **CONVERTED,
    ),
    "bin of Parameters": Case(
        CONVERT,
        spoil=bin_file(lambda folder: {name: torch.nn.Parameter(tensor) for name, tensor in weights().items()}),
        left=holds(output=weights()[HEAD]),
        **CONVERTED,
    ),
    "bin of before torch 1.6": Case(
        CONVERT,
        spoil=bin_file(lambda folder: weights(), _use_new_zipfile_serialization=False),
        left=holds(output=weights()[HEAD]),
        **CONVERTED,
    ),
    "rope scaling of type null": Case(
        CONVERT,
        spoil=config(rope_scaling={"type": None}),
        left=lambda f: stored(f)["config"]["rope_scale"] == 1,
        **CONVERTED,
    ),
    "no max_position_embeddings": Case(
        CONVERT,
        spoil=config("max_position_embeddings"),
        left=lambda f: stored(f)["config"]["max_seq_length"] == 2048,
        **CONVERTED,
    ),
    "a link": Case(
        CONVERT,
        spoil=linked,
        left=lambda f: (f / "model.pth").is_symlink(),
        status=0,
        writes=("elsewhere/real.pth", "model.pth"),
        shows="wrote ",
    ),
}
STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
WRITERS = {"converter": (CONVERT, "model.pth"), "quantizer": (QUANTIZE, "model_int8.pth")}
MOMENTS = ("utils.progress", "os.fsync", "os.replace")
PUSH = "tokenizer.Tokenizer.token_bytes"


def hit(command: str, signal: str, call: str) -> str:
    """The command, in which a signal comes when `call` is called."""
    script, flags = re.fullmatch(r"python (?:-m )?(\S+?)(?:[.]py)? (.*)", command).groups()
    code = f"import os, signal, utils, {script} as script; {call} = lambda *_: os.kill(os.getpid(), signal.{signal})"
    return f"python -c '{code}; utils.run(script.main)' {flags}"


SIGNALS = {
    **{
        f"{signal} in the {name} at {call}": Case(command, status=STATUS[signal], interrupt=(signal, call))
        for name, (command, _) in WRITERS.items()
        for signal in ("SIGINT", "SIGTERM", "SIGHUP")
        for call in MOMENTS
    },
    **{
        f"SIGKILL in the converter at {call}": Case(
            hit(CONVERT, "SIGKILL", call), status=-9, writes=(".model.pth.NUMBER.tmp",)
        )
        for call in MOMENTS
    },
    "SIGKILL in the quantizer": Case(
        hit(QUANTIZE, "SIGKILL", "os.fsync"), status=-9, writes=(".model_int8.pth.NUMBER.tmp",)
    ),
    "SIGINT, a whole process": Case(hit(CONVERT, "SIGINT", "os.fsync"), status=130),
    "SIGTERM, a whole process": Case(hit(CONVERT, "SIGTERM", "os.fsync"), status=143),
    **{
        f"the {name} {when} SIGKILL": Case(
            f"{{ {hit(command, 'SIGKILL', 'os.fsync')}; }} 2>/dev/null; {then} $DIR/.{file}.*.tmp >&2; {command}",
            f"/.{file}." if then == "ls" else "",
            status=0,
            writes=(file, f".{file}.NUMBER.tmp") if then == "ls" else (file,),
        )
        for name, (command, file) in WRITERS.items()
        for when, then in (("after", "ls"), ("a day after", "touch -d '25 hours ago'"))
    },
    "SIGINT ignored, as by nohup": Case(f"trap '' INT; {hit(CONVERT, 'SIGINT', 'os.fsync')}", **CONVERTED),
    "SIGHUP ignored, as by nohup": Case(f"trap '' HUP; {hit(CONVERT, 'SIGHUP', 'os.fsync')}", **CONVERTED),
    **{
        f"{signal} in an answer": Case(GENERATE, status=STATUS[signal], interrupt=(signal, PUSH))
        for signal in ("SIGINT", "SIGTERM", "SIGHUP")
    },
    "SIGINT in a conversation's answer": Case(
        f"{GENERATE} --interactive",
        status=0,
        stdin=b"a\n/stats\nb",
        interrupt=("SIGINT", PUSH),
        shows="Stopped: interrupted",
    ),
}


def described(command: str, table: dict[str, tuple]) -> dict[str, Case]:
    return {name: Case(command, *entry) for name, entry in table.items()}


GROUPS = {
    "checkpoint": described(GENERATE, CHECKPOINT),
    "prompt": PROMPT,
    "machine": MACHINE,
    "output": OUTPUT,
    "config.json": described(CONVERT, CONFIG_JSON),
    "tokenizer": described(CONVERT, TOKENIZER),
    "weights": described(CONVERT, WEIGHTS),
    "dtype": INTEGERS,
    "folder": FOLDER,
    "quantize": QUANTIZED,
    "prepare": PREPARED,
    "usage": USAGE,
    "unusual": UNUSUAL,
    "signal": SIGNALS,
}
CASES = {f"{group}: {name}": case for group, cases in GROUPS.items() for name, case in cases.items()}
