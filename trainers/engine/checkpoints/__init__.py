"""Checkpoints: save, load, snapshot, files, weights."""
