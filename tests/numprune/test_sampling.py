"""Images sampled with a KV cache are those of the full forward pass, also from pruned models and with guidance."""

import pytest
import torch

from numprune.anatomy import code_vocabulary
from numprune.errors import InputError, IntegrityError
from numprune.options import PruneOptions
from numprune.pruning import prune
from numprune.sampling import guided, sample
from numprune.target import Target
from tests.conftest import build_tiny

LABELS = [0, 2, 1]
SIZES = {"llamagen": {"max_position_embeddings": 17}, "imagegpt": {"max_position_embeddings": 16}}


def pruned(family):
    model = build_tiny(family, **SIZES[family])
    rows = torch.randint(0, 256, (6, 16), generator=torch.Generator().manual_seed(0))
    options = PruneOptions(0.3, allocation="error", target=Target(align=1))
    return prune(model, rows, options).model


def test_guidance_of_scale_1_is_the_conditional_model_and_0_the_unconditional_one():
    one, other = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guided(one, other, 1), one)
    assert torch.equal(guided(one, other, 0), other)
    torch.testing.assert_close(guided(one, other, 3), one + 2 * (one - other))


@pytest.mark.parametrize(("family", "guidance"), [("llamagen", 1.0), ("llamagen", 2.5), ("imagegpt", 1.0)])
def test_samples_of_a_pruned_model_are_those_of_its_full_forward_pass(family, guidance):
    model = pruned(family)
    codes = code_vocabulary(model.config)
    labels = LABELS if codes.classes else [None] * 3
    images = sample(model, labels, guidance=guidance, temperature=0.7, top_k=50, seed=3)
    assert images.shape == (3, 16)

    def logits(starts):
        with torch.no_grad():
            return model(torch.cat([torch.tensor(starts)[:, None], images[:, :-1]], 1), use_cache=False).logits

    found = logits([codes.start if label is None else codes.start_of(label) for label in labels])
    if guidance != 1:
        found = guided(found, logits([codes.start] * 3), guidance)
    noise = torch.Generator().manual_seed(3)
    for position in range(16):
        values = found[:, position] / 0.7
        values = values.masked_fill(values < values.topk(50).values[:, -1:], -torch.inf)
        drawn = (values - torch.empty(values.shape).exponential_(generator=noise).log()).argmax(-1)
        assert torch.equal(drawn, images[:, position])


def test_a_seed_gives_the_same_images_and_another_one_others():
    model = build_tiny("llamagen", **SIZES["llamagen"])
    assert torch.equal(sample(model, LABELS, seed=1), sample(model, LABELS, seed=1))
    assert not torch.equal(sample(model, LABELS, seed=1), sample(model, LABELS, seed=2))


def test_codes_are_drawn_from_the_models_distribution():
    model = build_tiny("llamagen", vocab_size=10, num_classes=3, max_position_embeddings=2)
    images = sample(model, [1] * 8000, seed=0)
    with torch.no_grad():
        expected = model(torch.tensor([[7]])).logits[0, 0].softmax(-1)
    shares = torch.bincount(images.flatten(), minlength=6) / 8000
    assert float((shares - expected).abs().max()) < 4 * 0.5 / 8000**0.5


def test_many_images_are_sampled_in_batches_with_their_own_noise():
    model = build_tiny("llamagen", **SIZES["llamagen"])
    images = sample(model, [0, 1] * 12, guidance=2.0, seed=0)
    assert images.shape == (24, 16)
    assert torch.equal(images[:16], sample(model, [0, 1] * 8, guidance=2.0, seed=0))
    assert len(images.unique(dim=0)) == 24


@pytest.mark.parametrize(
    ("family", "labels", "options", "message"),
    [
        ("llama", [None], {}, "llama: not an image generator"),
        ("llamagen", [3], {}, r"class 3 is not one of the model's classes \(0 to 2\)"),
        ("imagegpt", [0], {}, "none: it generates images without a class"),
        ("llamagen", [None], {"guidance": 2}, "an image without a class cannot be guided"),
        ("llamagen", [0], {"temperature": 0}, "temperature 0"),
        ("llamagen", [0], {"top_k": 0}, "top_k 0"),
    ],
)
def test_what_does_not_apply_is_refused(family, labels, options, message):
    with pytest.raises(InputError, match=message):
        sample(build_tiny(family), labels, **options)


def test_a_damaged_model_is_named():
    model = build_tiny("llamagen", **SIZES["llamagen"])
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(IntegrityError, match="not finite"):
        sample(model, [0])
