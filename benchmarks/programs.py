"""The programs that are compared: ours, llama.cpp and transformers, each with a random model.

    python -m benchmarks.programs ours '{"path": "model.pth", "device": "cpu", "positions": 2048}'

benchmarks/worker.py starts this in a process of its own. It answers each line of standard input, a JSON list of a
method and its arguments, with a line of JSON.
"""

import inspect
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import utils

import torch

import tp
from benchmarks.ablation import switch_off
from benchmarks.memory import process_memory, weight_bytes
from checkpoint import bits_and_groupsize, load_model, read_checkpoint
from generate import Engine, generate
from kernels import build
from model import ModelArgs
from sampling import SamplingParams

GGUF_EMBEDDING_BYTES = {"F16": 2, "Q8_0": 34 / 32, "Q4_1": 20 / 32, "Q4_0": 18 / 32}  # per weight, by format


def random_ids(count: int, vocab_size: int) -> list[int]:
    """A prompt of random tokens."""
    generator = random.Random(0)
    return [1, *(generator.randrange(300, min(vocab_size, 2000)) for _ in range(count - 1))]


class Program:
    """A program with its model. `info` is sent once, when it is loaded."""

    vocab_size: int
    info: dict

    def generate(self, ids: list[int], tokens: int) -> Iterator[object]:
        """Run the prompt `ids`, then decode: yield once for each token."""
        raise NotImplementedError

    def answer(self, prompt: int, tokens: int) -> dict[str, float]:
        """Seconds to the first token after a prompt of `prompt` tokens, then per token, and GB of memory."""
        ids = random_ids(prompt, self.vocab_size)
        start = time.perf_counter()
        stream = self.generate(ids, tokens)
        next(stream)
        first = time.perf_counter()
        count = sum(1 for _ in stream)
        seconds = (time.perf_counter() - first) / max(count, 1)
        return {"prefill": first - start, "decode": seconds, **process_memory()}


class Ours(Program):
    """This project. `march` compiles the CPU kernels for another CPU, `without` switches off a mechanism."""

    def __init__(self, path: str, device: str, positions: int, march: str = "", without: str = "") -> None:
        if march:
            build.EXTRA_FLAGS.append(f"-march={march}")  # of two such flags, the last counts
        if without:
            switch_off(without)
        torch.set_num_threads(tp.num_threads())
        checkpoint = read_checkpoint(Path(path))
        self.vocab_size = checkpoint.args.vocab_size
        # Random weights have no trained context, so the RoPE table may be as long as the longest one that is measured.
        checkpoint.args = replace(checkpoint.args, max_seq_length=positions)
        self.engine = Engine(load_model(checkpoint, device, torch.bfloat16), positions)
        self.engine.reserve(positions)  # so that it does not grow while it is measured
        self.params = SamplingParams.create(device, 1, 0.8)
        bits, _ = bits_and_groupsize("wo", checkpoint.header["quantization"])
        if device == "cuda" and bits > 4:
            self.engine.compile(True, False, self.params)
        self.info = {"weights": weight_bytes(self.engine.model)}

    def generate(self, ids: list[int], tokens: int) -> Iterator[int]:
        self.engine.truncate(0)
        return generate(self.engine, ids, tokens, (), self.params)

    def verify(self, prompt: int, rows: int) -> float:
        """Seconds of a pass of n rows after the prompt of the last answer, a median of 7."""
        seconds = []
        for _ in range(7):
            self.engine.truncate(prompt)
            start = time.perf_counter()
            self.engine.forward([5] * rows, self.params)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)


class LlamaCpp(Program):
    """llama.cpp on a CPU, through llama-cpp-python."""

    def __init__(self, path: str, args: dict, positions: int) -> None:
        import llama_cpp  # noqa: PLC0415  may be absent

        threads = {"n_threads": tp.num_threads(), "n_threads_batch": tp.num_threads()}
        self.model = llama_cpp.Llama(path, n_ctx=positions, verbose=False, **threads)
        self.vocab_size = args["vocab_size"]
        embedding = args["vocab_size"] * args["dim"] * GGUF_EMBEDDING_BYTES[Path(path).stem]
        self.info = {"weights": Path(path).stat().st_size - embedding}

    def generate(self, ids: list[int], tokens: int) -> Iterator[None]:
        self.model.reset()
        self.model.eval(ids)
        yield
        for i in range(tokens - 1):
            self.model.eval([300 + i])
            yield


def random_transformers_model(args: ModelArgs, device: str) -> torch.nn.Module:
    """transformers' LlamaForCausalLM in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  may be absent

    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.ffn_dim,
        num_hidden_layers=args.n_layer,
        num_attention_heads=args.n_head,
        num_key_value_heads=args.n_kv_head,
        head_dim=args.head_dim,
        max_position_embeddings=args.max_seq_length,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01)
    return model


def cache_keyword(model: torch.nn.Module) -> str:
    """The name of the argument for the KV cache, which transformers 5 has renamed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class Transformers(Program):
    """transformers' Llama, run eagerly."""

    def __init__(self, args: dict, device: str) -> None:
        torch.set_num_threads(tp.num_threads())
        self.model = random_transformers_model(ModelArgs(**args), device)
        self.device = device
        self.vocab_size = args["vocab_size"]
        named = self.model.named_parameters()
        self.info = {"weights": sum(t.nbytes for name, t in named if "embed_tokens" not in name)}

    @torch.inference_mode()
    def generate(self, ids: list[int], tokens: int) -> Iterator[int]:
        from transformers import DynamicCache  # noqa: PLC0415  may be absent

        cache = {cache_keyword(self.model): DynamicCache()}
        inputs = torch.tensor([ids], device=self.device)
        for _ in range(tokens):
            logits = self.model(inputs, use_cache=True, logits_to_keep=1, **cache).logits
            inputs = logits[:, -1:].argmax(-1)
            yield inputs.item()


PROGRAMS = {"ours": Ours, "llama.cpp": LlamaCpp, "transformers": Transformers}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # because libraries may print
    name, options = sys.argv[1:]
    program = PROGRAMS[name](**json.loads(options))
    print(json.dumps(program.info), file=answers, flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(getattr(program, method)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    utils.run(main)
