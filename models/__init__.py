"""HorNet models: importing this package registers them with timm."""
from models.gnconv import GlobalLocalFilter, GnConv
from models.hornet import CONFIGS, HorNet

MODEL_NAMES = tuple(CONFIGS)  # what `timm.create_model` accepts of this project, the published ones first

__all__ = ["MODEL_NAMES", "GlobalLocalFilter", "GnConv", "HorNet"]
