"""Fixtures: the bundled demo checkpoints, converted once; random Llamas written by transformers, the oracle."""

import shutil
from collections.abc import Callable
from pathlib import Path

from generate import Engine, Sampling, Speculation, generate, prompt_lookup
from model import Transformer
from quantize import load_model, read_checkpoint
from scripts.convert_hf_checkpoint import convert

import pytest
import torch

DEMO = Path(__file__).parent / "demo"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths of the converted demo checkpoints: target and draft, in bfloat16."""
    paths = {}
    for name in ("target", "draft"):
        folder = tmp_path_factory.mktemp("demo") / name
        shutil.copytree(DEMO / name, folder)
        paths[name] = convert(folder, "bfloat16")
    return paths


@pytest.fixture(scope="session")
def target(demo: dict[str, Path]) -> Transformer:
    """The demo target in float32."""
    return load_model(read_checkpoint(demo["target"]), "cpu", torch.float32)


@pytest.fixture
def random_llama(tmp_path: Path) -> Callable:
    """A function: config fields -> (transformers' random float32 Llama, the folder where it is saved)."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    def make(**fields) -> tuple[LlamaForCausalLM, Path]:
        torch.manual_seed(0)
        shape = {
            "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
        }  # fmt: skip
        reference = LlamaForCausalLM(LlamaConfig(**(shape | fields))).eval()
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


def make_sampling(seed: int = 1, temperature: float = 0.0, top_k: int | None = None) -> Sampling:
    return Sampling(torch.tensor(seed, dtype=torch.int32), torch.tensor(temperature), top_k)


def new_engine(model: Transformer, positions: int | None = None) -> Engine:
    return Engine(model, model.make_cache(positions or model.args.max_seq_length))


def generated(
    engine: Engine, prompt: list[int], count: int, sampling: Sampling, eos_id: int | None = None,
    speculation: Speculation | None = None,
) -> list[int]:  # fmt: skip
    """The ids that `generate` yields; without `speculation` by plain decoding."""
    engine.rewind(prompt)
    return list(generate(engine, prompt, count, eos_id, sampling, speculation or plain()))


def plain() -> Speculation:
    """That guesses nothing."""
    return Speculation(prompt_lookup, 0)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-4 of the largest logit, the tolerance of every comparison of logits in float32."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
