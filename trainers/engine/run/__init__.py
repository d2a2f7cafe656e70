"""The run folder `runs/<name>/`: folder, ownership, report, progress, pictures, card."""
