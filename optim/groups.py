"""Parameter groups: which tensors decay, and each layer's learning-rate scale, from names and shapes
alone."""
import re
from collections.abc import Callable, Iterable

from torch import nn

_STAGE_THREE_BLOCK = re.compile(r"^stages\.2\.(\d+)\.")


def count_layers(names: Iterable[str]) -> int:
    """Layers below the head, 12 for the published depths (2, 3, 18, 2).

    Stem 0, first two stages 1 and 2, third stage from 3 on with two blocks each, last stage. A third stage of
    another depth has half as many layers as blocks, and never more than the published nine.
    """
    blocks = [int(match[1]) for match in map(_STAGE_THREE_BLOCK.match, names) if match]
    return 3 + min((max(blocks, default=0) + 2) // 2, 9)


def layer_id(name: str, num_layers: int = 12) -> int:
    """Layer of a HorNet parameter, 0 (stem) to `num_layers` (last stage) and `num_layers + 1` (final norm and
    head)."""
    parts = name.split(".")
    if parts[0] == "downsample_layers":
        return (0, 2, 3, num_layers)[int(parts[1])]
    if parts[0] == "stages":
        stage, block = int(parts[1]), int(parts[2])
        return (1, 2, min(3 + block // 2, num_layers - 1), num_layers)[stage]
    return num_layers + 1


def param_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float,
                 layer_decay: float = 1.0, scale_of: Callable[[str], float] | None = None) -> list[dict]:
    """Groups for any torch or timm optimizer, in the order in which their first tensor comes.

    The order is the published one, so that optimizer states of published training files fit. Each group holds
    `params`, `names`, `weight_decay`, `lr_scale` (`scale_of(name)`, by default
    `layer_decay ** (num_layers + 1 - layer)`) and `decays`. Parameters that need no gradient are left out.
    """
    named = list(named_parameters)
    num_layers = count_layers(name for name, _ in named)
    scale_of = scale_of or (lambda name: layer_decay ** (num_layers + 1 - layer_id(name, num_layers)))
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in ((name, parameter) for name, parameter in named if parameter.requires_grad):
        # Not for vectors (biases, norms, layer scales); for everything else, filters too.
        scale, decaying = scale_of(name), parameter.ndim != 1 and not name.endswith(".bias")
        group = groups.setdefault((scale, decaying), {
            "params": [], "names": [], "weight_decay": weight_decay if decaying else 0.0,
            "lr_scale": scale, "decays": decaying})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
