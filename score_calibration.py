"""From critic scores, which have no zero and no unit, to probabilities."""

import torch
from torch import Tensor, nn


class ScoreCalibration(nn.Module):
    """Turns critic scores into probabilities: p = sigmoid(slope · score + intercept), fitted by logistic regression.

    Platt 1999, "Probabilistic outputs for support vector machines". A Wasserstein score has neither zero nor unit, so a
    plain sigmoid of it means nothing; this one is fitted to scores of held-out and of generated pictures, or, where
    nothing is held out, to the last `window` scores of real and of generated pictures in training.
    All state lies in buffers and so in the checkpoint.
    """

    recent: Tensor
    seen: Tensor
    slope: Tensor
    intercept: Tensor

    def __init__(self, window: int = 1024) -> None:
        super().__init__()
        self.register_buffer("recent", torch.zeros(2, window))  # real and generated scores, the newest overwriting
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("slope", torch.zeros(()))
        self.register_buffer("intercept", torch.zeros(()))

    def forward(self, score: Tensor) -> Tensor:
        """Scores (B,) -> probabilities (B,) in [0, 1]."""
        return torch.sigmoid(self.slope * score.float() + self.intercept)

    @torch.no_grad()
    def observe(self, score_real: Tensor, score_fake: Tensor) -> None:
        """Remembers a batch of scores, (B,) each. Stays on the device."""
        window = self.recent.shape[1]
        count = min(len(score_real), window)
        place = (self.seen + torch.arange(count, device=score_real.device)) % window
        self.recent[:, place] = torch.stack([score_real[-count:], score_fake[-count:]]).float()
        self.seen += count

    @torch.no_grad()
    def fit(self) -> None:
        """Fits slope and intercept to the remembered scores. Stays on the device."""
        window = self.recent.shape[1]
        self._fit(self.recent, torch.arange(window, device=self.recent.device) < self.seen)  # what has been filled

    @torch.no_grad()
    def fit_to(self, score_real: Tensor, score_fake: Tensor) -> None:
        """Fits slope and intercept to these scores, (B,) each, and forgets none of the remembered ones."""
        self._fit(torch.stack([score_real, score_fake]), torch.ones_like(score_real, dtype=torch.bool))

    def _fit(self, scores: Tensor, known: Tensor) -> None:
        """Newton's method, in float64, on scores (2, N) of which `known` (N,) count.

        Targets are Platt's (n + 1) / (n + 2) instead of 1, which keeps separable scores from an infinite slope.
        """
        window = scores.shape[1]
        known, scores = known.double(), scores.double()
        count = known.sum().clamp_min(1)
        centre = (scores * known).sum() / (2 * count)
        spread = (((scores - centre).square() * known).sum() / (2 * count)).sqrt().clamp_min(1e-12)
        x = ((scores - centre) / spread).flatten()
        weight = known.expand(2, -1).flatten()
        high = (count + 1) / (count + 2)
        target = torch.stack([high.expand(window), (1 - high).expand(window)]).flatten()
        design = torch.stack([x, torch.ones_like(x)], dim=1)  # (2 window, 2)
        ridge = 1e-6 * torch.eye(2, dtype=torch.float64, device=x.device)
        solution = torch.zeros(2, dtype=torch.float64, device=x.device)
        for _ in range(25):
            p = torch.sigmoid(design @ solution)
            gradient = design.T @ (weight * (p - target)) / count + ridge @ solution
            hessian = (design * (weight * p * (1 - p))[:, None]).T @ design / count + ridge
            solution = solution - torch.linalg.solve(hessian, gradient)
        self.slope.copy_(solution[0] / spread)
        self.intercept.copy_(solution[1] - solution[0] * centre / spread)
