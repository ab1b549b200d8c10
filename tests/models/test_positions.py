"""Position encodings: RoPE depends on distances, ALiBi has its authors' slopes, sinusoids have known values."""

from __future__ import annotations

import math

import pytest
import torch

from psannlm.models.positions import alibi_bias, alibi_slopes, apply_rotary_emb, rope_tables, sinusoids


def rotated(vector: torch.Tensor, position: int) -> torch.Tensor:
    return apply_rotary_emb(vector.view(1, 1, 1, -1), rope_tables(torch.tensor([position]), vector.numel())).flatten()


@pytest.mark.parametrize("head_dim", [2, 6, 16])
def test_rope_product_depends_on_distance_alone(head_dim: int) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    q, k = torch.randn(2, head_dim, generator=generator)
    for difference in (0, 1, 5, 100):
        products = [float(rotated(q, n + difference) @ rotated(k, n)) for n in (0, 1, 7, 300)]
        assert products == pytest.approx([products[0]] * 4, abs=2e-4)
    assert float(rotated(q, 3) @ rotated(k, 0)) != pytest.approx(float(q @ k), abs=1e-3)
    # The direction of the difference counts.
    assert float(rotated(q, 3) @ rotated(k, 0)) != pytest.approx(float(rotated(q, 0) @ rotated(k, 3)), abs=1e-3)


def test_rope_is_a_complex_rotation_at_falling_frequencies() -> None:
    x = torch.randn(6, generator=torch.Generator().manual_seed(0))
    pairs = torch.complex(x[:3], x[3:]).to(torch.complex128)
    frequency = torch.tensor([1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)], dtype=torch.float64)
    turned = pairs * torch.exp(1j * 5 * frequency)
    torch.testing.assert_close(rotated(x, 5).double(), torch.cat((turned.real, turned.imag)), rtol=0, atol=1e-6)


def test_rope_by_row_equals_rope_of_that_row() -> None:
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3], [9, 10, 11, 12]])
    cos, sin = rope_tables(positions, 8)
    together = apply_rotary_emb(x, (cos.unsqueeze(1), sin.unsqueeze(1)))
    for row in range(2):
        assert torch.equal(together[row : row + 1], apply_rotary_emb(x[row : row + 1], rope_tables(positions[row], 8)))


def test_rope_keeps_the_dtype() -> None:
    assert (
        apply_rotary_emb(torch.ones(1, 1, 2, 4, dtype=torch.bfloat16), rope_tables(torch.arange(2), 4)).dtype
        == torch.bfloat16
    )


def test_alibi_slopes_known_values() -> None:
    assert alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    # Four heads give 2^-2 .. 2^-8; the fifth and sixth are the first and third of eight heads.
    assert alibi_slopes(6).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
    assert alibi_slopes(1).tolist() == [1 / 256]


def test_alibi_bias_falls_with_distance_and_hides_the_future() -> None:
    bias = alibi_bias(torch.tensor([0.5, 0.25]), torch.tensor([2, 3]), torch.arange(4))
    hidden = -math.inf
    assert bias.tolist() == [
        [[-1.0, -0.5, 0.0, hidden], [-1.5, -1.0, -0.5, 0.0]],
        [[-0.5, -0.25, 0.0, hidden], [-0.75, -0.5, -0.25, 0.0]],
    ]
    rows = alibi_bias(torch.tensor([0.5, 0.25]), torch.tensor([[2, 3], [0, 1]]), torch.arange(4))
    assert rows.shape == (2, 2, 2, 4)
    assert torch.equal(rows[0], bias)
    assert rows[1, 0].tolist() == [[0.0, hidden, hidden, hidden], [-0.5, 0.0, hidden, hidden]]


def test_sinusoids_known_values() -> None:
    wanted = [[0.0, 1.0, 0.0, 1.0], [math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)]]
    torch.testing.assert_close(sinusoids(torch.tensor([0, 3]), 4), torch.tensor(wanted))
    torch.testing.assert_close(sinusoids(torch.tensor([3]), 3)[0, :2], torch.tensor(wanted[1][:2]))


@pytest.mark.parametrize("d_model", [1, 7, 12])
def test_sinusoids_depend_on_absolute_position(d_model: int) -> None:
    whole = sinusoids(torch.arange(40), d_model)
    assert whole.shape == (40, d_model)
    assert torch.equal(sinusoids(torch.arange(5) + 31, d_model), whole[31:36])
    assert torch.equal(sinusoids(torch.tensor([[0, 1], [30, 31]]), d_model), torch.stack((whole[:2], whole[30:32])))
