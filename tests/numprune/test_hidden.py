"""A model without some coordinates of its residual stream computes what it does with these coordinates zero."""

import json
import math
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.byte_budget import ByteBudget
from numprune.errors import InputError
from numprune.export import checkpoint, onnx, parity
from numprune.export.streaming import CheckpointLayers
from numprune.export.vllm import preflight
from numprune.families import FAMILIES
from numprune.flows.sections import Learn, Prune
from numprune.flows.steps.prune import prune_checkpoint
from numprune.flows.steps.quantize import target_of
from numprune.flows.steps.report import pruning_section
from numprune.hidden import check_narrowable, hidden_sizes, removed
from numprune.layers import CopiedLayers
from numprune.modeling import AUTO_OF
from numprune.option_checks import check_options
from numprune.options import PruneOptions, options_of
from numprune.planned import check_plan
from numprune.plans import PLAN_FILE, BlockPlan, HiddenPlan
from numprune.pruning import config_after, describe, narrowing_of, plan_layers, prune, prune_layers
from numprune.quantization import Scheme
from numprune.quantization.walk import Fit, check_target, quantize_model
from numprune.recovery.prices import block_prices
from numprune.slices import Kept
from numprune.surgery import assemble
from numprune.target import Target
from numprune.time_budget import TimeBudget
from numprune.timings import ScenarioTimes, Time
from tests.conftest import build_tiny, recast, write_checkpoint

ROWS = torch.randint(0, 256, (8, 20), generator=torch.Generator().manual_seed(0))
HIDDEN = 40  # of 64
CPU = torch.device("cpu")
NARROWABLE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "granite",
    "smollm3",
    "phi3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "llamagen",
)


def logits(model):
    with torch.no_grad():
        return model(ROWS).logits


def coordinates(anatomy, size=HIDDEN):
    order = torch.randperm(anatomy.hidden_size, generator=torch.Generator().manual_seed(1))
    return order[:size].sort().values


def plan_of(anatomy, compensation="none", keep=None, share=1, **options):
    """A plan that keeps some coordinates, and one of `share` units of each block except experts."""
    keep = coordinates(anatomy) if keep is None else keep
    options = PruneOptions(
        0.01, "vib", options.pop("allocation", "error"), compensation, Target(align=4), ("channels", "hidden-size")
    )
    blocks = {}
    for block in anatomy.blocks:
        units = torch.arange(0, block.units, share if block.kind == "mlp" else 1)
        blocks[block.name] = BlockPlan.of(block, Kept.whole(units, block.members), None)
    hidden = HiddenPlan(size=anatomy.hidden_size, kept=keep.tolist())
    plan = describe(anatomy, ROWS, options, blocks, hidden=hidden)
    check_plan(anatomy, plan)
    return plan


def pruned_by(model, plan):
    return prune(model, ROWS, options_of(plan), plan=plan)


@contextmanager
def zeroed(model, gone, units=1):
    """The model with what its norms read of some coordinates, and some channels of MLPs, at zero."""
    anatomy = read_anatomy(model.config)

    def coordinate(_, args):
        return (args[0].index_fill(-1, gone, 0), *args[1:])

    def channel(_, args):
        alive = torch.zeros_like(args[0])
        alive[..., ::units] = args[0][..., ::units]
        return (alive,)

    norms = [
        f"{block.path}.{name.removesuffix('.weight')}"
        for block in anatomy.blocks
        for name in block.norms
        if name.endswith("weight")
    ]
    consumers = [f"{block.path}.{block.consumer}" for block in anatomy.of_kind("mlp")]
    with ExitStack() as stack:
        for path in {*norms, FAMILIES[anatomy.family].final_norm}:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(coordinate).remove)
        for path in consumers:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(channel).remove)
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tied"),
    [
        (family, tied)
        for family in NARROWABLE
        for tied in (False, True)
        if tied in FAMILIES[family].requires.get("tie_word_embeddings", (False, True))
    ],
)
def test_the_cut_is_zero_coordinates_and_a_stock_model(family, tied, tmp_path):
    # Norms of queries and keys share epsilon; where there are none, a large one shows whether it is the right one.
    epsilon = 1e-6 if FAMILIES[family].attention.head_norms else 1e-2
    model = build_tiny(family, tie_word_embeddings=tied, rms_norm_eps=epsilon)
    anatomy = read_anatomy(model.config)
    plan = plan_of(anatomy, allocation="uniform", share=2)
    with zeroed(model, removed(plan.coordinates(), anatomy.hidden_size), units=2):
        wanted = logits(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = pruned_by(model, plan)
    torch.testing.assert_close(logits(pruned.model), wanted, atol=2e-5, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    assert pruned.model.config.hidden_size == HIDDEN
    assert pruned.model.config.model_type == family
    assert pruned.after == budget_of(plan.result(anatomy))
    assert pruned.after.parameters == sum(value.numel() for value in pruned.model.parameters())
    after = read_anatomy(pruned.model.config)
    assert (after.blocks, dict(after.around)) == (plan.result(anatomy).blocks, dict(plan.result(anatomy).around))
    assert pruned.plan.hidden == plan.hidden
    pruned.model.save_pretrained(tmp_path)
    implementation = FAMILIES[family].attention_implementation
    read = AUTO_OF["causal-lm"].from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=implementation)
    torch.testing.assert_close(logits(read.eval()), logits(pruned.model), atol=1e-6, rtol=1e-6)
    assert read.config.tie_word_embeddings is tied


def test_kept_weights_are_unchanged_but_for_the_factor_of_the_norms():
    model = build_tiny()
    plan = plan_of(read_anatomy(model.config))
    kept, found = plan.coordinates(), pruned_by(model, plan).model.state_dict()
    for name, value in model.state_dict().items():
        left = value.index_select(0, kept) if value.shape[0] == 64 and value.dim() == 2 and "o_proj" in name else value
        if name.endswith(("norm.weight", "layernorm.weight")):
            assert torch.equal(found[name], value[kept] * math.sqrt(64 / HIDDEN)), name
        elif "down_proj" in name or "o_proj" in name:
            assert torch.equal(found[name], value[kept]), name
        else:
            assert torch.equal(found[name], left[..., kept]), name


def test_heads_that_do_not_divide_the_hidden_size_leave_a_stock_model():
    model = build_tiny(num_attention_heads=6, num_key_value_heads=3, head_dim=16, hidden_size=96)
    pruned = pruned_by(model, plan_of(read_anatomy(model.config), allocation="uniform")).model
    assert (pruned.config.model_type, pruned.config.head_dim) == ("mistral", 16)
    assert pruned.config.hidden_size % pruned.config.num_attention_heads


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
@pytest.mark.parametrize("compensation", ["oneshot", "sequential", "residual", "joint"])
def test_refits_bring_the_narrow_model_closer(family, compensation):
    model = build_tiny(family)
    anatomy = read_anatomy(model.config)
    dense = logits(model).log_softmax(-1)
    keep = coordinates(anatomy, 56)

    def error(compensation):
        plan = plan_of(anatomy, compensation, keep, share=2)
        found = logits(pruned_by(build_tiny(family), plan).model).log_softmax(-1)
        return float((dense.exp() * (dense - found)).sum(-1).mean())

    assert error(compensation) < (1.0 if compensation == "oneshot" else 0.9) * error("none")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3_moe", False)])
def test_streamed_matches_in_memory(family, tied, tmp_path):
    folder = write_checkpoint(build_tiny(family, tie_word_embeddings=tied), tmp_path / "base")
    model, _ = checkpoint.load(folder)
    plan = plan_of(read_anatomy(model.config), "joint", share=2)
    kept = pruned_by(model, plan)
    cut, layers = {}, CheckpointLayers(folder, scratch=tmp_path)
    narrowing = narrowing_of(layers, ROWS, options_of(plan), plan)
    prune_layers(layers, ROWS, options_of(plan), cut.update, plan=plan, narrowing=narrowing)
    inside = kept.model.state_dict()
    for name, value in cut.items():
        torch.testing.assert_close(value, inside[name], atol=1e-4, rtol=1e-3)
    assert cut.keys() == {name for name in inside if ".layers." in name}


def test_a_dropped_layer_and_a_narrow_stream_go_together():
    model = build_tiny(num_hidden_layers=3)
    anatomy = read_anatomy(model.config)
    plan = plan_of(anatomy)
    fields = plan.model_dump() | {"drop_layers": 1, "dropped": [{"layer": 1, "divergence": 0.0}], "ratio": 0.4}
    for kind in ("attention", "mlp"):
        fields["blocks"][f"layers.1.{kind}"]["kept"] = []
    plan = type(plan).model_validate(fields)
    check_plan(anatomy, plan)
    pruned = pruned_by(model, plan)
    model.model.layers[1].forward = lambda hidden, *_, **__: hidden
    with zeroed(model, removed(plan.coordinates(), 64)):
        torch.testing.assert_close(logits(pruned.model), logits(model), atol=2e-5, rtol=0)


def test_a_narrow_checkpoint_is_stored_the_same_streamed_or_not(tmp_path):
    base = recast(write_checkpoint(build_tiny(), tmp_path / "base"), torch.bfloat16)
    plan = plan_of(read_anatomy(build_tiny().config), "residual", allocation="uniform", share=2)
    for name, stream in (("memory", False), ("streamed", True)):
        made = prune_checkpoint(base, ROWS, options_of(plan), tmp_path / name, CPU, stream=stream, plan=plan)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "streamed"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])
    assert made.hidden_size == [HIDDEN, 64]
    assert pruning_section(Prune(), Learn(method="vib"), made)["hidden_size"] == [HIDDEN, 64]
    assert "| hidden size | 64 → 40 |" in (tmp_path / "memory" / "README.md").read_text()
    stored = json.loads((tmp_path / "memory" / "config.json").read_text())
    assert (stored["hidden_size"], stored["head_dim"], stored["model_type"]) == (HIDDEN, 16, "llama")
    assert preflight(checkpoint.read_config(tmp_path / "memory"))["plugin"] is False


def test_qwen2_needs_the_backend_that_reads_its_head_size():
    """vLLM's own class divides the hidden size by the heads."""
    model = build_tiny("qwen2")
    pruned = pruned_by(model, plan_of(read_anatomy(model.config), allocation="uniform"))
    assert preflight(model.config)["needs"] == []
    assert preflight(pruned.model.config)["needs"] == ["--model-impl", "transformers"]


def test_a_narrow_model_is_quantized_towards_the_dense_one():
    dense = build_tiny()
    with torch.no_grad():  # what is removed is never written: both residual streams agree
        gone = removed(coordinates(read_anatomy(dense.config)), 64)
        dense.model.embed_tokens.weight[:, gone] = 0
        for layer in dense.model.layers:
            layer.self_attn.o_proj.weight[gone] = 0
            layer.mlp.down_proj.weight[gone] = 0
    plan = plan_of(read_anatomy(dense.config))
    narrow = pruned_by(dense, plan).model
    check_target(read_anatomy(narrow.config), read_anatomy(dense.config), (), plan.hidden)
    with pytest.raises(InputError, match="hidden_size"):
        check_target(read_anatomy(narrow.config), read_anatomy(dense.config), ())
    with pytest.raises(InputError, match=r"the dense model has hidden_size 40, and the model .* was cut from 64"):
        check_target(read_anatomy(narrow.config), read_anatomy(narrow.config), (), plan.hidden)
    own, _ = quantize_model(narrow, Scheme("w8a8"), Fit(ROWS))
    fit = Fit(ROWS, CopiedLayers(dense), coordinates=plan.coordinates())
    towards, _ = quantize_model(narrow, Scheme("w8a8"), fit)
    torch.testing.assert_close(logits(towards), logits(own), atol=0.1 * float(logits(own).std()), rtol=0)


def test_blocks_of_a_narrow_model_cannot_be_priced_in_the_dense_one():
    model = build_tiny()
    narrow = pruned_by(model, plan_of(read_anatomy(model.config))).model
    with pytest.raises(InputError, match="train blocks: the hidden size is 40, and 64 in the dense model"):
        block_prices(narrow, model, ROWS[:1])


def test_a_narrow_model_is_exported_to_onnx(tmp_path):
    base = write_checkpoint(build_tiny("qwen3", tie_word_embeddings=True), tmp_path / "base")
    model, _ = checkpoint.load(base)
    plan = plan_of(read_anatomy(model.config), allocation="uniform")
    checkpoint.save(pruned_by(model, plan).model, base, tmp_path / "narrow")
    assert onnx.export(tmp_path / "narrow", tmp_path / "onnx").facts["exporter"] == "numprune"
    assert parity.check(tmp_path / "narrow", tmp_path / "onnx", "onnxruntime")["logit_error_max"] < 1e-4


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "its layer norms subtract the mean over all coordinates"),
        ("bert", "its layer norms subtract the mean over all coordinates"),
        ("gemma", "it multiplies embeddings by the square root of the hidden size"),
        ("gemma2", "it norms the outputs of its blocks over all coordinates"),
        ("olmo2", "it norms the outputs of its blocks over all coordinates"),
    ],
)
def test_families_that_cannot_be_narrower_are_refused_with_the_reason(family, reason):
    anatomy = read_anatomy(build_tiny(family).config)
    options = PruneOptions(0.1, "vib", axes=("hidden-size",))
    with pytest.raises(InputError, match=f"the hidden size of {family} cannot be cut: {reason}"):
        check_options(anatomy, options, planned=True)


def test_every_family_is_either_proved_here_or_refused():
    for family in FAMILIES:
        anatomy = read_anatomy(build_tiny(family).config)
        if family in NARROWABLE:
            check_narrowable(anatomy)
        else:
            with pytest.raises(InputError, match="cannot be cut"):
                check_narrowable(anatomy)


def test_criteria_do_not_choose_the_hidden_size():
    options = PruneOptions(0.3, axes=("channels", "hidden-size"))
    with pytest.raises(
        InputError, match="only trained masks choose the hidden size; set hidden_size, use numprune learn"
    ):
        check_options(read_anatomy(build_tiny().config), options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": {"size": 32, "kept": [0]}}, "it is for hidden size 32, the model has 64"),
        ({"hidden": {"size": 64, "kept": [*range(42)]}}, "would be 42, and the target needs 4 or a multiple"),
        ({"ratio": 0.9}, "ratio"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change, message):
    anatomy = read_anatomy(build_tiny().config)
    plan = plan_of(anatomy)
    with pytest.raises(InputError, match=message):
        check_plan(anatomy, type(plan).model_validate(plan.model_dump() | change))


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 64]])
def test_coordinates_must_be_some_of_the_model_in_order(kept):
    with pytest.raises(ValueError, match="kept"):
        HiddenPlan(size=64, kept=kept)


@pytest.mark.parametrize(
    ("target", "sizes"),
    [
        (Target(align=8), [8, 16, 24, 32, 40, 48, 56, 64]),
        (Target(align=24), [24, 48, 64]),
        (Target(align=8, quantization_group=32), [32, 64]),
    ],
)
def test_hidden_sizes_suit_the_target(target, sizes):
    assert hidden_sizes(read_anatomy(build_tiny().config), target) == sizes


def narrow(model, **options):
    options = {"compensation": "residual", "hidden_size": HIDDEN, "target": Target(align=4), **options}
    return prune(model, ROWS, PruneOptions(options.pop("ratio", 0.0), **options))


def divergence(model, dense):
    found = logits(model).log_softmax(-1)
    return float((dense.exp() * (dense - found)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("family", NARROWABLE)
def test_the_rotated_and_cut_model_is_a_stock_model(family, tmp_path):
    model = build_tiny(family)
    anatomy = read_anatomy(model.config)
    made = narrow(model)
    config = made.model.config
    assert (config.hidden_size, config.model_type, config.tie_word_embeddings) == (HIDDEN, family, False)
    assert made.plan.hidden == HiddenPlan(size=64, kept=[*range(HIDDEN)], basis="fisher")
    assert made.after == budget_of(made.plan.result(anatomy))
    assert made.after.parameters == sum(value.numel() for value in made.model.parameters())
    made.model.save_pretrained(tmp_path)
    implementation = FAMILIES[family].attention_implementation
    read = AUTO_OF["causal-lm"].from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=implementation)
    torch.testing.assert_close(logits(read.eval()), logits(made.model), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["fisher", "coordinates"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_refitting_what_reads_the_stream_loses_less(family, basis):
    model = build_tiny(family)
    dense = logits(model).log_softmax(-1)
    plain, fitted = (
        divergence(narrow(model, basis=basis, compensation=one).model, dense) for one in ("none", "residual")
    )
    assert fitted < 0.8 * plain


@pytest.mark.parametrize("basis", ["fisher", "coordinates"])
def test_refitting_the_output_matrix_brings_its_logits_closer(basis):
    model = build_tiny()
    options = PruneOptions(0.0, compensation="residual", hidden_size=HIDDEN, basis=basis)
    layers, cut = CopiedLayers(model), {}
    narrowing = narrowing_of(layers, ROWS, options)
    plan = prune_layers(layers, ROWS, options, cut.update, narrowing=narrowing)
    wanted = logits(model)
    errors = [
        float((logits(assemble(model, config_after(layers, plan), cut, one)) - wanted).square().mean())
        for one in (narrowing, replace(narrowing, head=None))
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("basis", ["fisher", "coordinates"])
def test_a_tied_output_matrix_stays_tied_unless_rotated(basis):
    made = narrow(build_tiny(tie_word_embeddings=True), basis=basis)
    own = made.model.get_output_embeddings().weight is not made.model.get_input_embeddings().weight
    assert own is (basis == "fisher") is not made.model.config.tie_word_embeddings


def test_a_plan_of_directions_finds_them_again():
    model = build_tiny()
    made = narrow(model, ratio=0.5)
    again = prune(model, ROWS, options_of(made.plan), plan=made.plan)
    assert again.plan == made.plan
    torch.testing.assert_close(logits(again.model), logits(made.model), atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["uniform", "error"])
@pytest.mark.parametrize("basis", ["fisher", "coordinates"])
def test_units_make_up_the_rest_of_the_ratio(allocation, basis):
    model = build_tiny(intermediate_size=160)
    made = narrow(model, ratio=0.5, hidden_size=48, allocation=allocation, basis=basis)
    assert made.prunable_ratio_removed == pytest.approx(0.5, abs=0.03)
    assert made.model.config.hidden_size == 48
    width_alone = narrow(model, ratio=0.2, hidden_size=48, allocation=allocation, basis=basis)
    assert width_alone.prunable_ratio_removed == pytest.approx(0.25, abs=0.01)
    assert all(len(block.kept) == block.units for block in width_alone.plan.blocks.values())


def test_a_planned_hidden_size_is_that_of_the_pruned_model():
    model = build_tiny(intermediate_size=160)
    options = PruneOptions(0.5, hidden_size=48, allocation="error", compensation="none", target=Target(align=4))
    layers = CopiedLayers(model)
    planned = plan_layers(layers, ROWS, options, narrowing=narrowing_of(layers, ROWS, options))
    made = prune(model, ROWS, options)
    assert (planned.hidden, planned.sizes()) == (made.plan.hidden, made.plan.sizes())


def test_a_layer_is_dropped_from_a_rotated_model():
    model = build_tiny(num_hidden_layers=3)
    made = narrow(model, ratio=0.5, drop_layers=1, hidden_size=56)
    assert (made.model.config.num_hidden_layers, made.model.config.hidden_size) == (2, 56)
    assert made.prunable_ratio_removed >= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_rotated_checkpoint_is_stored_the_same_streamed_or_not(tied, tmp_path):
    base = recast(write_checkpoint(build_tiny(tie_word_embeddings=tied), tmp_path / "base"), torch.bfloat16)
    options = PruneOptions(0.0, hidden_size=HIDDEN, compensation="residual")
    for name, stream in (("memory", False), ("streamed", True)):
        prune_checkpoint(base, ROWS, options, tmp_path / name, CPU, stream=stream)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "streamed"))
    assert ours.keys() == theirs.keys()
    assert ours["lm_head.weight"].shape == (259, HIDDEN)
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    for name, value in ours.items():  # signs and order of directions are the same; their rounding can differ
        torch.testing.assert_close(value, theirs[name], atol=0.02 * float(value.abs().max()), rtol=0.02)
    stored = json.loads((tmp_path / "streamed" / "config.json").read_text())
    assert stored["tie_word_embeddings"] is False


def test_gptq_of_a_rotated_model_fits_to_the_model_itself(tmp_path):
    dense = build_tiny()
    made = narrow(dense)
    with pytest.raises(InputError, match=r"was rotated \(basis fisher\), .*; leave the dense model out"):
        check_target(read_anatomy(made.model.config), read_anatomy(dense.config), (), made.plan.hidden)
    for basis, wanted in (("fisher", None), ("coordinates", tmp_path / "dense")):
        folder = tmp_path / basis
        narrow(dense, basis=basis).plan.write(folder / PLAN_FILE)
        assert target_of(folder, tmp_path / "dense") == wanted


@pytest.mark.parametrize(
    ("tied", "options", "message"),
    [
        (
            True,
            {"hidden_size": 56},
            "hidden_size is 56: in the basis fisher it needs an output matrix of its own, 14,504 parameters, which "
            "this model shares with the embedding, so the model would have 83,048 parameters instead of 78,336; choose "
            "at most 48, or the basis coordinates",
        ),
        (False, {"hidden_size": 64}, "it removes nothing, so the model would have"),
        (False, {"hidden_size": 42}, "the hidden size would be 42, and the target needs 8 or a multiple of it"),
        (False, {"hidden_size": 128}, "the hidden size would be 128, .* the nearest: 64"),
        (False, {"hidden_size": 48, "basis": "pca"}, "basis is 'pca'; it must be one of fisher, coordinates"),
    ],
)
def test_a_hidden_size_that_cannot_be_or_does_not_pay_is_refused(tied, options, message):
    anatomy = read_anatomy(build_tiny(tie_word_embeddings=tied).config)
    with pytest.raises(InputError, match=message):
        check_options(anatomy, PruneOptions(0.0, **options))


@pytest.mark.parametrize(("basis", "dropped"), [("fisher", 0), ("coordinates", 1)])
def test_a_budget_of_bytes_counts_the_narrower_embeddings_and_dropped_layers(basis, dropped):
    model = build_tiny()
    anatomy = read_anatomy(model.config)
    around = 4 * anatomy.fixed_parameters
    stored = sum(4 * parameter.numel() for parameter in model.parameters())
    budget = ByteBudget(int((0.5 if basis == "fisher" else 0.35) * stored), around, 4)
    options = PruneOptions(
        *(0.0, "obs", "error", "oneshot"), budget=budget, hidden_size=48, basis=basis, drop_layers=dropped
    )
    made = prune(model, ROWS, options)
    found = sum(4 * parameter.numel() for parameter in made.model.parameters())
    assert 0.9 * budget.limit < found <= budget.limit
    check_plan(anatomy, made.plan)
    with pytest.raises(InputError, match="its sizes and schemes take"):
        check_plan(anatomy, made.plan.model_copy(update={"budget": replace(budget, limit=int(0.97 * found))}))


def test_a_budget_of_time_needs_the_times_at_the_hidden_size():
    times = ScenarioTimes(scenario="decode,b=1,ctx=8", around=Time(ms=1, interval95=(1, 1)), blocks={})
    anatomy = read_anatomy(build_tiny(tie_word_embeddings=True).config)
    options = PruneOptions(0.0, allocation="error", time_budget=TimeBudget(1, {64: times}, "torch"), hidden_size=48)
    with pytest.raises(InputError, match=r"hidden size 48 was not measured; measured are 64; .* --hidden-size 48"):
        check_options(anatomy, options)
    # With other limits, the separate output matrix would cost more at this size than is saved; here its time counts.
    check_options(anatomy, replace(options, time_budget=TimeBudget(1, {}, "torch"), hidden_size=56))


@pytest.mark.parametrize("kept", [[1, 2], [0, 2]])
def test_of_directions_the_first_are_kept(kept):
    with pytest.raises(ValueError, match="the first directions must be kept"):
        HiddenPlan(size=64, kept=kept, basis="fisher")
