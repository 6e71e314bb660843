"""Fewer dimensions of queries and keys: the fit of the scores, its price, and pruned models."""

import pytest
import torch
from transformers.models.vit.modeling_vit import ViTAttention

from numprune import scores
from numprune.anatomy import read_anatomy
from numprune.axes import DEFAULT_AXES
from numprune.budget import budget_of
from numprune.calibration import Walker
from numprune.configs import pruned_config
from numprune.curves import error_curve
from numprune.errors import InputError
from numprune.export import checkpoint, onnx, parity_encoder
from numprune.export.streaming import CheckpointLayers
from numprune.layers import CopiedLayers, ModelLayers
from numprune.modeling import AUTO_OF
from numprune.option_checks import check_options
from numprune.options import PruneOptions
from numprune.planned import check_plan
from numprune.processes import ALONE
from numprune.pruning import prune, prune_layers
from numprune.scores import Directions, ScoreMoments
from numprune.slices import Kept, Size
from numprune.surgery import assemble, cut_layer
from numprune.target import Target
from tests.conftest import build_tiny, tiny_config, write_checkpoint
from tests.numprune.gloo import together
from tests.test_families import IMAGES, TASKS

TASK = TASKS["image-classification"]
FAMILIES = ("vit", "deit", "dinov2")
CLASSES = {"vit": "ViTForImageClassification", "bert": "BertForMaskedLM"}
HEADS, DIMS = 4, 16


def options(ratio=0.15, **others):
    settings = {"allocation": "error", "axes": ("qk-dims",), "target": Target(align=1)}
    return PruneOptions(ratio, **settings | others)


@torch.no_grad()
def logits(model, images=IMAGES):
    return model(pixel_values=images).logits


def moments_of(query, key, dense=None):
    found = ScoreMoments.empty(*query.shape[2:], query.device)
    found.add((query, key), dense or (query, key))
    return found


def tokens(seed, rows=3, length=20, heads=2, dims=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, length, heads, dims, dtype=torch.float64, generator=generator)


def products(query, key):
    """The scores less their mean over the keys, which softmax ignores."""
    found = torch.einsum("nihd,njhd->nhij", query, key)
    return found - found.mean(-1, keepdim=True)


def fitted(query, key, directions, kept):
    query, key = (
        torch.einsum("hrd,nshd->nshr", rows[:, :kept], one)
        for rows, one in ((directions.queries, query), (directions.keys, key))
    )
    return products(query, key)


def test_all_dimensions_give_the_dense_scores():
    query, key = tokens(0)
    directions = Directions.of(moments_of(query, key), damping=0.1)
    torch.testing.assert_close(fitted(query, key, directions, 6), products(query, key))


def test_dimensions_that_are_combinations_of_others_are_removed_without_error():
    query, key = tokens(0)
    key[..., 4] = 2 * key[..., 0] - key[..., 1]
    key[..., 5] = 3  # equal for all keys: softmax ignores it
    query[..., 3] = query[..., 2]
    directions = Directions.of(moments_of(query, key), damping=0.0)
    torch.testing.assert_close(fitted(query, key, directions, 3), products(query, key))


def test_no_other_dimensions_give_a_smaller_error():
    query, key = tokens(0, rows=1)  # of one row, where pairs of tokens are all pairs
    directions = Directions.of(moments_of(query, key), damping=0.0)
    expected = products(query, key)
    error = (fitted(query, key, directions, 3) - expected).square().sum((-1, -2))
    values = torch.linalg.svdvals(expected)
    torch.testing.assert_close(error, values[..., 3:6].square().sum(-1))


def test_scores_of_another_model_are_fitted():
    query, key = tokens(0)
    mixing = torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = torch.einsum("hde,nshd->nshe", mixing, query)
    directions = Directions.of(moments_of(own, key, dense=(query, key)), damping=1e-9)
    torch.testing.assert_close(fitted(own, key, directions, 6), products(query, key), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_error_is_what_least_squares_leaves():
    model = build_tiny("vit")
    layers = CopiedLayers(model, TASK)
    block, walker = layers.anatomy.blocks[0], Walker(layers, IMAGES.shape[1:], batch_size=4)
    hidden = walker.embed(torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))).hidden
    with layers.layer(0) as layer:
        found = scores.errors_of_dims(walker, layer, block, hidden, [2, 7])
        outputs = walker.inputs_batch(layer, block, hidden) @ layer.attention.o_proj.weight.T
        query, key = scores.of_run(walker, layer, block, hidden)
        scores.reduce(layer, block, 7, Directions.of(moments_of(query, key), damping=0.0))
        inputs = walker.inputs_batch(layer, block, hidden)
    ones = torch.ones(*inputs.shape[:-1], 1)
    design, outputs = torch.cat([inputs, ones], -1).flatten(0, 1).double(), outputs.flatten(0, 1).double()
    left = outputs - design @ torch.linalg.lstsq(design, outputs).solution
    assert left.square().mean(0).sum() <= found[7].trace() < 1.05 * left.square().mean(0).sum()
    assert found[7].trace() < found[2].trace()


def test_dimensions_are_priced_with_the_heads_that_are_left():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(6, 8, generator=generator), torch.randn(50, 8, generator=generator)
    gram, sensitivity = (inputs.T @ inputs / 50).double(), torch.eye(6, dtype=torch.float64)
    prices = torch.tensor([0, 1, 3], dtype=torch.float64)
    alone = error_curve(weight.double(), gram, sensitivity, Size(4, 1))
    curve = error_curve(weight.double(), gram, sensitivity, Size(4, 3), members=True, scores=prices)
    for gone in range(4):
        torch.testing.assert_close(curve[gone], alone[gone] + prices * (4 - gone) / 4)


@pytest.mark.parametrize("compensation", ["none", "oneshot", "joint"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_models_are_read_back(family, compensation, tmp_path):
    model = build_tiny(family)
    made = prune(model, IMAGES, options(compensation=compensation), task=TASK)
    sizes = made.plan.sizes()
    reduced = [size for name, size in sizes.items() if name.endswith("attention") and size.members < DIMS]
    assert reduced
    assert all(size.units == HEADS for size in reduced)
    assert made.prunable_ratio_removed >= 0.15
    assert made.model.config.model_type == f"numprune_{family}"
    assert made.after.parameters == sum(value.numel() for value in made.model.parameters())
    made.model.save_pretrained(tmp_path)
    read = AUTO_OF[TASK.name].from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    torch.testing.assert_close(logits(read), logits(made.model), atol=1e-6, rtol=1e-6)
    read.set_attn_implementation("eager")
    torch.testing.assert_close(logits(read), logits(made.model), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cut_dimensions_are_those_that_were_zero():
    model = build_tiny("vit")
    anatomy = read_anatomy(model.config)
    walker = Walker(ModelLayers(model, TASK), IMAGES.shape[1:])
    hidden = walker.embed(IMAGES).hidden
    dims = {0: 5, 1: 16}
    kept, cut = {}, {}
    for block in anatomy.blocks:
        layer = model.get_submodule(block.path)
        if block.scores and dims[block.layer] < DIMS:
            query, key = scores.of_run(walker, layer, block, hidden)
            scores.reduce(layer, block, dims[block.layer], Directions.of(moments_of(query, key), damping=0.0))
            assert not layer.attention.q_proj.bias.view(HEADS, DIMS)[:, dims[block.layer] :].any()
        members = dims[block.layer] if block.scores else 1
        kept[block.name] = Kept.whole(torch.arange(block.units), members)
    for layer in range(2):
        blocks = anatomy.of_layer(layer)
        cut |= cut_layer(model.get_submodule(blocks[0].path), blocks, kept, {})
    after = anatomy.keeping({name: left.size for name, left in kept.items()})
    narrow = assemble(model, pruned_config(model.config, after), cut)
    assert narrow.vit.layers[0].attention.q_proj.weight.shape == (HEADS * 5, 64)
    assert type(narrow.vit.layers[1].attention) is ViTAttention
    assert read_anatomy(narrow.config).blocks == after.blocks
    torch.testing.assert_close(logits(narrow), logits(model), atol=1e-5, rtol=1e-5)


def test_equal_reduced_layers_are_no_stock_model():
    model = build_tiny("dinov2")
    anatomy = read_anatomy(model.config)
    sizes = {block.name: Size(HEADS, 8) if block.scores else block.size for block in anatomy.blocks}
    config = pruned_config(model.config, anatomy.keeping(sizes))
    assert (config.model_type, config.qk_head_dim) == ("numprune_dinov2", 8)
    assert read_anatomy(config).blocks == anatomy.keeping(sizes).blocks
    stray = tiny_config("vit", qk_head_dim=8, architectures=["ViTForImageClassification"])
    assert read_anatomy(stray).blocks[0].members == DIMS  # a stock model does not read the field


@pytest.mark.parametrize("compensation", ["oneshot", "joint"])
def test_streamed_pruning_matches_in_memory(compensation, tmp_path):
    base = write_checkpoint(build_tiny("vit"), tmp_path / "base")
    asked = options(0.3, axes=(*DEFAULT_AXES, "qk-dims"), compensation=compensation)
    layers, cut = CheckpointLayers(base, scratch=tmp_path), {}
    plan = prune_layers(layers, IMAGES, asked, lambda made: cut.update({k: v.clone() for k, v in made.items()}))
    made = prune(checkpoint.load_model(base), IMAGES, asked, task=layers.task)
    assert plan.sizes() == made.plan.sizes()
    inside = made.model.state_dict()
    for name, value in cut.items():
        torch.testing.assert_close(value, inside[name], atol=1e-4, rtol=1e-3)
    check_plan(layers.anatomy, plan)
    again = prune(checkpoint.load_model(base), IMAGES, asked, task=layers.task, plan=plan)
    torch.testing.assert_close(logits(again.model), logits(made.model))


def test_pruning_changes_nothing_if_dimensions_are_superfluous():
    model = build_tiny("vit")
    with torch.no_grad():
        for layer in model.vit.layers:
            for projection in (layer.attention.q_proj, layer.attention.k_proj):
                for parameter in projection.parameters():
                    by_head = parameter.view(HEADS, DIMS, -1)
                    by_head[:, 8:] = 2 * by_head[:, :8]
    before = logits(model)
    anatomy = read_anatomy(model.config)
    left = {block.name: Size(HEADS, 8) if block.scores else block.size for block in anatomy.blocks}
    ratio = 1 - budget_of(anatomy.keeping(left)).prunable_parameters / budget_of(anatomy).prunable_parameters
    made = prune(model, IMAGES, options(ratio - 1e-6, compensation="oneshot"), task=TASK)
    assert made.plan.sizes() == left
    torch.testing.assert_close(logits(made.model), before, atol=1e-3, rtol=1e-3)
    assert torch.equal(logits(model), before)


def test_refitted_models_err_less():
    dense = logits(build_tiny("vit")).log_softmax(-1)
    errors = {}
    for compensation in ("none", "oneshot", "joint"):
        made = prune(build_tiny("vit"), IMAGES, options(0.2, compensation=compensation), task=TASK)
        errors[compensation] = float((dense.exp() * (dense - logits(made.model).log_softmax(-1))).sum(-1).mean())
    assert errors["joint"] < errors["none"]
    assert errors["oneshot"] < errors["none"]


def test_two_processes_prune_as_one():
    asked = options(0.15, compensation="joint", batch_size=2)
    models = [build_tiny("vit") for _ in range(2)]

    def work(processes):
        layers, cut = CopiedLayers(models[processes.index], TASK, processes=processes), {}
        plan = prune_layers(layers, IMAGES, asked, cut.update)
        query, key = (cut[f"vit.layers.1.attention.{name}_proj.weight"].view(HEADS, -1, 64) for name in "qk")
        return plan, query.mT @ key, cut["vit.layers.1.attention.o_proj.weight"]

    plan, products, consumer = work(ALONE)
    for found in together(2, work):
        assert not isinstance(found, Exception), found
        assert found[0] == plan
        torch.testing.assert_close(found[1], products, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[2], consumer, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_reduced_model_is_pruned_again_and_exported(tmp_path):
    base = write_checkpoint(build_tiny("vit", num_hidden_layers=1), tmp_path / "base")
    made = prune(checkpoint.load_model(base), IMAGES, options(0.15), task=TASK)
    checkpoint.save(made.model, base, tmp_path / "pruned")
    onnx.export(tmp_path / "pruned", tmp_path / "onnx")
    proof = parity_encoder.check(tmp_path / "pruned", tmp_path / "onnx", "onnxruntime", device="cpu")
    assert proof["output_error_max"] < 1e-4
    again = prune(checkpoint.load_model(tmp_path / "pruned"), IMAGES, options(0.1), task=TASK)
    sizes, smaller = made.plan.sizes(), again.plan.sizes()
    assert all(smaller[name].members <= size.members for name, size in sizes.items())
    assert smaller != sizes


@pytest.mark.parametrize(
    ("family", "others", "said"),
    [
        ("bert", {}, "bert does not only multiply queries with keys, as vit, deit, dinov2 do"),
        ("vit", {"allocation": "uniform"}, "uniform allocation keeps stock shapes, which have as many as values"),
        ("vit", {"allocation": "global"}, "allocation global sorts whole units; omit qk-dims"),
        ("vit", {"refine": "search"}, "the search does not fit scores"),
    ],
)
def test_what_the_axis_cannot_do_is_refused_before_any_work(family, others, said):
    with pytest.raises(InputError, match=said):
        check_options(read_anatomy(tiny_config(family, architectures=[CLASSES[family]])), options(**others))
