"""Generate text from a checkpoint: prefill, sample, decode, stream; the loop and its command line.

    python generate.py --compile --checkpoint_path checkpoints/$MODEL_REPO/model.pth --prompt "Hello, my name is"

Token ids go in and come out of `generate`; text, flags and the terminal begin with `Session`.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable, Container
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__" and getattr(sys.flags, "safe_path", False):
    sys.exit("PYTHONSAFEPATH keeps Python from finding the modules beside this script: unset it")

import terminal

import torch
from torch import Tensor

import tp
from chat import Conversation, converse
from checkpoint import DEVICES, Checkpoint, read_checkpoint, storage
from kernels import Recorded, cpu
from kernels.sampling import Sampling, sample
from model import Transformer
from speculation import PLAIN, Lookup, Speculation
from tokenizer import text_decoder

# A prompt runs in chunks of so many rows: bounded memory, and Ctrl-C is heard in between.
PREFILL_ROWS = {"cpu": 512, "cuda": 2048}


def step(model: Transformer, inputs: Tensor, cache: Tensor, sampling: Sampling, last: bool) -> Tensor:
    """One forward pass of `inputs` [2, S], tokens and positions: the samples [S] after each, or [1] of the `last`."""
    logits = model(inputs[:1], inputs[1], cache, last)[0]
    return sample(logits, inputs[1, -len(logits) :], sampling)


@dataclass
class Engine:
    """A model, the cache of one sequence, and the tokens whose keys and values are in it.

    It alone decides which tokens need not run again: prompts and conversations are given whole, to a draft as well, and
    only the tokens that the cache does not hold pass through the model.
    """

    model: Transformer
    cache: Tensor
    ids: list[int] = field(default_factory=list)
    checkpoint: Checkpoint | None = None  # where the model is from
    few: Callable = field(default_factory=lambda: Recorded(step))  # the step for up to MAX_ROWS rows
    many: Callable = step  # and for more

    def rewind(self, ids: list[int]) -> None:
        """Keep the beginning in common with `ids`, without their last: its logits are wanted, so it has to run."""
        if self.ids != ids[: len(self.ids)] or len(self.ids) == len(ids):
            self.ids = os.path.commonprefix([self.ids, ids[:-1]])

    @torch.inference_mode()
    def launch(self, inputs: Tensor, sampling: Sampling) -> Tensor:
        """Run `inputs` [2, S], tokens and their positions: the samples of `run`, for which nobody has waited yet.

        They hold until the next pass.
        """
        if inputs.shape[1] <= cpu.MAX_ROWS:
            return self.few(self.model, inputs, self.cache, sampling, False)
        return self.many(self.model, inputs.to(self.cache.device), self.cache, sampling, True)

    def read(self, samples: Tensor) -> list[int]:
        """Wait for samples, which are the first rank's. ValueError where the model computed no finite numbers."""
        ids = tp.share(samples).tolist()
        if -1 in ids:
            raise ValueError("the model's logits are not finite: try --precision bfloat16, or another checkpoint")
        return ids

    def run(self, ids: list[int], sampling: Sampling) -> list[int]:
        """Run `ids` behind those in the cache: the tokens [S] sampled after each, or [1] after the last of many."""
        positions = range(len(self.ids), len(self.ids) + len(ids))
        samples = self.read(self.launch(torch.tensor([ids, positions]), sampling))
        self.ids += ids
        return samples

    def extend(self, ids: list[int], sampling: Sampling) -> list[int]:
        """Run the tokens of the sequence `ids` that have not run, in chunks; the token [1] sampled after the last."""
        rows = PREFILL_ROWS[self.cache.device.type]
        for start in range(len(self.ids), len(ids), rows):
            samples = self.run(ids[start : start + rows], sampling)
        return samples[-1:]

    @torch.inference_mode()
    def guess(self, ids: list[int], count: int, sampling: Sampling) -> list[int]:
        """Up to `count` tokens that follow `ids`, as far as the context goes: the work of a draft, with two waits."""
        count = min(count, self.model.args.max_seq_length + 1 - len(ids))
        if count < 1:
            return []
        self.rewind(ids)
        guesses = torch.tensor(self.extend(ids, sampling), device=self.cache.device)
        for position in torch.arange(len(ids), len(ids) + count - 1, device=self.cache.device):
            inputs = torch.stack([guesses[-1:].clamp(min=0), position[None]])  # -1 is no token; `read` tells it
            guesses = torch.cat([guesses, self.launch(inputs, sampling)])
        guesses = self.read(guesses)
        self.ids = ids + guesses[:-1]
        return guesses

    def keep(self, ids: list[int]) -> None:
        """Forget what is not in the sequence `ids`, all that was said, when an answer has ended."""
        del self.ids[len(os.path.commonprefix([self.ids, ids])) :]

    def compile(self, few: bool, many: bool, sampling: Sampling) -> None:
        """Compile the steps of `few` rows, of `many`, or both."""
        torch._dynamo.config.specialize_float = True  # or a second model's eps becomes a symbol, which does not compile
        # A whole graph would contradict TORCH_COMPILE_DISABLE.
        compiled = torch.compile(step, fullgraph=not torch._dynamo.config.disable)

        def run_compiled(model: Transformer, inputs: Tensor, *others: object) -> Tensor:
            """One row runs as two: code for it alone could round otherwise than the code that verifies guesses."""
            rows = inputs.shape[1]
            # Always a new tensor: to the compiler an inference tensor and another one are not the same.
            inputs = inputs.repeat(1, 2)[:, : max(rows, 2)].contiguous()
            torch._dynamo.mark_dynamic(inputs, 1)
            return compiled(model, inputs, *others)[:rows]

        if few:
            self.few = Recorded(run_compiled) if self.cache.is_cuda else run_compiled
            self.launch(torch.zeros(2, 1, dtype=torch.int64), sampling)
        if many:
            self.many = run_compiled
            self.launch(torch.zeros(2, cpu.MAX_ROWS + 1, dtype=torch.int64), sampling)


def generate(engine: Engine, prompt: list[int], limit: int, ends: Container[int], sampling: Sampling, speculation=None):
    """Yield the tokens that follow `prompt`, of which the engine may hold a beginning (Engine.rewind comes first).

    Each is the model's own sample given all before it, guessed or not. They end before one of the tokens `ends`,
    after `limit` tokens, or where the context ends, with the token behind its last position.
    """
    ids = list(prompt)
    end = min(len(prompt) + limit, engine.model.args.max_seq_length + 1)
    tokens = engine.extend(prompt, sampling)
    while True:
        for token in tokens:
            if token in ends:
                return
            ids.append(token)
            yield token
            if len(ids) == end:
                return
        if speculation is None:
            tokens = engine.run([token], sampling)
        else:
            tokens = speculation.advance(engine, ids, end - 1 - len(ids), sampling)


class Shown:
    """Prints an answer as it comes, up to the first of the texts `stops`; what may become one of them is held back."""

    def __init__(self, stops: list[bytes]) -> None:
        self.stops = stops
        self.decode = text_decoder().decode
        self.size = 0  # bytes that were shown
        self.held = b""
        self.stop = b""  # that was found

    def add(self, data: bytes) -> bool:
        """Whether the answer goes on."""
        self.held += data
        found = [(self.held.index(stop), stop) for stop in self.stops if stop in self.held]
        lengths = [(stop, range(1, min(len(stop), len(self.held) + 1))) for stop in self.stops]
        begun = [n for stop, each in lengths for n in each if self.held.endswith(stop[:n])]
        count, self.stop = min(found, default=(len(self.held) - max(begun, default=0), b""))
        sure = self.held[:count]
        self.held = b"" if self.stop else self.held[count:]
        self.size += count
        print(self.decode(sure), end="", flush=True)
        return not self.stop

    def end(self, line_end: str) -> None:
        """Show what was held back, for nothing comes any more."""
        self.size += len(self.held)
        print(self.decode(self.held, True), end=line_end, flush=True)


@dataclass
class Answer:
    """Figures of one answer."""

    prompt: int  # tokens
    cached: int = 0  # of these, which did not run
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds from the prompt to each token, or to the end without any
    why: str = "interrupted"  # it ended


class Session:
    """The models that the command line names, loaded and compiled: everything that an answer needs but its prompt.

    ValueError names a file or flag that does not fit. `make_engine` (model, cache, checkpoint=) makes a model's engine,
    `make_conversation` what Conversation would.
    """

    def __init__(
        self, args: argparse.Namespace, make_engine: Callable = Engine, make_conversation: Callable = Conversation
    ) -> None:
        sys.stdout.reconfigure(encoding="utf-8")
        torch.set_num_threads(cpu.cores())
        start = time.perf_counter()
        self.args = args
        self.make_conversation = make_conversation
        self.system = tp.agree(lambda: terminal.read_text(args.system, "--system") if args.system else "")
        self.stops = [terminal.read_text(text, "--stop", plain=True).encode() for text in args.stop]
        self.engines = [self.load(args.checkpoint_path, make_engine)]  # the model's, then the draft's
        self.checkpoint = self.engines[0].checkpoint
        self.tokenizer = self.checkpoint.tokenizer
        guess = None
        if args.draft_checkpoint_path:
            draft = self.load(args.draft_checkpoint_path, make_engine, draft=True)
            if draft.checkpoint.tokenizer.vocabulary() != self.tokenizer.vocabulary():
                raise ValueError(f"{args.draft_checkpoint_path} has another vocabulary: choose a draft of the family")
            self.engines.append(draft)
            guess = draft.guess
        lookup = Lookup() if args.prompt_lookup else None
        self.speculation = Speculation(guess, args.speculate_k, lookup) if guess or lookup else None
        likely = {"top_k": args.top_k, "top_p": args.top_p, "min_p": args.min_p}
        self.sampling = Sampling.on(args.device, 0, args.temperature, vocab_size=self.tokenizer.size, **likely)
        self.answers: list[Answer] = []
        print(f"Load time: {time.perf_counter() - start:.3f} s", file=sys.stderr)
        if args.compile or args.compile_prefill:
            self.compile()

    def load(self, path: Path, make_engine: Callable, draft: bool = False) -> Engine:
        """An engine for the checkpoint at `path`, with an empty cache."""
        checkpoint = read_checkpoint(path)
        model = tp.load_share(checkpoint, self.args.device, getattr(torch, self.args.precision), draft)
        return make_engine(model, model.make_cache(checkpoint.args.max_seq_length), checkpoint=checkpoint)

    def compile(self) -> None:
        """Compile the steps that gain from it. ValueError where there is no compiler."""
        start = time.perf_counter()
        wanted = self.args.compile and self.args.device == "cuda"
        try:
            for engine in self.engines:
                # A compiled step runs one row as two, which in 4 bits costs more than it gains.
                few = wanted and storage("wo", engine.checkpoint.header["quantization"])[0] > 4
                if few or self.args.compile_prefill:
                    engine.compile(few, self.args.compile_prefill, self.sampling)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ValueError(f"torch.compile: {str(error).splitlines()[0]}: do without --compile[_prefill]") from error
        print(f"Compile time: {time.perf_counter() - start:.3f} s", file=sys.stderr)

    def conversation(self) -> Conversation:
        """A new one."""
        template = self.tokenizer.template is not None and not self.args.raw
        return self.make_conversation(self.tokenizer, self.checkpoint.args.max_seq_length, self.system, template)

    def answer(self, prompt: list[int], i: int = 0) -> list[int]:
        """Print the text that follows `prompt` as it comes, with seed + i; its ids. Ctrl-C ends it where one may."""
        engine, shown, answer = self.engines[0], Shown(self.stops), Answer(len(prompt))
        may_interrupt = self.args.interactive and tp.ranks() == (0, 1)  # torchrun ends its ranks on Ctrl-C
        ends = [] if self.args.ignore_eos else self.tokenizer.ends
        start = time.perf_counter()
        self.sampling.seed.fill_((self.args.seed + i) % 2**31)
        if self.speculation:
            self.speculation.rounds.clear()
        with suppress(KeyboardInterrupt) if may_interrupt else nullcontext():
            engine.rewind(prompt)
            answer.cached = len(engine.ids)
            for token in generate(engine, prompt, self.args.max_new_tokens, ends, self.sampling, self.speculation):
                answer.ids.append(token)
                answer.times.append(time.perf_counter() - start)
                if not shown.add(self.tokenizer.bytes_of(token)):
                    break
            answer.why = self.reason(answer, shown.stop)
        answer.times = answer.times or [time.perf_counter() - start]
        shown.end("\n" if self.args.interactive or sys.stdout.isatty() else "")
        said = self.tokenizer.beginning(answer.ids, shown.size) if shown.stop else answer.ids
        with suppress(KeyboardInterrupt) if may_interrupt else nullcontext():
            for each in self.engines:
                each.keep(prompt + said)
        self.answers.append(answer)
        return said

    def reason(self, answer: Answer, stop: bytes) -> str:
        """Why an answer ended, before the text `stop` or before none."""
        limit, context = self.args.max_new_tokens, self.checkpoint.args.max_seq_length
        if stop:
            return f"stop text {stop.decode()!r}"
        if len(answer.ids) == limit:
            return f"max_new_tokens {limit}"
        full = answer.prompt + len(answer.ids) > context
        return f"context of {context} tokens is full" if full else "end of sequence"

    def statistics(self) -> str:
        """The figures of the last answer, a `Name: figures` line each."""
        if not self.answers:
            return "no answer yet"
        answer = self.answers[-1]
        decoded = max(len(answer.ids) - 1, 0)  # the first token is the prompt's
        first, last = answer.times[0], answer.times[-1]
        seconds = max(last - first, 1e-9)
        rounds = self.speculation.rounds if self.speculation else [(PLAIN, 0, 0)] * decoded
        tried, accepted = (sum(each[i] for each in rounds) for i in (1, 2))
        weights = self.engines[0].model.state_dict().items()
        size = sum(weight.nbytes for name, weight in weights if name != "tok_embeddings.weight")
        cuda = self.args.device == "cuda"
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        accepted = min(accepted, decoded)  # behind a stop text they are no tokens
        guesses = f"\nGuesses: {tried} tried, {accepted} accepted, {decoded} tokens in {len(rounds)} passes"
        return f"""Prompt tokens: {answer.prompt} (cached {answer.cached} of {answer.prompt})
Time to first token: {first:.3f} s
Prefill: {(answer.prompt - answer.cached) / first:.2f} tokens/s
Decode: {decoded / seconds:.2f} tokens/s ({len(answer.ids)} tokens in {last:.2f} s)
Weights read: {len(rounds) * size / seconds / 1e9:.2f} GB/s{guesses if self.speculation else ""}
Stopped: {answer.why}
Peak memory: {peak / 1e9:.3f} GB ({"CUDA" if cuda else "RSS"})"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Generate text from a checkpoint.", allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, or what quantize.py made of it")
    add("--prompt", action="append", help='text to go on with, @FILE, or "-" for standard input; may be repeated')
    add("--interactive", action="store_true", help="a conversation: each line of standard input in place of --prompt")
    add("--system", help="text or @FILE that comes before everything, as a chat model's instructions where it is one")
    add("--raw", action="store_true", help="let a chat model go on with the text as it is, without its template")
    add("--num_samples", type=terminal.number(1), default=1, help="answers to each prompt; answer i uses seed + i (1)")
    add("--max_new_tokens", type=terminal.number(1), default=200, help="longest answer, in tokens (200)")
    add("--stop", action="append", default=[], help="end the answer before this text; may be repeated")
    add("--temperature", type=terminal.number(0, 1e30, float), default=0.8, help="of sampling; 0 is greedy (0.8)")
    add("--top_k", type=terminal.number(1), help="sample among so many of the likeliest tokens only (all)")
    add("--top_p", type=terminal.number(1e-6, 1, float), help="of these, the fewest that sum to this probability (1)")
    add(
        "--min_p",
        type=terminal.number(0, 1, float),
        help="of these, from this part of the likeliest's on (0); all three before --temperature",
    )
    add("--draft_checkpoint_path", type=Path, help="a small model of the same vocabulary guesses ahead")
    add("--prompt_lookup", action="store_true", help="guess what followed the last tokens before, also beside a draft")
    add("--speculate_k", type=terminal.number(1, cpu.MAX_ROWS - 1), default=5, help="longest run of guesses (5)")
    add("--seed", type=terminal.number(0, 2**31 - 1), default=1234, help="the same seed gives the same text (1234)")
    add("--compile", action="store_true", help="slower start, faster decoding on CUDA in 16 and 8 bits")
    add("--compile_prefill", action="store_true", help="compile the prompt's pass as well")
    add("--device", choices=DEVICES, default=DEVICES[0], help="cuda where there is one")
    add("--precision", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of activations and floats")
    add("--ignore_eos", action="store_true", help="do not stop at the end-of-sequence token (for benchmarks)")
    return parser


def answer_all(args: argparse.Namespace, *makers: Callable) -> Session:
    """Print num_samples answers to each prompt, with statistics, or hold a conversation. `makers` are Session's."""
    tp.join(args.device)
    if args.interactive and args.system == "-":
        raise ValueError("--system -: standard input is the conversation; give a text, or @FILE")
    asked = [] if args.interactive else args.prompt or ["Hello, my name is"]
    texts = tp.agree(lambda: [terminal.read_text(text, "--prompt") for text in asked])
    session = Session(args, *makers)
    if args.interactive:
        converse(session.conversation(), session.answer, session.statistics)
    prompts = [session.conversation().prompt(text) for text in texts]  # all are checked before the first answer
    for prompt in prompts:
        for i in range(args.num_samples):
            if session.answers:
                print()
            session.answer(prompt, i)
            print(session.statistics(), file=sys.stderr)
    return session


def main() -> None:
    answer_all(build_parser().parse_args())


if __name__ == "__main__":
    tp.run(main)
