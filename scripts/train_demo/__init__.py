"""Training of the demonstration checkpoints: `scripts/train_demo.sh`."""
