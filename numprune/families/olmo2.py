from numprune.families.family import Family, Vllm, attention, gated_mlp

OLMO2 = Family(
    name="olmo2",
    attention=attention(
        bias="attention_bias",
        reader_bias="attention_bias",
        norms=("post_attention_layernorm",),
        joint_norms=("self_attn.q_norm", "self_attn.k_norm"),
        norm_behind=True,
    ),
    mlp=gated_mlp(norms=("post_feedforward_layernorm",), norm_behind=True),
    vllm=Vllm(native=False, per_layer=True),
)
