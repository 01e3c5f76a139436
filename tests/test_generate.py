"""Sampling, the loop, compiled equal to eager, streaming, and the command line's output."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import utils

import pytest
import torch
from conftest import ROOT, TOKENIZER, decoded, generated, make_params, new_engine, run_cli, utf8_decoder

from checkpoint import load_model, read_checkpoint
from generate import Session, build_parser
from sampling import gumbel_noise, hash32, sample
from scripts.convert_hf_checkpoint import convert

GOLDEN_PROMPT = "The following example"
PROMPT = [*TOKENIZER.bos_ids, *TOKENIZER.encode(GOLDEN_PROMPT)]


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic over its degrees of freedom, in standard deviations from its mean."""
    expected = probabilities * counts.sum()
    freedom = int((probabilities > 0).sum()) - 1
    kept = probabilities > 0
    assert counts[~kept].sum() == 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("top_k", [None, 5])
def test_samples_follow_the_softmax(top_k: int | None) -> None:
    """Draw at 200,000 positions with one seed."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 1.5
    temperature, draws = 0.7, 200_000
    ids = sample(logits.expand(draws, -1), torch.arange(draws), make_params(7, temperature, top_k))
    kept = logits if top_k is None else logits.masked_fill(logits < logits.topk(top_k).values[-1], -math.inf)
    assert abs(chi_square(torch.bincount(ids, minlength=40).float(), (kept / temperature).softmax(-1))) < 4


WARPERS = {"top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper", "min_p": "MinPLogitsWarper"}  # in this order


@pytest.mark.parametrize(
    "limits", [{"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 12, "top_p": 0.8, "min_p": 0.05}, {"top_k": 3, "min_p": 0.3}]
)
def test_filtered_samples_follow_the_warpers_of_transformers(limits: dict) -> None:
    """Draw at 200,000 positions, in float32 and by the kernel; the warpers come before the temperature."""
    from transformers.generation import logits_process  # noqa: PLC0415

    logits = (torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 1.5).bfloat16()
    warped = logits.float()
    for name, warper in WARPERS.items():
        if name in limits:
            warped = getattr(logits_process, warper)(limits[name])(None, warped)
    temperature, draws = 0.7, 200_000
    params = make_params(7, temperature, **limits)
    ids = sample(logits.float().expand(draws, -1), torch.arange(draws), params)
    assert abs(chi_square(torch.bincount(ids, minlength=40).float(), (warped[0] / temperature).softmax(-1))) < 4
    for start in range(0, 320, 16):
        rows = sample(logits.expand(16, -1).contiguous(), torch.arange(start, start + 16), params)
        assert torch.equal(rows, ids[start : start + 16])


def test_temperature_zero_is_the_argmax() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample(logits, torch.arange(50), make_params(3, 0.0)), logits.argmax(-1))


def test_noise_is_gumbel_and_uncorrelated() -> None:
    """Euler's constant as mean, variance pi^2 / 6; no correlation of neighbouring positions, tokens or seeds."""
    noise = torch.stack(
        [gumbel_noise(torch.tensor(seed, dtype=torch.int32), torch.arange(500), 1000) for seed in range(4)]
    )
    assert torch.isfinite(noise).all()
    assert abs(noise.mean().item() - 0.5772157) < 0.005
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.01
    for shift in (1, 2, 16):
        for dim in (0, 1, 2) if shift < 4 else (1, 2):
            size = noise.shape[dim] - shift
            pair = torch.stack([noise.narrow(dim, 0, size).flatten(), noise.narrow(dim, shift, size).flatten()])
            assert abs(torch.corrcoef(pair)[0, 1].item()) < 5 / math.sqrt(pair.shape[1])


def test_noise_depends_on_nothing_but_seed_position_and_token() -> None:
    seed = torch.tensor(5, dtype=torch.int32)
    whole = gumbel_noise(seed, torch.arange(100), 64)
    assert torch.equal(gumbel_noise(seed, torch.arange(40, 50), 64), whole[40:50])
    assert torch.equal(gumbel_noise(seed, torch.tensor([7]), 32), whole[7:8, :32])


def reference_hash(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


@pytest.mark.slow
def test_hash_is_bit_equal_eager_compiled_and_in_python() -> None:
    x = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    expected = [reference_hash(value & 0xFFFFFFFF) for value in x.tolist()]
    assert [value & 0xFFFFFFFF for value in hash32(x).tolist()] == expected
    assert torch.equal(torch.compile(hash32)(x), hash32(x))


@pytest.fixture(scope="module")
def compiled(target):
    engine = new_engine(target)
    engine.compile(True, True, make_params())
    return engine


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("top_k", [None, 20])
def test_compiled_equals_eager(target, compiled, temperature: float, top_k: int | None) -> None:
    if top_k is not None:
        compiled = new_engine(target)
        compiled.compile(True, False, make_params(1, 0.5, top_k))
    params = make_params(11, temperature, top_k)
    eager = generated(new_engine(target), PROMPT, 60, params)
    assert generated(compiled, PROMPT, 60, params) == eager


@pytest.mark.slow
def test_models_of_different_eps_compile_in_one_process(random_llama) -> None:
    """Compile a step for each, as for a target and its draft."""
    torch.compiler.reset()
    for eps in (1e-5, 1e-6, 1e-3):
        _, folder = random_llama(rms_norm_eps=eps)
        model = load_model(read_checkpoint(convert(folder, "float32")), "cpu", torch.float32)
        engine = new_engine(model)
        engine.compile(True, True, make_params())
        prompt = [1, 5, 6, 7]
        assert generated(engine, prompt, 20, make_params()) == generated(new_engine(model), prompt, 20, make_params())


@pytest.mark.slow
def test_no_recompilation_after_the_warm_up_for_any_prompt_and_filling(target) -> None:
    """Compile nothing after Engine.compile: neither for a prompt's length nor for the first decoded token."""
    from torch._dynamo.utils import counters  # noqa: PLC0415

    torch.compiler.reset()
    compiled = new_engine(target)
    compiled.compile(True, True, make_params())
    before = counters["stats"]["unique_graphs"]
    for length in (*range(1, 300, 13), 300, 513, 800):
        generated(compiled, (PROMPT * 400)[:length], 3, make_params(length, 0.5))
    assert counters["stats"]["unique_graphs"] == before > 0


@pytest.mark.slow
def test_a_second_process_with_another_prompt_length_compiles_nothing(demo, tmp_path: Path) -> None:
    code = (
        "import sys, json, generate; generate.main();"
        "from torch._dynamo.utils import counters; print(json.dumps(counters['inductor']), file=sys.stderr)"
    )

    def counters(prompt: str) -> dict:
        flags = ["--compile", "--compile_prefill", "--checkpoint_path", demo["draft"], "--prompt", prompt]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", code, *map(str, flags), "--max_new_tokens", "2"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stderr.splitlines()[-1])

    assert counters("One")["fxgraph_cache_miss"] > 0
    second = counters("A much longer prompt than the first one was, " * 20)
    assert second.get("fxgraph_cache_miss", 0) == 0
    assert second["fxgraph_cache_hit"] > 0


def test_same_seed_same_text_other_seed_other_text(target) -> None:
    first, again, other = (generated(new_engine(target), PROMPT, 40, make_params(seed, 0.8)) for seed in (1, 1, 2))
    assert first == again != other


def test_cached_tokens_do_not_run_again(target) -> None:
    """The same text, wherever a prompt parts from the cached tokens; only the rest of it runs."""
    engine, params, rows, prompt = new_engine(target), make_params(3, 0.8), [], PROMPT * 5
    expected = generated(engine, prompt, 20, params)
    target.tok_embeddings.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[1]))
    try:
        for before, num_cached in (
            (prompt, len(prompt) - 1),
            (prompt + [5] * 9, len(prompt) - 1),
            (prompt[:17], 17),
            (prompt[:9] + [5] * 9, 9),
            ([5] * 9, 0),
            ([1], 1),
        ):
            generated(engine, before, 1, params)
            rows.clear()
            assert generated(engine, prompt, 20, params) == expected
            assert engine.num_cached == num_cached
            assert rows == [len(prompt) - num_cached, *[1] * 19]
    finally:
        target.tok_embeddings._forward_hooks.clear()


def test_the_end_token_ends_the_text_and_is_not_yielded(target) -> None:
    engine, greedy = new_engine(target), make_params()
    ids = generated(engine, PROMPT, 30, greedy)
    assert len(ids) == 30
    assert generated(engine, PROMPT, 30, greedy, [ids[12]]) == ids[: ids.index(ids[12])]
    assert generated(engine, PROMPT, 1, greedy) == ids[:1]


def test_the_context_is_used_to_its_last_position(target) -> None:
    """Five tokens after a prompt of 1,020 in a context of 1,024: 4 in the context, and the one that follows them."""
    long = (PROMPT * 400)[:1020]
    ids = generated(new_engine(target), long, 100, make_params())
    assert len(ids) == 5
    assert generated(new_engine(target), long + ids[:4], 100, make_params()) == ids[4:]


def test_the_statistics_say_why_the_text_ended(demo, target) -> None:
    flags = ["--checkpoint_path", str(demo["target"]), "--precision", "float32", "--temperature", "0"]
    session = Session(build_parser().parse_args([*flags, "--interactive", "--max_new_tokens", "30"]), [])
    session.answer(PROMPT)
    assert "Stopped: limit of 30 tokens" in session.statistics
    ids = generated(new_engine(target), PROMPT, 30, make_params())
    session.eos_ids = [ids[12]]
    session.answer(PROMPT)
    assert "Stopped: end of sequence" in session.statistics
    session.answer((PROMPT * 400)[:1020])
    assert "Stopped: limit of 5 tokens" in session.statistics  # the context has 1,024


def test_logits_that_are_not_finite_end_in_an_error(target) -> None:
    """Sample -1 for NaN or infinity anywhere in a row, at any temperature; minus infinity is filtered out."""
    logits = torch.zeros(4, 50)
    logits[0, 7] = torch.nan
    logits[1, 49] = torch.inf
    logits[2, :] = -torch.inf
    for temperature in (0.0, 0.8, 1e30):
        ids = sample(logits, torch.arange(4), make_params(1, temperature))
        assert ids[:3].tolist() == [-1, -1, -1]
        assert ids[3] >= 0
    engine = new_engine(target)
    engine.reserve(len(PROMPT))
    for layer in engine.kv_cache:
        layer.fill_(torch.nan)
    engine.cached_ids = PROMPT[:2]
    with pytest.raises(ValueError, match="not finite.*--precision"):
        engine.forward(PROMPT[2:], make_params())


@pytest.mark.parametrize("temperature", [0.0, 0.8, 5.0])
def test_top_k_keeps_exactly_k_and_of_equal_logits_the_lower_ids(temperature: float) -> None:
    """Logits with many ties, as in bfloat16; k = 1 is greedy at any temperature."""
    logits = torch.randint(0, 6, (300, 40), generator=torch.Generator().manual_seed(0)).float()
    order = logits.argsort(dim=-1, descending=True, stable=True)
    for k in (1, 2, 7, 40, 10**30):
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for seed in range(60):
            ids = sample(logits, torch.arange(300), make_params(seed, temperature, k))
            seen[torch.arange(300), ids] = True
        kept = torch.zeros_like(seen).scatter_(1, order[:, :k], True)
        assert not (seen & ~kept).any()
        if k == 1:
            assert torch.equal(ids, logits.argmax(-1))
        elif temperature == 5.0 and k == 7:
            assert (seen == kept).float().mean() > 0.99  # at this heat each of the seven is drawn in 60 tries


def test_ids_without_a_text_are_never_sampled() -> None:
    """Embeddings that are padded beyond the tokenizer's vocabulary."""
    logits = torch.zeros(50, 64)
    logits[:, 60:] = 100.0
    params = make_params(3, 0.8)
    params.vocab_size = 60
    assert sample(logits, torch.arange(50), params).max() < 60


GOLDEN = json.loads((Path(__file__).parent / "demo" / "golden.json").read_text())


def test_golden_text_of_the_demo(target, compiled) -> None:
    """The greedy text in float32, which every path has to give."""
    for engine in (new_engine(target), compiled):
        ids = generated(engine, PROMPT, len(GOLDEN["ids"]), make_params())
        assert ids == GOLDEN["ids"]
    assert decoded(ids) == GOLDEN["text"]


PROCESSOR = TOKENIZER.bpe.processor
BYTES = {PROCESSOR.id_to_piece(i): i for i in range(TOKENIZER.vocab_size) if PROCESSOR.is_byte(i)}


def test_streamed_text_equals_the_decoded_ids() -> None:
    """Emoji, CJK, control and unknown tokens, and any bytes, incomplete characters among them."""
    head = TOKENIZER.encode("The")
    texts = ["naïve café 東京都 👩‍👩‍👧 🇫🇷 end", "tabs\tand\nlines\n\n  indented", "x = {'a': [1, 2]}", "\u2047 \u2581"]
    random = torch.randint(0, TOKENIZER.vocab_size, (50, 30), generator=torch.Generator().manual_seed(0)).tolist()
    raws = [b"\xf0\x9f", b"\xe2\x82\xac\xe2\x82", b"\xff\xfea", b"\x80\xc3\xa9", b"\x80" * 64]
    torn = [[BYTES[f"<0x{byte:02X}>"] for byte in raw] for raw in raws]
    for ids in [*map(TOKENIZER.encode, texts), *random, *torn, *(t + TOKENIZER.encode("b") for t in torn)]:
        assert decoded(ids) == PROCESSOR.decode(head + ids).removeprefix(PROCESSOR.decode(head))


def test_an_incomplete_character_waits_and_an_invalid_byte_does_not() -> None:
    decode = utf8_decoder().decode
    pieces = [decode(TOKENIZER.token_bytes(BYTES[f"<0x{byte:02X}>"])) for byte in "é👍\n".encode() + b"\x80\x80"]
    assert pieces == ["", "é", "", "", "", "👍", "\n", "\ufffd", "\ufffd"]


STATISTICS = {
    "Memory": r"[\d.]+ GB of weights, KV cache: \d+ positions of \d+ bytes",
    "Load time": r"[\d.]+ s",
    "Prompt tokens": r"\d+ \(cached \d+ of \d+\)",
    "Time to first token": r"[\d.]+ s",
    "Prefill": r"[\d.]+ tokens/s",
    "Decode": r"[\d.]+ tokens/s \(\d+ tokens in [\d.]+ s\)",
    "Weights read": r"[\d.]+ GB/s",
    "Stopped": r"limit of 12 tokens",
}
GUESSES = r"\d+ tried, \d+ accepted, \d+ tokens in \d+ passes"


@pytest.mark.parametrize("more", [{}, {"Guesses": GUESSES}], ids=["plain", "speculative"])
def test_stdout_has_the_text_and_stderr_the_statistics(demo, more: dict[str, str]) -> None:
    flags = ["--checkpoint_path", demo["target"], "--max_new_tokens", 12, "--ignore_eos", "--temperature", 0]
    if more:
        flags.append("--prompt_lookup")
    done = run_cli("generate.py", *flags, "--prompt", GOLDEN_PROMPT, "--precision", "float32")
    assert GOLDEN["text"].startswith(done.stdout)
    assert done.stdout
    lines = dict(line.split(": ", 1) for line in done.stderr.splitlines())
    patterns = STATISTICS | more
    assert lines.keys() == patterns.keys()
    assert all(re.fullmatch(pattern, lines[name]) for name, pattern in patterns.items())


@pytest.mark.slow
def test_sample_i_is_the_answer_of_seed_plus_i(demo) -> None:
    flags = ["--checkpoint_path", demo["target"], "--max_new_tokens", "20", "--precision", "float32"]
    both = run_cli("generate.py", *flags, "--seed", "5", "--num_samples", "2")
    alone = [run_cli("generate.py", *flags, "--seed", seed).stdout for seed in (5, 6)]
    assert both.stdout == "\n".join(alone)
    assert re.findall(r"cached (\d+ of \d+)", both.stderr) == ["0 of 9", "8 of 9"]


def test_a_prompt_from_a_file_or_standard_input_is_the_same_prompt(demo, tmp_path: Path, monkeypatch) -> None:
    """The same text with line ends of Windows and with a byte order mark; --prompt may be repeated."""
    text = "Zürich\n東京"
    raws = [text.encode() + b"\n", b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n"]
    for raw in raws:
        (tmp_path / "prompt.txt").write_bytes(raw)
        with open(tmp_path / "prompt.txt") as file:
            monkeypatch.setattr(sys, "stdin", file)
            assert utils.read_text("-", "--prompt") == text
        assert utils.read_text(f"@{tmp_path / 'prompt.txt'}", "--prompt") == text
    flags = ["--checkpoint_path", demo["target"], "--max_new_tokens", 5, "--ignore_eos"]
    both = run_cli("generate.py", *flags, "--prompt", text, "--prompt", f"@{tmp_path / 'prompt.txt'}")
    first, second = both.stdout[: len(both.stdout) // 2], both.stdout[len(both.stdout) // 2 + 1 :]
    assert first == second != ""


@pytest.mark.slow
def test_normal_use_prints_no_warning(demo, tmp_path: Path) -> None:
    """Statistics alone on stderr, also without numpy and with everything compiled anew."""
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('none here', name='numpy')")
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    done = run_cli(
        "generate.py",
        "--checkpoint_path",
        demo["draft"],
        "--compile",
        "--max_new_tokens",
        "3",
        "--precision",
        "float32",
        **environment,
    )
    names = {line.split(": ")[0] for line in done.stderr.splitlines()}
    assert names == STATISTICS.keys()


@pytest.mark.slow
def test_compile_time_does_not_grow_with_the_number_of_layers(random_llama) -> None:
    """The code of one block for 2 layers as for 6, because the compiled step calls one compiled block."""
    from torch._inductor.utils import run_and_get_code  # noqa: PLC0415

    sizes = []
    for layers in (2, 6):
        _, folder = random_llama(num_hidden_layers=layers)
        model = load_model(read_checkpoint(convert(folder, "float32")), "cpu", torch.float32)
        _, code = run_and_get_code(new_engine(model).compile, True, False, make_params())
        sizes.append(sum(text.count("cpp_fused") for text in itertools.chain(code)))
    assert sizes[1] < sizes[0] * 1.5
