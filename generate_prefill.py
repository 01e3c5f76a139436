"""Generate from prompts that begin alike: a shared prefix is computed once, in this run and in the next.

    python generate_prefill.py --compile --checkpoint_path checkpoints/$MODEL_REPO/model.pth

It owns the files in which keys and values outlive a process; all else is generate.py's.
"""

import ctypes
import glob
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

if __name__ == "__main__" and getattr(sys.flags, "safe_path", False):
    sys.exit("PYTHONSAFEPATH keeps Python from finding the modules beside this script: unset it")

import terminal

import torch
from torch import Tensor

import tp
from chat import Conversation
from generate import Engine, answer_all, build_parser

BLOCK = 16  # tokens whose keys and values are one file
SYSTEM = "Square numbers: " + ", ".join(f"{n} * {n} = {n * n}" for n in range(1, 41))


class Store:
    """Files in the subfolder llama_prefixes of a folder: after each answer at most `budget` bytes, of which the least
    recently used go first. Several processes may share it.

    A file that is damaged, cut short or renamed is not used. The files hold users' words, so nobody else may read them.
    Only its own files are ever deleted: to make room, files with its kind of name that begin with MAGIC; and a damaged
    file under the very name of a block. Trouble is told once, in one line on stderr.
    """

    MAGIC = b"llama prefix 1\n\0"

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder = folder / "llama_prefixes"
        self.budget = budget
        self.told = False

    @contextmanager
    def trouble_told(self) -> Iterator[None]:
        """The operating system's refusal ends the block, and is told."""
        try:
            yield
        except OSError as error:
            if not self.told and not isinstance(error, FileNotFoundError):  # that is another process, which needed room
                print(f"the prefix cache cannot be used as it should: {error}; --no_cache avoids it", file=sys.stderr)
                self.told = True

    def seal(self, name: str, content: bytes) -> bytes:
        """The bytes before `content` in the file `name`."""
        return self.MAGIC + hashlib.sha256(name.encode() + content).digest()

    def read(self, name: str) -> bytes | None:
        """The content that was stored under `name`, if it is there. A damaged file is deleted: OSError."""
        path = self.folder / name
        if not path.exists():
            return None
        data = path.read_bytes()
        content = data[len(self.MAGIC) + 32 :]
        if data != self.seal(name, content) + content:
            path.unlink()
            raise OSError(f"{path} was damaged")
        return content

    def use(self, name: str, time_of_use: int, part: Tensor) -> None:
        """Mark a file as used at that time (in ns), stored before if it is not there; the earliest one goes first."""
        path = self.folder / name
        if not path.exists():
            if not self.folder.exists():
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                print(f"prefixes are stored in {self.folder}: --cache_gb limits, --no_cache avoids it", file=sys.stderr)
            part = part.contiguous()
            content = ctypes.string_at(part.data_ptr(), part.nbytes)
            with terminal.replacing(path, mode=0o600) as temporary:
                temporary.write_bytes(self.seal(name, content) + content)
        os.utime(path, ns=(time_of_use, time_of_use))

    def trim(self) -> None:
        """Delete the least recently used files until the others fit the budget, and the remains of killed processes."""
        terminal.delete_abandoned(self.folder, ".*.kv.[0-9]*.tmp")
        used = {}
        for path in self.folder.glob("?" * 64 + ".kv"):
            with suppress(FileNotFoundError):  # another process makes room as well
                used[path] = path.stat().st_mtime_ns
        total = 0
        for path in sorted(used, key=used.get, reverse=True):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
                if total > self.budget and path.is_file() and path.read_bytes().startswith(self.MAGIC):
                    path.unlink()  # of a link that somebody made, the link


@dataclass
class CachedEngine(Engine):
    """An engine that takes keys and values of earlier runs from a store, and leaves its own there.

    A block's name is the hash of the name before it and of its own tokens, from the model's identity on. So the longest
    common prefix is a walk along the names until a file is missing, and prompts that branch share their trunk.
    """

    store: Store = None  # has to be given: a field behind others with defaults needs one

    def blocks(self, ids: list[int]) -> Iterator[tuple[int, str, Tensor]]:
        """For each whole block of `ids`: its begin, its name, and its part [n_layer, 2, n_kv_head, BLOCK, head_dim]."""
        model, cache = self.checkpoint, self.cache
        name = f"{model.header['id']} {model.args} {cache.dtype} {cache.device.type} {tp.ranks()}"
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            name = hashlib.sha256(f"{name} {ids[start : start + BLOCK]}".encode()).hexdigest()
            yield start, f"{name}.kv", self.cache[:, :, 0, :, start : start + BLOCK]

    def restore(self, ids: list[int]) -> None:
        """Copy the blocks of `ids` behind `self.ids` from the store into the cache, as far as it has them."""
        for start, name, part in self.blocks(ids):
            if start + BLOCK > len(self.ids):
                content = self.store.read(name)
                if content is None:
                    return
                part.copy_(torch.frombuffer(bytearray(content), dtype=part.dtype).view(part.shape))
                self.ids[start:] = ids[start : start + BLOCK]

    @torch.inference_mode()
    def rewind(self, ids: list[int]) -> None:
        """Keep the beginning in common with `ids`, and restore the blocks behind it."""
        super().rewind(ids)
        if len(ids) - len(self.ids) > BLOCK:
            with self.store.trouble_told():
                self.restore(ids[:-1])
            del self.ids[min(tp.gather(len(self.ids))) :]  # all ranks have found these

    @torch.inference_mode()
    def keep(self, ids: list[int]) -> None:
        """Store those blocks of `ids` that are in the cache, and mark them as used, the first of them as the last."""
        super().keep(ids)
        now = time.time_ns()
        with self.store.trouble_told():
            for start, name, part in self.blocks(self.ids):
                self.store.use(name, now - start, part)
        with self.store.trouble_told():
            self.store.trim()


@dataclass
class SavedConversation(Conversation):
    """A conversation that lies in a file after each answer, and goes on from there the next time.

    The file holds users' words, so nobody else may read it; and ids, whose keys and values the store may have.
    """

    KIND: ClassVar = b"llama session "
    MAGIC: ClassVar = KIND + b"1\n\0"
    SAID: ClassVar = ("settings", "ids", "messages", "asked", "answer")
    path: Path = None  # has to be given
    settings: str = ""  # a hash of what the ids depend on
    sealed: bytes = b""  # how the file began when it was last read or written

    @classmethod
    def take_up(cls, *settings: object, path: Path) -> "SavedConversation":
        """That in the file, or a new one. ValueError where the file is no session, or of other settings."""
        talk = cls(*settings, path=path)
        known = talk.tokenizer.vocabulary(), talk.system, talk.tokenizer.template if talk.template else None
        talk.settings = hashlib.sha256(repr(known).encode()).hexdigest()
        said = tp.agree(talk.read)
        if said is None:
            talk.write()
            return talk
        if said["settings"] != talk.settings:
            raise ValueError(f"{path} was begun with another model, --system or --raw: name another file")
        print(f"{path}: going on behind {len(said['ids'])} tokens", file=sys.stderr)
        return replace(talk, **said)

    def read(self) -> dict | None:
        """What the file holds; None if there is none. ValueError where it is foreign or damaged."""
        if not self.path.exists():
            return None
        with terminal.reading(self.path, "name another file"):
            self.sealed = self.head()
            if not self.sealed.startswith(self.KIND):
                raise ValueError("this is no session of generate_prefill.py: name another file")
            content = self.path.read_bytes()[len(self.sealed) :]
            if self.sealed.startswith(self.MAGIC) and self.sealed != self.seal(content):
                raise ValueError("this session is damaged: name another file")
            said = json.loads(content) if self.sealed.startswith(self.MAGIC) else {}
            if said.keys() != set(self.SAID):
                raise ValueError("another version wrote this session: name another file")
            return said

    def head(self) -> bytes:
        """How the file begins; empty if it is none, or a device."""
        if not self.path.is_file():
            return b""
        with open(self.path, "rb") as file:
            return file.read(len(self.seal(b"")))

    def seal(self, content: bytes) -> bytes:
        """The bytes before `content` in the file."""
        return self.MAGIC + hashlib.sha256(content).digest()

    def write(self) -> None:
        """Put it into the file, whole or not at all. ValueError where that cannot be, or another program was there."""
        if tp.ranks()[0] > 0:
            return
        try:
            if self.path.exists() and self.head() != self.sealed:
                raise ValueError(f"{self.path} was changed by another program: name another file")
            content = json.dumps({name: getattr(self, name) for name in self.SAID}).encode()
            terminal.delete_abandoned(self.path.parent, f".{glob.escape(self.path.name)}.[0-9]*.tmp")
            with terminal.replacing(self.path, mode=0o600) as temporary:
                temporary.write_bytes(self.seal(content) + content)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written ({error.strerror}): name another file") from error
        self.sealed = self.seal(content)

    def save(self) -> None:
        """Write it, or tell why not: the conversation goes on all the same, on every rank."""
        try:
            self.write()
        except ValueError as error:
            print(f"the conversation is not saved: {error}", file=sys.stderr)

    def cleared(self) -> "SavedConversation":
        """One in which nothing was said, which is in the file now."""
        talk = super().cleared()
        talk.save()
        return talk

    def add(self, *turn: object) -> None:
        """As ever, and into the file."""
        super().add(*turn)
        self.save()


def main() -> None:
    parser = build_parser()
    add = parser.add_argument
    add("--cache_dir", help="where the folder of prefixes is made (beside the checkpoint)")
    add("--cache_gb", type=terminal.number(0.001, 1e6, float), default=4.0, help="the least recently used go first (4)")
    add("--session", type=Path, help="keep the conversation of --interactive in this file, and go on with it next time")
    add("--no_cache", action="store_true", help="read and write no files of prefixes")
    args = parser.parse_args()
    if not (args.system or args.prompt or args.interactive):
        args.system, args.prompt = SYSTEM, ["12 * 12 =", "41 * 41 ="]
    if args.session and not args.interactive:
        parser.error("argument --session: it keeps a conversation: give --interactive as well")
    store = Store(Path(args.cache_dir or args.checkpoint_path.parent), int(args.cache_gb * 1e9))
    cached = not args.no_cache and args.device == "cpu"  # CUDA reads a prefix more slowly than it computes it
    conversation = partial(SavedConversation.take_up, path=args.session) if args.session else Conversation
    answer_all(args, partial(CachedEngine, store=store) if cached else Engine, conversation)


if __name__ == "__main__":
    tp.run(main)
