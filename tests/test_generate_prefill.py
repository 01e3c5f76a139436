"""Prefix caching: the same text, nothing computed twice, and no file that can do harm."""

import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, generated, make_params, new_engine, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import generate_prefill
from checkpoint import load_model, read_checkpoint
from generate import Engine
from generate_prefill import BLOCK_SIZE, PrefixCache
from model import ModelArgs, Transformer
from sampling import SamplingParams
from scripts.files import atomic_write
from speculation import PromptLookup, Speculation

ARGS = ModelArgs(32, 2, 4, 2, 8, 48, 97, 1e-5, 10000.0, 1.0, 256)
GB = 10**9
A = [1 + i * 7 % 90 for i in range(100)]


MODEL = random_model(ARGS)
CHECKSUM = 32  # bytes of a SHA-256
BLOCK_BYTES = ARGS.n_layer * 2 * ARGS.n_kv_head * BLOCK_SIZE * ARGS.head_dim * 4
FILE = len(PrefixCache.MAGIC) + CHECKSUM + BLOCK_BYTES


def cached_engine(
    folder: Path, max_bytes: int = GB, model: Transformer = MODEL, checkpoint_id: str = "target"
) -> Engine:
    checkpoint = SimpleNamespace(args=model.args, header={"id": checkpoint_id, "quantization": None})
    return Engine(model, model.args.max_seq_length, checkpoint, PrefixCache(folder, max_bytes))


def answer(engine: Engine, prompt: list[int], count: int = 12, speculation: Speculation | None = None) -> tuple:
    """The ids that follow, the number of the prompt's tokens that ran, and of those cached."""
    rows = []

    def forward(ids: list[int], params: SamplingParams) -> list[int]:
        rows.append(len(ids))
        return type(engine).forward(engine, ids, params)

    engine.forward = forward
    ids = generated(engine, prompt, count, make_params(3, 0.8), speculation=speculation)
    return ids, sum(rows) - (count - 1), engine.num_cached


def fresh(prompt: list[int], count: int = 12) -> list[int]:
    """The ids that follow, from an engine without a prefix cache."""
    return generated(new_engine(MODEL), prompt, count, make_params(3, 0.8))


def blocks(engine: Engine, ids: list[int]) -> list[Path]:
    """The file of each block of `ids`."""
    return [path for _, path, _ in engine.prefix_cache.blocks(engine, ids)]


def test_saved_blocks_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn of a conversation costs its own blocks; one that another process has deleted is written again."""
    engine, reads = cached_engine(tmp_path), []
    answer(engine, A[:80])
    monkeypatch.setattr(PrefixCache, "load_block", lambda self, path, part: reads.append(path))
    answer(engine, A)
    paths(tmp_path)[0].unlink()
    answer(engine, A)
    assert reads == []
    monkeypatch.undo()
    assert answer(cached_engine(tmp_path), A)[2] == 96


def paths(folder: Path) -> list[Path]:
    """The files that a PrefixCache keeps in `folder`."""
    return sorted((folder / "llama_prefixes").iterdir())


def files(folder: Path) -> set[str]:
    return {path.name for path in paths(folder)}


CASES = {  # a prompt after A, and the number of its tokens on disk (A and 12 more: 111 positions, 6 blocks)
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
    "the saved one is longer": (A[:40], 32),
    "short": (A[:16], 0),
    "one token": ([1], 0),
    "other order": (A[::-1], 0),
}


@pytest.mark.parametrize("name", CASES)
def test_text_and_work_after_a_restart(name: str, tmp_path: Path) -> None:
    """The text is that without a cache; exactly the tokens that are not cached run, at least one."""
    answer(cached_engine(tmp_path), A)
    prompt, saved = CASES[name]
    ids, ran, cached = answer(cached_engine(tmp_path), prompt)
    assert ids == fresh(prompt)
    assert (ran, cached) == (len(prompt) - saved, saved)


def test_in_one_process_cached_tokens_need_no_file(tmp_path: Path) -> None:
    """To the token, not to the block; files go on where it ends."""
    engine = cached_engine(tmp_path)
    answer(engine, A)
    other = A[:37] + [50] * 30
    assert answer(engine, other)[2] == 37
    assert answer(engine, A)[2] == 96  # 37 from the KV cache, the rest from disk
    assert answer(engine, A)[2] == 99


def test_branches_share_their_prefix_and_an_extension_saves_only_its_own_part(tmp_path: Path) -> None:
    sizes = []
    for prompt in (A, A + [3] * 40, A[:64] + [9] * 40, A):
        assert answer(cached_engine(tmp_path), prompt)[0] == fresh(prompt)
        sizes.append(len(files(tmp_path)))
    first = (len(A) + 11) // BLOCK_SIZE
    assert sizes[0] == first
    assert (
        sizes[1] == first + (len(A) + 40 + 11) // BLOCK_SIZE - len(A) // BLOCK_SIZE
    )  # after A, its answer goes on otherwise
    assert sizes[2] == sizes[1] + (64 + 40 + 11) // BLOCK_SIZE - 64 // BLOCK_SIZE
    assert sizes[3] == sizes[2]


def test_the_least_recently_used_goes_first_and_leaves_before_parents(tmp_path: Path) -> None:
    answer(cached_engine(tmp_path, 12 * FILE), A, 2)  # 6 blocks
    for i in range(4):  # others come and go, A is used in between
        answer(cached_engine(tmp_path, 12 * FILE), [60 + i] + A[1:40], 2)
        assert answer(cached_engine(tmp_path, 12 * FILE), A, 2)[2] == 96
        assert sum(path.stat().st_size for path in paths(tmp_path)) <= 12 * FILE
    assert answer(cached_engine(tmp_path, 12 * FILE), [60] + A[1:40], 2)[2] == 0  # the oldest of the others
    crowded = cached_engine(tmp_path, 4 * FILE)
    assert answer(crowded, [77] + A[1:100], 2)[0] == fresh([77] + A[1:100], 2)
    assert len(files(tmp_path)) <= 4


def test_of_one_chain_the_last_block_goes_first(tmp_path: Path) -> None:
    """A block is useless without the ones before it: half of the bytes keep the first half."""
    engine = cached_engine(tmp_path)
    answer(engine, A, 2)
    chain = blocks(engine, A)
    times = [path.stat().st_mtime_ns for path in chain]
    assert times == sorted(times, reverse=True) and len(set(times)) == len(times) == 6
    answer(cached_engine(tmp_path, 3 * FILE), A, 2)
    assert paths(tmp_path) == sorted(chain[:3])
    assert answer(cached_engine(tmp_path), A, 2)[2] == 48


segments = st.lists(st.integers(0, 2), min_size=1, max_size=3)
prompts = st.lists(st.tuples(segments, st.integers(1, 40), st.booleans()), min_size=1, max_size=7)


@settings(max_examples=40, deadline=None)
@given(prompts, st.sampled_from([1000, 9, 3]))
def test_any_sequence_of_prompts_gives_the_text_of_fresh_computation(sequence: list[tuple], max_files: int) -> None:
    """Prompts of repeated segments that branch anywhere, restarts, and a cache of few blocks."""
    folder = Path(tempfile.mkdtemp())
    try:
        engine = cached_engine(folder, max_files * FILE)
        for parts, length, restart in sequence:
            prompt = [1, *(token for part in parts for token in [part + 2, 5, 7 * part + 1] * length)][:200]
            if restart:
                engine = cached_engine(folder, max_files * FILE)
            ids, ran, cached = answer(engine, prompt, 4)
            assert ran == len(prompt) - cached
            assert ids == fresh(prompt, 4)
            assert len(list(folder.glob("*/*"))) <= max_files
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
    """A draft has files of its own, under its own id; rejected guesses are in no file."""
    model, prompt = quantized[weights], A + A[:30]
    expected = generated(new_engine(model), prompt, 40, make_params(3, 0.8))
    small = load_model(read_checkpoint(demo["draft"]), "cpu", torch.float32)
    for restarted in (False, True):
        engine, draft = cached_engine(tmp_path, model=model), cached_engine(tmp_path, GB, small, "draft")
        sources = {"none": None, "lookup": Speculation(None, 7, PromptLookup()), "draft": Speculation(draft, 7)}
        speculation = sources[guesses]
        ids, _, cached = answer(engine, prompt, 40, speculation)
        assert ids == expected
        assert cached == restarted * 128
        assert guesses != "draft" or draft.num_cached > 0
        assert speculation is None or speculation.num_drafted > 0
    chains = [blocks(each, (prompt + ids)[:-1]) for each in (engine, draft)]
    assert set(paths(tmp_path)) <= {path for chain in chains for path in chain}
    assert guesses != "draft" or chains[1][0].exists()


@pytest.mark.slow
def test_text_when_compiled(quantized: dict, tmp_path: Path) -> None:
    model = quantized["float32"]
    expected = generated(new_engine(model), A, 30, make_params(3, 0.8))
    answer(cached_engine(tmp_path, model=model), A, 30)
    engine = cached_engine(tmp_path, model=model)
    engine.compile(True, True, make_params(3, 0.8))
    speculation = Speculation(None, 5, PromptLookup())
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


def test_a_damaged_file_is_not_used_costs_one_line_and_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A bit flipped or the file cut anywhere: the blocks before it still serve."""
    answer(cached_engine(tmp_path), A, 2)
    path, expected = blocks(cached_engine(tmp_path), A)[2], fresh(A, 2)
    whole = path.read_bytes()
    for name, damage in damages(len(whole)):
        path.write_bytes(damage(whole))
        capsys.readouterr()
        ids, ran, cached = answer(cached_engine(tmp_path), A, 2)
        assert (ids, ran, cached) == (expected, 100 - 32, 32), name
        assert capsys.readouterr().err.count("\n") == 1
        assert path.read_bytes() == whole
        assert answer(cached_engine(tmp_path), A, 2)[2] == 96


def test_a_file_under_another_name_is_not_used(tmp_path: Path) -> None:
    answer(cached_engine(tmp_path), A, 2)
    chain = blocks(cached_engine(tmp_path), A)
    shutil.copyfile(chain[1], chain[3])
    ids, _, cached = answer(cached_engine(tmp_path), A, 2)
    assert (ids, cached) == (fresh(A, 2), 48)


def test_files_of_another_version_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other sources may round keys and values otherwise."""
    answer(cached_engine(tmp_path), A, 2)
    monkeypatch.setattr(generate_prefill, "CODE", "of another version")
    ids, _, cached = answer(cached_engine(tmp_path), A, 2)
    assert (ids, cached) == (fresh(A, 2), 0)


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_foreign_thing_under_the_name_of_a_block_is_not_used(kind: str, tmp_path: Path, capsys) -> None:
    """The text is right, at the cost of one line; a link's target and a folder stay as they are."""
    answer(cached_engine(tmp_path), A, 2)
    path, theirs = blocks(cached_engine(tmp_path), A)[2], tmp_path / "report.txt"
    path.unlink()
    theirs.write_text("important" * 999)
    if kind == "file":
        shutil.copyfile(theirs, path)
    elif kind == "link":
        path.symlink_to(theirs)
    else:
        path.mkdir()
        theirs = theirs.rename(path / "report.txt")
    capsys.readouterr()
    ids, _, cached = answer(cached_engine(tmp_path, 1), A, 2)
    assert (ids, cached) == (fresh(A, 2), 32)
    assert capsys.readouterr().err.count("\n") == 1
    assert theirs.read_text() == "important" * 999


def test_only_the_user_may_read_the_files(tmp_path: Path) -> None:
    answer(cached_engine(tmp_path / "new"), A, 2)
    assert (tmp_path / "new" / "llama_prefixes").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in paths(tmp_path / "new")} == {0o600}


def foreign_things(folder: Path) -> None:
    """Old files, links, folders, a socket, a pipe of another program; some have names like the files of a cache."""
    name = "ab" * 32 + ".kv"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.txt").write_text("important" * 9999)
    (folder / "model.pth").write_bytes(b"weights" * 9999)
    (folder / ".hidden").write_text("x" * 9999)
    (folder / name).write_bytes(b"not a prefix, whatever it is called" * 9999)
    (folder / ".mine.kv.1.tmp").mkdir()
    (folder / "sub").mkdir()
    (folder / "sub" / name).write_bytes(PrefixCache.MAGIC * 9999)
    (folder / ("cd" * 32 + ".kv")).symlink_to(folder / "report.txt")
    (folder / ("ef" * 32 + ".kv")).mkdir()
    os.mkfifo(folder / ("12" * 32 + ".kv"))
    os.chdir(folder)  # the path of a socket is short
    socket.socket(socket.AF_UNIX).bind("34" * 32 + ".kv")
    os.chdir(ROOT)
    for path in folder.iterdir():
        os.utime(path, (0, 0), follow_symlinks=False)


@pytest.mark.parametrize("inside", [False, True], ids=["in --cache_dir", "in llama_prefixes"])
def test_nothing_of_another_program_is_deleted(tmp_path: Path, inside: bool) -> None:
    """Even if only one byte may be used."""
    foreign_things(tmp_path / "llama_prefixes" if inside else tmp_path)
    before = {path: path.lstat() for path in tmp_path.rglob("*") if path.name != "llama_prefixes"}
    for prompt in (A, A[::-1], A[50:] + A[:50]):
        assert answer(cached_engine(tmp_path, 1), prompt)[0] == fresh(prompt)
    after = {path: path.lstat() for path in before}
    assert all(
        (after[path].st_size, after[path].st_mtime_ns) == (s.st_size, s.st_mtime_ns) for path, s in before.items()
    )


def test_temporary_files_of_killed_processes_are_deleted_when_a_day_old(tmp_path: Path) -> None:
    """Until then a process may still write them."""
    folder, hour = tmp_path / "llama_prefixes", 3600
    folder.mkdir()
    for age in (0, 23 * hour, 25 * hour, 99 * 24 * hour):
        path = folder / f".{'ab' * 32}.kv.{age}.tmp"
        path.write_bytes(PrefixCache.MAGIC)
        os.utime(path, (time.time() - age, time.time() - age))
    with atomic_write(folder / ("cd" * 32 + ".kv")) as writing:
        answer(cached_engine(tmp_path), A)
        left = {path.name for path in folder.glob(".*")} - {writing.name}
        assert writing.exists()
    assert left == {f".{'ab' * 32}.kv.{age}.tmp" for age in (0, 23 * hour)}


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only")]
)
def test_a_folder_that_cannot_be_written_costs_one_line(failure: OSError, tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(*_, **__) -> None:
        raise failure

    monkeypatch.setattr("scripts.files.atomic_write", fail)
    (tmp_path / "llama_prefixes").mkdir()
    engine = cached_engine(tmp_path)
    for prompt in (A, A[:50], [3] * 60):
        assert answer(engine, prompt, 4)[0] == fresh(prompt, 4)
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
            if ids != fresh(prompt, 3) or ran + cached != len(prompt):
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


@pytest.mark.slow
def test_after_a_kill_while_saving_the_next_run_is_right(tmp_path: Path) -> None:
    assert child(tmp_path, "killed").returncode == -9
    ids, _, cached = answer(cached_engine(tmp_path), A)
    assert ids == fresh(A)
    assert cached == 48


@pytest.mark.parametrize("when", ["before its status is read", "before its content is read"])
def test_a_file_that_another_process_deletes_does_not_end_eviction(tmp_path, monkeypatch, when: str) -> None:
    answer(cached_engine(tmp_path), A)
    cache, gone = PrefixCache(tmp_path, 2 * FILE), paths(tmp_path)[0]
    glob, read = Path.glob, Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path == gone:
            gone.unlink()
        return read(path)

    if when == "before its status is read":
        gone.unlink()
        monkeypatch.setattr(Path, "glob", lambda folder, pattern: [gone, *glob(folder, pattern)])
    else:
        os.utime(gone, ns=(0, 0))  # the least recently used
        monkeypatch.setattr(Path, "read_bytes", read_bytes)
    cache.evict()
    assert not gone.exists()
    assert len(paths(tmp_path)) == 2


@pytest.mark.slow
def test_ten_processes_share_a_folder(tmp_path: Path) -> None:
    """Every text is right; the limit of 20 files is exceeded by the files that each process is writing at most."""
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


def test_the_next_run_finds_the_files_of_the_last_one(
    demo: dict[str, Path], tmp_path: Path, run_main: Callable
) -> None:
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


def test_the_system_text_from_a_file_and_from_standard_input(demo, tmp_path: Path, run_main, monkeypatch) -> None:
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
    """Under the same path: the id in the checkpoint decides, not its name."""
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
