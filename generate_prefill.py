"""Generate from prompts that share a prefix: its keys and values are computed once, in this run and in the next.

python generate_prefill.py --compile --checkpoint_path checkpoints/$MODEL_REPO/model.pth
"""

import ctypes
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import utils

import torch
from torch import Tensor

import tp
from generate import Engine, build_parser, generate_all
from scripts import files

BLOCK_SIZE = 16  # tokens whose keys and values are in one file
# The sources that compute keys and values, because files of another version must not be used.
SOURCES = [Path(__file__).with_name("model.py"), *sorted(Path(__file__).parent.glob("kernels/*.*"))]
CODE = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
SYSTEM = "Square numbers: " + ", ".join(f"{n} * {n} = {n * n}" for n in range(1, 41))


class PrefixCache:
    """Keys and values of earlier prompts, in files of at most `max_bytes` together; the least recently used go first.

    A file holds a block of BLOCK_SIZE tokens. Its name is the hash of the name of the block before it and of its own
    tokens, from the model's identity on. So the longest cached prefix is found by following the names, and prompts that
    branch share the files of their common prefix. Several processes may share the folder.

    A file that is damaged, cut short or renamed is not used. Files are readable by their owner only, because they tell
    the words that were typed. Only files that begin with MAGIC, or have the name of a block, are ever
    deleted. Errors cost one line on stderr.
    """

    MAGIC = b"llama prefix 1\n\0"

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder / "llama_prefixes"
        self.max_bytes = max_bytes
        self.error_printed = False

    def blocks(self, engine: Engine, ids: list[int]) -> Iterator[tuple[int, Path, list[Tensor]]]:
        """Start, file and part of the KV cache, [2, n_kv_head, BLOCK_SIZE, head_dim] a layer, for each block."""
        checkpoint, cache = engine.checkpoint, engine.kv_cache
        name = f"{checkpoint.header['id']} {checkpoint.args} {cache[0].dtype} {tp.RANK} {tp.WORLD_SIZE} {CODE}"
        for start in range(0, len(ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
            name = hashlib.sha256(f"{name} {ids[start : start + BLOCK_SIZE]}".encode()).hexdigest()
            yield start, self.folder / f"{name}.kv", [layer[:, 0, :, start : start + BLOCK_SIZE] for layer in cache]

    def header(self, path: Path, content: bytes) -> bytes:
        """The bytes before `content` in a file: MAGIC and a checksum of the file's name and content."""
        return self.MAGIC + hashlib.sha256(path.name.encode() + content).digest()

    @torch.inference_mode()
    def load(self, engine: Engine, ids: list[int]) -> None:
        """Load the blocks of `ids` after the cached tokens of an engine, up to the first that is in no file."""
        if len(ids) - len(engine.cached_ids) < BLOCK_SIZE:
            return
        with self.errors_printed():
            for start, path, parts in self.blocks(engine, ids):
                if start + BLOCK_SIZE > len(engine.cached_ids):
                    if not path.exists():
                        break
                    self.load_block(path, parts)
                    engine.cached_ids[start:] = ids[start : start + BLOCK_SIZE]
        # Ranks use only the blocks that all of them have found.
        engine.truncate(min(tp.from_rank(lambda: len(engine.cached_ids), rank) for rank in range(tp.WORLD_SIZE)))

    def load_block(self, path: Path, parts: list[Tensor]) -> None:
        """Copy a file to its part of the KV cache. A damaged file is deleted: OSError."""
        data = path.read_bytes()
        content = data[len(self.header(path, b"")) :]
        if data != self.header(path, content) + content:
            path.unlink()
            raise OSError(f"{path} was damaged")
        content = torch.frombuffer(bytearray(content), dtype=parts[0].dtype)
        for part, layer in zip(parts, content.view(len(parts), *parts[0].shape), strict=True):
            part.copy_(layer)

    @torch.inference_mode()
    def save(self, engine: Engine) -> None:
        """Save the blocks of an engine's cached tokens that are in no file yet, and evict others.

        Earlier blocks get a later time of use, because a block is useless without those before it.
        """
        now = time.time_ns()
        with self.errors_printed():
            for start, path, parts in self.blocks(engine, engine.cached_ids):
                if not path.exists():
                    self.save_block(path, parts)
                os.utime(path, ns=(now - start, now - start))
        with self.errors_printed():
            self.evict()

    def save_block(self, path: Path, parts: list[Tensor]) -> None:
        """Write a part of the KV cache to a file."""
        if not self.folder.exists():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            print(f"prefixes are stored in {self.folder}: --cache_gb limits, --no_cache avoids it", file=sys.stderr)
        part = torch.stack(parts)
        content = ctypes.string_at(part.data_ptr(), part.nbytes)
        with files.atomic_write(path, mode=0o600) as temporary:
            temporary.write_bytes(self.header(path, content) + content)

    def evict(self) -> None:
        """Delete the least recently used files until the others fit in max_bytes, and stale temporary files."""
        files.delete_stale(self.folder, ".*.kv.[0-9]*.tmp")
        used = {}
        for path in self.folder.glob("?" * 64 + ".kv"):
            with suppress(FileNotFoundError):  # another process evicts as well
                used[path] = path.stat().st_mtime_ns
        total = 0
        for path in sorted(used, key=used.get, reverse=True):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
                if total > self.max_bytes and path.is_file() and path.read_bytes().startswith(self.MAGIC):
                    path.unlink()  # a symbolic link, but not its target

    @contextmanager
    def errors_printed(self) -> Iterator[None]:
        """Print an OSError, once, and go on after the block."""
        try:
            yield
        except OSError as error:
            is_evicted = isinstance(error, FileNotFoundError)  # another process has evicted it
            if not self.error_printed and not is_evicted:
                print(f"the prefix cache cannot be used: {error}; --no_cache avoids it", file=sys.stderr)
                self.error_printed = True


def main() -> None:
    parser = build_parser()
    add = parser.add_argument
    add("--cache_dir", help="where the folder of prefixes is (beside the checkpoint)")
    add("--cache_gb", type=utils.number_between(0.001, 1e6, float), default=4.0, help="size of the folder (4)")
    add("--no_cache", action="store_true", help="read and write no files of prefixes")
    args = parser.parse_args()
    if not (args.system or args.prompt or args.interactive):
        args.system, args.prompt = SYSTEM, ["12 * 12 =", "41 * 41 ="]
    prefix_cache = PrefixCache(Path(args.cache_dir or args.checkpoint_path.parent), int(args.cache_gb * 1e9))
    use_cache = not args.no_cache and args.device == "cpu"  # CUDA computes a prefix faster than it reads one
    generate_all(args, prefix_cache if use_cache else None)


if __name__ == "__main__":
    tp.run(main)
