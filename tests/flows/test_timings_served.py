# ruff: noqa: F811 - fixtures of another file
"""Latencies of a model as it is served: quantized."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.export import checkpoint, manifest, precision
from numprune.flows.recipe import load
from numprune.flows.run import prepare
from numprune.flows.steps import timed_prune, timings
from numprune.flows.steps.timings import check_request, key_of, measure
from numprune.plans import PLAN_FILE, read_plan
from numprune.quantization import Scheme, quantized_tensors
from numprune.served import Served, served_as
from numprune.serving.vllm import environment
from numprune.serving.vllm.environment import Environment
from numprune.target import Target
from tests.conftest import build_tiny, write_checkpoint
from tests.flows.conftest import Answered
from tests.flows.timing import (  # noqa: F401 - fixtures
    DECODE,
    asked,
    benchmark_on,
    command_of,
    inputs,
    machine,
    write_table,
)

Command = Callable[..., Answered]
GROUPS = Scheme("w4a16", 32)


@pytest.fixture
def in_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Environment(tmp_path / "bin" / "python", "0.32.0", cpu=True, plugin="0.1.0", router=None)
    monkeypatch.setattr(environment, "find", lambda: found)


@pytest.mark.slow
@pytest.mark.parametrize(("runtime", "scheme"), [("vllm", Scheme("w8a8")), ("onnxruntime", GROUPS)])
def test_models_are_timed_in_the_scheme(
    tmp_path: Path,
    machine: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    in_vllm: None,
    runtime: str,
    scheme: Scheme,
) -> None:
    base = write_checkpoint(build_tiny(head_dim=32), tmp_path / "base")
    clock, looked = timings.visit, set()

    def visit(worker: Any, used: Any, folder: Path, timed: Any) -> Any:
        if folder not in looked and runtime == "vllm":
            stored = checkpoint.quantized(checkpoint.audit(folder))
            anatomy = read_anatomy(checkpoint.read_config(folder))
            assert stored == dict.fromkeys(quantized_tensors(anatomy), scheme)
        elif folder not in looked:
            assert manifest.read(folder).facts["rounded"]["weights"] == str(scheme)
        looked.add(folder)
        return clock(worker, used, folder, timed)

    monkeypatch.setattr(timings, "visit", visit)
    target = Target(32, 2 if runtime == "vllm" else 1, scheme.group_size or 1)
    served = served_as(scheme.name, target)
    table = measure(base, asked(runtime=runtime, sizes=2, target=target, served=served), tmp_path)
    assert len(looked) >= 4
    assert table.key == key_of(base, runtime, served)
    assert (table.key.quantization, table.key.tensor_parallel) == (str(scheme), target.tensor_parallel)
    own, *others = sorted((times.units for times in table.times(DECODE).blocks["mlp"]), reverse=True)
    assert own == 96
    assert others
    assert all(units % (32 * target.tensor_parallel) == 0 for units in others)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_a_pruned_model_is_measured_in_the_scheme_of_the_table(
    numprune: Command, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark_on(monkeypatch, lambda _: 1.0)
    clock, looked = timed_prune.run_benchmark, []

    def benchmark(*sides: Any, **options: Any) -> Any:
        looked.extend(manifest.read(side).facts["rounded"] for side in sides[:2])
        return clock(*sides, **options)

    monkeypatch.setattr(timed_prune, "run_benchmark", benchmark)
    key = key_of(inputs / "base", "onnxruntime", Served(GROUPS, 4))
    whole = write_table(inputs / "base", tmp_path / "table.json", 1.0, **vars(key))
    command = (*command_of(inputs, tmp_path, 0.8 * whole), "--scheme", "w4a16", "--quantization-group", 32)
    refused = numprune(*command)
    assert refused.code == 1
    assert "quantization is w4a16, groups of 32, output matrix in 4 bits in the table and w4a16, groups" in refused.err
    answered = numprune(*command, "--lm-head-bits", 4)
    assert answered.code == 0, answered.err
    assert looked == [{"weights": "w4a16, groups of 32", "activations": "int8", "output_matrix": "int4"}] * 2
    assert f"{DECODE} in onnxruntime (w4a16, groups of 32, output matrix in 4 bits), at most" in answered.out
    assert not checkpoint.quantized(checkpoint.audit(tmp_path / "pruned"))
    budget = read_plan(tmp_path / "pruned" / PLAN_FILE).time_budget
    assert budget is not None
    assert budget.served == Served(GROUPS, 4)


def test_models_are_timed_in_the_precision_of_the_export(
    numprune: Command, inputs: Path, tmp_path: Path, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, base, table = Served(dtype="bfloat16"), inputs / "base", tmp_path / "table.json"
    clock, stored = timings.visit, set()

    def visit(worker: Any, used: Any, folder: Path, timed: Any) -> Any:
        stored.add((used.dtype, precision.stored(folder)))
        return clock(worker, used, folder, timed)

    monkeypatch.setattr(timings, "visit", visit)
    assert measure(base, asked(sizes=2, served=half), tmp_path).key == key_of(base, "torch", half)
    assert stored == {("bfloat16", "bfloat16")}
    asked_for = [
        f"prune.budget=5ms@{DECODE}",
        "export.dtype=bfloat16",
        "export.targets=['vllm']",
        "benchmark.runtimes=['torch']",
    ]
    recipe = load(inputs / "recipe.toml", asked_for)
    assert recipe.served() == half
    assert prepare(recipe, tmp_path).timing_keys == {None: key_of(base, "torch", half).model_dump_json()}

    benchmark_on(monkeypatch, lambda _: 1.0)
    benchmark, used = timed_prune.run_benchmark, []
    monkeypatch.setattr(
        timed_prune, "run_benchmark", lambda *sides, **how: used.append(how["dtype"]) or benchmark(*sides, **how)
    )
    command = command_of(inputs, tmp_path, 0.8 * write_table(base, table, 1.0, dtype="bfloat16"))
    refused = numprune(*command)
    assert refused.code == 1
    assert "dtype is bfloat16 in the table and float32 here" in refused.err
    answered = numprune(*command, "--dtype", "bfloat16")
    assert answered.code == 0, answered.err
    assert used == ["bfloat16"]
    assert "in torch (bfloat16), at most" in answered.out


def test_a_recipe_times_what_it_releases(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    exports = "export.targets=['onnxruntime']"
    form = ["quantize.scheme=w4a16", "quantize.group_size=32", "quantize.lm_head_bits=4"]
    here = [f"prune.budget=5ms@{DECODE}", "timings.runtime=onnxruntime", exports, *form]
    recipe = load(inputs / "recipe.toml", here)
    assert recipe.served() == Served(GROUPS, 4)
    key = key_of(inputs / "base", "onnxruntime", Served(GROUPS, 4))
    assert prepare(recipe, tmp_path).timing_keys == {None: key.model_dump_json()}
    settings = ("--workspace", tmp_path / "w", *(part for one in here for part in ("--set", one)))
    answered = numprune("plan", inputs / "recipe.toml", *settings)
    assert answered.code == 0, answered.err
    assert "among sizes that are measured (w4a16, groups of 32, output matrix in 4 bits)" in answered.out
    shared = ("--set", "timings.runtime=torch", "quantize.scheme=none", "target.tensor_parallel=2")
    refused = numprune("plan", inputs / "recipe.toml", *settings[:4], *shared)
    assert refused.code == 1
    assert "prune: timings: tensor_parallel is 2, and torch runs on one device; choose vllm" in refused.err
    refused = numprune("plan", inputs / "recipe.toml", *settings, "--set", "timings.runtime=torch")
    assert refused.code == 1
    assert "prune: timings: torch dequantizes weights, so w4a16, groups of 32 has no latency there" in refused.err


@pytest.mark.parametrize(
    ("runtime", "changes", "served", "says"),
    [
        ("torch", {}, Served(Scheme("w8a8")), "torch dequantizes weights, so w8a8 has no latency there"),
        ("onnxruntime", {}, Served(Scheme("fp8")), "ONNX Runtime computes with no FP8 weights"),
        ("onnxruntime", {}, Served(Scheme("w4a16", 128)), "group_size is 128, which does not divide the 64 inputs"),
        ("onnxruntime", {}, Served(tensor_parallel=2), "tensor_parallel is 2, and onnxruntime runs on one device"),
        (
            "vllm",
            {},
            Served(tensor_parallel=8),
            "tensor_parallel is 8, which does not divide layer 0 num_attention_heads",
        ),
        ("onnxruntime", {}, Served(dtype="bfloat16"), "ONNX Runtime has no bfloat16 kernels for a CPU"),
        ("vllm", {}, Served(Scheme("fp8")), "vLLM runs FP8 weights on GPUs and only on CPUs with AMX"),
        ("vllm", {}, Served(GROUPS), "the model is stored in float32, and vLLM's kernels for w4a16 on a CPU"),
        ("vllm", {}, Served(Scheme("w8a8"), 4), "lm_head_bits is 4, which only the export onnxruntime stores"),
    ],
)
def test_forms_that_a_runtime_lacks_are_refused_first(
    tmp_path: Path, in_vllm: None, runtime: str, changes: Any, served: Served, says: str
) -> None:
    base = write_checkpoint(build_tiny(head_dim=32, **changes), tmp_path / "base")
    with pytest.raises(InputError, match=says):
        check_request(base, asked(runtime=runtime, served=served))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--scheme", "w8a8", "--group-size", 32), "--group-size 32 has an effect only with --scheme w4a16"),
        (("--scheme", "w8a8", "--dtype", "bfloat16"), "dtype is 'bfloat16': quantized weights have their own format"),
        (("--lm-head-bits", 4), "lm_head_bits is 4, which needs a scheme"),
        (("--tensor-parallel", 8), "tensor_parallel is 8, which does not divide layer 0 num_attention_heads=4"),
        (("--scheme", "w4a16"), "group_size is 128, which does not divide the 64 inputs"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    numprune: Command, inputs: Path, tmp_path: Path, options: tuple[object, ...], says: str
) -> None:
    command = ("timings", inputs / "base", "--roofline", "l4", "--scenario", DECODE, "--out", tmp_path / "out.json")
    answered = numprune(*command, *options)
    assert answered.code == 1
    assert says in answered.err
