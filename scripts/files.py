"""Files that are written whole or not at all: checkpoints, and the files of the prefix cache."""

import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.serialization import set_default_mmap_options, skip_data

STALE_SECONDS = 24 * 3600  # the age of a temporary file that no running process writes any more


def delete_stale(folder: Path, pattern: str) -> None:
    """Delete the temporary files in `folder` that a killed process left: they are older than a day."""
    for path in folder.glob(pattern):
        with suppress(OSError):  # another process was faster, or it is a folder
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


@contextmanager
def atomic_write(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """Yield a temporary file beside `path`; after the block it replaces `path`, after an exception it is deleted.

    A symbolic link stays a link: its target is replaced. OSError if the file cannot be created.
    """
    path = Path(os.path.realpath(path))
    # A random name, because containers that share a disk may share process ids.
    temporary = path.with_name(f".{path.name}.{int.from_bytes(os.urandom(6), 'big')}.tmp")
    try:
        os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode))
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_checkpoint(path: Path, header: dict, tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Write a checkpoint to `path`, whole or not at all: yield its tensors, mapped to the file, for the block to fill.

    `header` has all fields but id and model. `tensors` are untouched torch.empty ones: only their shapes count, and
    a tensor under two names is stored once. The disk space is reserved first, because a disk that fills up under a
    mapped file kills the process: OSError.
    """
    delete_stale(path.resolve().parent, ".*.pth.[0-9]*.tmp")
    with atomic_write(path) as temporary:
        try:
            with skip_data():
                torch.save({**header, "id": os.urandom(16).hex(), "model": tensors}, temporary)
            with open(temporary, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        except (OSError, RuntimeError) as error:  # torch.save has only RuntimeError for a full disk
            size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
            raise OSError(f"{path} was not written: it takes {size:.2f} GB of disk ({str(error)[:99]})") from error
        with set_default_mmap_options(mmap.MAP_SHARED):
            yield torch.load(temporary, mmap=True, weights_only=True)["model"]
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
