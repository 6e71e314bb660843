"""LlamaGen (Sun et al., "Autoregressive Model Beats Diffusion", 2024): a Llama that generates images code by code.

It differs from Llama in three things. The first token is a class, whose embedding belongs to the input vocabulary only:
the output has a logit for each code. Rotary embeddings are two-dimensional, over the rows and columns of the codes. At
the class, cosine and sine are both zero, so that its queries and keys are zero.
"""
