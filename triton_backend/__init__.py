"""Bundles on Triton Inference Server: the model repository that it reads, and the Python model that it runs."""
