"""CUDA: streams and turns on a device, and graphs of what is enqueued there."""
