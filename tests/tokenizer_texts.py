"""Texts on which tokenizers differ, if they do, and the chat template of Llama 2."""

import random
import unicodedata
from functools import cache

# https://github.com/meta-llama/llama/blob/main/llama/generation.py, chat_completion
LLAMA_2_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.index == 2 and messages[0].role == 'system' %}<<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n"
    "{% endif %}{{ m.content | trim }} [/INST]{% elif m.role == 'assistant' %} {{ m.content | trim }} "
    "{{ eos_token }}{% endif %}{% endfor %}"
)
PROSE = [
    "The quick brown fox jumps over the lazy dog. It'S what I'Ve HEARD, you'Ll see; don't they'RE i'M he'D WE'll ſ'ſ",
    "Zwölf Boxkämpfer jagen Viktor über den großen Sylter Deich — „quer“, naïve café, résumé.",
    "def read_file(path):\n\twith open(path) as file:\n        return file.read()[1:-1]  # 12345678 0x1F\r\n\r\n\n",
    "日本語の文章。 中文字符， 한국어 русский עברית العربية हिन्दी ไทย",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd e\u0301 a\u0308\u0323",
    "1 12 123 1234 12345 3.14159 \u0663\u0664\u0665 \u00b2\u00b3 \u2167 \u00bd \U0001d7d8\U0001d7d9 1e-5",
    " a  b   c    d\t\te \n f\r\n\r g\u00a0h\u2003i\u3000j\u2028k\x0bl\x0cm\x1cn\x1do\x1ep\x1fq\x85r \n \n  \t ",
    "!!! ??? ... --- === +++ ((())) [[x]] {y} <|z|> </s><s> http://a.b/c?d=e&f=%20g #h @i $j ^k &l *m ~n `o` \\p |q|",
    "a" * 77 + " " * 90 + "\n" * 9 + "-" * 70,
]
SPACES = " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000\u200b\ufeff"


def known(code: int) -> bool:
    """True if this Python's Unicode has the character; about the others, libraries of other versions may differ."""
    return unicodedata.category(chr(code)) not in ("Cn", "Cs")


@cache
def characters() -> list[list[int]]:
    """The known characters of each plane of Unicode that has some."""
    planes = [[code for code in range(plane << 16, (plane + 1) << 16) if known(code)] for plane in range(17)]
    return [plane for plane in planes if plane]


def texts(count: int, seed: int = 0) -> list[str]:
    """`count` texts: PROSE, then random ones from pieces of it, from spaces, and from characters of every plane."""
    draw, made, planes = random.Random(seed), list(PROSE), characters()
    while len(made) < count:
        parts = []
        for _ in range(draw.randrange(1, 12)):
            kind = draw.randrange(5)
            if kind == 0:
                text = draw.choice(PROSE)
                start = draw.randrange(len(text))
                parts.append(text[start : start + draw.randrange(1, 25)])
            elif kind == 1:
                parts.append("".join(draw.choice(SPACES) for _ in range(draw.randrange(1, 6))))
            elif kind == 2:
                plane = draw.choice(planes)
                parts.append("".join(chr(draw.choice(plane)) for _ in range(draw.randrange(1, 8))))
            elif kind == 3:
                parts.append("".join(chr(draw.randrange(0x20, 0x250)) for _ in range(draw.randrange(1, 8))))
            else:
                parts.append("".join(draw.choice("'sStTrReEvVmMlLdD0123 ") for _ in range(draw.randrange(1, 8))))
        made.append("".join(parts))
    return made
