"""DiffAugment: the same kind of random change to real and generated pictures, with gradients through it.

Zhao et al. 2020, https://arxiv.org/abs/2006.10738: with few pictures the critic learns them by heart; if it only ever
sees changed pictures, real and generated alike, it cannot, and the generator isn't taught to draw the changes. Random
numbers are drawn apart from their use, as everywhere in a training step.
"""

import torch
from torch import Tensor
from torch.nn import functional

KINDS = ("color", "translation", "cutout")
_DRAWS = 7  # uniform numbers per picture: three for colour, two places for each of the others


class DiffAugment:
    """The chosen kinds of change.

    `color` is brightness ±0.5, saturation 0 to 2, contrast 0.5 to 1.5; `translation` is by up to 1/8 of the side, in
    whole pixels, zeros moving in; `cutout` is a grey square of half the side.
    """

    def __init__(self, kinds: list[str]) -> None:
        self.kinds = kinds

    def draw(self, batch: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """The random numbers for a batch: (B, 7) in [0, 1)."""
        return torch.rand(batch, _DRAWS, device=device, generator=generator)

    def __call__(self, x: Tensor, draws: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B, C, H, W); colours may leave [0, 1]. No kinds: the same tensor."""
        if "color" in self.kinds:
            x = _color(x, draws[:, :3])
        if "translation" in self.kinds:
            x = _translation(x, draws[:, 3:5])
        if "cutout" in self.kinds:
            x = _cutout(x, draws[:, 5:7])
        return x


def _color(x: Tensor, draws: Tensor) -> Tensor:
    brightness, saturation, contrast = draws.view(-1, 3, 1, 1, 1).unbind(dim=1)
    x = x + (brightness - 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def _translation(x: Tensor, draws: Tensor) -> Tensor:
    (batch, _, height, width), device = x.shape, x.device
    reach_y, reach_x = height // 8, width // 8
    # Row r of the result is row r + offset of the picture, or a row of the zero border that padding adds.
    offset_y = (draws[:, 0] * (2 * reach_y + 1)).long()
    offset_x = (draws[:, 1] * (2 * reach_x + 1)).long()
    padded = functional.pad(x, (reach_x, reach_x, reach_y, reach_y))
    rows = torch.arange(height, device=device) + offset_y[:, None]
    columns = torch.arange(width, device=device) + offset_x[:, None]
    picture = torch.arange(batch, device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cutout(x: Tensor, draws: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    centre_y, centre_x = draws[:, 0, None] * height, draws[:, 1, None] * width
    near_y = (torch.arange(height, device=x.device) + 0.5 - centre_y).abs() < height / 4
    near_x = (torch.arange(width, device=x.device) + 0.5 - centre_x).abs() < width / 4
    hole = (near_y[:, None, :, None] & near_x[:, None, None, :]).to(x.dtype)
    return x * (1 - hole) + 0.5 * hole
