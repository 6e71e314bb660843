"""Checks that vLLM calls in the main process before it starts workers and loads anything."""

from typing import Any

from numprune_vllm.sizes import check_layers, check_parallel, check_quantization, check_settings


class Preflight:
    """Registered beside vLLM's own checks; vLLM calls both methods on the class."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raises ValueError if the model cannot be served in this way; vLLM would fail with a bare assertion."""
        config = vllm_config.model_config.hf_config
        check_settings(config)
        check_layers(config)
        ranks = vllm_config.parallel_config.tensor_parallel_size
        check_parallel(config, ranks)
        check_quantization(config, ranks)

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing to check yet: the parallel configuration is not known."""
