"""What a user can do wrong ends in one line on stderr that names cause and cure, and leaves no file half-written.

The cases are data: see bad_input_cases.py. A script is called in this process where that is the same as starting one,
for starting torch takes longer than all else; what needs a shell is run by one.
"""

import hashlib
import importlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import terminal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from bad_input_cases import CASES, CONTEXT, FULL, Case, config, tensors, write_tokenizer
from conftest import ROOT

from scripts.convert_hf_checkpoint import convert
from tokenizer import Tokenizer

SECONDS = 100  # a process that takes longer hangs
FIGURES = re.compile(
    r"(Load time|Compile time|Prompt tokens|Time to first token|Prefill|Decode|Weights read|Stopped|Peak memory): .*"
    r"|wrote .*|no answer yet|usage: .*| .*"  # the usage goes on in lines with a margin
)
HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
Outcome = tuple[int, bytes, str]  # exit status, stdout, stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its model.pth."""
    folder = tmp_path_factory.mktemp("base")
    write_tokenizer(folder)
    config()(folder)
    tensors()(folder)
    convert(folder, "bfloat16")
    assert len(Tokenizer((folder / "tokenizer.model").read_bytes()).encode(FULL)) == CONTEXT - 1
    return folder


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


def call(command: str, case: Case, patch: pytest.MonkeyPatch) -> Outcome:
    """Call the `main` of a Python script as its command line says."""
    script, *flags = shlex.split(command.replace("python -m ", "python "))[1:]
    module = importlib.import_module(script.removesuffix(".py"))
    stdout, stderr = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    patch.setattr(sys, "argv", [module.__file__, *flags])
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(case.stdin)))
    patch.setattr(sys, "stdout", stdout)
    patch.setattr(sys, "stderr", stderr)
    if case.interrupt:
        name, function = case.interrupt
        patch.setattr(function, lambda *_: signal.raise_signal(getattr(signal, name)))
    try:
        status = terminal.status_of(module.main)
    except SystemExit as end:
        status = end.code
    stdout.flush()
    return status, stdout.buffer.getvalue(), stderr.getvalue()


def start(command: str, case: Case, folder: Path) -> Outcome:
    """Run a command line in a shell, from the root of the repository."""
    ours = ("PYTHON", "HF_", "TORCH", "XDG_", "CXX", "OMP_", "CDPATH")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    mine = {"DIR": str(folder), "ROOT": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    mine |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    mine |= {"PYTHONDONTWRITEBYTECODE": "1"}  # Python 3.11 keeps what a full disk takes of a .pyc, and breaks over it
    mine |= {"TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "cache")}
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=inherited | mine, input=case.stdin, capture_output=True, timeout=SECONDS
    )
    return done.returncode % 256 if done.returncode >= 0 else 128 - done.returncode, done.stdout, done.stderr.decode()


def content(folder: Path) -> dict[str, str]:
    """What is in a folder: SHA-256 of each file by its name, in which PID stands for a number of a process."""
    files = {re.sub(r"[.]\d+[.]tmp$", ".PID.tmp", str(path.relative_to(folder))): path for path in folder.rglob("*")}
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "directory" for n, p in files.items()}


def contains(text: str, says: str) -> bool:
    return re.search(".*".join(map(re.escape, says.split(" ... "))), text, re.DOTALL) is not None


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")  # terminal.py ignores all in a whole process
@pytest.mark.parametrize("case", [pytest.param(case, id=name, marks=case.marks) for name, case in CASES.items()])
def test_what_a_user_can_do(
    case: Case, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: None
) -> None:
    """The status; one line or none beside the figures; nothing on stdout where it fails; every other file as it was."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    case.spoil(folder)
    before = content(folder)

    def run(command: str) -> Outcome:
        if re.fullmatch(r"python [^<>|;&=(]*", command):
            return call(command.replace("$DIR", str(folder)), case, monkeypatch)
        return start(command, case, folder)

    status, stdout, stderr = run(case.command)
    lines = [line for line in stderr.splitlines() if not FIGURES.fullmatch(line)]
    after = content(folder)
    print(f"MSG {status} {lines}", file=open("/tmp/msgs", "a"))
    assert status == case.status, stderr
    assert len(lines) == bool(case.says), stderr
    assert contains("".join(lines), case.says), stderr
    assert contains(stderr, case.shows), stderr
    assert status == 0 or stdout == b""
    assert {name for name in before | after if before.get(name) != after.get(name)} == set(case.writes)
    assert case.left(folder)
    if case.same_as:
        assert stdout == run(case.same_as)[1] != b""
