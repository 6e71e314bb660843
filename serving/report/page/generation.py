"""Part of the quality section: outputs of both models from the same prompts."""

from collections.abc import Iterator

from numprune.counted import counted
from numprune.serving.report import words
from numprune.serving.report.models import Generation, Output
from numprune.serving.report.page.blocks import Block, Cell, Folded, Heading, Table, Text

_CHARACTERS = 1000  # of each text; report.json has all of it


def blocks(found: Generation) -> Iterator[Block]:
    through = "through the chat template" if found.chat_template else "as plain text"
    yield Heading("Generation")
    yield Text(
        f"Greedy, from {counted(found.prompts, 'prompt')} {through}, up to {found.maximum_tokens} tokens each. "
        "Repeating: the output ends in a loop. Degraded: the candidate's output is empty or repeating, and the "
        "baseline's is neither."
    )
    counts: list[list[Cell | str]] = [
        [name.capitalize(), *(str(getattr(side, name)) for side in (found.baseline, found.candidate))]
        for name in ("empty", "repeating")
    ]
    counts.append(["Degraded", "", Cell(str(found.degraded), tone="fail" if found.degraded else "")])
    yield Table("Outputs", ("", "Baseline", "Candidate"), counts)
    rows: list[list[Cell | str]] = [
        [_shown(pair.prompt), _output(pair.baseline), _output(pair.candidate)] for pair in found.outputs
    ]
    yield Folded("Outputs side by side", [Table("Outputs by prompt", ("Prompt", "Baseline", "Candidate"), rows, False)])


def _output(output: Output) -> Cell:
    failures = [name for name in ("empty", "repeating") if getattr(output, name)]
    note = ", ".join([counted(output.tokens, "token"), *failures])
    return Cell(_shown(output.text), note, "fail" if failures else "")


def _shown(text: str) -> str:
    text = text.strip()
    return f"{text[:_CHARACTERS]}…" if len(text) > _CHARACTERS else text or words.ABSENT
