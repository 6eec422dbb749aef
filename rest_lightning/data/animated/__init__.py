"""Photographs become training talkers: a driver's face moves a portrait's mesh."""
