"""Speculative decoding over plain decoding: with a draft, with prompt lookup, and with both, in turn in one process.

A draft that is a quantized copy of the model shares its KV cache, as in generate.py.

    python -m benchmarks.speculation --checkpoint_path target.pth --draft_checkpoint_path draft.pth --prompt @code.py
    python -m benchmarks.speculation --checkpoint_path model.pth --prompt "Summarize: ..."      # prompt lookup alone

Each answer has a controller of its own without any measurement, as in a new process. The clock starts after the first
token. Rates are medians over the rounds; for a chat model a prompt is a question.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import utils

import torch

import tp
from benchmarks.memory import bandwidth
from chat import Conversation
from checkpoint import load_model, read_checkpoint
from generate import MAX_DECODE_ROWS, Engine, generate
from sampling import SamplingParams
from speculation import PromptLookup, Speculation


def load(path: Path) -> Engine:
    """An engine for the checkpoint at `path`, in bfloat16 on a CPU."""
    checkpoint = read_checkpoint(path)
    model = load_model(checkpoint, "cpu", torch.bfloat16)
    engine = Engine(model, checkpoint.args.max_seq_length, checkpoint)
    engine.reserve(engine.max_seq_length)  # so that it does not grow while it is measured
    return engine


def new_speculation(source: str, draft: Engine | None, speculate_k: int) -> Speculation | None:
    """A controller for one of the sources of guesses: "plain" (none), "lookup", "draft" or "both"."""
    if source == "plain":
        return None
    lookup = PromptLookup() if source != "draft" else None
    return Speculation(draft if source != "lookup" else None, speculate_k, lookup)


def tokens_per_second(
    engine: Engine, prompt: list[int], max_new_tokens: int, params: SamplingParams, speculation: Speculation | None
) -> float:
    """Tokens per second after the first one."""
    eos_ids = engine.checkpoint.tokenizer.eos_ids
    stream = generate(engine, prompt, max_new_tokens + 1, eos_ids, params, speculation)
    next(stream)
    start = time.perf_counter()
    count = sum(1 for _ in stream)
    return count / (time.perf_counter() - start)


def compare(
    engine: Engine, draft: Engine | None, prompt: list[int], temperature: float, args: argparse.Namespace
) -> list[str]:
    """A line of figures for each source of guesses, from `args.rounds` rounds in which each answers once."""
    sources = ["plain", "lookup", "draft", "both"] if draft else ["plain", "lookup"]
    rates: dict[str, list[float]] = {source: [] for source in sources}
    accepted = dict.fromkeys(sources, "")
    for i in range(args.rounds + 1):
        for source in sources:
            speculation = new_speculation(source, draft, args.speculate_k)
            vocab_size = engine.checkpoint.tokenizer.vocab_size
            params = SamplingParams.create("cpu", i, temperature, vocab_size=vocab_size)
            rates[source].append(tokens_per_second(engine, prompt, args.tokens, params, speculation))
            if speculation:
                accepted[source] = f"{speculation.num_accepted} of {speculation.num_drafted} guesses accepted"
    lines = []
    for source in sources:
        pairs = list(zip(rates[source], rates["plain"], strict=True))[1:]  # the first round reads weights and prompt
        rate = statistics.median(rate for rate, _ in pairs)
        over = statistics.median(rate / plain for rate, plain in pairs)
        lines.append(f"{source:6} {rate:7.1f} tokens/s {over:5.2f} over plain  {accepted[source]}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True)
    add("--draft_checkpoint_path", type=Path)
    add("--prompt", action="append", required=True, help="text or @FILE; may be repeated")
    add("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    add("--tokens", type=int, default=128)
    add("--rounds", type=int, default=5)
    add("--own_cache", action="store_true", help="a draft that is a copy has a KV cache of its own, and so a prefill")
    add("--speculate_k", type=utils.number_between(1, MAX_DECODE_ROWS - 1), default=MAX_DECODE_ROWS - 1)
    args = parser.parse_args()
    torch.set_num_threads(tp.num_threads())
    engine = load(args.checkpoint_path)
    draft = load(args.draft_checkpoint_path) if args.draft_checkpoint_path else None
    if draft and not args.own_cache:
        draft.share_cache(engine)
    tokenizer = engine.checkpoint.tokenizer
    conversation = Conversation(tokenizer, engine.max_seq_length, "", tokenizer.chat_template is not None)
    print(f"read bandwidth {bandwidth('cpu'):.1f} GB/s", file=sys.stderr)
    for text in args.prompt:
        prompt = conversation.prompt(utils.read_text(text, "--prompt"))
        for temperature in args.temperature:
            for line in compare(engine, draft, prompt, temperature, args):
                print(f"{text[:24]!r} {len(prompt)} tokens, temperature {temperature}: {line}", flush=True)
    print(f"read bandwidth {bandwidth('cpu'):.1f} GB/s", file=sys.stderr)


if __name__ == "__main__":
    utils.run(main)
