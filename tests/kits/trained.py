"""Small models that look trained, and their checkpoints."""
from pathlib import Path

import timm
import torch

import models  # noqa: F401  registers the models
from tests.kits.fill import parity_tensor


def lively(name: str = "hornet_pico_gf", classes: int = 4, seed: int = 0, **kwargs) -> torch.nn.Module:
    """A model whose branches all matter: fresh models have layer scale 1e-6, which hides every mistake."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=classes, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def filled(name: str, seed: int = 0, **kwargs) -> torch.nn.Module:
    """A model in evaluation mode with the weights behind the stored figures."""
    model = timm.create_model(name, **kwargs).eval()
    model.load_state_dict({key: torch.from_numpy(parity_tensor(key, tuple(value.shape), seed))
                           for key, value in model.state_dict().items()})
    return model


def checkpoint(path: Path, raw: torch.nn.Module, ema: torch.nn.Module | None = None, *, classes=None,
               scored="model", **args) -> Path:
    """A checkpoint of this project's format at `path`, with the options `args` in it."""
    content = {"format": 2, "model": raw.state_dict(), "classes": classes, "scored": scored, "args": args}
    torch.save(content | ({"model_ema": ema.state_dict()} if ema else {}), path)
    return path
