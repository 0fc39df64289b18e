"""Quantization for PyTorch Lightning: from a float network to integers proven against the device."""
