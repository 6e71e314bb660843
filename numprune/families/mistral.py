from numprune.families.family import Family, Vllm, Windows, attention, gated_mlp

MISTRAL = Family(
    name="mistral",
    attention=attention(),
    mlp=gated_mlp(),
    windows=Windows("smollm3", fields={"use_sliding_window": True}, entries={"no_rope_layers": 1}),
    vllm=Vllm(per_layer=True),
)
