"""TensorRT, in its two flavours: building plans, keeping them in a bundle, and running them."""
