"""What the weight updates come from: a GRU that watches a video, or, as a control, a constant that watches nothing."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

NORM_EPSILON = 1e-3
"""Added to the first frame's variance: a blank picture has none."""

INPUT_GAIN = 0.5
"""Standard deviation of what the first frame sends to the GRU's gates at the start."""


class Memory(NamedTuple):
    """What the predictor keeps of the frames it has watched."""

    hidden: Tensor
    """(num_layers, B, hidden_size), of the GRU."""
    mean: Tensor
    """(B, 1, 1), of the first frame's values."""
    deviation: Tensor
    """(B, 1, 1), their standard deviation."""

    def rows(self, rows: slice) -> "Memory":
        """Of some of the videos."""
        return Memory(self.hidden[:, rows].contiguous(), self.mean[rows], self.deviation[rows])


class FirstFrameNorm(nn.Module):
    """LayerNorm (Ba et al. 2016, https://arxiv.org/abs/1607.06450) of whole videos, by the first frame's statistics.

    (frame - mean of the first frame) / deviation of the first frame · gain + bias, gain and bias for each input. With
    statistics of their own, frames would lose what the motion does to brightness and contrast: a probe of the GRU's
    states then told the brightness with R² = 0.65, and with the first frame's 0.95.
    """

    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(input_size))
        self.bias = nn.Parameter(torch.zeros(input_size))

    def forward(self, frames: Tensor, statistics: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Frames (B, T, input_size) and (mean, deviation), (B, 1, 1) each, or None: take them from frame 0."""
        if statistics is None:
            variance, mean = torch.var_mean(frames[:, :1], dim=2, keepdim=True, correction=0)
            statistics = mean, (variance + NORM_EPSILON).sqrt()
        mean, deviation = statistics
        return (frames - mean) / deviation * self.weight + self.bias, statistics


class WeightPredictorRNN(nn.Module):
    """Watches a synthetic video, one frame a step, and predicts an update code at every frame.

    Normalisation, GRU, Linear. The Linear layer is zero and has no bias, so that θ + Δ = θ before training.

    Args:
        input_size: C · height · width of one video frame.
        update_size: length of the predicted code; for the head `full`, the number of updated weights.
        hidden_size, num_layers: of the GRU.
    """

    def __init__(self, input_size: int, update_size: int, hidden_size: int = 128, num_layers: int = 2) -> None:
        super().__init__()
        self.norm = FirstFrameNorm(input_size)
        self.gru = nn.GRU(input_size, hidden_size, num_layers, batch_first=True)
        self.to_update = nn.Linear(hidden_size, update_size, bias=False)
        nn.init.zeros_(self.to_update.weight)
        # torch's own bound knows only hidden_size: the many pixels of a frame would drive every gate to its end.
        nn.init.normal_(self.gru.get_parameter("weight_ih_l0"), std=INPUT_GAIN / math.sqrt(input_size))

    def watch(self, video: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Runs the GRU over (more of) a video.

        Args:
            video: (B, T, C, height, width) in [0, 1].
            memory: of the frames before; None at the beginning, where frame 0 should be the picture itself.

        Returns:
            states (B, T, hidden_size), what the GRU knows at each frame, and the new memory.
        """
        frames, (mean, deviation) = self.norm(video.flatten(2), memory and memory[1:])
        states, hidden = self.gru(frames, memory and memory.hidden)
        return states, Memory(hidden, mean, deviation)

    def forward(self, video: Tensor) -> Tensor:
        """Video (B, T, C, height, width) in [0, 1] -> update codes (B, T, update_size); the last is the picture's."""
        states, _ = self.watch(video)
        return self.to_update(states)


class ConstantUpdate(nn.Module):
    """What stands in the predictor's place when nothing is predicted: one code for all pictures, whatever they show.

    A learned vector, zero at first, so that θ + Δ = θ before training. It has the GRU predictor's `watch` and
    `to_update`, but looks at nothing and knows nothing: its states are empty.
    """

    def __init__(self, update_size: int) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.zeros(update_size))

    def watch(self, video: Tensor, memory: Memory | None = None) -> tuple[Tensor, None]:
        """Video (B, T, C, height, width) -> states (B, T, 0), and no memory."""
        return video.new_empty(*video.shape[:2], 0), None

    def to_update(self, states: Tensor) -> Tensor:
        """States (B, 0) -> the one code for all of them, (1, update_size)."""
        return self.code[None]
