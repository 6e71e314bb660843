from numprune.families.family import Family, Vllm, attention, plain_mlp

OPT = Family(
    name="opt",
    attention=attention(
        bias="enable_bias",
        reader_bias="enable_bias",
        reader="out_proj",
        norms=("self_attn_layer_norm",),
        sizes={"self_attn.num_heads": "groups"},
    ),
    mlp=plain_mlp("fc1", "fc2", bias="enable_bias", norms=("final_layer_norm",), modules=("fc1", "fc2")),
    layers="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    positions=("model.decoder.embed_positions", 2),
    final_norm="model.decoder.final_layer_norm",
    kv_heads=None,
    width="ffn_dim",
    norm_bias=True,
    stock_heads="all",
    requires={
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,),
        "layer_norm_elementwise_affine": (True,),
    },
    equal={"word_embed_proj_dim": "hidden_size"},
    vllm=Vllm(per_layer=True),
)
