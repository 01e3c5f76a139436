"""Text to token ids and back: sentencepiece or byte-level BPE, special tokens, chat templates, streamed text."""

import codecs
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from heapq import heappop, heappush
from itertools import groupby
from time import strftime

from utils import reading

import sentencepiece
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

# One replacement character for each byte that is not UTF-8, as sentencepiece has it.
codecs.register_error("replace each byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))
# normalizer_spec {add_dummy_prefix: false, remove_extra_whitespaces: false} in protobuf. Appended to a sentencepiece
# model it overrides the model's own settings: no space is put before a text, and none is removed.
NO_DUMMY_PREFIX = b"\x1a\x04\x18\x00\x20\x00"
# Written before each character of a special token that somebody typed, so that it is not read as that token. A lone
# surrogate, which no text in UTF-8 contains.
ESCAPE = "\udfff"
# Byte-level BPE spells each byte as a character, as GPT-2 does: itself if it is printable, or one from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
UNPRINTABLE = sorted(set(range(256)) - set(PRINTABLE))
BYTE_TO_CHAR = {byte: byte for byte in PRINTABLE} | {byte: 256 + i for i, byte in enumerate(UNPRINTABLE)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


class SentencePiece:
    """A tokenizer.model. Any exception of sentencepiece's if it is not one.

    With `is_metaspace` no space is put before a text that starts with one, as in HF tokenizers' Metaspace.
    """

    def __init__(self, model_proto: bytes, is_metaspace: bool = False) -> None:
        self.is_metaspace = is_metaspace
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
        self.processor_without_prefix = sentencepiece.SentencePieceProcessor(model_proto=model_proto + NO_DUMMY_PREFIX)
        self.vocab = [self.processor.id_to_piece(token) for token in range(self.processor.vocab_size())]

    def encode(self, text: str, add_prefix_space: bool) -> list[int]:
        """Token ids of a text, after a space if the model adds one."""
        add_prefix_space = add_prefix_space and not (self.is_metaspace and text.startswith((" ", "▁")))
        return (self.processor if add_prefix_space else self.processor_without_prefix).encode(text)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token of the vocabulary."""
        if self.processor.is_byte(token):
            return bytes([int(self.vocab[token][3:5], 16)])  # "<0x0A>"
        return self.processor_without_prefix.decode([token]).encode()


class ByteLevelBPE:
    """The model of a tokenizer.json: its vocabulary and merges, and the patterns that split a text into words.

    `vocab` is a JSON list of pieces by id, `merges` one of "left right", the first merge first.
    """

    def __init__(self, vocab: str, merges: str, pre_tokenizer_patterns: list[str], ignore_merges: bool) -> None:
        self.vocab = json.loads(vocab)
        self.ids = {piece: token for token, piece in enumerate(self.vocab)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(json.loads(merges))}
        self.patterns = [re.compile(f"({pattern})", re.MULTILINE) for pattern in pre_tokenizer_patterns]
        self.ignore_merges = ignore_merges  # a word that is a token is that token, whatever the merges
        self.encode_word = lru_cache(2**16)(self.merge)

    def merge(self, word: str) -> list[int]:
        """Merge the two neighbours whose merge comes first, again and again. https://arxiv.org/abs/1508.07909

        A heap of pairs and a linked list of parts, so that a long word takes n log n steps.
        """
        if self.ignore_merges and word in self.ids:
            return [self.ids[word]]
        parts = [character for character in word if character in self.ids]  # HF tokenizers drops the others, too
        following = list(range(1, len(parts) + 1))
        preceding = list(range(-1, len(parts)))
        heap = []

        def push(i: int, j: int) -> None:
            if i >= 0 and j < len(parts) and (parts[i], parts[j]) in self.ranks:
                pair = parts[i], parts[j]
                heappush(heap, (self.ranks[pair], i, pair))

        for i, j in enumerate(following):
            push(i, j)
        while heap:
            _, i, pair = heappop(heap)
            j = following[i]
            if j < len(parts) and pair == (parts[i], parts[j]):  # otherwise one of them was merged with another
                parts[i] += parts[j]
                parts[j] = ""
                following[i] = following[j]
                preceding[following[j]] = i
                push(preceding[i], i)
                push(i, following[i])
        return [self.ids[part] for part in parts if part]

    def encode(self, text: str, add_prefix_space: bool) -> list[int]:
        """Token ids of a text. No space is ever added."""
        words = [text]
        for pattern in self.patterns:
            words = [part for word in words for part in pattern.split(word) if part]
        spelled = [word.encode().decode("latin-1").translate(BYTE_TO_CHAR) for word in words]
        return [token for word in spelled for token in self.encode_word(word)]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token of the vocabulary."""
        return self.vocab[token].translate(CHAR_TO_BYTE).encode("latin-1", "replace")


def any_of(texts: Iterable[str]) -> str:
    """A pattern that matches the longest of `texts`; nothing, if there are none."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def raise_exception(message: str) -> None:
    """The function that chat templates call to refuse a conversation."""
    raise TemplateError(message)


@dataclass
class Tokenizer:
    """Everything that a repository says about text. These fields are stored in the checkpoint."""

    model: dict  # the arguments of SentencePiece or of ByteLevelBPE
    added_tokens: dict[str, int]  # tokens that the model finds in no text, by their spelling
    special_tokens: list[str]  # added tokens that are not printed
    bos_token: str
    eos_token: str
    add_bos_token: bool  # before a text without a chat template
    eos_ids: list[int]  # each of them ends an answer
    chat_template: str | None = None  # in Jinja
    legacy: bool = True  # sentencepiece adds a space after an added token as well

    @classmethod
    def from_fields(cls, fields: dict) -> "Tokenizer":
        """The tokenizer of a checkpoint's header. Earlier versions had other names, in the same order."""
        if "proto" not in fields:
            return cls(**fields)
        proto, *others, patterns, _, legacy = fields.values()
        if patterns is not None:
            raise ValueError("an earlier version wrote its tokenizer: convert it again with ./scripts/prepare.sh")
        return cls({"model_proto": proto}, *others, legacy)

    def __post_init__(self) -> None:
        self.bpe = SentencePiece(**self.model) if "model_proto" in self.model else ByteLevelBPE(**self.model)
        self.added_ids = {token: text for text, token in self.added_tokens.items()}
        self.vocab_size = max(len(self.bpe.vocab), max(self.added_ids, default=0) + 1)
        has_bos = self.add_bos_token and self.bos_token in self.added_tokens
        self.bos_ids = [self.added_tokens[self.bos_token]] if has_bos else []
        self.added_pattern = re.compile(f"(?<!{ESCAPE})({any_of(self.added_tokens)})")
        self.special_pattern = re.compile(any_of(filter(self.is_special, self.added_tokens)))
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.add_extension("jinja2.ext.loopcontrols")
        names = {"bos_token": self.bos_token, "eos_token": self.eos_token, "add_generation_prompt": True}
        environment.globals |= names | {"tools": None, "documents": None, "raise_exception": raise_exception}
        if "strftime_now is" not in (self.chat_template or ""):  # a template that asks for a clock has its own date
            environment.globals["strftime_now"] = strftime
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        self.compiled_template = environment.from_string(self.chat_template or "")

    def is_special(self, text: str) -> bool:
        """True if the added token `text` may control a chat: it is special, ends answers, or looks like markup."""
        is_known = text in self.special_tokens or self.added_tokens[text] in self.eos_ids
        return is_known or text in (self.chat_template or "") or (text[0] in "<[" and text[-1] in ">]")

    def escape(self, text: str) -> str:
        """`text` for `encode` or a chat template, so that none of its characters is read as a special token."""
        return self.special_pattern.sub(lambda match: "".join(ESCAPE + character for character in match[0]), text)

    def apply_chat_template(self, messages: list[dict]) -> list[int]:
        """Token ids of `messages` with `role` and escaped `content`, up to where the next answer starts.

        Only a template that needs a clock has one; with others, the same messages give the same text every day.
        """
        with reading("the chat template", "leave out --system, or the template by --raw"):
            return self.encode(self.compiled_template.render(messages=messages))

    def encode(self, *texts: str) -> list[int]:
        """Token ids of texts that follow each other, without BOS.

        The spelling of an added token is that token, unless it is escaped, or is in two texts.
        """
        ids = []
        for part in [part for text in texts for part in self.added_pattern.split(text)]:
            if part in self.added_tokens:
                ids.append(self.added_tokens[part])
            elif part:
                add_prefix_space = not ids or (self.legacy and ids[-1] in self.added_ids)
                ids += self.bpe.encode(part.replace(ESCAPE, ""), add_prefix_space)
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes of UTF-8 that `token` adds to a text."""
        if token in self.added_ids:
            text = self.added_ids[token]
            return b"" if text in self.special_tokens else text.encode()
        return self.bpe.token_bytes(token) if token < len(self.bpe.vocab) else b""

    def decode(self, ids: list[int], max_characters: int) -> str:
        """The text of an answer up to some character, escaped, so that only its added tokens encode to tokens."""
        text = ""
        # Special tokens have no bytes, and are not printed.
        for is_added, run in groupby(filter(self.token_bytes, ids), self.added_ids.__contains__):
            part = b"".join(map(self.token_bytes, run)).decode("utf-8", "replace each byte")[:max_characters]
            max_characters -= len(part)
            text += part if is_added else self.escape(part)
        return text


class TextStreamer:
    """Prints an answer while it is generated, up to the first of the texts `stops`. A possible start is held back."""

    def __init__(self, stops: list[str]) -> None:
        self.stops = stops
        self.decode = codecs.getincrementaldecoder("utf-8")("replace each byte").decode
        self.pending = ""  # not printed yet
        self.printed = 0  # characters
        self.stop = ""  # the stop text that ended the answer

    def put(self, data: bytes) -> None:
        """Add the bytes of a token, and print all text that cannot start a stop text."""
        self.pending += self.decode(data)
        found = [(self.pending.index(stop), stop) for stop in self.stops if stop in self.pending]
        starts = [stop[:n] for stop in self.stops for n in range(1, len(stop))]
        held_back = max((len(start) for start in starts if self.pending.endswith(start)), default=0)
        end, self.stop = min(found, default=(len(self.pending) - held_back, ""))
        self.print(self.pending[:end])
        self.pending = "" if self.stop else self.pending[end:]

    def print(self, text: str, end: str = "") -> None:
        """Print and count the characters of `text`."""
        print(text, end=end, flush=True)
        self.printed += len(text)

    def end(self, line_end: str) -> None:
        """Print the text that was held back, and a line end."""
        self.print(self.pending + self.decode(b"", final=not self.stop), line_end)
