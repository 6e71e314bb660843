from numprune.families.family import Family, Matrix, Vllm, Wiring

PHI3 = Family(
    name="phi3",
    attention=Wiring(
        writers=(Matrix("self_attn.qkv_proj", ("query", "key", "value")),),
        reader=Matrix("self_attn.o_proj", ("query",)),
        modules=("self_attn",),
        norms=("input_layernorm",),
        sizes={
            "self_attn.num_key_value_heads": "groups",
            "self_attn.num_key_value_groups": "heads per group",
            "self_attn.config.num_attention_heads": "heads",
        },
    ),
    mlp=Wiring(
        writers=(Matrix("mlp.gate_up_proj", ("gate", "up")),),
        reader=Matrix("mlp.down_proj", ("up",)),
        modules=("mlp",),
        norms=("post_attention_layernorm",),
    ),
    requires={"rope_parameters.rope_type": ("default",)},  # the others have a table as long as half a head
    vllm=Vllm(per_layer=True),
)
