"""Models for other runtimes: ONNX and torch.export, with the Fourier filter as matrix products.

The exported graph holds no FFT operator and no complex number, which many runtimes lack, and works at any
batch size and at any image size from 64 pixels on.
"""
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

from common.errors import UserError
from models.dft import use_matrix_filter
from models.hornet import HorNet

TOLERANCE = 1e-4  # of outputs in float32
SMALLEST_SIDE = 64  # below it the last feature map is one pixel wide, for torch.export another program


def exported_program(model: HorNet, input_size: int = 224) -> ExportedProgram:
    """`torch.export` of a HorNet on the CPU in float32, with free batch, height and width (each side >= 64).

    The input is float32 (B, 3, H, W), normalised; the output logits.
    """
    model = model.float().cpu().eval()
    use_matrix_filter(model)
    free = torch.export.Dim.DYNAMIC
    side, height = free(min=SMALLEST_SIDE, max=4096), max(input_size, SMALLEST_SIDE)
    # Height and width differ here, so that the graph cannot tie them together.
    example = torch.zeros(2, model.in_chans, height, height + 32)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: free, 2: side, 3: side},))
    use_matrix_filter(model, False)
    return program


def export_onnx(program: ExportedProgram, path: str | Path, metadata: dict[str, str]) -> None:
    """Write ONNX with input `images` and output `output`; `metadata` goes into the file's metadata_props.

    Raises UserError (`missing_package`).
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX export needs {' and '.join(missing)}: pip install {' '.join(missing)}",
                        code="missing_package")
    converted = torch.onnx.export(
        program, dynamo=True, opset_version=18, input_names=["images"], output_names=["output"],
        external_data=False, verbose=False, dynamic_shapes=({0: "batch", 2: "height", 3: "width"},))
    assert converted is not None
    converted.model.metadata_props.update(metadata)
    converted.save(str(path), external_data=False)


def check_exported(model: HorNet, exported: Callable[[Tensor], Tensor], side: int) -> float:
    """Largest difference of an exported function from the model: a batch, a single image, two other sizes.

    Relative to the largest output where that is above 1. Raises UserError (`export_differs`) above TOLERANCE.
    """
    found, draws = [], torch.Generator().manual_seed(0)
    for shape in ((8, side, side), (1, side, side), (2, side + 32, side + 64), (1, side + 64, side + 32)):
        # Coarse and fine at once, as images are.
        batch = torch.randn(shape[0], model.in_chans, *shape[1:], generator=draws)
        batch += F.interpolate(batch[:, :, :4, :4], shape[1:], mode="bicubic")
        with torch.inference_mode():
            wanted = model(batch)
        found.append((exported(batch) - wanted).abs().max().item() / max(1.0, wanted.abs().max().item()))
    if not all(difference <= TOLERANCE for difference in found):  # true for not-a-number, too
        raise UserError(f"the exported model differs from the model by {max(found):.1e}, more than "
                        f"{TOLERANCE:.0e}: do not use the file, and report this with the versions of "
                        "torch and onnxruntime.", code="export_differs")
    return max(found)


def onnx_function(path: str | Path) -> Callable[[Tensor], Tensor]:
    """The exported file in ONNX Runtime on the CPU: float32 (B, 3, H, W) → (B, classes)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    return run
