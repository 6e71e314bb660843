"""The ways of making one vector of a text's token states, by the names of sentence-transformers."""

from typing import Literal, get_args

Pooling = Literal["mean", "cls", "max", "mean_sqrt_len", "last"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
