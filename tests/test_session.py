"""--session: a conversation is left and taken up; its file is private, whole, and refused where it is not ours."""

import hashlib
import io
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOKENIZER
from test_conversation import chat, session_of  # noqa: F401  a fixture

from chat import converse
from generate_prefill import SavedConversation

SCRIPT = ROOT / "generate_prefill.py"


def say(path: Path, folder: Path, lines: list[str], *flags: object, **more: object) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, "--checkpoint_path", path, "--interactive", "--session", folder / "talk"]
    command += ["--max_new_tokens", 12, "--precision", "float32", "--cache_dir", folder, *flags]
    text = "".join(f"{line}\n" for line in lines)
    return subprocess.run(list(map(str, command)), input=text, capture_output=True, text=True, cwd=ROOT, **more)


@pytest.fixture(scope="module")
def left(chat, tmp_path_factory) -> Path:  # noqa: F811
    """The folder of a conversation that was left after two turns."""
    folder = tmp_path_factory.mktemp("session")
    say(chat["float32"], folder, ["def read_file(path):", "What does it return?"], check=True)
    return folder


def test_a_conversation_is_taken_up_where_it_was_left(chat, left: Path, tmp_path: Path) -> None:  # noqa: F811
    """The third answer is that of a conversation that was never left, and what was said before does not run again."""
    lines = ["def read_file(path):", "What does it return?", "import os"]
    at_once = say(chat["float32"], tmp_path, lines)
    (tmp_path / "again").mkdir()
    copy = tmp_path / "again" / "talk"
    copy.write_bytes((left / "talk").read_bytes())
    taken_up = say(chat["float32"], copy.parent, [lines[2], "/stats"], "--cache_dir", left)
    assert at_once.returncode == taken_up.returncode == 0
    assert at_once.stdout.endswith(taken_up.stdout) and taken_up.stdout.strip()
    assert "going on behind" in taken_up.stderr
    (said,) = re.findall(r"Prompt tokens: (\d+) \(cached (\d+) of", taken_up.stderr)
    prompt, cached = map(int, said)
    assert prompt - cached < 40 and cached >= 32
    assert copy.read_bytes() == (tmp_path / "talk").read_bytes()  # whichever way


@pytest.mark.slow
def test_the_file_is_private_and_follows_a_link(chat, left: Path, tmp_path: Path) -> None:  # noqa: F811
    assert stat.S_IMODE((left / "talk").stat().st_mode) == 0o600
    (tmp_path / "there").mkdir()
    (tmp_path / "talk").symlink_to(tmp_path / "there" / "talk")
    assert say(chat["float32"], tmp_path, ["import os"]).returncode == 0
    assert (tmp_path / "talk").is_symlink()
    assert stat.S_IMODE((tmp_path / "there" / "talk").stat().st_mode) == 0o600


@pytest.mark.slow
def test_clear_clears_the_file(chat, left: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "talk").write_bytes((left / "talk").read_bytes())
    assert say(chat["float32"], tmp_path, ["/clear"]).returncode == 0
    assert "going on behind 0 tokens" in say(chat["float32"], tmp_path, []).stderr


def damaged(data: bytes) -> dict[str, tuple[bytes, str]]:
    middle = len(data) // 2
    return {
        "a bit": (data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], "is damaged"),
        "cut": (data[:-7], "is damaged"),
        "only its head": (data[:40], "is damaged"),
        "longer": (data + b"x", "is damaged"),
        "newer": (data.replace(b"llama session 1", b"llama session 2", 1), "another version wrote"),
        "foreign": (b"# my diary\n", "is no session"),
        "empty": (b"", "is no session"),
        "of other fields": (SavedConversation.MAGIC + hashlib.sha256(b"{}").digest() + b"{}", "another version wrote"),
    }


def test_what_is_no_whole_session_is_refused_and_stays(chat, left: Path, tmp_path: Path) -> None:  # noqa: F811
    whole = (left / "talk").read_bytes()
    for content, says in damaged(whole).values():
        (tmp_path / "talk").write_bytes(content)
        talk = SavedConversation(TOKENIZER, 1024, "", True, path=tmp_path / "talk")
        with pytest.raises(ValueError, match=f"talk: .*{says}.*: name another file$"):
            talk.read()
        assert (tmp_path / "talk").read_bytes() == content
    done = say(chat["float32"], tmp_path, ["import os"])
    assert done.returncode == 1 and done.stdout == "" and (tmp_path / "talk").read_bytes() == content
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("Load time")]
    assert says in line and str(tmp_path / "talk") in line


@pytest.mark.slow
def test_another_model_or_system_is_refused(chat, demo, left: Path, tmp_path: Path) -> None:  # noqa: F811
    """But not the same model in fewer bits, whose ids are the same."""
    (tmp_path / "talk").write_bytes((left / "talk").read_bytes())
    content = torch.load(chat["int8"], weights_only=True)
    proto = content["tokenizer"]["proto"]
    content["tokenizer"]["proto"] = proto.replace(b"read", b"reed")
    torch.save(content, tmp_path / "other.pth")
    assert proto != content["tokenizer"]["proto"]
    for path, flags in (
        (tmp_path / "other.pth", []),
        (chat["float32"], ["--system", "Hi"]),
        (chat["float32"], ["--raw"]),
    ):
        done = say(path, tmp_path, ["import os"], *flags)
        assert done.returncode == 1
        assert "was begun with another model, --system or --raw: name another file" in done.stderr
    assert say(chat["int8"], tmp_path, ["import os"]).returncode == 0


def test_what_cannot_be_a_session_is_said_before_the_first_turn(tmp_path: Path) -> None:
    """A folder, a device that never ends, a pipe that nobody writes to, a ring of links, a folder that is not there."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    places = {
        tmp_path / "folder": "is no session",
        Path("/dev/zero"): "is no session",
        tmp_path / "pipe": "is no session",
    }
    places |= {tmp_path / "a": "symbolic links", tmp_path / "none" / "talk": "cannot be written .No such file"}
    for path, says in places.items():
        with pytest.raises(ValueError, match=f"{path}.*{says}.*: name another file$"):
            SavedConversation.take_up(TOKENIZER, 1024, "", False, path=path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b", "folder", "pipe"]


def test_what_a_killed_process_left_is_deleted(tmp_path: Path) -> None:
    (tmp_path / ".talk.123.tmp").write_bytes(b"words")
    SavedConversation.take_up(TOKENIZER, 1024, "", False, path=tmp_path / "talk")
    assert [each.name for each in tmp_path.iterdir()] == ["talk"]


def test_a_turn_that_cannot_be_saved_is_told(chat, tmp_path: Path, monkeypatch, capsys) -> None:  # noqa: F811
    """And the conversation goes on."""
    session = session_of(chat["float32"])
    folder, blank = tmp_path / "folder", session.conversation()
    folder.mkdir()
    settings = blank.tokenizer, blank.context, blank.system, blank.template
    talk = SavedConversation.take_up(*settings, path=folder / "talk")

    def answer(prompt: list[int]) -> list[int]:
        if folder.exists():
            folder.rename(tmp_path / "gone")
        return session.answer(prompt)

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"import os\n/clear\nimport sys\n")))
    converse(talk, answer, session.statistics)
    told = capsys.readouterr()
    assert told.err.count("the conversation is not saved: ") == told.err.count("talk cannot be written (No such") == 3
    assert len(told.out.strip().splitlines()) >= 2


def test_what_another_program_wrote_meanwhile_stays(tmp_path: Path, capsys) -> None:
    """A second process that goes on with the same file, or somebody's own words."""
    settings, path = (TOKENIZER, 1024, "", False), tmp_path / "talk"
    one, other = SavedConversation.take_up(*settings, path=path), SavedConversation.take_up(*settings, path=path)
    other.add("a", [1, 5], [6])
    for content in (path.read_bytes(), b"my diary"):
        path.write_bytes(content)
        one.add("b", [1, 7], [8])
        one.cleared()
        assert path.read_bytes() == content
        assert (
            capsys.readouterr().err.count(f"the conversation is not saved: {path} was changed by another program") == 2
        )
    path.unlink()
    one.add("c", [1, 7], [8])
    assert SavedConversation.take_up(*settings, path=path).ids == one.ids == [1, 7, 8]
