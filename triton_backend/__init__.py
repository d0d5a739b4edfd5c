"""Bundles on Triton Inference Server: its model repository, and the Python model that it runs."""
