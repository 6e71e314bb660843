"""The configuration of LlamaGen, registered with `AutoConfig`. torch is not needed."""

from math import isqrt

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig


@strict
class LlamaGenConfig(LlamaConfig):
    """A Llama configuration with classes.

    `vocab_size` counts codes, classes and the token of an image without a class; `max_position_embeddings` is the
    class's position and one for each code of a square image.
    """

    model_type = "llamagen"

    vocab_size: int = 16384 + 1000 + 1
    max_position_embeddings: int = 1 + 16 * 16
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    num_classes: int = 1000

    @property
    def grid(self) -> int:
        """Rows, and columns, of an image's codes. Raises ValueError."""
        side = isqrt(max(0, self.max_position_embeddings - 1))
        if side < 1 or side * side != self.max_position_embeddings - 1:
            raise ValueError(
                f"max_position_embeddings={self.max_position_embeddings}: must be 1 and the codes of a square image"
            )
        return side

    def validate_architecture(self) -> None:
        """Check what `@strict` validates; other than in Llama, heads need not fill the hidden size."""
        _ = self.grid
        if self.head_dim % 4:
            raise ValueError(f"head_dim={self.head_dim}: must be a multiple of 4, for rows and columns")


AutoConfig.register(LlamaGenConfig.model_type, LlamaGenConfig)
