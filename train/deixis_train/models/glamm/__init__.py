"""GLaMM in PyTorch, part by part; sizes in `config`, put together in `glamm`."""
