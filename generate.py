"""Generate text from a checkpoint: prefill, sample, decode, stream.

    python generate.py --compile --checkpoint_path checkpoints/$MODEL_REPO/model.pth --prompt "Hello, my name is"

Engine and generate() work on token ids; Session and main() add text, flags and the terminal.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext, suppress
from pathlib import Path

import utils

import torch
from torch import Tensor

import tp
from chat import Conversation, chat
from checkpoint import DEVICES, Checkpoint, bits_and_groupsize, read_checkpoint
from model import Transformer
from sampling import SamplingParams, sample
from speculation import PromptLookup, Speculation
from tokenizer import TextStreamer

# Look for the folder: `except ImportError` would hide an error in it, and PyPI has an unrelated package `kernels`.
HAS_KERNELS = Path(__file__).with_name("kernels").is_dir()
if HAS_KERNELS:
    from kernels import CapturedStep, compile_kernels, decode_ahead

MIN_CAPACITY = 256  # positions of the smallest KV cache, because each time it grows, steps are captured again
MAX_DECODE_ROWS = 16  # tokens of a decoding step: the last one, and up to 15 guesses (draft tokens)
PREFILL_CHUNK = {"cpu": 512, "cuda": 2048}  # tokens of a prompt that run in one pass; bounds the memory


def step(model: Transformer, inputs: Tensor, cache: Tensor, params: SamplingParams, last_only: bool) -> Tensor:
    """One pass over `inputs` [2, S], ids and positions: the token [S] sampled after each, or [1] after the last."""
    logits = model(inputs[:1], inputs[1], cache, last_only)[0]
    return sample(logits, inputs[1, -len(logits) :], params)


class Engine:
    """A model, its KV cache, and the token ids whose keys and values are in the cache.

    Callers pass whole sequences; only the tokens that are not cached run.
    """

    def __init__(self, model: Transformer, max_seq_length: int, checkpoint=None, prefix_cache=None) -> None:
        self.model = model
        self.device = model.tok_embeddings.weight.device
        self.max_seq_length = max_seq_length
        self.kv_cache = model.make_cache(0)  # `reserve` makes it larger
        self.cache_users = [self]  # the engines that have this KV cache
        self.cached_ids: list[int] = []
        self.num_cached = 0  # tokens of the last prompt that were cached
        self.checkpoint = checkpoint  # checkpoint.Checkpoint
        self.prefix_cache = prefix_cache  # generate_prefill.PrefixCache
        self.decode_step: Callable = CapturedStep(step) if HAS_KERNELS else step  # for up to MAX_DECODE_ROWS tokens
        self.prefill_step: Callable = step

    def truncate(self, length: int) -> None:
        """Drop the cached tokens from position `length` on."""
        del self.cached_ids[length:]

    @torch.inference_mode(False)  # because to the compiler an inference tensor and another one are different
    def reserve(self, positions: int) -> None:
        """Grow the KV cache to at least `positions` positions, by doubling, one layer after another.

        ValueError if there is no memory for it.
        """
        if positions <= self.kv_cache[-1].shape[3]:
            return
        capacity = max(positions, min(max(2 * self.kv_cache[-1].shape[3], MIN_CAPACITY), self.max_seq_length))
        for engine in self.cache_users:  # a captured step keeps the cache that it was captured with
            getattr(engine.decode_step, "graphs", {}).clear()
        try:
            for i, old in enumerate(self.kv_cache):
                new = old.new_empty(*old.shape[:3], capacity, old.shape[4])
                new[:, :, :, : old.shape[3]] = old
                self.kv_cache[i] = new
        except RuntimeError as error:
            if tp.WORLD_SIZE > 1:
                raise  # because the other ranks would wait for this one
            raise ValueError(f"no memory for a KV cache of {capacity} positions: choose a smaller --context") from error

    def share_cache(self, target: "Engine") -> None:
        """Use the KV cache and the embeddings of `target` if this is its quantized copy: same shape, same embeddings.

        Such a draft needs no prefill. The target overwrites its keys and values when it verifies the guesses.
        """
        first_rows = [engine.model.tok_embeddings.weight[:1000] for engine in (self, target)]
        if self.model.args == target.model.args and torch.equal(*first_rows):
            self.model.tok_embeddings = target.model.tok_embeddings
            self.kv_cache = target.kv_cache
            self.cache_users = target.cache_users
            self.cache_users.append(self)
            self.prefix_cache = None

    def match_prefix(self, prompt: list[int]) -> None:
        """Keep the cached tokens that `prompt` starts with. Its last token is never kept, because it has to run."""
        if self.cached_ids != prompt[: len(self.cached_ids)] or len(self.cached_ids) == len(prompt):
            self.truncate(len(os.path.commonprefix([self.cached_ids, prompt[:-1]])))
        self.reserve(len(prompt))
        if self.prefix_cache:
            self.prefix_cache.load(self, prompt[:-1])
        self.num_cached = len(self.cached_ids)

    @torch.inference_mode()
    def start_pass(self, inputs: Tensor, params: SamplingParams) -> Tensor:
        """Start a pass over `inputs` [2, S], ids and positions, without waiting for the device: the sampled ids.

        Up to MAX_DECODE_ROWS tokens give [S], overwritten by the next pass; more of them only the last sample, [1].
        """
        is_long = inputs.shape[1] > MAX_DECODE_ROWS
        step = self.prefill_step if is_long else self.decode_step
        return step(self.model, inputs.to(self.device), self.kv_cache, params, is_long)

    def read(self, samples: Tensor) -> list[int]:
        """Wait for sampled ids, which are rank 0's. ValueError if the logits were not finite."""
        tokens = tp.broadcast(samples).tolist()
        if -1 in tokens:
            raise ValueError("the logits are not finite: try --precision bfloat16, or another checkpoint")
        return tokens

    def forward(self, ids: list[int], params: SamplingParams) -> list[int]:
        """Run `ids` after the cached tokens: the token [S] sampled after each, or [1] after the last of many."""
        positions = range(len(self.cached_ids), len(self.cached_ids) + len(ids))
        self.reserve(positions.stop)
        tokens = self.read(self.start_pass(torch.tensor([ids, positions]), params))
        self.cached_ids += ids
        return tokens

    def decode(self, token: int, params: SamplingParams) -> Iterator[int]:
        """Yield the tokens that follow `token`, one pass each."""
        if HAS_KERNELS and self.device.type == "cuda" and tp.WORLD_SIZE == 1:
            yield from decode_ahead(self, token, params)
        while True:
            [token] = self.forward([token], params)
            yield token

    def prefill(self, prompt: list[int], params: SamplingParams) -> list[int]:
        """Run the tokens of `prompt` that are not cached, in chunks: the token [1] that follows."""
        chunk = PREFILL_CHUNK[self.device.type]
        starts = range(len(self.cached_ids), len(prompt), chunk)
        for start in utils.progress(starts, "prompt", disable=len(starts) < 2 or None):
            tokens = self.forward(prompt[start : start + chunk], params)
        return tokens[-1:]

    @torch.inference_mode()
    def draft(self, ids: list[int], k: int, params: SamplingParams) -> list[int]:
        """Draft up to `k` tokens that follow `ids`; fewer near the end of the context.

        Waits for the device twice, not once per token.
        """
        k = min(k, self.max_seq_length + 1 - len(ids))
        self.match_prefix(ids)
        self.reserve(len(ids) + k - 1)
        samples = torch.tensor(self.prefill(ids, params), device=self.device)
        for position in torch.arange(len(ids), len(ids) + k - 1, device=self.device):
            # -1 means non-finite logits; read() raises.
            inputs = torch.stack([samples[-1:].clamp(min=0), position[None]])
            samples = torch.cat([samples, self.start_pass(inputs, params)])
        tokens = self.read(samples)
        self.cached_ids = ids + tokens[:-1]
        return tokens

    def save(self, ids: list[int]) -> None:
        """Drop the cached tokens after the common prefix with `ids`, and save the others to the prefix cache."""
        self.truncate(len(os.path.commonprefix([self.cached_ids, ids])))
        if self.prefix_cache:
            self.prefix_cache.save(self)

    def compile(self, decode: bool, prefill: bool, params: SamplingParams) -> None:
        """Compile the steps of decoding, of prefill, or both, before anything is cached."""
        self.reserve(2)  # because the compiler makes a size of 1 a constant
        torch._dynamo.config.specialize_float = True  # norm_eps is a constant; a dynamic float would not compile
        # A whole graph would contradict TORCH_COMPILE_DISABLE.
        compiled = torch.compile(step, fullgraph=not torch._dynamo.config.disable)

        def compiled_step(model: Transformer, inputs: Tensor, cache: list[Tensor], *others: object) -> Tensor:
            """One row runs as two: dynamo specializes on size 1, and that code may round differently from others."""
            rows = inputs.shape[1]
            # Always a new tensor, because to the compiler an inference tensor and another one are different.
            inputs = inputs.repeat(1, 2)[:, : max(rows, 2)].contiguous()
            torch._dynamo.mark_dynamic(inputs, 1)
            for layer in cache:
                torch._dynamo.mark_dynamic(layer, 3)
            return compiled(model, inputs, cache, *others)[:rows]

        if decode:
            is_captured = HAS_KERNELS and self.device.type == "cuda"
            self.decode_step = CapturedStep(compiled_step) if is_captured else compiled_step
            self.start_pass(torch.zeros(2, 1, dtype=torch.int64), params)
        if prefill:
            self.prefill_step = compiled_step
            self.start_pass(torch.zeros(2, MAX_DECODE_ROWS + 1, dtype=torch.int64), params)


def generate(engine: Engine, prompt: list[int], max_new_tokens: int, eos_ids, params: SamplingParams, speculation=None):
    """Yield the tokens that follow `prompt`, up to one of `eos_ids` (which is not yielded).

    Stops after max_new_tokens or when the KV cache is full (the last token needs no position). At the end, keys and
    values are saved to the prefix cache if the engines have one.
    """
    ids = list(prompt)
    end = min(len(prompt) + max_new_tokens, engine.max_seq_length + 1)
    draft = speculation.draft if speculation else None
    decoded = None
    try:
        engine.match_prefix(prompt)
        tokens = engine.prefill(prompt, params)
        while True:
            for token in tokens:
                if token in eos_ids:
                    return
                ids.append(token)
                yield token
                if len(ids) == end:
                    return
            if speculation:
                tokens = speculation.speculative_decode(engine, ids, end - len(ids), params)
            else:
                decoded = decoded or engine.decode(token, params)
                tokens = [next(decoded)]
    finally:
        for each in filter(None, (engine, draft)):
            each.save(ids)


class Session:
    """The loaded models and the settings of the command line: everything that an answer needs except its prompt.

    `texts` are the prompts; without any it is a conversation. ValueError for a file or flag that does not fit.
    """

    def __init__(self, args: argparse.Namespace, texts: list[str], prefix_cache=None) -> None:
        start = time.perf_counter()
        self.args = args
        self.system = tp.from_rank(lambda: utils.read_text(args.system, "--system") if args.system else "")
        with utils.reading("--stop", "give some text in UTF-8"):
            self.stops = [text.encode().decode().replace(r"\n", "\n").replace(r"\t", "\t") for text in args.stop]
        checkpoint = read_checkpoint(args.checkpoint_path)
        self.tokenizer = checkpoint.tokenizer
        stop_ids = [token for text, token in self.tokenizer.added_tokens.items() if text in self.stops]
        self.eos_ids = stop_ids if args.ignore_eos else stop_ids + self.tokenizer.eos_ids
        self.max_seq_length = min(args.context or math.inf, checkpoint.args.max_seq_length)
        use_chat_template = self.tokenizer.chat_template is not None and not args.raw
        self.conversation = Conversation(self.tokenizer, self.max_seq_length, self.system, use_chat_template)
        self.prompts = [self.conversation.prompt(text, args.raw) for text in texts]
        self.max_new_tokens = args.max_new_tokens or (200 if texts else self.max_seq_length)
        if texts:
            self.max_seq_length = min(self.max_seq_length, max(map(len, self.prompts)) + self.max_new_tokens)
        limits = {name: getattr(args, name) for name in ("top_k", "top_p", "min_p")}
        limits["vocab_size"] = self.tokenizer.vocab_size
        self.params = SamplingParams.create(args.device, 0, args.temperature, **limits)
        self.engine = self.load(checkpoint, prefix_cache)
        path = args.draft_checkpoint_path
        draft = self.load(read_checkpoint(path), prefix_cache, is_draft=True) if path else None
        lookup = PromptLookup() if args.prompt_lookup else None
        self.speculation = Speculation(draft, args.speculate_k, lookup) if draft or lookup else None
        self.finish_reason = ""  # why the last answer ended
        self.statistics = "no answer yet"  # the figures of the last answer
        print(f"Load time: {time.perf_counter() - start:.3f} s", file=sys.stderr)

    def load(self, checkpoint: Checkpoint, prefix_cache, is_draft: bool = False) -> Engine:
        """A compiled engine for a checkpoint. ValueError for a draft that lacks some of the model's tokens."""
        vocab, size = checkpoint.tokenizer.bpe.vocab, checkpoint.args.vocab_size
        if is_draft and (vocab != self.tokenizer.bpe.vocab or size < self.tokenizer.vocab_size):
            raise ValueError(f"{checkpoint.path} has another vocabulary: choose a draft of the family")
        model = tp.load_sharded(checkpoint, self.args.device, getattr(torch, self.args.precision), is_draft)
        engine = Engine(model, min(self.max_seq_length, checkpoint.args.max_seq_length), checkpoint, prefix_cache)
        if is_draft:
            engine.share_cache(self.engine)
        engine.reserve(engine.max_seq_length if self.prompts else 1)  # in a conversation it grows
        if HAS_KERNELS:
            compile_kernels(model)
        weights = sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e9
        positions = engine.kv_cache[0].shape[3]
        size = sum(layer.nbytes for layer in engine.kv_cache) // positions
        cache = "shared, embeddings too" if len(engine.cache_users) > 1 else f"{positions} positions of {size} bytes"
        print(f"Memory: {weights:.3f} GB of weights, KV cache: {cache}", file=sys.stderr)
        # A CPU replays its steps instead. A compiled step runs one row as two, which costs too much in 4 bits.
        bits, _ = bits_and_groupsize("wo", checkpoint.header["quantization"])
        compile_decode = self.args.compile and self.args.device == "cuda" and bits > 4
        if compile_decode or self.args.compile_prefill:
            with utils.reading("torch.compile", "do without --compile[_prefill]"):
                engine.compile(compile_decode, self.args.compile_prefill, self.params)
        return engine

    def answer(self, prompt: list[int], i: int = 0) -> str:
        """Print the text that follows `prompt` while it is generated, with seed + i. Return it from Tokenizer.decode.

        In a conversation, Ctrl-C ends the answer.
        """
        args, streamer = self.args, TextStreamer(self.stops)
        ids, times = [], []  # seconds from the start to each token
        interruptible = args.interactive and tp.WORLD_SIZE == 1  # torchrun ends its ranks on Ctrl-C
        self.params.seed.fill_((args.seed + i) % 2**31)
        if self.speculation:
            self.speculation.start()
        start = time.perf_counter()
        self.finish_reason = "interrupted"
        tokens = generate(self.engine, prompt, self.max_new_tokens, self.eos_ids, self.params, self.speculation)
        with suppress(KeyboardInterrupt) if interruptible else nullcontext(), closing(tokens):
            for token in tokens:
                ids.append(token)
                times.append(time.perf_counter() - start)
                streamer.put(self.tokenizer.token_bytes(token))
                if streamer.stop:
                    break
            limit = min(self.max_new_tokens, self.max_seq_length + 1 - len(prompt))
            self.finish_reason = f"limit of {limit} tokens" if len(ids) == limit else "end of sequence"
            if streamer.stop:
                self.finish_reason = f"stop text {streamer.stop!r}"
        streamer.end("\n" if args.interactive or sys.stdout.isatty() else "")
        self.statistics = self.describe(len(prompt), len(ids), times or [time.perf_counter() - start])
        return self.tokenizer.decode(ids, streamer.printed)

    def describe(self, prompt_tokens: int, new_tokens: int, times: list[float]) -> str:
        """The figures of an answer, one `Name: figures` line each. `times` are seconds to each of its tokens."""
        decoded = max(new_tokens - 1, 0)  # prefill samples the first token
        seconds = times[-1] - times[0] or math.inf  # no rates of a single token
        passes = self.speculation.num_passes if self.speculation else decoded
        size = sum(buffer.nbytes for buffer in self.engine.model.buffers())  # of the linear layers
        lines = [
            f"Prompt tokens: {prompt_tokens} (cached {self.engine.num_cached} of {prompt_tokens})",
            f"Time to first token: {times[0]:.3f} s",
            f"Prefill: {(prompt_tokens - self.engine.num_cached) / times[0]:.2f} tokens/s",
            f"Decode: {decoded / seconds:.2f} tokens/s ({new_tokens} tokens in {times[-1]:.2f} s)",
            f"Weights read: {passes * size / seconds / 1e9:.2f} GB/s",
            f"Stopped: {self.finish_reason}",
        ]
        if self.speculation:
            drafted, accepted = self.speculation.num_drafted, min(self.speculation.num_accepted, decoded)
            lines.append(f"Guesses: {drafted} tried, {accepted} accepted, {decoded} tokens in {passes} passes")
        return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The flags of generate.py, which generate_prefill.py has as well."""
    number = utils.number_between
    parser = argparse.ArgumentParser(description="Generate text from a checkpoint.", allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, or a file that quantize.py wrote")
    prompts = parser.add_mutually_exclusive_group().add_argument
    prompts("--prompt", action="append", help='text to continue, @FILE, or "-" for standard input; may be repeated')
    prompts("--interactive", action="store_true", help="hold a conversation: each line of standard input is a prompt")
    add("--system", help="text or @FILE that comes first; for a chat model, its system prompt")
    add("--raw", action="store_true", help="continue the text as it is, without the chat template")
    add("--num_samples", type=number(1), default=1, help="answers to each prompt; answer i uses seed + i (1)")
    add("--max_new_tokens", type=number(1), help="longest answer, in tokens (200; in a conversation, the context)")
    add("--context", type=number(1), help="most tokens of prompt and answer together (those that the model allows)")
    add("--stop", action="append", default=[], help=r"end the answer before this text; \n is a line end; repeatable")
    add("--temperature", type=number(0, 1e30, float), default=0.8, help="sampling temperature; 0 is greedy (0.8)")
    add("--top_k", type=number(1), help="sample from the K most likely tokens (all)")
    add("--top_p", type=number(1e-6, 1, float), help="nucleus: the most likely tokens whose probabilities sum to P (1)")
    add("--min_p", type=number(0, 1, float), help="drop tokens less likely than P times the most likely (0)")
    add("--draft_checkpoint_path", type=Path, help="speculative decoding with a small model, or this one in 4 bits")
    add("--prompt_lookup", action="store_true", help="speculative decoding by n-grams of the text; also with a draft")
    add("--speculate_k", type=number(1, MAX_DECODE_ROWS - 1), default=15, help="most guesses in a pass (15)")
    add("--seed", type=number(0, 2**31 - 1), default=1234, help="the same seed gives the same text (1234)")
    add("--compile", action="store_true", help="torch.compile decoding on CUDA, in 16 and 8 bits; starts more slowly")
    add("--compile_prefill", action="store_true", help="torch.compile the pass over the prompt as well")
    add("--device", choices=DEVICES, default=DEVICES[0], help="cuda, if there is one")
    add("--precision", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of unquantized tensors")
    add("--ignore_eos", action="store_true", help="do not stop at the end-of-sequence token (for benchmarks)")
    return parser


def generate_all(args: argparse.Namespace, prefix_cache=None) -> Session:
    """Print num_samples answers to each prompt, with statistics, or hold a conversation."""
    tp.init(args.device)
    torch.set_num_threads(tp.num_threads())
    sys.stdout.reconfigure(encoding="utf-8")
    if not HAS_KERNELS:
        print("there is no folder kernels/, so decoding is several times slower", file=sys.stderr)
    if args.interactive and args.system == "-":
        raise ValueError("--system -: standard input is the conversation; give a text, or @FILE")
    if "" in args.stop:
        raise ValueError("--stop is empty: give some text in UTF-8")
    prompts = [] if args.interactive else args.prompt or ["Hello, my name is"]
    texts = tp.from_rank(lambda: [utils.read_text(text, "--prompt") for text in prompts])
    session = Session(args, texts, prefix_cache)
    if args.interactive:
        chat(session)
    for prompt in session.prompts:
        for i in range(args.num_samples):
            if session.finish_reason:
                print()
            session.answer(prompt, i)
            print(session.statistics, file=sys.stderr)
    return session


def main() -> None:
    generate_all(build_parser().parse_args())


if __name__ == "__main__":
    tp.run(main)
