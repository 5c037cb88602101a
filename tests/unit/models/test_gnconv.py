"""gnConv as a part: alone in a folder, in other shapes, and with clear errors."""
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks.reference import gnconv
from models.gnconv import GnConv
from tests.kits.docs import ROOT


def test_the_single_file_works_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "models" / "gnconv.py", tmp_path)
    code = ("import sys, torch; before = set(sys.modules); from gnconv import GnConv\n"
            "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
            "assert new <= {'gnconv', 'torch'}, new\n"
            "y = GnConv(32, order=3, filter='global')(torch.randn(1, 32, 9, 9)); y.sum().backward()\n"
            "assert y.shape == (1, 32, 9, 9)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("order, dim, options", [
    (1, 6, {}), (5, 32, {}), (2, 12, dict(kernel_size=5, out_dim=5)), (2, 12, dict(filter="global")),
    (5, 32, dict(filter=(7, 3)))])
def test_values_and_gradients_equal_the_papers_formula(order, dim, options):
    """At (7, 5), for which one of the filters is resized and one is not."""
    torch.manual_seed(0)
    layer = GnConv(dim, order, scale=0.7, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, results = torch.randn(2, dim, 7, 5), []
    for out in (layer(x), gnconv(layer, x)):
        results.append([out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))])
    for a, b in zip(*results, strict=True):
        assert float((a - b).detach().norm()) < 1e-5 * float(b.detach().norm())


@pytest.mark.parametrize("make,words", [
    (lambda: GnConv(48, 6), "order 6 halves its width 5 times, and dim 48 is not a multiple of 32"),
    (lambda: GnConv(16, 0), "a whole number from 1 on"),
    (lambda: GnConv(16, 2, kernel_size=4), "an odd number"),
    (lambda: GnConv(16, 2, filter="fft"), '"conv", "global" or a grid'),
    (lambda: GnConv(8, 4, filter="global"), "dim 15: an even number is needed"),
])
def test_errors_name_what_fits(make, words):
    with pytest.raises(ValueError, match=words):
        make()
