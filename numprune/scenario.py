"""What a model does in a budget of time: prefill or decode, in batches of one size, at one length.

No tensor library is needed.
"""

import re
from dataclasses import dataclass
from typing import Literal

from numprune.errors import InputError

RULE = "decode,b=BATCH,ctx=TOKENS or prefill,b=BATCH,len=TOKENS"
_SCENARIO = re.compile(r"(decode,b=(\d{1,6}),ctx|prefill,b=(\d{1,6}),len)=(\d{1,9})")
_TIME = re.compile(r"(\d{1,9}(?:\.\d{1,9})?|\.\d{1,9})\s*(us|ms|s|tok/s)@(.*)")
_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class Scenario:
    """One step of a whole batch.

    Attributes:
        phase: "decode": one more token for each row; "prefill": a prompt until its first token.
        batch: rows.
        tokens: in the KV cache of each row before the step, or in each prompt.
    """

    phase: Literal["decode", "prefill"]
    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.phase},b={self.batch},{'ctx' if self.phase == 'decode' else 'len'}={self.tokens}"

    @property
    def tokens_per_step(self) -> int:
        """Tokens generated or read in one step."""
        return self.batch if self.phase == "decode" else self.batch * self.tokens


def parse_scenario(text: str) -> Scenario:
    """Return the scenario written as `str` of one. Raises InputError."""
    found = _SCENARIO.fullmatch(text.replace(" ", ""))
    if found is None or not int(found[2] or found[3]) or not int(found[4]):
        raise InputError(f"scenario is {text[:80]!r}; it must be {RULE}, with numbers of at least 1")
    return Scenario("decode" if found[2] else "prefill", int(found[2] or found[3]), int(found[4]))


def is_time(text: str) -> bool:
    """Return whether a budget is meant as a time or throughput in a scenario."""
    return "@" in text


def parse_time(text: str) -> tuple[float, Scenario]:
    """Return the milliseconds of one step that a budget like "20ms@decode,b=8,ctx=2048" allows, and its scenario.

    A throughput, like "1500tok/s@decode,b=8,ctx=2048", counts the tokens of all rows.

    Raises:
        InputError: it is neither.
    """
    found = _TIME.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise InputError(f"budget is {text[:80]!r}; it must be a time or throughput over 0 like 20ms@{RULE}")
    scenario = parse_scenario(found[3])
    amount = float(found[1])
    return 1e3 * scenario.tokens_per_step / amount if found[2] == "tok/s" else amount * _MS[found[2]], scenario
