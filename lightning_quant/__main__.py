"""``python -m lightning_quant``."""

from lightning_quant.cli.app import main

main()
