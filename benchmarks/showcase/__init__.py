"""Networks of several domains with genuine weights, from float to the emulated NPU: `make showcase`."""
