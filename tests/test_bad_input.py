"""A mistake of a user ends in one line on stderr that names the cause and the fix, and leaves no file half-written.

The cases are data: see bad_input_cases.py. Most scripts are called in this process, because starting torch takes longer
than all else; a command that needs a shell is run by one, two at a time.
"""

import hashlib
import importlib
import io
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import utils

import pytest
import torch
from bad_input_cases import CASES, CONTEXT, FULL, Case, config, tensors, write_tokenizer
from conftest import ROOT

from scripts.convert_hf_checkpoint import convert
from scripts.convert_tokenizer import sentencepiece_tokenizer

SECONDS = 100  # a process that takes longer hangs
CALLED = re.compile(r"python [^<>|;&=(]*")  # a command that needs no shell
FIGURES = re.compile(
    r"(Memory|Load time|Prompt tokens|Time to first token|Prefill|Decode|Weights read|Stopped): .*"
    r"|compiling the CPU kernels, once: .*|reading .*|wrote .*|no answer yet"
    r"|usage: .*| {7}.*"  # the usage goes on in lines with a margin
)
HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
Ended = tuple[int, bytes, str]  # exit status, stdout, stderr


@dataclass
class Outcome:
    folder: Path
    before: dict[str, str]  # files of the folder, by name
    after: dict[str, str]
    status: int
    stdout: bytes
    stderr: str


def call(command: str, case: Case, folder: Path, patch: pytest.MonkeyPatch) -> Ended:
    """Call the `main` of a Python script as its command line says."""
    script, *flags = shlex.split(command.replace("python -m ", "python ").replace("$DIR", str(folder)))[1:]
    module = importlib.import_module(script.removesuffix(".py"))
    stdout, stderr = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    patch.setattr(sys, "argv", [module.__file__, *flags])
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(case.stdin)))
    patch.setattr(sys, "stdout", stdout)
    patch.setattr(sys, "stderr", stderr)
    if case.interrupt:
        name, function = case.interrupt
        original = pkgutil.resolve_name(function)

        def interrupted(*_) -> None:
            patch.setattr(function, original)  # the signal comes once
            signal.raise_signal(getattr(signal, name))

        patch.setattr(function, interrupted)
    try:
        utils.run(module.main)
    except SystemExit as end:
        status = end.code
    stdout.flush()
    return status, stdout.buffer.getvalue(), stderr.getvalue()


def start(command: str, case: Case, folder: Path) -> Ended:
    """Run a command line in a shell, from the root of the repository."""
    unwanted = ("PYTHON", "HF_", "TORCH", "XDG_", "CXX", "OMP_", "CDPATH")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    mine = {"DIR": str(folder), "ROOT": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    mine |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    mine |= {"PYTHONDONTWRITEBYTECODE": "1"}  # on a full disk, Python 3.11 keeps half of a .pyc, and fails over it
    mine |= {"TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "cache")}
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=inherited | mine, input=case.stdin, capture_output=True, timeout=SECONDS
    )
    return done.returncode, done.stdout, done.stderr.decode()


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder by its name, in which NUMBER stands for the number of a temporary file."""
    files = {re.sub(r"[.]\d+[.]tmp$", ".NUMBER.tmp", str(path.relative_to(folder))): path for path in folder.rglob("*")}
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "directory" for n, p in files.items()}


def observe(case: Case, base: Path, place: Path, run: Callable[[str, Case, Path], Ended]) -> Outcome:
    """Spoil a copy of `base` in `place` and run the case's command."""
    folder = place / "model"
    shutil.copytree(base, folder)
    case.spoil(folder)
    before = content(folder)
    ended = run(case.command, case, folder)
    return Outcome(folder, before, content(folder), *ended)


def contains(text: str, says: str) -> bool:
    return re.search(".*".join(map(re.escape, says.split(" ... "))), text, re.DOTALL) is not None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its model.pth."""
    folder = tmp_path_factory.mktemp("base")
    write_tokenizer(folder)
    config()(folder)
    tensors()(folder)
    convert(folder, "bfloat16")
    assert len(sentencepiece_tokenizer((folder / "tokenizer.model").read_bytes()).encode(FULL)) == CONTEXT - 1
    return folder


@pytest.fixture(scope="module")
def started(
    base: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[Outcome]]]:
    """The outcomes of the selected cases that need a shell; they run beside the others."""
    selected = [item.callspec.params["name"] for item in request.session.items if item.path == Path(__file__)]
    names = [name for name in selected if not CALLED.fullmatch(CASES[name].command)]
    with ThreadPoolExecutor(2) as pool:
        yield {n: pool.submit(observe, CASES[n], base, tmp_path_factory.mktemp("case"), start) for n in names}
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as a script expects it, and as it was afterwards: signal handlers, descriptor 1, one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    handlers = {number: signal.signal(number, handler) for number, handler in HANDLERS.items()}
    stdout = os.dup(1)
    yield
    os.dup2(stdout, 1)
    os.close(stdout)
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def marks(case: Case) -> tuple:
    """Those of a case; one that needs a shell, and so starts a process, is slow."""
    return case.marks if CALLED.fullmatch(case.command) else (*case.marks, pytest.mark.slow)


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")  # utils.py ignores all in a whole process
@pytest.mark.parametrize("name", [pytest.param(name, id=name, marks=marks(case)) for name, case in CASES.items()])
def test_bad_input(
    name: str, base: Path, started: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: None
) -> None:
    """The status; one line or none beside the figures; nothing on stdout where it fails; every other file as it was."""
    case, run = CASES[name], partial(call, patch=monkeypatch)
    outcome = started[name].result() if name in started else observe(case, base, tmp_path, run)
    before, after, stderr = outcome.before, outcome.after, outcome.stderr
    lines = [line for line in stderr.splitlines() if not FIGURES.fullmatch(line)]
    assert outcome.status == case.status, stderr
    assert len(lines) == bool(case.says), stderr
    assert contains("".join(lines), case.says), stderr
    assert contains(stderr, case.shows), stderr
    assert outcome.status == 0 or outcome.stdout == b""
    assert {file for file in before | after if before.get(file) != after.get(file)} == set(case.writes)
    assert case.left(outcome.folder)
    if case.same_as:
        assert outcome.stdout == run(case.same_as, case, outcome.folder)[1] != b""
