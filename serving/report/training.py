"""How the model was trained, in words."""

from numprune.serving.report import words
from numprune.serving.report.models import Learning, Recovery, SizePair


def of_masks(found: Learning) -> str:
    """What masks were trained on, for how long, and what they left."""
    weights = (
        ""
        if found.learning_rate is None
        else f" The weights were trained with them, at learning rate {words.number(found.learning_rate)}."
    )
    return (
        f"Masks chose the units ({found.method}, {found.variant}): trained on {found.tokens:,} tokens, seed "
        f"{found.seed}, {words.number(found.seconds)} s.{weights} The masks after step {found.best_step:,} of "
        f"{found.steps:,} were kept: on selection rows, before any refit, the result diverges from the dense model by "
        f"{words.number(found.selection_divergence)} {found.unit}."
    )


def described(found: Recovery) -> str:
    """Return the training in one sentence: data, duration and gain."""
    of_tokens, of_others = found.selection_kl_nats_per_token, found.selection_divergence
    told = f"KL from the dense model there {_change(of_tokens)} nats per token" if of_tokens else ""
    if of_others:
        told = f"divergence from the dense model there {_change(of_others)}"
    kept = (
        f"The weights after step {found.best_step:,} of {found.steps:,} were kept, the best on selection rows"
        if found.best_step
        else f"None of the {found.steps:,} steps improved on selection rows, so the weights before training were kept"
    )
    what = {"lora": "parameters of adapters", "blocks": f"parameters of {', '.join(found.blocks)}"}.get(
        found.train, "parameters"
    )
    generated = ""
    if found.generated:
        generated = f" (in part its own {found.generated.answers:,} answers of {found.generated.tokens:,} tokens)"
    return (
        f"After pruning, {found.parameters:,} {what} were trained towards the dense model ({found.method}) on "
        f"{found.tokens:,} tokens{generated}: learning rate {words.number(found.learning_rate)}, seed {found.seed}, "
        f"{words.number(found.seconds)} s. {kept}: {told}."
    )


def _change(pair: SizePair) -> str:
    return f"{words.number(pair.baseline)} → {words.number(pair.candidate)}"
