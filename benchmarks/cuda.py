"""Figures of one GPU at the shape of Llama-2-7B: random weights, made on the device, so there is nothing to load.

    python -m benchmarks.cuda                # all parts, each in a process of its own: JSON, a line each
    python -m benchmarks.cuda captured int8  # one part

A floor is the time in which the device's memory, as fast as it was measured, gives what has to be read.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import terminal
import time
from collections.abc import Callable

import torch

import kernels
from benchmarks.benchmark import bandwidth, bytes_per_token, random_ids, share, weight_bytes
from benchmarks.grow import shape_args
from checkpoint import empty_model
from generate import Engine, generate
from kernels.sampling import Sampling
from model import Transformer

SCHEMES = {"bf16": None, "int8": {"mode": "int8"}} | {
    f"g{size}": {"mode": "int4", "groupsize": size} for size in (32, 64, 128)
}
PARTS = [
    *(["products", scheme] for scheme in ("bf16", "int8", "g32", "g128")),
    *(["captured", scheme] for scheme in ("bf16", "int8", "g32", "g128")),
    *(["compiled", scheme] for scheme in ("bf16", "bf16", "int8", "g32")),  # the first time nothing is cached
    *(["plain", scheme] for scheme in ("bf16", "int8", "g32")),
    *(["prompt", scheme] for scheme in ("bf16", "int8", "g32")),
    ["capacity", "g32"],
    ["draft", "bf16"],
]
TOKENS = 200


def random_model(shape: str, scheme: str) -> Transformer:
    """A model of one of grow.SHAPES on the GPU, with weights of about the size that trained ones have."""
    model = empty_model(shape_args(shape, 32000), SCHEMES[scheme], torch.bfloat16).to_empty(device="cuda")
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            tensor.fill_(1)
        elif name.endswith("scale"):
            tensor.fill_(0.02 / 64 if tensor.dim() == 1 else 0.02 / 4)
        elif name.endswith("minimum"):
            tensor.fill_(-0.04)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.02)
        else:
            tensor.random_(-127 if tensor.dtype == torch.int8 else 0, 128 if tensor.dtype == torch.int8 else 256)
    model.frequencies = model.frequencies.cuda()
    return model


def new_sampling() -> Sampling:
    return Sampling.on("cuda", 1, 0.8)


def read_speed() -> float:
    """GB/s, a median."""
    return statistics.median(bandwidth("cuda") for _ in range(7))


def milliseconds(work: Callable[[], object], repeats: int = 7) -> float:
    """From the call to the moment when the device has done all, a median."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def graph_milliseconds(work: Callable[[], object]) -> float:
    """Of the device, in a graph: what the host does between kernels costs nothing."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    return milliseconds(graph.replay)


def decoding(engine: Engine, tokens: int = TOKENS) -> float:
    """Seconds a token, behind a prompt of 8; a median of three."""
    seconds = []
    for _ in range(3):
        engine.ids.clear()
        stream = generate(engine, random_ids(8, 32000), tokens + 1, (), sampling_of(engine))
        next(stream)
        start = time.perf_counter()
        made = sum(1 for _ in stream)
        seconds.append((time.perf_counter() - start) / made)
    return statistics.median(seconds)


def sampling_of(engine: Engine) -> Sampling:
    """The same for each answer of an engine: with another one its steps would be recorded again."""
    if not hasattr(engine, "sampling"):
        engine.sampling = new_sampling()
    return engine.sampling


def kernel_times(engine: Engine) -> dict[str, list[float]]:
    """Microseconds a step of one row, and launches, of each kernel; 20 replays."""
    inputs = torch.tensor([[5], [128]])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(20):
            engine.launch(inputs, sampling_of(engine))
            torch.cuda.synchronize()
    kinds = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    return {event.key[:80]: [round(event.self_device_time_total / 20, 1), event.count / 20] for event in kinds[:24]}


def products(scheme: str) -> dict:
    """Share of read bandwidth of each product of a layer, for 1, 6 and 16 rows; enough weights to miss the L2 cache."""
    speed = read_speed()
    result = {"GB/s": round(speed)}
    for name, n_in, n_out in (
        ("wqkv", 4096, 12288),
        ("wo", 4096, 4096),
        ("w13", 4096, 22016),
        ("w2", 11008, 4096),
        ("output", 4096, 32000),
    ):
        layers = []
        for _ in range(max(2, 2**29 // (n_in * n_out))):
            layer = kernels.Linear(n_in, n_out).cuda()
            quantization = SCHEMES[scheme] or {"mode": "", "groupsize": 0}
            bits = {"": 16, "int8": 8, "int4": 4}[quantization["mode"]]
            layer.weight = torch.empty(n_out, n_in, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
            if bits < 16:
                with torch.device("cuda"):
                    layer.lay_out(bits, quantization.get("groupsize", 0))
                layer.weight.random_(0, 100)
                layer.scale.fill_(0.001)
            if bits == 4:
                layer.minimum.fill_(-0.01)
            layers.append(layer)
        size = sum(tensor.nbytes for layer in layers for tensor in layer.buffers())
        for rows in (1, 6, 16):
            x = torch.randn(1, rows, n_in, device="cuda").bfloat16()
            ms = graph_milliseconds(lambda x=x, layers=layers: [layer(x) for layer in layers])
            result[f"{name} {rows}"] = round(size / ms / 1e6 / speed, 3)
    return result


def step(scheme: str, compiled: bool) -> dict:
    """Decoding of 200 tokens; verified rows over one; time by kernel."""
    model = random_model("7b", scheme)
    engine = Engine(model, model.make_cache(model.args.max_seq_length))
    speed = read_speed()
    result = {"GB/s": round(speed)}
    if compiled:
        start = time.perf_counter()
        engine.compile(True, False, sampling_of(engine))
        result["compile seconds"] = round(time.perf_counter() - start, 1)
    seconds = decoding(engine)
    size = bytes_per_token(weight_bytes(model), model.args, 8, TOKENS)
    result |= {"tokens/s": round(1 / seconds, 1), "share": round(share(1 / seconds, size, speed), 3)}
    times = {}
    for rows in (1, 2, 6, 8, 16):
        del engine.ids[128:]
        engine.run([5] * rows, sampling_of(engine))
        times[rows] = milliseconds(engine.few.programs[rows].graph.replay)
    result["graph ms"] = round(times[1], 3)
    result["rows over 1"] = {rows: round(times[rows] / times[1], 3) for rows in times}
    result["kernels"] = kernel_times(engine)
    return result


def captured(scheme: str) -> dict:
    return step(scheme, compiled=False)


def compiled(scheme: str) -> dict:
    return step(scheme, compiled=True)


def capacity(scheme: str) -> dict:
    """Seconds a token with a cache for 4,096 positions over those with a cache for 209, of which 208 are filled."""
    model = random_model("7b", scheme)
    engines = [Engine(model, model.make_cache(size)) for size in (9 + TOKENS, model.args.max_seq_length)]
    times = [[decoding(engine) for engine in engines] for _ in range(3)]
    return {"over": round(statistics.median(large / exact for exact, large in times), 3)}


def plain(scheme: str) -> dict:
    """Decoding by PyTorch's operators, as without Triton."""
    kernels.cuda_kernels = lambda dtype: None
    model = random_model("7b", scheme)
    engine = Engine(model, model.make_cache(model.args.max_seq_length))
    return {"tokens/s": round(1 / decoding(engine, 40), 1)}


def prompt(scheme: str) -> dict:
    """Milliseconds of a prompt of 2,048 tokens, and of one of which all but 32 are known."""
    model = random_model("7b", scheme)
    engine = Engine(model, model.make_cache(model.args.max_seq_length))
    ids, sampling = random_ids(2048, 32000), new_sampling()

    def run(known: int) -> None:
        engine.ids = ids[:known]
        engine.extend(ids, sampling)

    run(0)
    run(2016)
    return {f"{known} known, ms": round(milliseconds(lambda known=known: run(known)), 2) for known in (0, 2016, 2032)}


def draft(scheme: str) -> dict:
    """Microseconds of one of 15 guesses of a 68m model."""
    model = random_model("68m", scheme)
    engine = Engine(model, model.make_cache(model.args.max_seq_length))
    ids, sampling, result = random_ids(100, 32000), new_sampling(), {}
    for kind in ("captured", "compiled"):
        if kind == "compiled":
            engine.compile(True, False, sampling)
        times = {}
        for count in (1, 15):
            engine.guess(ids, count, sampling)
            times[count] = milliseconds(lambda count=count: engine.guess(ids, count, sampling), 31)
        result[f"{kind}, us"] = round(1000 * (times[15] - times[1]) / 14, 1)
    return result


def main() -> None:
    if sys.argv[1:]:
        part, scheme = sys.argv[1:]
        print(json.dumps({f"{part} {scheme}": globals()[part](scheme)}), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(torch.cuda.get_device_name(), f"torch {torch.__version__}", flush=True)
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
        for part in PARTS:
            subprocess.run([sys.executable, "-m", "benchmarks.cuda", *part], env=environment, check=False)


if __name__ == "__main__":
    terminal.run(main)
