"""What vLLM asks, in the process that was started, before it starts its workers and loads anything."""

from typing import Any

from numprune_vllm.sizes import check_layers, check_parallel, check_settings


class Preflight:
    """Registered beside vLLM's own; it calls both methods of the class itself."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raises ValueError when the model cannot be served in this way; vLLM would answer with a bare assertion."""
        config = vllm_config.model_config.hf_config
        if getattr(config, "quantization_config", None):
            raise ValueError(
                f"{config.model_type}: the checkpoint is quantized; only unquantized per-layer checkpoints can be "
                "compared with their configuration, so only those are served"
            )
        check_settings(config)
        check_layers(config)
        check_parallel(config, vllm_config.parallel_config.tensor_parallel_size)

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing to say that early: how the model is split is not known yet."""
