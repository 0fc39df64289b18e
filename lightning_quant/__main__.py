"""``python -m lightning_quant``."""

from lightning_quant.app import main

main()
