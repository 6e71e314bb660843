"""From a checkpoint to artifacts that other programs run, and the proof that they compute the same.

`manifest` creates and verifies artifact folders; `checkpoint` reads, writes and audits Hugging Face folders; `vllm`,
`onnx`, `genai` and `tensorrt` each write one format; `runtimes` runs what they wrote; `parity` compares a runtime with
the checkpoint and blocks. This package imports `numprune` (the core) and nothing else of ours.

Notation used for tensor shapes:
    B   batch: rows that run together
    S   new tokens per row in this call (the prompt's length at prefill, 1 at decode)
    P   past: positions already in the KV cache
    T   total = P + S: what attention_mask spans
    V   vocabulary
    N_l KV heads of layer l (layers may differ)
    D   head dimension
"""
