"""A conversation in a terminal: its text until now, as token ids, and the lines that are typed."""

import sys
import terminal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import tp
from tokenizer import Tokenizer, text_decoder


@dataclass
class Conversation:
    """What was said, as token ids. What the template repeats keeps its ids, so the model's cache goes on from there."""

    tokenizer: Tokenizer
    context: int  # tokens that the model can take
    system: str  # comes before everything
    template: bool  # turns in the chat template; without, it is one text that goes on
    ids: list[int] = field(default_factory=list)
    messages: list[dict] = field(default_factory=list)  # the same, as the template is given it
    asked: str = ""  # what the template made of them before the last answer
    answer: list[int] = field(default_factory=list)  # the last of the ids

    def with_turn(self, text: str) -> list[dict]:
        """The messages so far and `text` of the user's, behind the system's where it is the first."""
        quote = self.tokenizer.quote
        first = [{"role": "system", "content": quote(self.system)}] if self.system else []
        return [*(self.messages or first), {"role": "user", "content": quote(text)}]

    def kept(self, rendered: str) -> tuple[int, int]:
        """How many of the ids say what `rendered` begins with, and how many of its characters that are.

        A template may strip an answer, or leave out what was thought in it; then those before it are kept.
        """
        if not rendered.startswith(self.asked):
            return 0, 0
        end = len(self.asked)
        kept = len(self.ids) - len(self.answer), end
        decoder = text_decoder()
        for count, token in enumerate(self.answer, kept[0] + 1):
            said = self.tokenizer.bytes_of(token)
            piece = decoder.decode(said)
            if not said or not rendered.startswith(piece, end):
                break
            end += len(piece)
            if not decoder.getstate()[0]:  # no byte of it waits
                kept = count, end
        return kept

    def prompt(self, text: str) -> list[int]:
        """The ids so far and of `text`, which the user says next. ValueError where the context has no room for them."""
        if self.template:
            rendered = self.tokenizer.render(self.with_turn(text))
            count, end = self.kept(rendered)
            ids = self.tokenizer.encode_rendered(rendered[end:], self.ids[:count])
        else:
            before = f"{self.system}\n" if self.system and not self.ids else ""
            ids = (self.ids or self.tokenizer.start) + self.tokenizer.encode(before + text)
        if not ids:
            raise ValueError(f"{text!r} is nothing that the model has tokens for: give some other text")
        if len(ids) > self.context:
            raise ValueError(f"{len(ids)} tokens, but a context of {self.context}: shorten them or --system, or /clear")
        return ids

    def add(self, text: str, prompt: list[int], answer: list[int]) -> None:
        """Go on behind the `answer` to `text`, of which `prompt` made a prompt."""
        if self.template:
            messages = self.with_turn(text)
            self.asked = self.tokenizer.render(messages)
            self.messages = [*messages, {"role": "assistant", "content": self.tokenizer.message(answer)}]
        self.ids = prompt + answer
        self.answer = answer

    def cleared(self) -> "Conversation":
        """One in which nothing was said."""
        return replace(self, ids=[], messages=[], asked="", answer=[])


def listen() -> str | None:
    """The next line of standard input, stripped; None at its end."""
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    with suppress(EOFError):
        return input(prompt).strip()


def converse(talk: Conversation, answer: Callable[[list[int]], list[int]], statistics: Callable[[], str]) -> None:
    """Answer the lines of standard input; `answer` (prompt) prints, and returns the ids that follow a prompt.

    End of input ends it, and so does Ctrl-C. But during an answer Ctrl-C ends that answer only, and the words stay.
    """
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
    if talk.system and not talk.ids:
        talk.prompt("")  # ValueError now, if it leaves no room
    if sys.stdin.isatty():
        with suppress(ImportError):  # input() then edits the line, and has a history
            import readline  # noqa: F401, PLC0415
        print("/clear starts anew, /stats shows the last answer's figures, Ctrl-D leaves", file=sys.stderr)
    while (line := tp.agree(listen)) is not None:
        try:
            if line == "/clear":
                talk = talk.cleared()
            elif line == "/stats":
                print(statistics(), file=sys.stderr)
            elif line:
                text = terminal.decode_text(line.encode("utf-8", "surrogateescape"), "what was said")
                prompt = talk.prompt(text)
                talk.add(text, prompt, answer(prompt))
                if len(talk.ids) >= talk.context:
                    print(f"the context of {talk.context} tokens is full: /clear starts anew", file=sys.stderr)
        except ValueError as error:
            print(error, file=sys.stderr)
