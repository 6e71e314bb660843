"""The output of `vllm bench serve` and its evaluation, without a server."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from numprune.errors import InputError, IntegrityError
from numprune.serving.benchmark.scheduler import ThreadTimes
from numprune.serving.benchmark.sections import Look
from numprune.serving.benchmark.vllm import ServedLoad, pool, run_served
from numprune.serving.benchmark.vllm.metrics import KvCache, parse_kv_cache
from numprune.serving.benchmark.vllm.requests import METRICS, Request, Requests, packed_share, read_requests
from numprune.serving.benchmark.vllm.sections import Footprint, memory_section, speed_section
from numprune.serving.gates import Gate, Policy, judge
from numprune.serving.report import Report, RuntimeMemory, RuntimeSpeed, markdown
from numprune.serving.vllm.environment import Environment

Json = dict[str, Any]

LOAD = ServedLoad(prompts=2, prompt_length=10, output_length=4, concurrency=(1, 2), repeats=6)
THREADS = ThreadTimes(3.0, 1.0)
NOWHERE = Environment(python=Path("/nowhere/bin/python"), version="0.32.0", cpu=True, plugin=None, router=None)


# --- load ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompts", 0),
        ("output_length", 1),
        ("repeats", 2),
        ("repeats", 5),
        ("maximum_failed", -1),
        ("seed", True),
        ("concurrency", ()),
        ("concurrency", (0,)),
        ("concurrency", (2, 2)),
        ("concurrency", [1]),
    ],
)
def test_a_load_out_of_range_is_refused(field: str, value: object) -> None:
    with pytest.raises(
        InputError, match=rf"load\.{field} = {'.*even number, at least 4' if field == 'repeats' else ''}"
    ):
        ServedLoad(**{field: value})


def test_the_trace_has_every_request_once_and_depends_on_the_seed() -> None:
    lines = [json.loads(line) for line in LOAD.trace().splitlines()]
    assert len(lines) == LOAD.requests(2) == 4
    assert {(line["input_length"], line["output_length"], line["timestamp"]) for line in lines} == {(10, 4, 0)}
    ids = {line["hash_ids"][0] for line in lines}
    others = {json.loads(line)["hash_ids"][0] for line in dataclasses.replace(LOAD, seed=1).trace().splitlines()}
    assert len(ids | others) == 8


# --- a result file ---------------------------------------------------------------------------------


def result(count: int = 4, **changes: Any) -> Json:
    """What vLLM 0.32 writes, of which more is left out here than kept."""
    return {
        "backend": "openai",
        "duration": 2.0,
        "completed": count,
        "failed": 0,
        "request_goodput": 1.5,
        "input_lens": [10] * count,
        "output_lens": [4] * count,
        "ttfts": [0.1] * count,
        "itls": [[0.01, 0.02, 0.03]] * count,
        "errors": [""] * count,
        **changes,
    }


def read(tmp_path: Path, content: Json | str, concurrency: int = 2) -> Requests:
    file = tmp_path / "result.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_requests(file, LOAD, concurrency, THREADS)


def test_metrics_of_a_run(tmp_path: Path) -> None:
    assert read(tmp_path, result()).metrics() == pytest.approx(
        {
            "ttft": 100.0,
            "tpot": 20.0,
            "itl": 20.0,
            "e2e": 160.0,
            "decode_tokens_per_s": 2 * 12 / 0.24,  # two streams, three tokens after the first in 60 ms each
            "prefill_tokens_per_s": 2 * 40 / 0.4,
            "output_tokens_per_s": 8.0,
            "goodput_requests_per_s": 1.5,
        }
    )
    assert set(METRICS) == set(read(tmp_path, result()).metrics())


def test_tokens_that_arrive_together_all_count(tmp_path: Path) -> None:
    packed = read(tmp_path, result(itls=[[0.03, 0.03]] * 4))
    assert packed.metrics()["tpot"] == pytest.approx(20.0)
    assert packed.metrics()["itl"] == pytest.approx(30.0)


def test_tokens_that_were_read_together_are_detected(tmp_path: Path) -> None:
    assert packed_share([read(tmp_path, result())]) == 0
    assert packed_share([read(tmp_path, result(itls=[[0.03, 0.03]] * 4))]) == pytest.approx(1 / 3)
    one_by_one, at_once = read(tmp_path, result()), read(tmp_path, result(itls=[[3e-6] * 3] * 4))
    assert packed_share([at_once]) == 1
    assert packed_share([one_by_one, at_once]) == 0.5
    assert packed_share([]) == 0

    whole = read(tmp_path, result(itls=[[], [0.03], [0.01, 0.02, 0.03], [0.01, 0.02, 0.03]]))  # all in the first piece
    assert whole.failed == 0
    assert packed_share([whole]) == pytest.approx(5 / 12)


@pytest.mark.parametrize(
    "changes",
    [
        {"output_lens": [4, 0, 4, 4], "itls": [[0.1], [], [0.1], [0.1]], "completed": 3, "failed": 1},
        {"output_lens": [4, 3, 4, 4]},
        {"input_lens": [10, 9, 10, 10]},
        {"errors": ["", "Traceback …\nConnectionRefusedError: refused", "", ""], "completed": 3, "failed": 1},
    ],
)
def test_an_incomplete_response_counts_as_failed(tmp_path: Path, changes: Json) -> None:
    found = read(tmp_path, result(**changes))
    assert (found.failed, len(found.succeeded)) == (1, 3)
    if "errors" in changes:
        assert found.errors[0].endswith("ConnectionRefusedError: refused")


def test_a_run_where_all_requests_failed_has_no_figures(tmp_path: Path) -> None:
    found = read(tmp_path, result(output_lens=[0] * 4, itls=[[]] * 4, completed=0, failed=4, request_goodput=0.0))
    assert found.failed == 4
    figures = found.metrics()
    assert figures.pop("output_tokens_per_s") == figures.pop("goodput_requests_per_s") == 0
    assert all(math.isnan(value) for value in figures.values())
    assert Requests.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        result(3),
        result(completed=3),
        result(ttfts=[0.1] * 3),
        result(ttfts=[-1.0] * 4),
        result(duration=0.0),
        result(completed=3, failed=1),
        json.dumps(result()).replace("2.0", "NaN"),
        json.dumps({key: value for key, value in result().items() if key != "errors"}),
    ],
)
def test_a_result_file_that_misses_requests_is_refused(tmp_path: Path, content: Json | str) -> None:
    with pytest.raises(IntegrityError, match=r"result\.json of vllm bench serve"):
        read(tmp_path, content)


# --- sections --------------------------------------------------------------------------------------


def repeats(scale: float, concurrency: int, *, goodput: float = 2.0, failed_at: int | None = None) -> list[Requests]:
    """Six repeats of as many requests as the load has; each has its own speed, which both sides share."""
    return [
        Requests(
            concurrency=concurrency,
            succeeded=(Request(10, 4, 20 * scale * drift, (4 * scale * drift, 6 * scale * drift, 5 * scale * drift)),)
            * LOAD.requests(concurrency),
            errors=("lost",) if index == failed_at else (),
            duration_s=scale * drift,
            goodput_requests_per_s=goodput,
            threads=THREADS,
        )
        for index, drift in enumerate((1.0, 1.1, 1.1, 1.3, 0.9, 1.0))
    ]


def levels(scale: float, **changes: Any) -> dict[int, list[Requests]]:
    return {concurrency: repeats(scale, concurrency, **changes) for concurrency in LOAD.concurrency}


def looks(baseline: dict[int, list[Requests]], candidate: dict[int, list[Requests]]) -> dict[int, list[Look[Requests]]]:
    return {concurrency: [Look(baseline[concurrency], candidate[concurrency])] for concurrency in LOAD.concurrency}


def test_sections_have_the_report_format_at_every_concurrency() -> None:
    section = speed_section(LOAD, looks(levels(1.0), levels(0.8)), {"vllm": "0.32.0"})
    speed = RuntimeSpeed.model_validate(json.loads(json.dumps(section, allow_nan=False)))

    assert list(speed.concurrency) == ["1", "2"]
    assert speed.load["concurrency"] == [1, 2]
    assert (speed.order, speed.warmup, speed.repeats, speed.failed_requests) == ("ABBAABBAABBA", 1, 6, 0)
    assert speed.decode_tokens_per_s == speed.concurrency["1"].decode_tokens_per_s
    for found in speed.concurrency.values():
        assert found.ttft.ratio.value == found.tpot.ratio.value == pytest.approx(0.8)
        assert found.output_tokens_per_s.ratio.value == pytest.approx(1.25)
        assert found.goodput_requests_per_s.ratio.value == pytest.approx(1.0)
        assert found.noise_floor["tpot"].neighbours == 2
    assert speed.concurrency["2"].load == {"concurrency": 2, "requests": 4}
    assert speed.concurrency["1"].baseline.ttft_ms.samples == 12
    assert speed.concurrency["1"].baseline.ttft_ms.p90 is None  # twelve samples do not support it
    assert speed.concurrency["2"].baseline.itl_ms.samples == 72
    assert speed.concurrency["2"].baseline.itl_ms.p95 is not None
    assert speed.baseline.goodput_requests_per_s == pytest.approx(2.0)


def test_looks_at_servers_are_pooled() -> None:
    """As read from two stages."""

    def stage(scale: float) -> Json:
        sides = {"baseline": levels(1.0), "candidate": levels(scale)}
        found = {
            "speed": {
                **speed_section(LOAD, looks(*sides.values()), {"vllm": "0.32.0"}),
                "dtype": dict.fromkeys(sides, "bfloat16"),
            },
            "samples": {
                side: {"repeats": {str(level): [one.to_json() for one in found] for level, found in by_level.items()}}
                for side, by_level in sides.items()
            },
        }
        return json.loads(json.dumps(found, allow_nan=False))

    assert pool([stage(0.8)])["speed"] == stage(0.8)["speed"]
    speed = RuntimeSpeed.model_validate(pool([stage(0.8), stage(0.5)])["speed"])
    assert speed.tpot.ratio.value == pytest.approx(math.sqrt(0.8 * 0.5))
    for level, found in speed.concurrency.items():
        assert (found.looks, found.repeats, found.tpot.ratio.samples) == (2, 12, 12)
        assert found.baseline.ttft_ms.samples == 12 * LOAD.requests(int(level))


def test_without_a_good_request_there_is_no_goodput_ratio() -> None:
    section = speed_section(LOAD, looks(levels(1.0, goodput=0.0), levels(0.8)), {})
    assert "goodput_requests_per_s" not in section
    assert "goodput_requests_per_s" not in section["noise_floor"]
    assert section["baseline"]["goodput_requests_per_s"] == 0
    assert "ttft" in section


def gate_outcome(report_json: Json, section: Json, metric: str) -> str:
    report = Report.model_validate({**report_json, "speed": {"vllm": section}})
    return judge(report, Policy(gates=(Gate(metric=metric, bound="ci95_lower", min=1.1),))).outcome


@pytest.mark.parametrize("way", ["", "concurrency.2."])
def test_gates_apply_to_every_concurrency_with_its_noise_floor(report_json: Json, way: str) -> None:
    metric = f"speed.vllm.{way}output_tokens_per_s.ratio"
    section = speed_section(LOAD, looks(levels(1.0), levels(0.8)), {})
    for level in (section, *section["concurrency"].values()):
        level["noise_floor"] = {name: {"relative": 0.05, "neighbours": 2} for name in level["noise_floor"]}
    assert gate_outcome(report_json, section, metric) == "pass"

    (section["concurrency"]["2"] if way else section)["noise_floor"] = {}
    assert gate_outcome(report_json, section, metric) == "fail"


@pytest.mark.parametrize("way", ["", "concurrency.1.", "concurrency.2."])
def test_a_failed_request_at_any_concurrency_fails_every_gate(report_json: Json, way: str) -> None:
    section = speed_section(LOAD, looks(levels(1.0), {1: repeats(0.8, 1), 2: repeats(0.8, 2, failed_at=3)}), {})
    assert (section["failed_requests"], section["concurrency"]["1"]["failed_requests"]) == (1, 0)
    assert gate_outcome(report_json, section, f"speed.vllm.{way}output_tokens_per_s.ratio") == "fail"


def test_the_memory_section_compares_the_capacity_of_equal_memory() -> None:
    before = Footprint(2000, KvCache(100, 10, 10), 6400, 5000, 7000)
    after = Footprint(1500, KvCache(160, 16, 10), 6400, 4000, 3500)
    memory = RuntimeMemory.model_validate(memory_section(before, after))
    assert memory.kv_tokens.ratio == pytest.approx(1.6)
    assert (memory.baseline.kv_bytes_per_token, memory.candidate.kv_bytes_per_token) == (64, 40)
    assert memory.peak_bytes.ratio == pytest.approx(4 / 7)

    on_gpu = Footprint(1500, KvCache(160, 16, 10), 6400, None, None)
    assert RuntimeMemory.model_validate(memory_section(on_gpu, on_gpu)).peak_bytes.ratio is None


def test_the_page_shows_every_concurrency(report_json: Json) -> None:
    before, after = Footprint(1, KvCache(100, 10, 10), 1, 1, 1), Footprint(1, KvCache(160, 16, 10), 1, 1, 1)
    section = speed_section(LOAD, looks(levels(1.0), levels(0.8)), {})
    page = markdown(
        Report.model_validate(
            {**report_json, "speed": {"vllm": section}, "memory": {"vllm": memory_section(before, after)}}
        )
    )
    assert "## Speed, vllm, 1 at a time" in page
    assert "## Speed, vllm, 2 at a time" in page
    assert "## Speed, vllm\n" not in page
    assert "| TPOT, ms | p50 " in page
    assert "| goodput, requests/s | 2 | 2 |" in page
    assert "| tokens in the KV cache | 100 | 160 |" in page


# --- a server's metrics ----------------------------------------------------------------------------

INFO = (
    'vllm:cache_config_info{block_size="128",engine="0",note="a\\"b",'
    'num_gpu_blocks="170",kv_cache_max_concurrency="42.5",kv_cache_size_tokens="21760"} 1.0'
)


@pytest.mark.parametrize(
    ("max_model_len", "concurrency", "tokens"),
    [
        (512, "42.5", 21760),
        (12, "170.0", 21760),  # whole blocks, however short the sequences
        (512, "21.25", 10880),  # every token in two blocks
    ],
)
def test_the_kv_cache_is_read_from_the_metrics(max_model_len: int, concurrency: str, tokens: int) -> None:
    text = f"# HELP vllm:cache_config_info x\n{INFO.replace('42.5', concurrency)}\nvllm:kv_cache_usage_perc 0.0\n"
    assert parse_kv_cache(text, max_model_len) == KvCache(tokens=tokens, blocks=170, block_size=128)


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"{INFO}\n{INFO}",
        INFO.replace("170", "None"),
        INFO.replace("kv_cache_max_concurrency", "x"),
        INFO.replace("42.5", "None"),
        INFO.replace("42.5", "inf"),
        INFO.replace('"128"', '"0"'),
        INFO.replace("170", "0"),
    ],
)
def test_incomplete_metrics_are_refused(text: str) -> None:
    with pytest.raises(IntegrityError, match="/metrics of vLLM"):
        parse_kv_cache(text, 512)


# --- before any server -----------------------------------------------------------------------------


def test_incomparable_models_are_refused_before_any_server_starts(tiny_checkpoint: Any, tmp_path: Path) -> None:
    base = tiny_checkpoint()
    other = tiny_checkpoint(name="other", vocab_size=300)
    with pytest.raises(InputError, match=r"candidate .*nowhere"):
        run_served({"candidate": tmp_path / "nowhere"}, base, NOWHERE, LOAD)
    with pytest.raises(InputError, match="259 tokens, that of candidate 300"):
        run_served({"candidate": other}, base, NOWHERE, LOAD)
    with pytest.raises(InputError, match="max_position_embeddings = 256"):
        run_served({"candidate": base}, base, NOWHERE, dataclasses.replace(LOAD, prompt_length=253))

    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 88}))
    with pytest.raises(IntegrityError, match="mlp"):  # vLLM would serve it, cut to size
        run_served({"candidate": other}, other, NOWHERE, LOAD)
