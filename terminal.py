"""The life of a script in a terminal: how it ends, errors in one line, progress, arguments, files written whole.

It knows nothing of models. A script imports it before torch for the sake of the user's eyes only: see `warnings` below.
"""

import argparse
import errno
import fcntl
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from tqdm import tqdm

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # by torch when it is imported; nothing here needs it
progress = partial(tqdm, leave=False, disable=None)  # (items, what): the items, counted where stderr is a terminal


def status_of(main: Callable[[], None], errors: object = None, blame: str = "") -> int:
    """Call a script's `main`: its exit status.

    An error that a user can cause ends in one line on `errors` (stderr) and status 1, Ctrl-C in status 130. A
    RuntimeError is a fault of ours and keeps its traceback, unless memory ran out, or `blame` names another cause.
    """
    warnings.simplefilter("ignore")  # our own messages say enough
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    try:
        main()
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "allocate memory" in reason or "out of memory" in reason:
            reason = "there is not enough memory for this model and its context: quantize it, or use a smaller one"
        elif isinstance(error, RuntimeError):
            if not blame and "CUDA" not in reason:
                raise
            reason = f"{blame or 'the GPU or its driver failed, or is busy'}: {reason[:300]}"
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains of stdout as well
        print(reason, file=errors or sys.stderr)
        return 1


def run(main: Callable[[], None]) -> None:
    """Call a script's `main` and end the process, with the status of `status_of`.

    SIGTERM and SIGHUP end it as an exception does, so that temporary files are deleted, with 128 + their number.
    """
    for caught in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(caught) == signal.SIG_DFL:  # a signal that nohup ignores stays ignored
            signal.signal(caught, lambda caught, frame: sys.exit(128 + caught))
    sys.exit(status_of(main))


def number(low: float, high: float = math.inf, kind: type = int) -> Callable[[str], float]:
    """An argparse type: a number of `kind` from `low` to `high`."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text}: must be from {low} to {high} ({kind.__name__})")

    return parse


@contextmanager
def reading(name: Path | str, cure: str) -> Iterator[None]:
    """Turn the errors of libraries that read missing, foreign or damaged input into one ValueError: name, reason, cure.

    Our own ValueErrors keep the cure that they name.
    """
    try:
        yield
    except (MemoryError, PermissionError):  # these name their cause, and the cure would not fit
        raise
    except Exception as error:  # there is no end to what damaged files make parsers raise
        if type(error) is ValueError:
            if str(error).startswith(str(name)):
                raise
            raise ValueError(f"{name}: {error}") from error
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ValueError(f"{name}: {reason.split('. ')[0][:200]}; {cure}") from error


def decode_text(data: bytes, name: str) -> str:
    """The text of `data` in UTF-8, without a byte order mark, and with "\n" for "\r\n". ValueError where it is not."""
    with reading(name, "give some text in UTF-8"):
        return data.decode("utf-8-sig").replace("\r\n", "\n")


def read_text(argument: str, name: str, plain: bool = False) -> str:
    """The text that a user means by `argument` of the flag `name`: "-" is standard input, "@FILE" a file, else itself.
    If it is a `plain` one, always itself.

    A line end behind the last line of standard input or of a file is not part of it. ValueError where there is no text.
    """
    if plain:
        with reading(name, "give some text in UTF-8"):
            text = os.fsencode(argument).decode()
    elif argument == "-":
        text = decode_text(sys.stdin.buffer.read(), name).removesuffix("\n")
    elif argument.startswith("@"):
        with reading(f"{name} {argument}", 'name a file behind the @, or give text that begins with @ through "-"'):
            data = Path(argument[1:]).read_bytes()
        text = decode_text(data, f"{name} {argument}").removesuffix("\n")
    else:
        text = decode_text(os.fsencode(argument), name)
    if not text:
        raise ValueError(f"{name} is empty: give some text in UTF-8")
    return text


def delete_abandoned(folder: Path, pattern: str) -> None:
    """Delete the temporary files in `folder` that a killed process left: those with content that nobody has locked."""
    for path in folder.glob(pattern):
        with suppress(OSError), open(path, "rb") as file:  # somebody holds the lock, or was faster
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_size > 0:
                path.unlink()


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A temporary file beside `path`, to be written by the block; then it takes the place of `path`.

    If the block raises, the temporary file is deleted and `path` stays as it was. A symbolic link stays a link: the
    file that it points to is replaced. OSError with the reason where there cannot be such a file.
    """
    path = Path(os.path.realpath(path))
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    # No number of a process: containers that share a disk repeat these.
    temporary = path.with_name(f".{path.name}.{int.from_bytes(os.urandom(6), 'big')}.tmp")
    with open(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode), "rb") as file:
        try:
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)  # says that this process lives
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
