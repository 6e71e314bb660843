"""Train a small class-conditional image generator of the LlamaGen layout on scikit-learn's digits.

    python -m numprune.flows.embedded.images OUT

Writes the model to OUT/model, and the codes and classes of its images to OUT/train.safetensors and
OUT/heldout.safetensors. An image has 8 x 8 pixels; a code is one of 17 grey levels. Needs scikit-learn. Training takes
about two minutes on one idle CPU core. It uses one thread: the same seed and versions give the same weights on any
number of cores.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from numprune.codes import CodeVocabulary
from numprune.errors import InputError
from numprune.flows.embedded.threads import one_thread
from numprune.llamagen.config import LlamaGenConfig
from numprune.llamagen.model import LlamaGenForCausalLM

CODES, CLASSES, SIDE = 17, 10, 8
VOCABULARY = CodeVocabulary(CODES, CLASSES)
_HELD_OUT = 500
_WITHOUT_CLASS = 0.1  # of the training rows, for classifier-free guidance


def digits() -> tuple[Tensor, Tensor]:
    """Return the codes (1797, 64) and classes (1797,) of scikit-learn's digits, int64. Raises InputError."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError('the digits come with scikit-learn: pip install "numprune[vision]"') from None

    found = load_digits()
    return torch.from_numpy(found.data.astype(np.int64)), torch.from_numpy(found.target.astype(np.int64))


def build_model() -> LlamaGenForCausalLM:
    """Return the untrained model: 0.5 M parameters, 4 layers, 6 heads of 16."""
    return LlamaGenForCausalLM(
        LlamaGenConfig(
            vocab_size=CODES + CLASSES + 1,
            num_classes=CLASSES,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=6,
            head_dim=16,
            max_position_embeddings=1 + SIDE * SIDE,
        )
    )


def rows_of(codes: Tensor, labels: Tensor) -> Tensor:
    """Return rows (n, 65): the token of the class, then the codes."""
    return torch.cat([CODES + labels[:, None], codes], 1)


def mean_nll(model: LlamaGenForCausalLM, rows: Tensor) -> float:
    """Return the mean NLL in nats per code of rows (n, 65)."""
    with torch.no_grad():
        logits = model(rows, use_cache=False).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


@one_thread()
def train(out: Path, *, steps: int, batch_size: int, learning_rate: float, seed: int) -> dict[str, float]:
    """Write the trained model and its images to `out`; return the held-out NLL in nats per code."""
    torch.manual_seed(seed)
    codes, labels = digits()
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))
    held, fitted = order[:_HELD_OUT], order[_HELD_OUT:]
    rows, judged = (rows_of(codes[part], labels[part]) for part in (fitted, held))
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    started = time.perf_counter()
    for step in range(steps):
        batch = rows[torch.randint(len(rows), (batch_size,))]
        batch[torch.rand(batch_size) < _WITHOUT_CLASS, 0] = VOCABULARY.start
        logits = model(batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"step {step + 1}/{steps} NLL {loss.item():.3f} {seconds:.0f} s", file=sys.stderr)
    model.eval()
    found = {"heldout_nll_nats_per_code": mean_nll(model, judged)}
    model.save_pretrained(out / "model")
    grey = np.linspace(1, -1, CODES)[:, None].repeat(3, 1)  # ink is dark
    (out / "model" / "preprocessor_config.json").write_text(json.dumps({"clusters": grey.tolist()}) + "\n")
    for name, part in (("train", fitted), ("heldout", held)):
        save_file({"codes": codes[part].contiguous(), "labels": labels[part].contiguous()}, out / f"{name}.safetensors")
    print(f"held-out NLL {found['heldout_nll_nats_per_code']:.4f} nats per code", file=sys.stderr)
    return found


def main() -> int:
    """Run the command and return its exit code: 0 done, 1 error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write (must not exist)")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32, help="images per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        digits()  # raises before anything is written
        if args.out.exists():
            raise InputError(f"{args.out}: already exists; choose another folder or remove it")
        args.out.mkdir(parents=True)
        train(args.out, steps=args.steps, batch_size=args.batch_size, learning_rate=args.learning_rate, seed=args.seed)
    except InputError as error:
        print(f"images: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
