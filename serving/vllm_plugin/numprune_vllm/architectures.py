"""The model classes that vLLM does not know: numprune's per-layer ones, by the name that config.json gives."""

from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import numprune.modeling  # noqa: F401 - registers the per-layer classes with transformers
from numprune.anatomy import PER_LAYER_PREFIX
from numprune.families import FAMILIES, Family

ARCHITECTURES: dict[str, Family] = {
    AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[PER_LAYER_PREFIX + name]].__name__: family
    for name, family in FAMILIES.items()
    if family.vllm.per_layer
}
