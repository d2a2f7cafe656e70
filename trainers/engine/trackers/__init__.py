"""Experiment trackers behind one protocol: `--track wandb mlflow trackio tensorboard`."""
