"""deixis: run pixel-aligned language models from a bundle, without PyTorch."""
