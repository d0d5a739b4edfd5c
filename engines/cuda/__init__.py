"""CUDA streams, turns of threads on a device, CUDA graphs and their memory."""
