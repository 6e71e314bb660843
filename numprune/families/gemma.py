from numprune.families.family import Family, Vllm, attention, gated_mlp

GEMMA = Family(
    name="gemma",
    attention=attention(bias="attention_bias", reader_bias="attention_bias"),
    mlp=gated_mlp(),
    scales_embeddings=True,
    requires={"use_bidirectional_attention": (None, False)},
    vllm=Vllm(native_unless=("attention_bias",), per_layer=True),
)
