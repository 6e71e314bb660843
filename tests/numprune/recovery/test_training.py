"""Distillation: what must not change, what must improve, and a killed training."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from numprune.anatomy import layers_path
from numprune.corpus import token_rows
from numprune.documents import Document
from numprune.errors import InputError, IntegrityError
from numprune.recovery import RecoveryOptions, RecoveryRows, distill, draw_rows, loss, training
from numprune.recovery.lora import Adapters
from numprune.recovery.loss import Distillation
from numprune.recovery.prices import block_prices
from numprune.recovery.state import TrainingState
from numprune.tasks import CAUSAL, Task
from numprune.tasks.classification import Classification
from numprune.tasks.embedding import Embedding
from numprune.tasks.language import bucketed, kl_divergence
from numprune.tasks.masked import masked_lm
from numprune.tasks.reading import encoder_rows
from tests.conftest import build_tiny, byte_tokenizer, encoder_tokenizer
from tests.numprune.trained import divergence

OPTIONS = RecoveryOptions(
    tokens=1280, learning_rate=1e-3, batch_size=4, micro_batch_size=4, selection_rows=6, gradient_checkpointing=False
)
CPU = torch.device("cpu")
ENCODERS: list[Task] = [masked_lm(encoder_tokenizer()), Classification({"a": 0, "b": 1}), Embedding()]


@pytest.fixture(scope="module")
def rows() -> RecoveryRows:
    text = "".join(f"{i} squared is {i * i}, halved {i / 2}.\n" for i in range(300))
    return draw_rows([token_rows([Document("a", text)], byte_tokenizer(), 32)], 32, OPTIONS)


def disturbed(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose weights differ a little, as those of a model that was compensated."""
    found = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in found.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=draw))
    return found


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_is_the_divergence_over_the_whole_vocabulary(
    rows: RecoveryRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = build_tiny()
    model = disturbed(dense)
    whole = Distillation(model, dense)(rows.selection)
    assert float(whole.detach()) == pytest.approx(divergence(dense, model, rows.selection) * 6 * 31, rel=0.1)
    expected = nn.functional.kl_div(
        *(one(input_ids=rows.selection).logits[:, :-1].log_softmax(-1) for one in (model, dense)),
        log_target=True,
        reduction="sum",
    )
    torch.testing.assert_close(whole.float(), expected, rtol=1e-4, atol=0)
    gradient = torch.autograd.grad(whole, list(model.parameters()))
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr("numprune.tasks.task.MAXIMUM_VALUES", 7 * 259)  # seven positions at a time
    for kept in (loss.KEPT_VALUES, 0):  # logits are kept for the gradient, or computed again
        monkeypatch.setattr(loss, "KEPT_VALUES", kept)
        in_parts = Distillation(model, dense)(rows.selection)
        assert float(in_parts.detach()) == pytest.approx(float(whole.detach()), rel=1e-6)
        gradient = torch.autograd.grad(in_parts, list(model.parameters()))
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3)


def test_all_other_tokens_are_compared_as_one(rows: RecoveryRows, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = build_tiny()
    model = disturbed(dense)
    whole, every = (Distillation(model, dense, top_k=top_k)(rows.selection) for top_k in (None, 259))
    assert torch.equal(every, whole)
    p, q = (one(input_ids=rows.selection).logits[:, :-1].softmax(-1).double() for one in (dense, model))
    top = p.topk(5).indices
    both = [torch.cat([one.gather(-1, top), 1 - one.gather(-1, top).sum(-1, keepdim=True)], -1) for one in (p, q)]
    expected = (both[0] * (both[0] / both[1]).log()).sum()
    monkeypatch.setattr("numprune.tasks.task.MAXIMUM_VALUES", 7 * 259)  # seven positions at a time
    found = Distillation(model, dense, top_k=5)(rows.selection)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert found < whole
    gradient = torch.autograd.grad(found, list(model.parameters()))
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3)


def test_the_gradient_of_a_logit_is_in_closed_form() -> None:
    """q - p at each of the compared tokens, and at all others q times (1 - p's share of all others / q's)."""
    draw = torch.Generator().manual_seed(0)
    theirs, ours = torch.randn(2, 4, 30, generator=draw) * 3
    top = theirs.topk(6).indices
    ours.requires_grad_()
    kl_divergence(bucketed(ours, top), bucketed(theirs, top)).sum().backward()
    p, q = theirs.softmax(-1), ours.detach().softmax(-1)
    rest = [1 - one.gather(-1, top).sum(-1, keepdim=True) for one in (p, q)]
    wanted = (q * (1 - rest[0] / rest[1])).scatter(-1, top, (q - p).gather(-1, top))
    torch.testing.assert_close(ours.grad, wanted, rtol=1e-4, atol=1e-6)


def test_a_token_that_is_certain_leaves_the_others_a_gradient() -> None:
    theirs, ours = torch.zeros(1, 8), torch.zeros(1, 8)
    ours[0, 0] = 200.0  # softmax is exactly 1 in float32
    ours.requires_grad_()
    top = torch.tensor([[0]])
    found = kl_divergence(bucketed(ours, top), bucketed(theirs, top)).sum()
    found.backward()
    assert float(found.detach()) == pytest.approx(7 / 8 * 200, rel=0.05)
    assert ours.grad is not None
    assert ours.grad[0, 1:].tolist() == pytest.approx([-1 / 8] * 7)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_hidden_states_after_each_layer_are_compared(rows: RecoveryRows, family: str) -> None:
    task = CAUSAL if family != "bert" else ENCODERS[0]
    dense = build_tiny(family, task=task.name)
    model = disturbed(dense)
    kl, both = (Distillation(model, dense, task, hidden_weight=weight)(rows.selection) for weight in (0.0, 0.5))
    states = []
    for one in (model, dense):
        path, found = layers_path(one.config), []
        hooks = [
            layer.register_forward_hook(lambda *given, found=found: found.append(given[2]))
            for layer in one.get_submodule(path)
        ]
        task.output(one, rows.selection, torch.ones_like(rows.selection))
        states.append(torch.stack([output if isinstance(output, torch.Tensor) else output[0] for output in found]))
        for hook in hooks:
            hook.remove()
    cosine = (states[0] * states[1]).sum(-1) / states[0].norm(dim=-1) / states[1].norm(dim=-1)
    predictions = len(rows.selection) * task.predictions_in(32)
    torch.testing.assert_close(both - kl, 0.5 * (1 - cosine.mean()).double() * predictions, rtol=1e-3, atol=1e-5)
    assert not [layer for layer in model.modules() if layer._forward_hooks]


def test_kept_layers_are_compared_with_themselves(rows: RecoveryRows) -> None:
    dense = build_tiny(num_hidden_layers=3)
    model = build_tiny(num_hidden_layers=2)
    model.model.layers = nn.ModuleList([copy.deepcopy(dense.model.layers[index]) for index in (0, 2)])
    model.model.layers[1].self_attn.layer_idx = 1
    seen = []
    for one, layers in ((model, (0, 1)), (dense, (0, 2))):
        with torch.no_grad(), loss.recorded([one.model.layers[layer] for layer in layers]) as states:
            one(input_ids=rows.selection)
        seen.append(states)
    both = Distillation(model, dense, hidden_weight=1.0, dropped=[1])(rows.selection)
    kl = Distillation(model, dense)(rows.selection)
    torch.testing.assert_close((both - kl).detach(), loss.hidden_distance(*seen) * 6 * 31, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_training_with_both_terms_brings_a_model_nearer(rows: RecoveryRows, gradient_checkpointing: bool) -> None:
    dense = build_tiny()
    model = disturbed(dense)
    options = replace(OPTIONS, top_k=20, hidden_weight=1.0, gradient_checkpointing=gradient_checkpointing)
    before = loss_of(model, dense, rows.selection)
    found = distill(model, dense, rows, options, CPU)
    assert found.kl_after < 0.8 * found.kl_before  # which are over the whole vocabulary, without the other term
    assert found.kl_before == pytest.approx(before)
    assert found.kl_after == pytest.approx(loss_of(model, dense, rows.selection))


def loss_of(model: PreTrainedModel, dense: PreTrainedModel, tokens: torch.Tensor) -> float:
    return float(Distillation(model, dense)(tokens).detach()) / (len(tokens) * 31)


@pytest.mark.parametrize(
    ("options", "model", "said"),
    [
        ({"top_k": 0}, {}, "top_k is 0; it must be at least 1, or None for the whole vocabulary"),
        ({"hidden_weight": -1.0}, {}, "hidden_weight is -1; it must be at least 0, and finite"),
        ({"hidden_weight": float("nan")}, {}, "hidden_weight is nan; it must be at least 0, and finite"),
        ({"top_k": 5}, {"family": "bert", "task": "masked-lm"}, "top_k: only for causal language models, and the mod"),
        ({"hidden_weight": 1.0}, {"hidden_size": 32}, "the hidden size is 32, and 64 in the dense model; leave it out"),
        ({"hidden_weight": 1.0}, {"num_hidden_layers": 1}, "because the number of layers is 1, and 2 in the dense"),
    ],
)
def test_terms_that_the_models_do_not_have_are_refused(
    rows: RecoveryRows, options: dict[str, Any], model: dict[str, Any], said: str
) -> None:
    family = {name: model[name] for name in ("family", "task") if name in model}
    with pytest.raises(InputError, match=said):
        distill(build_tiny(**model), build_tiny(**family), rows, replace(OPTIONS, **options), CPU)


def test_the_dense_model_itself_has_no_loss_and_no_gradient(rows: RecoveryRows) -> None:
    dense = build_tiny()
    model = copy.deepcopy(dense)
    mean = Distillation(model, dense, hidden_weight=1.0)(rows.selection) / rows.selection.numel()
    mean.backward()
    assert float(mean.detach()) == pytest.approx(0, abs=1e-7)
    assert max(float(weight.grad.abs().max()) for weight in model.parameters()) < 1e-6
    assert all(weight.grad is None for weight in dense.parameters())


def test_a_learning_rate_of_zero_changes_nothing(rows: RecoveryRows) -> None:
    dense = build_tiny()
    model = disturbed(dense)
    before = weights(model)
    found = distill(model, dense, rows, replace(OPTIONS, learning_rate=0.0), CPU)
    assert equal(weights(model), before)
    assert (found.best_step, found.kl_after) == (0, found.kl_before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_training_brings_a_model_nearer_to_the_dense_one(rows: RecoveryRows, family: str) -> None:
    dense = build_tiny(family)
    model, reference = disturbed(dense), weights(dense)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    before = divergence(dense, model, rows.selection)
    found = distill(model, dense, rows, replace(OPTIONS, gradient_checkpointing=True), CPU)
    assert found.best_step > 0
    assert found.kl_after < 0.8 * found.kl_before
    assert divergence(dense, model, rows.selection) < before
    assert {name: weight.shape for name, weight in model.state_dict().items()} == shapes
    assert equal(weights(dense), reference)
    assert (found.steps, found.tokens) == (10, 1280)
    assert found.parameters == sum(weight.numel() for weight in model.parameters())
    tied = model.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_merged_into_the_projections_alone(rows: RecoveryRows, family: str) -> None:
    dense = build_tiny(family)
    model = disturbed(dense)
    before, modules = weights(model), [name for name, _ in model.named_modules()]
    found = distill(model, dense, rows, replace(OPTIONS, train="lora", rank=4, learning_rate=3e-3), CPU)
    assert found.best_step > 0
    assert found.kl_after < 0.9 * found.kl_before
    assert divergence(dense, model, rows.selection) == pytest.approx(found.kl_after, rel=0.1)
    assert [name for name, _ in model.named_modules()] == modules
    changed = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if ("layers." in name or "h." in name) and before[name].dim() == 2}
    for name in changed:
        update = weights(model)[name] - before[name]
        assert int(torch.linalg.matrix_rank(update, rtol=1e-3)) <= 4
    assert found.parameters < 0.5 * sum(weight.numel() for weight in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("train", ["all", "lora", "blocks"])
@pytest.mark.parametrize("task", ENCODERS, ids=[task.name for task in ENCODERS])
def test_encoders_follow_the_dense_ones_predictions(task: Task, train: Literal["all", "lora", "blocks"]) -> None:
    text = "".join(f"{i} squared is {i * i}, halved {i / 2}.\n" for i in range(300))
    options = replace(OPTIONS, train=train, rank=4, blocks=2, learning_rate=3e-3)
    read = encoder_rows([Document("a", text)], encoder_tokenizer(), 32, True)
    rows = draw_rows([read], 32, options, task=task)
    dense = build_tiny("bert", task=task.name)
    model = disturbed(dense)
    tokens = rows.selection

    def distance() -> float:
        with torch.no_grad():
            ours, theirs = (task.output(one, tokens, torch.ones_like(tokens)) for one in (model, dense))
        return float(task.divergence(ours, theirs, tokens).mean())

    before = distance()
    found = distill(model, dense, rows, options, CPU, task=task)
    assert found.unit == task.unit
    assert found.kl_before == pytest.approx(before, rel=1e-4)
    assert found.kl_after == pytest.approx(distance(), rel=1e-4)
    assert found.kl_after < 0.9 * before
    assert len(found.blocks) == (2 if train == "blocks" else 0)


def test_rows_of_a_masked_language_model_are_masked_after_they_are_drawn() -> None:
    task = masked_lm(encoder_tokenizer())
    text = "".join(f"{i} squared is {i * i}, halved {i / 2}.\n" for i in range(300))
    read = encoder_rows([Document("a", text)], encoder_tokenizer(), 64, True)
    found = draw_rows([read], 64, OPTIONS, task=task)
    for part in (found.training, found.selection):
        assert {int((row == task.mask_token).sum()) for row in part} == {task.predictions_in(64)}
    with pytest.raises(InputError, match="that the held-out text does not have"):
        draw_rows([read], 64, OPTIONS, [read], task)


def test_only_the_blocks_that_cost_most_are_trained(rows: RecoveryRows) -> None:
    dense = build_tiny()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for name, scale in (("0.mlp", 0.2), ("1.self_attn", 0.3), ("1.mlp", 0.9)):
            for weight in model.model.layers.get_submodule(name).parameters():
                weight.mul_(scale)
    prices = block_prices(model, dense, rows.training[:4])
    assert set(prices) == {f"layers.{layer}.{kind}" for layer in (0, 1) for kind in ("attention", "mlp")}
    assert prices["layers.0.attention"] == 0
    assert min(prices["layers.0.mlp"], prices["layers.1.attention"]) > prices["layers.1.mlp"] > 0
    assert list(prices.values()) == sorted(prices.values(), reverse=True)
    alone = copy.deepcopy(dense)
    alone.model.layers[0].mlp = copy.deepcopy(model.model.layers[0].mlp)
    assert prices["layers.0.mlp"] == pytest.approx(divergence(dense, alone, rows.training[:4]), rel=0.1)

    before = weights(model)
    found = distill(model, dense, rows, replace(OPTIONS, train="blocks", blocks=2), CPU)
    assert set(found.blocks) == {"layers.0.mlp", "layers.1.attention"}
    assert found.kl_after < 0.9 * found.kl_before
    changed = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert {".".join(name.split(".")[2:4]) for name in changed} == {"0.mlp", "1.self_attn"} | {
        f"{layer}.{norm}_layernorm" for layer, norm in ((0, "post_attention"), (1, "input"))
    }


def test_prices_of_a_model_with_fewer_layers(rows: RecoveryRows) -> None:
    dense = build_tiny(num_hidden_layers=3)
    model = build_tiny()
    model.load_state_dict(
        {
            name.replace("layers.2.", "layers.1."): value
            for name, value in dense.state_dict().items()
            if "layers.1." not in name
        }
    )
    assert set(block_prices(model, dense, rows.training[:2], dropped=[1]).values()) == {0.0}
    with pytest.raises(InputError, match=r"layers\.2\.attention: the dense model has no such block"):
        block_prices(dense, model, rows.training[:2])


def test_merging_that_changes_the_model_is_an_error(rows: RecoveryRows, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = build_tiny()
    adapters = Adapters(disturbed(dense), 4, 0)
    weights = adapters.merged()
    adapters.check(rows.selection)
    wrong = {name: 1.001 * weight for name, weight in weights.items()}
    monkeypatch.setattr(Adapters, "merged", lambda self: wrong)
    with pytest.raises(IntegrityError, match=r"merging the adapters changes logits by .* more than [12]\.\de-05"):
        adapters.check(rows.selection)


def test_only_adapters_of_a_best_step_are_checked(rows: RecoveryRows, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, checked = build_tiny(), []
    monkeypatch.setattr(Adapters, "check", lambda self, rows: checked.append(len(rows)))
    options = replace(OPTIONS, train="lora", rank=4)
    found = distill(disturbed(dense), dense, rows, replace(options, learning_rate=30.0), CPU)
    assert (found.best_step, checked) == (0, [])
    assert distill(disturbed(dense), dense, rows, options, CPU).best_step > 0
    assert checked


def test_the_result_is_never_worse_on_selection_rows(rows: RecoveryRows) -> None:
    """A learning rate that harms: the best step is the one before training."""
    dense = build_tiny()
    model = disturbed(dense)
    before = weights(model)
    found = distill(model, dense, rows, replace(OPTIONS, learning_rate=0.5), CPU)
    assert (found.best_step, found.kl_after) == (0, found.kl_before)
    assert equal(weights(model), before)


def test_memory_options_do_not_change_the_result(rows: RecoveryRows) -> None:
    dense, found = build_tiny(), []
    for changed in ({}, {"gradient_checkpointing": True}, {"micro_batch_size": 2}):
        model = disturbed(dense)
        distill(model, dense, rows, replace(OPTIONS, tokens=256, **changed), CPU)
        found.append(weights(model))
        assert "forward" not in vars(model.model.layers[0])
    assert equal(found[0], found[1])
    for name, weight in found[0].items():
        torch.testing.assert_close(found[2][name], weight, rtol=0, atol=1e-4)


def test_the_micro_batch_size_does_not_decide_which_blocks_are_trained(rows: RecoveryRows) -> None:
    dense = build_tiny(num_hidden_layers=4)
    found = [
        distill(
            disturbed(dense),
            dense,
            rows,
            replace(OPTIONS, tokens=128, train="blocks", blocks=2, micro_batch_size=size),
            CPU,
        ).blocks
        for size in (1, 3, 8)
    ]
    for other in found[1:]:
        assert [*other] == [*found[0]]
        assert other == pytest.approx(found[0], rel=1e-4)


def test_each_step_is_judged_as_it_will_be_stored(rows: RecoveryRows) -> None:
    dense = build_tiny()
    model = disturbed(dense)
    names = [name for name, _ in model.named_parameters()]
    found = distill(model, dense, rows, OPTIONS, CPU, stored=dict.fromkeys(names, torch.bfloat16))
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in model.parameters())
    with torch.no_grad():
        kl = float(Distillation(model, dense)(rows.selection)) / (6 * 31)
    assert kl == pytest.approx(found.kl_after, rel=1e-9)


class Killed(BaseException):
    """Ends a training where it stands."""


@pytest.mark.slow
@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_killed_training_ends_like_an_undisturbed_one(
    rows: RecoveryRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Literal["all", "lora"]
) -> None:
    dense, options = build_tiny(), replace(OPTIONS, train=train)
    undisturbed = disturbed(dense)
    wanted = distill(undisturbed, dense, rows, options, CPU, state=TrainingState(tmp_path / "a", "x"))
    state = TrainingState(tmp_path / "b", "x")
    step = training._Training._step

    def dying(self: Any, number: int, batch: list[int]) -> float:
        if number == 6:
            raise Killed
        return step(self, number, batch)

    with monkeypatch.context() as patch:
        patch.setattr(training._Training, "_step", dying)
        with pytest.raises(Killed):
            distill(disturbed(dense), dense, rows, options, CPU, state=state)
    assert [path.name for path in sorted((tmp_path / "b").iterdir())] == ["state.json", "step-6.safetensors"]
    model, taken = disturbed(dense), []

    def counted(self: Any, number: int, batch: list[int]) -> float:
        taken.append(number)
        return step(self, number, batch)

    monkeypatch.setattr(training._Training, "_step", counted)
    found = distill(model, dense, rows, options, CPU, state=state)
    assert taken == [6, 7, 8, 9]
    assert equal(weights(model), weights(undisturbed))
    assert replace(found, seconds=0) == replace(wanted, seconds=0)


def test_a_damaged_or_foreign_state_is_not_used(tmp_path: Path) -> None:
    position = training.Position(step=3, curve=[(0, 1.0)])
    TrainingState(tmp_path, "x").save(position, {"weights/a": torch.ones(4)})
    saved = TrainingState(tmp_path, "x").load()
    assert saved is not None
    assert saved[0] == position
    assert TrainingState(tmp_path, "y").load() is None
    file = tmp_path / "step-3.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert TrainingState(tmp_path, "x").load() is None
    (tmp_path / "state.json").write_text("{")
    assert TrainingState(tmp_path, "x").load() is None


def test_a_loss_that_is_not_finite_ends_the_training(rows: RecoveryRows) -> None:
    dense = build_tiny()
    with pytest.raises(IntegrityError, match=r"training diverged at step \d+ of 10.*learning rate below 1e\+30"):
        distill(disturbed(dense), dense, rows, replace(OPTIONS, learning_rate=1e30), CPU)
