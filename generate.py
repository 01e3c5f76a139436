"""Generate text from a checkpoint: prefill, sample, decode, stream; the loop and its command line.

    python generate.py --compile --checkpoint_path checkpoints/$MODEL_REPO/model.pth --prompt "Hello, my name is"

Token ids go in and come out of `generate`; only `main` knows text, flags and the terminal.
"""

import signal
import warnings

if __name__ == "__main__":  # before torch, whose import takes a second (Ctrl-C) and warns where numpy is missing
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import argparse
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn as nn
from torch import Tensor

from kernels import cpu
from model import Transformer
from quantize import check_device, load_model, read_checkpoint, run

PREFILL_ROWS = 512  # a prompt runs in chunks of so many rows: bounded memory, and Ctrl-C is heard in between
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Sampling:
    """What turns logits into a token: the seed and the temperature (0 is greedy) as tensors, so that no graph holds them."""

    seed: Tensor  # int32 []
    temperature: Tensor  # float32 []
    top_k: int | None


def hash32(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers in which every input bit turns every output bit with probability near 1/2.

    Constants of Chris Wellons' "lowbias32" (https://nullprogram.com/blog/2018/07/31/). int32 products wrap; >> is made
    logical by masking.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


def gumbel_noise(seed: Tensor, input_pos: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [S, vocab_size], a pure function of (seed, position, token id): no state, no order."""
    key = hash32(hash32(seed) + input_pos.to(torch.int32))
    ids = torch.arange(vocab_size, dtype=torch.int32, device=input_pos.device) * -0x61C88647
    bits = hash32(hash32(key)[:, None] ^ ids) & 0x7FFFFF  # 23 bits: with the half below, exact in float32 and never 0 or 1
    return -torch.log(-torch.log((bits.float() + 0.5) * 2.0**-23))


def sample(logits: Tensor, input_pos: Tensor, sampling: Sampling) -> Tensor:
    """Token ids [S] for logits [S, vocab_size] computed at the positions `input_pos` [S], by the Gumbel-max trick.

    argmax(logits + temperature * noise) follows softmax(logits / temperature), of the top_k most likely where given.
    """
    if sampling.top_k is not None:
        worst_kept = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < worst_kept, -torch.inf)
    noise = gumbel_noise(sampling.seed, input_pos, logits.shape[-1])
    return torch.argmax(logits + sampling.temperature * noise, dim=-1)


def step(
    model: Transformer, tokens: Tensor, input_pos: Tensor, cache: nn.ModuleList, sampling: Sampling, last_only: bool
) -> Tensor:
    """One forward pass of `tokens` [1, S] and the samples [S] that follow each, or [1] of the last where `last_only`."""
    logits = model(tokens, input_pos, cache, last_only)[0]
    return sample(logits, input_pos[-1:] if last_only else input_pos, sampling)


@dataclass
class Engine:
    """A model and a cache of one sequence, with the step for one row (`decode`) and for many (`prefill`)."""

    model: Transformer
    cache: nn.ModuleList
    decode: Callable = step
    prefill: Callable = step

    @torch.inference_mode()
    def run(self, ids: list[int], start: int, sampling: Sampling) -> Tensor:
        """Run `ids` at the positions from `start` on; returns [1], the token sampled after the last.

        All tensors are made in here: an inference tensor and a normal one are not the same to a compiled step.
        """
        tokens = torch.tensor([ids], device=sampling.seed.device)
        input_pos = torch.arange(start, start + len(ids), device=tokens.device)
        if len(ids) == 1:
            return self.decode(self.model, tokens, input_pos, self.cache, sampling, False)
        return self.prefill(self.model, tokens, input_pos, self.cache, sampling, True)

    def compile(self, prefill: bool, sampling: Sampling) -> float:
        """Compile the step for one row, and for many where `prefill`; returns the seconds that it took.

        What is run to this end is written to the first positions of the cache: compile before there is anything in it.
        """
        start = time.perf_counter()
        torch._dynamo.config.specialize_float = True  # or the eps of a second model becomes a symbol, which does not compile
        compiled = torch.compile(step, fullgraph=True)

        def any_rows(model: Transformer, tokens: Tensor, input_pos: Tensor, *rest) -> Tensor:
            torch._dynamo.mark_dynamic(tokens, 1)
            torch._dynamo.mark_dynamic(input_pos, 0)
            return compiled(model, tokens, input_pos, *rest)

        self.decode = compiled
        self.prefill = any_rows if prefill else step
        for rows in (1, 2) if prefill else (1,):
            self.run([0] * rows, 0, sampling)
        return time.perf_counter() - start


def generate(
    engine: Engine, prompt: list[int], cached: int, max_new_tokens: int, eos_id: int | None, sampling: Sampling
) -> Generator[int, None, str]:
    """Yield the tokens that follow `prompt`, of which the first `cached` are in the engine's cache already.

    Prefill gives the first of them, so at least one token of the prompt has to run. The generator returns why it stopped:
    the token `eos_id` (which is not yielded; None: never), `max_new_tokens`, or the end of the cache.
    """
    limit = engine.model.args.max_seq_length
    for start in range(cached, len(prompt), PREFILL_ROWS):
        token = engine.run(prompt[start : start + PREFILL_ROWS], start, sampling)
    for position in range(len(prompt), len(prompt) + max_new_tokens):
        value = int(token)
        if value == eos_id:
            return "end of sequence"
        yield value
        if position == limit:
            return f"context of {limit} tokens is full"
        if position + 1 < len(prompt) + max_new_tokens:
            token = engine.run([value], position, sampling)
    return f"max_new_tokens {max_new_tokens}"


class TextStream:
    """Token ids in, text out, as soon as it is certain: the bytes of half a character wait for the other half.

    The concatenated text is what sentencepiece decodes behind a prompt, so a leading space is kept.
    """

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        self.tokenizer = tokenizer
        self.waiting: list[int] = []  # byte tokens

    def push(self, token: int) -> str:
        tokenizer = self.tokenizer
        if token < tokenizer.vocab_size() and tokenizer.is_byte(token):
            self.waiting.append(token)
            text = tokenizer.decode(self.waiting)
            if text.endswith("\N{REPLACEMENT CHARACTER}"):
                return ""
            self.waiting = []
            return text
        before = self.finish()
        if token >= tokenizer.vocab_size() or tokenizer.is_control(token):  # a padded vocabulary has ids without a piece
            return before
        return before + (" \u2047 " if tokenizer.is_unknown(token) else tokenizer.id_to_piece(token).replace("\u2581", " "))

    def finish(self) -> str:
        """The text of what still waits."""
        text = self.tokenizer.decode(self.waiting)
        self.waiting = []
        return text


@dataclass
class Statistics:
    """When what happened in one answer; times in seconds of time.perf_counter."""

    prompt: int
    cached: int
    start: float
    first: float = 0.0  # when the first token was there
    end: float = 0.0
    tokens: int = 0
    stopped: str = ""

    def lines(self, weight_bytes: int) -> list[str]:
        """One `Name: figures` each; `weight_bytes` are those that decoding one token reads."""
        first, decode = self.first - self.start, (self.tokens - 1) / max(self.end - self.first, 1e-9)
        lines = [
            f"Prompt tokens: {self.prompt} ({self.cached} cached)",
            f"Time to first token: {first:.3f} s",
            f"Prefill: {(self.prompt - self.cached) / first:.2f} tokens/s",
            f"Decode: {decode:.2f} tokens/s ({self.tokens} tokens in {self.end - self.start:.2f} s)",
            f"Weights read: {decode * weight_bytes / 1e9:.2f} GB/s",
            f"Stopped: {self.stopped}",
        ]
        return lines


def answer(tokens: Generator[int, None, str], stream: TextStream, statistics: Statistics) -> list[int]:
    """Print the text of `tokens` to stdout as they come, fill in `statistics`, return the ids."""
    ids = []
    try:
        while True:
            ids.append(next(tokens))
            statistics.end = time.perf_counter()
            statistics.first = statistics.first or statistics.end
            print(stream.push(ids[-1]), end="", flush=True)
    except StopIteration as stop:
        statistics.stopped = stop.value
    print(stream.finish(), end="\n" if sys.stdout.isatty() else "", flush=True)
    statistics.tokens = len(ids)
    statistics.end = statistics.end or time.perf_counter()
    statistics.first = statistics.first or statistics.end
    return ids


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number of `kind` from `low` to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low}" + f" and at most {high}" * (high < math.inf))
        return value

    parse.__name__ = kind.__name__  # what argparse calls it where the text is no number at all
    return parse


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Generate text from a checkpoint that scripts/prepare.sh made.")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, or what quantize.py made of it")
    add("--prompt", default="Hello, my name is", help='text to continue; "-" reads standard input')
    add("--num_samples", type=number(int, 1), default=1, help="answers; answer i uses seed + i (1)")
    add("--max_new_tokens", type=number(int, 1), default=200, help="longest answer, in tokens (200)")
    add("--temperature", type=number(float, 0), default=0.8, help="of sampling; 0 is greedy (0.8)")
    add("--top_k", type=number(int, 1), help="sample among so many of the most likely tokens only (all)")
    add("--seed", type=number(int, 0, 2**31 - 1), default=1234, help="the same seed gives the same text (1234)")
    add("--compile", action="store_true", help="compile the step of one token: slower start, faster decoding")
    add("--compile_prefill", action="store_true", help="compile the prompt's pass as well")
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cuda", "cpu"], default=cuda, help="default: cuda where there is one")
    add("--precision", choices=list(DTYPES), default="bfloat16", help="of activations, cache and unquantized weights")
    add("--ignore_eos", action="store_true", help="do not stop at the end-of-sequence token (for benchmarks)")
    add("--profile", type=Path, help="write a trace of the last answer to this file (open it in chrome://tracing)")
    return parser


def read_prompt(text: str) -> str:
    """The prompt, from standard input where `text` is "-". ValueError where it is empty or not UTF-8."""
    data = os.fsencode(text)
    if text == "-":
        data = sys.stdin.buffer.read() if sys.stdin else b""
    try:
        prompt = data.decode().removesuffix("\n" if text == "-" else "")
    except UnicodeError as error:
        raise ValueError(f"the prompt is not UTF-8 ({error}): convert it, for example with iconv") from error
    if not prompt:
        raise ValueError("the prompt is empty: give some text to continue, with --prompt or on standard input")
    return prompt


def check_machine(args: argparse.Namespace) -> None:
    """ValueError where the device, the compiler or the folder that the flags ask for is not there."""
    check_device(args.device)
    if (args.compile or args.compile_prefill) and cpu.compiler() is None:
        name = os.environ.get("CXX", "g++")
        raise ValueError(f"--compile needs a C++ compiler and {name} is not there: install one, or leave --compile away")


def main() -> None:
    args = build_parser().parse_args()
    sys.stdout.reconfigure(encoding="utf-8")
    check_machine(args)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own news are not the user's
    if args.profile and (args.profile.is_dir() or not os.access(args.profile.parent, os.W_OK)):
        raise ValueError(f"--profile {args.profile}: no file can be written there: name one in a folder that exists")
    torch.set_num_threads(cpu.cores())
    text, start = read_prompt(args.prompt), time.perf_counter()
    checkpoint = read_checkpoint(args.checkpoint_path)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=checkpoint.tokenizer)
    prompt, context = [tokenizer.bos_id(), *tokenizer.encode(text)], checkpoint.args.max_seq_length
    if len(prompt) > context:
        raise ValueError(f"the prompt has {len(prompt)} tokens and the model's context {context}: shorten the prompt")
    model = load_model(checkpoint, args.device, DTYPES[args.precision])
    engine = Engine(model, model.make_cache(context))
    print(f"Load time: {time.perf_counter() - start:.3f} s", file=sys.stderr)

    def sampling(i: int) -> Sampling:
        seed = torch.tensor(args.seed + i & 0x7FFFFFFF, dtype=torch.int32, device=args.device)
        top_k = args.top_k and min(args.top_k, checkpoint.args.vocab_size)
        return Sampling(seed, torch.tensor(args.temperature, device=args.device), top_k)

    if args.compile or args.compile_prefill:
        try:
            seconds = engine.compile(args.compile_prefill, sampling(0))
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--compile failed ({reason}): repair the C++ compiler, or leave --compile away") from error
        print(f"Compile time: {seconds:.3f} s", file=sys.stderr)
    eos_id = None if args.ignore_eos else tokenizer.eos_id()
    weight_bytes = sum(t.nbytes for name, t in model.state_dict().items() if name != "tok_embeddings.weight")
    for i in range(args.num_samples):
        cached = len(prompt) - 1 if i else 0  # the prompt is still there; its last token runs again, for its logits
        profiled = args.profile and i == args.num_samples - 1
        with torch.profiler.profile() if profiled else nullcontext() as profile:
            statistics = Statistics(len(prompt), cached, time.perf_counter())
            tokens = generate(engine, prompt, cached, args.max_new_tokens, eos_id, sampling(i))
            answer(tokens, TextStream(tokenizer), statistics)
        if i + 1 < args.num_samples:
            print()
        print("\n".join(statistics.lines(weight_bytes)), file=sys.stderr)
    if args.profile:
        profile.export_chrome_trace(str(args.profile))
    cuda = args.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"Peak memory: {peak / 1e9:.3f} GB ({'CUDA' if cuda else 'RSS'})", file=sys.stderr)


if __name__ == "__main__":
    run(main)
