from numprune.families.family import Family, Vllm, attention, gated_mlp

STABLELM = Family(
    name="stablelm",
    attention=attention(
        bias="use_qkv_bias",
        sizes={
            "self_attn.num_heads": "heads",
            "self_attn.num_key_value_heads": "groups",
            "self_attn.num_key_value_groups": "heads per group",
        },
    ),
    mlp=gated_mlp(),
    norm_bias=True,
    stock_heads="all",
    requires={
        "use_parallel_residual": (False,),  # both blocks would share one norm
        "qk_layernorm": (False,),  # each head would have a norm of its own
        "hidden_act": ("silu",),  # vLLM's class computes no other, whatever the configuration says
    },
    vllm=Vllm(per_layer=True),
)
