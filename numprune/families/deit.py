"""DeiT: ViT with a second token, for distillation."""

from numprune.families.family import Family, Patches
from numprune.families.vit import VIT_LAYER

DEIT = Family(
    name="deit",
    prefix="deit",
    patches=Patches(
        tokens=("embeddings.cls_token", "embeddings.distillation_token"), positions="embeddings.position_embeddings"
    ),
    **VIT_LAYER,
)
