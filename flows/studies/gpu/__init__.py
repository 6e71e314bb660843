"""Checks and measurements on a GPU: the time of pruning a layer, and the speed of narrower models in torch.

It runs from a checkout with only torch, transformers, numpy, scipy, safetensors, pydantic, psutil and tqdm installed.
"""
