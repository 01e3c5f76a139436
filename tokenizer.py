"""Text to token ids and back: the tokenizer of a checkpoint, its chat template, text that is streamed as it comes."""

import codecs

import sentencepiece

# One replacement character for each byte that belongs to none, as sentencepiece has it.
codecs.register_error("replace each byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))


class Tokenizer:
    """The sentencepiece model that a checkpoint carries. Any exception of sentencepiece's where `proto` is none."""

    def __init__(self, proto: bytes) -> None:
        self.proto = proto
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.size = self.pieces.vocab_size()
        self.bos_id = self.pieces.bos_id()
        self.eos_id = self.pieces.eos_id()
        self.encode = self.pieces.encode  # ids of a text, nothing added; the spelling of a special token stays text
        self.front = self.encode("a")  # stands before a token whose leading space is to be kept

    def bytes_of(self, token: int) -> bytes:
        """The bytes that `token` adds to a text in UTF-8."""
        if self.pieces.is_byte(token):
            return bytes([int(self.pieces.id_to_piece(token)[3:5], 16)])  # "<0x0A>"
        return self.pieces.decode([*self.front, token])[1:].encode()

    def vocabulary(self) -> list[str]:
        """All pieces, by id."""
        return [self.pieces.id_to_piece(token) for token in range(self.size)]


def text_decoder() -> codecs.IncrementalDecoder:
    """Bytes of tokens in, text out as soon as it is certain: those that the next may complete to a character wait.

    decode(b"", True) gives the rest, when no more tokens come.
    """
    return codecs.getincrementaldecoder("utf-8")("replace each byte")


def turn_ids(tokenizer: Tokenizer, text: str, system: str, first: bool) -> list[int]:
    """A user's words in Llama-2's chat template: BOS [INST] text [/INST], with the system's text in the `first` turn.

    https://github.com/meta-llama/llama/blob/main/llama/generation.py, chat_completion
    """
    if system and first:
        text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}"
    return [tokenizer.bos_id, *tokenizer.encode(f"[INST] {text.strip()} [/INST]")]


def closing_ids(tokenizer: Tokenizer, answer: list[int]) -> list[int]:
    """The template's ids behind an `answer`: a space and EOS. An answer may have ended with that space."""
    space = tokenizer.pieces.piece_to_id("\u2581")
    return [tokenizer.eos_id] if answer[-1:] == [space] else [space, tokenizer.eos_id]
