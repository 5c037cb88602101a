"""HorNet as the backbone of segmentors and detectors: four normalised maps instead of logits."""
import os
import re
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from common.errors import UserError
from common.log import logger
from common.safe_load import safe_torch_load
from config.options import Options
from launch.process import Process
from models.download import fetch_published, local_file
from models.gnconv import LayerNorm2d, resize_filter
from models.hornet import CONFIGS, EPS, HorNet
from models.weights import StateDict, published_names, select_weights

Filters = tuple[tuple[int, int], tuple[int, int]]


class Backbone(HorNet):
    """Images float (B, 3, H, W), sides from 32 on, to four maps (B, width * 2^i, H / 2^(i+2), W / 2^(i+2)).

    Map i is stage i's output through the LayerNorm `norm{i}`; the next stage continues from the output
    itself. Sides are floored at each stage.

    Args:
        model: a name of `models.zoo`, such as hornet_tiny_gf.
        filters: grids of the global-local filters of stages 3 and 4; None: as in classification at 224.
        drop_path: rate of the last block.
    """

    def __init__(self, model: str, filters: Filters | None = None, drop_path: float = 0.0,
                 layer_scale_init_value: float = 1e-6):
        config = CONFIGS[model]
        if filters is not None:
            config = replace(config, filters=(*config.filters[:2], *filters))
        super().__init__(config, num_classes=0, drop_path_rate=drop_path,
                         layer_scale_init_value=layer_scale_init_value)
        self.norm = self.head = nn.Identity()
        self.channels = [config.width * 2 ** i for i in range(4)]
        for i, channels in enumerate(self.channels):
            self.add_module(f"norm{i}", LayerNorm2d(channels, eps=EPS))

    def forward(self, x: Tensor, drop_draws: Tensor | None = None) -> list[Tensor]:
        """The four maps; `drop_draws` (B, num_drop_draws) as in HorNet."""
        outputs = self._stage_outputs(x, drop_draws, len(self.stages))
        return [self.get_submodule(f"norm{i}")(y) for i, y in enumerate(outputs)]


def load_backbone(backbone: Backbone, path: str | os.PathLike) -> None:
    """Start from a classification file: published, OpenMMLab's, or a checkpoint of this project.

    Its head and last norm are left out, `norm0` to `norm3` stay as they are, filters of another grid are
    resized. Raises UserError (`other_model`) when anything else is missing or of another shape.
    """
    state, _ = select_weights(safe_torch_load(path), str(path))
    wanted = {name: value for name, value in backbone.state_dict().items() if not re.match(r"norm\d\.", name)}
    found = fitted_filters(published_names(state), wanted)
    odd = [name for name, value in wanted.items() if name not in found or found[name].shape != value.shape]
    if odd:
        raise UserError(f"{path} is no classification file of this backbone: {len(odd)} of its "
                        f"{len(wanted)} tensors are missing or of another shape, such as {odd[0]}; name a "
                        "file of the same HorNet.", code="other_model")
    backbone.load_state_dict({name: found[name] for name in wanted}, strict=False)
    logger.info("%s: %d tensors of the backbone are taken", path, len(wanted))


def start_from(backbone: Backbone, options: Options, process: Process) -> None:
    """The published classification weights, or those of `--finetune`, where one is asked for."""
    if options.pretrained or options.finetune:
        load_backbone(backbone, process.on_rank_zero(lambda: str(fetch_published(options.model))
                                                     if options.pretrained else local_file(options.finetune)))


def load_published(model: nn.Module, path: str | os.PathLike, checkpoint: Any = None,
                   weights: str = "auto") -> str:
    """Load a whole segmentor or detector: a published file (`state_dict`) or a checkpoint of this project, of
    which `weights` says what ("auto": what scored). Returns the name of the file's entry.

    Strict: raises UserError (`other_model`) unless every tensor is there with its shape and none is left,
    but for `num_batches_tracked`, which older files lack, and filters of another grid, which are resized.
    """
    checkpoint = safe_torch_load(path) if checkpoint is None else checkpoint
    state, entry = select_weights(checkpoint, str(path), weights=weights)
    state = {name.removeprefix("module."): value for name, value in state.items()}
    target = model.state_dict()
    state = {name: value for name, value in target.items() if name.endswith("num_batches_tracked")} | state
    state = fitted_filters(state, target)
    odd = [name for name in target if name not in state or state[name].shape != target[name].shape]
    odd += [name for name in state if name not in target]
    if odd:
        raise UserError(f"{path} does not hold this model: {len(odd)} tensors are missing, unexpected or of "
                        f"another shape, such as {odd[0]}; name the model and classes it was made with.",
                        code="other_model")
    broken = next((name for name, value in state.items() if not value.isfinite().all()), None)
    if broken is not None:
        raise UserError(f"{path} holds infinite or undefined values in {broken}; take an earlier checkpoint.",
                        code="nonfinite_weights")
    model.load_state_dict(state)
    return entry


def fitted_filters(state: StateDict, target: StateDict) -> StateDict:
    """`state` with each global filter resized to the grid that `target` has."""
    return {name: resize_filter(value.float(), (target[name].shape[1], target[name].shape[2]))
            if name.endswith(".complex_weight") and name in target and value.ndim == 4
            and value.shape != target[name].shape else value for name, value in state.items()}


def synchronised(process: Process) -> bool:
    """Whether BatchNorm has the statistics of all processes' images: on accelerators.

    SyncBatchNorm refuses CPU tensors, so on CPUs each process normalises with its own images' statistics.
    """
    return process.world_size > 1 and process.device.type == "cuda"


def same_statistics(network: nn.Module, process: Process) -> None:
    """Give every rank the statistics of BatchNorm that rank 0 has, and saves: on CPUs each normalises with
    its own images."""
    for buffer in network.buffers():
        if not process.is_main:
            buffer.zero_()
        process.all_reduce_(buffer, "sum")
