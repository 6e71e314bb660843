# ruff: noqa: F811 - fixtures of another file
"""Latencies in vLLM, and budgets by them."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.configs import pruned_config
from numprune.errors import InputError, MissingRuntime
from numprune.export import checkpoint
from numprune.export.random_weights import write_random
from numprune.flows.steps import timed_prune
from numprune.flows.steps.served import as_served
from numprune.flows.steps.timings import key_of, measure, runtime_of
from numprune.quantization import Scheme
from numprune.scenario import parse_scenario
from numprune.served import Served
from numprune.serving.benchmark import visits
from numprune.serving.benchmark.visits import Runtime
from numprune.serving.vllm import environment
from numprune.serving.vllm.environment import Environment
from numprune.slices import Size
from tests.conftest import build_tiny, write_checkpoint
from tests.flows.conftest import Answered
from tests.flows.timing import (  # noqa: F401 - fixtures
    AROUND_MS,
    DECODE,
    FORWARD,
    SAMPLED,
    asked,
    command_of,
    ignore_noise,
    inputs,
    latency,
    machine,
    write_table,
)
from tests.serving.releases import require_vllm

Command = Callable[..., Answered]


@pytest.mark.vllm
def test_models_are_timed_in_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really measured: the dense model, in w8a8 and by two processes, too, and one whose layers differ."""
    found = require_vllm()
    assert found.plugin
    monkeypatch.setenv("NUMPRUNE_VLLM", str(found.python.parent.parent))
    ignore_noise(monkeypatch)
    base = write_checkpoint(build_tiny(head_dim=32), tmp_path / "base")
    anatomy = read_anatomy(checkpoint.read_config(base))
    sizes = {block.name: Size(1, 1 + block.layer) for block in anatomy.of_kind("attention")}
    sizes |= {block.name: Size(32) for block in anatomy.of_kind("mlp")}
    smaller = pruned_config(checkpoint.read_config(base), anatomy.keeping(sizes))
    write_random(tmp_path / "smaller", smaller, base, torch.float32)
    used = runtime_of(base, "vllm")
    assert used == Runtime("vllm", "cpu" if found.cpu else "cuda", "float32", found)
    half = write_checkpoint(build_tiny(head_dim=32).to(torch.bfloat16), tmp_path / "half")
    w8a8 = Served(Scheme("w8a8"))
    quantized = as_served(half, tmp_path / "quantized", w8a8)
    decode, prefill = visits.Timed("decode", 3, 16), visits.Timed("prefill", 2, 40)
    request = visits.Timed("request", 2, 40, 12)
    with used.start() as worker:  # importing vLLM takes long
        made = visits.visit(worker, used, base, {"decode": decode, "prefill": prefill, "request": request})
        in_half = runtime_of(half, "vllm", w8a8)
        assert visits.visit(worker, in_half, quantized, {"decode": decode}).ms["decode"] > 0
        if found.cpu:
            shared = runtime_of(base, "vllm", Served(tensor_parallel=2))
            by_two = visits.visit(worker, shared, base, {"decode": decode})
            assert min(by_two.ms["decode"], by_two.threads.ran_s) > 0
        with pytest.raises(InputError, match="timings in vllm: the batch is 5000, and vLLM runs at most"):
            worker.ask("prepare", token_ids=[[1]] * 5000, batch_size=5000, output_length=2)
        monkeypatch.setattr(Runtime, "start", lambda _: nullcontext(worker))
        ms = visits.in_turn(used, {"base": base, "smaller": tmp_path / "smaller"}, decode, 1)
    assert made.ms.keys() == {"decode", "prefill", "request"}
    assert {name: len(found) for name, found in ms.items()} == {"base": 1, "smaller": 1}
    assert min(*made.ms.values(), *ms["base"], *ms["smaller"], made.threads.ran_s) > 0


def test_a_budget_in_vllm_is_confirmed_in_engines(
    numprune: Command, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Environment(tmp_path / "bin" / "python", "0.32.0", cpu=True, plugin="0.1.0", router=None)
    monkeypatch.setattr(environment, "find", lambda: found)
    looks: list[visits.Timed] = []

    def in_turn(runtime: Runtime, sides: dict[str, Path], timed: visits.Timed, count: int) -> dict[str, list[float]]:
        assert runtime.vllm == found
        looks.append(timed)
        return {side: [latency(checkpoint.read_config(folder))] * count for side, folder in sides.items()}

    monkeypatch.setattr(timed_prune, "in_turn", in_turn)
    of_vllm = key_of(inputs / "base", "vllm")
    whole = write_table(inputs / "base", tmp_path / "table.json", 1.0, **vars(of_vllm))
    answered = numprune(*command_of(inputs, tmp_path, 0.8 * whole), "--json")
    assert answered.code == 0, answered.err
    assert looks == [visits.Timed("decode", 1, 16)]
    measured = answered.json["latency"]
    assert measured["runtime"] == "vllm"
    assert measured["measured"]["ms"] == pytest.approx(measured["predicted"]["ms"])
    assert measured["dense_measured"]["ms"] == pytest.approx(whole)


def test_a_table_of_vllm_names_its_version_and_plug_in(
    tmp_path: Path, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Environment(tmp_path / "bin" / "python", "0.32.0", cpu=True, plugin="0.1.0", router=None)
    monkeypatch.setattr(environment, "find", lambda: found)
    base = write_checkpoint(build_tiny(head_dim=32), tmp_path / "base")
    table = measure(base, asked(runtime="vllm", sizes=2), tmp_path)
    assert table.key == key_of(base, "vllm")
    assert (table.key.implementation, table.key.versions) == ("plug-in", {"vllm": "0.32.0", "numprune-vllm": "0.1.0"})
    assert table.key.dtype == "float32"
    assert table.times(DECODE).around.ms == pytest.approx(AROUND_MS)


@pytest.mark.parametrize(
    ("family", "changes", "plugin", "says"),
    [
        ("llama", {"head_dim": 32}, None, "lacks the plug-in numprune-vllm"),
        ("llama", {"head_dim": 16}, "0.1.0", "heads of 32, 64, 80"),
        ("imagegpt", {}, "0.1.0", "vLLM does not run imagegpt"),
        ("llama", {"head_dim": 32, "dtype": "float64"}, "0.1.0", "is stored in float64"),
        ("bert", {}, "0.1.0", "vllm times generation"),
    ],
)
def test_models_that_vllm_cannot_time_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: Any, plugin: str | None, says: str
) -> None:
    found = Environment(tmp_path / "bin" / "python", "0.32.0", cpu=True, plugin=plugin, router=None)
    monkeypatch.setattr(environment, "find", lambda: found)
    base = write_checkpoint(build_tiny(family, **changes), tmp_path / "base")
    scenario = parse_scenario(FORWARD if family == "bert" else DECODE)
    with pytest.raises((InputError, MissingRuntime), match=says):
        measure(base, asked(runtime="vllm", scenarios=[scenario]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
