"""numprune's per-layer model classes, which vLLM does not know, by their names in config.json."""

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
