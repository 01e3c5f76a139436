"""Text to token ids and back: both kinds of tokenizer, chat templates, text that is streamed as it comes."""

import codecs
import json
import re
import terminal
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby

import sentencepiece
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

# One replacement character for each byte that belongs to none, as sentencepiece has it.
codecs.register_error("replace each byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))
# Appended to a sentencepiece model: it puts no space before a text, and takes none away.
AS_IT_IS = b"\x1a\x04\x18\x00\x20\x00"
QUOTE = "\udfff"  # before a character: no token begins there that is not of the vocabulary. No text in UTF-8 has it
# GPT-2's character for each byte: itself where it is printable, the others from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = {byte: byte for byte in PRINTABLE}
ALPHABET |= {byte: 256 + i for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
BYTES = {character: byte for byte, character in ALPHABET.items()}
# The template of checkpoints that were converted when there was no other.
# https://github.com/meta-llama/llama/blob/main/llama/generation.py, chat_completion
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.index == 2 and messages[0].role == 'system' %}<<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n"
    "{% endif %}{{ m.content | trim }} [/INST]{% elif m.role == 'assistant' %} {{ m.content | trim }} "
    "{{ eos_token }}{% endif %}{% endfor %}"
)


def any_of(texts: Iterable[str]) -> str:
    """A regular expression for the longest of `texts` that stands somewhere; of none, one that nothing matches."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def refuse(message: str) -> None:
    """What a template calls as raise_exception."""
    raise TemplateError(message)


@dataclass
class Tokenizer:
    """A sentencepiece model, and what else a repository says of texts. Any exception of sentencepiece's if it is none.

    A model of byte-level BPE has GPT-2's characters for bytes, and as its last piece the one for what is unknown.
    """

    proto: bytes
    added: dict[str, int]  # tokens that are not of the vocabulary, by their text
    special: list[str]  # those of them that an answer does not show
    bos: str
    eos: str
    begins: bool  # with `bos`: a text that has no template
    ends: list[int]  # tokens that end an answer
    template: str | None = None  # of a chat, in Jinja
    splits: list[str] | None = None  # regular expressions that cut a text for byte-level BPE; None: sentencepiece
    whole_words: bool = False  # a part that is a token is not put together by merges
    legacy: bool = True  # sentencepiece puts a space before a text behind an added token, too

    def __post_init__(self) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.proto)
        self.inner = sentencepiece.SentencePieceProcessor(model_proto=self.proto + AS_IT_IS)
        self.size = self.pieces.vocab_size()
        if self.splits is not None:
            self.size -= 1
            self.cuts = [re.compile(f"({split})", re.MULTILINE) for split in self.splits]
            unknown = [byte for byte, code in ALPHABET.items() if self.pieces.piece_to_id(chr(code)) == self.size]
            self.alphabet = ALPHABET | dict.fromkeys(unknown)  # the library tokenizers leaves these bytes out
        self.added_ids = set(self.added.values())
        self.start = [self.added[self.bos]] if self.begins and self.bos in self.added else []
        self.tokens = re.compile(f"(?<!{QUOTE})({any_of(self.added)})")
        self.control = re.compile(any_of(filter(self.controls, self.added)))
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        sandbox.add_extension("jinja2.ext.loopcontrols")
        sandbox.globals |= {"raise_exception": refuse, "bos_token": self.bos, "eos_token": self.eos}
        sandbox.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        self.chat = sandbox.from_string(self.template or "")

    def controls(self, text: str) -> bool:
        """Whether the added token `text` may control a chat: it is special, ends answers, or looks like markup."""
        known = text in self.special or self.added[text] in self.ends or text in (self.template or "")
        return known or (text[0] in "<[" and text[-1] in ">]")

    def quote(self, text: str) -> str:
        """`text` as it may stand in a rendered template: none of the tokens that control a chat is in it."""
        return self.control.sub(lambda found: "".join(QUOTE + character for character in found[0]), text)

    def render(self, messages: list[dict]) -> str:
        """The chat template of `messages` with `role` and quoted `content`, up to where the next answer begins.

        As transformers renders it, but without a clock: the same text every day.
        """
        with terminal.reading("the chat template", "--raw does without it"):
            return self.chat.render(messages=messages, add_generation_prompt=True, tools=None, documents=None)

    def encode_rendered(self, text: str, before: list[int] = ()) -> list[int]:
        """The ids `before` and those of a rendered text behind them, with the added tokens in it."""
        ids = list(before)
        for part in self.tokens.split(text):
            if part in self.added:
                ids.append(self.added[part])
            elif part:
                begins = not ids or (self.legacy and ids[-1] in self.added_ids)
                ids += self.encode_part(part.replace(QUOTE, ""), self.pieces if begins else self.inner)
        return ids

    def beginning(self, ids: list[int], size: int) -> list[int]:
        """Ids of the first `size` bytes of what `ids` say: of these the first, and anew what they do not say alone."""
        said = b"".join(map(self.bytes_of, ids))[:size]
        ends = [0, *accumulate(len(self.bytes_of(token)) for token in ids)]
        count = bisect_right(ends, size) - 1
        while count > 0 and ends[count] < size and said[ends[count]] >> 6 == 0b10:  # it goes on within a character
            count -= 1
        return ids[:count] + self.encode_part(said[ends[count] :].decode(errors="ignore"), self.inner)

    def encode_part(self, text: str, pieces: sentencepiece.SentencePieceProcessor) -> list[int]:
        """The ids of a text by the vocabulary alone."""
        if self.splits is None:
            return pieces.encode(text)
        parts = [text]
        for cut in self.cuts:
            parts = [part for each in parts for part in cut.split(each) if part]
        words = [part.encode().decode("latin-1").translate(self.alphabet) for part in parts]
        found = pieces.encode(words, num_threads=1)
        if self.whole_words:
            tokens = pieces.piece_to_id(words)
            other = self.added_ids | {self.size}
            found = [ids if token in other else [token] for ids, token in zip(found, tokens, strict=True)]
        return [token for ids in found for token in ids]

    def encode(self, text: str) -> list[int]:
        """The ids of what somebody wrote, nothing added; the spelling of a special token stays text."""
        return self.encode_rendered(self.quote(text))

    def bytes_of(self, token: int) -> bytes:
        """The bytes that `token` adds to a text in UTF-8."""
        piece = self.pieces.id_to_piece(token)
        if piece in self.added:
            return b"" if piece in self.special else piece.encode()
        if self.splits is not None:
            return piece.translate(BYTES).encode("latin-1", "replace")
        if self.pieces.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        return self.inner.decode([token]).encode()

    def message(self, ids: list[int]) -> str:
        """The text of an answer as a template is given it, quoted, without the space that sentencepiece begins it with.

        An added token that is shown stays one; it is no spelling of it.
        """
        text = ""
        for added, run in groupby(ids, lambda token: token in self.added_ids):
            said = b"".join(map(self.bytes_of, run)).decode("utf-8", "replace each byte")
            text += said if added else self.quote(said)
        return text.removeprefix(" ") if self.splits is None else text

    def vocabulary(self) -> list[str]:
        """All pieces, by id."""
        return [self.pieces.id_to_piece(token) for token in range(self.size)]


def of_sentencepiece(proto: bytes, template: str | None = None) -> Tokenizer:
    """The tokenizer of a sentencepiece model of which nothing else is known. ValueError where it has no BOS or EOS."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    ends = [pieces.bos_id(), pieces.eos_id()]
    if min(ends) < 0:
        raise ValueError(f"the ids of BOS and EOS are {ends}, but a model of text has both")
    bos, eos = map(pieces.id_to_piece, ends)
    added = dict(zip([bos, eos], ends, strict=True))
    return Tokenizer(proto, added, [bos, eos], bos, eos, begins=True, ends=ends[1:], template=template)


def text_decoder() -> codecs.IncrementalDecoder:
    """Bytes of tokens in, text out as soon as it is certain: those that the next may complete to a character wait.

    decode(b"", True) gives the rest, when no more tokens come.
    """
    return codecs.getincrementaldecoder("utf-8")("replace each byte")
