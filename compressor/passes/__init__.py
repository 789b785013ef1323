"""A file per published method: chooses weights, encodings or units. Knows no ONNX."""
