"""What a user adds to a Trainer. Thin: the algorithms are in :mod:`lightning_quant.simulation`."""
