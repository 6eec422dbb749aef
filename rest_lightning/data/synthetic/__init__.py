"""Synthetic talkers: rendered faces driven by synthesised speech."""
