"""ONNX graphs as a source: their layers, and running what lies between them."""
