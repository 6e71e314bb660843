"""Read a model's anatomy from its configuration: blocks, their units and members, and the tensors that share them.

Only the configuration is read, so a model can be planned before its weights are loaded. `families` describes the
supported architectures; all others are refused by name. torch is not needed.
"""

import copy
from collections.abc import Iterator
from math import isqrt, prod
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from numprune import dtypes
from numprune.around import tensors_around
from numprune.blocks import Anatomy, Block, beside_what_is_left
from numprune.codes import CodeVocabulary
from numprune.errors import InputError
from numprune.families import FAMILIES, Family
from numprune.families.family import TaskName
from numprune.fields import pair, require_sizes
from numprune.layer_blocks import Layer, attention_differs, layer_blocks, layer_sizes, sliding_window
from numprune.renumber import numbering_field
from numprune.stages import grid_of, path_of, places, read_stages, stock_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# A model whose layers differ has a model type of numprune, which contains its family (see modeling.py).
PER_LAYER_PREFIX = "numprune_"
MAXIMUM_LAYERS = 10_000  # an untrusted configuration may contain any number, and every layer is read
_TASK_OF_CLASS: dict[str, TaskName] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForCausalImageModeling": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "classification",
    "ForImageClassification": "image-classification",
    "Model": "embedding",
}
HOW_TO_ADD = "docs/adding-an-architecture.md"


def family_of(config: "PreTrainedConfig") -> Family:
    """Return the family of a configuration.

    Raises:
        InputError: the architecture is not supported; names it, the supported ones, and how to add one.
    """
    name = config.model_type.removeprefix(PER_LAYER_PREFIX)
    if name not in FAMILIES:
        raise InputError(
            f"architecture {config.model_type!r} ({', '.join(config.architectures or ['no class named'])}) is not "
            f"supported; supported are {', '.join(FAMILIES)}; {HOW_TO_ADD} shows how to add one"
        )
    family = FAMILIES[name]
    equal = {field: (getattr(config, other),) for field, other in family.equal.items()}
    for field, values in (family.requires | equal).items():
        attribute, _, key = field.partition(".")
        found: Any = getattr(config, attribute, None)
        found = found.get(key) if key else found
        if found not in values:
            raise InputError(f"{field}={found!r}: {name} is supported only with {' or '.join(map(repr, values))}")
    return family


def task_name(config: "PreTrainedConfig") -> TaskName:
    """Return a model's task, by the class in its configuration.

    A decoder is a language model even if the class has no head, which is then tied to the embeddings.

    Raises:
        InputError: the architecture is not supported, or not for this task.
    """
    family = family_of(config)
    decoder = "causal-lm" in family.tasks
    architectures = config.architectures or [None]
    if not isinstance(architectures, list) or not isinstance(architectures[0], str | None):
        raise InputError(f"architectures={str(architectures)[:80]}; it must be a list of class names")
    named = architectures[0]
    if named is None and decoder:
        return "causal-lm"
    for ending, task in _TASK_OF_CLASS.items():
        if named is not None and named.endswith(ending):
            task = "causal-lm" if decoder and ending == "Model" else task
            if task in family.tasks:
                return task
            break
    known = [(ending, task) for ending, task in _TASK_OF_CLASS.items() if task in family.tasks]
    supported = ", ".join(f"{task} (…{ending})" for ending, task in known if ending != "LMHeadModel")
    raise InputError(
        f"architectures={config.architectures}: {family.name} is supported for {supported}; "
        "load the model with such a class in transformers and save it"
    )


def model_prefix(config: "PreTrainedConfig") -> str:
    """Return the prefix of the base model's names in the whole model."""
    family = family_of(config)
    return f"{family.prefix}." if family.prefix and task_name(config) != "embedding" else ""


def layers_path(config: "PreTrainedConfig") -> str:
    """Return the path of the layers in the whole model."""
    return f"{model_prefix(config)}{family_of(config).layers}"


def context_of(config: "PreTrainedConfig") -> int:
    """Return the maximum number of tokens in a row, or that of every image: its patches and the tokens before them."""
    family = family_of(config)
    if family.stages is not None:
        return prod(grid_of(config))
    if family.patches is not None:
        _, height, width = image_shape(config)
        if family.patches.square and height != width:
            raise InputError(f"image_size={height} x {width}: {family.name} is supported only with square images")
        return prod(patch_grid(config)) + len(family.patches.tokens)
    reserved = config.pad_token_id + 1 if family.reserved_positions else 0
    return int(config.max_position_embeddings - reserved)


def image_shape(config: "PreTrainedConfig") -> tuple[int, int, int]:
    """Return channels, height and width of the images that a model reads. Raises InputError."""
    require_sizes(config, "num_channels")
    return (config.num_channels, *pair(config, "image_size"))


def patch_grid(config: "PreTrainedConfig") -> tuple[int, int]:
    """Return the rows and columns of patches in the images that a model reads. Raises InputError."""
    _, height, width = image_shape(config)
    patch = pair(config, "patch_size")
    return height // patch[0], width // patch[1]


def code_vocabulary(config: "PreTrainedConfig") -> CodeVocabulary | None:
    """Return the vocabulary of an image generator, or None for any other model. Raises InputError."""
    classes = family_of(config).class_tokens
    if classes is None:
        return None
    if isinstance(classes, str):
        require_sizes(config, classes)
        classes = int(getattr(config, classes))
    codes = config.vocab_size - classes - 1
    if codes < 1:
        raise InputError(f"vocab_size={config.vocab_size}: leaves no codes beside {classes} class tokens and a start")
    return CodeVocabulary(codes, classes)


def codes_per_image(config: "PreTrainedConfig") -> int:
    """Return the codes of the square images that an image generator was made for; the start takes a position, too.

    The last code need not be an input: ImageGPT has no position for it, LlamaGen has.
    """
    return isqrt(context_of(config)) ** 2


def predicted_tokens(config: "PreTrainedConfig") -> int:
    """Return the number of tokens that the model can predict: the last dimension of its logits."""
    codes = code_vocabulary(config)
    return int(config.vocab_size) if codes is None else codes.codes


def read_anatomy(config: "PreTrainedConfig") -> Anatomy:
    """Return the anatomy of a (possibly already pruned, possibly per-layer) model from its configuration.

    Raises:
        InputError: like `read_blocks`, or layers differ in the head size.
    """
    family = family_of(config)
    blocks = read_blocks(config)
    task, hidden = task_name(config), config.hidden_size
    image = image_shape(config) if family.patches else None
    head_dims = {layer_sizes(family, layer)[2] for layer in _layers(family, config)}
    if len(head_dims) != 1:
        raise InputError(f"layers differ in head_dim ({', '.join(map(str, sorted(head_dims)))}); that is not supported")
    (head_dim,) = head_dims
    prefix = model_prefix(config)
    around = tensors_around(family, config, task, prefix, context_of(config), code_vocabulary(config))
    embedding = f"{prefix}{family.embedding}"
    predicted = 0 if image else predicted_tokens(config)
    output = 0
    if task in ("causal-lm", "masked-lm"):
        output = prod(around[f"{embedding}.weight"]) // config.vocab_size * predicted
    return Anatomy(
        family=family.name,
        task=task,
        layers_path=layers_path(config),
        context=context_of(config),
        hidden_size=hidden,
        head_dim=head_dim,
        vocabulary=0 if image else config.vocab_size,
        predicted=predicted,
        image=image,
        blocks=blocks,
        around=around,
        output_parameters=output,
        bytes_per_value=dtypes.bytes_of(config.dtype),
        sliding_window=sliding_window(config),
        attention_differs=attention_differs(config),
        residual_scale=float(getattr(config, family.residual_scale)) if family.residual_scale else 1.0,
        numbering_field=numbering_field(family, config),
        mergings=_mergings(family, config),
    )


def read_blocks(config: "PreTrainedConfig") -> tuple[Block, ...]:
    """Return the blocks of a model, attention before MLP before experts, first layer first.

    Raises:
        InputError: the architecture is not supported, or its sizes contradict each other.
    """
    family = family_of(config)
    if family.experts and family.experts.step:
        require_sizes(config, family.experts.step)
    layers = _layers(family, config)
    return beside_what_is_left([block for layer in layers for block in layer_blocks(family, config, layer)])


def _layers(family: Family, config: "PreTrainedConfig") -> Iterator[Layer]:
    """Yield the layers, first to last. Raises InputError."""
    stages, inside = family.stages, layers_path(config)
    own = config.model_type.startswith(PER_LAYER_PREFIX)
    if stages is None:
        require_sizes(config, "hidden_size", "num_hidden_layers", *([] if family.patches else ["vocab_size"]))
        _check_count("num_hidden_layers", config.num_hidden_layers, config.num_hidden_layers)
        for number in range(config.num_hidden_layers):
            yield Layer(number, f"{inside}.{number}", config.per_layer_config[number], None, own)
        return
    found = read_stages(stages, config)
    _check_count(stages.depths, getattr(config, stages.depths), sum(stage.depth for stage in found))
    if config.hidden_size != found[-1].hidden_size:
        raise InputError(
            f"hidden_size={str(config.hidden_size)[:80]}: the last stage has {found[-1].hidden_size}; leave it out"
        )
    for number, place in enumerate(places(stages, config)):
        stock = SimpleNamespace(**stock_sizes(family, stages, config, place))
        sizes: Any = copy.copy(config.per_layer_config[number]) if own else stock
        sizes.hidden_size = place.stage.hidden_size
        yield Layer(number, f"{inside}.{path_of(stages, place)}", sizes, place.stage, own)


def _check_count(field: str, value: object, layers: int) -> None:
    if layers > MAXIMUM_LAYERS:
        raise InputError(f"{field}={value}; no model has more than {MAXIMUM_LAYERS} layers")


def _mergings(family: Family, config: "PreTrainedConfig") -> dict[int, str]:
    """Return the path of what merges tokens before each layer that begins a stage, except the first."""
    stages = family.stages
    if stages is None:
        return {}
    before = enumerate(read_stages(stages, config)[:-1])
    return {stage.first + stage.depth: f"{layers_path(config)}.{number}.{stages.merging}" for number, stage in before}
