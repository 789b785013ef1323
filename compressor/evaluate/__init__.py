"""Quality, speed and size of the exported artifact, always measured in onnxruntime, beside the original's."""
