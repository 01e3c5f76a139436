"""Imported by kernels/cpu.py, the first of our modules: what has to be settled before torch, which takes a second, is imported.

Until quantize.run takes over, Ctrl-C ends the process without a traceback; torch warns of nothing: what is wrong, we say.
Of torchrun's ranks the first alone reads and writes.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

if Path(sys.argv[0]).resolve().parent in (Path(__file__).parent, Path(__file__).parent / "scripts"):  # not in other programs
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    if "LOCAL_RANK" in os.environ and os.environ.get("RANK") != "0":
        sys.stdin = sys.stdout = sys.stderr = open(os.devnull, "r+")  # noqa: SIM115
