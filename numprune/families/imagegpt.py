from dataclasses import replace

from numprune.families.family import Family, Vllm
from numprune.families.gpt2 import GPT2

IMAGEGPT = Family(
    name="imagegpt",
    attention=replace(GPT2.attention, sizes={"attn.split_size": "channels", "attn.num_heads": "groups"}),
    mlp=GPT2.mlp,
    layers=GPT2.layers,
    embedding=GPT2.embedding,
    positions=GPT2.positions,
    final_norm=GPT2.final_norm,
    heads=GPT2.heads,
    kv_heads=None,
    width=GPT2.width,
    default_width=GPT2.default_width,
    transposed=True,
    stock_heads="all",
    class_tokens=0,
    returns_tuple=True,
    requires={**GPT2.requires, "tie_word_embeddings": (False,)},
    attention_implementation="eager",
    per_layer=GPT2.per_layer,
    computed=GPT2.computed,
    vllm=Vllm(native=False, backend=False),
)
