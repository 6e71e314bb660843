"""What vLLM asks, in the process that was started, before it starts its workers and loads anything."""

from typing import Any

from numprune_vllm.sizes import check_layers, check_parallel, check_quantization, check_settings


class Preflight:
    """Registered beside vLLM's own; it calls both methods of the class itself."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raises ValueError when the model cannot be served in this way; vLLM would answer with a bare assertion."""
        config = vllm_config.model_config.hf_config
        check_settings(config)
        check_layers(config)
        ranks = vllm_config.parallel_config.tensor_parallel_size
        check_parallel(config, ranks)
        check_quantization(config, ranks)

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing to say that early: how the model is split is not known yet."""
