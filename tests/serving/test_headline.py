"""The first sentence of a report, the commands after it, readings of ratios, and the cost of tokens."""

from typing import Any

import pytest
from pydantic import ValidationError

from numprune.serving import report as reports
from numprune.serving.report import Report, page
from numprune.serving.report.headline import headline, next_commands
from tests.serving.conftest import COMPLETE, Json, estimate
from tests.serving.pages import POLICY, Parsed, encoder, full, judged


def local(value: float = 1.15, half_width: float = 0.02, floor: float = 0.03) -> Json:
    """A report without a server, whose decode ratio is this."""
    data: Json = Report.model_validate(COMPLETE).to_json()
    data["identity"]["name"] = "my-model"
    speed = data["speed"]["onnxruntime"]
    speed["decode_tokens_per_s"] = {"ratio": estimate(value, half_width, samples=10, unit="repeat")}
    speed["noise_floor"]["decode_tokens_per_s"]["relative"] = floor
    return data


def quantized() -> Json:
    """The same with weights in fewer bits: parameters say little of its size."""
    data = local()
    before, after = 1_000_000, 250_000
    data["sizes"]["weight_bytes"] = {"baseline": before, "candidate": after, "ratio": after / before}
    of_pruned = {"baseline": 750_000, "candidate": after, "ratio": after / 750_000}
    data["quantization"] = {"scheme": "w4a16", "group_size": 64, "method": "gptq", "weight_bytes": of_pruned}
    return data


def plain(text: str) -> str:
    """With the spaces and the times sign of a keyboard."""
    return " ".join(text.split()).replace("\N{MULTIPLICATION SIGN}", "x")


@pytest.mark.parametrize(
    ("data", "policy", "sentence"),
    [
        (local(), POLICY, "25 % smaller, decode 1.15x faster (ONNX Runtime), perplexity +5.1 %: within your limits."),
        (
            quantized(),
            POLICY,
            "75 % smaller, decode 1.15x faster (ONNX Runtime), perplexity +5.1 %: within your limits.",
        ),
        (
            local(0.8),
            [{**POLICY[0], "max": 0.01}, {**POLICY[2], "max": 0.5}],
            "25 % smaller, decode 1.25x slower (ONNX Runtime), perplexity +5.1 %: outside your limit on NLL "
            "difference, nats/token (upper bound 0.0600, limit ≤ 0.01), and 1 more.",
        ),
        (
            local(1.01),
            [{**POLICY[0], "max": 0.055}],
            "25 % smaller, no clear difference in decode speed (ONNX Runtime), perplexity +5.1 %: undecided on NLL "
            "difference, nats/token (the interval straddles the limit; about 807 samples would settle it).",
        ),
        (
            local(floor=1.2),
            POLICY[:1],
            "25 % smaller, decode speed too noisy to measure (ONNX Runtime), perplexity +5.1 %: within your limits.",
        ),
        (
            full(),
            [{**POLICY[0], "metric": "quality.unknown"}],
            "25 % smaller, decode 1.20x faster (vLLM), perplexity +5.1 %: outside your limit on quality.unknown "
            "(not measured, limit ≤ 0.25).",
        ),
        (
            encoder("embedding"),
            POLICY[:1],
            "25 % smaller, latency 1.25x lower (ONNX Runtime, 1 x 128 tokens), distance from baseline 0.020 "
            "(1 - cosine): within your limits.",
        ),
        (
            encoder("masked-lm"),
            POLICY[:1],
            "25 % smaller, latency 1.25x lower (ONNX Runtime, 1 x 128 tokens), NLL difference +0.020 "
            "(nats/masked token): within your limits.",
        ),
        (
            encoder("classification"),
            POLICY[:1],
            "25 % smaller, latency 1.25x lower (ONNX Runtime, 1 x 128 tokens), KL from baseline 0.020 "
            "(nats/text): within your limits.",
        ),
        (
            encoder("image-classification"),
            [{"metric": "speed.onnxruntime.shapes.8x128.latency.ratio", "bound": "point", "max": 0.5}],
            "25 % smaller, latency 1.25x lower (ONNX Runtime, 1 image), NLL difference +0.020 (nats/image): outside "
            "your limit on Latency of a batch, ratio (onnxruntime, 8 images) (value 0.800, limit ≤ 0.5).",
        ),
    ],
)  # fmt: skip
def test_a_report_starts_with_one_sentence(data: Json, policy: Any, sentence: str) -> None:
    report = judged(data, policy)
    assert plain(headline(report)) == sentence
    assert sentence in plain(Parsed(page.html(report)).text)
    assert plain(reports.markdown(report).splitlines()[2]) == sentence


def test_a_report_without_pruning_or_verdict_has_a_headline() -> None:
    bare = {"sizes": None, "quality": None, "speed": {}, "memory": {}}
    assert headline(Report.model_validate({**local(), **bare})) == "Not judged yet."
    assert headline(judged({**local(), **bare}, POLICY[:1])).startswith("Outside your limit on Loss (not measured")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "policy", "commands"),
    [
        (local(), POLICY, ["numprune registry promote my-model@candidate", "numprune serve my-model@production"]),
        (local(), [{**POLICY[0], "max": 0.01}], []),
        (full(), POLICY, []),  # of a report without a name
    ],
)
def test_a_report_that_passes_names_the_next_commands(data: Json, policy: Any, commands: list[str]) -> None:
    report = judged(data, policy)
    assert [*next_commands(report)] == commands
    shown, text = Parsed(page.html(report)).text, reports.markdown(report)
    assert ("Next:" in shown) == ("Next: `" in text) == bool(commands)
    assert all(command in shown and f"`{command}`" in text for command in commands)


def test_a_masked_language_model_is_promoted_and_not_served() -> None:
    data = encoder("masked-lm")
    data["identity"] = {**data["identity"], "name": "my-model"}
    assert [*next_commands(judged(data, POLICY[:1]))] == ["numprune registry promote my-model@candidate"]


@pytest.mark.parametrize("name", ["a; rm -rf ~", "$(id)", "-x", ""])
def test_names_with_shell_syntax_are_refused(name: str) -> None:
    data = local()
    data["identity"]["name"] = name
    with pytest.raises(ValidationError, match=r"identity\.name"):
        Report.model_validate(data)


def test_ratios_are_marked_as_unclear_or_too_noisy() -> None:
    unclear, noisy = (judged(data, POLICY[:1]) for data in (local(1.01), local(floor=1.2)))
    assert "| 1.01 [0.986, 1.034] (n = 10): no clear difference | ± 0.03 |" in reports.markdown(unclear)
    assert "no clear difference, noise ± 3.00 %" in Parsed(page.html(unclear)).text
    assert "(n = 10): too noisy to measure | ± 1.2 |" in reports.markdown(noisy)
    text = Parsed(page.html(noisy)).text
    assert text.count("too noisy to measure") == 3  # the sentence, the main figures, the table
    assert "noise ± 120" not in text


def test_a_price_per_hour_gives_the_cost_of_tokens() -> None:
    """At 3.60 an hour a thousandth each second: 100 tokens/s make a million in 10,000 s."""
    for data, row in (
        (local(), "| cost per million decoded tokens | 10 | 8 |"),
        (full(), "| cost per million output tokens | 10 | 8.333 |"),
        (encoder("image-classification"), "| cost per million images | 10 | 8 |"),
        (encoder(), "| cost per million tokens | 0.07812 | 0.0625 |"),  # 100 and 125 texts/s of 128 tokens
    ):
        priced = Report.model_validate({**data, "price_per_hour": 3.6})
        assert row in reports.markdown(priced)
        assert "cost" not in reports.markdown(Report.model_validate(data))
    assert "Cost per million tokens 0.0781 0.0625" in Parsed(page.html(priced)).text
    assert "Cost" not in page.html(Report.model_validate(data))


@pytest.mark.parametrize("price", [0, -1, float("inf")])
def test_a_price_must_be_positive(price: float) -> None:
    with pytest.raises(ValidationError, match="price_per_hour"):
        Report.model_validate({**local(), "price_per_hour": price})
