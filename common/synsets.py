"""The order of ImageNet's classes: rows of the published heads as WordNet synsets, from timm's lists."""
import importlib.resources
from functools import cache


def _timm_list(name: str) -> tuple[str, ...]:
    return tuple((importlib.resources.files("timm.data") / "_info" / name).read_text().split())


@cache
def imagenet_synsets() -> tuple[str, ...]:
    """The 1000 synsets of ImageNet-1k in the order of its labels."""
    return _timm_list("imagenet_synsets.txt")


@cache
def published_22k_synsets() -> tuple[str, ...]:
    """The 10,459 classes of the published 22k heads: timm's 10,450 of the MIIL winter-21 list, then the nine
    ImageNet-1k synsets missing from it."""
    listed = _timm_list("imagenet21k_miil_w21_synsets.txt")
    known = set(listed)
    added = tuple(synset for synset in imagenet_synsets() if synset not in known)
    # In ImageNet-1k order: rows 10450 to 10458.
    if (len(added), added[0], added[-1]) != (9, "n02085782", "n04399382"):
        raise RuntimeError("timm's class lists have changed: the 10,459 classes have no published order")
    return listed + added
