"""From critic scores, which have no zero and no unit, to probabilities."""

from typing import Any

import torch
from torch import Tensor, nn


class ScoreCalibration(nn.Module):
    """Turns critic scores into probabilities: p = sigmoid(slope · score + intercept), fitted by logistic regression.

    Platt 1999, "Probabilistic outputs for support vector machines". A Wasserstein score has neither zero nor unit, so a
    plain sigmoid of it means nothing; `evaluation.calibrate` fits this one at each checkpoint. All state lies in
    buffers and so in the checkpoint.
    """

    slope: Tensor
    intercept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slope", torch.zeros(()))
        self.register_buffer("intercept", torch.zeros(()))

    def forward(self, score: Tensor) -> Tensor:
        """Scores (B,) -> probabilities (B,) in [0, 1]."""
        return torch.sigmoid(self.slope * score.float() + self.intercept)

    @torch.no_grad()
    def fit(self, score_real: Tensor, score_fake: Tensor) -> None:
        """Fits slope and intercept to scores (N,) of real and of generated pictures. Stays on the device.

        Newton's method, in float64. Targets are Platt's (n + 1) / (n + 2) instead of 1, which keeps separable scores
        from an infinite slope.
        """
        scores = torch.stack([score_real, score_fake]).double()
        count = scores.shape[1]
        centre, spread = scores.mean(), scores.std(correction=0).clamp_min(1e-12)
        x = ((scores - centre) / spread).flatten()
        high = (count + 1) / (count + 2)
        target = torch.cat([torch.full_like(x[:count], high), torch.full_like(x[count:], 1 - high)])
        design = torch.stack([x, torch.ones_like(x)], dim=1)  # (2 N, 2)
        ridge = 1e-6 * torch.eye(2, dtype=torch.float64, device=x.device)
        solution = torch.zeros(2, dtype=torch.float64, device=x.device)
        for _ in range(25):
            p = torch.sigmoid(design @ solution)
            gradient = design.T @ (p - target) / count + ridge @ solution
            hessian = (design * (p * (1 - p))[:, None]).T @ design / count + ridge
            solution = solution - torch.linalg.solve(hessian, gradient)
        self.slope.copy_(solution[0] / spread)
        self.intercept.copy_(solution[1] - solution[0] * centre / spread)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name in ("recent", "seen"):  # in older checkpoints: the scores of the last training steps
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
