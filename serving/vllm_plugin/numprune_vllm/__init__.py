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
    _compute_as_quantized()


def _compute_as_quantized() -> None:
    """Keep activations in half precision where only weights have 4 bits, unless the user has asked for 8 bits.

    On CPUs with AMX, vLLM otherwise rounds them to 8 bits, which no checkpoint asks for. Its kernel for half precision
    needs the permission to use AMX, which vLLM does not request; without it, the process ends with SIGILL. Where
    the system refuses it, vLLM's default stays, and the server check judges the result.
    """
    import os

    import torch

    if not torch.cpu._is_amx_tile_supported() or torch.cpu._init_amx():
        os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")
