"""A task of the lm-evaluation-harness whose targets are a tiny model's own answers."""

import json
from pathlib import Path

import torch

from numprune.export.checkpoint import load

NAME = "letters"
CHOICES = ("Q", "Z")  # letters that no held-out text of the tests contains

YAML = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files: {test: items.jsonl}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["Q", "Z"]
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def write_task(folder: Path, model: Path, items: int) -> Path:
    """Write the YAML file and the items, with the answers that the model in a folder prefers."""
    folder.mkdir(exist_ok=True)
    loaded, tokenizer = load(model)
    choices = [tokenizer(choice, add_special_tokens=False).input_ids[0] for choice in CHOICES]
    rows = []
    for number in range(items):
        question = f"After {number} sheep comes the letter:"
        with torch.inference_mode():
            logits = loaded(torch.tensor([tokenizer(question).input_ids])).logits[0, -1, choices]
        rows.append({"question": question, "answer": int(logits.argmax())})
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(YAML)
    return folder / "task.yaml"


def swap_letters(model: Path, out: Path) -> Path:
    """Write the model with the two letters' rows of the output head exchanged."""
    loaded, tokenizer = load(model)
    first, second = (tokenizer(choice, add_special_tokens=False).input_ids[0] for choice in CHOICES)
    with torch.no_grad():
        head = loaded.get_output_embeddings().weight
        head[[first, second]] = head[[second, first]]
    loaded.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out
