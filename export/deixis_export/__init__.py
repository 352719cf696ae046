"""From a checkpoint to a bundle of ONNX graphs, checked against the PyTorch model."""
