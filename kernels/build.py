"""Compile cpu.cpp for this CPU, and keep the shared library in the user's cache folder."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from scripts import files

FOLDER = Path(__file__).parent  # has cpu.cpp and its headers
CPUINFO = Path("/proc/cpuinfo")
FLAGS = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-pthread", "-shared", "-fPIC", "-w"]
EXTRA_FLAGS: list[str] = []


def library_path(command: list[str]) -> Path:
    """The kept library. Its name depends on source, compiler, flags and CPU, because several hosts may share a home."""
    features = [line for line in CPUINFO.read_text().splitlines() if line.startswith(("flags", "Features"))]
    sources = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]*")))
    key = hashlib.sha256(sources + f"{command} {features[:1]}".encode()).hexdigest()
    home = os.environ.get("HOME") or os.devnull
    folder = Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache")
    return folder / "llama_cpu_kernels" / f"cpu-{key[:24]}.so"


def compile_library(command: list[str], path: Path) -> None:
    """Run the compiler. OSError with the last line that it prints if it fails."""
    done = subprocess.run([*command, FOLDER / "cpu.cpp", "-o", path], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        raise OSError(lines[-1])


def keep(library: Path, path: Path) -> None:
    """Copy a compiled library to `path`, for later runs; an error costs one line."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with files.atomic_write(path) as temporary:
            shutil.copyfile(library, temporary)
    except OSError as error:
        print(f"CPU kernels are compiled for this run only: {error}: set XDG_CACHE_HOME to a folder", file=sys.stderr)


@cache
def load_library() -> ctypes.CDLL | None:
    """The kernels; None, with a line on stderr that says why, if they cannot be compiled or loaded."""
    compiler = os.environ.get("CXX") or "g++"  # a command line, as for make: "ccache g++"
    try:
        command = [*shlex.split(compiler), *FLAGS, *EXTRA_FLAGS]
        path = library_path(command)
        if path.exists():
            with suppress(OSError):
                return ctypes.CDLL(str(path))
            print(f"CPU kernels are compiled again, because {path} does not load", file=sys.stderr)
        print("compiling the CPU kernels, once: some 10 s", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "cpu.so"
            compile_library(command, library)
            keep(library, path)
            return ctypes.CDLL(str(library))
    except (OSError, ValueError) as error:  # ValueError: an unbalanced quote in CXX
        slower = f"no CPU kernels, so decoding is several times slower: {compiler}: {error}"
        print(f"{slower}: CXX names a C++ compiler, GCC 11 or later", file=sys.stderr)
        return None
