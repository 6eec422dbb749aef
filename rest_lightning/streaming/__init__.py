"""The streaming engine: audio in, frames out, constant cost per chunk."""
