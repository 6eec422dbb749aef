"""Prepared clips: layout, reading, the data module, and the makers of data sets."""
