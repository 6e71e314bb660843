"""The decoder of LlamaGen's image tokenizer, with the names of its published state dict.

It is the VQGAN of Esser et al. ("Taming Transformers for High-Resolution Image Synthesis", 2021) with codes of length 1
(Yu et al., "Vector-quantized Image Modeling with Improved VQGAN", 2022), as in FoundationVision/LlamaGen,
tokenizer/tokenizer_image/vq_model.py. All sizes are those of the tensors. Notation for shapes: B images, C channels, H
rows and W columns.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional

from numprune.errors import InputError, IntegrityError

_GROUPS = 32  # of GroupNorm; the number of channels is a multiple of it
_BATCH = 4  # images decoded at once: 128 channels in full resolution are 32 MiB of 256 x 256 pixels
_NOT_READ = ("encoder.", "quant_conv.", "quantize.codebook_used")  # of the published file: its encoder
_CODEBOOK, _AFTER = "quantize.embedding.weight", "post_quant_conv.weight"
_BLOCK = re.compile(r"decoder\.conv_blocks\.(\d+)\.res\.(\d+)\.conv1\.weight")


@dataclass(frozen=True)
class TokenizerSizes:
    """Sizes of a decoder.

    Attributes:
        codes: entries of the codebook, of `code_channels` channels.
        latent_channels: between codebook and decoder.
        blocks: channels of each resolution, from the lowest to that of the pixels.
        depth: residual blocks of each resolution.
    """

    codes: int
    code_channels: int
    latent_channels: int
    blocks: tuple[int, ...]
    depth: int

    @property
    def zoom(self) -> int:
        """Pixels of a side for each code."""
        return 1 << (len(self.blocks) - 1)


def sizes_of(state: Mapping[str, Tensor]) -> TokenizerSizes:
    """Return the sizes of a published state dict, whose encoder is not needed. Raises InputError."""
    channels: dict[int, dict[int, int]] = {}
    for name, tensor in state.items():
        if match := _BLOCK.fullmatch(name):
            channels.setdefault(int(match[1]), {})[int(match[2])] = len(tensor) if tensor.ndim else 0
    missing = [name for name in (_CODEBOOK, _AFTER) if name not in state]
    if missing or not channels:
        what = repr(missing[0]) if missing else "blocks, decoder.conv_blocks.0.res.0.conv1.weight and so on"
        raise InputError(f"the state dict is not of LlamaGen's image tokenizer: it lacks {what}")
    if state[_CODEBOOK].ndim != 2 or state[_AFTER].ndim != 4:
        name = _CODEBOOK if state[_CODEBOOK].ndim != 2 else _AFTER
        raise InputError(f"{name} has shape {list(state[name].shape)}, which is not that of LlamaGen's image tokenizer")
    blocks = tuple(channels.get(level, {}).get(0, 0) for level in range(len(channels)))
    if unusable := [width for width in blocks if width < 1 or width % _GROUPS]:
        raise InputError(f"the state dict has blocks of {unusable[0]} channels; they must be multiples of {_GROUPS}")
    codes, code_channels = state[_CODEBOOK].shape
    found = TokenizerSizes(codes, code_channels, len(state[_AFTER]), blocks, len(channels[0]))
    with torch.device("meta"):
        expected = TokenizerDecoder(found).state_dict()
    unknown = sorted(name for name in state if name not in expected and not name.startswith(_NOT_READ))
    if lacking := sorted(expected.keys() - state.keys()):
        raise InputError(f"the state dict is not of LlamaGen's image tokenizer: it lacks {lacking[0]!r}")
    if unknown:
        raise InputError(f"the state dict is not of LlamaGen's image tokenizer: it has the unknown {unknown[0]!r}")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise InputError(f"{name} has shape {list(state[name].shape)}; the other tensors need {list(tensor.shape)}")
    return found


class TokenizerDecoder(nn.Module):
    """Codes to images in [-1, 1]."""

    def __init__(self, sizes: TokenizerSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.quantize = _Codebook(sizes)
        self.post_quant_conv = nn.Conv2d(sizes.code_channels, sizes.latent_channels, 1)
        self.decoder = _Decoder(sizes)

    def forward(self, codes: Tensor) -> Tensor:
        """Return (B, 3, zoom H, zoom W) of codes (B, H, W) int64."""
        images: Tensor = self.decoder(self.post_quant_conv(self.quantize(codes).permute(0, 3, 1, 2)))
        return images


class _Codebook(nn.Module):
    def __init__(self, sizes: TokenizerSizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.codes, sizes.code_channels)

    def forward(self, codes: Tensor) -> Tensor:
        """Entries of length 1, as the encoder compares them."""
        return functional.normalize(self.embedding(codes), dim=-1)


class _Decoder(nn.Module):
    def __init__(self, sizes: TokenizerSizes) -> None:
        super().__init__()
        lowest, highest = sizes.blocks[0], sizes.blocks[-1]
        self.conv_in = _convolution(sizes.latent_channels, lowest)
        self.mid = nn.ModuleList([_Residual(lowest, lowest), _Attention(lowest), _Residual(lowest, lowest)])
        before = (lowest, *sizes.blocks[:-1])
        self.conv_blocks = nn.ModuleList(
            _Resolution(inner, outer, sizes.depth, attends=level == 0, enlarges=level < len(sizes.blocks) - 1)
            for level, (inner, outer) in enumerate(zip(before, sizes.blocks, strict=True))
        )
        self.norm_out = _norm(highest)
        self.conv_out = _convolution(highest, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.conv_in(hidden)
        for block in (*self.mid, *self.conv_blocks):
            hidden = block(hidden)
        found: Tensor = self.conv_out(functional.silu(self.norm_out(hidden)))
        return found


class _Resolution(nn.Module):
    """The residual blocks of one resolution, each followed by attention in the lowest one."""

    def __init__(self, inner: int, outer: int, depth: int, *, attends: bool, enlarges: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(_Residual(outer if index else inner, outer) for index in range(depth))
        self.attn = nn.ModuleList(_Attention(outer) for _ in range(depth if attends else 0))
        self.upsample = _Enlarge(outer) if enlarges else None

    def forward(self, hidden: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            hidden = block(hidden)
            if len(self.attn):
                hidden = self.attn[index](hidden)
        return hidden if self.upsample is None else self.upsample(hidden)


class _Residual(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inner), _convolution(inner, outer)
        self.norm2, self.conv2 = _norm(outer), _convolution(outer, outer)
        self.nin_shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        inside = self.conv1(functional.silu(self.norm1(hidden)))
        inside = self.conv2(functional.silu(self.norm2(inside)))
        found: Tensor = self.nin_shortcut(hidden) + inside
        return found


class _Attention(nn.Module):
    """One head over all places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        read = self.norm(hidden)
        query, key, value = (part(read).flatten(2).mT for part in (self.q, self.k, self.v))  # (B, H W, C)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        found: Tensor = hidden + self.proj_out(mixed.mT.unflatten(2, hidden.shape[2:]))
        return found


class _Enlarge(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _convolution(channels, channels)

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.conv(functional.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        return found


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)


def _convolution(inner: int, outer: int) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, padding=1)


class ImageTokenizer:
    """A decoder of square images (numprune.decoding.Decoder).

    Args:
        state: as published; its encoder is not needed.
        codes_per_image: a square number.
        device: where it decodes.

    Raises InputError as `sizes_of`.
    """

    def __init__(self, state: Mapping[str, Tensor], codes_per_image: int, device: torch.device) -> None:
        sizes = sizes_of(state)
        with torch.device("meta"):
            model = TokenizerDecoder(sizes)
        mine = {name: state[name].float() for name in model.state_dict()}
        model.load_state_dict(mine, assign=True)
        self._model = model.eval().to(device)
        self._grid, self._device = isqrt(codes_per_image), device

    @property
    def side(self) -> int:
        return self._grid * self._model.sizes.zoom

    @torch.inference_mode()
    def pictures(self, codes: Tensor) -> Tensor:
        """Return (n, 3, side, side) uint8 of codes (n, L) int64; the values are rounded as for published samples.

        Raises IntegrityError if a value is not finite.
        """
        grids = codes.unflatten(1, (self._grid, self._grid)).split(_BATCH)
        return torch.cat([self._decoded(grid.to(self._device)) for grid in grids])

    def _decoded(self, grid: Tensor) -> Tensor:
        found = self._model(grid)
        if not torch.isfinite(found).all():
            raise IntegrityError("the decoder's images are not finite; its weights are damaged")
        return (127.5 * found + 128).clamp(0, 255).to(torch.uint8).cpu()
