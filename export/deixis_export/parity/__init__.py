"""Compares our models with golden vectors: `python -m deixis_export.parity DIR [--through torch|onnx]`."""
