"""One rank of those that test_tensor_parallel.py starts: answers every case; rank 0 writes what came out to a file.

python -m tests.ranks CASES FOLDER RESULTS      (CASES: text or memory)
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import tp
from checkpoint import read_checkpoint
from generate import Engine
from generate_prefill import CachedEngine, Store
from speculation import PLAIN, Lookup, Speculation
from tests.conftest import generated, make_sampling, new_engine

COUNT = 8  # tokens of an answer
COMPILED = "gqa_int4.g32.pth"


class Eager(Speculation):
    """Guesses four tokens each time that it can, whether that pays or not."""

    def choose(self, room: int, sources: list[int]) -> tuple[int, int]:
        return (sources[-1], min(room, 4)) if sources else (PLAIN, 0)


def load(path: Path, draft: bool = False, dtype: torch.dtype = torch.float32) -> Engine:
    checkpoint = read_checkpoint(path)
    model = tp.load_share(checkpoint, "cpu", dtype, draft)
    return Engine(model, model.make_cache(256), checkpoint=checkpoint)


def answers(path: Path, prompts: list[list[int]]) -> dict:
    """What one checkpoint says on every path, and its logits for a batch of two, of odd length and of one token."""
    engine, greedy, warm = load(path), make_sampling(), make_sampling(7, 0.8)

    def say(
        prompt: list[int], sampling: object, speculation: Speculation | None = None, of: Engine = engine
    ) -> list[int]:
        of.ids = []
        return generated(of, prompt, COUNT, sampling, speculation=speculation)

    found = {
        "greedy": [say(prompt, greedy) for prompt in prompts],
        "sampled": [say(prompt, warm) for prompt in prompts],
    }
    if path.name.endswith(("float.pth", "g64.pth")):
        draft = load(path.with_name(path.name.split("_")[0] + ".draft.pth"), draft=True)
        sources = {"draft": (draft.guess, None), "lookup": (None, Lookup()), "both": (draft.guess, Lookup())}
        for name, (guess, lookup) in sources.items():
            found[f"sampled {name}"] = [say(prompt, warm, Eager(guess, 15, lookup)) for prompt in prompts]
            pays = Speculation(guess, 5, lookup)
            found[f"greedy {name}, as it pays"] = [say(prompt, greedy, pays) for prompt in prompts]
    stored = {}
    for time_of in ("first", "again"):
        store = Store(path.with_suffix(".prefixes"), 10**9)
        cached = CachedEngine(engine.model, engine.model.make_cache(256), checkpoint=engine.checkpoint, store=store)
        cached.rewind(prompts[-1])
        stored[time_of] = len(cached.ids)
        found[f"greedy {time_of} stored"] = [generated(cached, prompts[-1], COUNT, greedy)]
        cached.keep(cached.ids)
    if path.name == COMPILED:
        fast = new_engine(engine.model, 256)
        fast.compile(True, False, warm)
        found["sampled compiled"] = [say(prompt, warm, of=fast) for prompt in prompts]
    logits = []
    for shape in ((2, 7), (1, 1)):
        tokens = torch.arange(3, 3 + shape[0] * shape[1]).view(shape)
        with torch.inference_mode():
            logits += engine.model(tokens, torch.arange(shape[1]), engine.model.make_cache(16, shape[0]))[
                :, -1
            ].tolist()
    return {"said": found, "stored": stored, "logits": logits}


def rounded(path: Path, prompt: list[int]) -> dict:
    """What a model says in bfloat16, plain and with a draft's guesses; logits of six rows, one by one and at once."""
    engine, draft = (
        load(path.with_name(name), dtype=torch.bfloat16) for name in ("target_float.pth", "target.draft.pth")
    )
    found = []
    for speculation in (None, Eager(draft.guess, 15)):
        engine.ids = []
        found.append(generated(engine, prompt, 32, make_sampling(3, 0.8), speculation=speculation))
    with torch.inference_mode():
        tokens, positions, caches = (
            torch.arange(3, 9)[None],
            torch.arange(6),
            [engine.model.make_cache(16) for _ in range(2)],
        )
        rows = [engine.model(tokens[:, i : i + 1], positions[i : i + 1], caches[0])[0, 0].tolist() for i in range(6)]
        return {"said": found, "rows": [rows, engine.model(tokens, positions, caches[1])[0].tolist()]}


def text(folder: Path) -> dict:
    prompts = json.loads((folder / "prompts.json").read_text())
    results = {}
    for path in sorted(folder.glob("*_*.pth")):
        try:
            results[path.name] = answers(path, prompts)
        except ValueError as error:
            results[path.name] = {"refused": str(error)}
    return results | {"bfloat16": rounded(folder / "any", prompts[-1])}


def memory(folder: Path) -> list:
    """RssAnon and RssFile of each rank, in bytes, before the model is loaded and after one pass over it."""

    def resident() -> dict[str, int]:
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return {words[0][:-1]: 1024 * int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssFile:")}

    before = resident()
    model = tp.load_share(read_checkpoint(folder / "model.pth"), "cpu", torch.bfloat16)
    with torch.inference_mode():
        model(torch.tensor([[1]]), torch.tensor([0]), model.make_cache(16))
    return tp.gather([before, resident()])


def main(cases: Callable, folder: Path, results: Path) -> None:
    torch.set_num_threads(1)
    tp.join("cpu")
    found = cases(folder)
    if tp.ranks()[0] == 0:
        results.write_text(json.dumps(found))
    tp.gather(None)


if __name__ == "__main__":
    tp.run(lambda: main({"text": text, "memory": memory}[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])))
