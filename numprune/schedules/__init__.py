"""Pruning inside your own training: a callback for transformers' `Trainer`.

    import numprune
    from numprune.schedules import GradualPruning
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained("my-model")
    tokenizer = AutoTokenizer.from_pretrained("my-model")
    args = TrainingArguments("run", max_steps=2000)
    pruning = GradualPruning(0.3, criterion="movement")
    trainer = Trainer(model, args, train_dataset=dataset, processing_class=tokenizer, callbacks=[pruning])
    trainer.train()
    trainer.save_model("trained")

    trained = numprune.load("trained")
    pruned = numprune.apply(pruning.plan, trained, numprune.calibration_rows("train.jsonl", trained))
    numprune.save(pruned, "pruned")

`dataset` is your own. The calibration text has no effect, because the plan has no refit.
"""

from numprune.schedules.gradual import GradualPruning

__all__ = ["GradualPruning"]
