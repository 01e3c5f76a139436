"""Measures this project beside its peers, in turn in one run, as shares of what the memory allows.

    python -m benchmarks.benchmark --shapes 1.1b --rounds 5 --out results       # JSON, a table, a figure
    python -m benchmarks.benchmark --quick                                      # the demo checkpoint, under two minutes

Every program lives in a process of its own and is asked in turn; between two, read bandwidth is measured again. Weights
are random. Peers are measured where they are installed: pip install llama-cpp-python gguf, transformers; the figure
needs matplotlib. Decoding a token reads all weights but the embedding table once, and the keys and values so far: that
over read bandwidth is the floor, and floor over time the share of memory speed.
"""

import argparse
import importlib.util
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import terminal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.grow import SHAPES, shape_args
from checkpoint import DEVICES, empty_model, load_model, read_checkpoint, write_checkpoint
from generate import Engine, generate
from kernels import Linear, cpu
from kernels.sampling import Sampling
from model import ModelArgs
from quantize import quantize
from scripts.convert_hf_checkpoint import convert

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "tests" / "demo" / "target"
OURS = {  # label: quantization
    "bf16": None,
    "int8": {"mode": "int8"},
    "int4 g32": {"mode": "int4", "groupsize": 32},
    "int4 g64": {"mode": "int4", "groupsize": 64},
    "int4 g128": {"mode": "int4", "groupsize": 128},
}
LLAMA_CPP = {"F16": 2, "Q8_0": 34 / 32, "Q4_1": 20 / 32, "Q4_0": 18 / 32}  # bytes of a weight of the embedding table
BITS = {  # what is compared with what: the same number of bits per weight, or nearly
    "16 bits": ["bf16", "llama.cpp F16", "transformers bf16"],
    "8 bits": ["int8", "llama.cpp Q8_0"],
    "5 bits": ["int4 g32", "llama.cpp Q4_1"],
    "4.5 bits": ["int4 g64", "llama.cpp Q4_0"],
}
BYTES = {"16 bits": 2, "8 bits": 1.1, "5 bits": 0.65, "4.5 bits": 0.58}  # of a weight, the embedding table included
WITHOUT = ("products", "attention", "prefetch", "replay", "threads")  # mechanisms that a worker can switch off


# ---- Arithmetic


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights that decoding a token reads: all but the embedding table."""
    return sum(t.nbytes for name, t in model.state_dict().items() if name != "tok_embeddings.weight")


def kv_bytes(args: ModelArgs, positions: float, itemsize: int = 2) -> float:
    """Bytes of the keys and values of so many positions."""
    return 2 * args.n_layer * args.n_kv_head * args.head_dim * itemsize * positions


def bytes_per_token(weights: int, args: ModelArgs, prompt: int, tokens: int) -> float:
    """Bytes that decoding one token reads, on average over `tokens` after `prompt`: weights, and the cache half-way."""
    return weights + kv_bytes(args, prompt + tokens / 2)


def share(tokens_per_second: float, bytes_per_token: float, bandwidth: float) -> float:
    """Of memory speed: `bandwidth` in GB/s."""
    return tokens_per_second * bytes_per_token / (bandwidth * 1e9)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


# ---- What is measured: files


def random_checkpoint(args: ModelArgs, folder: Path, quantization: dict | None) -> Path:
    """A checkpoint with random weights of that shape, made once."""
    path = folder / "model.pth"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tensors = empty_model(args, None, torch.bfloat16).to_empty(device="cpu").state_dict()
        pool = (torch.randn(2**22) * 0.02).bfloat16()

        def fill(mapped: dict[str, torch.Tensor]) -> None:
            for name, tensor in mapped.items():
                flat = tensor.view(-1)
                for start in range(0, len(flat), len(pool)):
                    flat[start : start + len(pool)] = 1 if "norm" in name else pool[: len(flat) - start]

        header = {"config": asdict(args), "quantization": None, "chat": False}
        header["tokenizer"] = (DEMO / "tokenizer.model").read_bytes()
        write_checkpoint(path, header, tensors, fill)
    if quantization is None:
        return path
    quantized = folder / f"model_{'_'.join(map(str, quantization.values()))}.pth"
    if not quantized.exists():
        quantize(read_checkpoint(path), quantization, "cpu", quantized)
    return quantized


def gguf_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama as llama.cpp names them."""
    heads, kv = args.n_head * args.head_dim, args.n_kv_head * args.head_dim
    layer = {
        "attn_q": (heads, args.dim),
        "attn_k": (kv, args.dim),
        "attn_v": (kv, args.dim),
        "attn_output": (args.dim, heads),
        "ffn_gate": (args.ffn_dim, args.dim),
        "ffn_up": (args.ffn_dim, args.dim),
        "ffn_down": (args.dim, args.ffn_dim),
        "attn_norm": (args.dim,),
        "ffn_norm": (args.dim,),
    }
    table = (args.vocab_size, args.dim)
    shapes = {"token_embd": table, "output": table, "output_norm": (args.dim,)}
    return shapes | {f"blk.{i}.{name}": shape for i in range(args.n_layer) for name, shape in layer.items()}


def write_gguf(args: ModelArgs, path: Path, values: Callable[[str, tuple[int, ...]], object]) -> None:
    """A file for llama.cpp with a model of that shape; `values` (name, shape) gives the array of each tensor."""
    import gguf  # noqa: PLC0415

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    fields = {
        "context_length": args.max_seq_length,
        "embedding_length": args.dim,
        "block_count": args.n_layer,
        "feed_forward_length": args.ffn_dim,
        "head_count": args.n_head,
        "head_count_kv": args.n_kv_head,
        "layer_norm_rms_eps": args.norm_eps,
        "rope_dimension_count": args.head_dim,
        "vocab_size": args.vocab_size,
        "file_type": 1,
    }
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % i for i in range(256))]
    pieces += [b"piece%d" % i for i in range(args.vocab_size - len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * args.vocab_size)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (args.vocab_size - 259))
    for name, shape in gguf_shapes(args).items():
        writer.add_tensor(f"{name}.weight", values(name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(original: Path, path: Path, kind: str) -> None:
    """Have llama.cpp quantize a file."""
    import llama_cpp  # noqa: PLC0415

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, llama_cpp.ctypes.c_void_p(0))
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread = cpu.cores()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    llama_cpp.llama_model_quantize(str(original).encode(), str(path).encode(), options)


def random_gguf(args: ModelArgs, folder: Path, kind: str) -> Path:
    """The same shape for llama.cpp, made once: F16 with random weights, the others quantized from it by llama.cpp."""
    import numpy as np  # noqa: PLC0415

    original, path = folder / "F16.gguf", folder / f"{kind}.gguf"
    if not original.exists():
        pool = (np.random.default_rng(0).standard_normal(2**22) * 0.02).astype(np.float16)
        values = lambda name, shape: np.ones(shape, np.float32) if len(shape) == 1 else np.resize(pool, shape)  # noqa: E731
        write_gguf(args, original, values)
    if not path.exists():
        quantize_gguf(original, path, kind)
    return path


# ---- What is measured: programs. Each function loads one: what it says of itself, and what answers questions.


def random_ids(count: int, vocab_size: int) -> list[int]:
    """A prompt."""
    draw = random.Random(0)
    return [1, *(draw.randrange(300, min(vocab_size, 2000)) for _ in range(count - 1))]


def memory() -> dict[str, float]:
    """GB that this process holds: anonymous and mapped from files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1e6 for name, key in (("anonymous", "RssAnon"), ("mapped", "RssFile"))}


def rebuild(old: str, new: str) -> None:
    """Let cpu.library be cpu.cpp with `new` in place of `old`."""
    with tempfile.TemporaryDirectory() as folder:
        before, cpu.BUILD = cpu.BUILD, Path(folder) / "build.sh"
        shutil.copy(before, cpu.BUILD)
        source = before.with_name("cpu.cpp").read_text()
        if old not in source:
            raise ValueError(f"cpu.cpp no longer has {old!r}")
        cpu.BUILD.with_name("cpu.cpp").write_text(source.replace(old, new))
        cpu.library.cache_clear()
        cpu.library()


def switch_off(mechanism: str) -> None:
    """Replace one of WITHOUT by what PyTorch does, or by nothing, before a kernel is used."""
    if mechanism == "products":
        cpu.GROUPSIZES = ()
    elif mechanism == "attention":
        cpu.MAX_HEAD_DIM = 0
    elif mechanism == "prefetch":
        rebuild("AHEAD = 4096", "AHEAD = 0")
    elif mechanism == "replay":
        cpu.Program.VIEWS = ()  # so no step can be repeated
    elif mechanism == "threads":
        line = "    static long workers = 0;\n"
        rebuild(line, f"    for (long i = 0; i < count; i++) execute(calls + i);\n    return;\n{line}")


def ours(path: Path, device: str, compiled: bool, without: str) -> tuple[dict, Callable]:
    switch_off(without)
    torch.set_num_threads(cpu.cores())
    checkpoint = read_checkpoint(path)
    model = load_model(checkpoint, device, torch.bfloat16)
    engine = Engine(model, model.make_cache(checkpoint.args.max_seq_length))
    sampling = Sampling.on(device, 1, 0.8)
    start = time.perf_counter()
    if compiled and device == "cuda":
        engine.compile(True, False, sampling)
    says = {"weights": weight_bytes(model), "args": asdict(checkpoint.args), "compile": time.perf_counter() - start}

    def answer(prompt: int, tokens: int) -> dict:
        engine.ids.clear()
        ids = random_ids(prompt, checkpoint.args.vocab_size)
        start = time.perf_counter()
        stream = generate(engine, ids, tokens, (), sampling)
        next(stream)
        first = time.perf_counter()
        made = sum(1 for _ in stream)
        return {"prefill": first - start, "decode": (time.perf_counter() - first) / max(made, 1), **memory()}

    def rows(count: int, repeats: int = 7) -> float:
        """Seconds of a pass that verifies so many rows, behind 128."""
        seconds = []
        for _ in range(repeats):
            del engine.ids[128:]
            start = time.perf_counter()
            engine.run([5] * count, sampling)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    def chain(prompt: int) -> float:
        """Seconds of the prompt's products alone, as F.linear in bfloat16: what is the least that a prompt takes."""
        layers = [module for module in model.layers.modules() if isinstance(module, Linear)]
        xs = {layer.n_in: torch.randn(1, prompt, layer.n_in, device=device).bfloat16() for layer in layers}
        start = time.perf_counter()
        with torch.inference_mode():
            for layer in layers:
                product = torch.nn.functional.linear(xs[layer.n_in], layer.weight)
            product[0, 0, 0].item()  # waits for a GPU
        return time.perf_counter() - start

    def ask(what: str, *numbers: int) -> object:
        return {"answer": answer, "rows": rows, "chain": chain}[what](*numbers)

    return says, ask


def llama_cpp(path: Path, args: ModelArgs) -> tuple[dict, Callable]:
    import llama_cpp as library  # noqa: PLC0415

    model = library.Llama(str(path), n_ctx=1024, n_threads=cpu.cores(), n_threads_batch=cpu.cores(), verbose=False)

    def ask(what: str, prompt: int, tokens: int) -> dict:
        model.reset()
        start = time.perf_counter()
        model.eval(random_ids(prompt, 32000))
        first = time.perf_counter()
        for i in range(tokens - 1):
            model.eval([300 + i])
        return {"prefill": first - start, "decode": (time.perf_counter() - first) / max(tokens - 1, 1), **memory()}

    return {"weights": path.stat().st_size - args.vocab_size * args.dim * LLAMA_CPP[path.stem]}, ask


def transformers(args: ModelArgs, device: str) -> tuple[dict, Callable]:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.set_num_threads(cpu.cores())
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.ffn_dim,
        num_hidden_layers=args.n_layer,
        num_attention_heads=args.n_head,
        num_key_value_heads=args.n_kv_head,
        max_position_embeddings=args.max_seq_length,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01)
    weights = sum(t.nbytes for name, t in model.named_parameters() if "embed_tokens" not in name)

    @torch.inference_mode()
    def ask(what: str, prompt: int, tokens: int) -> dict:
        ids = torch.tensor([random_ids(prompt, args.vocab_size)], device=device)
        start = time.perf_counter()
        result = model(ids, use_cache=True, logits_to_keep=1)
        token = result.logits[:, -1:].argmax(-1)
        token.tolist()
        first = time.perf_counter()
        for _ in range(tokens - 1):
            result = model(token, past_key_values=result.past_key_values, use_cache=True)
            token = result.logits[:, -1:].argmax(-1)
            token.tolist()
        return {"prefill": first - start, "decode": (time.perf_counter() - first) / max(tokens - 1, 1), **memory()}

    return {"weights": weights}, ask


def serve(program: str, options: dict) -> None:
    """The worker: answers each line of standard input, a JSON list, with a line of JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr
    if program == "ours":
        says, ask = ours(Path(options["path"]), options["device"], options["compiled"], options["without"])
    elif program == "llama.cpp":
        says, ask = llama_cpp(Path(options["path"]), ModelArgs(**options["args"]))
    else:
        says, ask = transformers(ModelArgs(**options["args"]), options["device"])
    print(json.dumps(says), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(ask(*json.loads(line))), file=answers, flush=True)


class Worker:
    """A program in a process of its own."""

    def __init__(self, program: str, **options: object) -> None:
        command = [sys.executable, "-m", "benchmarks.benchmark", "--worker", program, json.dumps(options)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        self.says = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended: {' '.join(self.process.args)}")
        return json.loads(line)

    def ask(self, *question: object) -> dict:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def bandwidth(device: str) -> float:
    """GB/s at which the device's memory is read."""
    if device == "cuda":
        data = torch.zeros(2**28, device="cuda")
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        data.sum()
        events[0].record()
        data.sum()
        events[1].record()
        torch.cuda.synchronize()
        return data.nbytes / events[0].elapsed_time(events[1]) / 1e6
    program = Path(tempfile.gettempdir()) / f"read_bandwidth-{os.getuid()}"
    source = Path(__file__).with_name("read_bandwidth.cpp")
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        data = torch.zeros(2**27, dtype=torch.int64)
        start = time.perf_counter()
        data.sum()
        return data.nbytes / (time.perf_counter() - start) / 1e9
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        subprocess.run([*compiler, "-O3", "-march=native", "-fopenmp", source, "-o", program], check=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(cpu.cores())}
    return statistics.median(map(float, subprocess.check_output([program, "3"], env=environment, text=True).split()))


# ---- The run


def start_up(path: Path, device: str) -> dict[str, float]:
    """Seconds from the shell to the first byte of text, 16 tokens of prompt: not compiled, compiled cold and warm."""
    command = [sys.executable, "generate.py", "--checkpoint_path", str(path), "--device", device, "--ignore_eos"]
    command += ["--prompt", "a b c d e f g h i j k l m n o", "--max_new_tokens", "20"]
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        for name, flags in (("not compiled", []), ("compiled, cold", ["--compile"]), ("compiled, warm", ["--compile"])):
            start = time.perf_counter()
            with subprocess.Popen([*command, *flags], cwd=ROOT, env=environment, **pipes) as process:
                first = process.stdout.read(1)
                seconds[name] = time.perf_counter() - start
                process.stdout.read()
            if not first:
                raise RuntimeError(f"generate.py said nothing: {' '.join([*command, *flags])}")
    return seconds


def installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def is_there(label: str, device: str) -> bool:
    """Whether that program can be measured here."""
    if label.startswith("llama.cpp"):
        return device == "cpu" and installed("llama_cpp", "gguf")
    return label in OURS or installed("transformers")


def launch(label: str, args: ModelArgs, folder: Path, device: str) -> Worker:
    """That program with its model, whose file is made where it is missing."""
    if label in OURS:
        path = random_checkpoint(args, folder, OURS[label])
        return Worker("ours", path=str(path), device=device, compiled=True, without="")
    program, kind = label.split()
    if program == "llama.cpp":
        return Worker(program, path=str(random_gguf(args, folder, kind)), args=asdict(args))
    return Worker(program, args=asdict(args), device=device)


def workers_of(shape: str, args: ModelArgs, folder: Path, options: argparse.Namespace) -> dict[str, Worker]:
    """The programs that are there and fit into three quarters of the memory together, each with its model loaded.

    What is compared comes together, int4 first, so that a shape that fills the memory still has pairs.
    """
    room = 0.75 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    parameters = sum(t.numel() for t in empty_model(args, None, torch.bfloat16).state_dict().values())
    wanted = [(label, bits) for bits, labels in reversed(BITS.items()) for label in labels]
    wanted += [("int4 g128", "4.5 bits")]
    if options.quick:
        wanted = [("bf16", "16 bits")]
    workers = {}
    for label, bits in wanted:
        need = BYTES[bits] * parameters
        if not is_there(label, options.device):
            tell(f"{shape}: {label} is not installed")
        elif need > room:
            tell(f"{shape}: no memory for {label}")
        else:
            room -= need
            workers[label] = launch(label, args, folder, options.device)
            tell(f"{shape}: loaded {label}")
    return workers


def figures(values: dict[str, list[float]], says: dict, args: ModelArgs, bandwidths: list[float], options) -> dict:
    """A program's part of the report: `values` by round, of what it measured, and what it `says` of itself."""
    prompt = options.prompt
    speeds = [1 / seconds for seconds in values["decode"]]
    per_token = bytes_per_token(says["weights"], args, prompt, options.tokens)
    report = {
        "decode": spread(speeds),
        "prefill": spread([prompt / seconds for seconds in values["prefill"]]),
        "time to first token": spread(values["prefill"]),
        "bytes per token": per_token,
        "share": share(statistics.median(speeds), per_token, statistics.median(bandwidths)),
        "anonymous GB": max(values["anonymous"]),
        "mapped GB": max(values["mapped"]),
        "compile": says.get("compile"),
        "rows over one": None,
        "linear chain": None,
    }
    if "rows 1" in values:
        one = statistics.median(values["rows 1"])
        report["rows over one"] = {n: statistics.median(values[f"rows {n}"]) / one for n in (2, 4, 8, 16)}
    if "chain" in values:
        report["linear chain"] = spread([prompt / seconds for seconds in values["chain"]])
    return report


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing but keep a core busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def beside_others(workers: dict[str, Worker], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds a token takes alone, and how many times that beside one and two busy processes: medians, in turn."""
    seconds: dict[str, dict[int, list[float]]] = {label: {0: [], 1: [], 2: []} for label in workers}
    for _ in range(rounds):
        for count in (0, 1, 2):
            with busy(count):
                for label, worker in workers.items():
                    seconds[label][count].append(worker.ask("answer", 16, 16)["decode"])
    medians = {label: [statistics.median(each) for each in found.values()] for label, found in seconds.items()}
    return {
        label: {"ms": 1000 * alone, "1": one / alone, "2": two / alone} for label, (alone, one, two) in medians.items()
    }


def measure(shape: str, args: ModelArgs, folder: Path, options: argparse.Namespace) -> dict:
    """All programs on one shape, in turn."""
    workers = workers_of(shape, args, folder, options)
    results: dict[str, dict[str, list[float]]] = {label: {} for label in workers}
    bandwidths = []
    for worker in workers.values():
        worker.ask("answer", options.prompt, 3)  # touches the weights
    for i in range(options.rounds):
        for label, worker in workers.items():
            bandwidths.append(bandwidth(options.device))
            values = worker.ask("answer", options.prompt, options.tokens)
            if label in OURS:
                values |= {f"rows {count}": worker.ask("rows", count) for count in (1, 2, 4, 8, 16)}
            if label == "bf16":
                values["chain"] = worker.ask("chain", options.prompt)
            for key, value in values.items():
                results[label].setdefault(key, []).append(value)
        tell(f"{shape}: round {i + 1} of {options.rounds}, read bandwidth {bandwidths[-1]:.1f} GB/s")
    beside = {} if options.quick else beside_others(workers, min(options.rounds, 3))
    table = {}
    for label, worker in workers.items():
        worker.close()
        table[label] = figures(results[label], worker.says, args, bandwidths, options)
        table[label]["beside others"] = beside.get(label)
    return {"shape": shape, "read bandwidth": spread(bandwidths), "programs": table}


def ablation(shape: str, args: ModelArgs, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Decoding speed in bf16 and int4 with each mechanism switched off in turn, over that with all: medians."""
    changes = {"all": {}}
    changes |= {f"no {name}": {"without": name} for name in WITHOUT}
    ratios: dict[str, dict[str, float]] = {name: {} for name in changes}
    for label in ("bf16", "int4 g32"):
        path = str(random_checkpoint(args, folder, OURS[label]))
        base = {"path": path, "device": options.device, "compiled": True, "without": ""}
        workers = {name: Worker("ours", **base | change) for name, change in changes.items()}
        speeds: dict[str, list[float]] = {name: [] for name in changes}
        for i in range(min(options.rounds, 3) + 1):
            for name, worker in workers.items():
                seconds = worker.ask("answer", options.prompt, 8)["decode"]  # int4 by PyTorch takes seconds a token
                if i > 0:  # the first touches the weights
                    speeds[name].append(1 / seconds)
        for name, worker in workers.items():
            worker.close()
            ratios[name][label] = statistics.median(a / b for a, b in zip(speeds[name], speeds["all"], strict=True))
        found = ", ".join(f"{name} {ratio[label]:.2f}" for name, ratio in ratios.items())
        tell(f"{shape}: {label} without one mechanism each: {found}")
    return ratios


# ---- What is written


def of_rounds(values: dict[str, float]) -> str:
    """A `spread` for the table."""
    return f"{values['median']:.1f} ({values['low']:.1f} to {values['high']:.1f})"


def markdown(results: list[dict]) -> str:
    """The table for the README."""
    titles = ["shape", "program", "decode, tokens/s (range)", "of memory speed", "prefill, tokens/s"]
    titles += ["rows 2 / 4 / 8 / 16 over 1", "token beside 1 / 2 busy processes over alone"]
    lines = [f"| {' | '.join(titles)} |", "|---|---|---|---|---|---|---|"]
    for result in results:
        for label, row in result["programs"].items():
            name = f"**{label}**" if label in OURS else label
            rows = row["rows over one"] or {}
            cells = [result["shape"], name, of_rounds(row["decode"]), f"{row['share']:.2f}"]
            cells += [f"{row['prefill']['median']:.0f}", " / ".join(f"{value:.2f}" for value in rows.values())]
            beside = row.get("beside others")
            cells.append(f"{beside['1']:.1f} / {beside['2']:.1f}" if beside else "")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append(f"| | read bandwidth, GB/s | {of_rounds(result['read bandwidth'])} | | | | |")
    return "\n".join(lines)


def figure(results: list[dict], path: Path) -> None:
    """Bars: share of memory speed, by bits per weight, ours beside the peers; a panel for each shape."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(1, len(results), figsize=(4.2 * len(results), 3.4), sharey=True, squeeze=False)
    colors = {"ours": "#d1495b", "llama.cpp": "#8d99ae", "transformers": "#c9cfd8"}
    for axis, result in zip(axes[0], results, strict=True):
        ticks = []
        for at, (bits, labels) in enumerate(BITS.items()):
            present = [label for label in labels if label in result["programs"]]
            for i, label in enumerate(present):
                program = "ours" if label in OURS else label.split()[0]
                value, x = result["programs"][label]["share"], at + (i - (len(present) - 1) / 2) * 0.27
                axis.bar(x, value, 0.25, color=colors[program], label=program)
                axis.text(x, value + 0.015, f"{value:.2f}", ha="center", fontsize=7.5, color="#333333")
            ticks.append(bits if present else "")
        axis.set_xticks(range(len(BITS)), ticks, fontsize=9)
        axis.set_title(result["shape"], fontsize=11, loc="left")
        axis.axhline(1, color="#333333", linewidth=0.8, linestyle=":")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("share of memory speed")
    axes[0][0].set_ylim(0, 1.12)
    handles = {}
    for axis in axes[0]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="upper right", ncols=3, frameon=False, fontsize=9)
    figure.suptitle("Decoding one token at a time: 1 is reading every weight once", fontsize=11, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        serve(sys.argv[2], json.loads(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    work = Path(tempfile.gettempdir()) / "llama-benchmark"
    add("--shapes", nargs="+", choices=SHAPES, default=["68m", "160m", "1.1b", "7b"], help="of random models")
    add("--rounds", type=terminal.number(1), default=5, help="in which each program is measured once (5)")
    add("--prompt", type=terminal.number(1), default=128, help="tokens of the prompt (128)")
    add("--tokens", type=terminal.number(2), default=64, help="tokens of the answer (64)")
    add("--device", choices=DEVICES, default="cpu", help="what runs the models (cpu)")
    add("--work", type=Path, default=work, help=f"folder for model files, which are kept ({work})")
    add("--out", type=Path, default=Path("benchmark"), help="folder for results.json, table.md, shares.png (benchmark)")
    add("--quick", action="store_true", help="the demo checkpoint alone, two rounds of 32 tokens")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.quick:
        options.rounds, options.tokens = 2, 32
        demo = options.work / "demo"
        shutil.copytree(DEMO, demo, dirs_exist_ok=True)
        shapes = {"demo": read_checkpoint(convert(demo, "bfloat16")).args}
    else:
        shapes = {shape: shape_args(shape, 32000) for shape in options.shapes}
    lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    model = ", ".join(
        key.strip() + value for key, value in lines.items() if key.strip() in ("model name", "cpu family", "model")
    )
    machine = f"{cpu.cores()} cores, {model}, torch {torch.__version__}"
    if options.device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    results = []
    report = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "results": results}
    for shape, args in shapes.items():
        folder = options.work / shape
        results.append(measure(shape, args, folder, options))
        if shape in ("demo", "1.1b"):
            path = random_checkpoint(args, folder, OURS["bf16" if shape == "demo" else "int4 g32"])
            report["start-up"] = start_up(path, options.device)
            tell(f"start-up: {', '.join(f'{name} {value:.1f} s' for name, value in report['start-up'].items())}")
        if shape == "1.1b" and options.device == "cpu":
            report["ablation"] = ablation(shape, args, folder, options)
        (options.out / "results.json").write_text(json.dumps(report, indent=1))
        (options.out / "table.md").write_text(markdown(results) + "\n")
    print(markdown(results))
    if installed("matplotlib"):
        figure(results, options.out / "shares.png")
    else:
        tell("no figure: pip install matplotlib")


if __name__ == "__main__":
    terminal.run(main)
