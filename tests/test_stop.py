"""--stop: an answer ends before the first of these texts; nothing else is held back, nothing that was cut off kept."""

import contextlib
import io
import random
from pathlib import Path

import pytest
from conftest import TOKENIZER, generated, make_sampling, new_engine, run_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conversation import chat, session_of  # noqa: F401  a fixture

from generate import Session, Shown

TEXT = "def read_file(path):\n"


def split(text: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    return [text[start:end] for start, end in zip(places, places[1:], strict=False)]


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab\u00e9\U0001f600", max_size=30),
    stops=st.lists(st.text("ab\u00e9\U0001f600", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 200), max_size=20),
)
def test_what_is_shown(text: str, stops: list[str], cuts: list[int]) -> None:
    """In any pieces, also within characters: all before the first stop text, and at each moment all that is sure."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        shown, came, wanted = Shown([stop.encode() for stop in stops]), b"", b""
        for piece in split(text.encode(), cuts):
            came += piece
            goes_on = shown.add(piece)
            ends = [came.find(stop.encode()) for stop in stops if stop.encode() in came]
            assert goes_on == (not ends)
            if ends:
                wanted = came[: min(ends)]
                break
            may_begin = [i for i in range(len(came)) if any(stop.encode().startswith(came[i:]) for stop in stops)]
            wanted = came[: min(may_begin, default=len(came))]
            assert shown.size == len(wanted)
        else:
            wanted = came
        shown.end("")
    assert shown.size == len(wanted)
    assert out.getvalue() == wanted.decode(errors="replace")


@pytest.fixture(scope="module")
def session(chat: dict[str, Path]) -> Session:  # noqa: F811
    return session_of(chat["float32"], "--temperature", 0.8, "--max_new_tokens", 40, "--raw")


@pytest.fixture(scope="module")
def guessing(chat: dict[str, Path]) -> Session:  # noqa: F811
    more = ["--draft_checkpoint_path", chat["draft"], "--prompt_lookup", "--speculate_k", 7]
    return session_of(chat["float32"], "--temperature", 0.8, "--max_new_tokens", 40, "--raw", *more)


def answer(session: Session, prompt: list[int], stops: list[str], capsys) -> tuple[list[int], str]:
    session.stops = [stop.encode() for stop in stops]
    said = session.answer(prompt)
    return said, capsys.readouterr().out.removesuffix("\n")


@pytest.mark.parametrize("guesses", [False, True], ids=["plain", "guessing"])
def test_an_answer_ends_before_the_first_stop_text(session, guessing, guesses: bool, capsys) -> None:
    """Across tokens, within them, at the very first, in what was guessed; two that begin alike; not in the prompt."""
    asked, draw = guessing if guesses else session, random.Random(0)
    prompt = session.conversation().prompt(TEXT)
    _, text = answer(session, prompt, [], capsys)
    assert len(text) > 40
    for _ in range(12):
        start, size = draw.randrange(len(text) - 2), draw.randrange(1, 9)
        stops = [text[start : start + size], text[start : start + size] + "never", "path", "no such"]
        said, found = answer(asked, prompt, stops, capsys)
        assert found == text[: min(text.index(stop) for stop in stops if stop in text)]
        assert "Stopped: stop text" in asked.statistics()
        assert b"".join(map(session.tokenizer.bytes_of, said)).decode() == found
        engine = asked.engines[0]
        assert engine.ids == (prompt + said)[: len(engine.ids)]
    assert answer(asked, prompt, [text[0]], capsys) == ([], "")
    assert answer(asked, prompt, ["no such text"], capsys)[1] == text


@pytest.mark.parametrize("guesses", [False, True], ids=["plain", "guessing"])
def test_after_a_stop_text_the_cache_is_a_fresh_one(session, guessing, guesses: bool, capsys) -> None:
    asked = guessing if guesses else session
    prompt = session.conversation().prompt(TEXT)
    _, text = answer(asked, prompt, [], capsys)
    for stop in (text[7:10], text[20:22], text[1:3]):
        said, _ = answer(asked, prompt, [stop], capsys)
        for again in (prompt + said + prompt, prompt):
            engine, fresh = asked.engines[0], new_engine(asked.engines[0].model)
            sampling = make_sampling(5, 0.8)
            assert generated(engine, again, 20, sampling) == generated(fresh, again, 20, sampling)


@pytest.mark.slow
def test_stored_prefixes_hold_nothing_that_was_cut_off(demo, tmp_path: Path) -> None:
    flags = ["--checkpoint_path", demo["target"], "--precision", "float32", "--prompt", TEXT * 4, "--ignore_eos"]
    flags += ["--cache_dir", tmp_path, "--max_new_tokens", 60]
    text = run_cli("generate_prefill.py", *flags, "--no_cache").stdout
    stop = text[12:18]
    done = run_cli("generate_prefill.py", *flags, "--stop", stop)
    assert done.stdout.strip("\n") == text[: text.index(stop)].strip("\n")
    stored = len(list((tmp_path / "llama_prefixes").iterdir()))
    run_cli("generate_prefill.py", *flags)
    assert len(list((tmp_path / "llama_prefixes").iterdir())) > stored


def test_a_conversation_goes_on_behind_what_was_shown(chat, capsys) -> None:  # noqa: F811
    """Turn by turn with a stop text is one pass over what was said."""
    one = session_of(chat["float32"], "--temperature", 0.8)
    talk = one.conversation()
    prompt = talk.prompt("import os")
    _, text = answer(one, prompt, [], capsys)
    said, shown = answer(one, prompt, [text[5:8]], capsys)
    talk.add("import os", prompt, said)
    assert talk.messages[-1]["content"].strip() == shown.strip()
    following = talk.prompt("What does it return?")
    assert following[: len(prompt)] == prompt
    fresh = session_of(chat["float32"], "--temperature", 0.8)
    assert answer(one, following, [], capsys) == answer(fresh, following, [], capsys)


@given(ids=st.lists(st.integers(3, 2047), max_size=12), size=st.integers(0, 40))
def test_the_beginning_of_some_ids_says_the_beginning_of_their_text(ids: list[int], size: int) -> None:
    """Wherever it ends between characters; of whole tokens it has the ids."""
    said = b"".join(map(TOKENIZER.bytes_of, ids))
    size = min(size, len(said))
    while 0 < size < len(said) and said[size] >> 6 == 0b10:
        size -= 1
    found = TOKENIZER.beginning(ids, size)
    assert b"".join(map(TOKENIZER.bytes_of, found)).decode(errors="ignore") == said[:size].decode(errors="ignore")
    whole = [count for count in range(len(ids) + 1) if sum(len(TOKENIZER.bytes_of(i)) for i in ids[:count]) == size]
    assert not whole or found == ids[: whole[-1]]
