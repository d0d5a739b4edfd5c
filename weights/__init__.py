"""Weight files: safetensors, the layouts of LoRA files, and LoRA arithmetic."""
