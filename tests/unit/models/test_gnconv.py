"""gnConv as a part: alone in a folder, in other shapes, and with clear errors."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.gnconv import GlobalLocalFilter, GnConv, resize_filter


def test_the_single_file_works_in_an_empty_folder(tmp_path):
    shutil.copy(Path(__file__).parents[3] / "models" / "gnconv.py", tmp_path)
    code = ("import sys, torch; before = set(sys.modules); from gnconv import GnConv\n"
            "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
            "assert new <= {'gnconv', 'torch'}, new\n"
            "y = GnConv(32, order=3, filter='global')(torch.randn(1, 32, 9, 9)); y.sum().backward()\n"
            "assert y.shape == (1, 32, 9, 9)")
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + code],
                          cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "", done.stderr


def reference(m: GnConv, x: torch.Tensor) -> torch.Tensor:
    """The paper's formula in NCHW, one operation after the other."""
    q = m.proj_in(x)
    p, q = q[:, :m.dims[0]], q[:, m.dims[0]:]
    if isinstance(m.dwconv, GlobalLocalFilter):
        f = m.dwconv
        q = torch.nn.functional.layer_norm(
            q.permute(0, 2, 3, 1), f.pre_norm.weight.shape, f.pre_norm.weight, f.pre_norm.bias, 1e-6)
        q = q.permute(0, 3, 1, 2)
        half = q.shape[1] // 2
        local, remote = f.dw(q[:, :half]), torch.fft.rfft2(q[:, half:], norm="ortho")
        weight = resize_filter(f.complex_weight, tuple(remote.shape[2:]))
        remote = torch.fft.irfft2(remote * torch.complex(weight[..., 0], weight[..., 1]), s=x.shape[2:], norm="ortho")
        q = torch.stack((local, remote), dim=2).flatten(1, 2).permute(0, 2, 3, 1)
        q = torch.nn.functional.layer_norm(q, f.post_norm.weight.shape, f.post_norm.weight, f.post_norm.bias, 1e-6)
        q = q.permute(0, 3, 1, 2)
    else:
        q = m.dwconv(q)
    gates = (q * m.scale).split(m.dims, dim=1)
    y = p * gates[0]
    for pw, gate in zip(m.pws, gates[1:]):
        y = pw(y) * gate
    return m.proj_out(y)


@pytest.mark.parametrize("filter", ["conv", "global", (5, 4)])
@pytest.mark.parametrize("order,dim,out_dim", [(1, 6, None), (2, 12, 5), (5, 32, None)])
def test_values_and_gradients_equal_the_formula(filter, order, dim, out_dim):
    torch.manual_seed(0)
    m = GnConv(dim, order, kernel_size=5, scale=0.7, out_dim=out_dim, filter=filter).double()
    for parameter in m.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, dim, 7, 5, dtype=torch.float64)
    ours, theirs = m(x), reference(m, x)
    assert ours.shape == (2, out_dim or dim, 7, 5)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, list(m.parameters()), seed),
                    torch.autograd.grad(theirs, list(m.parameters()), seed)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_filter_is_resized_with_aligned_corners():
    weight = torch.randn(3, 4, 3, 2)
    resized = resize_filter(weight, (7, 5))
    assert resized.shape == (3, 7, 5, 2)
    torch.testing.assert_close(resized[:, ::2, ::2], weight)  # corners and every second row stay
    assert resize_filter(weight, (4, 3)) is weight


@pytest.mark.parametrize("make,words", [
    (lambda: GnConv(48, 6), "dim 48 is not a multiple of 32; the nearest width is 64, the largest order for 48 is 5"),
    (lambda: GnConv(3, 5), "the nearest width is 16"),
    (lambda: GnConv(16, 0), "a whole number from 1 on"),
    (lambda: GnConv(16, 2, kernel_size=4), "an odd number"),
    (lambda: GnConv(16, 2, filter="fft"), '"conv", "global" or a grid'),
    (lambda: GnConv(3, 1, filter="global"), "multiple of 2, not 3"),
    (lambda: GlobalLocalFilter(5), "an even number"),
    (lambda: GlobalLocalFilter(4, (0, 3)), "positive"),
    (lambda: GnConv(16, 2)(torch.zeros(1, 8, 4, 4)), r"\(batch, 16, height, width\), not \(1, 8, 4, 4\)"),
])
def test_errors_name_what_fits(make, words):
    with pytest.raises(ValueError, match=words):
        make()
