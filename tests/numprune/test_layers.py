import pytest
import torch
from torch.nn import functional

from numprune.layers import ModelLayers
from tests.conftest import LLAMA_LIKE

TOKENS = torch.randint(0, 256, (3, 10), generator=torch.Generator().manual_seed(0))


def loss_by_layers(layers, tokens):
    """Mean NLL of the next tokens, through the layers one after the other."""
    entered = layers.enter(tokens)
    hidden = entered.hidden
    for index in range(layers.anatomy.layers):
        with layers.layer(index) as layer:
            hidden = entered.arguments[index].call(layer, hidden)
    with layers.head() as head:
        logits = head(tokens, hidden)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_layer_by_layer_gradients_match_the_model(tiny_model, family):
    model = tiny_model(family)
    loss_by_layers(ModelLayers(model), TOKENS).backward()
    by_layers = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(by_layers[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_an_unsupported_attention_implementation_is_refused(tiny_model):
    model = tiny_model()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="layers of llama need attn_implementation='sdpa', not 'eager'"):
        ModelLayers(model)
