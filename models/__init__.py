"""HorNet models: importing this package registers them with timm; `load` reads a trained one."""
from models.gnconv import GlobalLocalFilter, GnConv
from models.hornet import HorNet
from models.trained import load
from models.zoo import MODEL_NAMES

__all__ = ["MODEL_NAMES", "GlobalLocalFilter", "GnConv", "HorNet", "load"]
