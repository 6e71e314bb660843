"""vLLM plug-in for decoders whose layers differ in size, and a loader that compares weights with the configuration.

vLLM finds `register` by its entry point.
"""

__version__ = "0.1.0"


def register() -> None:
    """Tell transformers and vLLM of numprune's model types and of the loader (`--load-format numprune`).

    vLLM calls this in each of its processes, perhaps repeatedly. The model classes are named, not imported: vLLM
    imports them when needed, after choosing its device.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    try:
        from numprune_vllm.architectures import ARCHITECTURES
    except ModuleNotFoundError as error:
        if error.name != "numprune":
            raise
        raise ImportError(
            "numprune-vllm needs numprune in the same environment: pip install --no-deps numprune"
        ) from None
    from numprune_vllm.loader import AuditingLoader
    from numprune_vllm.preflight import Preflight

    for architecture in ARCHITECTURES:
        MODELS_CONFIG_MAP[architecture] = Preflight
        ModelRegistry.register_model(architecture, f"numprune_vllm.models:{architecture}")
    register_model_loader("numprune")(AuditingLoader)
