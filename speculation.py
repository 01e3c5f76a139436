"""Guessing ahead: tokens from a draft and from the text itself, and how many of them pay.

The model verifies guesses in one pass and keeps those that are its own samples, so nothing here can change the text;
https://arxiv.org/abs/2408.07978 has the coupling by shared noise.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch

import tp
from kernels.sampling import Sampling

PLAIN, DRAFT = -1, 0  # sources of guesses: none, a draft; the others are the lengths of what was found in the text


class Lookup:
    """The tokens behind the latest earlier place of the last few. https://github.com/apoorvumang/prompt-lookup-decoding

    An index of all places grows with the text, so finding one takes no longer in a long text.
    """

    LENGTHS = range(5, 1, -1)

    def __init__(self) -> None:
        self.ids: list[int] = []  # the text, which grows in place
        self.places: dict[tuple[int, ...], int] = {}  # where these tokens ended last, before the last token
        self.read = 0  # tokens of the text that are in it

    def find(self, ids: list[int]) -> tuple[int, int]:
        """How many of the last tokens stood before, at most five, and where these end; (0, 0) if there are not two."""
        if ids is not self.ids:
            self.ids, self.places, self.read = ids, {}, 0
        for end in range(self.read + 1, len(ids)):
            for length in self.LENGTHS:
                if length <= end:
                    self.places[tuple(ids[end - length : end])] = end
        self.read = max(len(ids) - 1, 0)
        for length in self.LENGTHS:
            if place := self.places.get(tuple(ids[-length:])):
                return length, place
        return 0, 0


def follow(ids: list[int], place: int, count: int) -> list[int]:
    """So many of the tokens from that place on, again and again if they are fewer."""
    follows = ids[place : place + count]
    return [follows[i % len(follows)] for i in range(count)]


class Mean:
    """Of what passes gave: the older, the less it weighs."""

    DECAY = 0.97  # for each pass since the last value, up to LONG: one that is rare must not decide alone
    LONG = 8

    def __init__(self) -> None:
        self.count = 0
        self.weight = 0.0
        self.value = 0.0
        self.last = 0

    def add(self, value: float, now: int, forget: bool = False) -> None:
        """Of pass `now`; all before may be forgotten."""
        decay = 0.0 if forget else self.DECAY ** min(now - self.last, self.LONG)
        self.count += 1
        self.last = now
        self.weight = decay * self.weight + 1
        self.value += (value - self.value) / self.weight


class Speculation:
    """Whose guesses to verify, and how many: of what can be had, whatever gives the most tokens a second.

    `draft` (ids, count, sampling) -> guesses is an Engine's. How often the first guess stands, and each further one if
    those before it do, is learned for each source, so for each length that was found in the text; the time of a pass by
    the number of guesses, for those of a draft and those of the text.
    """

    EVERY = 32  # passes until something beside the fastest is tried
    TRIALS = 3  # of a source before it can lose: one pass may have been unlucky

    def __init__(self, draft: Callable[..., list[int]] | None, longest: int, lookup: Lookup | None = None) -> None:
        self.draft = draft
        self.lookup = lookup
        self.longest = longest
        self.read: tuple[list[int], int] = ([], 0)  # the text that the draft saw last, and how far
        self.silent: list[int] = []  # the text that is too long for the draft
        self.rounds: list[tuple[int, int, int]] = []  # of an answer: source, guesses tried, accepted, of each pass
        self.passes = 0
        self.tried: dict[int, int] = defaultdict(int)  # by source: the pass that tried it last
        self.stands = defaultdict(lambda: [Mean() for _ in range(longest)])  # by source, of each guess
        # By the number of guesses; for none it is the same, whoever would have guessed.
        self.text_seconds = [Mean() for _ in range(longest + 1)]
        self.draft_seconds = [self.text_seconds[0], *(Mean() for _ in range(longest))]

    def seconds(self, source: int) -> list[Mean]:
        """Those of its passes."""
        return self.draft_seconds if source == DRAFT else self.text_seconds

    def rates(self, source: int, most: int) -> Iterator[tuple[float, int, int]]:
        """Expected tokens a second, `source`, and number, for each number of its guesses.

        The time of a number that was not tried lies on the line between those of fewer and more; of up to twice as many
        as were tried, it is hoped, they take no longer. The first time does not count: a step of so many rows may have
        been recorded.
        """
        seconds = self.seconds(source)
        known = [count for count, mean in enumerate(seconds) if mean.count > 1]
        tokens = chance = 1.0
        for count in range(1, min(most, max(1, 2 * known[-1])) + 1):
            mean = self.stands[source][count - 1]
            if mean.count > 0:  # else as the one before
                stands = mean.value
            chance *= stands
            tokens += chance
            below = max(each for each in known if each <= count)
            above = min((each for each in known if each >= count), default=below)
            part = (count - below) / max(above - below, 1)
            expected = seconds[below].value + part * (seconds[above].value - seconds[below].value)
            yield tokens / expected, source, count

    def choose(self, room: int, sources: list[int]) -> tuple[int, int]:
        """One of the sources or PLAIN, and the number of its guesses to try now, at most `room`.

        None are measured first, then one of each source. Now and then something else than the fastest is tried: what
        was not for the longest time, or more or fewer guesses.
        """
        plain, most = self.text_seconds[0], min(room, self.longest)
        if plain.count < 2 or most < 1:
            return PLAIN, 0
        options = [(1 / plain.value, PLAIN, 0)]
        for source in sources:
            if self.stands[source][0].count < self.TRIALS:
                return source, 1
            options += self.rates(source, most)
        _, fastest, count = max(options)
        turn, rest = divmod(self.passes, self.EVERY)
        if rest > 0:
            return fastest, count
        if turn % 2 == 0 or fastest == PLAIN:
            fastest = min([PLAIN, *sources], key=self.tried.__getitem__)
            return fastest, 0 if fastest == PLAIN else 1
        return fastest, min(2 * count, most) if turn % 4 == 1 else max(count - max(1, count // 3), 1)

    def learn(self, source: int, tried: int, accepted: int, seconds: float) -> None:
        """Note the guesses and the seconds of a pass."""
        self.rounds.append((source, tried, accepted))
        self.passes += 1
        self.tried[source] = self.passes
        for i in range(min(accepted + 1, tried)):
            self.stands[source][i].add(float(i < accepted), self.passes)
        mean = self.seconds(source)[tried]
        if mean.count > 2:
            seconds = min(seconds, 3 * mean.value)  # a pause of the machine is not the cost of a pass
        mean.add(seconds, self.passes, forget=mean.count == 1)

    def advance(self, engine, ids: list[int], room: int, sampling: Sampling) -> list[int]:
        """The tokens that follow `ids`, in one pass of an Engine: one, and those of up to `room` guesses that stand."""
        length, place = self.lookup.find(ids) if self.lookup else (0, 0)
        sources = [DRAFT] if self.draft and self.silent is not ids else []
        if length > 0:
            sources.append(length)
        # The first rank's clock decides.
        choice = torch.tensor(self.choose(room, sources), device=engine.cache.device)
        source, count = tp.share(choice).tolist()
        if source == DRAFT:
            if self.read[0] is not ids or len(ids) - self.read[1] > self.longest + 1:
                self.draft(ids, 1, sampling)  # it reads what it has missed: that is not the cost of a guess
            self.read = ids, len(ids)
        start = time.perf_counter()
        guesses = []
        if source > DRAFT:
            guesses = follow(ids, place, count)
        elif source == DRAFT:
            guesses = self.draft(ids, count, sampling)
            self.silent = [] if guesses else ids
        samples = engine.run([ids[-1], *guesses], sampling)
        accepted = len(os.path.commonprefix([guesses, samples]))
        self.learn(source, len(guesses), accepted, time.perf_counter() - start)
        del engine.ids[len(ids) + accepted :]  # keys and values of guesses that did not stand
        return samples[: accepted + 1]
