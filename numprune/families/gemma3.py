from dataclasses import replace

from numprune.families.family import Family, Vllm
from numprune.families.gemma2 import ATTENTION, MLP

GEMMA3 = Family(
    name="gemma3_text",
    attention=replace(ATTENTION, head_norms=("self_attn.q_norm", "self_attn.k_norm")),
    mlp=MLP,
    scales_embeddings=True,
    stock_heads="divisors",
    requires={"use_bidirectional_attention": (None, False)},
    vllm=Vllm(per_layer=True),
)
