"""All programs on one shape, each in a process of its own, asked in turn, with read bandwidth measured in between."""

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.load import load_test
from benchmarks.memory import bandwidth, bytes_per_token, kv_bytes, share
from benchmarks.model_files import OURS, is_installed, random_checkpoint, random_gguf
from benchmarks.report import BITS, spread
from benchmarks.worker import Worker
from checkpoint import empty_model
from model import ModelArgs

BYTES_PER_WEIGHT = {"16 bits": 2, "8 bits": 1.1, "5 bits": 0.65, "4.5 bits": 0.58}  # with the embedding table
ROWS = (1, 2, 4, 8, 16)


def log(text: str) -> None:
    """Print a line of progress to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def max_positions(options: argparse.Namespace) -> int:
    """The longest context that is asked for: prompt, answer, and the rows of a pass."""
    return max(options.prompt, *options.contexts, 16) + max(options.tokens, *ROWS)


def is_available(label: str, device: str) -> bool:
    """True if the program can be measured on this machine."""
    if label.startswith("llama.cpp"):
        return device == "cpu" and is_installed("llama_cpp", "gguf")
    return label in OURS or is_installed("transformers")


def start_worker(label: str, args: ModelArgs, folder: Path, options: argparse.Namespace) -> Worker:
    """Start a program. Its model file is written if there is none."""
    positions = max_positions(options)
    if label in OURS:
        path = str(random_checkpoint(args, folder, OURS[label]))
        return Worker("ours", path=path, device=options.device, positions=positions, march=options.march)
    program, kind = label.split()
    if program == "llama.cpp":
        return Worker(program, path=str(random_gguf(args, folder, kind)), args=asdict(args), positions=positions)
    return Worker(program, args=asdict(args), device=options.device)


def start_workers(shape: str, args: ModelArgs, folder: Path, options: argparse.Namespace) -> dict[str, Worker]:
    """Start the programs that are installed and fit into three quarters of the memory together.

    Pairs of a size come together, the smallest first, so that a shape that fills the memory still has pairs.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if options.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
    free = 0.75 * total
    parameters = sum(t.numel() for t in empty_model(args, None, torch.bfloat16).state_dict().values())
    candidates = [(label, bits) for bits, labels in reversed(BITS.items()) for label in labels]
    if options.quick:
        candidates = [("bf16", "16 bits")]
    workers = {}
    for label, bits in candidates:
        size = BYTES_PER_WEIGHT[bits] * parameters + kv_bytes(args, max_positions(options))
        if not is_available(label, options.device):
            log(f"{shape}: {label} is not installed")
        elif size > free:
            log(f"{shape}: no memory for {label}")
        else:
            free -= size
            workers[label] = start_worker(label, args, folder, options)
            log(f"{shape}: loaded {label}")
    return workers


def ask_once(worker: Worker, is_ours: bool, options: argparse.Namespace) -> dict[str, float]:
    """One round of a program: seconds of prefill and of a token, of passes of several rows, and GB of memory."""
    values = worker.ask("answer", options.prompt, options.tokens)
    if is_ours:
        values |= {f"rows {rows}": worker.ask("verify", options.prompt, rows) for rows in ROWS}
    for context in options.contexts:
        answer = worker.ask("answer", context, options.tokens)
        values |= {f"{name} {context}": answer[name] for name in ("prefill", "decode")}
    return values


def speeds(prefill: list[float], decode: list[float], prompt: int, size: float, bandwidths: list[float]) -> dict:
    """Tokens per second from seconds by round, and the share of memory speed; a token reads `size` bytes."""
    tokens_per_second = [1 / seconds for seconds in decode]
    return {
        "decode": spread(tokens_per_second),
        "prefill": spread([prompt / seconds for seconds in prefill]),
        "bytes per token": size,
        "share": share(statistics.median(tokens_per_second), size, statistics.median(bandwidths)),
    }


def summary(values: dict, weights: int, args: ModelArgs, bandwidths: list[float], options: argparse.Namespace) -> dict:
    """The figures of a program from its `values` by round; decoding reads `weights` bytes of weights."""

    def after(prompt: int, suffix: str) -> dict:
        size = bytes_per_token(weights, args, prompt, options.tokens)
        return speeds(values[f"prefill{suffix}"], values[f"decode{suffix}"], prompt, size, bandwidths)

    result = after(options.prompt, "")
    result["contexts"] = {context: after(context, f" {context}") for context in options.contexts}
    result["anonymous GB"] = max(values["anonymous"])
    result["mapped GB"] = max(values["mapped"])
    medians = {rows: statistics.median(values[f"rows {rows}"]) for rows in ROWS if f"rows {rows}" in values}
    result["rows over one"] = {rows: median / medians[1] for rows, median in medians.items() if rows > 1}
    return result


def measure(shape: str, args: ModelArgs, folder: Path, options: argparse.Namespace) -> dict:
    """The figures of all programs on one shape."""
    workers = start_workers(shape, args, folder, options)
    for worker in workers.values():
        worker.ask("answer", options.prompt, 3)  # touches the weights
    values: dict[str, dict[str, list]] = {label: defaultdict(list) for label in workers}
    bandwidths = []
    for i in range(options.rounds):
        for label, worker in workers.items():
            bandwidths.append(bandwidth(options.device))
            for name, value in ask_once(worker, label in OURS, options).items():
                values[label][name].append(value)
        log(f"{shape}: round {i + 1} of {options.rounds}, read bandwidth {bandwidths[-1]:.1f} GB/s")
    slowdown = {} if options.quick else load_test(workers, min(options.rounds, 3))
    programs = {}
    for label, worker in workers.items():
        worker.close()
        programs[label] = summary(values[label], worker.info["weights"], args, bandwidths, options)
        programs[label]["beside others"] = slowdown.get(label)
    return {"shape": shape, "read bandwidth": spread(bandwidths), "programs": programs}
