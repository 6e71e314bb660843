"""Forward passes of encoders: the load, the metrics, and two real workers."""

import json
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor

from numprune.errors import InputError
from numprune.serving.benchmark.encoding import encode
from numprune.serving.benchmark.passes import METRICS, Pass, Passes, passes_section
from numprune.serving.benchmark.sections import Look
from numprune.serving.benchmark.shapes import EncoderLoad
from numprune.serving.report import RuntimeSpeed

LOAD = EncoderLoad(batch_sizes=(1, 3), lengths=(4, 9), passes=2, repeats=4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch_sizes": ()}, r"load\.batch_sizes = \(\): must be distinct positive integers"),
        ({"lengths": (8, 8)}, r"load\.lengths = \(8, 8\)"),
        ({"lengths": (0,)}, r"load\.lengths"),
        ({"passes": 0, "repeats": 3}, r"load\.passes = 0: .*load\.repeats = 3"),
        ({"repeats": 5}, "must be an even number"),
    ],
)
def test_an_unmeasurable_load_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        EncoderLoad(**fields)


def test_every_shape_has_texts_of_its_size() -> None:
    work = LOAD.work(259)
    assert [(len(batch), len(batch[0])) for batch in work["batches"]] == [(1, 4), (3, 4), (1, 9), (3, 9)] == LOAD.shapes
    assert all(0 <= token < 259 for batch in work["batches"] for text in batch for token in text)
    assert work == LOAD.work(259)
    assert LOAD.positions == 9


class Counting:
    """An encoder whose output for a text that begins with 1 is not finite."""

    name, vocabulary, image, tokens = "counting", 259, None, 256

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        self.seen.append(tokens)
        return torch.where(tokens[:, :1] == 1, inf, tokens[:, :2].float())

    def describe(self) -> dict[str, Any]:
        return {}


def test_every_batch_runs_the_requested_passes_and_failures_count_per_text() -> None:
    encoder = Counting()
    batches = [torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7, 8]])]
    found = encode(encoder, batches, 3)
    assert [one.shape for one in encoder.seen] == [(2, 3)] * 3 + [(1, 2)] * 3
    assert [(one.size, one.length, one.failed) for one in found] == [(2, 3, 1)] * 3 + [(1, 2, 0)] * 3
    assert min(one.latency_ms for one in found) >= 0


def repeat(scale: float, failed: int = 0) -> Passes:
    """Two passes of each shape of LOAD that take `scale` ms a text, and one more in the first."""
    passes = [
        Pass(size, length, scale * size * (1 + extra), failed if (size, length) == (3, 9) else 0)
        for size, length in LOAD.shapes
        for extra in (0, 1)
    ]
    return Passes(tuple(passes), 1.0, 0.0)


def test_a_section_has_every_shape_and_the_first_as_default() -> None:
    look = Look([repeat(2.0)] * 4, [repeat(1.0)] * 4)
    section = passes_section(LOAD, [look], {"baseline": {}})
    speed = RuntimeSpeed.model_validate(section)
    assert list(speed.shapes) == ["1x4", "3x4", "1x9", "3x9"]
    for shape, found in {"1x4": speed, **speed.shapes}.items():
        size = int(shape.partition("x")[0])
        assert found.latency is not None
        assert found.samples_per_s is not None
        assert (found.latency.ratio.value, found.samples_per_s.ratio.value) == (pytest.approx(0.5), pytest.approx(2))
        assert found.baseline.by_repeat["latency"] == (3.0 * size,) * 4
        assert found.baseline.samples_per_s == pytest.approx(1000 * 2 / (2.0 + 4.0))
        assert found.noise_floor["latency"].neighbours == 1
    assert [Passes.from_json(json.loads(json.dumps(one.to_json()))) for one in look.baseline] == look.baseline


def test_a_repeat_with_a_failed_text_is_excluded_from_its_shape() -> None:
    looks = [Look([repeat(2.0)] * 4, [repeat(1.0, failed=1), *[repeat(1.0)] * 3])]
    speed = RuntimeSpeed.model_validate(passes_section(LOAD, looks, {}))
    assert speed.failed_requests == speed.shapes["3x9"].failed_requests == 2
    assert speed.shapes["1x9"].failed_requests == 0
    assert speed.shapes["3x9"].latency is not None
    assert speed.shapes["3x9"].latency.ratio.samples == 3
    assert speed.shapes["3x9"].candidate.by_repeat["latency"][0] is None
    assert set(speed.shapes["1x4"].noise_floor) == set(METRICS)
