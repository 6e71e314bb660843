import json
import math

import pytest

from numprune.serving.benchmark.load import Load
from numprune.serving.benchmark.samples import Generation, Repeat
from numprune.serving.benchmark.sections import Look, memory_section, speed_section
from numprune.serving.report import RuntimeMemory, RuntimeSpeed

LOAD = Load(prompts=2, prompt_length=10, output_length=3, repeats=6)


def repeats(scale: float, failed_at: tuple[int, ...] = ()) -> list[Repeat]:
    """Six repeats of two batches; each repeat has its own speed, which both sides share."""
    return [
        Repeat(
            tuple(
                Generation(1, 10, 20 * scale * drift, [4 * scale * drift, 6 * scale * drift], int(index in failed_at))
                for _ in range(2)
            ),
            ran_s=1.0,
            waited_s=0.0,
        )
        for index, drift in enumerate((1.0, 1.1, 1.1, 1.3, 0.9, 1.0))
    ]


def test_metrics_of_a_repeat():
    batches = (Generation(2, 10, 20.0, [4.0, 6.0], 0), Generation(2, 10, 30.0, [5.0, 5.0], 0))
    metrics = Repeat(batches, 1.0, 0.0).metrics()
    assert metrics == pytest.approx(
        {
            "ttft": 25.0,
            "itl": 5.0,
            "e2e": 35.0,
            "decode_tokens_per_s": 8 / 0.020,  # two prompts at a time, two steps, twice
            "prefill_tokens_per_s": 40 / 0.050,
        }
    )


def test_sections_have_the_report_format():
    section = speed_section(LOAD, [Look(repeats(1.0), repeats(0.8))], {"baseline": {"device": "cpu"}, "candidate": {}})
    speed = RuntimeSpeed.model_validate(section)

    assert speed.order == "ABBAABBAABBA"
    assert (speed.warmup, speed.repeats, speed.failed_requests) == (1, 6, 0)
    assert speed.ttft.ratio.value == pytest.approx(0.8)
    assert speed.itl.ratio.value == pytest.approx(0.8)
    assert speed.decode_tokens_per_s.ratio.value == pytest.approx(1.25)
    assert speed.prefill_tokens_per_s.ratio.interval95 == pytest.approx((1.25, 1.25))
    assert speed.decode_tokens_per_s.ratio.samples == 6
    assert speed.baseline.itl_ms.samples == 24
    assert speed.baseline.ttft_ms.p50 == pytest.approx(21.0)
    assert speed.baseline.ttft_ms.p90 is None  # twelve samples do not support it
    assert speed.baseline.decode_tokens_per_s == pytest.approx(24 / (12 * 0.010 * 6.4 / 6))


def test_the_noise_floor_uses_consecutive_baseline_repeats():
    section = speed_section(LOAD, [Look(repeats(1.0), repeats(0.8))], {})
    # "ABBAABBAABBA": the baseline's repeats 1 and 2 (equally fast), and 3 and 4 (1.3 and 0.9), counted from 0.
    assert section["noise_floor"]["itl"]["neighbours"] == 2
    assert section["noise_floor"]["itl"]["relative"] > 0.3
    steady = [repeats(1.0)[0]] * 6
    assert speed_section(LOAD, [Look(steady, [repeats(0.8)[0]] * 6)], {})["noise_floor"]["ttft"]["relative"] == 0.0
    assert (
        speed_section(LOAD, [Look(steady, repeats(0.8))], {})["noise_floor"]["ttft"]["relative"] > 0.1
    )  # as the pairs say


def test_looks_are_pooled_but_repeats_of_different_looks_are_not_neighbours():
    """Between the last repeat of one look and the first of the next the processes were started again."""
    one, other = Look(repeats(1.0), repeats(0.8)), Look([*repeats(2.0)[1:], repeats(2.0)[0]], repeats(1.0))
    apart = [speed_section(LOAD, [look], {}) for look in (one, other)]
    both = speed_section(LOAD, [one, other], {})
    RuntimeSpeed.model_validate(both)
    assert (both["looks"], both["repeats"], both["order"]) == (2, 12, "ABBAABBAABBAABBAABBAABBA")
    assert both["itl"]["ratio"]["samples"] == 12
    values = [section["itl"]["ratio"]["value"] for section in apart]
    assert both["itl"]["ratio"]["value"] == pytest.approx(math.sqrt(math.prod(values)))
    assert both["noise_floor"]["itl"]["neighbours"] == 4
    assert both["baseline"]["itl_ms"]["samples"] == 48
    joined = apart[0]["baseline"]["by_repeat"]["itl"] + apart[1]["baseline"]["by_repeat"]["itl"]
    assert both["baseline"]["by_repeat"]["itl"] == joined


def test_a_repeat_keeps_all_its_samples():
    for repeat in repeats(0.8, failed_at=(1,)):
        assert Repeat.from_json(json.loads(json.dumps(repeat.to_json()))) == repeat


def test_failed_requests_are_counted_and_their_pairs_excluded():
    section = speed_section(LOAD, [Look(repeats(1.0), repeats(0.8, failed_at=(1, 4)))], {})
    assert section["failed_requests"] == 4
    assert section["ttft"]["ratio"]["samples"] == 4
    assert section["candidate"]["itl_ms"]["samples"] == 16
    assert section["baseline"]["itl_ms"]["samples"] == 24


def test_a_side_that_always_fails_has_no_ratio():
    section = speed_section(LOAD, [Look(repeats(1.0), repeats(0.8, failed_at=tuple(range(6))))], {})
    speed = RuntimeSpeed.model_validate(section)
    assert speed.failed_requests == 12
    assert speed.decode_tokens_per_s is None
    assert speed.candidate.decode_tokens_per_s is None
    assert speed.candidate.itl_ms.samples == 0
    assert speed.noise_floor == {}


def test_memory_uses_the_higher_peak():
    baseline = {"peak_bytes_load": 500, "peak_bytes_run": 400, "weight_bytes": 100, "kv_bytes_per_token": 8, "more": 1}
    candidate = {"peak_bytes_load": 200, "peak_bytes_run": 300, "weight_bytes": 70, "kv_bytes_per_token": 6}
    memory = RuntimeMemory.model_validate(memory_section(baseline, candidate))
    assert memory.peak_bytes.ratio == pytest.approx(300 / 500)
    assert memory.baseline.peak_bytes_load == 500
    assert memory.candidate.kv_bytes_per_token == 6


def test_an_unknown_peak_is_null():
    unseen = {"peak_bytes_load": None, "peak_bytes_run": None, "weight_bytes": 100, "kv_bytes_per_token": 8}
    memory = RuntimeMemory.model_validate(memory_section(unseen, unseen))
    assert memory.peak_bytes.ratio is None
    assert memory.baseline.weight_bytes == 100


def test_every_successful_repeat_is_kept():
    section = speed_section(LOAD, [Look(repeats(1.0), repeats(0.8, failed_at=(1, 4)))], {})
    kept = section["candidate"]["by_repeat"]
    assert kept["ttft"] == pytest.approx([16.0, None, 17.6, 20.8, None, 16.0])
    assert [value is None for value in kept["decode_tokens_per_s"]] == [False, True, False, False, True, False]
    baseline = section["baseline"]["by_repeat"]["itl"]
    RuntimeSpeed.model_validate(section)
    ratios = [slow / fast for slow, fast in zip(kept["itl"], baseline, strict=True) if slow is not None]
    assert section["itl"]["ratio"]["value"] == pytest.approx(math.prod(ratios) ** (1 / 4))
