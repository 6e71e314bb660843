"""`import numprune`: the README's lines, arguments that are not modified, and types."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import numprune
from numprune.errors import InputError, IntegrityError
from numprune.export import manifest
from numprune.export.checkpoint import weight_bytes
from numprune.flows.steps.quantize import quantize_checkpoint
from numprune.flows.steps.recover import recover_checkpoint, write_recovered
from numprune.quantization.allocation import planned_schemes
from tests.conftest import build_tiny, write_checkpoint
from tests.flows.test_readme import PYTHON as README_LINES

OPTIONS = numprune.PruneOptions(ratio=0.25)


def test_a_plan_is_chosen_applied_evaluated_saved_and_exported(tiny: Path, tmp_path: Path) -> None:
    model = numprune.load(tiny / "base")
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    rows = numprune.calibration_rows(tiny / "train.txt", model, samples=12, sequence_length=64)
    assert rows.tokens.shape == (12, 64)

    plan = numprune.plan(model, rows, OPTIONS)
    plan.write(tmp_path / "plan.json")
    pruned = numprune.apply(numprune.read_plan(tmp_path / "plan.json"), model, rows)
    assert pruned.budget.prunable_parameters < 0.8 * model.budget.prunable_parameters
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())

    found = numprune.evaluate(pruned, tiny / "heldout.jsonl", baseline=model, sequence_length=64)
    scored = numprune.evaluate(model, tiny / "heldout.jsonl", sequence_length=64)
    assert found.baseline is not None
    assert found.baseline.mean_nll == pytest.approx(scored.mean_nll)
    assert found.loss_delta.value != 0

    out = numprune.save(pruned, tmp_path / "pruned")
    manifest.verify(out)
    assert (out / "README.md").is_file()
    again = numprune.load(out)
    assert all(
        torch.equal(value, again.network.state_dict()[name]) for name, value in pruned.network.state_dict().items()
    )
    assert pruned.plan is not None
    assert numprune.read_plan(out / "numprune_plan.json").sizes() == pruned.plan.sizes()
    proof = numprune.export_checkpoint(out, tmp_path / "onnx", to="onnx")
    assert proof["greedy_match"] > 0.99
    manifest.verify(tmp_path / "onnx")


def require_equal_tensors(folder: Path, other: Path) -> None:
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8))


def test_prune_leaves_the_model_unchanged(tiny: Path) -> None:
    model = numprune.load(tiny / "base")
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    rows = numprune.calibration_rows(tiny / "train.txt", model, samples=12, sequence_length=64)
    pruned = numprune.prune(model, rows, OPTIONS)
    assert pruned.plan is not None
    assert pruned.plan.calibration.draw == rows.draw
    assert pruned.budget.parameters < model.budget.parameters
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())


def test_a_pruned_model_is_quantized_and_saved_as_the_command_does(tiny: Path, tmp_path: Path) -> None:
    model = numprune.load(tiny / "base")
    rows = numprune.calibration_rows(tiny / "train.txt", model, samples=12, sequence_length=64)
    pruned = numprune.prune(model, rows, numprune.PruneOptions(0.25, allocation="error"))
    before = {name: value.clone() for name, value in pruned.network.state_dict().items()}
    scheme = numprune.Scheme("w8a8")
    quantized = numprune.quantize(pruned, scheme, rows, dense=model, lm_head_bits=4)
    assert all(torch.equal(value, before[name]) for name, value in pruned.network.state_dict().items())
    lost = numprune.evaluate(quantized, tiny / "heldout.jsonl", baseline=pruned, sequence_length=64).loss_delta
    assert 0 < abs(lost.value) < 0.1

    out = numprune.save(quantized, tmp_path / "quantized")
    assert manifest.verify(out).facts["quantization"]["lm_head_bits"] == 4
    assert "| quantization | weights of the layers: w8a8" in (out / "README.md").read_text(encoding="utf-8")
    assert pruned.plan is not None
    assert numprune.read_plan(out / "numprune_plan.json").sizes() == pruned.plan.sizes()
    again = numprune.load(out)
    for name, value in quantized.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name])
    tokens = rows.tokens[:2]
    with torch.no_grad():
        assert torch.equal(quantized.network(tokens).logits, again.network(tokens).logits)

    source = numprune.save(pruned, tmp_path / "pruned")
    commanded = tmp_path / "commanded"
    fit = {"rows": rows.tokens, "dense": tiny / "base"}
    quantize_checkpoint(source, scheme, commanded, torch.device("cpu"), **fit, lm_head_bits=4)
    for name in ("config.json", "README.md"):
        assert (out / name).read_bytes() == (commanded / name).read_bytes()
    require_equal_tensors(out, commanded)


def test_a_pruned_model_is_trained_and_saved_as_the_command_does(tiny: Path, tmp_path: Path) -> None:
    model = numprune.load(tiny / "base", "cpu")
    rows = numprune.calibration_rows(tiny / "train.txt", model, samples=12, sequence_length=64)
    pruned = numprune.prune(model, rows, numprune.PruneOptions(0.5, allocation="error", compensation="none"))
    options = numprune.RecoveryOptions(tokens=2048, learning_rate=1e-3, batch_size=4, selection_rows=4)
    texts = {"heldout": tiny / "heldout.jsonl", "sequence_length": 64}
    drawn = numprune.recovery_rows(tiny / "train.txt", model, options, **texts)
    before = [{name: value.clone() for name, value in one.network.state_dict().items()} for one in (pruned, model)]
    trained = numprune.recover(pruned, model, drawn, options)
    for one, values in zip((pruned, model), before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in one.network.state_dict().items())
    assert trained.training is not None
    assert trained.training.result.kl_after < trained.training.result.kl_before
    out = numprune.save(trained, tmp_path / "trained")
    made = manifest.verify(out)
    assert made.facts.keys() == {"plan", "recovery"}
    assert "| training after pruning | distillation from the base model" in (out / "README.md").read_text()

    source = numprune.save(pruned, tmp_path / "pruned")
    options_of = (drawn, options, tmp_path / "commanded", torch.device("cpu"), tmp_path)
    recover_checkpoint(source, tiny / "base", *options_of)
    require_equal_tensors(out, tmp_path / "commanded")
    again = numprune.recover(numprune.load(source, "cpu"), model, drawn, options)
    require_equal_tensors(numprune.save(again, tmp_path / "again"), out)
    small = numprune.save(numprune.quantize(trained, numprune.Scheme("fp8")), tmp_path / "small")
    assert manifest.verify(small).facts.keys() == {"plan", "recovery", "quantization"}
    assert "| training after pruning | distillation from the base model" in (small / "README.md").read_text()


def test_what_cannot_be_trained_is_refused(tiny: Path, tmp_path: Path) -> None:
    model = numprune.load(tiny / "base", "cpu")
    options = numprune.RecoveryOptions(tokens=256, batch_size=4, selection_rows=4)
    drawn = numprune.recovery_rows(tiny / "train.txt", model, options, sequence_length=64)
    quantized = numprune.quantize(model, numprune.Scheme("fp8"))
    with pytest.raises(InputError, match=r"^the model is quantized \(fp8\); training needs the unquantized one"):
        numprune.recover(quantized, model, drawn, options)
    with pytest.raises(InputError, match="heldout: 1 of its documents is in the training text"):
        numprune.recovery_rows(tiny / "train.txt", model, options, heldout=tiny / "train.txt")
    padded = write_checkpoint(build_tiny(vocab_size=320), tmp_path / "padded")
    with pytest.raises(InputError, match="the model and dense: vocab_size is 259 and 320"):
        numprune.recover(model, numprune.load(padded, "cpu"), drawn, options)


def test_a_model_that_was_not_pruned_is_quantized_without_text(tiny: Path, tmp_path: Path) -> None:
    model = numprune.load(tiny / "base")
    with pytest.raises(InputError, match=r"^lm_head_bits is 4, which only the export onnxruntime .*FP8"):
        numprune.quantize(model, numprune.Scheme("fp8"), lm_head_bits=4)
    out = numprune.save(numprune.quantize(model, numprune.Scheme("fp8")), tmp_path / "quantized")
    quantize_checkpoint(tiny / "base", numprune.Scheme("fp8"), tmp_path / "commanded", torch.device("cpu"))
    assert (out / "config.json").read_bytes() == (tmp_path / "commanded" / "config.json").read_bytes()
    require_equal_tensors(out, tmp_path / "commanded")


def test_units_and_bits_are_chosen_within_a_budget_as_the_commands_do(tiny: Path, tmp_path: Path) -> None:
    model = numprune.load(tiny / "base")
    rows = numprune.calibration_rows(tiny / "train.txt", model, samples=12, sequence_length=64)
    whole = numprune.weight_budget(model, "1GB")
    stored = weight_bytes(tiny / "base")
    assert whole.limit == 10**9
    assert whole.levels == (None,)
    limit = whole.around + int(0.25 * (stored - whole.around))
    budget = numprune.weight_budget(model, f"{limit}B", scheme="mixed")
    target = numprune.Target(32, quantization_group=32)
    options = numprune.PruneOptions(0, allocation="error", compensation="residual", target=target, budget=budget)
    planned = numprune.plan(model, rows, options)
    pruned = numprune.prune(model, rows, options)
    assert pruned.plan is not None
    assert pruned.plan.schemes() == planned.schemes() != {}

    out = numprune.save(numprune.quantize(pruned, "mixed", rows, dense=model), tmp_path / "mixed")
    manifest.verify(out)
    assert 0.8 * limit < weight_bytes(out) <= limit
    source, commanded = numprune.save(pruned, tmp_path / "pruned"), tmp_path / "commanded"
    schemes = planned_schemes(pruned.plan)
    quantize_checkpoint(source, schemes, commanded, torch.device("cpu"), rows=rows.tokens, dense=tiny / "base")
    for name in ("config.json", "README.md"):
        assert (out / name).read_bytes() == (commanded / name).read_bytes()
    require_equal_tensors(out, commanded)
    reread = numprune.quantize(numprune.load(source), "mixed", rows, dense=model)  # by the plan in the folder
    assert reread.quantization is not None
    assert reread.quantization.schemes == schemes

    with pytest.raises(InputError, match="the model is pruned already"):
        numprune.weight_budget(pruned, "1GB")
    with pytest.raises(InputError, match="has no plan with a scheme for each block"):
        numprune.quantize(model, "mixed", rows)
    with pytest.raises(InputError, match="scheme is 'w8a8'; it must be a Scheme, or 'mixed'"):
        numprune.quantize(model, "w8a8")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"budget is '0\.5', which is a ratio"):
        numprune.weight_budget(model, "0.5")


def test_weights_larger_than_their_budget_are_not_saved(tiny: Path, tmp_path: Path) -> None:
    model = numprune.load(tiny / "base")
    rows = numprune.calibration_rows(tiny / "train.txt", model, samples=4, sequence_length=64)
    pruned = numprune.prune(model, rows, OPTIONS)
    assert pruned.plan is not None
    plan = pruned.plan.model_copy(update={"budget": numprune.weight_budget(model, "1KB")})
    with pytest.raises(IntegrityError, match=r"the pruned weights take .* bytes, and the budget is 1,000"):
        numprune.save(replace(pruned, plan=plan), tmp_path / "out")
    with pytest.raises(IntegrityError, match=r"the pruned weights take .* bytes, and the budget is 1,000"):
        write_recovered(pruned.network, {}, plan, model.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_quantized_is_refused(tiny: Path, tmp_path: Path) -> None:
    model = numprune.load(tiny / "base")
    rows = numprune.calibration_rows(tiny / "train.txt", model, samples=4, sequence_length=64)
    quantized = numprune.quantize(model, numprune.Scheme("fp8"))
    with pytest.raises(InputError, match=r"^the model is quantized \(fp8\); pruning needs the unquantized one"):
        numprune.prune(quantized, rows, OPTIONS)
    with pytest.raises(InputError, match="quantization needs the unquantized one"):
        numprune.quantize(quantized, numprune.Scheme("fp8"))
    with pytest.raises(InputError, match="omit `dense`, or give rows"):
        numprune.quantize(model, numprune.Scheme("fp8"), dense=model)
    with pytest.raises(InputError, match="dense needs the unquantized one"):
        numprune.quantize(model, numprune.Scheme("fp8"), rows, dense=quantized)
    smaller = numprune.prune(model, rows, OPTIONS)
    with pytest.raises(InputError, match="it was not pruned from that one"):
        numprune.quantize(model, numprune.Scheme("fp8"), rows, dense=smaller)
    out = numprune.save(quantized, tmp_path / "quantized")
    with pytest.raises(InputError, match="already exists"):
        numprune.save(quantized, out)


def test_impossible_requests_are_refused(tiny: Path, tmp_path: Path) -> None:
    model = numprune.load(tiny / "base")
    rows = numprune.calibration_rows(tiny / "train.txt", model, samples=4, sequence_length=64)
    with pytest.raises(InputError, match="the model is neither pruned nor quantized"):
        numprune.save(model, tmp_path / "out")
    plan = numprune.plan(model, rows, OPTIONS).model_copy(update={"base": "another"})
    with pytest.raises(InputError, match="the plan was made for a model with digest another"):
        numprune.apply(plan, model, rows)


def test_importing_numprune_loads_no_tensor_library() -> None:
    script = "import sys, numprune; print(numprune.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"


def test_every_public_name_exists() -> None:
    for name in numprune.__all__:
        assert getattr(numprune, name) is not None
    assert set(numprune.__all__) <= set(dir(numprune))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = numprune.nothing  # type: ignore[attr-defined]


def example(module: ModuleType) -> list[str]:
    """The lines of code in a module's docstring."""
    return [line.removeprefix("    ") for line in (module.__doc__ or "").splitlines() if line.startswith("    ")]


@pytest.mark.slow
def test_the_documented_lines_pass_mypy_strict(tmp_path: Path) -> None:
    from numprune import schedules
    from numprune.flows import api

    lines = example(api)
    assert lines[0] == "import numprune"
    (tmp_path / "script.py").write_text("\n".join([*lines, "reveal_type(plan)", "reveal_type(pruned)", ""]))
    (tmp_path / "readme.py").write_text(README_LINES)
    (tmp_path / "schedule.py").write_text("\n".join(["from typing import Any", "dataset: Any", *example(schedules)]))
    scripts = [str(tmp_path / name) for name in ("script.py", "readme.py", "schedule.py")]
    check = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", *scripts]
    root = Path(numprune.__file__).parent.parent
    done = subprocess.run(check, cwd=root, capture_output=True, text=True)
    revealed = [line.split("Revealed type is ")[1] for line in done.stdout.splitlines() if "Revealed type" in line]
    assert [kind.strip('"').rpartition(".")[2] for kind in revealed] == ["Plan", "Model"], done.stdout
    assert "error" not in done.stdout


def test_the_documentation_shows_the_type_checked_lines() -> None:
    from numprune import schedules
    from numprune.flows import api

    page = Path(numprune.__file__).parent.parent / "docs" / "python.md"
    blocks = page.read_text(encoding="utf-8").split("```")[1::2]
    shown = [[line for line in block.splitlines()[1:] if line] for block in blocks]
    assert shown == [example(api), example(schedules)]
