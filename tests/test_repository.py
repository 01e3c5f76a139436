"""The promises about the repository itself: size, imports, README."""

import argparse
import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
SHIPPED = [name for name in TRACKED if not name.startswith("tests/")]
OURS = [name for name in SHIPPED if name.endswith(".py")]
README = (ROOT / "README.md").read_text()
MAY_IMPORT = {  # who may import whom; what is not named here imports nothing of ours
    "generate_prefill": {"generate", "tp", "quantize", "model", "kernels"},
    "generate": {"tp", "quantize", "model", "kernels"},
    "tp": {"quantize", "model", "kernels"},
    "quantize": {"model", "kernels"},
    "model": {"kernels"},
    "kernels": {"kernels"},  # its own cpu.py
    "kernels.cpu": {"launch"},
    "scripts.convert_hf_checkpoint": {"model", "quantize"},
    "scripts.download": {"quantize", "scripts.convert_hf_checkpoint"},
}


def module(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def code_lines(source: str) -> int:
    """Lines that are not blank, comment or docstring."""
    docs = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            docs.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(1 for i, line in lines if i not in docs and line.strip() and not line.strip().startswith("#"))


def cpp_lines(source: str) -> int:
    source = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), source, flags=re.S)
    return sum(1 for line in source.splitlines() if re.sub(r"//.*", "", line).strip())


def test_line_budget() -> None:
    """Fewer than 1,000 lines of Python and at most 300 of C++ outside tests/, and the README states both counts."""
    python = sum(code_lines((ROOT / name).read_text()) for name in OURS)
    cpp = sum(cpp_lines((ROOT / name).read_text()) for name in SHIPPED if name.endswith((".cpp", ".h")))
    assert python < 1000
    assert cpp <= 300
    assert f"{python} lines of Python and {cpp} of C++" in README


def test_line_counts_leave_out_what_is_no_code() -> None:
    assert (
        code_lines('"""Doc\nstring."""\n\n# comment\nx = 1  # why\n\n\ndef f():\n    """Doc."""\n    return "a\\nb"\n')
        == 3
    )
    assert cpp_lines("// a\n\n/* b\nc */\nint x; // d\n  /* e */ int y;\n") == 2


def test_direction_of_imports() -> None:
    names = {module(name) for name in OURS}
    for name in OURS:
        imported = set()
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        assert imported & names <= MAY_IMPORT.get(module(name), set()), name


def test_no_global_and_no_sys_path() -> None:
    for name in OURS:
        source = (ROOT / name).read_text()
        assert not any(isinstance(node, ast.Global) for node in ast.walk(ast.parse(source))), name
        assert "sys.path" not in source, name


def test_dependencies_are_three() -> None:
    wanted = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line]
    assert [re.split("[<>=]", line)[0] for line in wanted] == ["torch", "sentencepiece", "huggingface_hub"]
    allowed = (
        {"torch", "sentencepiece", "huggingface_hub"}
        | sys.stdlib_module_names
        | {module(n).split(".")[0] for n in OURS}
    )
    for name in OURS:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {m.split(".")[0] for m in modules} <= allowed, name


def readme_commands() -> list[list[str]]:
    """Every python and torchrun line of the README's code blocks, as words; a torchrun line loses its own flags."""
    commands = []
    for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", README, flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(("python ", "torchrun ")):
                commands.append(shlex.split(line.replace("$DEVICE", "cpu"), comments=True))
    return commands


def test_the_readme_has_commands() -> None:
    assert len(readme_commands()) >= 4


@pytest.mark.parametrize("words", readme_commands(), ids=" ".join)
def test_every_readme_command_parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = next(word for word in words if word.endswith(".py") or word.startswith(("scripts.", "tests.")))
    if script.startswith("tests/"):
        assert (ROOT / script).is_file()
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser) -> None:
        parse(parser, words[words.index(script) + 1 :])
        raise InterruptedError("parsed")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(InterruptedError, match="parsed"):
        importlib.import_module(module(script)).main()


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / name).exists(), name
