"""The scripts in a copy of the repository without kernels/: the text in float32 is the same, decoding is slower."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from checkpoint import read_checkpoint

DEMO = ["generate.py", "--compile", "--prompt", "def read_file("]  # the command of scripts/demo.sh
FLAGS = ["--precision", "float32", "--device", "cpu", "--max_new_tokens", "8", "--ignore_eos"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files of the repository, without kernels/ and without the demo's weights."""
    folder = tmp_path_factory.mktemp("copy")
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split():
        if (ROOT / name).exists() and not name.startswith(("kernels/", "tests/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(params=["nothing", pytest.param("a package of that name", marks=pytest.mark.slow)])
def decoy(request, tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing else is named kernels, or a package that must not be imported."""
    if request.param == "nothing":
        return {}
    package = tmp_path / "packages" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('this package of another project was imported')")
    return {"PYTHONPATH": str(package.parent)}


def run_in(folder: Path, *words: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a script in a copy of the repository: its name, then its flags."""
    command = [sys.executable, *map(str, words)]
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    done = subprocess.run(command, cwd=folder, env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def check(copy: Path, decoy: dict[str, str], *words: object) -> str:
    """Assert that a script prints the same text in both folders, and one line more on stderr without kernels/."""
    usual, without = run_in(ROOT, *words, *FLAGS), run_in(copy, *words, *FLAGS, **decoy)
    assert without.stdout == usual.stdout != ""
    (line,) = [line for line in without.stderr.splitlines() if "kernels" in line]
    assert "kernels/" in line and "slower" in line
    assert len(without.stderr.splitlines()) == len(usual.stderr.splitlines()) + 1
    return without.stdout


def test_the_demo(demo: dict[str, Path], copy: Path, decoy: dict[str, str]) -> None:
    check(copy, decoy, *DEMO, "--checkpoint_path", demo["target"])


@pytest.mark.slow
def test_prompts_that_share_a_prefix(demo: dict[str, Path], copy: Path, decoy: dict[str, str]) -> None:
    """The default prompts, without files of prefixes."""
    check(copy, decoy, "generate_prefill.py", "--checkpoint_path", demo["target"], "--no_cache")


@pytest.mark.slow
def test_prefixes_are_kept_in_files(demo: dict[str, Path], copy: Path, tmp_path: Path) -> None:
    """The second run finds the prefix of the first one, and prints the same text."""
    flags = ["--checkpoint_path", demo["target"], "--cache_dir", tmp_path, *FLAGS]
    first, second = (run_in(copy, "generate_prefill.py", *flags) for _ in range(2))
    assert first.stdout == second.stdout != ""
    assert "cached 0 of" in first.stderr and "cached 0 of" not in second.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantizing(demo: dict[str, Path], copy: Path, decoy: dict[str, str], mode: str, tmp_path: Path) -> None:
    """Equal weights in both folders, from which the same text is generated."""
    state_dicts = []
    for folder, environment in ((ROOT, {}), (copy, decoy)):
        original = tmp_path / folder.name / "model.pth"
        original.parent.mkdir()
        shutil.copy(demo["target"], original)
        done = run_in(folder, "quantize.py", "--checkpoint_path", original, "--mode", mode, **environment)
        assert done.stdout == ""
        (path,) = original.parent.glob("model_*.pth")
        state_dicts.append(read_checkpoint(path).state_dict)
    for name, tensor in state_dicts[0].items():
        assert torch.equal(tensor, state_dicts[1][name]), name
    check(copy, decoy, *DEMO, "--checkpoint_path", path)


@pytest.mark.slow
def test_speculation(demo: dict[str, Path], copy: Path) -> None:
    """The text of plain decoding, with a draft and prompt lookup."""
    plain = [*DEMO, "--checkpoint_path", demo["target"]]
    guesses = ["--draft_checkpoint_path", demo["draft"], "--prompt_lookup"]
    assert check(copy, {}, *plain, *guesses) == run_in(copy, *plain, *FLAGS).stdout


@pytest.mark.slow
def test_the_default_number_of_threads(demo: dict[str, Path], copy: Path) -> None:
    """The CPUs that affinity allows, and no more than the quota of the container does."""
    code = """
import os, sys, generate, torch, tp
os.sched_getaffinity = lambda pid: set(range(10_000, 10_005))
for quota in (float("inf"), 3.5):
    tp.cgroup_cpus = lambda: quota
    generate.main()
    print("threads:", torch.get_num_threads(), file=sys.stderr)
"""
    flags = ["--checkpoint_path", demo["draft"], *FLAGS]
    for folder in (ROOT, copy):
        lines = run_in(folder, "-c", code, *flags).stderr.splitlines()
        assert [line for line in lines if line.startswith("threads:")] == ["threads: 5", "threads: 3"]
