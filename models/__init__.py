"""HorNet models: importing this package registers them with timm."""
from models.gnconv import GlobalLocalFilter, GnConv
from models.hornet import HorNet
from models.zoo import MODEL_NAMES

__all__ = ["MODEL_NAMES", "GlobalLocalFilter", "GnConv", "HorNet"]
