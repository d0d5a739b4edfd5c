"""TensorRT and TensorRT-RTX: plans are built, kept in a bundle, and run."""
