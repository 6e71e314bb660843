"""Any network in standard ONNX operators, traced by torch's exporter.

The model's own forward pass is traced. A decoder is wrapped in a module that takes and returns the KV cache as plain
tensors, so the graph has the inputs and outputs of `onnx_decoder.write_decoder` for every network. `parity` proves that
it computes what the checkpoint computes, also at other lengths than the traced ones.
"""

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel

from numprune.anatomy import image_shape, read_anatomy
from numprune.blocks import Anatomy
from numprune.errors import InputError
from numprune.export.onnx_experts import EXPERTS
from numprune.export.onnx_graph import DATA_FILE, INLINE_BYTES, PAGE_BYTES, check
from numprune.layers import PIXELS
from numprune.tasks import Task
from numprune.tasks.classification import Classification
from numprune.tasks.embedding import Embedding
from numprune.tasks.image_classification import ImageClassification

# Attention as plain matrix products: it supports soft-capping and sinks, and its mask leaves no row empty, whose
# softmax would be NaN.
ATTENTION = "eager"

Dims = tuple[str | int, ...]  # of a tensor; a dimension of any size has a name

# Sizes of the traced example: all different and above 1, so that torch does not confuse dimensions or fix one.
_TRACED = {"batch": 3, "sequence": 5, "past": 7, "total": 12, "kept": 2}

logger = logging.getLogger(__name__)


class _FlatDecoder(nn.Module):
    """A decoder whose cache is plain tensors: keys and values of the whole past, for each layer with attention."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._selects = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        tokens, mask, kept, *past = inputs
        # Created without the configuration, with which a layer with a sliding window would keep only the window: the
        # graph would be fixed to the part of the traced past that lies in the window.
        cache = DynamicCache(zip(past[::2], past[1::2], strict=True))
        output = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=kept,
        )
        logits = output.logits if self._selects else output.logits[:, kept]
        return logits.float(), *(states for layer in cache.layers for states in (layer.keys, layer.values))


class _FlatEncoder(nn.Module):
    """An encoder that returns the outputs of its task: logits, or the states of all tokens and the embedding."""

    def __init__(self, model: PreTrainedModel, task: Task, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.inputs = inputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.inputs, inputs, strict=True))
        if PIXELS in named:
            named[PIXELS] = named[PIXELS].to(self.model.dtype)
        output = self.model(**named)
        if isinstance(self.task, Embedding):
            hidden = output.last_hidden_state
            return hidden.float(), self.task.embeddings(hidden, named["attention_mask"]).float()
        return (output.logits.float(),)


def trace(model: PreTrainedModel, task: Task, path: Path, opset: int, metadata: Mapping[str, str]) -> None:
    """Write the graph of `model`, in its precision, to `path`, and its weights to one data file beside it.

    A decoder's inputs and outputs are those of `onnx_decoder.write_decoder`. Inputs of an encoder: input_ids and
    attention_mask (B, S; 1 = token, 0 = padding), and token_type_ids (B, S) where the model tells them apart, or of one
    that reads images, pixel_values (B, C, height, width) float32 in any precision, of which only B is dynamic. Outputs:
    logits (B, S, V) of a masked language model, logits (B, classes) of a classifier, or last_hidden_state (B, S, H) and
    sentence_embedding (B, H), pooled and normalised as the checkpoint declares.

    Afterwards, the model's attention and experts have another implementation.

    Raises:
        InputError: torch cannot export the network.
    """
    anatomy = read_anatomy(model.config)
    logger.info("tracing the model for ONNX takes about %d s", 3 * anatomy.layers)
    model.set_attn_implementation(ATTENTION)
    if anatomy.of_kind("experts"):
        model.set_experts_implementation(EXPERTS)
    inputs, outputs = _decoder_ports(anatomy) if task.generates else _encoder_ports(model.config, task)
    flat = _FlatDecoder(model) if task.generates else _FlatEncoder(model, task, tuple(inputs))
    try:
        graph = _traced(flat.eval(), inputs, outputs, opset, model.dtype)
    except Exception as error:  # of any kind, from transformers' modeling code and from three libraries
        raise InputError(
            f"torch {torch.__version__} and onnxscript {version('onnxscript')} cannot export {anatomy.family} to ONNX "
            f"({_cause(error)}); leave onnx and tensorrt out"
        ) from error
    graph.metadata_props.update(metadata)
    onnx_ir.save(
        graph,
        path,
        external_data=DATA_FILE,
        size_threshold_bytes=INLINE_BYTES,
        alignment=PAGE_BYTES,
        align_threshold=INLINE_BYTES,
    )
    check(path)


def _decoder_ports(anatomy: Anatomy) -> tuple[dict[str, Dims], dict[str, Dims]]:
    """Names and dimensions of a decoder's inputs and outputs."""
    inputs: dict[str, Dims] = {
        "input_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "total"),
        "logits_to_keep": ("kept",),
    }
    outputs: dict[str, Dims] = {"logits": ("batch", "kept", anatomy.predicted)}
    for block in anatomy.of_kind("attention"):
        for name in ("key", "value") if block.units else ():
            inputs[f"past_key_values.{block.layer}.{name}"] = ("batch", block.units, "past", anatomy.head_dim)
            outputs[f"present.{block.layer}.{name}"] = ("batch", block.units, "total", anatomy.head_dim)
    return inputs, outputs


def _encoder_ports(config: Any, task: Task) -> tuple[dict[str, Dims], dict[str, Dims]]:
    """Names and dimensions of an encoder's inputs and outputs."""
    if isinstance(task, ImageClassification):
        return {PIXELS: ("batch", *image_shape(config))}, {"logits": ("batch", config.num_labels)}
    tokens: Dims = ("batch", "sequence")
    inputs = {"input_ids": tokens, "attention_mask": tokens}
    if getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = tokens
    if isinstance(task, Embedding):
        size = config.hidden_size
        return inputs, {"last_hidden_state": (*tokens, size), "sentence_embedding": ("batch", size)}
    if isinstance(task, Classification):
        return inputs, {"logits": ("batch", config.num_labels)}
    return inputs, {"logits": (*tokens, config.vocab_size)}


def _traced(
    module: nn.Module, inputs: Mapping[str, Dims], outputs: Mapping[str, Dims], opset: int, dtype: torch.dtype
) -> onnx_ir.Model:
    """Return the graph of `module`, which takes `inputs`.

    They are int64 where all dimensions have names, otherwise `dtype`, except images, which are float32.
    """
    samples = []
    for name, dims in inputs.items():
        shape = [_TRACED[dim] if isinstance(dim, str) else dim for dim in dims]
        integers = all(isinstance(dim, str) for dim in dims)
        floats = torch.float32 if name == PIXELS else dtype
        samples.append(torch.ones(shape, dtype=torch.int64 if integers else floats))
    dynamic = tuple(
        {index: Dim.DYNAMIC for index, dim in enumerate(dims) if isinstance(dim, str)} for dims in inputs.values()
    )
    with _silence():
        program = torch.export.export(module, tuple(samples), dynamic_shapes={"inputs": dynamic}, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
        )
    assert exported is not None  # it is with `dynamo`
    model = exported.model
    for node in model.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()  # source locations on this machine
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None  # runtimes infer them
    for values, all_dims in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, dims in zip(values, all_dims.values(), strict=True):
            value.shape = onnx_ir.Shape(dims)
    return model


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress the exporter's warnings about itself."""
    chatter = logging.getLogger("torch.onnx")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.setLevel(level)


def _cause(error: BaseException) -> str:
    """Return the first line of the original exception."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
