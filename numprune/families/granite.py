from numprune.families.family import Family, Vllm, attention, gated_mlp

GRANITE = Family(
    name="granite",
    attention=attention(bias="attention_bias", reader_bias="attention_bias"),
    mlp=gated_mlp(bias="mlp_bias"),
    residual_scale="residual_multiplier",
    vllm=Vllm(per_layer=True),
)
