"""Speculation: the text of plain decoding on every path, guesses where they pay, none where they do not."""

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TOKENIZER, generated, make_sampling, new_engine, random_model, run_cli

from checkpoint import load_model, read_checkpoint
from generate import Engine
from model import Transformer
from speculation import DRAFT, PLAIN, Lookup, Speculation, follow

PROMPT = [*TOKENIZER.start, *TOKENIZER.encode("def read_file(path):\n    with open(path) as file:\n        return")]
WEIGHTS = ("float32", "bfloat16", "int8", "int4")
CHOICES = {
    "temperature": (0.0, 0.5, 0.8, 1.0, 1.5),
    "top_k": (None, 1, 20),
    "top_p": (None, 0.9),
    "min_p": (None, 0.05),
    "k": (1, 4, 7, 10, 13),
    "seed": (1, 2, 3),
    "compiled": (False, True),
    "weights": WEIGHTS,
    "source": ("draft", "lookup", "both", "target", "random"),
}
COMPILED = [  # weights, top_k, top_p, min_p: each is a graph of its own, which takes seconds
    ("float32", None, 0.9, None),
    ("bfloat16", 20, None, 0.05),
    ("int8", 1, None, None),
    ("int4", None, 0.9, 0.05),
]


class Steady(Speculation):
    """Tries k, k + 1, k + 2 guesses in turn, of each source in turn, whether they pay or not."""

    def __init__(self, draft: Callable | None, k: int, lookup: Lookup | None = None) -> None:
        super().__init__(draft, 15, lookup)
        self.turns = itertools.count()
        self.k = k

    def choose(self, room: int, sources: list[int]) -> tuple[int, int]:
        turn = next(self.turns)
        return (sources[turn % len(sources)], min(room, self.k + turn % 3)) if sources else (PLAIN, 0)


def covering_set() -> list[dict]:
    """Runs in which every pair of values of two of CHOICES occurs, found greedily."""
    names, draw = list(CHOICES), random.Random(0)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in CHOICES[a] for y in CHOICES[b]}
    runs = []
    while missing:
        candidates = []
        for _ in range(200):
            run = {name: draw.choice(values) for name, values in CHOICES.items()}
            if run["compiled"]:
                run |= zip(("weights", "top_k", "top_p", "min_p"), draw.choice(COMPILED), strict=True)
            pairs = set(itertools.combinations(run.items(), 2))
            candidates.append((len(pairs & missing), len(candidates), run, pairs))
        _, _, run, pairs = max(candidates)
        runs.append(run)
        missing -= pairs
    return runs


RUNS = covering_set()


@pytest.fixture(scope="module")
def models(demo: dict[str, Path], target: Transformer) -> dict[str, Transformer]:
    """The demo target at each precision, its draft, and a random model of the draft's shape."""
    made = {"float32": target}
    for name, path in (("bfloat16", "target"), ("int8", "int8"), ("int4", "int4"), ("draft", "draft")):
        made[name] = load_model(read_checkpoint(demo[path]), "cpu", torch.bfloat16)
    made["draft float32"] = load_model(read_checkpoint(demo["draft"]), "cpu", torch.float32)
    made["random"] = random_model(made["draft"].args, spread=0.05)
    return made


@pytest.fixture(scope="module")
def engine_of(models: dict[str, Transformer]) -> Callable:
    """A function: weights, compiled with which top_k, top_p, min_p or not -> the engine, compiled once."""
    made = {}

    def make(weights: str, *compiled: float | None) -> Engine:
        key = (weights, compiled)
        if key not in made:
            made[key] = new_engine(models[weights])
            if compiled:
                made[key].compile(True, False, make_sampling(1, 0.5, *compiled))
        return made[key]

    return make


def steady(name: str, weights: str, models: dict[str, Transformer], k: int) -> Steady:
    """Guesses of that source."""
    if name == "lookup":
        return Steady(None, k, Lookup())
    draft = {"target": weights, "random": "random"}.get(name, "draft float32" if weights == "float32" else "draft")
    return Steady(new_engine(models[draft]).guess, k, Lookup() if name == "both" else None)


def test_the_covering_set_is_one() -> None:
    seen = {pair for run in RUNS for pair in itertools.combinations(run.items(), 2)}
    assert len(RUNS) <= 60
    assert len(seen) == sum(len(CHOICES[a]) * len(CHOICES[b]) for a, b in itertools.combinations(CHOICES, 2))


def marks(run: dict) -> tuple:
    return (pytest.mark.slow,) if run["compiled"] else ()


@pytest.mark.parametrize("run", [pytest.param(r, id=" ".join(map(str, r.values())), marks=marks(r)) for r in RUNS])
def test_the_text_is_that_of_plain_decoding(run: dict, engine_of: Callable, models: dict[str, Transformer]) -> None:
    """With every parameter of sampling and number of guesses, in float32, bf16, int8 and int4, whoever guesses."""
    likely = run["top_k"], run["top_p"], run["min_p"]
    engine = engine_of(run["weights"], *(likely if run["compiled"] else ()))
    sampling = make_sampling(run["seed"], run["temperature"], *likely)
    engine.ids.clear()  # or the prompt's last token would not run in one pass with the others, which bf16 sees
    expected = generated(engine, PROMPT, 60, sampling)
    speculation = steady(run["source"], run["weights"], models, run["k"])
    engine.ids.clear()
    assert generated(engine, PROMPT, 60, sampling, speculation=speculation) == expected
    tried = {tried for _, tried, _ in speculation.rounds}
    assert tried & {run["k"], run["k"] + 1, run["k"] + 2} or run["source"] == "lookup"
    if run["source"] == "target" and not run["compiled"]:  # compiled bf16 rounds elsewhere than the eager draft
        assert all(tried == accepted for _, tried, accepted in speculation.rounds)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", CHOICES["source"])
def test_the_context_is_used_to_its_last_position(weights: str, name: str, models: dict[str, Transformer]) -> None:
    """The run of guesses shrinks near the end; no position behind it is ever run."""
    engine, prompt, sampling = new_engine(models[weights]), (PROMPT * 60)[:985], make_sampling(5, 0.8)
    last, run = [], engine.run
    engine.run = lambda ids, *rest, **more: (last.append(len(engine.ids) + len(ids)), run(ids, *rest, **more))[1]
    expected = generated(engine, prompt, 999, sampling)
    assert len(expected) == 1024 - 985 + 1
    engine.ids.clear()
    assert generated(engine, prompt, 999, sampling, speculation=steady(name, weights, models, 13)) == expected
    assert max(last) == 1024


def test_end_of_sequence_inside_an_accepted_run_ends_there(target: Transformer) -> None:
    engine = new_engine(target)
    ids = generated(engine, PROMPT, 40, make_sampling())
    for eos_id in {ids[7], ids[12], ids[20]}:
        speculation = Steady(new_engine(target).guess, 12)
        assert generated(engine, PROMPT, 40, make_sampling(), [eos_id], speculation) == ids[: ids.index(eos_id)]


def test_no_more_tokens_than_were_asked_for(target: Transformer) -> None:
    engine, sampling = new_engine(target), make_sampling()
    ids = generated(engine, PROMPT, 40, sampling)
    for count in (1, 2, 3, 17):
        assert (
            generated(engine, PROMPT, count, sampling, speculation=Steady(new_engine(target).guess, 13)) == ids[:count]
        )


def test_a_draft_of_a_shorter_context_falls_silent(target: Transformer, models: dict[str, Transformer]) -> None:
    """And it runs nothing behind its own last position."""
    args = replace(models["draft"].args, max_seq_length=64)
    draft, engine, sampling = new_engine(random_model(args)), new_engine(target), make_sampling(3, 0.8)
    for prompt in (PROMPT, PROMPT * 3, PROMPT * 9):
        expected = generated(engine, prompt, 60, sampling)
        assert generated(engine, prompt, 60, sampling, speculation=Steady(draft.guess, 5)) == expected
        assert len(draft.ids) <= 64


def test_the_text_goes_on_guessing_where_a_draft_has_fallen_silent(target: Transformer, models) -> None:
    draft = new_engine(random_model(replace(models["draft"].args, max_seq_length=64)))
    engine, speculation = new_engine(target), Speculation(draft.guess, 5, Lookup())
    expected = generated(new_engine(target), PROMPT * 9, 60, make_sampling())
    assert generated(engine, PROMPT * 9, 60, make_sampling(), speculation=speculation) == expected
    silent, *others = [source for source, _, _ in speculation.rounds if source != PLAIN]
    assert silent == DRAFT and others and DRAFT not in others


def test_a_draft_whose_context_is_full_is_not_even_rewound(models: dict[str, Transformer]) -> None:
    """It costs nothing from there on: not a comparison, not a look for stored prefixes."""
    draft = new_engine(random_model(replace(models["draft"].args, max_seq_length=64)))
    draft.rewind = None
    assert draft.guess(PROMPT * 9, 5, make_sampling()) == []


def test_one_speculation_serves_many_answers(target: Transformer, models: dict[str, Transformer]) -> None:
    """What a draft has in its cache from one prompt does not leak into the next."""
    engine, speculation = new_engine(target), Speculation(new_engine(models["draft float32"]).guess, 5)
    for i, prompt in enumerate((PROMPT, PROMPT[:9], PROMPT[:5] + PROMPT, PROMPT)):
        sampling = make_sampling(i, 0.8)
        assert generated(engine, prompt, 40, sampling, speculation=speculation) == generated(
            new_engine(target), prompt, 40, sampling
        )
    assert any(accepted for _, _, accepted in speculation.rounds)


@pytest.mark.slow
def test_nothing_is_compiled_while_decoding(models: dict[str, Transformer]) -> None:
    from torch._dynamo.utils import counters  # noqa: PLC0415

    torch.compiler.reset()
    engine, draft = new_engine(models["bfloat16"]), new_engine(models["draft"])
    engine.compile(True, False, make_sampling())
    draft.compile(True, True, make_sampling())
    before = counters["stats"]["unique_graphs"]
    for k in (1, 3, 6, 9, 13):
        generated(engine, PROMPT * k, 60, make_sampling(k, 0.8), speculation=Steady(draft.guess, k))
    assert counters["stats"]["unique_graphs"] == before > 0


# ---- Prompt lookup


@pytest.mark.parametrize(
    "ids, count, guesses",
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], 2, [4, 9]),
        ([1, 2, 7, 8, 1, 2, 5, 6, 1, 2], 2, [5, 6]),  # of two repetitions the recent one
        ([3, 1, 2, 7, 0, 4, 1, 2, 5, 0, 3, 1, 2], 1, [7]),  # a longer one before a recent one
        ([5, 6, 5, 6, 5, 6], 5, [5, 6, 5, 6, 5]),  # what goes round
        ([1, 2, 3, 4], 3, []),
        ([1], 3, []),
        ([8, 8, 8], 3, [8, 8, 8]),
        ([4, 55297, 6, 1, 4, 55297], 2, [6, 1]),  # an id in the range of surrogates
    ],
)
def test_prompt_lookup_continues_the_longest_recent_repetition(ids: list[int], count: int, guesses: list[int]) -> None:
    found = [Lookup().find(ids)]
    grown, lookup = [], Lookup()
    for token in ids:  # as it is used: the text grows
        grown.append(token)
        last = lookup.find(grown)
    for _, place in (*found, last):
        assert (follow(ids, place, count) if place else []) == guesses


def test_finding_a_place_takes_no_longer_in_a_long_text() -> None:
    """One more token costs as many looks into the index, whatever was said before."""

    class Counted(dict):
        looks = 0

        def get(self, *key):
            self.looks += 1
            return super().get(*key)

        def __setitem__(self, *item) -> None:
            self.looks += 1
            super().__setitem__(*item)

    draw, lookup, ids, looks = random.Random(0), Lookup(), [], []
    lookup.find(ids)
    lookup.places = Counted()
    for _ in range(5000):
        ids.append(draw.randrange(50))
        before = lookup.places.looks
        lookup.find(ids)
        looks.append(lookup.places.looks - before)
    assert max(looks) <= 2 * len(Lookup.LENGTHS)


def test_another_text_has_an_index_of_its_own() -> None:
    lookup = Lookup()
    assert lookup.find([1, 2, 3, 1, 2]) == (2, 2)
    assert lookup.find([5, 6, 1, 2]) == (0, 0)


# ---- How many guesses

FLAT = [1 + 0.02 * i for i in range(16)]  # seconds of a pass that verifies i guesses
STEEP = [1, 1.8, 1.9, 2.0, 2.2, 5.7] + [6 + 0.3 * i for i in range(10)]
SLOPED = [1 + 0.1 * i for i in range(16)]


def seconds_per_token(
    acceptance: Callable, costs: list[float], guess_cost: float, tokens: int = 4000, k: int | None = None
) -> float:
    """Simulated, with noise of 5 %; with the controller, or with k guesses always.

    `acceptance` (tokens made) -> {source: probability that a guess stands, while those before it do}, of what is there.
    """
    draw, speculation, spent, made = random.Random(1), Speculation(None, 15), 0.0, 0
    while made < tokens:
        there = acceptance(made)
        source, tried = speculation.choose(15, list(there)) if k is None else (DRAFT, k)
        accepted = 0
        while accepted < tried and draw.random() < there[source]:
            accepted += 1
        seconds = costs[tried] * draw.gauss(1, 0.05)
        if source == DRAFT:
            seconds += tried * guess_cost * draw.gauss(1, 0.05)
        speculation.learn(source, tried, accepted, seconds)
        spent += seconds
        made += accepted + 1
    return spent / made


@pytest.mark.parametrize("costs", [FLAT, SLOPED, STEEP], ids=["flat", "sloped", "steep"])
@pytest.mark.parametrize("guess_cost", [0.002, 0.05, 0.2])
def test_within_5_percent_of_the_best_fixed_number(costs: list[float], guess_cost: float) -> None:
    """On average over acceptances from 0 to 1; and nowhere more than 5 % slower than no guesses at all."""
    ratios = []
    for p in (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0):
        best = min(seconds_per_token(lambda made, p=p: {DRAFT: p}, costs, guess_cost, k=k) for k in range(16))
        mine = seconds_per_token(lambda made, p=p: {DRAFT: p}, costs, guess_cost)
        assert mine < 1.05
        ratios.append(mine / best)
    assert sum(ratios) / len(ratios) < 1.05


def test_a_useless_draft_is_hardly_asked_and_heard_again_when_it_is_useful() -> None:
    """Off where the best number is 0, on again when acceptance returns."""
    useless = seconds_per_token(lambda made: {DRAFT: 0.0}, SLOPED, 0.2)
    assert useless < 1.05
    returns = seconds_per_token(lambda made: {DRAFT: 0.9 * (made >= 4000)}, SLOPED, 0.05, tokens=8000)
    best = min(seconds_per_token(lambda made: {DRAFT: 0.9}, SLOPED, 0.05, k=k) for k in range(16))
    assert 2 * returns - seconds_per_token(lambda made: {DRAFT: 0.0}, SLOPED, 0.05) < 1.15 * best


TEXTS = {  # what a text gives at a place: length that is found -> acceptance
    "copied": lambda made: {5: 0.97},
    "in parts": lambda made: {5: 0.95} if made % 200 < 80 else {2: 0.1} if made % 3 else {},
    "free": lambda made: {2: 0.1} if made % 4 == 0 else {3: 0.3} if made % 7 == 0 else {},
    "misleading": lambda made: {3 + made % 3: 0.0},
}


@pytest.mark.parametrize("costs", [FLAT, SLOPED, STEEP], ids=["flat", "sloped", "steep"])
@pytest.mark.parametrize("draft", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("text", TEXTS)
def test_two_sources_are_hardly_slower_than_the_better_one_alone(text: str, draft: float, costs: list[float]) -> None:
    """By at most 3 %, nor than no guesses; and faster than either where both pay, each in its own parts of the text."""
    alone = seconds_per_token(TEXTS[text], costs, 0.1), seconds_per_token(lambda made: {DRAFT: draft}, costs, 0.1)
    both = seconds_per_token(lambda made: {DRAFT: draft} | TEXTS[text](made), costs, 0.1)
    assert both < 1.03 * min(*alone, 1.0)
    if text == "in parts" and draft == 0.6 and alone[1] < 0.95:
        assert both < 0.97 * min(alone)


def test_a_pause_of_the_machine_does_not_mislead_for_long() -> None:
    """A minute in which a pass of a second slept: what was best is best again soon."""
    for there, k in (({DRAFT: 0.0}, 0), ({5: 1.0}, 15)):
        speculation, counts = Speculation(None, 15), []
        for i in range(600):
            source, tried = speculation.choose(15, list(there))
            pause = 60.0 if i == 200 else 0.0
            accepted = tried if there.get(source) else 0
            speculation.learn(source, tried, accepted, SLOPED[tried] + 0.1 * tried * (source == DRAFT) + pause)
            counts.append(tried)
        assert sum(tried == k for tried in counts[300:]) > 270


class Clock:
    """A draft and a target that take simulated time: `time.perf_counter` for the loop."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_a_draft_has_missed_is_not_taken_for_the_cost_of_a_guess(target: Transformer, monkeypatch) -> None:
    """A draft that reads its prompt, and after a pause what was said meanwhile, at a price, but guesses for nothing."""
    clock, engine, draft = Clock(), new_engine(target), new_engine(target)
    monkeypatch.setattr("generate.time.perf_counter", clock)
    run = engine.run

    def run_slowly(*args, **options) -> list[int]:
        clock.now += 1.0
        return run(*args, **options)

    def guess(ids: list[int], count: int, sampling) -> list[int]:
        draft.rewind(ids)
        clock.now += 5.0 * (len(ids) - len(draft.ids) > 8)
        return draft.guess(ids, count, sampling)

    monkeypatch.setattr(engine, "run", run_slowly)
    speculation = Speculation(guess, 1)
    generated(engine, PROMPT, 40, make_sampling(), speculation=speculation)
    (rate,) = speculation.rates(DRAFT, 1)
    assert rate[0] > 1.5  # two tokens a second, and not two in six


# ---- The command line


@pytest.mark.slow
def test_the_command_line_gives_the_same_text_and_says_what_was_accepted(demo: dict[str, Path]) -> None:
    """In float32 and in bfloat16, where every pass takes the kernels."""
    flags = ["--checkpoint_path", demo["target"], "--max_new_tokens", 50, "--prompt", "def read_file(", "--ignore_eos"]
    for precision in ("float32", "bfloat16"):
        plain = run_cli("generate.py", *flags, "--precision", precision)
        for more in (["--draft_checkpoint_path", demo["draft"]], ["--prompt_lookup", "--speculate_k", 15]):
            done = run_cli("generate.py", *flags, "--precision", precision, *more)
            assert done.stdout == plain.stdout
            (said,) = re.findall(r"Guesses: (\d+) tried, (\d+) accepted, (\d+) tokens in (\d+) passes", done.stderr)
            tried, accepted, tokens, passes = map(int, said)
            assert 0 <= accepted <= tried
            assert tokens == 49
            assert passes <= tokens <= passes + accepted


@pytest.mark.slow
def test_another_vocabulary_is_refused_and_other_notes_in_the_tokenizer_are_not(demo, tmp_path: Path) -> None:
    """The pieces are compared: a byte string behind them (protobuf's field 2, 6: the trainer's prefix) is not one."""
    content = torch.load(demo["draft"], weights_only=True)
    proto = content["tokenizer"]["proto"]
    noted = proto + bytes([0x12, 7, 0x12, 5]) + b"other"
    piece = TOKENIZER.pieces.id_to_piece(1000).encode()
    head = bytes([0x0A, len(piece)])
    other = proto.replace(head + piece, head + b"Q" * len(piece))
    assert other != proto != noted
    for name, changed in (("noted", noted), ("other", other)):
        tokenizer = content["tokenizer"] | {"proto": changed}
        torch.save(content | {"tokenizer": tokenizer}, tmp_path / f"{name}.pth")
    flags = ["generate.py", "--checkpoint_path", demo["target"], "--max_new_tokens", 5, "--draft_checkpoint_path"]
    assert run_cli(*flags, tmp_path / "noted.pth").returncode == 0
    done = run_cli(*flags, tmp_path / "other.pth", check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "another vocabulary" in done.stderr


@pytest.mark.slow
def test_a_draft_whose_embeddings_are_padded_serves(demo, tmp_path: Path) -> None:
    """What both models have a text for is enough: 2,048 and 2,064 embeddings, of which the last 16 would win."""
    content = torch.load(demo["draft"], weights_only=True)
    table = content["model"]["tok_embeddings.weight"]
    padded = torch.cat([table, 9 * table[:16]])
    content["model"] |= {"tok_embeddings.weight": padded, "output.weight": padded}
    content["config"] |= {"vocab_size": len(padded)}
    torch.save(content, tmp_path / "padded.pth")
    flags = ["--checkpoint_path", demo["target"], "--precision", "float32", "--max_new_tokens", 40, "--ignore_eos"]
    plain = run_cli("generate.py", *flags)
    assert run_cli("generate.py", *flags, "--draft_checkpoint_path", tmp_path / "padded.pth").stdout == plain.stdout
