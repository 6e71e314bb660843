"""Train the embedded default: a small Llama with grouped-query attention, on the interpreter's own text.

    python -m numprune.flows.embedded.train OUT [--steps 2400]

Writes a Hugging Face folder (bfloat16 safetensors, tokenizer, configuration), `training.json` with the settings and
results, and a model card. Uses a GPU if there is one. On two otherwise idle CPU cores the default takes about an hour.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from numprune.flows.embedded.corpus import documents

VOCABULARY = 4096
BOS, EOS = "<s>", "</s>"
CONTEXT = 1024


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `VOCABULARY` entries trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> LlamaForCausalLM:
    """Return the untrained model: 5.5 M parameters, 6 layers, 8 query and 4 key/value heads of 32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def batches(stream: Tensor, rows: int, length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield token batches (rows, length) that visit the whole `stream` once per epoch, each epoch at another offset."""
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        count = (len(stream) - offset) // length
        windows = stream[offset : offset + count * length].view(count, length)
        order = torch.randperm(count, generator=generator)
        for first in range(0, count - rows + 1, rows):
            yield windows[order[first : first + rows]]


def training_step(model: LlamaForCausalLM, optimizers: list[Optimizer], tokens: Tensor) -> float:
    """Update the model once on `tokens` (rows, length); their mean NLL in nats per token before that."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def trapezoid(step: int, steps: int) -> float:
    """Warm-up over 2 % of the steps, flat to one half, then linear to zero (the trapezoid of short pre-training)."""
    return min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (0.5 * steps))


@torch.no_grad()
def mean_nll(model: LlamaForCausalLM, streams: list[Tensor], length: int = 512) -> float:
    """Return the mean NLL in nats per token of `streams` (one per document), in windows of `length`."""
    total, count = 0.0, 0
    for stream in streams:
        for window in stream.split(length):
            if len(window) > 1:
                logits = model(input_ids=window[None]).logits[0, :-1].float()
                total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
                count += len(window) - 1
    return total / count


def train(out: Path, *, steps: int, adam_steps: int, rows: int, length: int, seed: int) -> None:
    """Train for `steps` steps of `rows` x `length` tokens with Muon, then for `adam_steps` with AdamW.

    The last 15 % of the first and all of the second run at the full context.
    """
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = [text for _, text in documents("train", tests=True)]
    tokenizer = train_tokenizer(texts)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id
    stream = torch.tensor([token for ids in encoded for token in [*ids, eos]], device=device)
    heldout_texts = [text for _, text in documents("heldout")]
    heldout = [
        torch.tensor(ids, device=device) for ids in tokenizer(heldout_texts, add_special_tokens=False)["input_ids"]
    ]
    print(
        f"{len(texts)} documents, {len(stream):,} training tokens; {sum(map(len, heldout)):,} held out", file=sys.stderr
    )

    model = build_model().to(device)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in n]
    start = time.perf_counter()
    history: list[dict[str, float]] = []

    def run(steps: int, optimizers: list[Optimizer], tokens: Iterator[Tensor], factor: Callable[[int], float]) -> None:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        peaks = [group["lr"] for group in groups]
        for step in range(steps):
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * factor(step)
            nll = training_step(model, optimizers, next(tokens))
            if (step + 1) % 100 == 0 or step + 1 == steps:
                heldout_nll = mean_nll(model.eval(), heldout[:20])
                model.train()
                history.append({"step": step + 1, "train_nll": nll, "heldout_sample_nll": heldout_nll})
                seconds = time.perf_counter() - start
                print(
                    f"step {step + 1}/{steps} train {nll:.3f} held-out {heldout_nll:.3f} {seconds:.0f} s",
                    file=sys.stderr,
                )

    generator = torch.Generator().manual_seed(seed)
    short = batches(stream, rows, length, generator)
    full = batches(stream, max(1, rows * length // CONTEXT), CONTEXT, generator)
    muon = torch.optim.Muon(matrices, lr=0.004, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.98), weight_decay=0.0)
    lengthening = chain(islice(short, math.ceil(0.85 * steps)), full)
    run(steps, [muon, adam], lengthening, lambda step: trapezoid(step, steps))

    # Muon learns most from little text, but its updates leave all channels of a matrix with similar norms. Models
    # pruned in practice are trained with Adam, whose channels differ, and the ranking of criteria depends on that.
    model.to(torch.bfloat16).float()
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.005, betas=(0.9, 0.95))
    full = batches(stream, max(1, rows * length // CONTEXT), CONTEXT, torch.Generator().manual_seed(seed + 1))
    run(adam_steps, [adam], full, lambda step: min(1.0, (step + 1) / 20, (adam_steps - step) / (0.8 * adam_steps)))
    model.eval().to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name before transformers 5
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).to(device)
    nll = mean_nll(model, heldout)
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device),
        "documents": len(texts),
        "training_tokens": len(stream),
        "tokens_seen": (steps + adam_steps) * rows * length,
        "steps": steps,
        "adam_steps": adam_steps,
        "seed": seed,
        "seconds": round(time.perf_counter() - start),
        "heldout_tokens": sum(map(len, heldout)),
        "heldout_nll_nats_per_token": nll,
        "heldout_perplexity_512": math.exp(nll),
        "history": history,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card(record), encoding="utf-8")
    print(f"held-out perplexity {math.exp(nll):.2f} (windows of 512)", file=sys.stderr)


def card(record: dict[str, Any]) -> str:
    """Return the model card of what `train` recorded."""
    facts = {
        "held-out perplexity": f"**{record['heldout_perplexity_512']:.2f}** (windows of 512 tokens, "
        f"{record['heldout_tokens']:,} tokens)",
        "training text": f"{record['documents']:,} documents, {record['training_tokens']:,} tokens: the docstrings and "
        f"comments of the standard library and `pydoc_data.topics`, read from Python {record['python']}",
        "held out": "one document in ten, by the SHA-256 of its name; never trained on",
        "training": f"{record['tokens_seen']:,} tokens "
        f"({record['tokens_seen'] / record['training_tokens']:.1f} epochs): {record['steps']:,} steps with Muon for "
        f"matrices and AdamW for the rest, then {record['adam_steps']:,} with AdamW; "
        f"seed {record['seed']}, torch {record['torch']} on {record['device']}",
        "made by": "`python -m numprune.flows.embedded.train OUT "
        f"--steps {record['steps']} --adam-steps {record['adam_steps']}`",
    }
    table = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    return f"""---
language: en
license: apache-2.0
pipeline_tag: text-generation
---

# numprune's embedded model

A Llama-architecture decoder with grouped-query attention (6 layers, hidden 256, 8 query and 4 KV heads of 32,
intermediate 704, vocabulary {VOCABULARY:,}, context {CONTEXT:,}, tied embeddings; 5.5 M parameters, bfloat16). It
exists so that numprune's main job runs on trained weights without a download. It is of no use for anything else.

| | |
| --- | --- |
{table}

The text is that of the Python documentation and source (PSF licence); none of it is stored here. Another Python version
carries slightly other text, and gives a slightly other model and perplexity.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write (must not exist)")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--adam-steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=8, help="windows per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    train(args.out, steps=args.steps, adam_steps=args.adam_steps, rows=args.rows, length=args.length, seed=args.seed)


if __name__ == "__main__":
    main()
