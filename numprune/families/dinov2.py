"""DINOv2: ViT with a factor for each coordinate behind every block, and in the giant model an MLP with a gate."""

from numprune.families.family import Family, Patches, Vllm, attention, gated_mlp, linear, plain_mlp

DINOV2 = Family(
    name="dinov2",
    prefix="dinov2",
    attention=attention(
        bias="qkv_bias",
        reader_bias=True,
        norms=("norm1",),
        scale="layer_scale1.lambda1",
        module="attention",
        sizes={"attention.num_attention_heads": "heads"},
        scores="qk_head_dim",
    ),
    mlp=plain_mlp("mlp.fc1", "mlp.fc2", bias=True, norms=("norm2",), scale="layer_scale2.lambda1", modules=("mlp",)),
    gated=("use_swiglu_ffn", gated_mlp(bias=True, norms=("norm2",), scale="layer_scale2.lambda1")),
    ratio="mlp_ratio",
    tasks=("image-classification",),
    layers="encoder.layer",
    embedding="embeddings.patch_embeddings.projection",
    patches=Patches(
        tokens=("embeddings.cls_token",),
        positions="embeddings.position_embeddings",
        masked="embeddings.mask_token",
        square=True,
    ),
    final_norm="layernorm",
    # It reads the class token beside the mean of the patches.
    heads_of={"image-classification": linear("classifier", "num_labels", "2 * hidden_size")},
    kv_heads=None,
    norm_bias=True,
    indexed=False,
    renamed={
        **{f"attention.{part[0]}_proj": f"attention.attention.{part}" for part in ("query", "key", "value")},
        "attention.o_proj": "attention.output.dense",
        "mlp.gate_proj": "mlp.weights_in",  # one matrix, with the gates of all channels first
        "mlp.up_proj": "mlp.weights_in",
        "mlp.down_proj": "mlp.weights_out",
    },
    computed=(),
    vllm=Vllm(native=False, backend=False),
)
