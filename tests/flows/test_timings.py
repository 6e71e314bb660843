# ruff: noqa: F811 - fixtures of another file
"""numprune timings: tables of what blocks take."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.errors import DiskError, EnvironmentInvalid, InputError
from numprune.export import checkpoint, disk, locks, tensorrt
from numprune.flows.candidate import time_blocks
from numprune.flows.names import TIMINGS, TRAINING_LOCK
from numprune.flows.recipe import load
from numprune.flows.run import prepare
from numprune.flows.stages import place_of
from numprune.flows.steps import served, timings
from numprune.flows.steps.timings import check_request, key_of, measure
from numprune.hidden import Width, narrowed
from numprune.scenario import parse_scenario
from numprune.served import served_as
from numprune.target import Target
from numprune.time_budget import TimeBudget
from numprune.timings import read_timings, shape_of
from tests.conftest import build_tiny, write_checkpoint
from tests.flows.conftest import Answered
from tests.flows.timing import AROUND_MS, DECODE, FORWARD, asked, ignore_noise, inputs, latency, machine  # noqa: F401

Command = Callable[..., Answered]


def test_differences_between_models_are_the_times_of_blocks(
    inputs: Path, tmp_path: Path, machine: SimpleNamespace
) -> None:
    table = measure(inputs / "base", asked(), tmp_path)
    anatomy = read_anatomy(checkpoint.read_config(inputs / "base"))
    times = table.times(DECODE)
    assert times.around.ms == pytest.approx(AROUND_MS)
    assert times.blocks.keys() == {"attention", "mlp"}
    for kind, measured in times.blocks.items():
        block = anatomy.of_kind(kind)[0]
        assert block.size in [time.size for time in measured]
        for time in measured:
            assert time.ms == pytest.approx(1e-3 * block.parameters(time.size))
            assert time.interval95 == pytest.approx((time.ms, time.ms))
    assert table.drift == {DECODE: 1.0}
    assert table.key == key_of(inputs / "base", "torch")
    assert not list(tmp_path.iterdir())


def test_blocks_are_timed_at_another_hidden_size(inputs: Path, tmp_path: Path, machine: SimpleNamespace) -> None:
    width = Width(32, "fisher")
    table = measure(inputs / "base", asked(width=width), tmp_path)
    anatomy = narrowed(read_anatomy(checkpoint.read_config(inputs / "base")), *width)
    assert table.key == key_of(inputs / "base", "torch").model_copy(update={"shape": shape_of(anatomy)})
    assert (table.key.shape.hidden_size, table.key.shape.tied) == (32, False)
    times = table.times(DECODE)
    assert times.around.ms == pytest.approx(AROUND_MS)
    for kind, measured in times.blocks.items():
        block = anatomy.of_kind(kind)[0]
        assert [time.ms for time in measured] == pytest.approx([1e-3 * block.parameters(one.size) for one in measured])


def test_a_killed_measurement_goes_on_where_it_stopped(inputs: Path, tmp_path: Path, machine: SimpleNamespace) -> None:
    undisturbed = measure(inputs / "base", asked(), tmp_path)
    everything, machine.visits = len(machine.visits), []
    machine.dies_after = 3 + 10  # of the anchor, and of other models
    with pytest.raises(KeyboardInterrupt):
        measure(inputs / "base", asked(), tmp_path)
    (kept,) = tmp_path.glob(f"{TIMINGS}*")
    assert len(list(kept.glob("*.visit-*.json"))) == 10
    with locks.held(kept / TRAINING_LOCK), pytest.raises(Exception, match="another process is running the same meas"):
        measure(inputs / "base", asked(), tmp_path)
    machine.dies_after = 10**6
    machine.visits = []
    assert measure(inputs / "base", asked(), tmp_path) == undisturbed
    assert len(machine.visits) == everything - 10  # the anchor is measured again at the start
    assert not list(tmp_path.iterdir())


def test_more_visits_continue_a_measurement_that_was_too_noisy(
    inputs: Path, tmp_path: Path, machine: SimpleNamespace
) -> None:
    undisturbed = measure(inputs / "base", asked(visits=7), tmp_path)
    models = (len(machine.visits) - 6) // 7
    machine.visits, machine.odd = [], range(3, 3 + 3 * models)
    with pytest.raises(EnvironmentInvalid, match=r"too noisy: attention of .* measure again with more visits"):
        measure(inputs / "base", asked(visits=3), tmp_path)
    machine.visits, machine.odd = [], range(0)
    table = measure(inputs / "base", asked(visits=7), tmp_path)
    assert len(machine.visits) == 6 + 4 * models
    for times, others in zip(table.scenarios[0].blocks.values(), undisturbed.scenarios[0].blocks.values(), strict=True):
        assert [time.ms for time in times] == pytest.approx([time.ms for time in others])  # medians
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_all_models_is_refused_first(
    inputs: Path, tmp_path: Path, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_one = checkpoint.weight_bytes(inputs / "base")  # or less
    monkeypatch.setattr(disk, "free_bytes", lambda _: 2 * of_one)
    with pytest.raises(DiskError, match=f"bytes are needed, {2 * of_one:,} are free"):
        measure(inputs / "base", asked(), tmp_path)
    assert not [*tmp_path.rglob("*.safetensors")]


def test_a_machine_that_slows_down_is_refused(
    numprune: Command, inputs: Path, tmp_path: Path, machine: SimpleNamespace
) -> None:
    machine.slow = 1.01  # with every visit
    command = ("timings", inputs / "base", "--runtime", "torch", "--scenario", DECODE, "--sizes", 2, "--align", 32)
    answered = numprune(*command, "--visits", 3, "--out", tmp_path / "table.json", "--json")
    assert answered.code == 4
    assert "the machine is too noisy: the same model took" in answered.err
    assert "stop other programs" in answered.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_writes_a_table(
    numprune: Command, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignore_noise(monkeypatch)
    command = ("timings", inputs / "base", "--runtime", "onnxruntime", "--scenario", DECODE, "request,b=2,len=8,out=4")
    command += ("--hidden-size", 32)
    out, form = tmp_path / "table.json", ("--scheme", "w4a16", "--group-size", 32, "--lm-head-bits", 4)
    answered = numprune(*command, *form, "--sizes", 2, "--align", 32, "--visits", 3, "--out", out, "--json")
    assert answered.code == 0, answered.err
    table = read_timings(out)
    assert table.key.quantization == "w4a16, groups of 32, output matrix in 4 bits"
    assert answered.json["key"] == table.key.model_dump()
    assert table.key.shape.hidden_size == 32
    assert [times.scenario for times in table.scenarios] == [DECODE, "request,b=2,len=8,out=4"]
    assert [len(table.scenarios[0].blocks[kind]) for kind in ("attention", "mlp")] == [2, 2]
    refused = numprune(*command, "--out", out)
    assert refused.code == 1
    assert "already exists" in refused.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--scenario", "decode,b=1"), "scenario is 'decode,b=1'; it must be decode,b=BATCH,ctx=TOKENS"),
        (("--scenario", FORWARD), "for the task causal-lm it must be decode,b=BATCH,ctx=TOKENS, prefill"),
        (("--scenario", DECODE, DECODE), "the same scenario is given twice"),
        (("--scenario", "decode,b=1,ctx=99999"), "needs 100009 positions, and the model has 256"),
        (("--scenario", DECODE, "--sizes", 65), "65 must be from 2 to 64"),
    ],
)
def test_requests_that_make_no_sense_are_refused(
    numprune: Command, inputs: Path, tmp_path: Path, options: tuple[object, ...], says: str
) -> None:
    answered = numprune("timings", inputs / "base", "--runtime", "torch", "--out", tmp_path / "out.json", *options)
    assert answered.code == 1
    assert says in answered.err


@pytest.mark.parametrize(
    ("family", "scenario", "kinds"),
    [
        ("bert", FORWARD, {"attention", "mlp"}),
        ("vit", "forward,b=2", {"attention", "mlp"}),
        ("gpt_oss", DECODE, {"sliding-attention", "attention", "experts"}),
    ],
)
def test_encoders_experts_and_windows_are_timed(
    tmp_path: Path, machine: SimpleNamespace, family: str, scenario: str, kinds: set[str]
) -> None:
    windows = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    model = build_tiny(family, **(windows if family == "gpt_oss" else {}))
    base = write_checkpoint(model, tmp_path / "base")
    table = measure(base, asked(scenarios=[parse_scenario(scenario)], sizes=2), tmp_path)
    assert table.times(scenario).blocks.keys() == kinds
    assert table.routing == ("uniform" if "experts" in kinds else None)
    times = {table.key.shape.hidden_size: table.times(scenario)}
    predicted = TimeBudget(1, times, "torch").predicted(read_anatomy(model.config)).ms
    assert predicted == pytest.approx(latency(model.config))
    assert table.key.shape.task == read_anatomy(model.config).task
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is here")
def test_without_tensorrt_the_error_names_the_package(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    command = ("timings", inputs / "base", "--runtime", "tensorrt", "--scenario", DECODE)
    answered = numprune(*command, "--out", tmp_path / "table.json")
    assert answered.code == 1
    assert "pip install 'numprune[tensorrt]'" in answered.err


def test_engines_are_built_for_what_is_timed(
    inputs: Path, tmp_path: Path, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins for TensorRT and a GPU, which are not here: engines are folders with the configuration."""
    built: list[dict[str, Any]] = []

    def engine(source: Path, out: Path, export_format: str, **options: Any) -> None:
        assert export_format == "tensorrt"
        built.append(options)
        out.mkdir()
        (out / "config.json").write_bytes((source / "config.json").read_bytes())

    monkeypatch.setattr(tensorrt, "require", lambda: SimpleNamespace(__version__="11.1"))
    monkeypatch.setattr(served, "export", engine)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(timings, "check_state", lambda *_: None)
    scenarios = [parse_scenario("decode,b=16,ctx=16"), parse_scenario("prefill,b=2,len=32")]
    table = measure(inputs / "base", asked(runtime="tensorrt", scenarios=scenarios), tmp_path)
    assert (table.key.runtime, table.key.versions, table.key.device) == ("tensorrt", {"tensorrt": "11.1"}, "a GPU")
    assert table.times("decode,b=16,ctx=16").around.ms == pytest.approx(AROUND_MS)
    assert built
    assert all(options == {"dtype": "float32", "max_batch": 16, "max_length": 1024} for options in built)
    quantized = asked(runtime="tensorrt", served=served_as("w8a8", Target()))
    with pytest.raises(InputError, match="engines are built only from unquantized checkpoints, so not in w8a8"):
        check_request(inputs / "base", quantized)


def test_engines_of_other_models_are_refused(tmp_path: Path) -> None:
    base = write_checkpoint(build_tiny("llamagen"), tmp_path / "base")
    with pytest.raises(InputError, match="engines can only be built for language models"):
        check_request(base, asked(runtime="tensorrt"))


@pytest.mark.slow
def test_forward_passes_are_really_measured(numprune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignore_noise(monkeypatch)
    base, table = write_checkpoint(build_tiny("vit"), tmp_path / "base"), tmp_path / "table.json"
    sizes = ("--sizes", 2, "--align", 32, "--visits", 3)
    answered = numprune("timings", base, "--runtime", "torch", "--scenario", "forward,b=2", *sizes, "--out", table)
    assert answered.code == 0, answered.err
    assert [len(times) for times in read_timings(table).times("forward,b=2").blocks.values()] == [2, 2]


def test_a_stage_measures_again_where_its_table_would_be_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(inputs / "recipe.toml", [f"prune.budget=5ms@{DECODE}"])

    def place() -> Path:
        return place_of(tmp_path / "w", time_blocks(prepare(recipe, tmp_path / "w"), None)).path

    here = place()
    assert place() == here
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with_more_threads = place()
    monkeypatch.setattr(timings, "capture", lambda: SimpleNamespace(cpu="another CPU"))
    assert len({here, with_more_threads, place()}) == 3
