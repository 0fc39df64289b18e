"""Places where an exported network can run: a real phone, the NPU's emulator, this machine."""
