"""Models for other runtimes: ONNX and torch.export, with the Fourier filter as matrix products.

The exported graph holds no FFT operator and no complex number, which many runtimes lack, and works at any batch
size and at any picture size from 64 pixels on.
"""
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from models.gnconv import PLAIN, Operators

ONNX_OPSET = 18
TOLERANCE = 1e-4  # of outputs in float32
SMALLEST_SIDE = 64  # below it the last feature map is one pixel wide, which torch.export treats as another program


class MatrixDft(Operators):
    """`Operators` whose global filter is the discrete Fourier transform written as real matrix products.

    The matrices are made in the graph from the feature map's size, so that the size stays free.
    """

    def global_filter(self, x: Tensor, weight: Tensor) -> Tensor:
        """As the plain one, in float32: x (B, H, W, C), weight (C, h, w, 2)."""
        height, width = x.shape[1], x.shape[2]
        half = width // 2 + 1
        x = x.float().permute(0, 3, 1, 2).contiguous()  # contiguous: no branch on strides in the exported graph
        cos_w, sin_w = _turns(half, width, width, x.device)
        cos_h, sin_h = _turns(height, height, height, x.device)
        real, imaginary = F.linear(x, cos_w), -F.linear(x, sin_w)  # along the width, half the spectrum
        real, imaginary = real.transpose(2, 3).contiguous(), imaginary.transpose(2, 3).contiguous()
        real, imaginary = (F.linear(real, cos_h) + F.linear(imaginary, sin_h),
                           F.linear(imaginary, cos_h) - F.linear(real, sin_h))
        weight = _resized(weight.float(), height, half)  # (2, C, half, height)
        real, imaginary = (real * weight[0] - imaginary * weight[1], real * weight[1] + imaginary * weight[0])
        real, imaginary = (F.linear(real, cos_h) - F.linear(imaginary, sin_h),
                           F.linear(imaginary, cos_h) + F.linear(real, sin_h))
        real, imaginary = real.transpose(2, 3).contiguous(), imaginary.transpose(2, 3).contiguous()
        # Columns strictly between 0 and width / 2 stand for two of the full spectrum.
        column = torch.arange(half, device=x.device)
        twice = 1.0 + ((column > 0) & (2 * column != width)).float()
        back_cos, back_sin = (cos_w * twice[:, None]).T.contiguous(), (sin_w * twice[:, None]).T.contiguous()
        out = F.linear(real, back_cos) - F.linear(imaginary, back_sin)
        return (out / (height * width)).permute(0, 2, 3, 1)


def _turns(rows: int, columns: int, period: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi i j / period, (rows, columns); the product is reduced as integers, which keeps it exact."""
    i, j = torch.arange(rows, device=device), torch.arange(columns, device=device)
    # The divisor is a tensor because ONNX has no remainder by a number known only at run time.
    steps = torch.remainder(i[:, None] * j[None], torch.full((1,), period, dtype=torch.int64, device=device))
    angle = steps.float() * (2 * math.pi / period)
    return angle.cos(), angle.sin()


def _resized(weight: Tensor, height: int, half: int) -> Tensor:
    """(C, h, w, 2) → (2, C, half, height), bilinear with corners aligned.

    Two matrix products: no branch on the size, and exact at the filter's own size.
    """
    rows, columns = _interpolation(weight.shape[1], height, weight), _interpolation(weight.shape[2], half, weight)
    across = F.linear(weight.permute(3, 0, 1, 2).contiguous(), columns)
    return F.linear(across.transpose(2, 3).contiguous(), rows)


def _interpolation(source: int, target: int, like: Tensor) -> Tensor:
    """(target, source) weights of linear interpolation."""
    steps = torch.arange(target, device=like.device)
    place = (steps * (source - 1)).float() / torch.sym_max(target - 1, 1)
    return (1 - (place[:, None] - torch.arange(source, device=like.device)[None]).abs()).clamp_min(0)


class _Probabilities(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).softmax(-1)


class _Logits(_Probabilities):
    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def exported_program(model: nn.Module, input_size: int = 224, softmax: bool = False) -> torch.export.ExportedProgram:
    """`torch.export` of a HorNet on the CPU in float32, with free batch, height and width (each side >= 64).

    The input is `images`, float32 (B, 3, H, W), normalised; the output logits, or probabilities with `softmax`.
    """
    model = model.float().cpu().eval()
    model.set_operators(MatrixDft())
    try:
        wrapped = (_Probabilities if softmax else _Logits)(model).eval()
        side = torch.export.Dim.DYNAMIC(min=SMALLEST_SIDE, max=4096)
        size = {0: torch.export.Dim.DYNAMIC, 2: side, 3: side}
        # Height and width differ here, so that the graph cannot tie them together.
        example = torch.zeros(2, model.in_chans, max(input_size, SMALLEST_SIDE), max(input_size, SMALLEST_SIDE) + 32)
        with torch.no_grad():
            return torch.export.export(wrapped, (example,), dynamic_shapes={"images": size})
    finally:
        model.set_operators(PLAIN)


def export_onnx(program: torch.export.ExportedProgram, path: str | Path, metadata: dict[str, str]) -> None:
    """Write ONNX with input `images` and output `output`; `metadata` goes into the file's metadata_props.

    Raises UserError when the packages onnx and onnxscript are missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("ONNX export needs the packages onnx, onnxscript and onnxruntime: "
                        "pip install onnx onnxscript onnxruntime", code="missing_package") from error
    converted = torch.onnx.export(program, dynamo=True, opset_version=ONNX_OPSET, input_names=["images"],
                                  output_names=["output"], external_data=False, verbose=False,
                                  dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}})
    converted.model.metadata_props.update(metadata)
    converted.save(str(path), external_data=False)


def check_exported(model: nn.Module, exported: Callable[[Tensor], Tensor], images: Tensor, softmax: bool) -> float:
    """Largest difference of an exported function from the model over a batch, single images, and two other sizes,
    relative to the largest output where that is above 1. Raises UserError (`export_differs`) above `TOLERANCE`."""
    height, width = images.shape[2:]
    other = F.interpolate(images[:2], (height + 32, width + 64))
    found = []
    for batch in (images, images[:1], other, other[:1].transpose(2, 3).contiguous()):
        with torch.inference_mode():
            wanted = model(batch).softmax(-1) if softmax else model(batch)
        found.append((exported(batch) - wanted).abs().max().item() / max(1.0, wanted.abs().max().item()))
    if not all(difference <= TOLERANCE for difference in found):  # true for not-a-number, too
        raise UserError(f"the exported model differs from the model by {max(found):.1e}, more than {TOLERANCE:.0e}: "
                        "the file is not to be used; report this with the versions of torch and onnxruntime.",
                        code="export_differs")
    return max(found)


def onnx_function(path: str | Path) -> Callable[[Tensor], Tensor]:
    """The exported file in ONNX Runtime on the CPU: float32 (B, 3, H, W) → (B, classes)."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("checking an ONNX file needs onnxruntime: pip install onnxruntime",
                        code="missing_package") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    return run
