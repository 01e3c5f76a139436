"""Speculative decoding: guess the next tokens cheaply, verify all guesses in one pass of the model.

A guess is accepted if it is the token that the model samples itself, with the same noise, so the text is that of plain
decoding. https://arxiv.org/abs/2302.01318, with the noise shared as in https://arxiv.org/abs/2408.07978
"""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator

import tp
from sampling import SamplingParams

NGRAM_LENGTHS = (16, 8, 5, 3, 2)
GUESS_COUNTS = (1, 2, 3, 4, 7, 11, 15)  # that are tried: passes of 4, 8, 12 and 16 tokens fill blocks of rows
EXPLORE_EVERY = 40  # passes until something other than the fastest is tried
MAX_LOSS = 0.03  # speculation may be slower than plain decoding by this share of its time
MIN_TRIALS = 3  # passes without guesses, and compared guesses of a source, before it can lose: one may be unlucky


class PromptLookup:
    """Guesses the tokens that followed the last n-gram where it occurred before; the longest n-gram counts.

    https://github.com/apoorvumang/prompt-lookup-decoding, with an index that grows with the text, so that a long text
    takes no longer.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []  # the text, which grows in place
        self.ngrams: dict[tuple[int, ...], int] = {}  # position after its latest occurrence before the end
        self.indexed = 0  # tokens of `ids` whose n-grams are in `ngrams`

    def find(self, ids: list[int]) -> tuple[int, int]:
        """Length of the longest final n-gram that occurred before, and the position after it; (0, 0) if none did."""
        if ids is not self.ids:
            self.ids, self.ngrams, self.indexed = ids, {}, 0
        for end in range(self.indexed + 1, len(ids)):
            for length in NGRAM_LENGTHS:
                self.ngrams[tuple(ids[max(end - length, 0) : end])] = end
        self.indexed = max(len(ids) - 1, 0)
        for length in NGRAM_LENGTHS:
            if position := self.ngrams.get(tuple(ids[-length:])):
                return length, position
        return 0, 0

    def propose(self, position: int, k: int) -> list[int]:
        """`k` tokens of the text from `position` on; if it ends first, repeat them."""
        return [self.ids[position + i % (len(self.ids) - position)] for i in range(k)]


class MovingAverage:
    """An exponential moving average over passes: a value weighs DECAY less for each pass since it was added."""

    DECAY = 0.98

    def __init__(self) -> None:
        self.count = 0
        self.weight = 0.0
        self.value = 0.0
        self.last_pass = 0

    def add(self, value: float, now: int) -> None:
        """Add the value of pass `now`."""
        self.count += 1
        self.weight = self.DECAY ** (now - self.last_pass) * self.weight + 1
        self.last_pass = now
        self.value += (value - self.value) / self.weight

    def add_seconds(self, seconds: float, now: int) -> None:
        """Add a duration. Drop the first one, in which the step was captured; clip an outlier."""
        if self.count == 1:
            self.weight = 0.0
        self.add(min(seconds, 1.5 * self.value) if self.count > 2 else seconds, now)


class Speculation:
    """Chooses the source of guesses and their number with the most expected tokens per second, by measured averages.

    Sources are "none", "draft", and "lookup n" for a match of n tokens.
    """

    def __init__(self, draft, speculate_k: int, lookup: PromptLookup | None = None) -> None:
        self.draft = draft  # a generate.Engine, or None
        self.lookup = lookup
        self.guess_counts = [k for k in GUESS_COUNTS if k < speculate_k] + [speculate_k]
        # By source: the probability that a guess is accepted, if the guesses before it were.
        self.acceptance = defaultdict(MovingAverage)
        self.pass_seconds = [MovingAverage() for _ in range(speculate_k + 1)]  # index: number of guesses
        self.guess_seconds = defaultdict(MovingAverage)  # by source: the time of one guess; none for lookup
        self.last_used: dict[tuple[str, int], int] = defaultdict(int)  # (source, k): number of the pass
        self.passes = 0
        self.lost = 0.0  # the time that speculation has taken beyond what it may, in passes without guesses
        self.start()

    def start(self) -> None:
        """Start the counts of a new answer."""
        self.num_passes = self.num_drafted = self.num_accepted = 0

    def expected_rates(self, source: str, counts: list[int]) -> Iterator[tuple[float, str, int]]:
        """Expected tokens per second with guesses of `source`: (rate, source, number of guesses).

        If guesses are accepted with probability a, a pass with k of them gives 1 + a + ... + a^k tokens,
        https://arxiv.org/abs/2211.17192, equation 1. A pass takes as long as measured; the first number that was not
        measured is taken to cost as much as the one before it, so that it is tried.
        """
        seconds = self.pass_seconds[0].value
        for k in counts:
            is_measured = self.pass_seconds[k].count > 1  # not by the first pass, in which the step was captured
            seconds = self.pass_seconds[k].value if is_measured else seconds
            tokens = sum(self.acceptance[source].value ** i for i in range(k + 1))
            yield tokens / (seconds + k * self.guess_seconds[source].value), source, k
            if not is_measured:
                return

    def choose(self, max_k: int, sources: dict[str, int]) -> tuple[str, int]:
        """The source, one of `sources` or "none", and the number of its guesses to verify now, at most max_k.

        First measure passes without guesses, then each source, with at most the number of guesses in `sources`. Now and
        then explore: of the other sources, and of the numbers from half to twice the best one, what was not used for
        the longest time. While speculation has lost more than it may, no other source is measured.
        """
        plain = self.pass_seconds[0]
        counts = [k for k in self.guess_counts if k <= max_k]
        if plain.count <= MIN_TRIALS or not counts:
            return "none", 0
        rates = [(1 / plain.value, "none", 0)]
        for source, trial_k in sources.items():
            if self.acceptance[source].count >= MIN_TRIALS:
                rates += self.expected_rates(source, counts)
            elif self.lost <= 0:
                return source, max(k for k in counts if k <= trial_k)
        _, source, k = max(rates)
        if self.passes % EXPLORE_EVERY > 0:
            return source, k
        others = [("none", 0), *((each, 1) for each in sources if each != source)]
        others += [(source, n) for n in counts if k // 2 <= n <= 2 * k]
        return min(others, key=self.last_used.__getitem__)

    def update(self, source: str, k: int, accepted: int, pass_seconds: float) -> None:
        """Add a pass with `k` guesses to the averages."""
        self.passes += 1
        self.num_passes += 1
        self.num_drafted += k
        self.num_accepted += accepted
        self.last_used[source, k] = self.passes
        for i in range(min(accepted + 1, k)):
            self.acceptance[source].add(float(i < accepted), self.passes)
        self.pass_seconds[k].add_seconds(pass_seconds, self.passes)
        seconds = self.pass_seconds[k].value + k * self.guess_seconds[source].value
        plain = self.pass_seconds[0].value or seconds  # before the first pass without guesses
        # The first pass with k guesses is captured, which takes longer; so the time that counts has a limit.
        self.lost += min(seconds / plain, 2 * k + 1) - (1 + MAX_LOSS) * (accepted + 1)

    def ask_draft(self, ids: list[int], k: int, params: SamplingParams) -> list[int]:
        """Up to `k` guesses of the draft. After an error it is not asked again."""
        try:
            if len(self.draft.cache_users) > 1:
                self.draft.cached_ids = ids[:-1]  # the target has cached them
            self.draft.match_prefix(ids)
            if len(ids) - len(self.draft.cached_ids) > self.guess_counts[-1] + 1:
                self.draft.prefill(ids, params)  # the draft catches up before the clock starts
            start = time.perf_counter()
            guesses = self.draft.draft(ids, k, params)
            self.guess_seconds["draft"].add_seconds((time.perf_counter() - start) / len(guesses), self.passes)
            return guesses
        except ValueError as error:
            print(f"going on without the draft {self.draft.checkpoint.path}: {error}", file=sys.stderr)
            self.draft = None
            return []

    def speculative_decode(self, engine, ids: list[int], max_new_tokens: int, params: SamplingParams) -> list[int]:
        """The tokens that follow `ids`, from one pass of an Engine: one, and one more for each accepted guess."""
        length, position = self.lookup.find(ids) if self.lookup else (0, 0)
        sources = {"draft": 1} if self.draft and len(ids) <= self.draft.max_seq_length else {}
        if length > 0:
            sources[f"lookup {length}"] = length // 2
        # Rank 0 chooses, because the clocks of the ranks differ.
        source, k = tp.from_rank(lambda: self.choose(max_new_tokens - 1, sources))
        if source == "draft":
            guesses = self.ask_draft(ids, k, params)
        else:
            guesses = self.lookup.propose(position, k) if k > 0 else []
        start = time.perf_counter()
        samples = engine.forward([ids[-1], *guesses], params)
        accepted = len(os.path.commonprefix([guesses, samples]))
        self.update(source, len(guesses), accepted, time.perf_counter() - start)
        engine.truncate(len(ids) + accepted)
        return samples[: accepted + 1]
