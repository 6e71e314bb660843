"""What a model does in a budget of time: prefill, decode, a whole request or a forward pass, of a batch of one length.

No tensor library is needed.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal, cast

from numprune.blocks import Anatomy
from numprune.errors import InputError

RULE = "decode,b=BATCH,ctx=TOKENS, prefill,b=BATCH,len=TOKENS or request,b=BATCH,len=TOKENS,out=TOKENS"
RULE_OF_TEXTS, RULE_OF_IMAGES = "forward,b=BATCH,len=TOKENS", "forward,b=BATCH"
_RULES = f"{RULE}; for encoders {RULE_OF_TEXTS}, or {RULE_OF_IMAGES} for images"
_SCENARIO = re.compile(r"(decode|prefill|request|forward),b=(\d{1,6})(?:,(ctx|len)=(\d{1,9}))?(?:,out=(\d{1,9}))?")
_LENGTH: dict[str, tuple[str | None, ...]] = {
    "decode": ("ctx",),
    "prefill": ("len",),
    "request": ("len",),
    "forward": ("len", None),
}
_TIME = re.compile(r"(\d{1,9}(?:\.\d{1,9})?|\.\d{1,9})\s*(us|ms|s|tok/s|x)@(.*)")
_AMOUNT = re.compile("[\\d.]+\\s*(us|ms|s|tok/s|x|\N{MULTIPLICATION SIGN})")
_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class Scenario:
    """What a whole batch does once.

    Attributes:
        phase: "decode": one more token for each row; "prefill": a prompt until its first token; "request": a prompt
            and all tokens of the answer; "forward": a forward pass of an encoder.
        batch: rows.
        tokens: in the KV cache of each row before the step, or in each prompt or text; None for images.
        output: tokens of each answer; None except for a request.
    """

    phase: Literal["decode", "prefill", "request", "forward"]
    batch: int
    tokens: int | None
    output: int | None = None

    def __str__(self) -> str:
        length = "" if self.tokens is None else f",{'ctx' if self.phase == 'decode' else 'len'}={self.tokens}"
        output = "" if self.output is None else f",out={self.output}"
        return f"{self.phase},b={self.batch}{length}{output}"

    @property
    def tokens_per_step(self) -> int:
        """Tokens generated, or read if none is generated after the first. Raises InputError for images."""
        if self.tokens is None:
            raise InputError(f"budget in tok/s@{self}: images have no tokens; give a time")
        if self.phase == "request":
            return self.batch * (self.output or 0)
        return self.batch if self.phase == "decode" else self.batch * self.tokens

    def steps(self) -> "list[tuple[Scenario, int]]":
        """Return what it consists of, and how often: a request of its prefill, and of decoding at the mean length."""
        if self.tokens is None or self.output is None:
            return [(self, 1)]
        decode = Scenario("decode", self.batch, self.tokens + (self.output - 2) // 2)
        return [(Scenario("prefill", self.batch, self.tokens), 1), (decode, self.output - 1)]


@dataclass(frozen=True)
class StepLimit:
    """The limit of one step: `ms` milliseconds, or None: the unpruned model's latency divided by `speedup`."""

    scenario: Scenario
    ms: float | None
    speedup: float | None = None


def parse_scenario(text: str) -> Scenario:
    """Return the scenario written as `str` of one. Raises InputError."""
    found = _SCENARIO.fullmatch(text.replace(" ", ""))
    if found is None or found[3] not in _LENGTH[found[1]] or not int(found[2]) or not int(found[4] or 1):
        raise InputError(f"scenario is {text[:80]!r}; it must be {_RULES}, with numbers of at least 1")
    if int(found[5] or 0) < 2 if found[1] == "request" else found[5]:
        raise InputError(f"scenario is {text[:80]!r}; out, at least 2, is the length of the answers of a request")
    return Scenario(
        cast(Any, found[1]), int(found[2]), *(int(tokens) if tokens else None for tokens in found.group(4, 5))
    )


def check_scenario(scenario: Scenario, anatomy: Anatomy, positions: int) -> None:
    """Refuse a scenario that a model does not run. Raises InputError.

    Args:
        positions: that it needs, as `Load.positions`.
    """
    generates, images = anatomy.task == "causal-lm", anatomy.image is not None
    if generates == (scenario.phase == "forward") or images == (scenario.tokens is not None):
        rule = RULE if generates else RULE_OF_IMAGES if images else RULE_OF_TEXTS
        raise InputError(f"scenario {scenario}: for the task {anatomy.task} it must be {rule}")
    if positions > anatomy.context:
        raise InputError(
            f"scenario {scenario} needs {positions} positions, and the model has {anatomy.context}; choose fewer tokens"
        )


def is_time(text: str) -> bool:
    """Return whether a budget is meant as a time, throughput or speedup, even without its scenario."""
    return "@" in text or _AMOUNT.fullmatch(text.strip()) is not None


def parse_time(text: str) -> StepLimit:
    """Return what a budget like "20ms@decode,b=8,ctx=2048" or "1.3x@decode,b=8,ctx=2048" allows.

    A throughput, like "1500tok/s@decode,b=8,ctx=2048", counts the tokens of all rows.

    Raises:
        InputError: it is neither.
    """
    found = _TIME.fullmatch(text.strip().replace("\N{MULTIPLICATION SIGN}", "x"))
    if found is None or not float(found[1]):
        raise InputError(
            f"budget is {text[:80]!r}; it must be a time or throughput over 0, or a speedup over 1, like 20ms, "
            f"1500tok/s or 1.3x, followed by @ and {_RULES}"
        )
    scenario = parse_scenario(found[3])
    amount, unit = float(found[1]), found[2]
    if unit == "x":
        if amount <= 1:
            raise InputError(f"budget is {text[:80]!r}: the model is that fast already; ask for more than 1x")
        return StepLimit(scenario, None, amount)
    return StepLimit(scenario, 1e3 * scenario.tokens_per_step / amount if unit == "tok/s" else amount * _MS[unit])
