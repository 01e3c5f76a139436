"""Read the tokenizer of a Hugging Face directory.

tokenizer.model is sentencepiece's. tokenizer.json has byte-level BPE, or what sentencepiece had, in other words.
"""

import json
import re
import struct
import sys
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from unicodedata import category

import utils

from tokenizer import BYTE_TO_CHAR, NO_DUMMY_PREFIX, SentencePiece, Tokenizer

NEEDED = "a tokenizer.model of sentencepiece is needed, or a tokenizer.json of BPE"
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's \s; Python's has four more
CLASS = re.compile(r"\\s|\\p\{[LMNPSZC]\w?\}")
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of sentencepiece's pieces
# Values that the model of tokenizer.json, and each added token, may have. Nothing else is implemented.
MODEL = {"type": ["BPE", None], "dropout": [None]}
MODEL |= dict.fromkeys(["continuing_subword_prefix", "end_of_word_suffix"], [None, ""])
# Normalizers that spell a text as sentencepiece does: a space becomes "▁", after one is put before the text.
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
ADDED = dict.fromkeys(["single_word", "lstrip", "rstrip"], [None, False])
# Put before a chat template whose messages have a list of typed parts as their content.
TYPED_CONTENT = """{%- set typed = namespace(messages=[]) %}
{%- for message in messages %}
{%- set content = [{"type": "text", "text": message.content}] %}
{%- set typed.messages = typed.messages + [dict(message, content=content)] %}
{%- endfor %}
{%- set messages = typed.messages -%}
"""
MARKER = "marker"  # the text of a message by which a template is tried


def require(settings: dict, supported: dict[str, list]) -> None:
    """ValueError if one of `settings` has a value that is not in its list."""
    for key, values in supported.items():
        if key in settings and settings[key] not in values:
            raise ValueError(f"{key} = {settings[key]!r} is not supported: this program runs plain Llama models")


def without_null(fields: dict) -> dict:
    """The fields of a JSON object that have a value, because null is the same as no field."""
    return {name: value for name, value in fields.items() if value is not None}


def read_json(path: Path) -> dict:
    """The content of a JSON file, without null; {} if there is no file."""
    with utils.reading(path, "download it again"):
        return dict(json.loads(path.read_bytes(), object_hook=without_null)) if path.exists() else {}


def read_optional_json(path: Path) -> dict:
    """The same for a file that a model can do without: {}, and a line on stderr, if it is damaged."""
    try:
        return read_json(path)
    except ValueError as error:
        print(f"{error}; until then it is not used", file=sys.stderr)
        return {}


@cache
def class_characters(name: str) -> str:
    r"""The characters of \s, \p{L}, \p{Lu}, ... as they are written in a [class] of Python's re, which has no \p."""
    if name == r"\s":
        return SPACE
    ranges = ""
    for is_member, run in groupby(range(sys.maxunicode + 1), lambda code: category(chr(code)).startswith(name[3:-1])):
        if is_member:
            codes = list(run)
            ranges += f"\\U{codes[0]:08x}-\\U{codes[-1]:08x}"
    return ranges


def replace_class(match: re.Match) -> str:
    """A class, or the classes within [brackets], in the syntax of Python's re."""
    if match[0].startswith("["):
        return CLASS.sub(lambda inner: class_characters(inner[0]), match[0])
    return f"[{class_characters(match[0])}]"


def translate(pattern: str) -> str:
    """A pattern of tokenizer.json in the syntax of Python's re. ValueError if it has no translation."""
    if unknown := re.search(r"\\(?![psSrntd])\w|\[(\\.|[^]\\])*(\[|\\S)|&&", pattern):
        raise ValueError(f"{unknown[0]} in the pre-tokenizer's {pattern!r} is not supported")
    translated = re.sub(rf"\[(?:\\.|[^]])*\]|{CLASS.pattern}", replace_class, pattern.replace(r"\S", r"[^\s]"))
    if re.compile(translated).groups:
        raise ValueError(f"the group in the pre-tokenizer's {pattern!r} is not supported")
    return translated


def split_patterns(node: dict) -> list[str]:
    """The patterns by which a pre-tokenizer of tokenizer.json splits a text into words, one after another."""
    kind = node["type"]
    if kind == "Sequence":
        return [pattern for each in node["pretokenizers"] for pattern in split_patterns(each)]
    if kind == "ByteLevel" and not node["add_prefix_space"]:
        return [translate(GPT_2)] if node.get("use_regex", True) else []
    if kind == "Digits":
        return [translate(r"\p{N}" if node["individual_digits"] else r"\p{N}+")]
    if kind == "Split" and node["behavior"] == "Isolated" and not node["invert"] and "Regex" in node["pattern"]:
        return [translate(node["pattern"]["Regex"])]
    raise ValueError(f"the pre-tokenizer {node} is not supported")


def pieces_by_id(model: dict) -> list[str]:
    """The vocabulary of tokenizer.json; "" where an id has no piece."""
    pieces = {token: piece for piece, token in model["vocab"].items()}
    return [pieces.get(token, "") for token in range(max(pieces) + 1)]


def read_merges(model: dict) -> list[tuple[str, str]]:
    """The merges of tokenizer.json, each of which makes a piece."""
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    for left, right in merges:
        if left + right not in model["vocab"]:
            raise ValueError(f"the merge of {left!r} and {right!r} makes no token of the vocabulary")
    return merges


def byte_level_bpe(tokenizer_json: dict) -> dict:
    """The arguments of tokenizer.ByteLevelBPE. ValueError if tokenizer.json describes something else."""
    model = tokenizer_json["model"]
    require(tokenizer_json, {"normalizer": [None, {"type": "Sequence", "normalizers": []}]})
    require(tokenizer_json["decoder"], {"type": ["ByteLevel"]})
    require(model, MODEL | {"byte_fallback": [None, False]})
    pre_tokenizer = tokenizer_json["pre_tokenizer"]
    kinds = [step["type"] for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer])]
    if kinds.count("ByteLevel") != 1 or kinds[-1] != "ByteLevel":
        raise ValueError(f"the pre-tokenizer {pre_tokenizer} is not supported: ByteLevel must be its end")
    if model.get("unk_token") and any(chr(code) not in model["vocab"] for code in BYTE_TO_CHAR.values()):
        raise ValueError("unk_token with a vocabulary that lacks some bytes is not supported")
    pieces = pieces_by_id(model)
    return {
        "vocab": json.dumps(pieces),
        "merges": json.dumps([" ".join(merge) for merge in read_merges(model)]),
        "pre_tokenizer_patterns": split_patterns(pre_tokenizer),
        "ignore_merges": model.get("ignore_merges", False),
    }


def prefix_space(tokenizer_json: dict) -> str:
    """Where a tokenizer.json of sentencepiece's kind adds a space: "always" before a text and after each added token,
    "first" before a text only, or "never". ValueError if it describes something else.
    """
    normalizer, pre_tokenizer = tokenizer_json.get("normalizer") or {}, tokenizer_json.get("pre_tokenizer")
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    if pre_tokenizer is None and steps in ([PREPEND, REPLACE], [REPLACE]):
        return "always" if PREPEND in steps else "never"
    if steps or not pre_tokenizer or pre_tokenizer["type"] != "Metaspace" or pre_tokenizer.get("split", True):
        raise ValueError(f"byte_fallback with {normalizer} and {pre_tokenizer} is not supported")
    return pre_tokenizer["prepend_scheme"]


def protobuf(number: int, value: float | bytes) -> bytes:
    """A field in protobuf's encoding. https://protobuf.dev/programming-guides/encoding"""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n % 128 + 128]) + varint(n // 128)

    if isinstance(value, bytes):
        return varint(8 * number + 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(8 * number + 5) + struct.pack("<f", value)
    return varint(8 * number) + varint(value)


def merge_scores(model: dict, pieces: set[str]) -> dict[str, float]:
    """Scores with which sentencepiece merges `pieces` as the merges of a tokenizer.json do.

    sentencepiece merges two parts if they make a piece; the piece with the highest score comes first. ValueError if the
    merges are others than that, or in an order that no scores give.
    """
    merges = [merge for merge in read_merges(model) if pieces >= {*merge, "".join(merge)}]
    merged = [piece for piece, _ in groupby("".join(merge) for merge in merges)]
    splits = [(piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece))]
    possible = {split for split in splits if pieces >= {*split}}
    if {*merges} != possible or len(merged) != len({*merged}):
        raise ValueError("byte_fallback with merges that are not those of a sentencepiece model")
    return {piece: -float(rank) for rank, piece in enumerate(merged)}


def sentencepiece_bpe(tokenizer_json: dict) -> dict:
    """The arguments of tokenizer.SentencePiece: a tokenizer.model with the pieces of a tokenizer.json.

    ValueError if tokenizer.json describes something else.
    """
    model = tokenizer_json["model"]
    require(model, MODEL)
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    added = [entry["content"] for entry in tokenizer_json["added_tokens"] if entry["content"] in model["vocab"]]
    if not added or not model["vocab"].keys() >= {*byte_pieces}:
        raise ValueError("byte_fallback with pieces that are not those of a sentencepiece model")
    scores = merge_scores(model, model["vocab"].keys() - {*byte_pieces, *added})
    types = dict.fromkeys(byte_pieces, BYTE) | dict.fromkeys(added, CONTROL)
    types[model.get("unk_token") or added[0]] = UNKNOWN
    proto = [protobuf(2, protobuf(3, 2) + protobuf(35, 1))]  # trainer_spec: model_type is BPE, byte_fallback
    proto.append(protobuf(3, protobuf(4, 0)))  # normalizer_spec: remove_extra_whitespaces
    for piece in pieces_by_id(model):
        text, score = protobuf(1, piece.encode()), protobuf(2, scores.get(piece, -1e9))
        proto.append(protobuf(1, text + score + protobuf(3, types.get(piece, NORMAL))))
    if prefix_space(tokenizer_json) == "never":
        proto.append(NO_DUMMY_PREFIX)
    return {"model_proto": b"".join(proto), "is_metaspace": tokenizer_json.get("pre_tokenizer") is not None}


def bos_of_post_processor(tokenizer_json: dict) -> str:
    """The token that tokenizer.json puts before a text; "" if there is none."""
    processor = tokenizer_json.get("post_processor") or {}
    singles = [each.get("single") for each in processor.get("processors", [processor])]
    first = [single[0]["SpecialToken"]["id"] for single in singles if single and "SpecialToken" in single[0]]
    return "".join(first)


def sentencepiece_model(path: Path, added: dict[int, str], config: dict) -> bytes:
    """A tokenizer.model that finds none of the `added` tokens in a text by itself.

    Those of sentencepiece's type USER_DEFINED become CONTROL: a piece is its text, its score if it has one, its type.
    """
    proto = path.read_bytes()
    for text in added.values():
        head = re.escape(bytes([0x0A, len(text.encode()) & 127]) + text.encode())
        user_defined = head + rb"(\x15.{4})?\x18\x04"
        proto = re.sub(user_defined, lambda match: match[0][:-1] + bytes([CONTROL]), proto, flags=re.DOTALL)
    return proto + (NO_DUMMY_PREFIX if config.get("add_prefix_space") is False else b"")


def sentencepiece_tokenizer(proto: bytes) -> Tokenizer:
    """The tokenizer of a tokenizer.model without further files. ValueError if it has no BOS or EOS."""
    processor = SentencePiece(proto).processor
    ids = [processor.bos_id(), processor.eos_id()]
    if min(ids) < 0:
        raise ValueError(f"the ids of BOS and EOS are {ids}, but a model of text has both")
    bos, eos = map(processor.id_to_piece, ids)
    added = dict(zip([bos, eos], ids, strict=True))
    model = {"model_proto": proto}
    return Tokenizer(model, added, [bos, eos], bos, eos, add_bos_token=True, eos_ids=ids[1:])


def read_added_tokens(folder: Path, tokenizer_json: dict, config: dict) -> dict[str, dict]:
    """The tokens that a model finds in no text, by their spelling: their id, and whether they are special."""
    entries = [{"content": text, "id": token} for text, token in read_json(folder / "added_tokens.json").items()]
    entries += [entry | {"id": int(token)} for token, entry in config.get("added_tokens_decoder", {}).items()]
    entries += tokenizer_json.get("added_tokens", [])
    for entry in entries:
        require(entry, ADDED)
        if not isinstance(entry["id"], int) or entry["id"] < 0:
            raise ValueError(f"{entry} is no token")
    return {entry["content"]: entry for entry in entries}


def named_token(config: dict, name: str) -> str | None:
    """The spelling of a token that tokenizer_config.json names."""
    token = config.get(name)
    return token["content"] if isinstance(token, dict) else token


def read_chat_template(folder: Path, config: dict) -> str | None:
    """The chat template: a file of its own, or the (default) one in tokenizer_config.json.

    transformers' tag {% generation %} marks the tokens to train on; here it does nothing.
    """
    path = folder / "chat_template.jinja"
    template = utils.decode_text(path.read_bytes()) if path.exists() else config.get("chat_template")
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default")
    if template is None:
        return None
    template = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", template)


def with_special_tokens(template: str, config: dict) -> str:
    """A chat template that sets the special tokens of the repository that it uses, beside BOS and EOS."""
    for name in ("unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        if re.search(rf"\b{name}\b", template) and named_token(config, name):
            template = f"{{%- set {name} = {json.dumps(named_token(config, name))} -%}}\n{template}"
    return template


def rendered(tokenizer: Tokenizer, messages: list[dict]) -> str | None:
    """The chat template of `messages`; None if it refuses them."""
    try:
        return tokenizer.compiled_template.render(messages=messages, add_generation_prompt=False)
    except Exception:  # a template may raise anything; an answer prints it
        return None


def with_template(plain: Tokenizer, template: str) -> Tokenizer:
    """The tokenizer with a chat template. ValueError if the template shows nothing of a question.

    An added token that it puts after an answer ends answers, too: early Llama 3 Instruct names it nowhere else.
    """
    question = [{"role": "user", "content": MARKER}]
    candidates = [replace(plain, chat_template=text) for text in (template, TYPED_CONTENT + template)]
    texts = [rendered(candidate, question) for candidate in candidates]
    if any(texts) and MARKER not in "".join(text or "" for text in texts):
        raise ValueError("it does not show a question")
    tokenizer = candidates[1] if MARKER not in (texts[0] or "") and MARKER in (texts[1] or "") else candidates[0]
    answered = rendered(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARKER}]) or ""
    end = tokenizer.added_pattern.match(answered.rpartition(MARKER)[2].lstrip()) if MARKER in answered else None
    eos_ids = {*tokenizer.eos_ids, tokenizer.added_tokens[end[0]]} if end else tokenizer.eos_ids
    return replace(tokenizer, eos_ids=sorted(eos_ids))


def read_fields(folder: Path, config: dict, vocab_size: int, eos_ids: set[int]) -> Tokenizer:
    """The tokenizer without its chat template, from tokenizer_config.json and the other files in `folder`."""
    tokenizer_json = read_json(folder / "tokenizer.json")
    entries = read_added_tokens(folder, tokenizer_json, config)
    entries = {text: entry for text, entry in entries.items() if entry["id"] < vocab_size}  # the model has no others
    added = {entry["id"]: text for text, entry in entries.items()}
    path = folder / "tokenizer.model"
    if tokenizer_json and ("ByteLevel" in str(tokenizer_json.get("decoder")) or not path.exists()):
        with utils.reading(folder / "tokenizer.json", NEEDED):
            is_byte_level = not tokenizer_json["model"].get("byte_fallback")
            model = byte_level_bpe(tokenizer_json) if is_byte_level else sentencepiece_bpe(tokenizer_json)
            legacy = is_byte_level or prefix_space(tokenizer_json) == "always"
            bos = bos_of_post_processor(tokenizer_json)
        plain = Tokenizer(model, {}, [], bos, "", add_bos_token=bool(bos), eos_ids=[], legacy=legacy)
    else:
        with utils.reading(path, NEEDED):
            plain = sentencepiece_tokenizer(sentencepiece_model(path, added, config))
        plain.legacy = config.get("legacy", True)
    added_tokens = plain.added_tokens | {text: token for token, text in added.items()}
    bos, eos = [named_token(config, name) or getattr(plain, name) for name in ("bos_token", "eos_token")]
    own_eos = {token for text, token in added_tokens.items() if text == eos}
    add_bos = config.get("add_bos_token")
    return replace(
        plain,
        added_tokens=added_tokens,
        special_tokens=plain.special_tokens + [text for text, each in entries.items() if each.get("special", True)],
        bos_token=bos,
        eos_token=eos,
        add_bos_token=plain.add_bos_token if add_bos is None else add_bos,
        eos_ids=sorted(eos_ids | own_eos),
    )


def read_tokenizer(folder: Path, vocab_size: int, eos_ids: set[int]) -> Tokenizer:
    """The tokenizer in `folder`, of a model of that `vocab_size`. Answers end at `eos_ids` and at its own EOS."""
    with utils.reading(folder, "the files of its tokenizer are damaged: download them again"):
        config = read_optional_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
        template = read_chat_template(folder, config)
        plain = read_fields(folder, config, vocab_size, eos_ids)
    if template is None:
        return plain
    with utils.reading("the chat template", "mend or delete it"):
        template.encode()  # ValueError for a lone surrogate
        return with_template(plain, with_special_tokens(template, config))
