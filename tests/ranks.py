"""A rank that test_tensor_parallel.py starts: runs every case; rank 0 writes the results to a file.

python -m tests.ranks CASES FOLDER RESULTS      (CASES: text or memory)
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import generate
import tp
from checkpoint import read_checkpoint
from generate import Engine
from generate_prefill import PrefixCache
from sampling import SamplingParams
from speculation import PromptLookup, Speculation
from tests.conftest import generated, make_params

COUNT = 8  # tokens of an answer
COMPILED = "gqa_int4.g32.pth"


class Always(Speculation):
    """Four guesses in each pass, even if they do not pay."""

    def choose(self, max_k: int, sources: list[str]) -> tuple[str, int]:
        return ([*sources][-1], min(max_k, 4)) if sources and max_k > 0 else ("none", 0)


def all_gather(value: object) -> list:
    """`value` of each rank, in their order."""
    return [tp.from_rank(lambda: value, rank) for rank in range(tp.WORLD_SIZE)]


def load(path: Path, is_draft: bool = False, dtype: torch.dtype = torch.float32) -> Engine:
    checkpoint = read_checkpoint(path)
    return Engine(tp.load_sharded(checkpoint, "cpu", dtype, is_draft), 256, checkpoint)


def answers(path: Path, prompts: list[list[int]]) -> dict:
    """The ids that one checkpoint gives on every path, and its logits for two rows of odd length and for one token."""
    engine, greedy, warm = load(path), make_params(), make_params(7, 0.8)

    def ids_from(engine: Engine, params: SamplingParams, speculation: Speculation | None = None) -> list[list[int]]:
        found = []
        for prompt in prompts:
            engine.truncate(0)
            found.append(generated(engine, prompt, COUNT, params, speculation=speculation))
        return found

    found = {"greedy": ids_from(engine, greedy), "sampled": ids_from(engine, warm)}
    if path.name.endswith(("float.pth", "g64.pth")):
        draft = load(path.with_name(path.name.split("_")[0] + ".draft.pth"), is_draft=True)
        copy = load(path)
        copy.share_cache(engine)
        sources = {"draft": (draft, None), "lookup": (None, PromptLookup()), "both": (draft, PromptLookup())}
        sources["copy"] = (copy, None)
        for name, (source, lookup) in sources.items():
            found[f"sampled {name}"] = ids_from(engine, warm, Always(source, 15, lookup))
            found[f"greedy {name}, as it pays"] = ids_from(engine, greedy, Speculation(source, 5, lookup))
    cached = {}
    for run in ("first", "again"):
        prefix_cache = PrefixCache(path.with_suffix(".prefixes"), 10**9)
        other = Engine(engine.model, 256, engine.checkpoint, prefix_cache)
        found[f"greedy {run} cached"] = [generated(other, prompts[-1], COUNT, greedy)]
        cached[run] = other.num_cached
    if path.name == COMPILED:
        compiled = Engine(engine.model, 256)
        compiled.compile(True, False, warm)
        found["sampled compiled"] = ids_from(compiled, warm)
    logits = []
    for batch, rows in ((2, 7), (1, 1)):
        tokens = torch.arange(3, 3 + batch * rows).view(batch, rows)
        with torch.inference_mode():
            cache = engine.model.make_cache(16, batch)
            logits += engine.model(tokens, torch.arange(rows), cache)[:, -1].tolist()
    return {"ids": found, "cached": cached, "logits": logits}


def rounded(folder: Path, prompt: list[int]) -> dict:
    """Ids in bfloat16, plain and with the guesses of a draft; logits of six rows, one by one and at once."""
    engine, draft = [load(folder / name, dtype=torch.bfloat16) for name in ("target_float.pth", "target.draft.pth")]
    found = []
    for speculation in (None, Always(draft, 15)):
        engine.truncate(0)
        found.append(generated(engine, prompt, 32, make_params(3, 0.8), speculation=speculation))
    tokens, positions = torch.arange(3, 9)[None], torch.arange(6)
    caches = [engine.model.make_cache(16) for _ in range(2)]
    with torch.inference_mode():
        rows = [engine.model(tokens[:, i : i + 1], positions[i : i + 1], caches[0])[0, 0].tolist() for i in range(6)]
        return {"ids": found, "rows": [rows, engine.model(tokens, positions, caches[1])[0].tolist()]}


def text(folder: Path) -> dict:
    prompts = json.loads((folder / "prompts.json").read_text())
    results = {}
    for path in sorted(folder.glob("*_*.pth")):
        try:
            results[path.name] = answers(path, prompts)
        except ValueError as error:
            results[path.name] = {"refused": str(error)}
    return results | {"bfloat16": rounded(folder, prompts[-1])}


def memory(folder: Path) -> list:
    """RssAnon and RssFile of each rank, in bytes, before the model is loaded and after one pass over it."""

    def resident() -> dict[str, int]:
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return {words[0][:-1]: 1024 * int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssFile:")}

    before = resident()
    model = tp.load_sharded(read_checkpoint(folder / "model.pth"), "cpu", torch.bfloat16)
    with torch.inference_mode():
        model(torch.tensor([[1]]), torch.tensor([0]), model.make_cache(16))
    return all_gather([before, resident()])


def main(cases: Callable, folder: Path, results: Path) -> None:
    torch.set_num_threads(1)
    generate.MIN_CAPACITY = 2  # so that KV caches grow in the middle of an answer
    tp.init("cpu")
    found = cases(folder)
    if tp.RANK == 0:
        results.write_text(json.dumps(found))
    all_gather(None)


if __name__ == "__main__":
    tp.run(lambda: main({"text": text, "memory": memory}[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])))
