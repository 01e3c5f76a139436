"""A conversation in a terminal: its text until now, as token ids, and the lines that are typed."""

import sys
import terminal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import tp
from tokenizer import Tokenizer, closing_ids, turn_ids


@dataclass
class Conversation:
    """The ids of a conversation. The model's words are never tokenized again, so its cache goes on where it stands."""

    tokenizer: Tokenizer
    context: int  # tokens that the model can take
    system: str  # comes before everything
    template: bool  # turns in the chat template; without, it is one text that goes on
    ids: list[int] = field(default_factory=list)

    def prompt(self, text: str) -> list[int]:
        """The ids so far and of `text`, which the user says next. ValueError where the context has no room for them."""
        if self.template:
            ids = self.ids + turn_ids(self.tokenizer, text, self.system, first=not self.ids)
        else:
            before = f"{self.system}\n" if self.system and not self.ids else ""
            ids = (self.ids or [self.tokenizer.bos_id]) + self.tokenizer.encode(before + text)
        if len(ids) > self.context:
            raise ValueError(f"{len(ids)} tokens, but a context of {self.context}: shorten them or --system, or /clear")
        return ids

    def add(self, prompt: list[int], answer: list[int]) -> None:
        """Go on behind the `answer` to a `prompt`."""
        self.ids = prompt + answer
        if self.template:
            self.ids += closing_ids(self.tokenizer, answer)


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
    talk.prompt("")  # ValueError now, if --system leaves no room
    if sys.stdin.isatty():
        with suppress(ImportError):  # input() then edits the line, and has a history
            import readline  # noqa: F401, PLC0415
        print("/clear starts anew, /stats shows the last answer's figures, Ctrl-D leaves", file=sys.stderr)
    while (line := tp.agree(listen)) is not None:
        try:
            if line == "/clear":
                talk.ids = []
            elif line == "/stats":
                print(statistics(), file=sys.stderr)
            elif line:
                prompt = talk.prompt(terminal.decode_text(line.encode("utf-8", "surrogateescape"), "what was said"))
                talk.add(prompt, answer(prompt))
                if len(talk.ids) >= talk.context:
                    print(f"the context of {talk.context} tokens is full: /clear starts anew", file=sys.stderr)
        except ValueError as error:
            print(error, file=sys.stderr)
