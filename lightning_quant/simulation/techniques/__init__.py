"""Repairs of a quantized network that need no labels and no training: one file each, one protocol for all.

:class:`~lightning_quant.simulation.techniques.technique.Technique` is the protocol, ``registry`` knows the names.
"""
