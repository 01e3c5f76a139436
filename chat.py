"""A conversation in a terminal."""

import sys
from contextlib import suppress

import utils

import tp
from tokenizer import Tokenizer

HELP = "/clear starts anew, /stats shows the last answer's figures, /exit or Ctrl-D leaves"


class Conversation:
    """Messages, and the prompt that they make. Without a chat template they are one text that goes on."""

    def __init__(self, tokenizer: Tokenizer, max_seq_length: int, system: str, use_chat_template: bool) -> None:
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.system = system
        self.use_chat_template = use_chat_template
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self.messages = [self.message("system", self.system)] if self.system else []

    def message(self, role: str, text: str) -> dict:
        """A message of text that somebody wrote, in which nothing is a special token."""
        return {"role": role, "content": self.tokenizer.escape(text)}

    def prompt(self, text: str, special_tokens: bool = False) -> list[int]:
        """Token ids of the messages so far and of `text`, which the user says next. ValueError if they do not fit.

        With `special_tokens` the spelling of an added token in `text` is that token.
        """
        question = {"role": "user", "content": text} if special_tokens else self.message("user", text)
        messages = [*self.messages, question]
        if self.use_chat_template:
            ids = self.tokenizer.apply_chat_template(messages)
        else:
            texts = [message["content"] for message in messages]
            if self.system:
                texts[:2] = ["\n".join(texts[:2])]
            ids = self.tokenizer.bos_ids + self.tokenizer.encode(*texts)
        if not ids:
            raise ValueError(f"{text!r} has no tokens in this vocabulary: give some other text")
        if len(ids) > self.max_seq_length:
            problem = f"{len(ids)} tokens, but a context of {self.max_seq_length}"
            raise ValueError(f"{problem}: shorten them or --system, or /clear")
        return ids

    def add(self, text: str, answer: str) -> None:
        """Append what the user said, and the `answer` as Tokenizer.decode returns it."""
        if self.use_chat_template and "model_proto" in self.tokenizer.model:
            answer = answer.removeprefix(" ")  # the space that sentencepiece puts before a text
        self.messages += [self.message("user", text), {"role": "assistant", "content": answer}]


def read_line() -> str | None:
    """The next line of standard input, stripped; None at its end."""
    with suppress(EOFError):
        return input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "").strip()


def chat(session) -> None:
    """Answer the lines of standard input with a generate.Session, until they end or until Ctrl-C.

    During an answer, Ctrl-C ends that answer only.
    """
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
    if session.system:
        session.conversation.prompt("")  # ValueError now, if it leaves no room
    if sys.stdin.isatty():
        with suppress(ImportError):  # gives input() line editing and a history
            import readline  # noqa: F401, PLC0415
        print(HELP, file=sys.stderr)
    while (line := tp.from_rank(read_line)) not in (None, "/exit", "/quit", "/bye"):
        try:
            if line == "/clear":
                session.conversation.clear()
            elif line in ("/stats", "/help"):
                print(HELP if line == "/help" else session.statistics, file=sys.stderr)
            elif line:
                answer_line(session, line)
        except ValueError as error:
            print(error, file=sys.stderr)


def answer_line(session, line: str) -> None:
    """Answer one line. An answer that fails or is empty leaves the conversation as it was."""
    with utils.reading("the line", "give some text in UTF-8"):
        text = utils.decode_text(line.encode("utf-8", "surrogateescape"))
    answer = session.answer(session.conversation.prompt(text))
    if answer:
        session.conversation.add(text, answer)
    if session.finish_reason.startswith("limit"):  # of --max_new_tokens, or of the context
        print(f"the answer was cut at its {session.finish_reason}: /clear starts anew", file=sys.stderr)
