"""The captured step on a CPU: a replayed step equals an eager one, bit for bit; its threads end cleanly."""

import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Eager, generated, make_params, new_engine, random_model, run_cli
from torch import Tensor

import generate
from checkpoint import load_model, read_checkpoint
from generate import Engine
from kernels import CapturedStep
from kernels.build import load_library
from kernels.cpu import CpuGraph
from model import ModelArgs, Transformer

pytestmark = pytest.mark.skipif(load_library() is None, reason="the kernels need a C++ compiler")
ARGS = ModelArgs(64, 2, 4, 2, 16, 96, 300, 1e-5, 10000.0, 1.0, 256)


def forward(model: Transformer, inputs: Tensor, cache: Tensor) -> Tensor:
    return model(inputs[:1], inputs[1], cache)


@pytest.mark.parametrize("weights", ["target", "int8", "int4"])
@torch.inference_mode()
def test_replayed_logits_are_those_of_the_eager_step(demo, weights: str) -> None:
    """1 to 16 rows, each number captured once and then replayed at later positions; equal caches at the end."""
    model = load_model(read_checkpoint(demo[weights]), "cpu", torch.bfloat16)
    steps = [CapturedStep(forward) for _ in range(17)]
    replayed, eager = model.make_cache(512), model.make_cache(512)
    order = [rows for rows in range(1, 17) for _ in range(3)]
    random.Random(0).shuffle(order)
    start = 0
    for rows in order:
        ids = torch.randint(3, 2048, [rows], generator=torch.Generator().manual_seed(start))
        inputs = torch.stack([ids, torch.arange(start, start + rows)])
        expected = forward(model, inputs, eager)
        assert torch.equal(steps[rows](model, inputs.clone(), replayed), expected), (rows, start)
        start += rows
    for layers in zip(replayed, eager, strict=True):
        assert torch.equal(*(layer[:, :, :, :start] for layer in layers))
    assert all(step.graphs[rows].replayable for rows, step in enumerate(steps) if rows)


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_passes_equals_eager_passes(seed: int) -> None:
    """Two models in turn, prompts of any length, full contexts, other seeds, temperatures and top_k in between."""
    draw = random.Random(seed)
    args = [ARGS, ModelArgs(32, 1, 2, 2, 16, 64, 300, 1e-5, 10000.0, 1.0, 256)]
    models = [random_model(each).bfloat16() for each in args]
    pairs = [(new_engine(model), Eager(model, 256)) for model in models]
    params = make_params(0, 0.8)
    for _ in range(150):
        engines = pairs[draw.randrange(2)]
        change = draw.random()
        if change < 0.1:
            params = make_params(draw.randrange(99), draw.choice([0.0, 0.7]), draw.choice([None, 1, 5, 1000]))
        elif change < 0.4:
            params.seed.fill_(draw.randrange(99))
            params.temperature.fill_(draw.choice([0.0, 0.5, 2.0]))
        full = len(engines[0].cached_ids)
        keep = draw.choice([full, full, full, draw.randrange(full + 1), 0])
        for engine in engines:
            engine.truncate(keep)
        count = min(draw.choice([1, 1, 1, 2, 3, 6, 16, 17, 40, 256]), 256 - keep)
        ids = [draw.randrange(300) for _ in range(count)]
        if ids:
            found = [engine.forward(ids, params) for engine in engines]
            assert found[0] == found[1], (keep, count)
    assert any(graph.replayable for graph in pairs[0][0].decode_step.graphs.values())


@torch.inference_mode()
def test_results_share_memory_and_a_view_keeps_its_own() -> None:
    """The memory of a graph does not grow with the number of layers: results that are not needed any more share it."""
    args = [replace(ARGS, n_layer=layers) for layers in (2, 6)]
    steps = []
    for model in (random_model(each).bfloat16() for each in args):
        steps.append(CapturedStep(forward))
        steps[-1](model, torch.tensor([[1, 2, 3], [0, 1, 2]]), model.make_cache(8))
    assert len(steps[0].graphs[3].buffers) == len(steps[1].graphs[3].buffers) < 10

    weight = torch.ones(ARGS.vocab_size, dtype=torch.bfloat16)

    def with_views(model: Transformer, inputs: Tensor, cache: Tensor) -> Tensor:
        first = forward(model, inputs[:, :1], cache)[0]  # the only reference to its memory is this view
        forward(model, inputs[:, 1:], cache)
        return torch.ops.llama.rms_norm(first, weight, 1e-5)

    model = random_model(ARGS).bfloat16()
    step, caches = CapturedStep(with_views), [model.make_cache(8) for _ in range(2)]
    for position in range(0, 8, 2):
        inputs = torch.tensor([[7 + position, 9], [position, position + 1]])
        assert torch.equal(step(model, inputs, caches[0]), with_views(model, inputs, caches[1]))
    assert step.graphs[2].replayable


def test_a_step_that_computes_with_pytorch_runs_eagerly_and_gives_the_same() -> None:
    """One operator that cpu.cpp does not have is enough, even on a view or in place."""
    model = random_model(ARGS).bfloat16()
    changes = {
        "an operator": torch.tanh,
        "a copy": lambda logits: logits[:, :, ::2].contiguous(),
        "in place": lambda logits: logits.clamp_(max=0.5),
        "a sum with a number": lambda logits: logits + 1.5,
        "a sum with a factor": lambda logits: torch.add(logits, logits, alpha=2),
        "a sum of two dtypes": lambda logits: logits + logits.float(),
        "a sum with one row for all": lambda logits: logits + logits[0, 0],
    }
    for change in changes.values():
        with torch.inference_mode():
            step = CapturedStep(lambda model, inputs, cache, change=change: change(forward(model, inputs, cache)))
            caches = [model.make_cache(8) for _ in range(2)]
            for position in range(6):
                inputs = torch.tensor([[7 * position], [position]])
                expected = change(forward(model, inputs, caches[0]))
                assert torch.equal(step(model, inputs, caches[1]), expected)
            assert not step.graphs[1].replayable


@torch.inference_mode()
def test_a_capture_that_is_interrupted_leaves_nothing() -> None:
    """A first capture, and one that replaces another: the next pass captures the step, and is right."""
    model, breaks = random_model(ARGS).bfloat16(), []

    def breaking(model: Transformer, inputs: Tensor, cache: Tensor) -> Tensor:
        logits = forward(model, inputs, cache)
        if breaks:
            raise KeyboardInterrupt
        return logits

    step, inputs = CapturedStep(breaking), torch.tensor([[7], [0]])
    expected, first, second = forward(model, inputs, model.make_cache(8)), model.make_cache(8), model.make_cache(8)
    for cache in (first, second):
        breaks.append("now")
        with pytest.raises(KeyboardInterrupt):
            step(model, inputs.clone(), cache)
        assert not CpuGraph.capturing
        breaks.clear()
        for _ in range(2):
            assert torch.equal(step(model, inputs.clone(), first), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_runs_eagerly(dtype: torch.dtype) -> None:
    model = random_model(ARGS).to(dtype)
    engine, eager = new_engine(model), Eager(model, 256)
    prompt, params = [5, 7, 9], make_params(3, 0.8)
    assert generated(engine, prompt, 30, params) == generated(eager, prompt, 30, params)
    assert not engine.decode_step.graphs


@pytest.mark.slow
def test_compile_has_nothing_to_do_on_a_cpu(demo) -> None:
    """The compiler is not even imported, and the text is the same."""
    code = "import sys, generate; generate.main(); sys.exit('torch._dynamo' in sys.modules)"
    flags = ["--checkpoint_path", demo["target"], "--max_new_tokens", "20", "--device", "cpu"]
    plain = run_cli("-c", code, *flags)
    assert run_cli("-c", code, *flags, "--compile").stdout == plain.stdout
    guessing = ["--draft_checkpoint_path", demo["draft"], "--compile"]
    assert run_cli("-c", code, *flags, *guessing).stdout == plain.stdout


def test_compile_prefill_compiles_the_prompts_pass_alone_on_a_cpu(demo, monkeypatch, capsys) -> None:
    compiled = []
    monkeypatch.setattr(Engine, "compile", lambda self, decode, prefill, params: compiled.append((decode, prefill)))
    flags = ["--checkpoint_path", demo["target"], "--draft_checkpoint_path", demo["draft"], "--max_new_tokens", "2"]
    for precision in ("bfloat16", "float32"):
        more = ["--compile", "--compile_prefill", "--precision", precision, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags), *more])
        generate.main()
        assert compiled == [(False, True)] * 2
        compiled.clear()


# ---- Threads and processes

CHILD = """
import os, signal, sys, time
sys.path[:0] = ["tests", "."]
import torch
import tp
from test_replay import *
torch.set_num_threads(int(sys.argv[1]))
model = random_model(ARGS).bfloat16()
engine, params = new_engine(model), make_params(3, 0.8)

def text():
    return generated(engine, [5, 7, 9], 40, params)

def threads():
    return len(os.listdir("/proc/self/task"))

def memory():
    lines = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(lines["VmRSS"].split()[0])

"""


def child(code: str, threads: int, **environment: str) -> str:
    command = [sys.executable, "-c", CHILD + code, str(threads)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_number_of_threads_is_that_of_pytorch() -> None:
    """One thread starts none, n start n - 1, and fewer later on leave the others asleep."""
    code = """
engine.forward([5], params)
before = threads()
for count in (int(sys.argv[1]), 1, 2):
    torch.set_num_threads(count)
    engine.forward([5], params)
    print(threads() - before)
"""
    assert child(code, 1).split() == ["0", "0", "1"]
    assert child(code, 4).split() == ["3", "3", "3"]


@pytest.mark.slow
def test_affinity_and_the_environment_limit_threads() -> None:
    code = "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); print(tp.num_threads())"
    assert child(code, 1) == "1\n"
    assert child("print(tp.num_threads())", 5, OMP_NUM_THREADS="3") == "5\n"  # as torch has it


@pytest.mark.slow
def test_a_process_with_threads_asleep_forks_and_exits() -> None:
    """The same text in the child, which has one thread, and in the parent."""
    code = """
before = text()
time.sleep(0.3)
if not (pid := os.fork()):
    os._exit(text() != before)
assert os.waitpid(pid, 0)[1] == 0
assert text() == before
"""
    child(code, 4)


@pytest.mark.slow
def test_an_interrupted_process_goes_on_cleanly() -> None:
    """Ctrl-C at any time during replays raises KeyboardInterrupt, and the next text is the same."""
    code = """
before = text()
signal.signal(signal.SIGALRM, signal.default_int_handler)
for i in range(20):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.003 * i)
        while True:
            text()
    except KeyboardInterrupt:
        pass
    engine.cached_ids.clear()
    assert text() == before
"""
    child(code, 3)


@pytest.mark.slow
def test_memory_does_not_grow() -> None:
    """2,000 replays, of 1 and of 5 rows, after all of them were captured."""
    code = """
def passes(count):
    for _ in range(count):
        engine.truncate(3)
        engine.forward([8], params)
        engine.forward([8, 9, 10, 11, 12], params)

passes(300)
before = memory()
passes(1000)
print(memory() - before)
"""
    assert int(child(code, 2)) < 1000  # KB


@pytest.mark.slow
def test_the_same_bits_beside_busy_processes() -> None:
    """200 texts, bit for bit, with more threads than cores and all cores busy with other processes."""
    code = """
before = text()
for _ in range(200):
    assert text() == before
"""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        child(code, 2 * os.cpu_count())
    finally:
        for other in others:
            other.kill()


@pytest.mark.slow
def test_no_data_race(tmp_path: Path) -> None:
    """Replay all operations on four threads, under the thread sanitizer."""
    compiler = os.environ.get("CXX") or "g++"
    runtime = subprocess.run([compiler, "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("g++ has no thread sanitizer here")
    program = tmp_path / "races"
    flags = ["-std=c++20", "-O1", "-g", "-march=native", "-fsanitize=thread", "-pthread", "-w"]
    subprocess.run([compiler, *flags, ROOT / "tests" / "races.cpp", "-o", program], check=True)
    plain = ["setarch", "-R"] if shutil.which("setarch") else []  # because the sanitizer needs fixed addresses
    done = subprocess.run([*plain, program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "the same each time\n"), done.stderr[:3000]
