"""A model spread over two devices computes, and becomes, what it does on one. Run by test_placement.py."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from numprune import moments
from numprune.corpus import TokenRows
from numprune.errors import InputError, MissingRuntime
from numprune.export.runtimes.torch_compiled import CompiledRuntime
from numprune.generation import continuations
from numprune.layers import ModelLayers
from numprune.options import PruneOptions
from numprune.placement import is_spread, placed
from numprune.probing import attention_masses
from numprune.pruning import plan_layers, prune
from numprune.quality import compare, evaluate
from numprune.recovery import RecoveryOptions, RecoveryRows, distill
from numprune.target import Target
from tests.conftest import build_tiny

CPU = torch.device("cpu")
ROWS = torch.randint(0, 256, (16, 8), generator=torch.Generator().manual_seed(0))
OPTIONS = PruneOptions(0.3, target=Target(align=4))  # uniform and joint


def tiny(family: str = "llama", layers: int = 2, seed: int = 0) -> PreTrainedModel:
    return build_tiny(family, seed, hidden_size=32, num_hidden_layers=layers)


def spread(model: PreTrainedModel, second: torch.device) -> PreTrainedModel:
    """Place `model`, with about half of its layers on each of two devices."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    placed(model, {CPU: int(0.75 * size), second: 2 * size})
    assert is_spread(model)
    return model


def argmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def equal(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=atol)


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    from tests.second_device import SECOND, Literals  # for the rest of the process, torch knows this device

    monkeypatch.setitem(moments._STRIP, SECOND.type, moments._STRIP["cpu"])
    with Literals():
        yield SECOND


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "qwen3_moe"])
def test_a_spread_model_computes_the_same(family: str, second: torch.device) -> None:
    whole = tiny(family, layers=4)
    both = spread(copy.deepcopy(whole), second)
    assert {second, CPU} == {tensor.device for tensor in (*both.parameters(), *both.buffers())}
    with torch.no_grad():
        equal(both(ROWS).logits, whole(ROWS).logits, 1e-5)


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("llama", {}),
        ("llama", {"allocation": "error", "compensation": "residual", "drop_layers": 1, "ratio": 0.6}),
        ("llama", {"hidden_size": 24, "ratio": 0.4}),
        ("llama", {"hidden_size": 24, "ratio": 0.4, "basis": "coordinates", "criterion": "taylor"}),
        ("qwen3_moe", {"compensation": "residual"}),
        ("qwen2", {"window": 4, "window_layers": 1, "compensation": "oneshot"}),
    ],
)
def test_a_spread_model_is_pruned_as_one(family: str, changed: dict[str, Any], second: torch.device) -> None:
    options, base, rows = replace(OPTIONS, **changed), tiny(family), ROWS[:4] if family == "qwen3_moe" else ROWS
    one, two = prune(base, rows, options), prune(spread(copy.deepcopy(base), second), rows, options)
    assert two.plan == one.plan
    assert is_spread(two.model) or options.drop_layers
    for name, tensor in one.model.state_dict().items():
        equal(two.model.state_dict()[name], tensor, 5e-6 if options.hidden_size else 1e-6)
    with torch.no_grad():
        equal(two.model(ROWS).logits, one.model(ROWS).logits, 1e-4)


def test_a_spread_model_is_planned_and_measured_as_one(second: torch.device) -> None:
    base, other = tiny(), tiny(seed=1)
    two = spread(copy.deepcopy(base), second)
    rows = TokenRows([*ROWS], list(range(len(ROWS))), [str(number) for number in range(len(ROWS))], "")
    options = replace(OPTIONS, criterion="wanda", compensation="none")
    plans = [plan_layers(ModelLayers(model), ROWS, options) for model in (base, two)]
    assert plans[0] == plans[1]
    assert prune(two, ROWS, options, plan=plans[0]).plan.blocks == plans[0].blocks
    losses = [evaluate(model, rows) for model in (base, two)]
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[1].nll == pytest.approx(losses[0].nll, rel=1e-5)
    deltas = [compare(model, other, rows).loss_delta.value for model in (base, two)]
    assert deltas[1] == pytest.approx(deltas[0], rel=1e-4)
    masses = [attention_masses(ModelLayers(model), ROWS[:2], set()) for model in (base, two)]
    for name, found in masses[1].items():
        equal(found, masses[0][name])
    texts = [continuations(model, [[1, 2, 3], [4]], (), argmax, maximum=4, length=20) for model in (base, two)]
    assert texts[0] == texts[1]
    eager: Any = SimpleNamespace(model=two)
    with pytest.raises(MissingRuntime, match="spread over several GPUs"):
        CompiledRuntime(eager, 1, 8)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_spread_models_are_distilled_as_one(train: Any, second: torch.device) -> None:
    options = RecoveryOptions(tokens=64, learning_rate=1e-3, batch_size=4, micro_batch_size=2, selection_rows=4)
    options = replace(options, hidden_weight=0.5, train=train, gradient_checkpointing=False)
    dense, model = tiny(), tiny(seed=1)
    rows = RecoveryRows(ROWS[:12], ROWS[12:])
    both = [spread(copy.deepcopy(one), second) for one in (model, dense)]
    found = [distill(*pair, rows, options, CPU) for pair in ((model, dense), both)]
    assert found[1].kl_after == pytest.approx(found[0].kl_after, rel=1e-4)
    for name, tensor in model.state_dict().items():
        equal(both[0].state_dict()[name], tensor, 1e-5)
    with pytest.raises(InputError, match="room for both models"):
        distill(both[0], dense, rows, replace(options, train="blocks"), CPU)
