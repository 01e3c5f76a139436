"""Decoding with one mechanism of kernels/ switched off: how much each of them gains on a CPU."""

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.model_files import OURS, random_checkpoint
from benchmarks.worker import Worker
from kernels import build, cpu
from model import ModelArgs

MECHANISMS = ("products", "attention", "prefetch", "replay", "threads")
LABELS = ("bf16", "int4 g32")
REPLAY = "    static long workers = 0;\n"  # the first line of `replay` in C++
EXECUTE = "    for (long i = 0; i < count; i++) execute(calls + i);\n    return;\n"


def rebuild(old: str, new: str) -> None:
    """Compile and load cpu.cpp and its headers with `new` in place of `old`."""
    sources = {path.name: path.read_text() for path in build.FOLDER.glob("*.[ch]*")}
    if not any(old in source for source in sources.values()):
        raise ValueError(f"kernels/ no longer has {old!r}")
    with tempfile.TemporaryDirectory() as folder:
        build.FOLDER = Path(folder)
        for name, source in sources.items():
            (build.FOLDER / name).write_text(source.replace(old, new))
        build.load_library.cache_clear()
        build.load_library()


def switch_off(mechanism: str) -> None:
    """Replace one of MECHANISMS by PyTorch's operators, or by nothing, before any kernel is used."""
    if mechanism == "products":
        cpu.GROUPSIZES = ()
    elif mechanism == "attention":
        cpu.MAX_HEAD_DIM = 0
    elif mechanism == "prefetch":
        rebuild("PREFETCH_BYTES = 4096", "PREFETCH_BYTES = 0")
    elif mechanism == "replay":
        cpu.CpuGraph.NO_COMPUTE = ()  # every step has a view, so none is replayable
    elif mechanism == "threads":
        rebuild(REPLAY, EXECUTE + REPLAY)
    else:
        raise ValueError(f"{mechanism}: choose one of {', '.join(MECHANISMS)}")


def ablation(args: ModelArgs, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Decoding speed without each mechanism over that with all, by label of the weights: medians of three rounds."""
    ratios: dict[str, dict[str, float]] = {f"no {name}": {} for name in MECHANISMS}
    for label in LABELS:
        common = {"path": str(random_checkpoint(args, folder, OURS[label])), "device": "cpu", "march": options.march}
        positions = options.prompt + 16
        workers = {name: Worker("ours", positions=positions, without=name, **common) for name in ("", *MECHANISMS)}
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(min(options.rounds, 3) + 1):
            for name, worker in workers.items():  # 8 tokens, because int4 by PyTorch takes seconds for each
                seconds[name].append(worker.ask("answer", options.prompt, 8)["decode"])
        for name in MECHANISMS:
            pairs = list(zip(seconds[""], seconds[name], strict=True))[1:]  # the first round touches the weights
            ratios[f"no {name}"][label] = statistics.median(with_all / without for with_all, without in pairs)
        for worker in workers.values():
            worker.close()
    return ratios
