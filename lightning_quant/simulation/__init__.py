"""From a float ``nn.Module`` to a quantized simulation and its calibration. Knows nothing of Lightning."""
