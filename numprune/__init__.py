"""numprune: from a transformer and a recipe to a pruned, exported, benchmarked, gated and published artifact.

This folder is the core: tensors, models and plans in, tensors, models and plans out. It imports nothing of `export`,
`serving` or `flows`; those stand beside it in the repository and are reached as `numprune.export` and so on through
symbolic links, so that an installed numprune takes one top-level name only.

Notation used throughout the core:

    N   rows of calibration tokens          S   tokens in a row
    H   hidden size                         D   channels of a consumer projection (its input features)
    P   channels removed                    K   channels kept
    W   consumer weight (out, D)            x   its input (D,); y = W x its output
    G = E[x x^T]  Gram matrix (D, D)        mu = E[x]  mean (D,)

A *consumer* is the projection that reads a block's hidden channels: `o_proj` of attention, `down_proj` of an MLP.
"""
