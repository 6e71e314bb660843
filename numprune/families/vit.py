"""ViT, and the parts that DeiT shares with it."""

from typing import Any

from numprune.families.family import Family, Patches, Vllm, attention, linear, plain_mlp

VIT_LAYER: dict[str, Any] = {
    "attention": attention(
        bias="qkv_bias",
        reader_bias=True,
        norms=("layernorm_before",),
        module="attention",
        sizes={"attention.num_attention_heads": "heads"},
        scores="qk_head_dim",
    ),
    "mlp": plain_mlp("mlp.fc1", "mlp.fc2", bias=True, norms=("layernorm_after",), modules=("mlp",)),
    "tasks": ("image-classification",),
    "layers": "layers",
    "embedding": "embeddings.patch_embeddings.projection",
    "final_norm": "layernorm",
    "heads_of": {"image-classification": linear("classifier", "num_labels", "hidden_size")},
    "kv_heads": None,
    "norm_bias": True,
    "indexed": False,
    "renamed": {
        ".layers.": ".encoder.layer.",
        **{f"attention.{part[0]}_proj": f"attention.attention.{part}" for part in ("query", "key", "value")},
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    "computed": ("pooler.dense.weight", "pooler.dense.bias"),  # a checkpoint for another task may still contain them
    "vllm": Vllm(native=False, backend=False),
}

VIT = Family(
    name="vit",
    prefix="vit",
    patches=Patches(tokens=("embeddings.cls_token",), positions="embeddings.position_embeddings"),
    **VIT_LAYER,
)
