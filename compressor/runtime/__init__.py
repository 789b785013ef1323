"""Other processes: onnxruntime's sessions, a batch's workers, torchrun."""
