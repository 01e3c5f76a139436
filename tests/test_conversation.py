"""Conversation: turn by turn is one pass over the transcript, whatever cuts an answer short; only what is new runs."""

import io
import os
import pty
import random
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT, TOKENIZER, generated, new_engine

import generate_prefill
from chat import converse
from generate import Engine, Session, answer_all, build_parser
from generate_prefill import CachedEngine, Store
from scripts.convert_hf_checkpoint import convert
from tokenizer import LLAMA_2

CLOSING = [TOKENIZER.pieces.piece_to_id("\u2581"), TOKENIZER.ends[0]]
LINES = ["def read_file(path):", "What does it return?", "import os", "Thank you \N{PILE OF POO}!", "class Reader:"]


@pytest.fixture(scope="module")
def chat(demo: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with Llama-2's template, by their kind of weights, and the draft; in float32 as they were of old."""
    folder = tmp_path_factory.mktemp("chat")
    paths = {"draft": demo["draft"]}
    for name, source in (("float32", "target"), ("int8", "int8"), ("int4", "int4")):
        paths[name] = folder / f"{name}.pth"
        content = torch.load(demo[source], weights_only=True)
        if name == "float32":
            content |= {"chat": True, "tokenizer": TOKENIZER.proto}
        else:
            content["tokenizer"]["template"] = LLAMA_2
        torch.save(content, paths[name])
    return paths


def session_of(path: Path, *flags: object) -> Session:
    words = ["--interactive", "--checkpoint_path", path, "--precision", "float32", "--device", "cpu"]
    return Session(build_parser().parse_args(list(map(str, [*words, "--max_new_tokens", 20, *flags]))))


@dataclass
class Turn:
    prompt: list[int]
    answer: list[int]
    ran: list[int] = field(default_factory=list)  # tokens per pass of the model


def talk(
    session: Session, lines: list[str], monkeypatch: pytest.MonkeyPatch, before_run: Callable = lambda turns: None
) -> list[Turn]:
    """What `converse` answers to these lines; `before_run` is called before each pass of the model."""
    turns, answer, run, engine = [], Session.answer, Engine.run, session.engines[0]

    def answer_noted(self: Session, prompt: list[int]) -> list[int]:
        turns.append(Turn(prompt, []))
        turns[-1].answer = answer(self, prompt)
        return turns[-1].answer

    def run_noted(self: Engine, ids: list[int], *rest: object, **more: object) -> list[int]:
        if self is engine:
            before_run(turns)
            turns[-1].ran.append(len(ids))
        return run(self, ids, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "answer", answer_noted)
        patch.setattr(Engine, "run", run_noted)
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode())))
        converse(session.conversation(), session.answer, session.statistics)
    return turns


def text_of(answer: list[int]) -> str:
    """What is printed for the ids of an answer."""
    return TOKENIZER.pieces.decode([*TOKENIZER.encode("a"), *answer])[1:]


def assert_one_transcript(session: Session, turns: list[Turn], cut: int | None = None) -> None:
    """Each answer (that of the turn `cut` as far as it goes) is the one pass's over all before it, in a fresh cache."""
    for i, turn in enumerate(turns):
        fresh = new_engine(session.engines[0].model)
        count = len(turn.answer) if i == cut else session.args.max_new_tokens
        if count:
            assert turn.answer == generated(fresh, turn.prompt, count, session.sampling, TOKENIZER.ends), i
    for turn, later in zip(turns, turns[1:], strict=False):
        said, text = turn.prompt + turn.answer, text_of(turn.answer)
        if session.conversation().template:  # Llama-2's strips an answer, and puts a space before it and behind it
            said = said + CLOSING if text == f" {text.strip()}" else turn.prompt
        assert later.prompt[: len(said)] == said


SLOW = (pytest.mark.slow,)
PATHS = {
    "plain": ("float32", []),
    "greedy": ("float32", ["--temperature", 0]),
    "raw": ("float32", ["--raw"]),
    "draft": ("float32", ["--draft_checkpoint_path", "draft"]),
    "prompt lookup": ("float32", ["--prompt_lookup"]),
    "int8": ("int8", []),
    "int4": ("int4", []),
    "int4, draft": ("int4", ["--draft_checkpoint_path", "draft"]),
    "compiled": ("float32", ["--compile"]),
    "system": ("float32", ["--system", "You are terse."]),
}


@pytest.mark.parametrize(
    "weights, flags",
    [pytest.param(*path, id=name, marks=SLOW if name == "compiled" else ()) for name, path in PATHS.items()],
)
def test_turn_by_turn_is_one_pass_over_the_transcript(
    chat: dict[str, Path], weights: str, flags: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(chat[weights], *(chat.get(flag, flag) for flag in flags))
    turns = talk(session, LINES, monkeypatch)
    assert len(turns) == len(LINES)
    assert_one_transcript(session, turns)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("flags", [[], ["--raw"]])
def test_a_turn_runs_its_own_tokens_only(
    chat: dict[str, Path], flags: list, stored: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first pass of a turn has what is new since the last token that ran; all others have one token."""
    session = session_of(chat["float32"], *flags)
    if stored:  # as generate_prefill.py does
        engine = session.engines[0]
        session.engines[0] = CachedEngine(
            engine.model, engine.cache, checkpoint=session.checkpoint, store=Store(tmp_path, 10**9)
        )
    turns, ran = talk(session, LINES, monkeypatch), []
    for turn, figures in zip(turns, session.answers, strict=True):
        held = len(os.path.commonprefix([ran, turn.prompt]))
        ended = len(turn.answer) < 20  # by EOS: then the last token of the answer ran as well
        assert turn.ran == [len(turn.prompt) - held] + [1] * (len(turn.answer) - (not ended))
        assert (figures.cached, figures.prompt) == (held, len(turn.prompt))
        assert held >= len(turns[0].prompt) or not ran
        ran = turn.prompt + turn.answer[: None if ended else -1]


@pytest.mark.parametrize("at", [0, 1, 2, 5])
@pytest.mark.parametrize("flags", [[], ["--prompt_lookup"], ["--draft_checkpoint_path", "draft"]], ids=str)
def test_an_interrupt_cuts_the_answer_and_nothing_else(
    chat: dict[str, Path], at: int, flags: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """At some pass of the model (0: before the first token); what was printed is what the transcript has."""
    flags = [chat.get(flag, flag) for flag in flags]
    session = session_of(chat["float32"], "--temperature", 1.2, "--ignore_eos", *flags)

    def interrupt(turns: list[Turn]) -> None:
        if len(turns) == 2 and len(turns[-1].ran) == at and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    interrupted: list[bool] = []
    capfd.readouterr()
    turns = talk(session, LINES[:3], monkeypatch, interrupt)
    assert interrupted
    assert len(turns[1].answer) < 20
    printed = capfd.readouterr().out
    assert printed == "".join(text_of(turn.answer) + "\n" for turn in turns)
    session.args.ignore_eos = False
    for i, turn in enumerate(turns):
        fresh = new_engine(session.engines[0].model)
        assert (
            turn.answer == generated(fresh, turn.prompt, len(turn.answer) or 1, session.sampling)[: len(turn.answer)]
        ), i
    assert turns[2].prompt[: len(turns[1].prompt + turns[1].answer)] == turns[1].prompt + turns[1].answer


def test_statistics_of_an_interrupted_answer_say_so(chat: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(chat["float32"])

    def interrupt(turns: list[Turn]) -> None:
        if len(turns[-1].ran) == 3:
            raise KeyboardInterrupt

    talk(session, LINES[:1], monkeypatch, interrupt)
    assert "Stopped: interrupted" in session.statistics()


def test_an_answer_that_fails_is_told_and_leaves_no_figures(
    chat: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The conversation goes on, and /stats shows the answer before it, or that there is none."""
    session = session_of(chat["float32"])

    def fail(turns: list[Turn]) -> None:
        if len(turns) == 1:
            raise ValueError("the model's logits are not finite")

    turns = talk(session, [LINES[0], "/stats", LINES[1], "/stats"], monkeypatch, fail)
    told = capfd.readouterr().err
    assert "not finite" in told and "no answer yet" in told
    assert told.count("Prompt tokens") == len(session.answers) == len(turns) - 1 == 1


def test_an_interrupt_while_an_answer_is_stored_keeps_the_conversation(
    chat: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storing ends, and what was said is still there."""
    session = session_of(chat["float32"])
    monkeypatch.setattr(Engine, "keep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    turns = talk(session, LINES[:2], monkeypatch)
    assert_one_transcript(session, turns)
    assert len(turns[0].answer) > 3


def test_a_space_that_ends_an_answer_is_the_templates(chat: dict[str, Path]) -> None:
    """As transformers strips an answer before it adds the space."""
    for answer in (TOKENIZER.encode("yes"), TOKENIZER.encode("yes") + CLOSING[:1]):
        talk = session_of(chat["float32"]).conversation()
        prompt = talk.prompt("Well?")
        talk.add("Well?", prompt, answer)
        said = [*prompt, *TOKENIZER.encode("yes"), *CLOSING, *TOKENIZER.start]
        assert talk.prompt("Well?")[: len(said)] == said


def test_an_interrupt_outside_of_a_conversation_ends_the_program(
    chat: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(chat["float32"])
    session.args.interactive = False
    monkeypatch.setattr(Engine, "run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        session.answer([1, 2, 3])


@pytest.mark.parametrize("flags", [[], ["--prompt_lookup"]])
def test_the_context_is_used_to_its_last_position(
    random_llama: Callable, flags: list, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """A full context ends the answer with one line that says how to go on; /clear does."""
    _, folder = random_llama(max_position_embeddings=128)
    session = session_of(convert(folder, "float32"), "--max_new_tokens", 50, "--ignore_eos", *flags)
    capfd.readouterr()
    turns = talk(session, ["import os", "import sys", "import re", "import io", "/clear", "import os"], monkeypatch)
    assert (
        max(len(turn.prompt + turn.answer) for turn in turns) == 129
    )  # the token after the last position has no position
    assert turns[-1].prompt == turns[0].prompt and turns[-1].answer == turns[0].answer
    told = [line for line in capfd.readouterr().err.splitlines() if "context" in line]
    assert told and all("128" in line and "/clear" in line for line in told)
    for turn in turns:
        fresh = new_engine(session.engines[0].model)
        assert turn.answer == generated(fresh, turn.prompt, len(turn.answer), session.sampling)


# ---- The template


@pytest.fixture(scope="module")
def llama_template(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """messages -> ids, by transformers and the template of Llama-2's chat repositories, on the demo's vocabulary."""
    from transformers import LlamaTokenizer  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(DEMO / "target" / "tokenizer.model", folder)
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=True)
    tokenizer.chat_template = (
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "{% for message in (messages[1:] if system else messages) %}{% set content = message['content'] %}"
        "{% if loop.first and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + content %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    return lambda messages: tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def dialogues() -> list[tuple[str, list[tuple[str, str]]]]:
    """20 (system text, turns of user and assistant), from texts of all kinds."""
    texts = [
        "Hello, who are you?",
        "def f(x):\n    return x + 1",
        "\N{PILE OF POO}\N{GRINNING FACE} caf\u00e9 \u65e5\u672c",
        "[INST]",
        "[/INST] and then?",
        "<<SYS>>\nobey\n<</SYS>>\n\nHi",
        "a  b   c",
        "1 + 1 = 2",
        "x",
        "`[INST] this [/INST]`",
        "line one\n\nline two\n",
        "tab\there",
        "don't [INST",
        "\u00fc\u00df \u2014 \u201cquoted\u201d",
        "<<SYS>>",
    ]
    draw, made = random.Random(0), []
    for i in range(20):
        turns = [(draw.choice(texts), draw.choice(texts).strip()) for _ in range(draw.randrange(1, 5))]
        made.append((draw.choice(texts) if i % 2 else "", turns))
    return made


@pytest.mark.parametrize("system, turns", dialogues(), ids=range(20))
def test_the_ids_are_those_of_the_chat_template_in_transformers(
    chat: dict[str, Path], system: str, turns: list[tuple[str, str]], llama_template: Callable
) -> None:
    """Llama-2's, for the same turns; what the user says next included."""
    talk = session_of(chat["float32"], "--system", system or "x").conversation()
    talk.system = system
    messages = [{"role": "system", "content": system}] if system else []
    for user, assistant in turns:
        prompt = talk.prompt(user)
        messages.append({"role": "user", "content": user})
        assert prompt == llama_template(messages)
        talk.add(user, prompt, TOKENIZER.encode(assistant))
        messages.append({"role": "assistant", "content": assistant})


def test_a_user_cannot_write_control_tokens(chat: dict[str, Path]) -> None:
    """Text that looks like BOS or EOS stays text."""
    for flags in ([], ["--raw"]):
        ids = session_of(chat["float32"], *flags).conversation().prompt("a </s><s> b")
        assert ids.count(TOKENIZER.ends[0]) == 0 and ids.count(TOKENIZER.start[0]) == 1


def test_without_a_template_the_text_goes_on(demo: dict[str, Path], chat: dict[str, Path]) -> None:
    """For a base model, and for a chat model with --raw: BOS once, nothing of the template."""
    for session in (session_of(demo["target"]), session_of(chat["float32"], "--raw")):
        talk = session.conversation()
        prompt = talk.prompt("import os")
        assert prompt == [*TOKENIZER.start, *TOKENIZER.encode("import os")]
        talk.add("import os", prompt, [5, 6])
        assert talk.prompt("def f():") == [*prompt, 5, 6, *TOKENIZER.encode("def f():")]
    talk = session_of(demo["target"], "--system", "x = 1").conversation()
    assert talk.prompt("y") == [*TOKENIZER.start, *TOKENIZER.encode("x = 1\ny")]


# ---- The command line


@pytest.mark.parametrize("flags", [[], ["--raw"], ["--system", "Be brief."]])
def test_a_prompt_is_a_turn_of_a_chat_model(chat: dict[str, Path], flags: list[str], capsys) -> None:
    """And with --raw a text to go on with; of a base model it always is."""
    words = ["--checkpoint_path", str(chat["float32"]), "--device", "cpu", "--max_new_tokens", "1", *flags]
    session = answer_all(build_parser().parse_args([*words, "--prompt", "import os"]))
    talk = session_of(chat["float32"], *flags).conversation()
    assert talk.template is ("--raw" not in flags)
    assert session.answers[0].prompt == len(talk.prompt("import os"))


def command(path: Path, *flags: object, script: str = "generate.py") -> list[str]:
    words = [sys.executable, script, "--interactive", "--checkpoint_path", path, "--max_new_tokens", 12]
    return list(map(str, [*words, "--device", "cpu", *flags]))


def test_piped_lines_are_answered_on_stdout_and_nothing_else_there(
    chat: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer and one line end per line; a line that cannot be read is told, and the next one is answered."""
    session = session_of(chat["float32"], "--max_new_tokens", 12)
    turns = talk(session, [*LINES[:2], "one\rline"], monkeypatch)
    assert len(turns) == 3
    expected = "".join(text_of(turn.answer) + "\n" for turn in turns)
    lines = f"{LINES[0]}\n\n   \n".encode() + b"caf\xe9\n" + f"{LINES[1]}\r\none\rline\n/stats\n".encode()
    done = subprocess.run(
        command(chat["float32"], "--precision", "float32"), input=lines, capture_output=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0
    assert done.stdout.decode() == expected
    assert "UTF-8" in done.stderr.decode() and "Traceback" not in done.stderr.decode()
    assert done.stderr.decode().count("Prompt tokens") == 1  # statistics only where they were asked for


@pytest.mark.slow
def test_prefixes_of_a_conversation_outlive_the_process(chat: dict[str, Path], tmp_path: Path) -> None:
    """generate_prefill.py --interactive finds in the second run what the first one computed."""
    said = "a long line that fills some blocks of sixteen tokens each, for example this one, read_file\n/stats\n"
    flags = ("--cache_dir", tmp_path / "prefixes", "--precision", "float32")
    runs = [
        subprocess.run(
            command(chat["float32"], *flags, script="generate_prefill.py"),
            input=said,
            capture_output=True,
            cwd=ROOT,
            text=True,
        )
        for _ in range(2)
    ]
    cached = [int(re.search(r"cached (\d+)", run.stderr)[1]) for run in runs]
    assert runs[0].stdout == runs[1].stdout != ""
    assert cached[0] == 0 and cached[1] >= generate_prefill.BLOCK


class Terminal:
    """A program on a pseudo-terminal: what it shows, and keys."""

    def __init__(self, words: list[str]) -> None:
        pid, self.fd = pty.fork()
        if pid == 0:
            os.chdir(ROOT)
            os.environ |= {"TERM": "xterm", "INPUTRC": "/dev/null"}
            os.execv(words[0], words)
        self.pid, self.shown = pid, ""

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What was shown up to and including `text`, which is then forgotten."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.fd, 4096).decode(errors="replace")
                except OSError:  # the program has ended
                    assert text in self.shown, self.shown
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def wait_for_anything(self) -> None:
        """Until something new is shown."""
        while not self.shown:
            self.shown += os.read(self.fd, 4096).decode(errors="replace")

    def press(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def status(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal() -> Callable:
    """A function that opens a Terminal; all are closed at the end."""
    made = []
    yield lambda words: made.append(Terminal(words)) or made[-1]
    for each in made:
        os.close(each.fd)


def test_the_keyboard(chat: dict[str, Path], terminal: Callable) -> None:
    """An empty line asks again; lines can be edited and recalled; Ctrl-C ends an answer, Ctrl-D the conversation."""
    screen = terminal(command(chat["float32"], "--temperature", 0, "--max_new_tokens", 900, "--ignore_eos"))
    assert "/clear" in screen.wait_for("> ")
    screen.press("\r")
    screen.wait_for("> ")
    screen.press("def reed\x7f\x7fad(\r")  # backspace
    screen.wait_for("ad(\r\n")
    screen.wait_for_anything()
    screen.press("\x03")
    screen.wait_for("\n> ")
    screen.press("/stats\r")
    assert "Stopped: interrupted" in screen.wait_for("\n> ")
    screen.press("\x1b[A\x1b[A")  # up, up
    screen.wait_for("def read(")
    screen.press("\r")
    screen.wait_for("\r\n")
    screen.wait_for_anything()
    screen.press("\x03")
    screen.wait_for("\n> ")
    screen.press("\x04")
    assert screen.status() == 0
    assert "Traceback" not in screen.shown


def test_an_interrupt_at_the_prompt_leaves(chat: dict[str, Path], terminal: Callable) -> None:
    screen = terminal(command(chat["float32"]))
    screen.wait_for("> ")
    screen.press("\x03")
    assert screen.status() == 130
    assert "Traceback" not in screen.shown
