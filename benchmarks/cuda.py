"""Figures of one GPU, with random models that are made on the device, so there is nothing to load.

    python -m benchmarks.cuda                     # all parts, each in a process of its own: a line of JSON each
    python -m benchmarks.cuda captured 7b int8    # one part

All parts together take at most ten minutes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product

import utils

import torch

from benchmarks import cuda_decode, cuda_products
from benchmarks.model_files import ROOT

FUNCTIONS = [
    *(cuda_decode.captured, cuda_decode.compiled, cuda_decode.plain, cuda_decode.capacity),
    *(cuda_decode.prompt, cuda_decode.draft, cuda_decode.transformers),
    *(cuda_products.products, cuda_products.library),
]
PARTS = [  # part, shape, scheme; the most important first, because the time is limited
    *product(["captured"], ["7b", "1b"], ["bf16", "int8", "g32"]),
    ("transformers", "7b", "bf16"),
    *product(["products"], ["7b"], ["bf16", "int8", "g32"]),
    *product(["prompt"], ["7b"], ["bf16", "int8", "g32"]),
    ("library", "7b", "g32"),
    ("draft", "68m", "bf16"),
    ("plain", "7b", "bf16"),
    ("compiled", "7b", "bf16"),
    ("compiled", "7b", "bf16"),  # the first time nothing is cached
    ("capacity", "7b", "g32"),
]
OPTIONAL = ("transformers", "library")  # fail in one line
SECONDS, PART_SECONDS = 570, 150  # limits of all parts, and of one


def run_part(name: str, shape: str, scheme: str) -> None:
    """Run one part in this process and print its line."""
    functions = {function.__name__: function for function in FUNCTIONS}
    try:
        result = functions[name](shape, scheme)
    except Exception as error:
        if name not in OPTIONAL:
            raise
        result = f"not measured: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    print(json.dumps({f"{name} {shape} {scheme}": result}), flush=True)


def main() -> None:
    if sys.argv[1:]:
        run_part(*sys.argv[1:])
        return
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}", flush=True)
    end = time.monotonic() + SECONDS
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
        for part in PARTS:
            seconds = min(PART_SECONDS, end - time.monotonic())
            command = [sys.executable, "-m", "benchmarks.cuda", *part]
            try:
                subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=max(seconds, 0))
            except subprocess.TimeoutExpired:
                print(json.dumps({" ".join(part): "not measured: out of time"}), flush=True)


if __name__ == "__main__":
    utils.run(main)
