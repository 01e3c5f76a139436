"""Fixtures and helpers of several test modules: the bundled demo checkpoints, random Llamas, engines, command lines."""

import codecs
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Container
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels of CUDA run on a CPU; Triton reads it when it is imported

from checkpoint import empty_model, load_model, read_checkpoint
from generate import MAX_DECODE_ROWS, Engine, generate, step
from model import ModelArgs, Transformer
from quantize import quantize
from sampling import SamplingParams
from scripts.convert_hf_checkpoint import convert
from scripts.convert_tokenizer import sentencepiece_tokenizer
from speculation import Speculation
from tokenizer import Tokenizer

signal.signal(signal.SIGINT, signal.default_int_handler)  # utils.py gives Ctrl-C to the system until a script runs
ROOT = Path(__file__).parents[1]
DEMO = ROOT / "tests" / "demo"
TOKENIZER = sentencepiece_tokenizer((DEMO / "target" / "tokenizer.model").read_bytes())
SCHEMES = {"int8": {"mode": "int8"}, "int4": {"mode": "int4", "groupsize": 32}}


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths of the converted demo checkpoints: target and draft in bfloat16, and the target in int8 and int4."""
    paths = {}
    for name in ("target", "draft"):
        folder = tmp_path_factory.mktemp("demo") / name
        shutil.copytree(DEMO / name, folder)
        paths[name] = convert(folder, "bfloat16")
    for name, scheme in SCHEMES.items():
        paths[name] = paths["target"].with_name(f"{name}.pth")
        quantize(read_checkpoint(paths["target"]), scheme, "cpu", paths[name])
    return paths


@pytest.fixture(scope="session")
def target(demo: dict[str, Path]) -> Transformer:
    """The demo target in float32."""
    return load_model(read_checkpoint(demo["target"]), "cpu", torch.float32)


@pytest.fixture
def random_llama(tmp_path: Path) -> Callable:
    """A function: config fields -> (transformers' random float32 model, the folder where it is saved)."""
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel  # noqa: PLC0415

    def make(model_type: str = "llama", **fields) -> tuple[PreTrainedModel, Path]:
        torch.manual_seed(0)
        shape = {
            "vocab_size": 2048,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.1,
        }
        reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(shape | fields))).eval()
        with torch.no_grad():
            for parameter in reference.parameters():
                if parameter.ndim == 1:
                    parameter.uniform_(0.5, 1.5)
        reference.save_pretrained(tmp_path)
        shutil.copyfile(DEMO / "target" / "tokenizer.model", tmp_path / "tokenizer.model")
        return reference, tmp_path

    return make


@pytest.fixture(autouse=True, scope="module")
def fresh_compiler() -> None:
    """Each file starts with nothing compiled: dynamo keeps only so many versions of one function in a process."""
    torch.compiler.reset()


def random_model(args: ModelArgs, spread: float = 0.3) -> Transformer:
    """A float32 model of that shape with normal weights of that standard deviation: the same ones each time."""
    model = empty_model(args, None, torch.float32).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(t.shape, generator=generator) * spread for name, t in model.state_dict().items()}
    model.load_state_dict(weights)
    return model


def make_params(
    seed: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    vocab_size: int | None = None,
) -> SamplingParams:
    limits = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "vocab_size": vocab_size}
    return SamplingParams.create("cpu", seed, temperature, **limits)


def new_engine(model: Transformer, positions: int | None = None) -> Engine:
    return Engine(model, positions or model.args.max_seq_length)


class Eager(Engine):
    """An engine that runs each pass as it is: nothing is captured."""

    @torch.inference_mode()
    def start_pass(self, inputs: torch.Tensor, params: SamplingParams) -> torch.Tensor:
        is_long = inputs.shape[1] > MAX_DECODE_ROWS
        return step(self.model, inputs.to(self.device), self.kv_cache, params, is_long)


def typed(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text that somebody typed: the spelling of a special token stays text."""
    return tokenizer.encode(tokenizer.escape(text))


def utf8_decoder() -> codecs.IncrementalDecoder:
    """A decoder of a stream of UTF-8, with a replacement character for each byte that is not."""
    return codecs.getincrementaldecoder("utf-8")("replace each byte")


def decoded(ids: list[int]) -> str:
    """The text of `ids` as it is streamed, put together."""
    decode = utf8_decoder().decode
    return "".join(decode(TOKENIZER.token_bytes(token)) for token in ids) + decode(b"", True)


def generated(
    engine: Engine,
    prompt: list[int],
    count: int,
    params: SamplingParams,
    eos_ids: Container[int] = (),
    speculation: Speculation | None = None,
) -> list[int]:
    """The ids that `generate` yields."""
    return list(generate(engine, prompt, count, eos_ids, params, speculation))


def run_cli(*words: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user does, from its root: its name, then its flags."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=check)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-4 of the largest logit, the tolerance of every comparison of logits in float32."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
