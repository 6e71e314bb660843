"""How the pruned model was trained, in words."""

from numprune.serving.report import words
from numprune.serving.report.models import Recovery


def described(found: Recovery) -> str:
    """Return the training in one sentence: data, duration and gain."""
    kl = found.selection_kl_nats_per_token
    kept = (
        f"The weights after step {found.best_step:,} of {found.steps:,} were kept, the best on selection rows"
        if found.best_step
        else f"None of the {found.steps:,} steps improved on selection rows, so the weights before training were kept"
    )
    what = {"lora": "parameters of adapters", "blocks": f"parameters of {', '.join(found.blocks)}"}.get(
        found.train, "parameters"
    )
    return (
        f"After pruning, {found.parameters:,} {what} were trained towards the dense model ({found.method}) on "
        f"{found.tokens:,} tokens: learning rate {words.number(found.learning_rate)}, seed {found.seed}, "
        f"{words.number(found.seconds)} s. {kept}: KL from the dense model there {words.number(kl.baseline)} → "
        f"{words.number(kl.candidate)} nats per token."
    )
