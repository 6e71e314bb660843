"""A model in memory, with how it was pruned, trained and quantized."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from numprune.anatomy import read_anatomy
from numprune.blocks import Anatomy
from numprune.budget import Budget, budget_of
from numprune.export.tasks import AnyTask
from numprune.plans import Draw, Plan
from numprune.quantization import BlockSchemes, Quantized, Scheme
from numprune.quantization.lm_head import LmHeadBits
from numprune.quantization.schemes import listed
from numprune.recovery import Recovered, RecoveryOptions


@dataclass(frozen=True)
class CalibrationRows:
    """Rows for calibration.

    Attributes:
        tokens: (N, S) int64, or pixel values (N, C, height, width) float32.
        draw: their source text and how they were drawn; None for your own rows.
    """

    tokens: Tensor
    draw: Draw | None = None


@dataclass(frozen=True)
class Quantization:
    """How a model was quantized.

    Attributes:
        schemes: one for all blocks, or that of each quantized block by its name.
        matrices: name -> the quantized weight.
        rows: for the calibration of GPTQ; None: each weight was rounded to the nearest value.
        lm_head_bits: of the output matrix in an export to onnxruntime.
    """

    schemes: BlockSchemes
    matrices: Mapping[str, Quantized]
    rows: CalibrationRows | None
    lm_head_bits: LmHeadBits = 8

    def __str__(self) -> str:
        return listed([self.schemes] if isinstance(self.schemes, Scheme) else self.schemes.values())


@dataclass(frozen=True)
class Training:
    """How a pruned model was trained.

    Attributes:
        options: of the training.
        result: of the training.
        rows_digest: of the training and selection rows.
    """

    options: RecoveryOptions
    result: Recovered
    rows_digest: str


@dataclass(frozen=True)
class Model:
    """A model in memory, in float32.

    Attributes:
        folder: the checkpoint from which it, or its unpruned model, was read.
        network: transformers' model.
        tokenizer: its tokenizer; None: it reads images.
        task: causal or masked language model, classifier of texts or images, or embedding model.
        plan: the applied plan; None for an unpruned model.
        training: how it was trained in memory after pruning; None for an untrained model.
        quantization: how it was quantized in memory; `network` then computes with rounded weights and, if the scheme
            does so, rounded activations. None for an unquantized model.
    """

    folder: Path
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    task: AnyTask
    plan: Plan | None = None
    training: Training | None = None
    quantization: Quantization | None = None

    @property
    def anatomy(self) -> Anatomy:
        """Its prunable blocks and their sizes."""
        return read_anatomy(self.network.config)

    @property
    def budget(self) -> Budget:
        """Parameters, FLOPs per token and KV-cache bytes per token."""
        return budget_of(self.anatomy)
