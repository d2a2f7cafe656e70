"""The parts of launch/benchmark.py: set-ups, runs, summary, and what is shown."""
