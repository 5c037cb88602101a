"""The models for other repositories: `torch.hub.load(<this repository>, "hornet_tiny_7x7", num_classes=10)`.

Keyword arguments are those of `timm.create_model`; `pretrained=True` fetches the published weights.
"""
from models import hornet as _hornet

dependencies = ["torch", "torchvision", "timm"]
globals().update({name: getattr(_hornet, name) for name in _hornet.CONFIGS})
