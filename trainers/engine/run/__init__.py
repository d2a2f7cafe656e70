"""The run folder `runs/<name>/`: ownership, report, progress, pictures, card."""
