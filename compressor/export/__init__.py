"""ONNX graphs over encoded tensors."""
