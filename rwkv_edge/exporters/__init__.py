"""From models to files: ONNX graphs and their weights."""
