"""TensorRT and TensorRT-RTX: building plans, keeping them in a bundle, and running them."""
