"""HorNet, registered with timm: `timm.create_model("hornet_tiny_7x7")` after `import models`.

Architecture and published variants: "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated
Convolutions", NeurIPS 2022, arXiv:2207.14284. Parameter names, shapes and order are the published ones.
"""
from dataclasses import fields, replace

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.gnconv import PLAIN, GlobalLocalFilter, GnConv, Operators
from models.zoo import VARIANTS, HorNetConfig

EPS = 1e-6  # of every LayerNorm


class Block(nn.Module):
    """x + gamma1 * gnConv(norm1(x)), then x + gamma2 * MLP(norm2(x)), on NHWC tensors.

    `keep` (B, 2) holds the factors of the two branches per sample under drop path, None to keep all.
    """

    ops: Operators = PLAIN

    def __init__(self, gnconv: GnConv, layer_scale_init_value: float = 1e-6, expansion: int = 4):
        super().__init__()
        dim = gnconv.dim
        scaled = layer_scale_init_value > 0
        self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale_init_value)) if scaled else None
        self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale_init_value)) if scaled else None
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.gnconv = gnconv
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, expansion * dim)
        self.pwconv2 = nn.Linear(expansion * dim, dim)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        first, second = (None, None) if keep is None else keep.unbind(1)
        x = self.ops.residual(x, self._mix, self.gamma1, first)
        return self.ops.residual(x, self._mlp, self.gamma2, second)

    def _mix(self, x: Tensor) -> Tensor:
        x = self.ops.layer_norm(x, self.norm1.weight, self.norm1.bias, self.norm1.eps)
        return self.gnconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _mlp(self, x: Tensor) -> Tensor:
        x = self.ops.layer_norm(x, self.norm2.weight, self.norm2.bias, self.norm2.eps)
        x = self.ops.linear_gelu(x, self.pwconv1.weight, self.pwconv1.bias)
        return self.ops.linear(x, self.pwconv2.weight, self.pwconv2.bias)


class HorNet(nn.Module):
    """The network. Input float (B, in_chans, H, W), H and W from 32 on, any memory format; output (B, num_classes).

    Args:
        cfg: architecture.
        in_chans: input channels.
        num_classes: 0 gives the pooled features instead of logits.
        drop_path_rate: of the last block; it rises linearly from 0 at the first.
        layer_scale_init_value: start of gamma1 and gamma2; 0 leaves them out.
        head_init_scale: multiplies the head's initial weights.
    """

    ops: Operators = PLAIN

    def __init__(self, cfg: HorNetConfig = HorNetConfig(), in_chans: int = 3, num_classes: int = 1000,
                 drop_path_rate: float = 0.0, layer_scale_init_value: float = 1e-6, head_init_scale: float = 1.0):
        super().__init__()
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate {drop_path_rate}: a number from 0 to below 1 is needed")
        self.cfg, self.in_chans, self.num_classes = cfg, in_chans, num_classes
        self.drop_path_rate = drop_path_rate
        self.grad_checkpointing = False
        dims = [cfg.width * 2 ** i for i in range(4)]
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2 ** i, module=f"stages.{i}") for i, dim in enumerate(dims)]
        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4), nn.LayerNorm(dims[0], eps=EPS))
        self.downsample_layers = nn.ModuleList([stem] + [
            nn.Sequential(nn.LayerNorm(a, eps=EPS), nn.Conv2d(a, b, kernel_size=2, stride=2))
            for a, b in zip(dims, dims[1:])])
        self.stages = nn.ModuleList(nn.Sequential(*(
            Block(GnConv(dim, order, cfg.kernel_size, cfg.scale, filter=filter), layer_scale_init_value)
            for _ in range(depth))) for dim, depth, order, filter in zip(dims, cfg.depths, cfg.orders, cfg.filters))
        self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_init_weights)
        if num_classes > 0:
            with torch.no_grad():
                self.head.weight.mul_(head_init_scale)
                self.head.bias.mul_(head_init_scale)

    @property
    def num_drop_draws(self) -> int:
        """Uniform draws per sample that drop path takes: two per block of the whole architecture."""
        return 2 * sum(self.cfg.depths)

    def forward(self, x: Tensor, drop_draws: Tensor | None = None) -> Tensor:
        """Logits; `drop_draws` (B, num_drop_draws) are uniforms in [0, 1) for drop path, drawn here when None.

        Column 2 * i is for block i's first branch, 2 * i + 1 for its second; a branch is kept where the draw is
        at least its drop rate. Drawing once, before the blocks, keeps recomputed blocks from drawing again.
        """
        return self.forward_head(self.forward_features(x, drop_draws))

    def forward_features(self, x: Tensor, drop_draws: Tensor | None = None) -> Tensor:
        """The last stage's output, (B, 8 * width, H / 32, W / 32), before the norm."""
        keep = self._keep_factors(x, drop_draws)
        x = self._enter(x)
        for index in range(len(self.stages)):
            x = self._stage(index, x, keep)
        return x.permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and normalise features (B, C, h, w) and classify them; `pre_logits` leaves the classifier out."""
        x = self.ops.layer_norm(x.mean((2, 3)), self.norm.weight, self.norm.bias, self.norm.eps)
        return x if pre_logits else self.head(x)

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False,
                              stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False):
        """Outputs of the stages named by `indices` (timm's convention), as (B, C, H, W); see timm's `features_only`."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f'output_fmt {output_fmt!r}: "NCHW" or "NHWC" is needed')
        take, last = feature_take_indices(len(self.stages), indices)
        keep, outputs = self._keep_factors(x, None), []
        x = self._enter(x)
        for index in range(last + 1 if stop_early else len(self.stages)):
            x = self._stage(index, x, keep)
            if index in take:
                out = x
                if norm and index == 3:
                    out = self.ops.layer_norm(x, self.norm.weight, self.norm.bias, self.norm.eps)
                outputs.append(out.permute(0, 3, 1, 2) if output_fmt == "NCHW" else out)
        return outputs if intermediates_only else (x.permute(0, 3, 1, 2), outputs)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False,
                                  prune_head: bool = True) -> list[int]:
        """Remove what the stages named by `indices` do not need; returns the indices kept."""
        take, last = feature_take_indices(len(self.stages), indices)
        pruned = last < len(self.stages) - 1
        self.stages, self.downsample_layers = self.stages[:last + 1], self.downsample_layers[:last + 1]
        if prune_norm or pruned:
            self.norm = nn.Identity()
        if prune_head or pruned:
            self.reset_classifier(0)
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        return take

    def _enter(self, x: Tensor) -> Tensor:
        """Check the input; a channels_last copy makes the first convolution's output NHWC in memory."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"HorNet needs an input (batch, {self.in_chans}, height, width), not {tuple(x.shape)}")
        if x.shape[2] < 32 or x.shape[3] < 32:
            raise ValueError(f"HorNet needs pictures of at least 32x32 pixels, not {x.shape[2]}x{x.shape[3]}: "
                             "the network halves them five times; enlarge the pictures or raise --input_size")
        if not x.is_floating_point():
            raise ValueError(f"HorNet needs a floating-point input, not {x.dtype}: normalise the pictures first")
        return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)

    def _stage(self, index: int, x: Tensor, keep: Tensor | None) -> Tensor:
        for layer in self.downsample_layers[index]:
            if isinstance(layer, nn.LayerNorm):
                x = self.ops.layer_norm(x, layer.weight, layer.bias, layer.eps)
            else:
                x = self.ops.patch_conv(x, layer.weight, layer.bias)
        first = sum(len(stage) for stage in self.stages[:index])
        for i, block in enumerate(self.stages[index], first):
            factors = None if keep is None else keep[:, 2 * i:2 * i + 2]
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, factors, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, factors)
        return x

    def _keep_factors(self, x: Tensor, drop_draws: Tensor | None) -> Tensor | None:
        """(B, num_drop_draws) factors 0 or 1 / (1 - p), or None when nothing is dropped."""
        if not self.training or self.drop_path_rate == 0:
            return None
        draws = self.num_drop_draws
        if drop_draws is None:
            drop_draws = torch.rand(x.shape[0], draws, device=x.device)
        elif tuple(drop_draws.shape) != (x.shape[0], draws):
            raise ValueError(f"drop_draws of shape {tuple(drop_draws.shape)}: {(x.shape[0], draws)} is needed")
        block = torch.arange(draws, device=x.device).div(2, rounding_mode="floor")
        rate = block * (self.drop_path_rate / max(1, draws // 2 - 1))
        return (drop_draws.to(x.device) >= rate) / (1 - rate)

    def set_operators(self, ops: Operators) -> None:
        """Let the whole network compute with `ops`; `PLAIN` goes back to plain PyTorch."""
        for module in self.modules():
            if isinstance(module, (HorNet, Block, GnConv, GlobalLocalFilter)):
                module.ops = ops

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, freshly initialised head; 0 for none. Only average pooling ("avg") is there."""
        if global_pool not in (None, "", "avg"):
            raise ValueError(f'global_pool {global_pool!r}: HorNet pools with "avg" only')
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


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


CONFIGS = {name: variant.config for name, variant in VARIANTS.items()}


def _default_cfg(name: str) -> dict:
    size = VARIANTS[name].input_size
    url = next((file.urls[0] for file in VARIANTS[name].files), "")
    return dict(url=url, num_classes=1000, input_size=(3, size, size), interpolation="bicubic", custom_load=True,
                crop_pct=1.0 if size >= 384 else 0.875, crop_mode="squash" if size >= 384 else "center",
                mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, license="mit",
                first_conv="downsample_layers.0.0", classifier="head")


default_cfgs = generate_default_cfgs({name: _default_cfg(name) for name in CONFIGS})


def _create(name: str, pretrained: bool = False, **kwargs) -> HorNet:
    """Build `name`; keyword arguments are HorNet's and HorNetConfig's, an unknown one is a TypeError."""
    changes = {f.name: kwargs.pop(f.name) for f in fields(HorNetConfig) if f.name in kwargs}
    if pretrained and not (kwargs.get("pretrained_cfg_overlay") or {}).get("file"):
        from models.download import fetch_published
        path = fetch_published(name, kwargs.pop("cache_dir", None))
        kwargs["pretrained_cfg_overlay"] = {**(kwargs.get("pretrained_cfg_overlay") or {}), "file": str(path)}
    return build_model_with_cfg(
        HorNet, name, pretrained, model_cfg=replace(CONFIGS[name], **changes),
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"), **kwargs)


def _entrypoint(name: str):
    def build(pretrained: bool = False, **kwargs) -> HorNet:
        return _create(name, pretrained, **kwargs)
    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name}: {CONFIGS[name]}"
    return build


# One line registers all of them; the functions are also attributes of this module, as timm expects.
globals().update({name: register_model(_entrypoint(name)) for name in CONFIGS})
