from numprune.families.family import Family, Vllm, attention, gated_mlp

MISTRAL = Family(name="mistral", attention=attention(), mlp=gated_mlp(), vllm=Vllm(per_layer=True))
