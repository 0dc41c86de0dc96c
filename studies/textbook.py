"""The textbook's WGAN-GP iteration, to measure ours against: what a careful reader of the papers would write first.

The same networks (built from the same seed), losses, random numbers and batch, but: NCHW, eager, fp32; critic passes
for real, fake and x_hat apart; the penalty's gradient by `torch.autograd.grad(create_graph=True)`; `.item()` of every
metric at every step; `zero_grad`, `backward` and plain Adam; images decoded from files by a `DataLoader` of
`ImageFolder` in each epoch. Only the studies and the tests use it.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from configuration import Config
from losses import GeneratorLoss, generator_loss, vae_loss, value_at, weight_driven_video_loss
from model_definitions import LEAKY_SLOPE, Discriminator, conv_stages
from training import build_networks
from training_step import CriticNoise, GeneratorNoise


class TextbookCritic(nn.Module):
    """Conv2d, LeakyReLU, MaxPool2d in the usual order, and a score; it shares its weights with `ours`."""

    def __init__(self, ours: Discriminator) -> None:
        super().__init__()
        stages = [[stage.conv, nn.LeakyReLU(LEAKY_SLOPE), nn.MaxPool2d(2)] for stage in conv_stages(ours.stages)]
        self.stages = nn.Sequential(*(nn.Sequential(*stage) for stage in stages))
        self.to_score = ours.to_score

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> scores (B,)."""
        return self.to_score(self.stages(2 * x - 1).flatten(1)).squeeze(1)


class Textbook:
    """Networks and optimizers of a run, and its two steps; `training.iteration` runs it as it runs our step runners.

    Args:
        config: the run's settings; DiffAugment is not in the textbook.
        dtype: of the weights; float64 makes a reference of it.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        assert not config.training.diffaugment
        self.config = config
        self.state = SimpleNamespace(set_rates=lambda *_: None)  # learning rates stand still
        generator, critic = build_networks(config)
        self.generator = generator.to(device, dtype)
        for stage in conv_stages(self.generator.vae.encoder):  # ReLU before the pooling
            stage._modules = {"conv": stage.conv, "activation": stage.activation, "pool": stage.pool}
        self.critic = TextbookCritic(critic).to(device, dtype)
        training = config.training
        betas = (training.adam_betas[0], training.adam_betas[1])
        rest = [p for name, p in self.generator.named_parameters() if not name.startswith("vae.")]
        groups = [
            {"params": self.generator.vae.parameters(), "lr": value_at(training.lr_vae, 0)},
            {"params": rest, "lr": value_at(training.lr_predictor, 0), "betas": tuple(training.adam_betas_predictor)},
        ]
        self.optimizer = torch.optim.Adam(groups, betas=betas)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), value_at(training.lr_critic, 0), betas)

    def critic_loss(self, x_real: Tensor, noise: CriticNoise) -> tuple[Tensor, dict[str, Tensor]]:
        """L_D on real images (B, C, H, W), and its parts."""
        loss, critic = self.config.loss, self.critic
        with torch.no_grad():
            x_fake = self.generator.fakes(noise.z, noise.motion, noise.frame, noise.base_count)
        score_real, score_fake = critic(x_real), critic(x_fake)
        epsilon = noise.epsilon.to(x_real.dtype).view(-1, 1, 1, 1)
        x_hat = (epsilon * x_real + (1 - epsilon) * x_fake).requires_grad_()
        score_hat = critic(x_hat)
        (gradient,) = torch.autograd.grad(score_hat, x_hat, torch.ones_like(score_hat), create_graph=True)
        norm = (gradient.square().sum(dim=(1, 2, 3)) + 1e-12).sqrt()
        penalty, drift = (norm - 1).square().mean(), score_real.square().mean()
        wasserstein = score_fake.mean() - score_real.mean()
        total = wasserstein + loss.lambda_gp * penalty + loss.epsilon_drift * drift
        return total, {"total": total, "gap": -wasserstein, "penalty": penalty, "drift": drift}

    def generator_loss(self, x_real: Tensor, noise: GeneratorNoise) -> GeneratorLoss:
        """The loss of θ and the GRU on real images (B, C, H, W)."""
        x_vae = x_real[: len(noise.posterior)]
        reconstruction, kl = vae_loss(x_vae, *self.generator.vae(x_vae, noise.posterior, noise.decoder_share))
        if noise.motion is None:
            score_fake = score_base = self.critic(self.generator.vae.decode(noise.z))
            update = video = x_real.new_zeros(())
        else:
            output = self.generator(noise.z, noise.motion, noise.frame)
            score_fake, score_base = self.critic(output.x_fake), self.critic(output.x_base)
            update = output.update.mean_square()
            video = weight_driven_video_loss(self.generator, output, noise, self.config)
        return generator_loss(
            score_fake=score_fake, score_base=score_base, reconstruction=reconstruction, kl=kl, update=update,
            video=video, lambda_vae=noise.lambda_vae, weights=self.config.loss,
        )  # fmt: skip

    def critic_step(self, x_real: Tensor, noise: CriticNoise) -> dict[str, float]:
        self.critic_optimizer.zero_grad()
        total, parts = self.critic_loss(x_real, noise)
        total.backward()
        self.critic_optimizer.step()
        return {f"critic/{name}": value.item() for name, value in parts.items()}

    def generator_step(self, x_real: Tensor, noise: GeneratorNoise) -> dict[str, float]:
        self.optimizer.zero_grad()
        loss = self.generator_loss(x_real, noise)
        loss.total.backward()
        self.optimizer.step()
        return {f"generator/{name}": value.item() for name, value in loss._asdict().items() if value is not None}


def textbook_batches(config: Config, device: torch.device) -> Iterator[Tensor]:
    """float32 (B, C, H, W) in [0, 1] without end; every file is decoded again in each epoch."""
    size, grey = config.image.size, [transforms.Grayscale()] * (config.image.channels == 1)
    steps = [*grey, transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    folder = ImageFolder(config.data.root, transforms.Compose(steps))
    while True:
        for x, _ in DataLoader(folder, config.training.batch_size, shuffle=True, drop_last=True, num_workers=2):
            yield x.to(device)
