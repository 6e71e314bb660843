"""Rotating and slicing the hidden dimension (SliceGPT; Ashkboos et al., ICLR 2024, arXiv 2401.15024).

An RMS norm without a scale is invariant to rotations of its input. So the norms' scales are folded into the matrices
that read them, the residual stream before each block is rotated onto the principal axes Q_l of the norm's output, and
the last axes are cut off. Blocks have different axes: between two blocks, the residual stream passes the shortcut P_l^T
P_{l+1}, with P_l the kept columns of Q_l. These shortcuts are new parameters that no stock architecture has.

As in the authors' code, blocks are sliced one after another, each block's axes come from the already sliced prefix,
every block has the same width, and the input of the head is rotated but not cut.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.anatomy import read_anatomy
from numprune.blocks import Anatomy
from numprune.budget import budget_of
from numprune.calibration import check_rows
from numprune.errors import InputError
from numprune.flows.studies.rivals.result import Result

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # an RMS norm before each block, none after it
_MODULES = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}


def slicegpt(model: PreTrainedModel, rows: Tensor, ratio: float, batch_size: int) -> Result:
    """Slice the hidden dimension so that prunable parameters plus shortcuts are fewer by `ratio`.

    The paper's ratio refers to the hidden dimension instead; this one makes the method comparable with methods that add
    no parameters. Embedding and head also become smaller, which only `parameters` counts. Tied ones are untied and
    counted separately, because only the head absorbs a norm's scale.

    Args:
        model: used up.
        rows: (N, S) int64 calibration tokens.
        ratio: of the prunable parameters.
        batch_size: rows at a time.

    Raises:
        InputError: the model skips blocks, or the rows do not fit the model.
    """
    anatomy = read_anatomy(model.config)
    check_blocks(anatomy)
    check_rows(anatomy, rows)
    length, window = rows.shape[1], anatomy.sliding_window
    if window is not None and length > window:  # its blocks are run without a mask
        raise InputError(f"slicegpt: sequence length {length} exceeds the model's sliding window of {window}")
    dense = budget_of(anatomy).prunable_parameters
    hidden = anatomy.hidden_size
    width = min(range(1, hidden + 1), key=lambda size: abs(block_parameters(anatomy, size) - (1 - ratio) * dense))
    sliced = slice_hidden(model, rows, width, batch_size)
    parameters = sum(parameter.numel() for parameter in sliced.parameters())
    return Result(sliced, parameters, 1 - block_parameters(anatomy, width) / dense)


def check_blocks(anatomy: Anatomy) -> None:
    """Refuse a model that cannot be sliced. Raises InputError."""
    if anatomy.family not in FAMILIES:
        raise InputError(f"slicegpt: {anatomy.family} is not supported; supported are {', '.join(FAMILIES)}")
    if not all(block.units for block in anatomy.blocks):
        raise InputError("slicegpt: a model that skips blocks is not supported")


def block_parameters(anatomy: Anatomy, width: int) -> int:
    """Return the number of parameters of projections and shortcuts if every block's stream is `width` wide."""
    total = 0
    for index, block in enumerate(anatomy.blocks):
        out = anatomy.hidden_size if index == len(anatomy.blocks) - 1 else width
        of_unit = {writer: writer.entries_per_unit(block.members) for writer in block.writers}
        rows = block.units * sum(size for writer, size in of_unit.items() if writer.width is not None)
        biases = block.units * sum(size for writer, size in of_unit.items() if writer.width is None)
        total += rows * width + biases + block.channels * out + width * out
    return total


@torch.no_grad()
def slice_hidden(model: PreTrainedModel, rows: Tensor, width: int, batch_size: int) -> "Sliced":
    """Return `model`, which is modified, with `width` of its hidden dimensions before every block."""
    anatomy = read_anatomy(model.config)
    embedding = model.get_input_embeddings().weight
    positions = torch.arange(rows.shape[1], device=embedding.device)[None]
    rope = model.model.rotary_emb(embedding.new_empty(1, rows.shape[1], 1), positions)
    sliced = Sliced(model, anatomy)
    decoder = sliced.decoder
    hidden = torch.nn.functional.embedding(rows.to(embedding.device), embedding)  # (N, S, H), in the dense basis
    kept = principal_axes(decoder.norm, hidden, batch_size)[:, :width]
    decoder.embedding.weight.data = _cast(embedding.double() @ kept, embedding)
    block: Any
    for index, block in enumerate(decoder.blocks):
        block.read_through(kept)
        for batch in hidden.split(batch_size):
            stream = (batch.double() @ kept).to(batch.dtype)
            batch.copy_((stream.double() @ kept.T).to(batch.dtype) + block.run(decoder.norm(stream), rope))
        last = index == len(decoder.blocks) - 1
        after = principal_axes(decoder.norm, hidden, batch_size)
        after = after if last else after[:, :width]
        block.write_through(kept, after)
        kept = after
    sliced.head.weight.data = _cast(sliced.head.weight.double() @ kept, sliced.head.weight)
    return sliced


def principal_axes(norm: nn.Module, hidden: Tensor, batch_size: int) -> Tensor:
    """Return the orthogonal Q (H, H) float64, eigenvectors of sum x x^T, largest eigenvalue first; x = norm(hidden).

    Args:
        norm: without a scale, so its output is the signal that the block's matrices read (section 3.3).
        hidden: (N, S, H).
        batch_size: rows of `hidden` at a time.
    """
    width = hidden.shape[-1]
    moment = torch.zeros(width, width, dtype=torch.float64, device=hidden.device)
    for batch in hidden.split(batch_size):
        x = norm(batch).reshape(-1, width).double()
        moment += x.T @ x
    return torch.linalg.eigh(moment).eigenvectors.flip(1)


class UnscaledNorm(nn.Module):
    """x / rms(x), with the mean over the dense model's width, because the cut part was small but not zero."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self._width, self._epsilon = width, epsilon

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.square().sum(-1, keepdim=True) / self._width
        return x * torch.rsqrt(mean_square + self._epsilon)


class Block(nn.Module):
    """Attention or MLP with its norm's scale folded in, and the parallel shortcut.

    Before `read_through` and `write_through` it reads and writes the dense model's hidden dimensions.
    """

    def __init__(self, module: nn.Module, kind: str, scale: Tensor, producers: list[str], consumer: str) -> None:
        super().__init__()
        self.module, self._kind = module, kind
        self._producers: list[Any] = [module.get_submodule(name) for name in producers]
        self._consumer: Any = module.get_submodule(consumer)
        self.shortcut = nn.Parameter(scale.new_empty(0))
        for producer in self._producers:
            producer.weight.data = _cast(producer.weight.double() * scale.double(), producer.weight)

    def read_through(self, kept: Tensor) -> None:
        """Read a stream in the coordinates of `kept` (H, width)."""
        for producer in self._producers:
            producer.weight.data = _cast(producer.weight.double() @ kept, producer.weight)

    def write_through(self, before: Tensor, after: Tensor) -> None:
        """Write to a stream in the coordinates of `after` (H, width'); its input has those of `before`."""
        weight, bias = self._consumer.weight, self._consumer.bias
        self._consumer.weight.data = _cast(after.T @ weight.double(), weight)
        if bias is not None:
            self._consumer.bias.data = _cast(after.T @ bias.double(), bias)
        self.shortcut.data = _cast(before.T @ after, weight)

    def run(self, normed: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        if self._kind == "mlp":
            return self.module(normed)
        return self.module(normed, position_embeddings=rope, attention_mask=None)[0]

    def forward(self, stream: Tensor, normed: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return stream @ self.shortcut + self.run(normed, rope)


class Decoder(nn.Module):
    """The blocks between embedding and last norm, without cache or mask: causal, for rows of one length."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        super().__init__()
        self.norm = UnscaledNorm(anatomy.hidden_size, model.config.rms_norm_eps)
        self.embedding = model.get_input_embeddings()
        self.blocks = nn.ModuleList(_blocks(model, anatomy))
        self.rotary = model.model.rotary_emb

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        """Return `.last_hidden_state` (n, S, H) of `input_ids` (n, S)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        stream = self.embedding(input_ids)
        rope = self.rotary(stream, positions)
        for block in self.blocks:
            stream = block(stream, self.norm(stream), rope)
        return SimpleNamespace(last_hidden_state=self.norm(stream))


class Sliced(nn.Module):
    """The decoder and its head under transformers' names, as `quality` needs them."""

    base_model_prefix = "decoder"

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        super().__init__()
        self.config = model.config
        self.decoder = Decoder(model, anatomy)
        head = model.get_output_embeddings().weight
        self.head = nn.Linear(head.shape[1], head.shape[0], bias=False, device="meta")
        self.head.weight = nn.Parameter(_cast(head.double() * model.model.norm.weight.double(), head))

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def base_model(self) -> nn.Module:
        return self.decoder

    def forward(self, input_ids: Tensor | None = None, **inputs: Any) -> SimpleNamespace:
        """Return `.logits` (n, S, V) of `input_ids` (n, S)."""
        return SimpleNamespace(logits=self.head(self.decoder(input_ids=input_ids, **inputs).last_hidden_state))


def _blocks(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[Block]:
    for block in anatomy.blocks:
        layer: Any = model.model.layers[block.layer]
        name, norm = _MODULES[block.kind]
        written = [writer.tensor.removeprefix(f"{name}.") for writer in block.writers]
        producers = [tensor.removesuffix(".weight") for tensor in written if tensor.endswith(".weight")]
        consumer = block.consumer.removeprefix(f"{name}.")
        scale = layer.get_submodule(norm).weight
        yield Block(layer.get_submodule(name), block.kind, scale, producers, consumer)


def _cast(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).contiguous()
