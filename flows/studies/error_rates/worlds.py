"""Simulated worlds with known truth: text on which a candidate differs from its baseline, and timings of both.

The shape of the text "as seen" is that of a real comparison: the embedded model with 30 % removed against itself,
dense, on its 69 held-out documents. Logarithms of their lengths in tokens have mean 6.54 and standard deviation 1.25;
their differences (mean 0.106, standard deviation 0.068 nats per token) a skewness of 1.4, that of a gamma distribution
of shape 2, and a correlation of 0.12 with the logarithm of the length.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from numprune.serving.benchmark.sections import Look

METRIC = "decode_tokens_per_s"

_MEDIAN_TOKENS = math.exp(6.54)
_DOCUMENT_SD = 0.068  # nats per token, from document to document: shared by its tokens
_TOKEN_SD = 0.7  # nats, from token to token within a document


@dataclass(frozen=True)
class Text:
    """Documents on which the candidate is on average neither better nor worse than the baseline.

    Attributes:
        spread: standard deviation of the logarithms of lengths; 0: equal lengths.
        shape: of the gamma distribution of the documents' differences, skewed towards worse; infinite: normal.
        longer_worse: correlation of a document's difference with its log length.
    """

    name: str
    spread: float
    shape: float = math.inf
    longer_worse: float = 0.0

    def draw(self, generator: np.random.Generator, documents: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (sums of NLL differences, tokens), both (documents,); E[sum] is 0 for every shape."""
        z = generator.normal(size=documents)
        tokens = _MEDIAN_TOKENS * np.exp(self.spread * z)
        if math.isinf(self.shape):
            own = generator.normal(size=documents)
        else:
            own = (generator.gamma(self.shape, size=documents) - self.shape) / math.sqrt(self.shape)
        # Over tokens, E[z] is `spread`, because long documents have more of them.
        shared = self.longer_worse * (z - self.spread) + math.sqrt(1 - self.longer_worse**2) * own
        noise = generator.normal(size=documents) / np.sqrt(tokens)
        return tokens * (_DOCUMENT_SD * shared + _TOKEN_SD * noise), tokens


@dataclass(frozen=True)
class Items:
    """Items of a task, some of which only one of two models answers right: the flips.

    Attributes:
        flips: their share with equal accuracies, both kinds alike; a change of accuracy adds flips of one kind.
        together: items that flip together, as those about one passage may.
    """

    name: str
    flips: float
    together: int = 1

    def draw(self, generator: np.random.Generator, items: int, change: float = 0.0) -> tuple[int, int]:
        """Return the flips from right to wrong and from wrong to right; E[second - first] is `change` of the items."""
        lost, gained = self.flips / 2 + max(-change, 0), self.flips / 2 + max(change, 0)
        found = generator.multinomial(items // self.together, [lost, gained, 1 - lost - gained]) * self.together
        return int(found[0]), int(found[1])


TASKS = (
    Items("2 % flips", 0.02),
    Items("10 % flips", 0.1),
    Items("30 % flips", 0.3),
    Items("10 % flips, five items at a time", 0.1, 5),
)

TEXTS = (
    Text("documents of one length, normal differences", 0.0),
    Text("as seen: lengths and differences skewed", 1.25, 2.0, 0.12),
    Text("as seen, but longer documents lose more", 1.25, 2.0, 0.25),
    Text("heavy: lengths and differences more skewed", 1.4, 0.5),
)


@dataclass(frozen=True)
class Repeat:
    """The part of a repeat that the benchmark's sections use."""

    speed: float
    failed: int = 0

    def metrics(self) -> dict[str, float]:
        return {METRIC: self.speed}


Noise = Callable[[np.random.Generator, int], np.ndarray]  # adds noise to (times,) log speeds in sequence


@dataclass(frozen=True)
class Machine:
    """A machine on which candidate and baseline take turns.

    Attributes:
        noise: of both sides, in log speed.
        stalls: chance that a repeat of the candidate only is slower by e^-x, with x exponential of mean 0.3.
    """

    name: str
    noise: Noise
    stalls: float = 0.0

    @property
    def truth(self) -> float:
        """Candidate / baseline, of geometric means, for a candidate that is equal except for its stalls."""
        return math.exp(-0.3 * self.stalls)

    def draw(self, generator: np.random.Generator, repeats: int) -> Look[Repeat]:
        """Return the repeats of baseline and candidate, interleaved as the benchmark does: A B B A A B …"""
        order = [side for index in range(repeats) for side in ((0, 1) if index % 2 == 0 else (1, 0))]
        logs = self.noise(generator, 2 * repeats)
        sides: tuple[list[Repeat], list[Repeat]] = ([], [])
        for side, log in zip(order, logs, strict=True):
            stalled = side == 1 and generator.random() < self.stalls
            sides[side].append(Repeat(100 * math.exp(log - (generator.exponential(0.3) if stalled else 0.0))))
        return Look(*sides)


def _steady(generator: np.random.Generator, times: int) -> np.ndarray:
    return generator.normal(0, 0.03, times)


def _drift(generator: np.random.Generator, times: int) -> np.ndarray:
    return _steady(generator, times) - np.linspace(0, 0.3, times)


def _wander(generator: np.random.Generator, times: int) -> np.ndarray:
    return _steady(generator, times) + np.cumsum(generator.normal(0, 0.03, times))


def _outliers(generator: np.random.Generator, times: int) -> np.ndarray:
    return _steady(generator, times) - generator.exponential(0.3, times) * (generator.random(times) < 0.1)


def _uneven(generator: np.random.Generator, times: int) -> np.ndarray:
    return _steady(generator, times) * np.exp(generator.normal(0, 0.8, times))


def _neighbour(generator: np.random.Generator, times: int) -> np.ndarray:
    """Another program uses the machine for several consecutive repeats."""
    start, length = generator.integers(0, times), generator.integers(1, 7)
    during = np.arange(times) - start
    return _steady(generator, times) - 0.3 * ((during >= 0) & (during < length))


MACHINES = (
    Machine("steady", _steady),
    Machine("drift: 30 % slower at the end", _drift),
    Machine("random walk", _wander),
    Machine("one repeat in ten stalls", _outliers),
    Machine("noise of uneven size", _uneven),
    Machine("a neighbour for some repeats", _neighbour),
    Machine("only the candidate stalls, one repeat in ten", _steady, 0.1),
)
