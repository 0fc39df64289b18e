"""What only a CUDA GPU can show: `make check-gpu`."""
