"""The tokenizer of a Hugging Face directory, of either kind, as a checkpoint carries it: a sentencepiece model.

Byte-level BPE merges the neighbours whose merge comes first in a list; sentencepiece's BPE those whose concatenation
has the best score. Where scores are minus the merges' ranks, both do the same if each token, alone in a text, comes
about by a merge of its own: two neighbours in a longer text came about as they do alone.
"""

import json
import re
import struct
import terminal
from dataclasses import asdict, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from sys import maxunicode
from unicodedata import category

import tokenizer
from tokenizer import ALPHABET, AS_IT_IS, Tokenizer

KINDS = "a tokenizer.model of sentencepiece is needed, or a tokenizer.json of byte-level BPE"
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's; Python's \s has four more
GROUP = re.compile(r"\\s|\\p\{[LMNPSZC]\w?\}")
NORMAL, CONTROL = 1, 3  # types of sentencepiece's pieces
UNKNOWN_BYTE = b"\x0a\x12\x0a\x0e<unknown byte>\x18\x02"  # a piece of type UNKNOWN, without which no model loads
BPE_MODEL = b"\x12\x02\x18\x02\x1a\x06\x18\x00\x20\x00\x28\x00"  # model_type BPE; spaces are characters like others
# What tokenizer.json may say of its model and of each added token, beside what is read.
MODEL = {"type": ["BPE", None]} | dict.fromkeys(["dropout", "byte_fallback"], [None, False])
MODEL |= dict.fromkeys(["continuing_subword_prefix", "end_of_word_suffix"], [None, ""])
ADDED = dict.fromkeys(["single_word", "lstrip", "rstrip"], [None, False])


def check(said: dict, supported: dict[str, list]) -> None:
    """ValueError where `said` has another value than those of its key in `supported`."""
    for key, values in supported.items():
        if key in said and said[key] not in values:
            raise ValueError(f"{key} = {said[key]!r} is not supported: this program runs plain Llama models")


def read_json(path: Path) -> dict:
    """The content of a JSON file; nothing where there is no file."""
    with terminal.reading(path, "download it again"):
        return dict(json.loads(path.read_bytes())) if path.exists() else {}


@cache
def members(group: str) -> str:
    r"""The characters of \s, \p{L}, \p{Lu}, .. as they may stand in a class of Python's re, which knows no \p."""
    if group == r"\s":
        return SPACE
    ranges = ""
    for inside, run in groupby(range(maxunicode + 1), lambda code: category(chr(code)).startswith(group[3:-1])):
        if inside:
            codes = list(run)
            ranges += f"\\U{codes[0]:08x}-\\U{codes[-1]:08x}"
    return ranges


def translate(pattern: str) -> str:
    """The regular expression `pattern` of tokenizer.json in Python's words. ValueError where it has no equal."""
    if foreign := re.search(r"\\(?![psSrntd])\w|\[(\\.|[^]\\])*\[|&&", pattern):
        raise ValueError(f"{foreign[0]} in the pre-tokenizer's {pattern!r} is not supported")

    def spell(found: re.Match) -> str:
        if found[0].startswith("["):
            return GROUP.sub(lambda group: members(group[0]), found[0])
        return f"[{members(found[0])}]"

    spelled = re.sub(rf"\[(?:\\.|[^]])*\]|{GROUP.pattern}", spell, pattern.replace(r"\S", r"[^\s]"))
    if re.compile(spelled).groups:
        raise ValueError(f"the group in the pre-tokenizer's {pattern!r} is not supported")
    return spelled


def splits(node: dict) -> list[str]:
    """The regular expressions by which a pre-tokenizer of tokenizer.json cuts a text, one after the other."""
    kind = node["type"]
    if kind == "Sequence":
        return [split for each in node["pretokenizers"] for split in splits(each)]
    if kind == "ByteLevel" and not node["add_prefix_space"]:
        return [translate(GPT_2)] if node.get("use_regex", True) else []
    if kind == "Digits":
        return [translate(r"\p{N}" if node["individual_digits"] else r"\p{N}+")]
    if kind == "Split" and node["behavior"] == "Isolated" and not node["invert"] and "Regex" in node["pattern"]:
        return [translate(node["pattern"]["Regex"])]
    raise ValueError(f"the pre-tokenizer {node} is not supported")


def field(number: int, content: bytes) -> bytes:
    """A field of a protobuf message, of less than 2 ** 14 bytes. https://protobuf.dev/programming-guides/encoding"""
    return bytes([number << 3 | 2, len(content) & 127 | 128, len(content) >> 7]) + content


def pieces(tokens: range, texts: dict[int, str], ranks: dict[str, int]) -> bytes:
    """sentencepiece's piece of each of `tokens`; one without a rank, or without a text, is made of nothing."""
    made = []
    for token in tokens:
        text = texts.get(token, f"<unused {token}>")
        kind = NORMAL if text in ranks else CONTROL
        score = struct.pack("<f", -ranks.get(text, 0))
        made.append(field(1, field(1, text.encode()) + b"\x15" + score + bytes([0x18, kind])))
    return b"".join(made)


def last_parts(token: str, ranks: dict[str, int]) -> tuple[str, ...]:
    """The two parts of `token` before the last merge, by which the concatenation of the lowest rank comes first.

    They are more where no merge puts them together: then nothing makes the token.
    """
    parts = list(token)
    while len(parts) > 2:
        found = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:], strict=False)]
        first = found.index(min(found))
        if found[first] == len(ranks):
            break
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return tuple(parts)


def of_sentencepiece(path: Path, texts: dict[int, str], config: dict) -> dict:
    """The fields of a Tokenizer by a tokenizer.model that finds none of `texts` in a text by itself.

    Those beyond its pieces are added to them. Those of type USER_DEFINED become CONTROL: a piece is its text, its score
    if it has one, its type.
    """
    plain = tokenizer.of_sentencepiece(path.read_bytes())
    proto = plain.proto
    for text in texts.values():
        head = re.escape(bytes([0x0A, len(text.encode()) & 127]) + text.encode())
        user_defined = head + rb"(\x15.{4})?\x18\x04"
        proto = re.sub(user_defined, lambda found: found[0][:-1] + bytes([CONTROL]), proto, flags=re.DOTALL)
    proto += pieces(range(plain.size, max(texts, default=0) + 1), texts, {})
    if config.get("add_prefix_space") is False:
        proto += AS_IT_IS
    return asdict(plain) | {"proto": proto, "legacy": config.get("legacy", True)}


def of_byte_level(described: dict, texts: dict[int, str]) -> dict:
    """The fields of a Tokenizer by a tokenizer.json. ValueError where no sentencepiece model does the same."""
    model = described["model"]
    check(described, {"normalizer": [None, {"type": "Sequence", "normalizers": []}]})
    check(described["decoder"], {"type": ["ByteLevel"]})
    check(model, MODEL)
    steps = described["pre_tokenizer"].get("pretokenizers", [described["pre_tokenizer"]])
    kinds = [step["type"] for step in steps]
    if kinds.count("ByteLevel") != 1 or kinds[-1] != "ByteLevel":
        raise ValueError(f"the pre-tokenizer {described['pre_tokenizer']} is not supported: ByteLevel must be its end")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    made = [token for token, _ in groupby(left + right for left, right in merges)]
    ranks = {token: rank for rank, token in enumerate(made)}
    last = {last_parts(token, ranks) for token in ranks}
    if len(ranks) < len(made) or not {parts for parts in last if len(parts) == 2} <= set(merges):
        raise ValueError("the merges do not follow from the order of the tokens that they make, which is not supported")
    ranks |= {text: 0 for text in model["vocab"] if len(text) == 1}
    if model.get("unk_token") and any(chr(code) not in ranks for code in ALPHABET.values()):
        raise ValueError("unk_token with a vocabulary that lacks some bytes is not supported")
    texts = {token: text for text, token in model["vocab"].items()} | texts
    proto = pieces(range(max(texts) + 1), texts, ranks) + UNKNOWN_BYTE + BPE_MODEL
    processor = described.get("post_processor") or {}
    singles = [each.get("single") for each in processor.get("processors", [processor])]
    first = [single[0]["SpecialToken"]["id"] for single in singles if single and "SpecialToken" in single[0]]
    fields = {"proto": proto, "added": {}, "special": [], "bos": "".join(first), "eos": "", "begins": bool(first)}
    return fields | {"splits": splits(described["pre_tokenizer"]), "whole_words": model.get("ignore_merges", False)}


def added_tokens(folder: Path, described: dict, config: dict) -> dict[str, dict]:
    """What the files in `folder` say of each token that is not of the vocabulary, by its text."""
    entries = [{"content": text, "id": token} for text, token in read_json(folder / "added_tokens.json").items()]
    entries += [entry | {"id": int(token)} for token, entry in config.get("added_tokens_decoder", {}).items()]
    entries += described.get("added_tokens", [])
    for entry in entries:
        check(entry, ADDED)
        if not isinstance(entry["id"], int) or entry["id"] < 0:
            raise ValueError(f"{entry} is no token")
    return {entry["content"]: entry for entry in entries}


def chat_template(folder: Path, config: dict) -> str | None:
    """The chat template in `folder`: a file of its own, or what tokenizer_config.json has, of several the default.

    transformers' tag {% generation %} marks what a model learns from; here it does nothing.
    """
    file = folder / "chat_template.jinja"
    template = terminal.decode_text(file.read_bytes(), str(file)) if file.exists() else config.get("chat_template")
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default")
    if template is None:
        return None
    template = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", template)


def of_files(folder: Path, config: dict, vocab_size: int, ends: set[int]) -> dict:
    """The fields of a Tokenizer but its template, by tokenizer_config.json and the other files in `folder`."""
    described = read_json(folder / "tokenizer.json")
    entries = {text: each for text, each in added_tokens(folder, described, config).items() if each["id"] < vocab_size}
    texts = {entry["id"]: text for text, entry in entries.items()}
    path = folder / "tokenizer.model"
    if described and ("ByteLevel" in str(described.get("decoder")) or not path.exists()):
        with terminal.reading(folder / "tokenizer.json", KINDS):
            fields = of_byte_level(described, texts)
    else:
        with terminal.reading(path, KINDS):
            fields = of_sentencepiece(path, texts, config)
    fields["added"] |= {text: token for token, text in texts.items()}
    fields["special"] += [text for text, entry in entries.items() if entry.get("special", True)]
    for name in ("bos", "eos"):
        if token := config.get(f"{name}_token"):
            fields[name] = token["content"] if isinstance(token, dict) else token
    if config.get("add_bos_token") is not None:
        fields["begins"] = config["add_bos_token"]
    fields["ends"] = sorted(ends | {token for text, token in fields["added"].items() if text == fields["eos"]})
    return fields


def read_tokenizer(folder: Path, vocab_size: int, ends: set[int]) -> Tokenizer:
    """The tokenizer in `folder` of a model of that `vocab_size`. An answer ends at one of `ends`, or at its own EOS."""
    with terminal.reading(folder, "the files of its tokenizer are damaged: download them again"):
        config = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
        template = chat_template(folder, config)
        plain = Tokenizer(**of_files(folder, config, vocab_size, ends))
    with terminal.reading("the chat template", "mend or delete it"):
        (template or "").encode()  # ValueError for a lone surrogate
        return replace(plain, template=template)
