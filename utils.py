"""The common parts of the scripts: errors in one line, progress, arguments.

It knows nothing of models. Scripts import it before torch: it silences warnings, and Ctrl-C ends that import cleanly.
"""

import argparse
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

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch warns when it is imported; we do not use NumPy
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise torch prints a C++ stack when another rank ends
progress = partial(tqdm, leave=False, disable=None)  # a bar on stderr if that is a terminal
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup ignores it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `run`: an interrupted import of torch is a long traceback


def exit_status(main: Callable[[], None], report: Callable[[str], None], cause: str = "") -> int:
    """Call `main` and return the exit status.

    An error that a user can cause is one line, which `report` prints, with status 1; 130 after Ctrl-C. A RuntimeError
    is a fault of ours and keeps its traceback, unless memory ran out or `cause` explains it.
    """
    warnings.simplefilter("ignore")
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    try:
        main()
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "allocate memory" in message or "out of memory" in message:
            message = "there is not enough memory: a smaller or quantized model, or a shorter --context, takes less"
        elif isinstance(error, RuntimeError):
            if not cause and "CUDA" not in message:
                raise
            message = f"{cause or 'the GPU or its driver failed, or is busy'}: {message[:300]}"
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise the interpreter complains about stdout at its end
        report(message)
        return 1


def run(main: Callable[[], None]) -> None:
    """Call `main` and end the process with `exit_status`.

    SIGTERM and SIGHUP raise SystemExit(128 + number), so that temporary files are deleted.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # a signal that nohup ignores stays ignored
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    sys.exit(exit_status(main, lambda message: print(message, file=sys.stderr)))


def number_between(low: float, high: float = math.inf, kind: type = int) -> Callable[[str], float]:
    """An argparse type: an int or float (`kind`) between `low` and `high`."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text}: must be from {low} to {high} ({kind.__name__})")

    return parse


@contextmanager
def reading(name: Path | str, advice: str) -> Iterator[None]:
    """Turn any exception of a library that reads a bad file into one ValueError: the file, the reason, the fix.

    Our own ValueErrors already name the fix.
    """
    try:
        yield
    except (MemoryError, PermissionError):  # the message names the cause, and `advice` would not help
        raise
    except Exception as error:  # damaged files make parsers raise anything
        if type(error) is ValueError:
            if str(error).startswith(str(name)):
                raise
            raise ValueError(f"{name}: {error}") from error
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ValueError(f"{name}: {reason.split('. ')[0][:200]}; {advice}") from error


def decode_text(data: bytes) -> str:
    r"""UTF-8 to text, without a byte order mark and with "\n" for "\r\n"."""
    return data.decode("utf-8-sig").replace("\r\n", "\n")


def read_text(argument: str, name: str) -> str:
    """The text that `argument` of the flag `name` means: "-" is standard input, "@FILE" a file, else the text itself.

    The line end of the last line of standard input or of a file is dropped. ValueError if there is no text.
    """
    is_file = argument == "-" or argument.startswith("@")
    with reading(f"{name} {argument}" if argument.startswith("@") else name, "give some text in UTF-8, or @FILE"):
        if argument == "-":
            data = sys.stdin.buffer.read()
        else:
            data = Path(argument[1:]).read_bytes() if is_file else os.fsencode(argument)
        text = decode_text(data)
    text = text.removesuffix("\n") if is_file else text
    if not text:
        raise ValueError(f"{name} is empty: give some text in UTF-8")
    return text
