from numprune.families.family import Family, Vllm, Windows, attention, gated_mlp

SMOLLM3 = Family(
    name="smollm3",
    attention=attention(bias="attention_bias", reader_bias="attention_bias"),
    mlp=gated_mlp(bias="mlp_bias"),
    per_layer={"no_rope_layers": "entry"},
    windows=Windows(fields={"use_sliding_window": True}),
    vllm=Vllm(native=False, per_layer=True),
)
