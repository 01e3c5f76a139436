"""A program of benchmarks/programs.py in a process of its own."""

import json
import shlex
import subprocess
import sys

from benchmarks.model_files import ROOT


class Worker:
    """Starts a program and waits until its model is loaded. RuntimeError if the program ends, with its command."""

    def __init__(self, program: str, **options: object) -> None:
        command = [sys.executable, "-m", "benchmarks.programs", program, json.dumps(options)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        self.info = self.read()

    def read(self) -> dict:
        """The next line of the program's output."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker has ended: {shlex.join(self.process.args)}")
        return json.loads(line)

    def ask(self, method: str, *arguments: int) -> object:
        """The result of a method of the program."""
        self.process.stdin.write(json.dumps([method, *arguments]) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """End the program."""
        self.process.stdin.close()
        self.process.wait()
