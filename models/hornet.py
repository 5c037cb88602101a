"""HorNet, registered with timm: `timm.create_model("hornet_tiny_7x7")` after `import models`.

Architecture and published variants: "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated
Convolutions", NeurIPS 2022, arXiv:2207.14284. Parameter names, shapes and order are the published ones.

Stages, blocks and gnConv take and give (B, C, H, W) in channels_last memory, which the first LayerNorm
produces and everything after it keeps. Every submodule is called by its own forward, so hooks, adapters,
quantised or replaced layers, counters and tracers find what they expect.
"""
from collections.abc import Callable
from dataclasses import fields, replace

import torch
import torch.fx
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.gnconv import GnConv, LayerNorm2d
from models.zoo import VARIANTS, HorNetConfig

CONFIGS = {name: variant.config for name, variant in VARIANTS.items()}
EPS = 1e-6  # of every LayerNorm


class Block(nn.Module):
    """x + gamma1 * gnConv(norm1(x)), then x + gamma2 * MLP(norm2(x)), on (B, C, H, W).

    `keep` (B, 2) holds the factors of the two branches per sample under drop path, None to keep all.

    Attributes:
        runner: None, or a function (block, x, keep) that may compute the block in its place: it gives what
            `forward` would, or NotImplemented where it cannot.
    """

    runner: Callable | None = None

    def __init__(self, gnconv: GnConv, layer_scale_init_value: float = 1e-6, expansion: int = 4):
        super().__init__()
        dim = gnconv.dim
        scaled = layer_scale_init_value > 0
        self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale_init_value)) if scaled else None
        self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale_init_value)) if scaled else None
        self.norm1 = LayerNorm2d(dim, eps=EPS)
        self.gnconv = gnconv
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, expansion * dim)
        self.pwconv2 = nn.Linear(expansion * dim, dim)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        if self.runner is not None:
            out = self.runner(self, x, keep)
            if out is not NotImplemented:
                return out
        return self.compute(x, keep)

    def compute(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """What `forward` gives, in plain PyTorch."""
        first, second = (None, None) if keep is None else (keep[:, 0], keep[:, 1])
        x = residual(x, self.gnconv(self.norm1(x)), self.gamma1, first)
        y = self.norm2(x.permute(0, 2, 3, 1))
        y = self.pwconv2(F.gelu(self.pwconv1(y)))
        return residual(x, y.permute(0, 3, 1, 2), self.gamma2, second)


@torch.fx.wrap
def residual(x: Tensor, branch: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor:
    """x + keep * gamma * branch: x and branch (B, C, H, W), gamma (C,) or None, keep (B,) or None.

    The sum has the wider type of x and gamma: under autocast the residual stream stays float32.
    """
    dtype = x.dtype if gamma is None else torch.promote_types(x.dtype, gamma.dtype)
    factor = None if gamma is None else gamma[:, None, None]
    if keep is not None:
        keep = keep[:, None, None, None]
        factor = keep if factor is None else keep * factor
    return (x + branch if factor is None else x + branch * factor).to(dtype)


class Stage(nn.Sequential):
    """Blocks, one after the other; `keep` (B, blocks, 2) as in `keep_factors`, None to keep all."""

    grad_checkpointing = False

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        for i, block in enumerate(self):
            factors = None if keep is None else keep[:, i]
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, factors, use_reentrant=False)
            else:
                x = block(x, factors)
        return x


class HorNet(nn.Module):
    """The network: float (B, in_chans, H, W), H and W from 32 on, to logits (B, num_classes).

    Args:
        cfg: architecture.
        in_chans: input channels.
        num_classes: 0 gives the features instead of logits.
        drop_rate: dropout before the head.
        drop_path_rate: of the last block; it rises linearly from 0 at the first.
        layer_scale_init_value: start of gamma1 and gamma2; 0 leaves them out.
        head_init_scale: multiplies the head's initial weights.
        global_pool: "avg", or "" for an output at each position, (B, num_classes, H / 32, W / 32).
    """

    def __init__(self, cfg: HorNetConfig = CONFIGS["hornet_tiny_7x7"], in_chans: int = 3,
                 num_classes: int = 1000, drop_rate: float = 0.0, drop_path_rate: float = 0.0,
                 layer_scale_init_value: float = 1e-6, head_init_scale: float = 1.0,
                 global_pool: str = "avg"):
        super().__init__()
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate {drop_path_rate}: a number from 0 to below 1 is needed")
        self.cfg, self.in_chans, self.num_classes = cfg, in_chans, num_classes
        self.drop_rate, self.drop_path_rate = drop_rate, drop_path_rate
        self.global_pool = _checked_pool(global_pool)
        self.frozen: tuple[nn.Module, ...] = ()
        dims = [cfg.width * 2 ** i for i in range(4)]
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2 ** i, module=f"stages.{i}") for i, dim in enumerate(dims)]
        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4),
                             LayerNorm2d(dims[0], eps=EPS))
        self.downsample_layers = nn.ModuleList([stem] + [
            nn.Sequential(LayerNorm2d(a, eps=EPS), nn.Conv2d(a, b, kernel_size=2, stride=2))
            for a, b in zip(dims, dims[1:])])
        self.stages = nn.ModuleList(
            Stage(*(Block(GnConv(dim, order, cfg.kernel_size, cfg.scale, filter=filter),
                          layer_scale_init_value) for _ in range(depth)))
            for dim, depth, order, filter in zip(dims, cfg.depths, cfg.orders, cfg.filters))
        self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_init_weights)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.mul_(head_init_scale)

    @property
    def num_drop_draws(self) -> int:
        """Uniform draws per sample that drop path takes: two per block of the whole architecture."""
        return 2 * sum(self.cfg.depths)

    def forward(self, x: Tensor, drop_draws: Tensor | None = None) -> Tensor:
        """Logits; `drop_draws` (B, num_drop_draws), uniform in [0, 1), decide drop path, drawn when None.

        Column 2 * i is for block i's first branch, 2 * i + 1 for its second; a branch is kept where the draw
        is at least its drop rate. Drawn once, before the blocks, so that recomputed blocks do not draw again.
        """
        return self.forward_head(self.forward_features(x, drop_draws))

    def forward_features(self, x: Tensor, drop_draws: Tensor | None = None) -> Tensor:
        """The last stage's output, (B, 8 * width, H / 32, W / 32), before the norm."""
        return self._stage_outputs(x, drop_draws, len(self.stages))[-1]

    def _stage_outputs(self, x: Tensor, drop_draws: Tensor | None, stages: int) -> list[Tensor]:
        """What each of the first `stages` stages gives."""
        check_input(x, self.in_chans)
        drops = self.training and self.drop_path_rate > 0
        keep = keep_factors(x, drop_draws, self.drop_path_rate, self.num_drop_draws) if drops else None
        outputs, start = [], 0
        for downsample, stage in list(zip(self.downsample_layers, self.stages))[:stages]:
            blocks = len(list(stage.children()))
            # A frozen stage is in evaluation mode and drops nothing.
            factors = None if keep is None or not stage.training else keep[:, start:start + blocks]
            x = stage(downsample(x), factors)
            start += blocks
            outputs.append(x)
        return outputs

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and normalise features (B, C, h, w) and classify them, not with `pre_logits`."""
        x = self.head_drop(self.norm(x.mean((2, 3)) if self.global_pool else x.permute(0, 2, 3, 1)))
        x = x if pre_logits else self.head(x)
        return x if self.global_pool else x.permute(0, 3, 1, 2)

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False,
                              stop_early: bool = False, output_fmt: str = "NCHW",
                              intermediates_only: bool = False) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages named by `indices`, as timm's `features_only` asks for them."""
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt {output_fmt!r}: "NCHW" is needed')
        take, last = feature_take_indices(len(self.stages), indices)
        outputs = self._stage_outputs(x, None, last + 1 if stop_early else len(self.stages))
        final, found = outputs[-1], [outputs[index] for index in take]
        if norm and take and take[-1] == 3:
            found[-1] = self.norm(final.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return found if intermediates_only else (final, found)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False,
                                  prune_head: bool = True) -> list[int]:
        """Remove what the stages named by `indices` do not need; returns the indices kept."""
        take, last = feature_take_indices(len(self.stages), indices)
        pruned = last < len(self.stages) - 1
        self.stages, self.downsample_layers = self.stages[:last + 1], self.downsample_layers[:last + 1]
        if prune_norm or pruned:
            self.norm = nn.Identity()
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0)
        return take

    def freeze(self, parts: str) -> None:
        """Keep parts as they are: without gradients, and in evaluation mode whatever `train` says.

        `parts`, separated by commas: "backbone" (all but the head), "stem", "stages.1" or "stages.0-2" (with
        the downsampling before each).
        """
        found: list[nn.Module] = []
        for part in parts.split(","):
            if part == "backbone":
                found += [*self.downsample_layers, *self.stages, self.norm]
            elif part == "stem":
                found.append(self.downsample_layers[0])
            else:
                ends = sorted(map(int, part.removeprefix("stages.").split("-")))
                chosen = slice(ends[0], ends[-1] + 1)
                found += [*self.stages[chosen], *self.downsample_layers[max(1, chosen.start):chosen.stop]]
        self.frozen = tuple(found)
        for module in found:
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "HorNet":
        """Training mode, or evaluation mode, which frozen parts are always in."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, freshly initialised head, none for 0; `global_pool` "avg", "" (none), or None as before."""
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
        self.num_classes = num_classes
        weight = next(self.parameters())
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.apply(_init_weights).to(device=weight.device, dtype=weight.dtype)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns for timm's parameter groups, stem first."""
        blocks = r"^(?:stages|downsample_layers)\.(\d+)" if coarse else [
            (r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^downsample_layers\.0", blocks=blocks)

    def load_pretrained(self, path: str) -> None:
        """Called by timm for `pretrained=True` with the path of a published file."""
        from models.weights import load_for_model
        load_for_model(self, path, new_head=True)


@torch.fx.wrap
def check_input(x: Tensor, in_chans: int) -> None:
    """ValueError for what a HorNet cannot take; it halves height and width five times."""
    if (x.ndim != 4 or x.shape[1] != in_chans or x.shape[2] < 32 or x.shape[3] < 32
            or not x.is_floating_point()):
        raise ValueError(f"HorNet needs normalised images, floating-point (batch, {in_chans}, height, width) "
                         f"with sides from 32 pixels on, not {x.dtype} {tuple(x.shape)}")


@torch.fx.wrap
def keep_factors(x: Tensor, draws: Tensor | None, rate: float, count: int) -> Tensor:
    """Drop path's factors (B, blocks, 2): 0 or 1 / (1 - p), with p rising from 0 to `rate` over the blocks.

    `draws` (B, count), count = 2 * blocks, are uniforms in [0, 1), drawn here when None.
    """
    if draws is None:
        draws = torch.rand(x.shape[0], count, device=x.device)
    elif tuple(draws.shape) != (x.shape[0], count):
        raise ValueError(f"drop_draws of shape {tuple(draws.shape)}: {(x.shape[0], count)} is needed")
    block = torch.arange(count, device=x.device).div(2, rounding_mode="floor")
    rates = block * (rate / max(1, count // 2 - 1))
    return ((draws.to(x.device) >= rates) / (1 - rates)).unflatten(1, (count // 2, 2))


def _checked_pool(global_pool: str) -> str:
    if global_pool not in ("avg", ""):
        raise ValueError(f'global_pool {global_pool!r}: "avg", or "" for no pooling, is needed')
    return global_pool


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _default_cfg(name: str) -> dict:
    size = VARIANTS[name].input_size
    url = next((file.url for file in VARIANTS[name].files), "")
    return dict(url=url, num_classes=1000, input_size=(3, size, size), interpolation="bicubic",
                crop_pct=1.0 if size >= 384 else 0.875, crop_mode="squash" if size >= 384 else "center",
                custom_load=True, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, license="mit",
                first_conv="downsample_layers.0.0", classifier="head")


default_cfgs = generate_default_cfgs({name: _default_cfg(name) for name in CONFIGS})


def _entrypoint(name: str):
    """The function that timm registers for `name`; keyword arguments are HorNet's and HorNetConfig's, an
    unknown one is a TypeError.

    Training scripts of timm and DeiT always pass some that other families have: `img_size` (HorNet takes
    any), `drop_block_rate` None or 0 and `output_stride` 32 are accepted and change nothing.
    """
    def build(pretrained: bool = False, **kwargs) -> HorNet:
        kwargs = {name: value for name, value in kwargs.items() if value is not None and name != "img_size"}
        for key, only, accepted in (("drop_block_rate", 0, "None"), ("output_stride", 32, "32")):
            value = kwargs.pop(key, only)
            if value != only:
                raise ValueError(f"{key} {value!r}: HorNet has no such form, only {accepted} is accepted")
        changes = {f.name: kwargs.pop(f.name) for f in fields(HorNetConfig) if f.name in kwargs}
        overlay, cache_dir = dict(kwargs.get("pretrained_cfg_overlay") or {}), kwargs.pop("cache_dir", None)
        # timm reads what it has found in a folder or at the Hub (local-dir:, hf-hub:) itself.
        elsewhere = isinstance(cfg := kwargs.get("pretrained_cfg"), dict) and cfg.get("source")
        if pretrained and not elsewhere:
            from models.download import fetch_published
            # Without `custom_load` timm reads a named file itself: without OpenMMLab's names, and the average
            # instead of what scored.
            kwargs["pretrained_cfg_overlay"] = overlay | {
                "file": str(overlay.get("file") or fetch_published(name, cache_dir)), "custom_load": True}
        return build_model_with_cfg(
            HorNet, name, pretrained, model_cfg=replace(CONFIGS[name], **changes),
            feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"), **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name}: {CONFIGS[name]}"
    return build


# One line registers all of them; the functions are also attributes of this module, as timm expects.
globals().update({name: register_model(_entrypoint(name)) for name in CONFIGS})
