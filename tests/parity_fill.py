"""The deterministic weights, inputs and pictures of tests/data/parity/fill.py, importable from every test."""
import importlib.util
from pathlib import Path

PARITY = Path(__file__).parent / "data" / "parity"

_spec = importlib.util.spec_from_file_location("parity_data_fill", PARITY / "fill.py")
_fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fill)
parity_tensor, parity_input, parity_image = _fill.parity_tensor, _fill.parity_input, _fill.parity_image
