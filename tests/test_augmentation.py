"""DiffAugment: off by default, within its stated reach, the same for the same draws, differentiable."""

import pytest
import torch

from augmentation import KINDS, DiffAugment

CPU = torch.device("cpu")


def test_no_kinds_is_the_same_tensor() -> None:
    x = torch.rand(2, 3, 8, 8)
    augment = DiffAugment([])
    assert augment(x, augment.draw(2, CPU)) is x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_kind_changes_pictures_by_its_draws_and_passes_gradients(kind: str, channels: int) -> None:
    x = torch.rand(6, channels, 16, 16, requires_grad=True)
    augment = DiffAugment([kind])
    draws = augment.draw(6, CPU, torch.Generator().manual_seed(0))
    y = augment(x, draws)
    assert y.shape == x.shape
    assert torch.equal(y, augment(x, draws))
    assert not torch.equal(y, x)
    assert not torch.equal(y, augment(x, augment.draw(6, CPU, torch.Generator().manual_seed(1))))
    assert torch.autograd.grad(y.sum(), x)[0].abs().sum() > 0
    alone = augment(x[2:3], draws[2:3])
    assert torch.allclose(y[2:3], alone, atol=1e-6)


def test_translation_moves_whole_pixels_up_to_an_eighth() -> None:
    x = torch.rand(64, 3, 16, 16)
    augment = DiffAugment(["translation"])
    draws = augment.draw(64, CPU, torch.Generator().manual_seed(0))
    seen = set()
    for picture, moved in zip(x, augment(x, draws), strict=True):
        fits = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(moved[:, 2 : 14, 2 : 14], picture[:, 2 + dy : 14 + dy, 2 + dx : 14 + dx])
        ]  # fmt: skip
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) > 15  # of 25


def test_cutout_greys_a_quarter_where_it_lies_inside() -> None:
    x = torch.ones(1, 3, 16, 16)
    y = DiffAugment(["cutout"])(x, torch.full((1, 7), 0.5))
    assert (y == 0.5).float().mean().item() == pytest.approx(0.25)
