"""The recipes of image_folder.py."""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "fast": {
        "epochs": 10, "batch_size": 32, "learning_rate": 0.02, "momentum": 0.9, "nesterov": True,
        "weight_decay": 0.0005, "schedule": "onecycle", "shift": 1, "flip": "alternating",
    },
    "cheatsheet": {"epochs": 10, "batch_size": 8, "learning_rate": 0.01, "momentum": 0.0, "normalize": "none"},
    "finetune": {
        "model": "resnet18", "fit": "crop", "epochs": 5, "batch_size": 32, "learning_rate": 0.005, "momentum": 0.9,
        "nesterov": True, "weight_decay": 0.0001, "schedule": "cosine", "random_crop": 0.35, "flip": "random",
        "channels_last": True,
    },
}
