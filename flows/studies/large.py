"""Write a Llama of any size with random weights without holding it in memory, to test the needs of larger models.

    python -m numprune.flows.studies.large OUT [--gigabytes 6] [--hidden-size 2048] [--vocabulary 128256]

It says nothing about quality. To prune it within 2 GiB, a limit set by the shell (in KiB):

    python -m numprune.flows.studies.large ./large
    (ulimit -d 2097152; numprune prune ./large ./pruned --ratio 0.3 --stream --text README.md --samples 4 \\
        --sequence-length 64 --criterion wanda --compensation sequential)

The default criterion and compensation take about ten times as long; they were only tried on the first layers.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig

from numprune.errors import InputError, NumpruneError
from numprune.export import random_weights
from numprune.export.headers import weight_bytes
from numprune.flows.recipe import EMBEDDED_FOLDER


def random_llama(total_bytes: int, hidden_size: int, vocabulary: int) -> LlamaConfig:
    """Return the configuration of a Llama of at least `total_bytes` in bfloat16, with as many layers as needed.

    Heads of 64 channels, four of which share a KV head; the MLP is twice as wide as the hidden states.

    Raises:
        InputError: no such model.
    """
    if hidden_size < 256 or hidden_size % 256:
        raise InputError(f"--hidden-size {hidden_size}: it must be a multiple of 256")
    layer_bytes = (2 * hidden_size**2 + 2 * hidden_size**2 // 4 + 6 * hidden_size**2 + 2 * hidden_size) * 2
    around_bytes = (2 * vocabulary * hidden_size + hidden_size) * 2
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 256,
        num_hidden_layers=max(1, -((around_bytes - total_bytes) // layer_bytes)),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )


def write_random(out: Path, config: LlamaConfig) -> None:
    """Write the checkpoint in bfloat16, with the embedded model's tokenizer. Raises InputError as random_weights."""
    random_weights.write_random(out, config, EMBEDDED_FOLDER / "model", torch.bfloat16)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m numprune.flows.studies.large",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; must not exist")
    parser.add_argument("--gigabytes", type=float, default=6, metavar="G", help="at least (default: 6)")
    parser.add_argument("--hidden-size", type=int, default=2048, metavar="H", help="default: 2048")
    parser.add_argument("--vocabulary", type=int, default=128_256, metavar="V", help="default: 128256")
    args = parser.parse_args(argv)
    try:
        config = random_llama(int(args.gigabytes * 10**9), args.hidden_size, args.vocabulary)
        write_random(args.out, config)
    except NumpruneError as error:
        print(f"large: error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {config.num_hidden_layers} layers, {weight_bytes(args.out):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
