"""Plain PyTorch networks; nothing in here imports Lightning."""
