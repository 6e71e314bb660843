from numprune.families.family import Family, Matrix, Vllm, Wiring, plain_mlp

GPT_NEOX = Family(
    name="gpt_neox",
    attention=Wiring(
        writers=(Matrix("attention.query_key_value", ("query", "key", "value"), bias="attention_bias"),),
        reader=Matrix("attention.dense", ("query",), bias="attention_bias"),
        modules=("attention",),
        norms=("input_layernorm",),
    ),
    mlp=plain_mlp(
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
        bias=True,
        norms=("post_attention_layernorm",),
        modules=("mlp",),
    ),
    layers="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    kv_heads=None,
    norm_bias=True,
    interleaved=True,
    parallel="use_parallel_residual",
    stock_heads="all",
    renamed={"lm_head.": "embed_out."},
    computed=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
    vllm=Vllm(native=False, per_layer=True),
)
