"""The callback in a real Trainer: results, resuming and refusals."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import numprune
from numprune.anatomy import PER_LAYER_PREFIX, read_anatomy
from numprune.budget import budget_of
from numprune.calibration import consumer_weight
from numprune.errors import InputError
from numprune.options import options_of
from numprune.pruning import prune
from numprune.schedules import GradualPruning
from numprune.target import Target
from numprune.tasks import CAUSAL
from tests.conftest import build_tiny, byte_tokenizer
from tests.test_families import TASKS

STEPS = 24
ROWS = torch.randint(0, 256, (32, 12), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in ROWS]
ALIGNED = Target(align=1)


def trainer(folder: Path, pruning: GradualPruning, model=None, **arguments: Any) -> Trainer:
    given = {"max_steps": STEPS, "per_device_train_batch_size": 4, "save_strategy": "no", "learning_rate": 1e-3}
    given |= {"use_cpu": True, "disable_tqdm": True, "report_to": [], "logging_strategy": "no", **arguments}
    evaluated = DATA[:8] if given.get("eval_strategy", "no") != "no" else None
    arguments = TrainingArguments(str(folder), **given)
    model = build_tiny(num_key_value_heads=4) if model is None else model
    tokenizer = byte_tokenizer()
    return Trainer(
        model, arguments, train_dataset=DATA, eval_dataset=evaluated, processing_class=tokenizer, callbacks=[pruning]
    )


@torch.no_grad()
def logits(model, task="causal-lm"):
    return TASKS[task].output(model.eval(), ROWS[:4], torch.ones_like(ROWS[:4]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task", "criterion", "allocation"),
    [
        ("llama", "causal-lm", "movement", "uniform"),
        ("llama", "causal-lm", "magnitude", "global"),
        ("gpt2", "causal-lm", "movement", "global"),
        ("bert", "masked-lm", "magnitude", "uniform"),
        ("llama", "causal-lm", "vib", "uniform"),
        ("gpt2", "causal-lm", "vib", "global"),
    ],
)
def test_the_plan_cuts_what_was_trained(tmp_path, family, task, criterion, allocation):
    model = build_tiny(family, task=task, num_key_value_heads=4)
    pruning = GradualPruning(0.4, criterion, allocation=allocation, every=2, target=ALIGNED)
    trainer(tmp_path, pruning, model).train()
    cut = prune(model, ROWS, options_of(pruning.plan), task=TASKS[task], plan=pruning.plan)
    assert cut.prunable_ratio_removed == pytest.approx(0.4, abs=0.03)
    torch.testing.assert_close(logits(cut.model, task), logits(model, task), rtol=1e-4, atol=1e-4)
    assert (pruning.plan.criterion, pruning.plan.compensation) == (criterion, "none")


@pytest.mark.parametrize("criterion", ["movement", "vib"])
def test_experts_are_removed(tmp_path, criterion):
    model = build_tiny("mixtral")
    pruning = GradualPruning(0.3, criterion, every=2, keep=["attention"])
    trainer(tmp_path, pruning, model).train()
    cut = prune(model, ROWS, options_of(pruning.plan), plan=pruning.plan)
    assert cut.prunable_ratio_removed >= 0.3
    assert {len(block.kept) for name, block in pruning.plan.blocks.items() if name.endswith("experts")} == {2}  # of 5
    assert logits(cut.model).isfinite().all()


def test_a_saved_model_is_cut_into_a_stock_checkpoint(tmp_path):
    pruning = GradualPruning(0.3, every=2, target=ALIGNED)
    run = trainer(tmp_path / "run", pruning)
    run.train()
    run.save_model(str(tmp_path / "trained"))
    trained = numprune.load(tmp_path / "trained")
    pruned = numprune.apply(pruning.plan, trained, numprune.CalibrationRows(ROWS))
    numprune.save(pruned, tmp_path / "pruned")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    assert not read.config.model_type.startswith(PER_LAYER_PREFIX)
    assert read.num_parameters() < run.model.num_parameters()
    torch.testing.assert_close(logits(read), logits(run.model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("criterion", ["magnitude", "vib"])
def test_units_of_little_effect_go_first(tmp_path, criterion):
    model = build_tiny(num_key_value_heads=4)
    anatomy = read_anatomy(model.config)
    layers = model.get_submodule(anatomy.layers_path)
    with torch.no_grad():
        for block in anatomy.blocks:
            consumer_weight(layers[block.layer], block)[:, : block.channels // 2] *= 1e-3
    pruning = GradualPruning(0.5, criterion, every=2)
    trainer(tmp_path, pruning, model, learning_rate=1e-5).train()
    for name, block in pruning.plan.blocks.items():
        assert block.kept == [*range(block.units // 2, block.units)], name


def test_units_go_little_by_little(tmp_path):
    pruning = GradualPruning(0.5, begin=0.25, end=0.75, every=2, target=ALIGNED)
    removed = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            assert pruning._run is not None
            removed.append(pruning._run.removed())

    run = trainer(tmp_path, pruning)
    run.add_callback(Watch())
    run.train()
    assert removed[:5] == [0] * 5
    assert removed == sorted(removed)
    assert len(set(removed)) == 7  # none, and after seven removals, of which the last finds the sizes reached
    assert removed[17] == removed[-1] == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["movement", "vib"])
def test_an_interrupted_training_ends_like_an_undisturbed_one(tmp_path, criterion):
    how = {"save_strategy": "steps", "save_steps": 7, "logging_strategy": "steps", "logging_steps": 5}

    def pruning():
        return GradualPruning(0.4, criterion, every=3, tolerance=0.05, target=ALIGNED)

    ended = []
    for checkpoint in (None, str(tmp_path / "checkpoint-14")):
        callback = pruning()
        run = trainer(tmp_path, callback, **how)
        run.train(resume_from_checkpoint=checkpoint)
        ended.append((callback.plan, run.model.state_dict(), run.state.log_history[-2]["loss"]))
    (plan, weights, loss), (other_plan, other_weights, other_loss) = ended
    assert other_plan == plan
    assert other_loss == loss
    assert all(torch.equal(other_weights[name], value) for name, value in weights.items())


@pytest.mark.slow
def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    how = {"save_strategy": "steps", "save_steps": 14}

    def pruning(**other):
        return GradualPruning(**{"ratio": 0.4, "every": 3, "tolerance": 0.05, "target": ALIGNED, **other})

    trainer(tmp_path, pruning(), max_steps=STEPS, **how).train()
    for other, said in (
        ({"ratio": 0.5}, r"was trained with ratio 0\.4, and this training has ratio 0\.5; use the same settings"),
        ({"criterion": "vib"}, "criterion movement, and this training has criterion vib"),
        ({"tolerance": 0.1}, r"tolerance 0\.05, and this training has tolerance 0\.1"),
    ):
        callback = pruning(**other)
        with pytest.raises(InputError, match=said):
            trainer(tmp_path, callback, **how).train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))
    with pytest.raises(InputError, match="training seed 42, and this training has training seed 1"):
        trainer(tmp_path, pruning(), seed=1, **how).train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))
    state = tmp_path / "checkpoint-14" / "trainer_state.json"
    state.write_text(state.read_text().replace('"tensors"', '"units"'))  # where they were before there was "vib"
    with pytest.raises(InputError, match="was written by an earlier version of numprune; start again"):
        trainer(tmp_path, pruning(), **how).train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))


@pytest.mark.slow
def test_a_checkpoint_without_the_callback_is_refused(tmp_path):
    run = trainer(tmp_path, GradualPruning(0.4, every=2), save_strategy="steps", save_steps=8)
    run.pop_callback(GradualPruning)
    run.train()
    with pytest.raises(InputError, match="the checkpoint to resume from, of step 8, was trained without"):
        trainer(tmp_path, GradualPruning(0.4, every=2)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_loss_that_rises_holds_removals_up(tmp_path, caplog):
    pruning = GradualPruning(0.5, every=2, tolerance=1e-6, metric="eval_loss", target=ALIGNED)
    run = trainer(tmp_path, pruning, eval_strategy="steps", eval_steps=100)
    with caplog.at_level(logging.WARNING, "numprune"):
        run.train()
    evaluated = [entry["step"] for entry in run.state.log_history if "eval_loss" in entry]
    assert evaluated == [*range(2, STEPS + 1, 2)]  # before each removal, also those that are made up for
    (said,) = [record.getMessage() for record in caplog.records if "training ended after" in record.getMessage()]
    anatomy, left = read_anatomy(run.model.config), pruning.plan.sizes()
    before, after = (budget_of(one).prunable_parameters for one in (anatomy, anatomy.keeping(left)))
    assert pruning.plan.ratio == pytest.approx(1 - after / before)
    assert pruning.plan.ratio < 0.5
    assert f"{100 * pruning.plan.ratio:.1f} % of the prunable parameters are removed instead of 50.0 %" in said
    prune(run.model, ROWS, options_of(pruning.plan), task=CAUSAL, plan=pruning.plan)


def test_a_metric_that_evaluation_does_not_give_is_refused(tmp_path):
    pruning = GradualPruning(0.5, every=2, tolerance=0.1, metric="eval_accuracy")
    with pytest.raises(InputError, match="metric is 'eval_accuracy', and the evaluation did not give it"):
        trainer(tmp_path, pruning, eval_strategy="steps", eval_steps=100).train()


@pytest.mark.slow
@pytest.mark.parametrize(("criterion", "tolerance"), [("movement", None), ("magnitude", None), ("vib", None)])
def test_a_training_that_diverges_ends(tmp_path, criterion, tolerance):
    pruning = GradualPruning(0.4, criterion, every=2, tolerance=tolerance)
    with pytest.raises(InputError, match=r"training diverged by step \d+: .*; lower the learning rate"):
        trainer(tmp_path, pruning, learning_rate=float("1e38"), max_grad_norm=0.0).train()


@pytest.mark.slow
def test_another_training_with_the_same_callback_begins_anew(tmp_path):
    pruning = GradualPruning(0.4, every=2)
    with pytest.raises(InputError, match="there is no plan yet"):
        _ = pruning.plan
    trainer(tmp_path, pruning).train()
    first = pruning.plan
    trainer(tmp_path, pruning).train()
    assert pruning.plan == first


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ratio": 1.0}, r"ratio is 1\.0; it must be over 0 and under 1"),
        ({"criterion": "obs"}, "criterion is 'obs'; it must be one of movement, magnitude, vib"),
        ({"allocation": "error"}, "allocation is 'error'; it must be one of uniform, global"),
        ({"begin": 0.5, "end": 0.5}, r"begin is 0\.5 and end is 0\.5"),
        ({"every": 0}, "every is 0"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"metric": "accuracy"}, "metric is 'accuracy'"),
        ({"metric": "eval_loss"}, "metric is 'eval_loss', which nothing depends on without a tolerance"),
        ({"axes": ["query-heads", "channels"]}, "only whole units can be removed; leave out query-heads"),
    ],
)
def test_values_that_make_no_sense_are_refused(given, said):
    with pytest.raises(InputError, match=said):
        GradualPruning(**{"ratio": 0.3, **given})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "arguments", "said"),
    [
        ({"ratio": 0.99}, {}, r"ratio is 0\.99, but with the minimum that every block must keep"),
        ({"every": 100}, {}, "every is 100, and from begin=0.1 to end=0.7 a training of 24 steps has"),
        ({"keep": ["attention", "mlp"], "ratio": 1e-9}, {}, "nothing may be pruned|ratio is"),
        ({"axes": ["heads"]}, {}, "axes: 'heads' is unknown"),
        (
            {"every": 2},
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "load_best_model_at_end",
        ),
        ({"every": 2, "tolerance": 0.1, "metric": "eval_loss"}, {}, "eval_strategy is no"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path, given, arguments, said):
    model = build_tiny(num_key_value_heads=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=said):
        trainer(tmp_path, GradualPruning(**{"ratio": 0.3, **given}), model, **arguments).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_way_to_restore_the_callback_is_refused(tmp_path):
    with pytest.raises(InputError, match="restore_callback_states_from_checkpoint would replace GradualPruning"):
        trainer(tmp_path, GradualPruning(0.3), restore_callback_states_from_checkpoint=True)


def test_a_model_with_adapters_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build_tiny(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="the model is a PeftModelForCausalLM; GradualPruning needs"):
        trainer(tmp_path, GradualPruning(0.3, every=2), model).train()


def test_experts_copied_without_masks_are_refused(tmp_path):
    run = trainer(tmp_path, GradualPruning(0.3, every=2, keep=["attention"]), build_tiny("mixtral"))
    assert run.args.n_gpu == 0
    run.args._n_gpu = 2  # where the Trainer uses nn.DataParallel
    with pytest.raises(InputError, match="one process would train on 2 GPUs, which copies experts without their masks"):
        run.train()
