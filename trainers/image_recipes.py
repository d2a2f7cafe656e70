"""The recipes of image_folder.py. Those with an accuracy, of one crop of ImageNet's 50,000 validation images, are those
of papers and torchvision; none was trained here, nor is the same to the bit: both mixings draw for each pair."""

from typing import Any

CROPPED: dict[str, Any] = {"fit": "crop", "random_crop": 0.08, "flip": "random", "image_size": 224}
NEW_TORCHVISION: dict[str, Any] = {  # of its references since 2021; EMA's decay there is 0.99891 for each 32 steps
    **CROPPED, "epochs": 600, "batch_size": 1024, "no_decay": ("norm",), "schedule": "cosine", "warmup_epochs": 5.0,
    "label_smoothing": 0.1, "mixup": 0.2, "cutmix": 1.0, "auto_augment": "trivialaugment", "random_erase": 0.1,
    "train_size": 176, "interpolation": "bilinear", "ema_decay": 0.999966,
}

RECIPES: dict[str, dict[str, Any]] = {
    "fast": {
        "epochs": 10, "batch_size": 32, "learning_rate": 0.02, "momentum": 0.9, "nesterov": True,
        "weight_decay": 0.0005, "schedule": "onecycle", "shift": 1, "flip": "alternating"},
    "cheatsheet": {"epochs": 10, "batch_size": 8, "learning_rate": 0.01, "momentum": 0.0, "normalize": "none"},
    "finetune": {
        "model": "resnet18", "fit": "crop", "epochs": 5, "batch_size": 32, "learning_rate": 0.005, "momentum": 0.9,
        "nesterov": True, "weight_decay": 0.0001, "schedule": "cosine", "random_crop": 0.35, "flip": "random",
        "channels_last": True},
    "resnet50-classic": {  # 76.1 %: torchvision's IMAGENET1K_V1
        **CROPPED, "model": "resnet50", "epochs": 90, "batch_size": 256, "learning_rate": 0.1, "momentum": 0.9,
        "weight_decay": 0.0001, "schedule": "step", "milestones": (30, 60), "resize_size": 256, "channels_last": True},
    "resnet50-tv2": {  # 80.9 %: torchvision's IMAGENET1K_V2, which had repeated augmentation too
        **NEW_TORCHVISION, "model": "resnet50", "learning_rate": 0.5, "momentum": 0.9, "weight_decay": 0.00002,
        "resize_size": 232, "channels_last": True},
    "resnet50-a3": {  # 78.1 %: ResNet strikes back (Wightman et al., 2021); its magnitude is 6 of 10
        **CROPPED, "model": "resnet50", "epochs": 100, "batch_size": 2048, "optimizer": "timm/lamb",
        "learning_rate": 0.008, "weight_decay": 0.02, "no_decay": ("norm", "bias"), "schedule": "cosine",
        "warmup_epochs": 5.0, "loss": "bce", "mixup": 0.1, "cutmix": 1.0, "auto_augment": "randaugment",
        "augment_magnitude": 18, "train_size": 160, "resize_size": 235, "interpolation": "bicubic",
        "channels_last": True},
    "convnext-t": {  # 82.5 %: torchvision's IMAGENET1K_V1, which had repeated augmentation too
        **NEW_TORCHVISION, "model": "convnext_tiny", "optimizer": "adamw", "learning_rate": 0.001,
        "weight_decay": 0.05, "resize_size": 236, "channels_last": True},
    "vit-s": {  # 79.8 %: DeiT-S (Touvron et al., 2021), which had repeated augmentation too; its magnitude is 9 of 10
        **CROPPED, "model": "timm/vit_small_patch16_224", "model_options": ("drop_path_rate=0.1",), "epochs": 300,
        "batch_size": 1024, "optimizer": "adamw", "learning_rate": 0.001, "min_lr": 1e-5, "weight_decay": 0.05,
        "no_decay": ("norm", "bias", "pos_embed", "cls_token"), "schedule": "cosine", "warmup_epochs": 5.0,
        "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "auto_augment": "randaugment", "augment_magnitude": 27,
        "random_erase": 0.25, "resize_size": 256, "interpolation": "bicubic"}}
