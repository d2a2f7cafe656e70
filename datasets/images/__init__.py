"""From image files to batches: read, workers, loaders, cache, unreadable."""
