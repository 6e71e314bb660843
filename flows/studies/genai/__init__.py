"""How fast ONNX Runtime decodes a model as numprune exports it, beside onnxruntime-genai's own builder and PyTorch."""
