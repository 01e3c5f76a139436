"""Decoding with guesses over decoding without: a draft's, the text's, and both, in turn in one process.

    python -m benchmarks.guessing --checkpoint_path target.pth --draft_checkpoint_path draft.pth --prompt @code.py
    python -m benchmarks.guessing --checkpoint_path model.pth --prompt "Summarize: ..."      # the text alone

Each answer has a controller of its own, which knows nothing yet, as in a new process. The clock starts behind the first
token. Rates are medians over the rounds; of a chat model a prompt is a question.
"""

import argparse
import statistics
import sys
import terminal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.benchmark import bandwidth
from chat import Conversation
from checkpoint import load_model, read_checkpoint
from generate import Engine, generate
from kernels import cpu
from kernels.sampling import Sampling
from speculation import DRAFT, Lookup, Speculation


def load(path: Path) -> Engine:
    checkpoint = read_checkpoint(path)
    model = load_model(checkpoint, "cpu", torch.bfloat16)
    return Engine(model, model.make_cache(checkpoint.args.max_seq_length), checkpoint=checkpoint)


def rate(engine: Engine, prompt: list[int], tokens: int, sampling: Sampling, speculation: Speculation | None) -> float:
    """Tokens a second behind the first, up to so many or to the end of the answer."""
    engine.rewind(prompt)
    stream = generate(engine, prompt, tokens + 1, engine.checkpoint.tokenizer.ends, sampling, speculation)
    next(stream)
    start = time.perf_counter()
    made = sum(1 for _ in stream)
    return made / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True)
    add("--draft_checkpoint_path", type=Path)
    add("--prompt", action="append", required=True, help="text or @FILE; may be repeated")
    add("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    add("--tokens", type=int, default=128)
    add("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(cpu.cores())
    engine = load(args.checkpoint_path)
    guess = load(args.draft_checkpoint_path).guess if args.draft_checkpoint_path else None
    makers: dict[str, Callable] = {"plain": lambda: None, "lookup": lambda: Speculation(None, 5, Lookup())}
    if guess:
        makers |= {"draft": lambda: Speculation(guess, 5), "both": lambda: Speculation(guess, 5, Lookup())}
    tokenizer, context = engine.checkpoint.tokenizer, engine.checkpoint.args.max_seq_length
    print(f"read bandwidth {bandwidth('cpu'):.1f} GB/s", file=sys.stderr)
    for argument in args.prompt:
        text = terminal.read_text(argument, "--prompt")
        prompt = Conversation(tokenizer, context, "", tokenizer.template is not None).prompt(text)
        for temperature in args.temperature:
            rates: dict[str, list[float]] = {name: [] for name in makers}
            accepted = dict.fromkeys(makers, "")
            for i in range(args.rounds + 1):
                for name, make in makers.items():
                    speculation = make()
                    sampling = Sampling.on("cpu", i, temperature, vocab_size=tokenizer.size)
                    found = rate(engine, prompt, args.tokens, sampling, speculation)
                    if i > 0:  # the first reads weights and prompt
                        rates[name].append(found)
                    if speculation:
                        each = [[tried, stood] for source, tried, stood in speculation.rounds if source == DRAFT]
                        told = [sum(column) for column in zip(*each, strict=True)] or [0, 0]
                        texts = [[tried, stood] for source, tried, stood in speculation.rounds if source > DRAFT]
                        told += [sum(column) for column in zip(*texts, strict=True)] or [0, 0]
                        accepted[name] = "draft {1} of {0}, text {3} of {2}".format(*told)
            over = {
                name: statistics.median(a / b for a, b in zip(rates[name], rates["plain"], strict=True))
                for name in rates
            }
            for name, values in rates.items():
                figures = f"{statistics.median(values):7.1f} tokens/s {over[name]:5.2f} over plain  {accepted[name]}"
                print(
                    f"{argument[:24]!r} {len(prompt)} tokens, temperature {temperature}: {name:6} {figures}", flush=True
                )
    print(f"read bandwidth {bandwidth('cpu'):.1f} GB/s", file=sys.stderr)


if __name__ == "__main__":
    terminal.run(main)
