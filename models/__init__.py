"""HorNet models: importing this package registers them with timm."""
from models.gnconv import GlobalLocalFilter, GnConv
from models.hornet import CONFIGS, HorNet

MODEL_NAMES = tuple(CONFIGS)

__all__ = ["MODEL_NAMES", "GlobalLocalFilter", "GnConv", "HorNet", "list_models"]


def list_models() -> list[str]:
    """Names that `timm.create_model` accepts for this project, the published ones first."""
    return list(MODEL_NAMES)
