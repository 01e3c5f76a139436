"""Generate text from a checkpoint: prefill, sample, decode, stream; the loop and its command line.

    python generate.py --compile --checkpoint_path checkpoints/$MODEL_REPO/model.pth --prompt "Hello, my name is"

Token ids go in and come out of `generate`; what knows text, flags and the terminal begins with `TextStream`.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import tp
from kernels import cpu
from model import Transformer
from quantize import DEVICES, Checkpoint, read_checkpoint, run, utf8

import sentencepiece
import torch
from torch import Tensor, nn

PREFILL_ROWS = 512  # a prompt runs in chunks of so many rows: bounded memory, and Ctrl-C is heard in between


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
        worst_kept = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < worst_kept, -torch.inf)
    noise = gumbel_noise(sampling.seed, input_pos, logits.shape[-1])
    return torch.argmax(logits + sampling.temperature * noise, dim=-1)


def step(model: Transformer, tokens: Tensor, input_pos: Tensor, cache: nn.ModuleList, sampling: Sampling, last: bool) -> Tensor:
    """One forward pass of `tokens` [1, S] and the samples [S] that follow each, or [1] of the `last` only."""
    return sample(model(tokens, input_pos, cache, last)[0], input_pos[-1:] if last else input_pos, sampling)


@dataclass
class Engine:
    """A model, the cache of one sequence, and the tokens whose keys and values are in it.

    The one place that knows what need not run again: a prompt is given whole, as is a conversation, or what a draft has
    not seen yet, and only what the cache does not hold passes through the model.
    """

    model: Transformer
    cache: nn.ModuleList
    ids: list[int] = field(default_factory=list)
    compiled: dict[str, Callable] = field(default_factory=dict)  # by kind of step; what is not there runs eagerly
    checkpoint: Checkpoint | None = None  # where the model is from

    def rewind(self, ids: list[int]) -> None:
        """Keep what begins like `ids`, but for the last of them: its logits are wanted, so it has to run."""
        if self.ids != ids[: len(self.ids)] or len(self.ids) == len(ids):
            self.ids = os.path.commonprefix([self.ids, ids[:-1]])

    @torch.inference_mode()
    def run(self, ids: list[int], sampling: Sampling, verify: bool = False) -> list[int]:
        """Run `ids` behind those in the cache; the token [1] sampled after the last, or where `verify` [S] after each.

        All tensors are made in here: an inference tensor and a normal one are not the same to a compiled step.
        """
        kind, start = "decode" if len(ids) == 1 else "verify" if verify else "prefill", len(self.ids)
        tokens = torch.tensor([ids], device=sampling.seed.device)
        input_pos = torch.arange(start, start + len(ids), device=tokens.device)
        if kind in self.compiled and len(ids) > 1:
            torch._dynamo.mark_dynamic(tokens, 1)
            torch._dynamo.mark_dynamic(input_pos, 0)
        samples = self.compiled.get(kind, step)(self.model, tokens, input_pos, self.cache, sampling, kind == "prefill")
        self.ids += ids
        return tp.gather(samples.tolist())[0]  # those of the first rank, should another have rounded otherwise

    def extend(self, ids: list[int], sampling: Sampling) -> list[int]:
        """Run what is missing of the sequence `ids`, in chunks; the token [1] sampled after the last."""
        for start in range(len(self.ids), len(ids), PREFILL_ROWS):
            samples = self.run(ids[start : start + PREFILL_ROWS], sampling)
        return samples

    def guess(self, ids: list[int], count: int, sampling: Sampling) -> list[int]:
        """Up to `count` tokens that follow `ids`, as far as the context goes: what a draft does."""
        self.rewind(ids)
        sequence = list(ids)
        while len(sequence) < min(len(ids) + count, self.model.args.max_seq_length + 1):
            sequence += self.extend(sequence, sampling)
        return sequence[len(ids) :]

    def keep(self, ids: list[int]) -> None:
        """Called with the whole sequence when an answer has ended. What is in the cache is kept for the next one anyway."""

    def compile(self, kinds: list[str], sampling: Sampling) -> None:
        """Compile the step for these kinds: one row (decode), some rows with all their samples (verify), any (prefill)."""
        torch._dynamo.config.specialize_float = True  # or the eps of a second model becomes a symbol, which does not compile
        self.compiled = dict.fromkeys(kinds, torch.compile(step, fullgraph=True))
        for kind in kinds:
            self.run([0] if kind == "decode" else [0, 0], sampling, kind == "verify")
        self.ids = []


def prompt_lookup(ids: list[int], count: int, sampling: Sampling) -> list[int]:
    """Guesses without a draft: what followed the last few of `ids` where they, as many as possible, stood before.

    What follows may be short: then it is taken to go round. https://github.com/apoorvumang/prompt-lookup-decoding
    """
    text = "".join(map(chr, ids))  # str.rfind is the fastest search in a sequence that Python has
    for length in range(5, 1, -1):
        found = text.rfind(text[-length:], 0, -1)
        if found >= 0:
            return (ids[found + length :] * count)[:count]
    return []


class Speculation:
    """How many tokens to guess before the model verifies them in one pass, learned from what that gains and costs.

    `guess` (ids, count, sampling) -> guesses is an Engine's (a draft) or prompt_lookup. The model decides what stands, so
    nothing here can change the text; https://arxiv.org/abs/2408.07978 has the coupling by shared noise.
    """

    def __init__(self, guess: Callable[[list[int], int, Sampling], list[int]], longest: int) -> None:
        self.guess, self.rounds = guess, []  # guesses tried and accepted, for each pass of the model
        self.pass_cost = [0.0] * (longest + 1)  # seconds of a pass that verifies so many guesses; moving averages, all
        self.guess_cost = 0.0  # seconds
        self.hits, self.trials = 1.0, 2.0  # guesses that stood, of those that were compared
        self.lost = 0.0  # seconds that plain decoding would have saved, in the last fifty passes or so
        self.reach = 1  # the costs of more guesses than this are not known yet

    def choose(self, room: int) -> int:
        """The number of guesses, at most `room`, with the most expected tokens per second.

        Of k guesses 1 + p + ... + p^k tokens are expected (https://arxiv.org/abs/2211.17192). Where none pays, one is tried
        all the same while half a pass in fifty is not lost yet: so it is noticed when guessing begins to pay.
        """
        room = min(room, self.reach, len(self.pass_cost) - 1) if self.pass_cost[0] else 0  # plain decoding is measured first
        p = self.hits / self.trials
        rates = [sum(p**i for i in range(k + 1)) / max(self.pass_cost[k] + k * self.guess_cost, 1e-9) for k in range(room + 1)]
        best = rates.index(max(rates)) or (min(room, 1) if self.lost <= 0.5 * self.pass_cost[0] else 0)
        return tp.gather(best)[0] if room else 0  # the first rank's clock decides

    def learn(self, tried: int, accepted: int, guessing: float, verifying: float) -> None:
        """Take note of a pass: guesses tried and accepted, and the seconds that guessing and verifying took."""
        self.rounds.append((tried, accepted))
        self.reach = max(self.reach, tried + 1)
        self.lost *= 0.98
        cost = self.pass_cost[tried] = 0.75 * (self.pass_cost[tried] or verifying) + 0.25 * verifying
        for k, known in enumerate(self.pass_cost):  # more rows never take less time; what is not known is hoped to be as fast
            self.pass_cost[k] = min(known, cost) if k < tried else max(known, cost)
        if tried:
            self.guess_cost = 0.75 * (self.guess_cost or guessing / tried) + 0.25 * guessing / tried
            self.hits, self.trials = 0.95 * self.hits + accepted, 0.95 * self.trials + min(accepted + 1, tried)
            self.lost = max(0.0, self.lost + guessing + verifying - (accepted + 1) * self.pass_cost[0])


def generate(
    engine: Engine, prompt: list[int], max_new_tokens: int, eos_id: int | None, sampling: Sampling, speculation: Speculation
) -> Generator[int, None, str]:
    """Yield the tokens that follow `prompt`, of which the engine may hold a beginning (Engine.rewind); return why they ended.

    Each is the model's own sample given all before it, guessed or not. They end with the token `eos_id` (which is not
    yielded; None: never), `max_new_tokens`, or the end of the context.
    """
    ids, limit = list(prompt), engine.model.args.max_seq_length
    assert engine.ids == prompt[: len(engine.ids)] and len(engine.ids) < len(prompt), "Engine.rewind comes first"
    tokens = engine.extend(prompt, sampling)
    speculation.guess(prompt, 1, sampling)  # a draft reads the prompt now, or that would be taken for the cost of a guess
    while True:
        for token in tokens:
            if token == eos_id:
                return "end of sequence"
            yield token
            ids.append(token)
            if len(ids) == len(prompt) + max_new_tokens:
                return f"max_new_tokens {max_new_tokens}"
            if len(ids) > limit:
                return f"context of {limit} tokens is full"
        start = time.perf_counter()
        count = speculation.choose(min(limit, len(prompt) + max_new_tokens - 1) - len(ids))
        guesses = speculation.guess(ids, count, sampling) if count else []
        guessed = time.perf_counter()
        samples = engine.run([token, *guesses], sampling, verify=True)
        accepted = next((i for i, (a, b) in enumerate(zip(guesses, samples, strict=False)) if a != b), len(guesses))
        speculation.learn(len(guesses), accepted, guessed - start, time.perf_counter() - guessed)
        del engine.ids[len(ids) + accepted :]
        tokens = samples[: accepted + 1]


class TextStream:
    """Token ids in, text out, as soon as it is certain: the bytes of half a character wait for the other half.

    The concatenated text is what sentencepiece decodes behind a prompt, so a leading space is kept.
    """

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        self.tokenizer, self.front, self.waiting = tokenizer, tokenizer.encode("a"), []

    def push(self, token: int | None) -> str:
        """The text that `token` makes certain; None is the end, which makes all certain."""
        # a padded vocabulary has ids without a piece
        self.waiting += [token] if token is not None and token < self.tokenizer.vocab_size() else []
        text = self.tokenizer.decode(self.front + self.waiting)[1:]
        if token is not None and text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.waiting = []
        return text


class Session:
    """What the command line asks for, checked, loaded and compiled: everything that an answer needs but its prompt.

    ValueError names what is missing or does not fit. `make_engine` (model, cache, checkpoint=) makes an engine of each model.
    """

    def __init__(self, args: argparse.Namespace, make_engine: Callable = Engine) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own news are not the user's
        sys.stdout.reconfigure(encoding="utf-8")
        torch.set_num_threads(cpu.cores())
        start, paths = time.perf_counter(), [args.checkpoint_path, args.draft_checkpoint_path]
        checkpoints = [read_checkpoint(path) for path in paths if path]
        pieces = ([c.args.vocab_size, *map(c.tokenizer.id_to_piece, range(c.tokenizer.vocab_size()))] for c in checkpoints)
        if len(checkpoints) > 1 and next(pieces) != next(pieces):
            raise ValueError(f"{paths[1]} has another vocabulary than the model: choose a draft of its family")
        self.args, self.checkpoint, self.engines = args, checkpoints[0], []  # the model's, then the draft's
        for checkpoint in checkpoints:
            model = tp.load_model(checkpoint, args.device, getattr(torch, args.precision), bool(self.engines))
            self.engines.append(make_engine(model, model.make_cache(checkpoint.args.max_seq_length), checkpoint=checkpoint))
        longest = args.speculate_k * (args.prompt_lookup or len(checkpoints) > 1)
        self.speculation = Speculation(self.engines[1].guess if self.engines[1:] else prompt_lookup, longest)
        self.chat = args.interactive and not args.raw and self.checkpoint.header["chat"]  # the user gets the Llama-2 template
        self.statistics, self.table = "no answer yet", []  # tokens cached and computed, time to the first, of each answer
        print(f"Load time: {time.perf_counter() - start:.3f} s", file=sys.stderr)
        if args.compile or args.compile_prefill:
            self.compile(["decode"] + ["verify"] * bool(longest) + ["prefill"] * args.compile_prefill)

    def compile(self, kinds: list[str]) -> None:
        """Compile these kinds of step of the model, and what a draft has. ValueError where that fails."""
        start = time.perf_counter()
        try:
            for engine, each in zip(self.engines, (kinds, ["decode", "prefill"]), strict=False):
                engine.compile(each, self.sampling())
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ValueError(f"--compile: {str(error).splitlines()[0]}: install a C++ compiler, or do without") from error
        print(f"Compile time: {time.perf_counter() - start:.3f} s", file=sys.stderr)

    def sampling(self, i: int = 0) -> Sampling:
        """That of answer i."""
        seed = torch.tensor(self.args.seed + i & 0x7FFFFFFF, dtype=torch.int32, device=self.args.device)
        return Sampling(seed, torch.tensor(self.args.temperature, device=self.args.device), self.args.top_k)

    def encode(self, text: str, before: Sequence[int] = ()) -> list[int]:
        """The ids of a conversation so far and of what the user says next. ValueError where the context has no room for it.

        With the template BOS [INST] text [/INST], the system's text in the first turn; without, it is one text that goes on.
        """
        tokenizer, context, system = self.checkpoint.tokenizer, self.checkpoint.args.max_seq_length, self.args.system
        if self.chat:
            system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and not before else ""
            text = f"[INST] {(system + text).strip()} [/INST]"
        elif system and not before:
            text = f"{system}\n{text}"
        text = utf8(text.encode("utf-8", "surrogateescape"), "what was said")
        ids = [*before, *[tokenizer.bos_id()] * (self.chat or not before), *tokenizer.encode(text)]
        if len(ids) > context:
            raise ValueError(f"{len(ids)} tokens, but a context of {context}: /clear it, or shorten the prompt or --system")
        return ids

    def answer(self, prompt: list[int], i: int = 0) -> list[int]:
        """Print the text that follows `prompt` as it comes, with seed + i; its ids. In a conversation, Ctrl-C ends it."""
        engine, stream, ids, cached, why = self.engines[0], TextStream(self.checkpoint.tokenizer), [], 0, "interrupted"
        eos_id, times = None if self.args.ignore_eos else self.checkpoint.tokenizer.eos_id(), [time.perf_counter()]
        self.speculation.rounds.clear()
        try:
            engine.rewind(prompt)
            cached = len(engine.ids)
            tokens = generate(engine, prompt, self.args.max_new_tokens, eos_id, self.sampling(i), self.speculation)
            while True:
                ids.append(next(tokens))
                times.append(time.perf_counter())
                print(stream.push(ids[-1]), end="", flush=True)
        except StopIteration as stop:
            why = stop.value
        except KeyboardInterrupt:
            if not self.args.interactive or tp.ranks()[1] > 1:  # torchrun ends all
                raise
        times.append(time.perf_counter())
        print(stream.push(None), end="\n" * (self.args.interactive or sys.stdout.isatty()), flush=True)
        with suppress(KeyboardInterrupt) if self.args.interactive else nullcontext():
            for each in self.engines:
                each.keep(prompt + ids)
        self.account(len(prompt), cached, times, why)
        return ids

    def account(self, prompt: int, cached: int, times: list[float], why: str) -> None:
        """Write the figures of an answer: tokens of its prompt, and when it began, each token came, and it ended."""
        first, end, seconds = times[1] - times[0], times[-2] - times[0], max(times[-2] - times[1], 1e-9)
        weights = [t.nbytes for n, t in self.engines[0].model.state_dict().items() if n != "tok_embeddings.weight"]
        cuda = self.args.device == "cuda"
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rounds = self.speculation.rounds
        tried, accepted = (sum(each[column] for each in rounds) for column in (0, 1))
        lengths = sorted(accepted for tried, accepted in rounds if tried)
        self.table.append((cached, prompt - cached, first))
        self.statistics = f"""Prompt tokens: {prompt} (cached {cached} of {prompt})
Time to first token: {first:.3f} s
Prefill: {(prompt - cached) / first:.2f} tokens/s
Decode: {max(len(times) - 3, 0) / seconds:.2f} tokens/s ({len(times) - 2} tokens in {end:.2f} s)
Weights read: {len(rounds) * sum(weights) / seconds / 1e9:.2f} GB/s
Guesses: {tried} tried, {accepted} accepted ({accepted / max(tried, 1):.3f})
Tokens per pass: {1 + accepted / max(len(rounds), 1):.3f} in {len(rounds)} passes
Accepted lengths: {", ".join(f"{n}: {lengths.count(n)}" for n in dict.fromkeys(lengths)) or "none"}
Stopped: {why}
Peak memory: {peak / 1e9:.3f} GB ({"CUDA" if cuda else "RSS"})"""


def between(low: float, high: float = 1e300, kind: type = int) -> Callable[[str], float]:
    """An argparse type: a number of `kind` from `low` to `high`."""

    def number(text: str) -> float:
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low}" + f" and at most {high}" * (high < 1e300))
        return value

    return number


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Generate text from a checkpoint.", conflict_handler="resolve")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, or what quantize.py made of it")
    add("--prompt", default="Hello, my name is", help='text to continue; "-" reads standard input')
    add("--interactive", action="store_true", help="a conversation: each line of standard input in place of --prompt")
    add("--system", default="", help="text that comes before everything, as a chat model's instructions where it is one")
    add("--raw", action="store_true", help="let a chat model go on with the text as it is, without its template")
    add("--num_samples", type=between(1), default=1, help="answers; answer i uses seed + i (1)")
    add("--max_new_tokens", type=between(1), default=200, help="longest answer, in tokens (200)")
    add("--temperature", type=between(0, kind=float), default=0.8, help="of sampling; 0 is greedy (0.8)")
    add("--top_k", type=between(1), help="sample among so many of the most likely tokens only (all)")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--draft_checkpoint_path", type=Path, help="a small model of the same vocabulary guesses ahead")
    either("--prompt_lookup", action="store_true", help="guess what followed the last few tokens where they stood before")
    add("--speculate_k", type=between(1, cpu.MAX_ROWS - 1), default=5, help="longest run of guesses, at most 15 (5)")
    add("--seed", type=between(0, 2**31 - 1), default=1234, help="the same seed gives the same text (1234)")
    add("--compile", action="store_true", help="compile the step of one token: slower start, faster decoding")
    add("--compile_prefill", action="store_true", help="compile the prompt's pass as well")
    add("--device", choices=DEVICES, default=DEVICES[0], help="cuda where there is one")
    add("--precision", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of activations, float weights")
    add("--ignore_eos", action="store_true", help="do not stop at the end-of-sequence token (for benchmarks)")
    add("--profile", type=lambda path: open(path, "a").name, help="trace the answers, for chrome://tracing")  # noqa: SIM115
    return parser


def read_prompt(text: str) -> str:
    """The prompt, from standard input where `text` is "-". ValueError where it is empty or not UTF-8."""
    piped = tp.gather(sys.stdin.buffer.read().removesuffix(b"\n") if text == "-" else b"")[0]
    return utf8(piped if text == "-" else text.encode("utf-8", "surrogateescape"), "the prompt (--prompt, or standard input)")


def answer_all(texts: list[str], session: Session) -> None:
    """Print num_samples answers to each prompt, with statistics; or hold a conversation instead."""
    profile, prompts = session.args.profile, tp.gather([session.encode(text) for text in texts])[0]
    with torch.profiler.profile() if profile else nullcontext() as trace:
        if session.args.interactive:
            converse(session)
        for prompt, i in [(prompt, i) for prompt in prompts for i in range(session.args.num_samples)]:
            print("\n" * bool(session.table), end="")
            session.answer(prompt, i)
            print(session.statistics, file=sys.stderr)
    if profile and tp.ranks()[0] == 0:
        trace.export_chrome_trace(profile)


def converse(session: Session) -> None:
    """Answer what standard input says, line by line; each turn runs its own tokens only, the rest is in the cache.

    End of input ends it, and so does Ctrl-C, but for one that ends an answer: what was said until then stays.
    """
    tokenizer, keyboard, ids = session.checkpoint.tokenizer, sys.stdin.isatty(), []
    closing = [tokenizer.piece_to_id("\u2581"), tokenizer.eos_id()] * session.chat  # the template's space and EOS
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
    session.encode("Hello")  # or --system leaves no room for anything
    if keyboard:
        with suppress(ImportError):
            import readline  # noqa: F401, PLC0415  input() then edits the line, and has a history
        print("/clear starts anew, /stats shows the last answer's figures, Ctrl-D leaves", file=sys.stderr)

    def listen() -> str | None:
        try:
            return input("> " * (keyboard and sys.stdout.isatty())).strip()
        except EOFError:
            return None

    while (text := tp.gather(listen())[0]) is not None:
        try:
            if text == "/clear":
                ids = []
            elif text == "/stats":
                print(session.statistics, file=sys.stderr)
            elif text:
                prompt = tp.gather(session.encode(text, ids))[0]
                ids = prompt + session.answer(prompt)
                ids += closing[ids[-1:] == closing[:1] :]  # an answer may have ended with the space
                session.encode("Hello", ids)  # or the context is full, and says so
        except ValueError as error:
            print(error, file=sys.stderr)


def main() -> None:
    args = build_parser().parse_args()
    tp.join(args.device)
    answer_all([] if args.interactive else [read_prompt(args.prompt)], Session(args))


if __name__ == "__main__":
    run(main)
