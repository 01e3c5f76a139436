"""Prefix caching: the same text, nothing computed twice, and no file that can do harm."""

import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import terminal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, generated, make_sampling, new_engine, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import generate_prefill
from checkpoint import load_model, read_checkpoint
from generate import generate
from generate_prefill import BLOCK, CachedEngine, Store
from model import ModelArgs, Transformer
from speculation import Lookup, Speculation

ARGS = ModelArgs(32, 2, 4, 2, 8, 48, 97, 1e-5, 10000.0, 1.0, 256)
GB = 10**9
A = [1 + i * 7 % 90 for i in range(100)]


MODEL = random_model(ARGS)
FILE = ARGS.n_layer * 2 * ARGS.n_kv_head * BLOCK * ARGS.head_dim * 4 + len(Store.MAGIC) + 32  # bytes


def cached_engine(folder: Path, budget: int = GB, model: Transformer = MODEL, root: str = "root") -> CachedEngine:
    checkpoint = SimpleNamespace(args=model.args, header={"id": root, "quantization": None})
    cache = model.make_cache(model.args.max_seq_length)
    return CachedEngine(model, cache, checkpoint=checkpoint, store=Store(folder, budget))


def answer(engine: CachedEngine, prompt: list[int], count: int = 12, speculation: Speculation | None = None) -> tuple:
    """The ids that follow, the tokens of the prompt that ran, and those cached; the engine then keeps them."""
    rows, run = [], type(engine).run
    engine.run = lambda ids, *rest, **more: (rows.append(len(ids)), run(engine, ids, *rest, **more))[1]
    engine.rewind(prompt)
    cached = len(engine.ids)
    ids = list(generate(engine, prompt, count, (), make_sampling(3, 0.8), speculation))
    ran = sum(rows) - (count - 1)
    engine.keep(prompt + ids)
    return ids, ran, cached


def test_what_is_stored_is_not_read_to_store_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn of a conversation costs its own blocks; one that another process has deleted is written again."""
    engine, reads = cached_engine(tmp_path), []
    answer(engine, A[:80])
    monkeypatch.setattr(Store, "read", lambda self, name: reads.append(name))
    answer(engine, A)
    assert len(reads) == 1  # the first block that is not there
    paths(tmp_path)[0].unlink()
    answer(engine, A)
    monkeypatch.undo()
    assert answer(cached_engine(tmp_path), A)[2] == 96


def paths(folder: Path) -> list[Path]:
    """The files that a store keeps in `folder`."""
    return sorted((folder / "llama_prefixes").iterdir())


def files(folder: Path) -> set[str]:
    return {path.name for path in paths(folder)}


CASES = {  # a prompt after A, and how much of it is on disk (A was answered with 12 tokens: 111 positions, 6 blocks)
    "exact hit": (A, 96),
    "one token more": (A + [5], 96),
    "one token fewer": (A[:-1], 96),
    "a block more": (A + A[:20], 96),
    "a block's length": (A[:96], 80),
    "a block's length and one": (A[:97], 96),
    "other at the first token": ([50] + A[1:], 0),
    "other in the middle": (A[:50] + [50] + A[51:], 48),
    "other at a block's first": (A[:48] + [50] + A[49:], 48),
    "other at the last token": (A[:-1] + [50], 96),
    "the stored one is longer": (A[:40], 32),
    "short": (A[:16], 0),
    "one token": ([1], 0),
    "other order": (A[::-1], 0),
}


@pytest.mark.parametrize("name", CASES)
def test_text_and_work_after_a_restart(name: str, tmp_path: Path) -> None:
    """The text is that without a cache; exactly the tokens that are not cached run, at least one."""
    answer(cached_engine(tmp_path), A)
    prompt, stored = CASES[name]
    ids, ran, cached = answer(cached_engine(tmp_path), prompt)
    assert ids == generated(new_engine(MODEL), prompt, 12, make_sampling(3, 0.8))
    assert (ran, cached) == (len(prompt) - stored, stored)


def test_in_one_process_what_the_cache_holds_needs_no_file(tmp_path: Path) -> None:
    """To the token, not to the block; files go on where it ends."""
    engine = cached_engine(tmp_path)
    answer(engine, A)
    other = A[:37] + [50] * 30
    assert answer(engine, other)[2] == 37
    assert answer(engine, A)[2] == 96  # 37 from the cache's beginning, the rest from disk
    assert answer(engine, A)[2] == 99


def test_branches_share_their_trunk_and_an_extension_stores_only_its_own_part(tmp_path: Path) -> None:
    sizes = []
    for prompt in (A, A + [3] * 40, A[:64] + [9] * 40, A):
        assert answer(cached_engine(tmp_path), prompt)[0] == generated(
            new_engine(MODEL), prompt, 12, make_sampling(3, 0.8)
        )
        sizes.append(len(files(tmp_path)))
    first = (len(A) + 11) // BLOCK
    assert sizes[0] == first
    assert sizes[1] == first + (len(A) + 40 + 11) // BLOCK - len(A) // BLOCK  # A's answer goes on otherwise behind A
    assert sizes[2] == sizes[1] + (64 + 40 + 11) // BLOCK - 64 // BLOCK
    assert sizes[3] == sizes[2]


def test_the_least_recently_used_goes_first_and_leaves_before_parents(tmp_path: Path) -> None:
    entry = FILE
    answer(cached_engine(tmp_path, 12 * entry), A, 2)  # 6 blocks
    for i in range(4):  # others come and go, A is used in between
        answer(cached_engine(tmp_path, 12 * entry), [60 + i] + A[1:40], 2)
        assert answer(cached_engine(tmp_path, 12 * entry), A, 2)[2] == 96
        assert sum(path.stat().st_size for path in paths(tmp_path)) <= 12 * entry
    assert answer(cached_engine(tmp_path, 12 * entry), [60] + A[1:40], 2)[2] == 0  # the oldest of the others
    crowded = cached_engine(tmp_path, 4 * entry)
    assert answer(crowded, [77] + A[1:100], 2)[0] == generated(
        new_engine(MODEL), [77] + A[1:100], 2, make_sampling(3, 0.8)
    )
    assert len(files(tmp_path)) <= 4


def test_of_one_chain_the_last_block_goes_first(tmp_path: Path) -> None:
    """Without its beginning the rest of a prefix is worth nothing: half of the room keeps the first half."""
    engine = cached_engine(tmp_path)
    answer(engine, A, 2)
    names = [name for _, name, _ in engine.blocks(A)]
    times = [(tmp_path / "llama_prefixes" / name).stat().st_mtime_ns for name in names]
    assert times == sorted(times, reverse=True) and len(set(times)) == len(times) == 6
    answer(cached_engine(tmp_path, 3 * FILE), A, 2)
    assert files(tmp_path) == set(names[:3])
    assert answer(cached_engine(tmp_path), A, 2)[2] == 48


segments = st.lists(st.integers(0, 2), min_size=1, max_size=3)
prompts = st.lists(st.tuples(segments, st.integers(1, 40), st.booleans()), min_size=1, max_size=7)


@settings(max_examples=40, deadline=None)
@given(prompts, st.sampled_from([1000, 9, 3]))
def test_any_sequence_of_prompts_gives_what_fresh_computation_gives(sequence: list[tuple], room: int) -> None:
    """Prompts of repeated segments that branch anywhere, restarts, and a store with room for few blocks."""
    folder = Path(tempfile.mkdtemp())
    try:
        engine = cached_engine(folder, room * FILE)
        for parts, length, restart in sequence:
            prompt = [1, *(token for part in parts for token in [part + 2, 5, 7 * part + 1] * length)][:200]
            if restart:
                engine = cached_engine(folder, room * FILE)
            ids, ran, cached = answer(engine, prompt, 4)
            assert ran == len(prompt) - cached
            assert ids == generated(new_engine(MODEL), prompt, 4, make_sampling(3, 0.8))
            assert len(list(folder.glob("*/*"))) <= room
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def quantized(demo: dict[str, Path]) -> dict[str, Transformer]:
    """The demo target at three precisions, all with activations and cache in float32."""
    sources = {"float32": "target", "int8": "int8", "int4": "int4"}
    return {name: load_model(read_checkpoint(demo[key]), "cpu", torch.float32) for name, key in sources.items()}


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
@pytest.mark.parametrize("guesses", ["none", "lookup", "draft"])
def test_text_with_quantization_and_speculation(
    weights: str, guesses: str, quantized: dict, demo, tmp_path: Path
) -> None:
    """A draft has a cache of its own, under a root of its own; what was guessed in vain is in no file."""
    model, prompt = quantized[weights], A + A[:30]
    expected = generated(new_engine(model), prompt, 40, make_sampling(3, 0.8))
    draft = load_model(read_checkpoint(demo["draft"]), "cpu", torch.float32)
    for restarted in (False, True):
        engine, other = cached_engine(tmp_path, model=model), cached_engine(tmp_path, model=draft, root="draft")
        sources = {"none": None, "lookup": Speculation(None, 7, Lookup()), "draft": Speculation(other.guess, 7)}
        speculation = sources[guesses]
        ids, _, cached = answer(engine, prompt, 40, speculation)
        other.keep(prompt + ids)
        assert ids == expected
        assert cached == restarted * 128
    names = {name for each in (engine, other) for _, name, _ in each.blocks((prompt + ids)[:-1])}
    assert files(tmp_path) <= names
    assert speculation is None or any(tried for _, tried, _ in speculation.rounds)


@pytest.mark.slow
def test_text_when_compiled(quantized: dict, tmp_path: Path) -> None:
    model = quantized["float32"]
    expected = generated(new_engine(model), A, 30, make_sampling(3, 0.8))
    answer(cached_engine(tmp_path, model=model), A, 30)
    engine = cached_engine(tmp_path, model=model)
    engine.compile(True, True, make_sampling(3, 0.8))
    speculation = Speculation(None, 5, Lookup())
    ids, _, cached = answer(engine, A, 30, speculation)
    assert (ids, cached) == (expected, 96)


# ---- Files


def damages(size: int) -> list[tuple[str, Callable]]:
    flips = [
        (f"byte {i}", lambda data, i=i: data[:i] + bytes([data[i] ^ 64]) + data[i + 1 :]) for i in range(0, size, 331)
    ]
    cuts = [(f"cut to {n}", lambda data, n=n: data[:n]) for n in (0, 1, 31, 32, 33, size // 2, size - 1)]
    return [
        *flips,
        (f"byte {size - 1}", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        *cuts,
        ("longer", lambda d: d + b"x"),
    ]


def test_a_damaged_file_is_not_used_is_told_once_and_replaced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A byte changed or the file cut anywhere: the blocks before it still serve."""
    answer(cached_engine(tmp_path), A, 2)
    names = [name for _, name, _ in cached_engine(tmp_path).blocks(A)]
    path, expected = tmp_path / "llama_prefixes" / names[2], generated(new_engine(MODEL), A, 2, make_sampling(3, 0.8))
    whole = path.read_bytes()
    for what, damage in damages(len(whole)):
        path.write_bytes(damage(whole))
        capsys.readouterr()
        ids, ran, cached = answer(cached_engine(tmp_path), A, 2)
        assert (ids, ran, cached) == (expected, 100 - 32, 32), what
        assert capsys.readouterr().err.count("\n") == 1
        assert path.stat().st_size == len(whole)
        assert answer(cached_engine(tmp_path), A, 2)[2] == 96


def test_a_file_under_another_name_is_not_used(tmp_path: Path) -> None:
    answer(cached_engine(tmp_path), A, 2)
    names = [name for _, name, _ in cached_engine(tmp_path).blocks(A)]
    folder = tmp_path / "llama_prefixes"
    shutil.copyfile(folder / names[1], folder / names[3])
    assert answer(cached_engine(tmp_path), A, 2)[2] == 48


def test_only_the_user_may_read_what_was_typed(tmp_path: Path) -> None:
    answer(cached_engine(tmp_path / "new"), A, 2)
    assert (tmp_path / "new" / "llama_prefixes").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in paths(tmp_path / "new")} == {0o600}


def foreign_things(folder: Path) -> None:
    """What a user may have in a folder: files, links, folders, a socket, a pipe; some with a store's kind of name."""
    name = "ab" * 32 + ".kv"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.txt").write_text("important" * 9999)
    (folder / "model.pth").write_bytes(b"weights" * 9999)
    (folder / ".hidden").write_text("x" * 9999)
    (folder / name).write_bytes(b"not a prefix, whatever it is called" * 9999)
    (folder / ".mine.kv.1.tmp").mkdir()
    (folder / "sub").mkdir()
    (folder / "sub" / name).write_bytes(Store.MAGIC * 9999)
    (folder / ("cd" * 32 + ".kv")).symlink_to(folder / "report.txt")
    (folder / ("ef" * 32 + ".kv")).mkdir()
    os.mkfifo(folder / ("12" * 32 + ".kv"))
    os.chdir(folder)  # the path of a socket is short
    socket.socket(socket.AF_UNIX).bind("34" * 32 + ".kv")
    os.chdir(ROOT)


@pytest.mark.parametrize("inside", [False, True], ids=["the folder that was named", "the store's own folder"])
def test_a_store_deletes_nothing_that_it_did_not_write(tmp_path: Path, inside: bool) -> None:
    """Whatever lies there, and however small the budget."""
    foreign_things(tmp_path / "llama_prefixes" if inside else tmp_path)
    before = {path: path.lstat() for path in tmp_path.rglob("*") if path.name != "llama_prefixes"}
    for prompt in (A, A[::-1], A[50:] + A[:50]):
        answer(cached_engine(tmp_path, 1), prompt)
    after = {path: path.lstat() for path in before}
    assert all(
        (after[path].st_size, after[path].st_mtime_ns) == (s.st_size, s.st_mtime_ns) for path, s in before.items()
    )


def test_what_a_killed_process_left_is_deleted_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "llama_prefixes"
    folder.mkdir()
    left = folder / f".{'ab' * 32}.kv.12345.tmp"
    left.write_bytes(Store.MAGIC)
    with terminal.replacing(folder / ("cd" * 32 + ".kv")) as living:
        living.write_bytes(Store.MAGIC)
        answer(cached_engine(tmp_path), A)
        assert living.exists()
        assert not left.exists()


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only")]
)
def test_a_store_that_cannot_be_written_costs_one_line(failure: OSError, tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(*_, **__) -> None:
        raise failure

    monkeypatch.setattr(terminal, "replacing", fail)
    (tmp_path / "llama_prefixes").mkdir()
    engine = cached_engine(tmp_path)
    for prompt in (A, A[:50], [3] * 60):
        assert answer(engine, prompt, 4)[0] == generated(new_engine(MODEL), prompt, 4, make_sampling(3, 0.8))
    assert capsys.readouterr().err.count("\n") == 1


CHILD = """
import os, sys
sys.path[:0] = ["tests", "."]
import torch
torch.set_num_threads(1)
from test_generate_prefill import *
folder, kind = Path(sys.argv[1]), sys.argv[2]
if kind == "killed":
    calls, replace = [], os.replace
    def killed(*names):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), 9)
        replace(*names)
    os.replace = killed
    answer(cached_engine(folder), A)
children = []
for i in range(10):
    if not (child := os.fork()):
        for j in range(6):
            prompt = A[: 20 + 7 * j] + [i, j % 3] * 30
            ids, ran, cached = answer(cached_engine(folder, 20 * FILE), prompt, 3)
            fresh = generated(new_engine(MODEL), prompt, 3, make_sampling(3, 0.8))
            if ids != fresh or ran + cached != len(prompt):
                os._exit(1)
        os._exit(0)
    children.append(child)
largest = 0
while children:
    done, status = os.waitpid(-1, os.WNOHANG)
    if done:
        children.remove(done)
        if status:
            sys.exit("a child failed")
    total = 0
    for entry in os.scandir(folder / "llama_prefixes") if (folder / "llama_prefixes").exists() else []:
        try:
            total += entry.stat().st_size if entry.is_file() else 0
        except FileNotFoundError:
            pass
    largest = max(largest, total)
print(largest / FILE)
"""


def child(folder: Path, kind: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", CHILD, folder, kind], cwd=ROOT, capture_output=True, text=True)


def test_after_a_kill_while_storing_the_next_run_is_right(tmp_path: Path) -> None:
    assert child(tmp_path, "killed").returncode == -9
    ids, _, cached = answer(cached_engine(tmp_path), A)
    assert ids == generated(new_engine(MODEL), A, 12, make_sampling(3, 0.8))
    assert cached == 48


@pytest.mark.parametrize("when", ["before its status is read", "before its content is read"])
def test_a_file_that_another_process_deletes_does_not_end_the_making_of_room(tmp_path, monkeypatch, when: str) -> None:
    answer(cached_engine(tmp_path), A)
    store, gone = Store(tmp_path, 2 * FILE), sorted(paths(tmp_path))[0]
    glob, read = Path.glob, Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path == gone:
            gone.unlink()
        return read(path)

    if when == "before its status is read":
        gone.unlink()
        monkeypatch.setattr(Path, "glob", lambda folder, pattern: [gone, *glob(folder, pattern)])
    else:
        os.utime(gone, ns=(0, 0))  # the last one in turn
        monkeypatch.setattr(Path, "read_bytes", read_bytes)
    store.trim()
    assert not gone.exists()
    assert len(paths(tmp_path)) == 2


def test_ten_processes_share_a_folder(tmp_path: Path) -> None:
    """Every text is right; the budget of 20 files is exceeded by what each process is writing at most."""
    done = child(tmp_path, "ten")
    assert done.returncode == 0, done.stderr
    assert 10 < float(done.stdout) <= 20 + 10 * 9  # an answer has up to 9 blocks
    assert len(paths(tmp_path)) <= 20


# ---- The command line


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """A function: flags -> (stdout, stderr, the tokens cached of each prompt)."""

    def run(*flags: object) -> tuple[str, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["generate_prefill.py", "--max_new_tokens", "8", *map(str, flags)])
        generate_prefill.main()
        out, err = capsys.readouterr()
        return out, err, re.findall(r"cached (\d+ of \d+)", err)

    return run


def test_the_next_run_finds_what_the_last_one_stored(demo: dict[str, Path], tmp_path: Path, run_main: Callable) -> None:
    flags = ["--checkpoint_path", demo["target"], "--cache_dir", tmp_path / "prefixes", "--precision", "float32"]
    first, err, cached = run_main(*flags)
    assert err.count(f"prefixes are stored in {tmp_path / 'prefixes' / 'llama_prefixes'}") == 1
    assert cached[0].startswith("0 of ")
    assert int(cached[1].split()[0]) > 100
    again, err, cached_again = run_main(*flags)
    assert "prefixes are stored" not in err
    assert again == first
    assert int(cached_again[0].split()[0]) > 100
    without, err, cached = run_main(*flags, "--no_cache")
    assert without == first
    assert cached[0].startswith("0 of ")


def test_what_comes_first_from_a_file_and_from_standard_input(demo, tmp_path: Path, run_main, monkeypatch) -> None:
    (tmp_path / "context.txt").write_text("def f(x):\n    return x")
    flags = ["--checkpoint_path", demo["target"], "--no_cache", "--prompt", "def g(", "--prompt", "class"]
    expected = run_main(*flags, "--system", "def f(x):\n    return x")[0]
    assert run_main(*flags, "--system", f"@{tmp_path / 'context.txt'}")[0] == expected
    with open(tmp_path / "context.txt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert run_main(*flags, "--system", "-")[0] == expected


def test_other_weights_precision_or_config_find_nothing(
    demo: dict[str, Path], tmp_path: Path, run_main: Callable
) -> None:
    """Under the same path: the file's own id decides, not its name."""
    path, folder = tmp_path / "model.pth", tmp_path / "prefixes"
    shutil.copyfile(demo["target"], path)
    flags = [
        "--checkpoint_path",
        path,
        "--cache_dir",
        folder,
        "--system",
        generate_prefill.SYSTEM,
        "--prompt",
        "def g(",
    ]
    run_main(*flags)
    assert not run_main(*flags)[2][0].startswith("0 of ")
    assert run_main(*flags, "--precision", "float32")[2][0].startswith("0 of ")
    content = torch.load(path, weights_only=True)
    for change in (
        {"config": content["config"] | {"rope_theta": 5000.0}},
        {"id": "another"},
        {"config": content["config"] | {"norm_eps": 1e-6}},
    ):
        torch.save(content | change, path)
        assert run_main(*flags)[2][0].startswith("0 of ")
    moved = tmp_path / "renamed.pth"
    torch.save(content, moved)
    assert not run_main("--checkpoint_path", moved, *flags[2:])[2][0].startswith("0 of ")


def test_speculation_and_samples_work_here_too(demo: dict[str, Path], tmp_path: Path, run_main: Callable) -> None:
    flags = ["--checkpoint_path", demo["target"], "--precision", "float32", "--prompt", "def g(", "--num_samples", 2]
    flags += ["--system", generate_prefill.SYSTEM]
    expected = run_main(*flags, "--no_cache")[0]
    for more in ([], ["--prompt_lookup"], ["--draft_checkpoint_path", demo["draft"]]):
        for _ in range(2):
            assert run_main(*flags, "--cache_dir", tmp_path / "prefixes", *more)[0] == expected


@pytest.mark.slow
def test_a_full_disk_or_an_impossible_folder_costs_one_line(demo: dict[str, Path], tmp_path: Path) -> None:
    command = f"{sys.executable} generate_prefill.py --checkpoint_path {demo['target']} --max_new_tokens 4"
    expected = subprocess.run(f"{command} --no_cache", shell=True, cwd=ROOT, capture_output=True, text=True)
    for trouble in (
        f"ulimit -f 8; {command} --cache_dir {tmp_path / 'full'}",
        f"{command} --cache_dir /dev/null/prefixes",
    ):
        done = subprocess.run(["bash", "-c", trouble], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, expected.stdout), done.stderr
        assert done.stderr.count("the prefix cache cannot be used") == 1
        assert len(done.stderr.splitlines()) <= len(expected.stderr.splitlines()) + 2
    assert not [path for path in (tmp_path / "full").rglob("*") if path.is_file()]
