"""The last steps before the network, on its device: normalise, erase, mix; all draws keyed by image or position."""
import torch
from torchvision import transforms

from common.errors import UserError
from common.random import key
from datasets.dataset import Batch
from datasets.mixup import build_mixup
from datasets.transforms import mean_std


class Normalise:
    """uint8 NHWC pixels → float32 NHWC, exactly ToTensor + Normalize, from a table of their 256 x 3 results."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str):
        levels = torch.arange(256, dtype=torch.uint8)[:, None, None].expand(256, 1, 3).numpy()
        table = transforms.Normalize(mean, std)(transforms.ToTensor()(levels))[:, :, 0]
        self._table = table.reshape(-1).contiguous().to(device)  # 3 x 256
        self._offset = torch.tensor([0, 256, 512], dtype=torch.int32, device=device)
        self._mean, self._std = torch.tensor(mean), torch.tensor(std)
        # On a CPU the gather costs 2.5 ms per image of 224 and the arithmetic 0.3; it is used only where it gives
        # the table's bits for all 768 entries.
        self._calculate = False
        if torch.device(device).type == "cpu":
            every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3).contiguous()
            self._calculate = torch.equal(self._arithmetic(every), self(every))

    def _arithmetic(self, pixels: torch.Tensor) -> torch.Tensor:
        # Rows of W x 3 values keep the inner loops long; a mean of three values would make them three long.
        rows, width = pixels.reshape(*pixels.shape[:2], -1), pixels.shape[2]
        values = rows.float().div_(255).sub_(self._mean.repeat(width)).div_(self._std.repeat(width))
        return values.view(pixels.shape)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 → (B, H, W, 3) float32 on the same device."""
        if self._calculate:
            return self._arithmetic(pixels)
        places = pixels.to(torch.int32).add_(self._offset)
        return self._table.index_select(0, places.view(-1)).view(pixels.shape)


class TrainPrepare:
    """A training batch ready for the network: (images float32 (B, 3, H, W) channels_last, targets).

    Targets are soft, float32 (B, classes), when anything is mixed, otherwise int64 (B,). The result for an image
    depends on (seed, epoch, image, global position), not on the batch it came in. Noise in erased boxes is equal
    bit for bit on one kind of device (CPUs and GPUs draw differently).
    """

    def __init__(self, options, num_classes: int, device: torch.device | str):
        if options.remode not in ("pixel", "rand", "const"):
            raise UserError(f"--remode {options.remode} is not one of pixel, rand, const.")
        self.device, self.seed, self.mode = torch.device(device), options.seed, options.remode
        self.normalise = Normalise(*mean_std(options.imagenet_default_mean_and_std), device)
        self.mixup = build_mixup(options, num_classes)
        self._generator = torch.Generator(device=self.device)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images = self.normalise(batch.images.to(self.device, non_blocking=True))
        targets = batch.targets.to(self.device, non_blocking=True)
        self._erase(images, batch)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets, batch.epoch, batch.positions.numpy())
        return images.permute(0, 3, 1, 2), targets

    def _erase(self, images: torch.Tensor, batch: Batch) -> None:
        # The boxes are on the host, so choosing the few erased images makes nothing wait for the device.
        boxes = batch.boxes
        for row in (boxes[:, :, 2] > 0).any(1).nonzero().flatten().tolist():
            self._generator.manual_seed(key(self.seed, "erase", batch.epoch, int(batch.indices[row])))
            for top, left, height, width in boxes[row].tolist():
                if height > 0:
                    images[row, top:top + height, left:left + width] = self._fill(height, width)

    def _fill(self, height: int, width: int) -> torch.Tensor:
        if self.mode == "const":
            return torch.zeros(3, device=self.device)
        shape = (height, width, 3) if self.mode == "pixel" else (3,)
        return torch.empty(shape, device=self.device).normal_(generator=self._generator)


class EvalPrepare:
    """An evaluation batch ready for the network: (images float32 (B, 3, H, W) channels_last, targets int64 (B,)).

    The target of an image that could not be read (only with allow_bad_images) is -100, which no prediction equals
    and torch's cross entropy passes over: it counts as wrong and stays in the denominator.
    """

    def __init__(self, options, device: torch.device | str):
        self.device = torch.device(device)
        self.normalise = Normalise(*mean_std(options.imagenet_default_mean_and_std), device)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images = self.normalise(batch.images.to(self.device, non_blocking=True))
        return images.permute(0, 3, 1, 2), batch.targets.to(self.device, non_blocking=True)
