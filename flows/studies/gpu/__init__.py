"""What a GPU makes of it: checks, the time of pruning a layer, and the speed of narrower models in torch.

It runs from a checkout beside torch, transformers, numpy, scipy, safetensors, pydantic, psutil and tqdm alone.
"""
