"""Models whose layers differ in heads and MLP width: classes that honour Hugging Face's `per_layer_config`.

transformers reads and writes `per_layer_config`, but its modeling code builds every layer from the global sizes. Here,
each family's stock class is subclassed, with layers built from their own configuration (configs.py). If that
configuration does not accept fewer heads than fill the hidden size, or not every width of the MLP, the layer is built
with sizes that it accepts and then reduced. A layer whose `skip` lists "attention" or "mlp" has no such block and no
norms of it: they are replaced by modules that output zeros. Attention whose queries and keys have fewer dimensions than
its values runs by scored_attention.py.

Importing this module registers the classes with their task's auto class, and with `AutoModel`, from which vLLM's
transformers backend builds its models. Checkpoints contribute data only, no code.
"""

import copy
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from numprune.anatomy import PER_LAYER_PREFIX, layers_path, read_blocks
from numprune.blocks import Block, by_layer
from numprune.configs import CLASS_PREFIX
from numprune.families import FAMILIES, Family
from numprune.families.family import TaskName
from numprune.llamagen import model as _llamagen  # noqa: F401 - importing it registers the classes
from numprune.scored_attention import take_dims_from_weights
from numprune.stand_ins import stand_ins

AUTO_OF: Mapping[TaskName, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
    "classification": AutoModelForSequenceClassification,
    "embedding": AutoModel,
    "image-classification": AutoModelForImageClassification,
}
_IMPLEMENTATIONS = ("_attn_implementation_internal", "_experts_implementation_internal")


class _PerLayerModel:
    """Builds each layer from `config.per_layer_config[i]`.

    Attributes:
        family: of the model.
        layers_path: path of its layers.
        stock: transformers' class.
    """

    family: Family
    layers_path: str
    stock: type[PreTrainedModel]

    # `self` has no type: vLLM's transformers backend takes all annotations of a constructor for its arguments.
    def __init__(self, config: PreTrainedConfig) -> None:
        # The stock constructor reads global sizes, which do not exist here: it gets the first layer's.
        super().__init__(_buildable(self.family, config, 0))  # type: ignore[call-arg]
        self._build_layers(config)

    def _build_layers(self: Any, config: PreTrainedConfig) -> None:
        for choice in _IMPLEMENTATIONS:
            setattr(config, choice, getattr(self.config, choice))
        layers = self.get_submodule(self.layers_path)
        staged = self.family.stages is not None  # the stock constructor built layers at the sizes before pruning
        attending = 0
        for index, blocks in enumerate(by_layer(read_blocks(config))):
            if not staged:
                sizes = _buildable(self.family, config, index)
                layers[index] = type(layers[0])(sizes, *([index] if self.family.indexed else []))
            layer = self.get_submodule(self.path_of(blocks[0]))
            for block in blocks:
                if not block.units:
                    _skip(layer, block)
                    continue
                if staged or self._is_resized(block):
                    whole = layer.state_dict()
                    shapes = _sliced(block)
                    resize(layer, block, {name: _drawn(whole[name], shape) for name, shape in shapes.items()})
                if block.kind == "attention":
                    # Its index in the KV cache, which reads the current length from its first layer.
                    layer.get_submodule(block.modules[0]).layer_idx = attending
                    attending += 1
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config = config
                module._is_hf_initialized = False  # ImageGPT scales weights of its layers as a whole
        self.init_weights()  # of the new layers: the stock constructor only initialized those that it built

    def _is_resized(self, block: Block) -> bool:
        """Return whether the stock class cannot build a block of this size."""
        if block.kind != "attention":
            return block.kind == "mlp" and self.family.ratio is not None
        whole = block.reader.entries_per_unit(1) if block.scores else block.members
        return self.family.stock_heads == "all" or block.members != whole

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: of modules without weights of their own, like GPT-2's attention, custom code is not initialized."""
        return False

    def set_attn_implementation(self: Any, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        self._pass_on_implementations()

    def set_experts_implementation(self: Any, *args: Any, **kwargs: Any) -> None:
        super().set_experts_implementation(*args, **kwargs)  # type: ignore[misc]
        self._pass_on_implementations()

    @classmethod
    def _can_set_experts_implementation(cls: Any) -> bool:
        return bool(cls.stock._can_set_experts_implementation())  # which inspects the source of the class's module

    def path_of(self: Any, block: Block) -> str:
        """Return the path of a block's layer in this model, which may be the base model alone."""
        return f"{self.layers_path}{block.path.removeprefix(layers_path(self.config))}"

    def _pass_on_implementations(self: Any) -> None:
        """Give each layer's copy of the configuration the attention implementation."""
        for block in read_blocks(self.config):
            if block.units and block.kind != "mlp":
                module = self.get_submodule(f"{self.path_of(block)}.{block.modules[0]}")
                for choice in _IMPLEMENTATIONS:
                    setattr(module.config, choice, getattr(self.config, choice))


class Silent(nn.Module):
    """Replaces a missing block: runs `silent` or `silent_attention` of stand_ins.py."""

    def __init__(self, output: Callable[..., Any]) -> None:
        super().__init__()
        self._output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output(*args, **kwargs)


def _sliced(block: Block) -> dict[str, tuple[int, ...]]:
    """Return the names of the tensors that the block's units are cut from, and their shapes."""
    shapes = block.tensors()
    return {part.tensor: shapes[part.tensor] for part in block.slices}


def _drawn(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of `shape` with initial weights of `tensor`: some classes only draw them in the constructor."""
    for dim, size in enumerate(shape):
        tensor = tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])
    return tensor


def _skip(layer: nn.Module, block: Block) -> None:
    for path, stand_in in stand_ins(block).items():
        layer.set_submodule(path, Silent(stand_in))
    for path in {name.rpartition(".")[0] for name in block.shared}:
        if not f"{path}.".startswith(tuple(f"{module}." for module in block.modules)):
            layer.set_submodule(path, nn.Identity())


def _buildable(family: Family, config: PreTrainedConfig, index: int) -> PreTrainedConfig:
    """Return a configuration from which stock classes build the layer, perhaps with more heads than it has."""
    sizes = copy.copy(config.per_layer_config[index])
    if family.stock_heads == "all" and family.stages is None:
        setattr(sizes, family.heads, sizes.hidden_size // sizes.head_dim)
    return sizes


def resize(layer: nn.Module, block: Block, tensors: Mapping[str, Tensor]) -> None:
    """Replace the tensors of a block that became smaller in a decoder layer, in place, by their names in the layer.

    Args:
        block: at its new size.
    """
    for name, tensor in tensors.items():
        path, _, parameter = name.rpartition(".")
        module: Any = layer.get_submodule(path)
        setattr(module, parameter, nn.Parameter(tensor))
        if parameter == "weight":
            if isinstance(module, Conv1D):
                module.nx, module.nf = tensor.shape
            else:
                module.out_features, module.in_features = tensor.shape
    for attribute, count in block.counts().items():
        *owners, field = attribute.split(".")
        setattr(reduce(getattr, owners, layer), field, count)
    if block.scores and block.members != block.channels_per_unit:
        take_dims_from_weights(layer.get_submodule(block.modules[0]))


def _register(family: Family) -> None:
    config = CONFIG_MAPPING[PER_LAYER_PREFIX + family.name]
    _rename_as(family.name, config.model_type)
    path = f"{family.prefix}.{family.layers}" if family.prefix else family.layers
    for auto in dict.fromkeys((*(AUTO_OF[task] for task in family.tasks), AutoModel)):
        found = auto._model_mapping[CONFIG_MAPPING[family.name]]
        stock_model = found[0] if isinstance(found, tuple) else found  # the first of several
        inside = f"{stock_model.base_model_prefix}." if auto is AutoModel else ""
        model = type(
            CLASS_PREFIX + stock_model.__name__,
            (_PerLayerModel, stock_model),
            {
                "config_class": config,
                "family": family,
                "layers_path": path.removeprefix(inside),
                "stock": stock_model,
                "__module__": __name__,
            },
        )
        globals()[model.__name__] = model
        _rename_as(stock_model.__name__, model.__name__)
        auto.register(config, model)


def _rename_as(theirs: str, ours: str) -> None:
    """Register checkpoint names that differ from the model's, by class or by model type."""
    renamed = get_checkpoint_conversion_mapping(theirs)
    if renamed:
        register_checkpoint_conversion_mapping(ours, renamed)


# It is in no public auto class of transformers.
AutoModelForCausalLM.register(ImageGPTConfig, ImageGPTForCausalImageModeling, exist_ok=True)
for _family in FAMILIES.values():
    _register(_family)
