from numprune.families.family import Family, Vllm, Windows, attention, gated_mlp

QWEN2 = Family(
    name="qwen2",
    attention=attention(bias=True),
    mlp=gated_mlp(),
    per_layer={"max_window_layers": "first"},
    # vLLM's own class ignores windows in some layers, unless max_window_layers differs from the number of layers: then
    # it refuses the model.
    windows=Windows(fields={"use_sliding_window": True, "max_window_layers": 0}),
    vllm=Vllm(
        takes_head_dim=False,
        native_unless=("use_sliding_window",),
        per_layer=True,
        layers_as=("llama", {"qkv_bias": True}),
    ),
)
