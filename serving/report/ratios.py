"""How to read a runtime's ratios, and the cost of its tokens."""

from typing import NamedTuple

from numprune.serving.report import names, words
from numprune.serving.report.models import Report, RuntimeSpeed

UNCLEAR, TOO_NOISY = "no clear difference", "too noisy to measure"
_WIDEST_FLOOR = 1.0  # the baseline differs from itself by 100 %


def floor(name: str, found: RuntimeSpeed) -> float | None:
    """The noise floor of a ratio."""
    return found.noise_floor[name].relative if name in found.noise_floor else None


def reading(name: str, found: RuntimeSpeed) -> str:
    """Classify a ratio by its interval and noise floor; empty if nothing was measured."""
    ratio = getattr(found, name)
    if ratio is None or ratio.ratio.value is None or None in ratio.ratio.interval95:
        return ""
    noise = floor(name, found) or 0.0
    if noise > _WIDEST_FLOOR:
        return TOO_NOISY
    low, high = ratio.ratio.interval95
    if low <= 1 <= high:
        return UNCLEAR
    if abs(ratio.ratio.value - 1) <= noise:
        return "within the noise"
    if name in words.ENERGY:
        return "more" if low > 1 else "less"
    return "faster" if (low > 1) == (name in words.RATES) else "slower"


_COUNTED = {"output_tokens_per_s": "output tokens", "decode_tokens_per_s": "decoded tokens", "samples_per_s": "tokens"}


class Cost(NamedTuple):
    """The cost of a million tokens or images, in the currency of the price; None if throughput was not measured."""

    tokens: str
    baseline: float | None
    candidate: float | None


def cost(report: Report, found: RuntimeSpeed, shape: str = "") -> Cost | None:
    """None if the recipe gives no price, or this runtime has no throughput.

    For a server, output tokens are counted over the whole load; otherwise over decoding alone.

    Args:
        shape: of an encoder, like `8x128`, whose throughput is in texts or images.
    """
    price, one, other = report.price_per_hour, found.baseline, found.candidate
    name = next((name for name in _COUNTED if getattr(one, name) is not None), None)
    if price is None or name is None or (name == "samples_per_s" and not shape):
        return None
    images = names.of_images(report)
    count = int(shape.split("x")[1]) if name == "samples_per_s" and not images else 1  # tokens per text
    rates = [getattr(side, name) for side in (one, other)]
    return Cost(
        "images" if images else _COUNTED[name],
        *(price / 3600 * 1e6 / (rate * count) if rate else None for rate in rates),
    )
