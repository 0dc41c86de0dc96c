"""Quality measured while a run trains: a fixed budget, and always the same latents, motions and real pictures."""

from pathlib import Path

import torch
from torch import Tensor

from configuration import Config
from distributed import ALONE, World
from evaluation import as_bytes, as_floats, draw_share, evaluation_seeds, real_features, scores
from image_data import TrainingImages
from quality import kernel_distance, load_features, picture_features
from sampling import Sampler
from training_state import TrainingState

SUBSETS = 20


class QualityCheck:
    """Every `output.evaluate_every` steps and after the last one: KID, and the critic's gap on pictures it never saw.

    Features are those of EfficientNet-Lite0, which need no download. Nothing is loaded where it is switched off.
    Several processes draw and look at a share of the pictures each.

    Raises:
        UserError: a package is missing; an image that is held out cannot be read.
    """

    def __init__(self, config: Config, images: TrainingImages, run: Path, world: World = ALONE) -> None:
        self.every, self.count = config.output.evaluate_every, config.output.evaluate_images
        self.keeps_best = config.output.best_metric == "quality/kid"
        self.config, self.run, self.world = config, run, world
        if self.every is None:
            return
        self.features = load_features("efficientnet-lite0", images.device)
        self.real = as_bytes(images.fixed_sample(min(self.count, images.count)))
        self.held_out = images.held_out(self.count) if images.held_out_count else None

    def due(self, step: int, last: bool) -> bool:
        """Whether the pictures of this step are to be measured."""
        return self.every is not None and (last or step % self.every == 0)

    @torch.no_grad()
    def measure(self, state: TrainingState) -> dict[str, float]:
        """Draws `output.evaluate_images` pictures with the averaged networks, and compares them with as many real ones.

        Training's random numbers are not touched. All processes take part, and get the same figures.

        Returns:
            `quality/kid`, `quality/kid_std` of updated pictures, `quality/kid_base` of base ones; `quality/train_gap`,
            and `quality/heldout_gap` where pictures are held out: the critic's mean score of real pictures that it has
            or has not been trained on, minus that of the same updated pictures. A held-out gap that falls behind: the
            critic knows its training pictures by heart.
        """
        sampler = Sampler(state.generator_ema, self.config, state.step, self.run)
        own = draw_share(sampler, evaluation_seeds(self.count), self.world)
        real = real_features(self.features, self.real, self.run / "cache", self.world)
        drawn = {
            name: self.world.gather_rows(picture_features(self.features, as_floats(pictures)))
            for name, pictures in own.items()
        }
        metrics: dict[str, float] = {}
        if self.world.is_first:
            size = min(len(real), self.count) // 2  # smaller than the whole, or the subsets would all be the same
            figures = {name: kernel_distance(real, found, SUBSETS, size) for name, found in drawn.items()}
            metrics["quality/kid"], metrics["quality/kid_std"] = figures["updated"]
            metrics["quality/kid_base"] = figures["base"][0]
        metrics = self.world.from_first(metrics)
        generated = self._mean_score(state, own["updated"])
        for name, pictures in (("train", self.real), ("heldout", self.held_out)):
            if pictures is not None:
                metrics[f"quality/{name}_gap"] = self._mean_score(state, self.world.rows(pictures)) - generated
        return metrics

    def _mean_score(self, state: TrainingState, share: Tensor) -> float:
        """The critic's, of pictures of which this process has a share, uint8 (share, C, H, W)."""
        return self.world.gather_rows(scores(state.discriminator, share)).mean().item()
