"""Latency of a bundle on this machine, beside the alternatives that are installed (``hypersd bench``)."""
