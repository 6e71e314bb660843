import pytest
import torch
from torch.nn.functional import cross_entropy

from numprune.anatomy import read_anatomy
from numprune.flows.studies.rivals.shortgpt import shortgpt
from numprune.layers import ModelLayers
from numprune.sensitivity import measure
from tests.conftest import LLAMA_LIKE, build_tiny

ROWS = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0))


def gradients_of(model):
    """Per block, the gradient of the summed NLL at its output, (N * S, H); parameters get their gradients, too."""
    outputs, handles = {}, []

    def keep(name):
        def hook(_module, _inputs, output):
            outputs[name] = output[0] if isinstance(output, tuple) else output
            outputs[name].retain_grad()

        return hook

    for block in read_anatomy(model.config).blocks:
        if not block.units:
            continue
        module = "self_attn" if block.kind == "attention" else "mlp"
        handles.append(model.model.layers[block.layer].get_submodule(module).register_forward_hook(keep(block.name)))
    logits = model(input_ids=ROWS, use_cache=False).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), ROWS[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {name: output.grad.flatten(0, 1).double() for name, output in outputs.items()}


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_both_sums_match_autograd_on_the_whole_model(family):
    model = build_tiny(family)
    found = measure(ModelLayers(model), ROWS, batch_size=2, taylor=True)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(
            found.output[name].double(),
            gradient.T @ gradient / ROWS.numel(),
            rtol=1e-4,
            atol=1e-5 * float(gradient.var()),
        )
    for block in read_anatomy(model.config).blocks:
        layer = model.model.layers[block.layer]
        expected = torch.zeros(block.units)
        for part in block.slices:
            value = layer.get_parameter(part.tensor)
            salience = (value * value.grad).detach().abs() / ROWS.numel()
            expected += (salience if part.dim == 0 else salience.T).reshape(block.units, -1).sum(1)
        torch.testing.assert_close(found.taylor[block.name].sum(1).float(), expected, rtol=1e-4, atol=1e-6)


def test_batching_does_not_change_the_result():
    class Read(ModelLayers):
        resident = False

    model = build_tiny("llama")
    parts, whole = (measure(layers, ROWS, batch_size=2, taylor=True) for layers in (ModelLayers(model), Read(model)))
    for name, value in whole.output.items():
        torch.testing.assert_close(parts.output[name], value, rtol=1e-5, atol=1e-5 * float(value.max()))
        torch.testing.assert_close(parts.taylor[name], whole.taylor[name], rtol=1e-4, atol=1e-9)


def test_gradients_pass_through_a_layer_that_skips_both_blocks():
    with torch.no_grad():
        model = shortgpt(build_tiny(num_hidden_layers=3), ROWS, 0.3, 8).model
    assert sum(block.units > 0 for block in read_anatomy(model.config).blocks) == 4
    found = measure(ModelLayers(model), ROWS, taylor=True)
    gradients = gradients_of(model)
    assert found.taylor.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found.output[name].double(),
            gradient.T @ gradient / ROWS.numel(),
            rtol=1e-4,
            atol=1e-5 * float(gradient.var()),
        )


def test_frozen_parameters_are_measured():
    frozen = measure(ModelLayers(build_tiny().requires_grad_(False)), ROWS, taylor=True)
    for name, score in measure(ModelLayers(build_tiny()), ROWS, taylor=True).taylor.items():
        assert torch.equal(frozen.taylor[name], score)
