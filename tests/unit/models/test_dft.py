"""The global filter as matrix products."""
import pytest
import torch

from models.dft import matrix_filter
from models.gnconv import global_filter


@pytest.mark.parametrize("height, width", [(1, 1), (1, 2), (2, 3), (7, 7), (14, 14), (8, 5), (13, 24)])
@pytest.mark.parametrize("grid", [(14, 8), (7, 4), (2, 2), (1, 1)])
def test_matrix_products_equal_the_fourier_transform(height, width, grid):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, height, width), torch.randn(6, *grid, 2)
    torch.testing.assert_close(matrix_filter(x, weight), global_filter(x, weight), rtol=1e-5, atol=2e-5)
