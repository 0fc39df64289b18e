"""The simulation at the speed of training in float: fused fake quantization, and layers without detours around it."""
