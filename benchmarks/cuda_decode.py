"""Decoding, prefill and drafting on a GPU by a random model, and decoding by transformers."""

import statistics
import time

import torch

import kernels
from benchmarks.cuda_common import DEVICE, SCHEMES, fill_random, milliseconds, read_speed
from benchmarks.grow import shape_args
from benchmarks.memory import bytes_per_token, share, weight_bytes
from benchmarks.programs import cache_keyword, random_ids, random_transformers_model
from checkpoint import empty_model
from generate import Engine, generate
from model import Transformer
from sampling import SamplingParams

TOKENS = 200


def random_model(shape: str, scheme: str) -> Transformer:
    """A model of one of grow.SHAPES on the GPU."""
    model = empty_model(shape_args(shape), SCHEMES[scheme], torch.bfloat16).to_empty(device=DEVICE)
    fill_random(model)
    return model


def new_engine(shape: str, scheme: str) -> Engine:
    model = random_model(shape, scheme)
    return Engine(model, model.args.max_seq_length)


def new_params() -> SamplingParams:
    return SamplingParams.create(DEVICE, 1, 0.8)


def token_seconds(engine: Engine, params: SamplingParams, tokens: int = TOKENS) -> float:
    """Seconds per token after a prompt of 8, a median of three answers."""
    seconds = []
    for _ in range(3):
        engine.truncate(0)
        stream = generate(engine, random_ids(8, engine.model.args.vocab_size), tokens + 1, (), params)
        next(stream)
        start = time.perf_counter()
        count = sum(1 for _ in stream)
        seconds.append((time.perf_counter() - start) / count)
    return statistics.median(seconds)


def kernel_times(engine: Engine, params: SamplingParams) -> dict[str, list[float]]:
    """Microseconds in a step of one row, and launches, of each kernel: means of 20 replays."""
    inputs = torch.tensor([[5], [128]])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(20):
            engine.start_pass(inputs, params)
            torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return {event.key[:80]: [round(event.self_device_time_total / 20, 1), event.count / 20] for event in events[:24]}


def step(shape: str, scheme: str, compiled: bool) -> dict:
    """Decoding of 200 tokens; passes of several rows over one; times of kernels."""
    engine, params = new_engine(shape, scheme), new_params()
    speed = read_speed()
    result = {"GB/s": round(speed)}
    if compiled:
        start = time.perf_counter()
        engine.compile(True, False, params)
        result["compile seconds"] = round(time.perf_counter() - start, 1)
    rate = 1 / token_seconds(engine, params)
    size = bytes_per_token(weight_bytes(engine.model), engine.model.args, 8, TOKENS)
    result |= {"tokens/s": round(rate, 1), "share": round(share(rate, size, speed), 3)}
    times = {}
    for rows in (1, 2, 6, 8, 16):
        engine.truncate(128)
        engine.forward([5] * rows, params)
        times[rows] = milliseconds(engine.decode_step.graphs[rows].graph.replay)
    result["graph ms"] = round(times[1], 3)
    result["rows over 1"] = {rows: round(times[rows] / times[1], 3) for rows in times}
    result["kernels"] = kernel_times(engine, params)
    return result


def captured(shape: str, scheme: str) -> dict:
    """Decoding with the captured step."""
    return step(shape, scheme, compiled=False)


def compiled(shape: str, scheme: str) -> dict:
    """Decoding with the captured step, compiled by torch.compile."""
    return step(shape, scheme, compiled=True)


def capacity(shape: str, scheme: str) -> dict:
    """Seconds per token with a cache for the whole context, over seconds with a cache for 209 positions."""
    model, params = random_model(shape, scheme), new_params()
    engines = [Engine(model, size) for size in (9 + TOKENS, model.args.max_seq_length)]
    for engine in engines:
        engine.reserve(engine.max_seq_length)
    times = [[token_seconds(engine, params) for engine in engines] for _ in range(3)]
    return {"over": round(statistics.median(large / exact for exact, large in times), 3)}


def plain(shape: str, scheme: str) -> dict:
    """Decoding by PyTorch's operators, as without Triton."""
    kernels.cuda_kernels_for = lambda dtype: None
    return {"tokens/s": round(1 / token_seconds(new_engine(shape, scheme), new_params(), 40), 1)}


def prompt(shape: str, scheme: str) -> dict:
    """Milliseconds of a prompt of 2,048 tokens, of which none, all but 32 or all but 16 are cached."""
    engine, params = new_engine(shape, scheme), new_params()
    ids = random_ids(2048, engine.model.args.vocab_size)
    result = {}
    for cached in (0, 2016, 2032):

        def prefill(cached: int = cached) -> None:
            engine.cached_ids = ids[:cached]
            engine.prefill(ids, params)

        prefill()
        result[f"{cached} cached, ms"] = round(milliseconds(prefill), 2)
    return result


def draft(shape: str, scheme: str) -> dict:
    """Microseconds of one of 15 draft tokens."""
    engine, params = new_engine(shape, scheme), new_params()
    ids = random_ids(100, engine.model.args.vocab_size)
    result = {}
    for kind in ("captured", "compiled"):
        if kind == "compiled":
            engine.truncate(0)
            engine.compile(True, False, params)
        times = {}
        for k in (1, 15):
            engine.draft(ids, k, params)
            times[k] = milliseconds(lambda k=k: engine.draft(ids, k, params), 31)
        result[f"{kind}, us"] = round(1000 * (times[15] - times[1]) / 14, 1)
    return result


@torch.inference_mode()
def transformers(shape: str, scheme: str) -> dict:
    """Decoding of 64 tokens by transformers' Llama after a prompt of 8, with a static cache and torch.compile."""
    from transformers import StaticCache  # noqa: PLC0415  may be absent

    model = random_transformers_model(shape_args(shape), DEVICE)
    cache = {cache_keyword(model): StaticCache(config=model.config, max_cache_len=256)}
    prompt = torch.tensor([random_ids(8, model.config.vocab_size)], device=DEVICE)
    model(prompt, use_cache=True, **cache)  # the cache is allocated in its first pass
    token = prompt[:, -1:]
    positions = torch.arange(8, 256, device=DEVICE).view(-1, 1, 1)

    def decode_one_token(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return model(token, position_ids=position, use_cache=True, **cache).logits[:, -1:].argmax(-1)

    compiled_step = torch.compile(decode_one_token, mode="reduce-overhead", fullgraph=True)
    seconds = []
    for chunk in positions.split([8, 64, 64, 112]):  # the first compiles
        start = time.perf_counter()
        for position in chunk:
            token = compiled_step(token, position).clone()
            token.item()
        seconds.append((time.perf_counter() - start) / len(chunk))
    return {"compile seconds": round(8 * seconds[0], 1), "tokens/s": round(1 / statistics.median(seconds[1:]), 1)}
