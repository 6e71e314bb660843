from dataclasses import replace

from numprune.families.family import Vllm
from numprune.families.llama import LLAMA

LLAMAGEN = replace(
    LLAMA,
    name="llamagen",
    stock_heads="any",  # in numprune's own configuration, see numprune/llamagen
    stand_in=None,
    windows=None,
    class_tokens="num_classes",
    requires={"tie_word_embeddings": (False,), "rope_parameters.rope_type": ("default",)},
    vllm=Vllm(native=False, backend=False),
)
