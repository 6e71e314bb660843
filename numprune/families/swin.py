"""Swin: stages of layers whose attention is in windows, with a table of biases by relative position."""

from numprune.families.family import Family, Patches, Stages, Vllm, attention, linear, norm, plain_mlp

SWIN = Family(
    name="swin",
    attention=attention(
        bias="qkv_bias",
        reader_bias=True,
        norms=("layernorm_before",),
        module="attention",
        tables=("attention.relative_position_bias.relative_position_bias_table",),
        sizes={"attention.num_attention_heads": "heads"},
    ),
    mlp=plain_mlp("mlp.fc1", "mlp.fc2", bias=True, norms=("layernorm_after",), modules=("mlp",)),
    tasks=("image-classification",),
    prefix="swin",
    layers="encoder.layers",
    embedding="embeddings.patch_embeddings.projection",
    final_norm="layernorm",
    patches=Patches(tokens=(), positions=None),
    stages=Stages(
        layers="blocks",
        merging="downsample",
        norm="norm",
        reduction="reduction",
        depths="depths",
        heads="num_heads",
        width="embed_dim",
        ratio="mlp_ratio",
        window="window_size",
    ),
    around=norm("embeddings.norm", "embed_dim"),
    heads_of={"image-classification": linear("classifier", "num_labels", "hidden_size")},
    kv_heads=None,
    norm_bias=True,
    indexed=False,
    returns_tuple=True,
    stock_heads="all",
    requires={"use_absolute_embeddings": (False,)},
    per_layer={"depths": "index"},  # every second layer of a stage shifts its windows
    renamed={
        **{f"attention.{part[0]}_proj": f"attention.self.{part}" for part in ("query", "key", "value")},
        "attention.relative_position_bias.": "attention.self.",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    computed=(),
    vllm=Vllm(native=False, backend=False),
)
