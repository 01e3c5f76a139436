"""Generate from prompts that begin alike: a shared prefix is computed once, in this run and in the next.

    python generate_prefill.py --compile --checkpoint_path checkpoints/$MODEL_REPO/model.pth

It owns the files in which keys and values outlive a process; all else is generate.py's.
"""

import ctypes
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tp
from generate import Engine, Session, answer_all, between, build_parser, read_prompt
from kernels import cpu
from quantize import run, utf8

import torch

BLOCK = 16  # tokens whose keys and values are one file
CONTEXT = "Square numbers: " + ", ".join(f"{n} * {n} = {n * n}" for n in range(1, 41))
PROMPTS = ["12 * 12 =", "41 * 41 ="]


class Store:
    """Files in a folder, at most `budget` bytes, of which the least recently used go first. Several processes may share it.

    What is damaged, cut short or renamed is not used. The files hold what users typed, so nobody else may read them. Trouble
    is told once, in one line on stderr.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        # whole: names of files that need not be read again to know that they are whole
        self.folder, self.budget, self.room, self.told, self.whole = folder, budget, 0, False, set()
        if not folder.exists():
            print(f"prefixes are stored in {folder}: --cache_gb limits it, --no_cache does without", file=sys.stderr)

    @contextmanager
    def trouble_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.told and not isinstance(error, FileNotFoundError):  # that is another process, which needed room
                print(f"the prefix cache cannot be used as it should: {error}", file=sys.stderr)
                self.told = True

    def write(self, name: str, age: int, parts: list[torch.Tensor]) -> None:
        """Mark a file as used, stored before where it is not there; one of a greater `age` (nanoseconds) goes before others."""
        path, now = self.folder / name, time.time_ns() - age
        if not (name in self.whole and path.exists()) and cpu.read_sealed(path) is None:
            content = torch.stack(parts).flatten().cpu().view(torch.uint8)
            self.room = (self.room if self.room >= len(content) else self.make_room(len(content))) - len(content)
            cpu.write_sealed(path, ctypes.string_at(content.data_ptr(), len(content)))
        self.whole.add(name)
        os.utime(path, ns=(now, now))

    def make_room(self, size: int) -> int:
        """Delete until `size` bytes fit; the bytes that may be written before it is looked again: a sixteenth of what is free,
        so that as many processes do not exceed the budget together."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # What begins with tmp is being written, and gone when one looks.
        files = sorted((e.stat().st_mtime_ns, e.stat().st_size, e.path) for e in os.scandir(self.folder) if e.name[:3] != "tmp")
        total = sum(length for _, length, _ in files) + size
        for _, length, path in files:
            if total > self.budget:
                Path(path).unlink(missing_ok=True)
                total -= length
        return max(size, (self.budget - total) // 16)


@dataclass
class CachedEngine(Engine):
    """An engine that finds in a store what ran before, and leaves there what ran.

    A block's name is the hash of the name before it and of its own tokens, from the model's identity on. So the longest
    common prefix is a walk along the names until a file is missing, and prompts that branch share their trunk.
    """

    store: Store | None = None

    def blocks(self, ids: list[int]) -> Iterator[tuple[int, str, list[torch.Tensor]]]:
        """For each whole block of `ids`: where it begins, its name, and its keys and values [n_kv_head, BLOCK, head_dim]."""
        name = repr((self.checkpoint.header["id"], self.checkpoint.args, self.cache[0].k.dtype, tp.ranks()))
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            name = hashlib.sha256(f"{name} {ids[start : start + BLOCK]}".encode()).hexdigest()
            yield start, name, [half[0, :, start : start + BLOCK] for layer in self.cache for half in (layer.k, layer.v)]

    @torch.inference_mode()
    def rewind(self, ids: list[int]) -> None:
        """Also take from the store what goes on. Not on CUDA: there it takes longer to read a prefix than to compute it."""
        super().rewind(ids)
        if self.store and len(ids) - len(self.ids) > BLOCK and self.cache[0].k.device.type == "cpu":
            with self.store.trouble_told():
                for start, name, parts in self.blocks(ids[:-1]):
                    if start + BLOCK > len(self.ids):
                        content = cpu.read_sealed(path := self.store.folder / name)
                        if content is None:  # where the file is not there, the walk ends without a word
                            raise OSError(f"{path} is damaged") if path.exists() else FileNotFoundError(path)
                        stored = torch.frombuffer(bytearray(content), dtype=parts[0].dtype).view(len(parts), *parts[0].shape)
                        torch._foreach_copy_(parts, stored.unbind())
                        self.ids[start:] = ids[start : start + BLOCK]
            del self.ids[min(tp.gather(len(self.ids))) :]  # what every rank has found

    @torch.inference_mode()
    def keep(self, ids: list[int]) -> None:
        """Store those blocks of `ids` that are in the cache, and mark them as used, the first of them as the last."""
        super().rewind([*ids, -1])  # all of them: nobody wants the last one's logits
        if self.store:
            with self.store.trouble_told():
                for start, name, parts in self.blocks(self.ids):
                    self.store.write(name, start, parts)


def main() -> None:
    parser = build_parser()
    add = parser.add_argument
    add("--context", "--system", default=CONTEXT, help='what all begins with: a text, "@FILE", or "-" for standard input')
    add("--prompt", action="append", help="what follows the context; may be given several times")
    add("--cache_dir", type=Path, help="where prefixes are stored (a folder beside the checkpoint)")
    add("--cache_gb", type=between(0.001, kind=float), default=4.0, help="how much; the least recently used goes first (4)")
    add("--no_cache", action="store_true", help="read and write no files of prefixes")
    args = parser.parse_args()
    tp.join(args.device)
    text = "" if args.interactive and args.context == CONTEXT else args.context
    if args.interactive and text == "-":
        raise ValueError("--context -: standard input is the conversation; give a text, or @FILE")
    file = Path(text[1:]).read_bytes() if text.startswith("@") and tp.ranks()[0] == 0 else b""
    args.system = utf8(tp.gather(file)[0], text[1:]) if text.startswith("@") else text and read_prompt(text)
    place, size = args.cache_dir or args.checkpoint_path.parent / "prefixes", int(args.cache_gb * 1e9)
    texts = [] if args.interactive else [read_prompt(prompt) for prompt in args.prompt or PROMPTS]
    session = Session(args, partial(CachedEngine, store=None if args.no_cache else Store(place, size)))
    answer_all(texts, session)
    print(f"{'answer':>6}{'cached':>8}{'computed':>10}{'first token':>13}{'speed-up':>10}", file=sys.stderr)
    for i, (cached, computed, first) in enumerate(session.table, 1):
        print(f"{i:6}{cached:8}{computed:10}{first:11.3f} s{session.table[0][2] / first:9.1f}x", file=sys.stderr)


if __name__ == "__main__":
    run(main)
