"""vLLM's safetensors loader, which first compares the files with the served configuration.

vLLM calls its loader at startup and whenever weights are reloaded. Mismatches are refused before anything changes, so a
server keeps the weights that it has.
"""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from numprune_vllm.sizes import expected_tensors
from numprune_vllm.weights import audit


class AuditingLoader(DefaultModelLoader):
    """For local folders of decoders, uniform and per layer, whichever class of vLLM runs them."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(replace(load_config, load_format="safetensors"))

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Generator[tuple[str, Tensor], None, None]:
        """Raises ValueError naming the tensor, immediately rather than on the first item."""
        audit(Path(model_config.model), expected_tensors(model_config.hf_config))
        return super().get_all_weights(model_config, model)
