"""Wide products on a CPU are made some columns at a time."""

import pytest
import torch

from models import network
from models.network import products


@pytest.mark.parametrize("columns", [1, 8, 37, 1024])
@pytest.mark.parametrize("biased", [True, False])
def test_columns_may_be_made_in_parts(columns, biased, monkeypatch):
    monkeypatch.setattr(network, "CPU_COLUMNS", columns)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 3), (37, 3), (37,))
    )
    out = torch.full((9, 40), 7.0, dtype=torch.float64)
    products(x, weight, bias if biased else None, out=out[2:7, :37])
    expected = torch.full_like(out, 7.0)
    expected[2:7, :37] = x @ weight.T + (bias if biased else 0)
    torch.testing.assert_close(out, expected)
