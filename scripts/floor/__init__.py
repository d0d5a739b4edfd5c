"""Counting of work in ONNX graphs and measurement of a machine's rates, for ``measure_floor.py``."""
