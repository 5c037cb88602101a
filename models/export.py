"""Models for other runtimes: ONNX and torch.export, with the Fourier filter as matrix products.

The exported graph holds no FFT operator and no complex number, which many runtimes lack, and works at any batch
size and at any image size from 64 pixels on.
"""
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from models.dft import without_fft

ONNX_OPSET = 18
TOLERANCE = 1e-4  # of outputs in float32
SMALLEST_SIDE = 64  # below it the last feature map is one pixel wide, which torch.export treats as another program


def exported_program(model: nn.Module, input_size: int = 224, softmax: bool = False) -> torch.export.ExportedProgram:
    """`torch.export` of a HorNet on the CPU in float32, with free batch, height and width (each side >= 64).

    The input is float32 (B, 3, H, W), normalised; the output logits, or probabilities with `softmax`.
    """
    model = model.float().cpu().eval()
    with without_fft(model):
        wrapped = nn.Sequential(model, nn.Softmax(-1)) if softmax else model
        side = torch.export.Dim.DYNAMIC(min=SMALLEST_SIDE, max=4096)
        size = {0: torch.export.Dim.DYNAMIC, 2: side, 3: side}
        # Height and width differ here, so that the graph cannot tie them together.
        example = torch.zeros(2, model.in_chans, max(input_size, SMALLEST_SIDE), max(input_size, SMALLEST_SIDE) + 32)
        with torch.no_grad():
            return torch.export.export(wrapped, (example,), dynamic_shapes=(size,))


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
                                  dynamic_shapes=({0: "batch", 2: "height", 3: "width"},))
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
