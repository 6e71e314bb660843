from numprune.families.family import Family, Matrix, Vllm, Wiring, plain_mlp

GPT2 = Family(
    name="gpt2",
    attention=Wiring(
        writers=(Matrix("attn.c_attn", ("query", "key", "value"), bias=True),),
        reader=Matrix("attn.c_proj", ("query",), bias=True),
        modules=("attn",),
        norms=("ln_1",),
        sizes={"attn.split_size": "channels"},
    ),
    mlp=plain_mlp("mlp.c_fc", "mlp.c_proj", bias=True, norms=("ln_2",), modules=("mlp",)),
    layers="transformer.h",
    embedding="transformer.wte",
    positions=("transformer.wpe", 0),
    final_norm="transformer.ln_f",
    heads="n_head",
    kv_heads=None,
    width="n_inner",
    default_width=4,
    norm_bias=True,
    transposed=True,
    stock_heads="all",
    requires={"add_cross_attention": (False,)},
    per_layer={"scale_attn_by_inverse_layer_idx": "index"},
    computed=(".attn.bias", ".attn.masked_bias"),
    vllm=Vllm(
        native_unless=("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
        backend=False,
        per_layer=True,
    ),
)
