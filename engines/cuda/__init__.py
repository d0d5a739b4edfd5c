"""CUDA streams, turns of threads on a device, and CUDA graphs."""
