"""The caches of torchvision and timm, filled by hand, where there is no network."""

from pathlib import Path

import safetensors.torch
import torch
from torch import nn


def no_network(tmp_path: Path) -> dict[str, str]:
    """An environment with empty caches, where every connection is refused at once."""
    return {"TORCH_HOME": str(tmp_path / "torch"), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1",
            "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}


def fill_torch(home: Path, url: str, model: nn.Module) -> Path:
    """Put weights where torch.hub has those of an address; returns the file."""
    path = home / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return path


def fill_hub(cache: Path, repository: str, model: nn.Module) -> None:
    """The layout of huggingface_hub's cache."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    safetensors.torch.save_file(model.state_dict(), snapshot / "model.safetensors")
