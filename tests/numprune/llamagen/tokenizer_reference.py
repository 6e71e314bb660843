"""LlamaGen's image tokenizer written out with the published names of tensors: what decoding codes must compute."""

import torch
from torch import Tensor
from torch.nn import functional

CODES, CODE_CHANNELS, LATENT, BLOCKS, DEPTH, GRID = 30, 8, 16, (64, 32, 32), 3, 8
ZOOM = 4


def random_state(seed: int = 0, codes: int = CODES) -> dict[str, Tensor]:
    """As a published file, which holds the encoder and the codebook's use, too."""
    draw = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def convolution(name: str, inner: int, outer: int, size: int) -> None:
        scale = (inner * size * size) ** -0.5
        state[f"{name}.weight"] = scale * torch.randn(outer, inner, size, size, generator=draw)
        state[f"{name}.bias"] = 0.1 * torch.randn(outer, generator=draw)

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(channels, generator=draw)
        state[f"{name}.bias"] = 0.1 * torch.randn(channels, generator=draw)

    def residual(name: str, inner: int, outer: int) -> None:
        norm(f"{name}.norm1", inner)
        convolution(f"{name}.conv1", inner, outer, 3)
        norm(f"{name}.norm2", outer)
        convolution(f"{name}.conv2", outer, outer, 3)
        if inner != outer:
            convolution(f"{name}.nin_shortcut", inner, outer, 1)

    def attention(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            convolution(f"{name}.{part}", channels, channels, 1)

    convolution("encoder.conv_in", 3, 32, 3)
    convolution("quant_conv", LATENT, CODE_CHANNELS, 1)
    state["quantize.codebook_used"] = torch.zeros(16)
    state["quantize.embedding.weight"] = torch.randn(codes, CODE_CHANNELS, generator=draw)
    convolution("post_quant_conv", CODE_CHANNELS, LATENT, 1)
    convolution("decoder.conv_in", LATENT, BLOCKS[0], 3)
    residual("decoder.mid.0", BLOCKS[0], BLOCKS[0])
    attention("decoder.mid.1", BLOCKS[0])
    residual("decoder.mid.2", BLOCKS[0], BLOCKS[0])
    inner = BLOCKS[0]
    for level, outer in enumerate(BLOCKS):
        for index in range(DEPTH):
            residual(f"decoder.conv_blocks.{level}.res.{index}", inner, outer)
            inner = outer
            if level == 0:
                attention(f"decoder.conv_blocks.{level}.attn.{index}", outer)
        if level < len(BLOCKS) - 1:
            convolution(f"decoder.conv_blocks.{level}.upsample.conv", outer, outer, 3)
    norm("decoder.norm_out", BLOCKS[-1])
    convolution("decoder.conv_out", BLOCKS[-1], 3, 3)
    return state


def images(state: dict[str, Tensor], codes: Tensor) -> Tensor:
    """(n, 3, ZOOM * GRID, ZOOM * GRID) in [-1, 1], mostly, of codes (n, GRID * GRID)."""

    def convolution(name: str, hidden: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        return functional.conv2d(hidden, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name: str, hidden: Tensor) -> Tensor:
        groups = hidden.unflatten(1, (32, -1)).flatten(2)  # (n, groups, the rest)
        centred = groups - groups.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        weight, bias = (state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return scaled.reshape(hidden.shape) * weight + bias

    def swish(hidden: Tensor) -> Tensor:
        return hidden * torch.sigmoid(hidden)

    def residual(name: str, hidden: Tensor) -> Tensor:
        inside = convolution(f"{name}.conv1", swish(norm(f"{name}.norm1", hidden)))
        inside = convolution(f"{name}.conv2", swish(norm(f"{name}.norm2", inside)))
        shortcut = f"{name}.nin_shortcut"
        return inside + (convolution(shortcut, hidden) if f"{shortcut}.weight" in state else hidden)

    def attention(name: str, hidden: Tensor) -> Tensor:
        read = norm(f"{name}.norm", hidden)
        query, key, value = (convolution(f"{name}.{part}", read).flatten(2) for part in ("q", "k", "v"))  # (n, C, H W)
        weights = (torch.einsum("nci,ncj->nij", query, key) / query.shape[1] ** 0.5).softmax(-1)
        mixed = torch.einsum("nij,ncj->nci", weights, value).reshape(hidden.shape)
        return hidden + convolution(f"{name}.proj_out", mixed)

    entries = state["quantize.embedding.weight"]
    entries = entries / entries.norm(dim=1, keepdim=True)
    hidden = entries[codes].reshape(len(codes), GRID, GRID, CODE_CHANNELS).permute(0, 3, 1, 2)
    hidden = convolution("decoder.conv_in", convolution("post_quant_conv", hidden))
    hidden = residual("decoder.mid.2", attention("decoder.mid.1", residual("decoder.mid.0", hidden)))
    for level in range(len(BLOCKS)):
        for index in range(DEPTH):
            hidden = residual(f"decoder.conv_blocks.{level}.res.{index}", hidden)
            if level == 0:
                hidden = attention(f"decoder.conv_blocks.{level}.attn.{index}", hidden)
        if level < len(BLOCKS) - 1:
            larger = hidden.repeat_interleave(2, 2).repeat_interleave(2, 3)
            hidden = convolution(f"decoder.conv_blocks.{level}.upsample.conv", larger)
    return convolution("decoder.conv_out", swish(norm("decoder.norm_out", hidden)))
