"""Memory: a KV cache of the size that is needed, which grows, and files that are mapped without being counted."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import utils

import pytest
import torch
from conftest import DEMO, ROOT, generated, make_params, new_engine, random_model, run_cli

import generate
from chat import answer_line
from checkpoint import map_file, read_checkpoint
from generate import Engine, Session, build_parser
from generate_prefill import PrefixCache
from model import ModelArgs
from scripts.convert_hf_checkpoint import convert, read_weights
from speculation import PromptLookup, Speculation

ARGS = ModelArgs(32, 2, 2, 1, 16, 32, 48, 1e-5, 10000.0, 1.0, 200)
PROMPT = [5, 7, 9, 11, 5, 7]
COUNT = 100


def engine_of(model, capacity: int | None = None) -> Engine:
    """An engine with a KV cache for `capacity` positions, or one that grows from the length of the prompt on."""
    engine = new_engine(model)
    if capacity:
        engine.reserve(capacity)
    return engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["none", "draft", "lookup", "draft and lookup", "copy as draft"])
def test_the_text_does_not_depend_on_the_size_of_the_cache(source: str, dtype: torch.dtype, monkeypatch) -> None:
    """A cache of exactly the need, of twice that, and one that grows several times in the middle of an answer."""
    model, draft, params = random_model(ARGS).to(dtype), random_model(ARGS, 0.4).to(dtype), make_params(3, 0.8)
    copy = random_model(ARGS).to(dtype)
    copy.layers[0].feed_forward.w2.weight.mul_(0.5)  # as if it were quantized
    texts, sizes = [], []
    for capacity, smallest in ((len(PROMPT) + COUNT, 1), (200, 1), (None, 1)):
        monkeypatch.setattr(generate, "MIN_CAPACITY", smallest)
        engine = engine_of(model, capacity)
        grown = [engine.kv_cache[0].shape[3]]
        lookup = PromptLookup() if "lookup" in source else None
        guesser = engine_of(copy if "copy" in source else draft, capacity) if "draft" in source else None
        if "copy" in source:
            guesser.share_cache(engine)
            assert guesser.kv_cache is engine.kv_cache
        speculation = Speculation(guesser, 5, lookup)
        if source == "none":
            speculation = None
        else:
            speculation.choose = lambda max_k, sources: (
                ([*sources][-1], min(max_k, 3)) if sources and max_k else ("none", 0)
            )
        reserve = engine.reserve

        def noted(positions: int, engine=engine, reserve=reserve, grown=grown) -> None:
            reserve(positions)
            grown.append(engine.kv_cache[0].shape[3])

        monkeypatch.setattr(engine, "reserve", noted)
        texts.append(generated(engine, PROMPT, COUNT, params, speculation=speculation))
        sizes.append(sorted(set(grown)))
    assert len(texts[0]) == COUNT
    assert texts[0] == texts[1] == texts[2]
    assert sizes[0] == [len(PROMPT) + COUNT] and sizes[1] == [200]
    assert len(sizes[2]) >= 4


def test_a_conversation_grows_and_a_prefix_is_loaded_into_the_grown_cache(monkeypatch, demo, tmp_path: Path) -> None:
    """Each turn equals an answer of an engine that has room for everything, and so does one from a stored prefix."""
    monkeypatch.setattr(generate, "MIN_CAPACITY", 4)
    checkpoint = read_checkpoint(demo["target"])
    model, params = random_model(checkpoint.args), make_params(1, 0.8)
    engine = Engine(model, 1024, checkpoint, PrefixCache(tmp_path, 10**8))
    large, ids = engine_of(model, 1024), list(PROMPT)
    for _ in range(4):
        found = generated(engine, ids, 20, params)
        assert found == generated(large, ids, 20, params)
        ids += found + PROMPT
    assert engine.kv_cache[0].shape[3] < 1024
    loaded = Engine(model, 1024, checkpoint, PrefixCache(tmp_path, 10**8))
    assert generated(loaded, ids, 20, params) == generated(large, ids, 20, params)
    assert loaded.num_cached > 60


@pytest.mark.slow
def test_growth_compiles_nothing_anew(monkeypatch) -> None:
    monkeypatch.setattr(generate, "MIN_CAPACITY", 1)
    torch._dynamo.reset()
    models, params = [random_model(ARGS) for _ in range(2)], make_params(3, 0.8)
    prompt = PROMPT * 5
    expected = generated(engine_of(models[0], 200), prompt, COUNT, params)
    engine = new_engine(models[1])
    engine.compile(True, True, params)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert generated(engine, prompt, COUNT, params) == expected
    assert engine.kv_cache[0].shape[3] > len(prompt)


def test_growth_without_memory_is_one_line_and_the_conversation_goes_on(monkeypatch, demo, capsys) -> None:
    words = ["--interactive", "--checkpoint_path", str(demo["target"]), "--precision", "float32", "--device", "cpu"]
    monkeypatch.setattr(generate, "MIN_CAPACITY", 16)
    session = Session(build_parser().parse_args([*words, "--max_new_tokens", "40", "--ignore_eos"]), [])
    conversation, new_empty = session.conversation, torch.Tensor.new_empty

    def refuse(tensor: torch.Tensor, *shape: int, **options: object) -> torch.Tensor:
        if len(shape) == 5 and shape[3] > 32:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return new_empty(tensor, *shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", refuse)
    with pytest.raises(ValueError, match="no memory for a KV cache of .* positions: choose a smaller --context"):
        answer_line(session, "def f(")
    assert conversation.messages == []
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    answer_line(session, "def f(")
    assert len(conversation.messages) == 2


# ---- --context


def session_of(path: Path, texts: list[str], *flags: object) -> Session:
    words = ["--checkpoint_path", path, "--precision", "float32", "--device", "cpu", "--temperature", 0, *flags]
    return Session(build_parser().parse_args(list(map(str, words))), texts)


def test_the_cache_has_room_for_the_longest_prompt_and_its_answer(demo, capsys) -> None:
    texts = ["def read_file(", "x" * 700]
    session = session_of(demo["target"], texts, "--max_new_tokens", 30)
    longest = max(map(len, session.prompts))
    assert longest > generate.MIN_CAPACITY
    assert session.engine.kv_cache[0].shape[3] == longest + 30
    figures = re.search(
        r"Memory: ([\d.]+) GB of weights, KV cache: (\d+) positions of (\d+) bytes", capsys.readouterr().err
    )
    args = session.engine.checkpoint.args
    assert int(figures[2]) == longest + 30
    assert int(figures[3]) == 2 * 4 * args.n_layer * args.n_kv_head * args.head_dim


def test_the_context_limits_prompt_and_answer(demo) -> None:
    """A prompt of exactly the context gives one token; one token more is refused; a larger context is the model's."""
    text = "def read_file("
    [prompt] = session_of(demo["target"], [text]).prompts
    exact = session_of(demo["target"], [text], "--context", len(prompt), "--ignore_eos")
    exact.answer(prompt)
    assert "(1 tokens" in exact.statistics and "Stopped: limit of 1 tokens" in exact.statistics
    beyond = session_of(demo["target"], [text], "--context", len(prompt) + 4, "--max_new_tokens", 50, "--ignore_eos")
    beyond.answer(prompt)
    assert "(5 tokens" in beyond.statistics
    for context in (1, len(prompt) - 1):
        with pytest.raises(ValueError, match=f"{len(prompt)} tokens, but a context of {context}: shorten"):
            session_of(demo["target"], [text], "--context", context)
    assert session_of(demo["target"], [], "--interactive", "--context", 10**9).max_seq_length == 1024


def test_a_conversation_fills_the_context_and_says_so(demo, capsys) -> None:
    session = session_of(demo["target"], [], "--interactive", "--context", 40, "--ignore_eos")
    answer_line(session, "def f(")
    assert "the answer was cut at its limit of" in capsys.readouterr().err
    with pytest.raises(ValueError, match="but a context of 40"):
        answer_line(session, "def g(")


@pytest.mark.slow
def test_context_and_draft_on_the_command_line(demo) -> None:
    """The draft has the same limit, and both say their memory."""
    flags = ["--checkpoint_path", demo["target"], "--draft_checkpoint_path", demo["draft"], "--context", 30]
    done = run_cli("generate.py", *flags, "--prompt", "def f(", "--ignore_eos", "--precision", "float32")
    assert done.stderr.count("Memory: ") == 2 == done.stderr.count("KV cache: 30 positions")


# ---- Peak memory of a process

PEAK = """
import re, sys
sys.argv = ["generate.py", *sys.argv[1:]]
import generate
generate.main()
print("PEAK", re.search(r"VmPeak:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def demo_of(positions: int, folder: Path) -> Path:
    """The demo checkpoint as if it had been made for `positions` positions."""
    shutil.copytree(DEMO / "target", folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = positions
    (folder / "config.json").write_text(json.dumps(config))
    return convert(folder, "float32")


@pytest.mark.slow
def test_a_long_context_takes_no_memory_until_it_is_used(tmp_path: Path) -> None:
    """Address space of a process: that of a model made for 131,072 positions, and for 2,048, under a limit as well."""
    peaks = []
    for positions in (2048, 131072):
        path = demo_of(positions, tmp_path / str(positions))
        command = [sys.executable, "-c", PEAK, "--checkpoint_path", path, "--device", "cpu", "--max_new_tokens", "5"]
        limit = (peaks[0] + 100_000) * 1024 if peaks else resource.RLIM_INFINITY

        def limited(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))

        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(command, preexec_fn=limited, check=False, **options)
        assert done.returncode == 0, done.stderr
        peaks.append(int(re.search(r"PEAK (\d+)", done.stderr)[1]))
    args = read_checkpoint(path).args
    whole = 131072 * 2 * args.n_layer * args.n_kv_head * args.head_dim * 2 / 1024
    assert whole > 200_000  # KB: so the limit shows a cache for all positions
    assert abs(peaks[1] - peaks[0]) < 100_000


# ---- Mapped files


def flags_of_mapping(path: Path) -> str:
    """The VmFlags of this process's mapping of a file."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(str(path.resolve())))
    return next(line for line in lines[start:] if line.startswith("VmFlags"))


@pytest.mark.parametrize("kind", ["checkpoint", "safetensors", "bin"])
def test_a_mapped_file_is_not_counted_as_memory(kind: str, tmp_path: Path) -> None:
    """Neither accounted ("ac") nor writable ("wr"), and the file may be read-only. The tensors are right."""
    shutil.copytree(DEMO / "target", tmp_path / "model")
    path = convert(tmp_path / "model", "float32")
    expected = {name: tensor.clone() for name, tensor in torch.load(path, weights_only=True)["model"].items()}
    if kind == "checkpoint":
        path.chmod(0o444)
        tensors = read_checkpoint(path).state_dict
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    else:
        path = tmp_path / "model" / "model.safetensors"
        readers = read_weights(tmp_path / "model")
        if kind == "bin":
            weights = {name: read() for name, read in readers.items()}
            name = "model.layers.0.mlp.down_proj.weight"
            weights[name] = weights[name].t().contiguous().t()  # not contiguous
            path.unlink()
            path = tmp_path / "model" / "pytorch_model.bin"
            torch.save({name: torch.nn.Parameter(weight) for name, weight in weights.items()}, path)
            readers = read_weights(tmp_path / "model")
        path.chmod(0o444)
        tensors = {name: read() for name, read in readers.items()}
        embeddings = tensors["model.embed_tokens.weight"].float()
        assert torch.equal(embeddings, expected["tok_embeddings.weight"].float())
        down = tensors["model.layers.0.mlp.down_proj.weight"].float()
        assert torch.equal(down, expected["layers.0.feed_forward.w2.weight"].float())
    flags = flags_of_mapping(path)
    assert " ac" not in flags and " wr" not in flags


def test_a_file_larger_than_memory_and_swap_is_mapped(tmp_path: Path) -> None:
    """A sparse file, which Linux would refuse to map privately and writable."""
    sizes = dict(re.findall(r"^(MemTotal|SwapTotal):\s+(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.M))
    size = 2 * 1024 * sum(map(int, sizes.values()))
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(size)
    data = map_file(path)
    assert len(data) == size and data[-1] == 0


# ---- Saying what happens


@pytest.mark.slow
def test_the_kernels_are_compiled_while_loading(demo, tmp_path: Path) -> None:
    """One line, before the model is loaded, and only once."""
    flags = ["--checkpoint_path", demo["target"], "--max_new_tokens", 2, "--device", "cpu"]
    first, second = (run_cli("generate.py", *flags, XDG_CACHE_HOME=str(tmp_path)).stderr for _ in range(2))
    assert first.index("compiling the CPU kernels, once") < first.index("Memory: ") < first.index("Time to first token")
    assert "compiling" not in second


def test_a_long_prompt_shows_a_bar_over_its_chunks(target, monkeypatch) -> None:
    """Not if it is one chunk; and tqdm shows none where stderr is no terminal."""
    bars = []

    def progress(iterable, name: str, disable: bool | None) -> object:
        bars.append((name, len(iterable), disable))
        return iterable

    monkeypatch.setattr(utils, "progress", progress)
    for length in (10, 600):
        new_engine(target).prefill([7] * length, make_params())
    assert bars == [("prompt", 1, True), ("prompt", 2, None)]


def test_no_bar_without_a_terminal(demo) -> None:
    flags = ["--checkpoint_path", demo["target"], "--max_new_tokens", 2, "--prompt", "x " * 400]
    done = run_cli("generate.py", *flags)
    assert "prompt" not in done.stderr and "\r" not in done.stderr
