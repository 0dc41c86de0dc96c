"""The textbook's WGAN-GP iteration, to measure ours against: what a careful reader of the papers would write first.

The same networks (built from the same seed), losses, draws and batch, but: NCHW, eager, fp32; critic passes for real,
fake and x_hat apart; the penalty's gradient by `torch.autograd.grad(create_graph=True)`; `.item()` of every metric at
every step; `zero_grad`, `backward` and plain Adam; pictures decoded from files by a `DataLoader` of `ImageFolder` each
epoch. Only `benchmark.py` and the tests use it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from configuration import Config
from generator_path import Generator, build_generator, states_at
from losses import GeneratorLoss, generator_loss, vae_loss
from model_definitions import LEAKY_SLOPE, Discriminator, build_discriminator, conv_stages
from objectives import following_loss
from random_draws import CriticDraws, GeneratorDraws, base_fakes


class TextbookCritic(nn.Module):
    """Conv2d, LeakyReLU, MaxPool2d in the order that one reads everywhere, and a score."""

    def __init__(self, ours: Discriminator) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *(
                nn.Sequential(stage.conv, nn.LeakyReLU(LEAKY_SLOPE), nn.MaxPool2d(2))
                for stage in conv_stages(ours.stages)
            )
        )
        self.to_score = ours.to_score

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> scores (B,)."""
        return self.to_score(self.stages(2 * x - 1).flatten(1)).squeeze(1)


class Textbook:
    """Networks and optimizers of a run, and its two steps.

    Args:
        config: the run's settings; DiffAugment is not in the textbook.
        dtype: float64 makes a reference of it.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        assert not config.training.diffaugment
        torch.manual_seed(config.training.seed)
        self.config = config
        self.generator: Generator = build_generator(config).to(device, dtype)
        torch.manual_seed(config.training.seed + 1)
        critic = build_discriminator(config)
        for stage in conv_stages(self.generator.vae.encoder):  # ReLU before the pooling
            stage._modules = {"conv": stage.conv, "activation": stage.activation, "pool": stage.pool}
        self.discriminator = TextbookCritic(critic).to(device, dtype)
        training = config.training
        betas = (training.adam_betas[0], training.adam_betas[1])
        rest = [p for name, p in self.generator.named_parameters() if not name.startswith("vae.")]
        self.optimizer = torch.optim.Adam(
            [
                {"params": self.generator.vae.parameters(), "lr": training.lr_vae},
                {"params": rest, "lr": training.lr_predictor, "betas": tuple(training.adam_betas_predictor)},
            ],
            betas=betas,
        )
        self.critic_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=training.lr_discriminator, betas=betas
        )

    def critic_loss(self, x_real: Tensor, draws: CriticDraws) -> tuple[Tensor, dict[str, Tensor]]:
        """L_D on real pictures (B, C, H, W), and its parts."""
        loss, critic, n_base = self.config.loss, self.discriminator, base_fakes(self.config)
        with torch.no_grad():
            features = self.generator.features(draws.z)
            x_fake = self.generator.draw_base(features)
            if n_base < len(x_fake):
                _, states, _ = self.generator.watch(x_fake[n_base:], draws.motion)
                update = self.generator.predict(states_at(states, draws.frame))
                x_fake = torch.cat([x_fake[:n_base], self.generator.draw(features[n_base:], update)])
        score_real, score_fake = critic(x_real), critic(x_fake)
        epsilon = draws.epsilon.to(x_real.dtype).view(-1, 1, 1, 1)
        x_hat = (epsilon * x_real + (1 - epsilon) * x_fake).requires_grad_()
        score_hat = critic(x_hat)
        (gradient,) = torch.autograd.grad(score_hat, x_hat, torch.ones_like(score_hat), create_graph=True)
        norm = (gradient.square().sum(dim=(1, 2, 3)) + 1e-12).sqrt()
        penalty, drift = (norm - 1).square().mean(), score_real.square().mean()
        wasserstein = score_fake.mean() - score_real.mean()
        total = wasserstein + loss.lambda_gp * penalty + loss.epsilon_drift * drift
        return total, {"total": total, "gap": -wasserstein, "penalty": penalty, "drift": drift}

    def generator_loss(self, x_real: Tensor, draws: GeneratorDraws) -> GeneratorLoss:
        """The loss of θ and the GRU on real pictures (B, C, H, W)."""
        loss = self.config.loss
        output = self.generator(draws.z, draws.motion, draws.frame)
        x_rec, mu, logvar = self.generator.vae(x_real, draws.posterior)
        reconstruction, kl = vae_loss(x_real, x_rec, mu, logvar)
        score_base = self.discriminator(output.x_base)
        return generator_loss(
            score_fake=score_base if self.generator.update == "off" else self.discriminator(output.x_fake),
            score_base=score_base,
            reconstruction=reconstruction,
            kl=kl,
            update=output.update.mean_square(),
            video=following_loss(self.generator, output, draws, self.config),
            lambda_adv=loss.lambda_adv,
            lambda_base=loss.lambda_base,
            lambda_vae=loss.lambda_vae,
            beta=loss.beta,
            lambda_update=loss.lambda_update,
            lambda_video=loss.lambda_video,
        )

    def critic_step(self, x_real: Tensor, draws: CriticDraws) -> dict[str, float]:
        self.critic_optimizer.zero_grad()
        total, parts = self.critic_loss(x_real, draws)
        total.backward()
        self.critic_optimizer.step()
        return {name: value.item() for name, value in parts.items()}

    def generator_step(self, x_real: Tensor, draws: GeneratorDraws) -> dict[str, float]:
        self.optimizer.zero_grad()
        loss = self.generator_loss(x_real, draws)
        loss.total.backward()
        self.optimizer.step()
        return {name: value.item() for name, value in loss._asdict().items()}


def textbook_batches(config: Config, device: torch.device) -> Iterator[Tensor]:
    """float32 (B, C, H, W) in [0, 1] without end; every file is decoded again in each epoch."""
    size = config.image.size
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    if config.image.channels == 1:
        steps.insert(0, transforms.Grayscale())
    folder = ImageFolder(config.data.root, transforms.Compose(steps))
    while True:
        for x, _ in DataLoader(folder, config.training.batch_size, shuffle=True, drop_last=True, num_workers=2):
            yield x.to(device)
