"""Measures this project and its peers, in turn in one run, as shares of memory speed (benchmarks/memory.py).

    python -m benchmarks.benchmark --shapes 1.1b --rounds 5 --out results       # JSON, a table, a figure
    python -m benchmarks.benchmark --quick                                      # the demo checkpoint, under two minutes

Weights are random. Peers are measured if they are installed: pip install llama-cpp-python gguf transformers; the figure
needs matplotlib.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import utils

import torch

import tp
from benchmarks.ablation import ablation
from benchmarks.comparison import log, measure
from benchmarks.grow import SHAPES, shape_args
from benchmarks.model_files import DEMO, OURS, ROOT, is_installed, random_checkpoint
from benchmarks.report import draw, markdown
from checkpoint import DEVICES, read_checkpoint
from model import ModelArgs
from scripts.convert_hf_checkpoint import convert


def start_up(path: Path, device: str) -> dict[str, float]:
    """Seconds from the shell to the first byte of text, 16 tokens of prompt: not compiled, compiled cold and warm."""
    command = [sys.executable, "generate.py", "--checkpoint_path", str(path), "--device", device, "--ignore_eos"]
    command += ["--prompt", "a b c d e f g h i j k l m n o", "--max_new_tokens", "20"]
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        for name, flags in (("not compiled", []), ("compiled, cold", ["--compile"]), ("compiled, warm", ["--compile"])):
            start = time.perf_counter()
            with subprocess.Popen([*command, *flags], cwd=ROOT, env=environment, **pipes) as process:
                first = process.stdout.read(1)
                seconds[name] = time.perf_counter() - start
                process.stdout.read()
            if not first:
                raise RuntimeError(f"generate.py printed nothing: {' '.join([*command, *flags])}")
    return seconds


def machine(device: str) -> str:
    """The CPU and the GPU, and the version of torch."""
    lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    names = [f"{key} {fields[key]}" for key in ("model name", "cpu family", "model") if key in fields]
    gpu = [torch.cuda.get_device_name()] if device == "cuda" else []
    return ", ".join([*gpu, f"{tp.num_threads()} cores", *names, f"torch {torch.__version__}"])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    number = utils.number_between
    work = Path(tempfile.gettempdir()) / "llama-benchmark"
    add("--shapes", nargs="+", choices=SHAPES, default=["68m", "160m", "1.1b", "7b"], help="of random models")
    add("--rounds", type=number(1), default=5, help="in which each program is measured once (5)")
    add("--prompt", type=number(1), default=128, help="tokens of the prompt (128)")
    add("--tokens", type=number(2), default=64, help="tokens of the answer (64)")
    add("--contexts", type=number(1), nargs="+", default=[], help="longer prompts, for more lines in the table (none)")
    add("--device", choices=DEVICES, default="cpu", help="runs the models (cpu)")
    add("--march", default="", help="GCC's name of a CPU for which to compile our CPU kernels (this one)")
    add("--work", type=Path, default=work, help=f"folder for model files, which are kept ({work})")
    add("--out", type=Path, default=Path("benchmark"), help="folder for results.json, table.md, shares.png (benchmark)")
    add("--quick", action="store_true", help="the demo checkpoint alone, two rounds of 32 tokens")
    return parser


def model_shapes(options: argparse.Namespace) -> dict[str, ModelArgs]:
    """The shapes that are measured, by name."""
    if not options.quick:
        return {shape: shape_args(shape) for shape in options.shapes}
    folder = options.work / "demo"
    shutil.copytree(DEMO, folder, dirs_exist_ok=True)
    return {"demo": read_checkpoint(convert(folder, "bfloat16")).args}


def main() -> None:
    options = build_parser().parse_args()
    if options.quick:
        options.rounds, options.tokens = 2, 32
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    report = {"machine": machine(options.device), "date": time.strftime("%Y-%m-%d"), "march": options.march}
    report["results"] = results
    for shape, args in model_shapes(options).items():
        folder = options.work / shape
        results.append(measure(shape, args, folder, options))
        if shape in ("demo", "1.1b"):
            path = random_checkpoint(args, folder, OURS["bf16" if shape == "demo" else "int4 g32"])
            report["start-up"] = start_up(path, options.device)
            log(f"start-up: {', '.join(f'{name} {value:.1f} s' for name, value in report['start-up'].items())}")
        if shape == "1.1b" and options.device == "cpu":
            report["ablation"] = ablation(args, folder, options)
            log(f"speed without one mechanism each: {report['ablation']}")
        (options.out / "results.json").write_text(json.dumps(report, indent=1))
        (options.out / "table.md").write_text(markdown(results) + "\n")
    print(markdown(results))
    if is_installed("matplotlib"):
        draw(results, options.out / "shares.png")
    else:
        log("no figure: pip install matplotlib")


if __name__ == "__main__":
    utils.run(main)
