"""Compare decoding in ONNX Runtime by numprune's export, onnxruntime-genai's own builder, and PyTorch."""
