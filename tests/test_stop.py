"""--stop: an answer ends before the first of these texts; nothing else is held back, nothing after it is kept."""

import contextlib
import io
import random
from pathlib import Path

import pytest
import torch
from conftest import decoded, generated, make_params, new_engine, run_cli, utf8_decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conversation import chat, session_of, talk  # noqa: F401  `chat` is a fixture

from generate import Session, build_parser
from tokenizer import ESCAPE, TextStreamer

TEXT = "def read_file(path):\n"


def split(text: bytes, cuts: list[int]) -> list[bytes]:
    positions = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    return [text[start:end] for start, end in zip(positions, positions[1:], strict=False)]


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab\u00e9\U0001f600", max_size=30),
    stops=st.lists(st.text("ab\u00e9\U0001f600", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 200), max_size=20),
)
def test_the_printed_text(text: str, stops: list[str], cuts: list[int]) -> None:
    """In pieces that may end within characters: at each moment all text that cannot start a stop text is printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        streamer, decode, came, expected = TextStreamer(stops), utf8_decoder().decode, "", ""
        for piece in split(text.encode(), cuts):
            came += decode(piece)
            streamer.put(piece)
            ends = [came.find(stop) for stop in stops if stop in came]
            assert bool(streamer.stop) == bool(ends)
            if ends:
                expected = came[: min(ends)]
                assert came.startswith(streamer.stop, min(ends)) and streamer.stop in stops
                break
            may_start = [i for i in range(len(came)) if any(stop.startswith(came[i:]) for stop in stops)]
            expected = came[: min(may_start, default=len(came))]
            assert streamer.printed == len(expected) and out.getvalue() == expected
        else:
            expected = came
        streamer.end("")
    assert streamer.printed == len(expected)
    assert out.getvalue() == expected


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=12), cuts=st.lists(st.integers(0, 12), max_size=5))
def test_the_end_prints_a_character_that_is_not_whole(data: bytes, cuts: list[int]) -> None:
    """Each byte that is not UTF-8 as one replacement character; the line end does not count."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        streamer = TextStreamer([])
        for piece in split(data, cuts):
            streamer.put(piece)
        streamer.end("\n")
    assert out.getvalue() == data.decode("utf-8", "replace each byte") + "\n"
    assert streamer.printed == len(out.getvalue()) - 1


@pytest.fixture(scope="module")
def session(chat: dict[str, Path]) -> Session:  # noqa: F811
    return session_of(chat["float32"], "--temperature", 0.8, "--max_new_tokens", 40, "--raw")


@pytest.fixture(scope="module")
def guessing(chat: dict[str, Path]) -> Session:  # noqa: F811
    more = ["--draft_checkpoint_path", chat["draft"], "--prompt_lookup", "--speculate_k", 7]
    return session_of(chat["float32"], "--temperature", 0.8, "--max_new_tokens", 40, "--raw", *more)


def answer(session: Session, prompt: list[int], stops: list[str], capsys) -> str:
    """The printed text of an answer, which is also the text that the session returns."""
    session.stops = stops
    text = session.answer(prompt).replace(ESCAPE, "")
    assert capsys.readouterr().out.removesuffix("\n") == text
    return text


@pytest.mark.parametrize("guesses", [False, True], ids=["plain", "guessing"])
def test_an_answer_ends_before_the_first_stop_text(session, guessing, guesses: bool, capsys) -> None:
    """Across tokens, within them, at the very first, in guesses; two that start alike; not in the prompt."""
    asked, draw = guessing if guesses else session, random.Random(0)
    prompt = session.conversation.prompt(TEXT)
    text = answer(session, prompt, [], capsys)
    ids = prompt + generated(new_engine(session.engine.model), prompt, 40, session.params, session.tokenizer.eos_ids)
    assert len(text) > 40
    for _ in range(12):
        start, size = draw.randrange(len(text) - 2), draw.randrange(1, 9)
        stops = [text[start : start + size], text[start : start + size] + "never", "path", "no such"]
        assert answer(asked, prompt, stops, capsys) == text[: min(text.index(stop) for stop in stops if stop in text)]
        assert "Stopped: stop text" in asked.statistics
        cached = asked.engine.cached_ids
        assert cached == ids[: len(cached)]
        assert not any(stop in decoded(cached[len(prompt) : -1]) for stop in stops)
    assert answer(asked, prompt, [text[0]], capsys) == ""
    assert answer(asked, prompt, ["no such text"], capsys) == text


@pytest.mark.parametrize("guesses", [False, True], ids=["plain", "guessing"])
def test_after_a_stop_text_the_cache_is_a_fresh_one(session, guessing, guesses: bool, capsys) -> None:
    asked = guessing if guesses else session
    prompt = session.conversation.prompt(TEXT)
    text = answer(asked, prompt, [], capsys)
    for stop in (text[7:10], text[20:22], text[1:3]):
        kept = answer(asked, prompt, [stop], capsys)
        cached = list(asked.engine.cached_ids)
        for again in (cached + prompt, prompt + session.tokenizer.encode(kept) + prompt, prompt):
            fresh = new_engine(asked.engine.model)
            params = make_params(5, 0.8)
            assert generated(asked.engine, again, 20, params) == generated(fresh, again, 20, params)


@pytest.mark.slow
def test_the_prefix_cache_holds_no_text_after_the_stop_text(demo, tmp_path: Path) -> None:
    flags = ["--checkpoint_path", demo["target"], "--precision", "float32", "--prompt", TEXT * 4, "--ignore_eos"]
    flags += ["--cache_dir", tmp_path, "--max_new_tokens", 60]
    text = run_cli("generate_prefill.py", *flags, "--no_cache").stdout
    stop = text[12:18]
    done = run_cli("generate_prefill.py", *flags, "--stop", stop)
    assert done.stdout.strip("\n") == text[: text.index(stop)].strip("\n")
    stored = len(list((tmp_path / "llama_prefixes").iterdir()))
    run_cli("generate_prefill.py", *flags)
    assert len(list((tmp_path / "llama_prefixes").iterdir())) > stored


def test_a_conversation_goes_on_after_the_printed_text(chat, monkeypatch, capsys) -> None:  # noqa: F811
    """Turn by turn with a stop text is one pass over the printed text."""
    one = session_of(chat["float32"], "--temperature", 0.8)
    conversation = one.conversation
    prompt = conversation.prompt("import os")
    text = answer(one, prompt, [], capsys)
    printed = answer(one, prompt, [text[5:8]], capsys)
    conversation.add("import os", printed)
    assert conversation.messages[-1]["content"].strip() == printed.strip()
    following = conversation.prompt("What does it return?")
    assert following[: len(prompt)] == prompt
    fresh = session_of(chat["float32"], "--temperature", 0.8)
    assert answer(one, following, [], capsys) == answer(fresh, following, [], capsys)
    fresh.stops = [text[5:8]]
    assert talk(fresh, ["import os", "What does it return?"], monkeypatch)[1].prompt == following


def test_a_special_token_ends_an_answer(chat, tmp_path: Path, capsys) -> None:  # noqa: F811
    """It shows as nothing, so no text could be found."""
    flags = ["--temperature", 0, "--ignore_eos", "--raw"]
    plain = session_of(chat["float32"], *flags)
    prompt = plain.conversation.prompt(TEXT)
    ids = generated(new_engine(plain.engine.model), prompt, 20, plain.params)
    content = torch.load(chat["float32"], weights_only=True)
    content["tokenizer"]["added_tokens"]["<|stop|>"] = ids[7]
    content["tokenizer"]["special_tokens"].append("<|stop|>")
    torch.save(content, tmp_path / "special.pth")
    for stop, count in (("<|stop|>", ids.index(ids[7])), ("<|other|>", 20)):
        session = session_of(tmp_path / "special.pth", *flags, "--stop", stop)
        session.answer(prompt)
        assert f"({count} tokens in" in session.statistics
    capsys.readouterr()


def test_the_usual_escapes_are_read(demo) -> None:
    """A line end typed in single quotes."""
    words = ["--checkpoint_path", str(demo["draft"]), "--device", "cpu", "--stop", r"\n\t", "--stop", "\u00e9"]
    assert Session(build_parser().parse_args(words), ["a"]).stops == ["\n\t", "\u00e9"]
