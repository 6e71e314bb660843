"""Export checkpoints to vLLM, ONNX and TensorRT, and prove that each export computes what the checkpoint computes.

`manifest` creates and verifies artifact folders; `checkpoint` reads, writes and audits Hugging Face folders; `vllm`,
`onnx`, `genai` and `tensorrt` each write one format; `runtimes` runs the exports; `parity` compares a runtime with the
checkpoint and blocks on a difference. Of this project, the package imports only `numprune` (the core).

Notation used for tensor shapes:
    B   batch size
    S   new tokens per row in this call (the prompt's length at prefill, 1 at decode)
    P   past: positions already in the KV cache
    T   total = P + S: the length of attention_mask
    V   vocabulary
    N_l KV heads of layer l (layers may differ)
    D   head dimension
"""
