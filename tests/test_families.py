"""Every family's file in numprune/families describes the model that transformers builds.

A family that passes is pruned, saved, read back and streamed right. docs/families.md holds the table of what is proved.
"""

from pathlib import Path

import pytest
import torch

from numprune import sensitivity
from numprune.anatomy import PER_LAYER_PREFIX, read_anatomy
from numprune.axes import AXES, DEFAULT_AXES, Limits
from numprune.budget import budget_of
from numprune.calibration import Walker, consumer_weight
from numprune.configs import pruned_config
from numprune.depth import Shallower
from numprune.experts.inputs import Experts
from numprune.experts.removal import routing_weights
from numprune.export import onnx_decoder
from numprune.families import FAMILIES
from numprune.images import Processor
from numprune.layers import ModelLayers, leave, passed, replaced
from numprune.modeling import AUTO_OF
from numprune.options import PruneOptions
from numprune.plans import DroppedLayer
from numprune.pruning import config_after, prune_layers
from numprune.slices import Kept, Size
from numprune.surgery import assemble, channels_of, cut_layer
from numprune.target import Target, allowed_sizes
from numprune.tasks import CAUSAL
from numprune.tasks.classification import Classification
from numprune.tasks.embedding import Embedding
from numprune.tasks.image_classification import ImageClassification
from numprune.tasks.masked import Masked
from tests.conftest import build_tiny, image_processor

TASKS = {
    task.name: task
    for task in (
        CAUSAL,
        Masked(mask_token=258),
        Classification({"a": 0, "b": 1}),
        Embedding(normalized=True),
        ImageClassification({"a": 0, "b": 1}, Processor("{}", (1, 8, 8), image_processor())),
    )
}
ROWS = torch.randint(0, 256, (6, 20), generator=torch.Generator().manual_seed(0))  # longer than a window of 8
ROWS[:, [3, 11, 18]] = 258  # a masked language model's masks, for the others a token like any other
IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
ALIGNED = Target(align=1)

# `make check` has the costly proofs of these alone, for their first task: grouped heads, no gate, experts, encoders.
QUICK = ("llama", "gpt2", "mixtral", "bert", "vit")


def costly(family, task, *others):
    """The parameters of a proof that takes long for all families and tasks together."""
    quick = family in QUICK and task == FAMILIES[family].tasks[0]
    return pytest.param(family, task, *others, marks=[] if quick else [pytest.mark.slow])


of_family = pytest.mark.parametrize("family", FAMILIES)
of_decoder = pytest.mark.parametrize(
    "family", [name for name, family in FAMILIES.items() if "causal-lm" in family.tasks]
)
of_task = pytest.mark.parametrize(
    ("family", "task"), [(name, task) for name, family in FAMILIES.items() for task in family.tasks]
)


def rows_of(task):
    return IMAGES if task == "image-classification" else ROWS


def output(model, task="causal-lm", tokens=None, mask=None):
    rows = rows_of(task) if tokens is None else tokens
    with torch.no_grad():
        return TASKS[task].output(model, rows, torch.ones_like(rows) if mask is None else mask)


def read_back(folder, family, task):
    implementation = FAMILIES[family].attention_implementation
    model = AUTO_OF[task].from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation)
    return model.eval()


def generated(model, use_cache):
    model.generation_config.eos_token_id = None
    return model.generate(ROWS[:2, :9], use_cache=use_cache, max_new_tokens=6, do_sample=False)


@of_task
def test_parameters_are_counted_from_the_configuration(family, task):
    model = build_tiny(family, task=task)
    anatomy = read_anatomy(model.config)
    found = dict(anatomy.around)
    for block in anatomy.blocks:
        found |= {f"{block.path}.{name}": shape for name, shape in block.tensors().items()}
    assert found == {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert budget_of(anatomy).parameters == sum(value.numel() for value in model.parameters())


@of_task
@pytest.mark.parametrize("padded", [False, True])
def test_walking_layer_by_layer_matches_the_forward_pass(family, task, padded):
    if padded and task == "image-classification":
        pytest.skip("images are not padded")
    model, rows = build_tiny(family, task=task), rows_of(task)
    layers = ModelLayers(model, TASKS[task])
    mask = torch.ones_like(rows)
    if padded:
        mask[0, :7] = mask[3, :1] = 0
        mask[2, -5:] = 1 if task == "causal-lm" else 0
    entered = layers.enter(rows, mask)
    hidden = entered.hidden
    with torch.no_grad():
        for index, arguments in enumerate(entered.arguments):
            with layers.layer(index) as layer:
                hidden = arguments.call(layer, arguments.merged(hidden))
        found = leave(TASKS[task], model, layers.anatomy, rows, hidden, mask)
    expected = output(model, task, mask=mask)
    if expected.dim() == 3:
        found, expected = found[mask.bool()], expected[mask.bool()]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def without(model, block):
    """The model without a block, where its family can do without."""
    anatomy = read_anatomy(model.config)
    if not block.separable:
        pytest.skip("its norms follow the sum: no block can be removed")
    if len(set(getattr(model.config, "layer_types", None) or [])) > 1:
        pytest.skip("its layers are of different types: no block can be removed")
    kept = {one.name: some(one, one.size, seed=0) for one in anatomy.blocks}
    kept[block.name] = some(block, Size(0, block.members), seed=0)
    cut = {}
    for index in range(anatomy.layers):
        layer = model.get_submodule(anatomy.of_layer(index)[0].path)
        cut |= {name: value.clone() for name, value in cut_layer(layer, anatomy.of_layer(index), kept, {}).items()}
    after = anatomy.keeping({name: left.size for name, left in kept.items()})
    return assemble(model, pruned_config(model.config, after), cut)


@pytest.mark.parametrize("gone", ["nothing", "the last layer's first block"])
@of_task
def test_walking_block_by_block_matches_the_forward_pass(family, task, gone):
    model = build_tiny(family, task=task)
    if gone != "nothing":
        model = without(model, read_anatomy(model.config).of_layer(1)[0])
    layers = ModelLayers(model, TASKS[task])
    rows = rows_of(task)
    walker = Walker(layers, rows.shape[1:], batch_size=4)
    stream = walker.embed(rows)
    for block in layers.anatomy.blocks:
        if block.units:
            with layers.layer(block.layer) as layer:
                walker.advance(layer, block, stream)
    with torch.no_grad(), layers.head() as head:
        torch.testing.assert_close(head(rows, stream.hidden), output(model, task), atol=1e-4, rtol=1e-4)


@of_task
def test_a_block_runs_up_to_its_consumer_and_from_there_on(family, task):
    model = build_tiny(family, task=task)
    layers = ModelLayers(model, TASKS[task])
    rows = rows_of(task)
    walker = Walker(layers, rows.shape[1:], batch_size=4)
    stream = walker.embed(rows)
    for block in layers.anatomy.blocks:
        if block.routing is not None:
            with layers.layer(block.layer) as layer:
                walker.advance(layer, block, stream)
            continue
        with layers.layer(block.layer) as layer:
            runs = list(walker.run(layer, block, stream))
            for (batch, run), (same, inputs) in zip(runs, walker.inputs(layer, block, stream), strict=True):
                assert batch == same
                torch.testing.assert_close(inputs, run.inputs)
                walker.give(layer, block, stream, batch, run.output)
                if not layers.anatomy.has_parallel_blocks:
                    torch.testing.assert_close(stream.hidden[batch], run.after)
    expected = output(model, task)
    with layers.head() as head, torch.no_grad():
        torch.testing.assert_close(head(rows, stream.hidden), expected, atol=2e-5, rtol=1e-4)


# By layer, of two in turn: the share of its units that each kind of block keeps; `heads`: of the query heads in each
# KV group; `channels`: of the channels in each expert.
CUTS = {
    "attention": ({"attention": 0.5}, {"attention": 0.5}),
    "mlp": ({"mlp": 0.4}, {"mlp": 0.4}),
    "both": ({"attention": 0.5, "mlp": 0.4}, {"attention": 0.5, "mlp": 0.4}),
    "heads": ({"heads": 0.5}, {"heads": 0.5}),
    "attention and heads": ({"attention": 0.5, "heads": 0.5}, {"attention": 0.5, "heads": 0.5}),
    "heads per layer": ({"heads": 0.5}, {"attention": 0.5, "mlp": 0.4}),
    "attention per layer": ({"attention": 0.5}, {}),
    "mlp per layer": ({"mlp": 0.4}, {"mlp": 0.7}),
    "both per layer": ({"attention": 0.5}, {"mlp": 0.4}),
    "experts": ({"experts": 0.6}, {"experts": 0.6}),
    "experts and channels": ({"experts": 0.6, "channels": 0.5}, {"experts": 0.6, "channels": 0.5}),
    "experts per layer": ({"experts": 0.6, "mlp": 0.4}, {"channels": 0.5, "attention": 0.5, "mlp": 0.0}),
    "blocks gone": ({"attention": 0.5, "mlp": 0.0}, {"mlp": 0.4}),
}


def some(block, size, seed):
    """A random choice of so many units and of so many members in each."""
    generator = torch.Generator().manual_seed(seed)
    units = torch.randperm(block.units, generator=generator)[: size.units].sort().values
    members = torch.rand(size.units, block.members, generator=generator).argsort(1)[:, : size.members].sort(1).values
    return Kept(units, members)


def mask_experts(layer, block, kept):
    """Let no token go to the experts that are not kept, and no channel that is not kept add to what the others give."""
    gone = torch.ones(block.units, dtype=torch.bool)
    gone[kept.units] = False

    def reroute(_module, _args, output):
        weights = routing_weights(output[0].masked_fill(gone, -torch.inf), block.routing)
        return output[0], *weights.topk(block.routing.top_k)

    layer.get_submodule(block.routing.router).register_forward_hook(reroute)
    channels = torch.zeros(block.units, block.members)
    channels[kept.units[:, None], kept.members] = 1
    Experts(layer, block).down.mul_(channels[:, None])


@pytest.mark.parametrize(
    ("family", "task"), [costly(name, task) for name, family in FAMILIES.items() for task in family.tasks]
)
@pytest.mark.parametrize("case", CUTS)
def test_cut_models_match_masked_ones_also_when_read_back(family, task, case, tmp_path):
    model = build_tiny(family, task=task)
    anatomy = read_anatomy(model.config)
    kept = {}
    for block in anatomy.blocks:
        share = CUTS[case][block.layer % 2].get
        units, members = round(block.units * share(block.kind, 1.0)), block.members
        if block.kind == "attention":
            members = members if block.scores else max(1, round(members * share("heads", 1.0)))
        if block.kind == "experts":
            members = round(members * share("channels", 1.0))
        if not block.separable:
            units, members = block.size
        kept[block.name] = some(block, Size(units, members), seed=block.layer)
    cut = {}
    with torch.no_grad():
        for index in range(anatomy.layers):
            layer, blocks = model.get_submodule(anatomy.of_layer(index)[0].path), anatomy.of_layer(index)
            cut |= {name: value.clone() for name, value in cut_layer(layer, blocks, kept, {}).items()}
            for block in blocks:
                if block.routing is not None:
                    mask_experts(layer, block, kept[block.name])
                    continue
                gone = torch.ones(block.channels, dtype=torch.bool)
                gone[channels_of(block, kept[block.name])] = False
                consumer_weight(layer, block)[:, gone] = 0
                if not kept[block.name].size.units:
                    if block.consumer_bias:
                        layer.get_parameter(f"{block.consumer}.bias").zero_()
                    for norm in block.post_norms:  # goes with the block
                        layer.set_submodule(norm, torch.nn.Identity())
    after = anatomy.keeping({name: left.size for name, left in kept.items()})
    sliced = assemble(model, pruned_config(model.config, after), cut)
    masked = output(model, task)
    torch.testing.assert_close(output(sliced, task), masked, atol=2e-5, rtol=1e-4)
    assert budget_of(read_anatomy(sliced.config)) == budget_of(after)
    assert budget_of(after).parameters == sum(value.numel() for value in sliced.parameters())

    stock = after.is_uniform and all(anatomy.stock_holds(block, kept[block.name].size) for block in anatomy.blocks)
    assert sliced.config.model_type.startswith(PER_LAYER_PREFIX) != stock
    sliced.save_pretrained(tmp_path)
    read = read_back(tmp_path, family, task)
    torch.testing.assert_close(output(read, task), output(sliced, task), atol=1e-6, rtol=1e-6)
    assert read_anatomy(read.config).blocks == after.blocks

    if TASKS[task].generates:
        cached, uncached = (generated(read, use_cache) for use_cache in (True, False))
        assert torch.equal(cached, uncached)


# What a third layer adds to the tiny models, whose lists have an entry for each of two.
THREE = {"num_hidden_layers": 3}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
THREE_OF = {"gemma3_text": _WINDOWS, "gpt_oss": _WINDOWS}
# In stages, layers compute with their index, and none can be dropped.
IN_STAGES = [name for name, family in FAMILIES.items() if family.stages]
of_droppable = pytest.mark.parametrize(
    ("family", "task"),
    [(name, task) for name, family in FAMILIES.items() for task in family.tasks if name not in IN_STAGES],
)


@pytest.mark.slow
@of_droppable
@pytest.mark.parametrize("layer", [0, 1])
def test_a_model_without_a_layer_is_stock_and_matches_its_remaining_layers(family, task, layer, tmp_path):
    model = build_tiny(family, task=task, **THREE, **THREE_OF.get(family, {}))
    layers = ModelLayers(model, TASKS[task])
    dropped = model.get_submodule(f"{layers.anatomy.layers_path}.{layer}")
    with replaced([dropped], lambda hidden, *_, **__: passed(model, hidden)):
        expected = output(model, task)
    parameters = sum(block.parameters(block.size) for block in layers.anatomy.of_layer(layer))
    ratio = parameters / budget_of(layers.anatomy).prunable_parameters
    options = PruneOptions(ratio, compensation="none", target=ALIGNED, drop_layers=1)
    cut, drop = {}, [DroppedLayer(layer=layer, divergence=0)]
    plan = prune_layers(layers, rows_of(task), options, cut.update, dropped=drop)
    left = assemble(model, config_after(layers, plan), cut)
    torch.testing.assert_close(output(left, task), expected, atol=1e-5, rtol=1e-5)
    assert left.config.model_type == family
    left.save_pretrained(tmp_path)
    read = read_back(tmp_path, family, task)
    torch.testing.assert_close(output(read, task), expected, atol=1e-5, rtol=1e-5)
    for name, value in model.config.to_dict().items():  # what has an entry for each layer
        if isinstance(value, list) and len(value) == 3:
            assert getattr(read.config, name) == [value[index] for index in range(3) if index != layer], name
    if TASKS[task].generates:
        cached, uncached = (generated(read, use_cache) for use_cache in (True, False))
        assert torch.equal(cached, uncached)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in IN_STAGES])
def test_the_dense_stream_passes_through_a_dropped_layer(family):
    task = FAMILIES[family].tasks[0]
    model = build_tiny(family, task=task, **THREE, **THREE_OF.get(family, {}))
    layers = ModelLayers(model, TASKS[task])
    rest = Shallower(layers, [1])
    rows = rows_of(task)
    dense, shallow = Walker(layers, rows.shape[1:], batch_size=4), Walker(rest, rows.shape[1:], batch_size=4)
    stream = shallow.embed(rows)
    with torch.no_grad():
        for index in range(2):
            if index == 1:
                with layers.layer(1) as layer:
                    dense.through(layer, 1, stream.hidden, stream.hidden)
            with rest.layer(index) as layer:
                for block in rest.anatomy.of_layer(index):
                    shallow.advance(layer, block, stream)
        with layers.head() as head:
            torch.testing.assert_close(head(rows, stream.hidden), output(model, task), atol=1e-4, rtol=1e-4)


@of_task
def test_gradients_match_autograd_on_the_whole_model(family, task):
    model = build_tiny(family, task=task)
    rows = rows_of(task)
    found = sensitivity.measure(ModelLayers(model, TASKS[task]), rows, batch_size=4, taylor=True)
    blocks = read_anatomy(model.config).blocks
    outputs = []
    for block in blocks:
        consumer = model.get_submodule(f"{block.path}.{block.consumer}")
        consumer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    found_output, draw = TASKS[task].output(model, rows, torch.ones_like(rows)), torch.Generator().manual_seed(0)
    loss = sum(TASKS[task].loss(found_output[[row]], rows[[row]], draw) for row in range(len(rows)))
    losses = TASKS[task].losses_in(rows)
    gradients = torch.autograd.grad(loss, outputs, retain_graph=True)
    loss.backward()
    for block, gradient in zip(blocks, gradients, strict=True):
        flat = gradient.reshape(len(rows), -1, gradient.shape[-1])
        flat = flat.sum(1) if TASKS[task].pooled else flat.flatten(0, 1)
        expected = flat.T @ flat / losses
        torch.testing.assert_close(found.output[block.name], expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
        salience = sum(
            (value * value.grad).detach().abs().sum() / losses
            for value in (model.get_parameter(f"{block.path}.{part.tensor}") for part in block.slices)
        )
        torch.testing.assert_close(found.taylor[block.name].sum().float(), salience, rtol=1e-3, atol=1e-6)


@of_family
@pytest.mark.parametrize("axes", [DEFAULT_AXES, AXES])
def test_uniform_pruning_stays_within_stock_configurations(family, axes):
    anatomy = read_anatomy(build_tiny(family).config)
    block = anatomy.blocks[0]
    uniform, per_layer = (
        allowed_sizes(anatomy, ALIGNED, Limits(tuple(axes)), stock=stock)[block.name] for stock in (True, False)
    )
    heads = range(1 if axes is AXES else block.members, block.members + 1)
    every = [Size(units, members) for units in range(1, block.units + 1) for members in heads]
    assert per_layer == (every if block.separable else [block.size])
    assert uniform == [size for size in per_layer if anatomy.stock_holds(block, size)]
    assert uniform[-1] == block.size


HEADS = {
    "any": "any number",
    "divisors": "divisors of the hidden size",
    "stand-in": "any number",
    "all": "none; any number per layer",
}


def row_of(family):
    """The family's row of docs/families.md; that every cell of it is true, the other tests say."""
    entry = FAMILIES[family]
    config = build_tiny(family).config
    attention, mlp = read_anatomy(config).of_layer(0)
    heads = HEADS["stand-in" if entry.stand_in else entry.stock_heads]
    cells = [f"`{family}`", heads if attention.separable else "none", "up" if mlp.linear else "values"]
    if "causal-lm" in entry.tasks:
        cells.append("written" if onnx_decoder.writes(config) else "traced")
        if entry.vllm.runs:
            cells.append("native" if entry.vllm.native else "transformers backend")
            cells.append("plug-in" if entry.vllm.per_layer else "no")
    else:
        cells += [", ".join(entry.tasks)]
    return f"| {' | '.join(cells)} |"


@of_family
def test_the_documented_table_matches_the_proofs(family):
    page = Path(__file__).parent.parent / "docs" / "families.md"
    assert row_of(family) in page.read_text(encoding="utf-8").splitlines()
