"""Measures the images of a run: how near to real ones, copied or invented, and what the predicted update does.

python evaluate.py runs/quick                                   tables in Markdown, and runs/quick/evaluation.png
python evaluate.py runs/quick --json evaluation.json            the same numbers for programs
python evaluate.py runs/quick --features inception              with the standard Inception: FID (a download)
python evaluate.py runs/quick/checkpoints/best.pt --data photos --sheet photos.png

All generators decode the same fixed seeds, so that two runs are compared on the same latents and motions:
  base            θ                       what the update is added to
  updated         θ + Δ                   each image with the update predicted for it
  mean_update     θ + mean Δ              one constant update for all: as good, if the prediction tells nothing
  other_update    θ + another image's Δ   the update of the image before: as good, if it doesn't matter whose it is
  moved           no generator: the base image moved by the synthesizer, which θ + Δ follows where λ_video is not 0
"""

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from util import (
    CommandParser,
    atomic_write,
    channels_last_on,
    command_device,
    int_between,
    os_errors_as_user_errors,
    print_line,
    run_command,
    shown_path,
)

# isort: split
# util came first: torch reads an environment variable that it sets
import torch
from torch import Tensor
from tqdm import tqdm

import quality
from configuration import Config, UserError
from generator import build_critic, stable_seed
from image_data import BrokenImageError, open_images
from losses import critic_loss
from media import scale_for, tile_images
from quality import as_bytes, as_floats, evaluation_seeds, scores, seed_batches
from run_directory import RunDirectory
from sampling import Sampler, load_sampler_with_content

LABELS = {"base": "θ", "updated": "θ + Δ", "mean_update": "θ + mean Δ", "other_update": "θ + another image's Δ",
          "moved": "θ, moved exactly"}  # fmt: skip
TRAINING_IMAGES = "training images"
MAX_REFERENCE = 5000  # real images that generated ones are compared with, and the nearest are searched among
UPDATE_IMAGES = 256  # whose updates are analysed: the moments need no more
CRITIC_IMAGES = 500  # held-out ones that critics score, at most; and generated ones that nothing else has seen


class RealImages(NamedTuple):
    """Real images, uint8 (N, C, H, W)."""

    reference: Tensor  # trained on; of another folder, all that are not in `held_out`
    held_out: Tensor  # neither trained nor calibrated on; of a run that holds none out, some of `reference`
    held_out_index: Tensor | None  # int64, where these stand in `reference`; None where they do not
    reference_name: str  # TRAINING_IMAGES, or the images of another folder
    notes: list[str]


def real_images(sampler: Sampler, saved: dict[str, Any], folder: str | None) -> RealImages:
    """The run's own images, or those of another folder.

    Raises:
        UserError: there are none, too few, or one is broken.
    """
    data = sampler.config.data if folder is None else replace(sampler.config.data, root=folder)
    open_with = partial(open_images, image=sampler.config.image, batch_size=1, seed=0, device="cpu")
    images = open_with(data)
    is_training_set = images.fingerprint == saved["images"]["fingerprint"]
    if not is_training_set and images.held_out_count:
        images = open_with(replace(data, holdout=0.0))
    if images.count < 10:
        raise UserError(f"--data: {data.root} holds {images.count} images; at least 10 are needed to compare with")
    reference = as_bytes(images.fixed_sample(min(images.count, MAX_REFERENCE)))
    # They are sorted by class: the first ones would be those of a few classes only.
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(stable_seed("new pictures")))
    notes = [f"real images: {images.description}"]
    if not is_training_set:
        root, count = shown_path(data.root), min(CRITIC_IMAGES, len(order) // 2)
        notes.append(f"{root} is not the run's training set; {count} of its images, chosen at random, are held out")
        rest = reference[order[count:].sort().values]
        return RealImages(rest, reference[order[:count]], None, f"images of {root}", notes)
    if not images.held_out_count or len(held_out := images.held_out_halves()[1]) < 2:
        chosen = order[:CRITIC_IMAGES]
        few = "data.holdout leaves no images out, or too few"
        notes.append(f"{few}: held-out figures are of {len(chosen)} training ones, chosen at random")
        return RealImages(reference, reference[chosen], chosen, TRAINING_IMAGES, notes)
    notes.append(f"held-out images: {len(held_out)}; the other half calibrated the critic's probability")
    return RealImages(reference, held_out[:CRITIC_IMAGES], None, TRAINING_IMAGES, notes)


def load_critic(sampler: Sampler, saved: dict[str, Any]) -> Any:
    """The critic that was trained with the sampler's networks."""
    with torch.random.fork_rng(devices=[]):
        critic = build_critic(sampler.config)
    try:
        critic.load_state_dict(saved["critic"])
    except (KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{sampler.path}: a checkpoint, but not with this project's critic ({reason})") from None
    return critic.to(sampler.device).requires_grad_(False)


@torch.no_grad()
def decode_generators(sampler: Sampler, seeds: Sequence[int], mean_update: Tensor) -> Iterator[dict[str, Tensor]]:
    """Batches of images, uint8 (B, C, H, W), by name, see `LABELS`; `mean_update` is (total_size,)."""
    generator = sampler.generator
    for batch in seed_batches(seeds):
        inputs = sampler.inputs(batch)
        output = generator(inputs.z, inputs.motion)
        images = {"base": output.x_base, "updated": output.x_fake}
        update = output.update.dense()
        numbers = {"mean_update": mean_update[None], "other_update": update.numbers.roll(1, 0)}
        for name, other in numbers.items():
            images[name] = generator.decode(output.features, update._replace(numbers=other))
        end = torch.full_like(inputs.z[:, :1], generator.synthesizer.frames)  # the time whose update decodes x_fake
        images["moved"] = generator.synthesizer(output.x_base, inputs.motion, end, full_size=True)[:, 0]
        yield {name: as_bytes(x) for name, x in images.items()}


class UpdatePart(NamedTuple):
    """What the update does to one tensor, or to all; the last three fractions sum to 1, and as estimates may be < 0."""

    name: str
    weights: int
    relative_size: float  # root mean square of Δ / rms θ
    saturated_fraction: float  # of the predicted numbers: those at their bound
    constant_fraction: float  # of the mean square of Δ: what is the same for all images
    between_image_fraction: float  # what differs between images, whatever their motion; near 0: a constant predictor
    between_motion_fraction: float  # what differs between two synthetic videos of one image


@torch.no_grad()
def update_statistics(sampler: Sampler, seeds: Sequence[int]) -> tuple[list[UpdatePart], Tensor]:
    """What Δ does, tensor by tensor and in all, and the mean Δ (total_size,) in units of each tensor's RMS.

    Each image is encoded in two synthetic videos of different motion. With m the mean of Δ over images and motions, the
    mean square of Δ is |m|² + between images + between motions, where the covariance of Δ in the two videos of an image
    is what belongs to the image.
    """
    generator, count = sampler.generator, len(seeds)
    moments: list[Tensor] = []
    saturated = {tensor.name: torch.zeros(()) for tensor in generator.spec.tensors}  # how often, by predicted number
    for batch in seed_batches(seeds):
        inputs = sampler.inputs(batch)
        x_base = generator.decode_base(generator.features(inputs.z))
        motions = (inputs.motion, type(inputs.motion)(*(part.roll(1, 0) for part in inputs.motion)))
        updates = [generator.predict(generator.encode_video(x_base, motion)[1][:, -1]) for motion in motions]
        for name, flags in updates[0].saturated(generator.bound).items():
            saturated[name] = saturated[name] + flags.double().mean(0).cpu() * len(batch)
        first, second = (update.dense().numbers.double().expand(len(batch), -1) for update in updates)
        sums = [first.sum(0), second.sum(0), (first * second).sum(0), (first**2).sum(0), (second**2).sum(0)]
        moments = [a + b for a, b in zip(moments, sums, strict=True)] if moments else sums
    one, two, both, square_one, square_two = moments
    total = (square_one + square_two) / (2 * count)
    between = (both - one * two / count) / (count - 1)
    variance = ((square_one - one**2 / count) + (square_two - two**2 / count)) / (2 * (count - 1))
    pieces = [slice(tensor.offset, tensor.offset + tensor.size) for tensor in generator.spec.tensors]
    parts = []
    for name, piece in [*zip(saturated, pieces, strict=True), ("all", slice(None))]:
        size, image, motion = (x[piece].mean().item() for x in (total, between, variance - between))
        at_bound = torch.cat([*saturated.values()]) if name == "all" else saturated[name]
        fractions = [x / size if size else math.nan for x in (size - image - motion, image, motion)]  # nan: untrained
        parts.append(UpdatePart(name, len(total[piece]), math.sqrt(size), at_bound.mean().item() / count, *fractions))
    return parts, ((one + two) / (2 * count)).float()


def fresh_critic_gap(
    config: Config, device: torch.device, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], steps: int
) -> tuple[float, float]:
    """The gap of a new critic that is trained for a few steps with the run's architecture, batch, rate and penalty.

    The generator cannot have learned to please it, nor can it know the test images.

    Args:
        train, test: real and generated images, uint8 (N, C, H, W) each.

    Returns:
        Mean score of real minus mean score of generated images, for `test` and for `train`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        critic = channels_last_on(device, build_critic(config))
    random = torch.Generator().manual_seed(stable_seed(0, "fresh critic"))
    beta1, beta2 = config.training.adam_betas
    optimizer = torch.optim.Adam(critic.parameters(), lr=config.training.lr_critic, betas=(beta1, beta2))
    batch = config.training.batch_size
    for _ in range(steps):
        x_real, x_fake = (
            images[torch.randint(len(images), (batch,), generator=random)].to(device).float() / 255 for images in train
        )
        epsilon = torch.rand(batch, generator=random).to(device)
        optimizer.zero_grad()
        critic_loss(critic, x_real, x_fake, epsilon, config.loss).total.backward()
        optimizer.step()
    return _gap(critic, *test), _gap(critic, *train)


def _gap(critic: Any, real: Tensor, fake: Tensor) -> float:
    return (scores(critic, real).mean() - scores(critic, fake).mean()).item()


@torch.no_grad()
def reconstruction(sampler: Sampler, images: Tensor) -> tuple[float, float, Tensor]:
    """PSNR in dB and SSIM (Wang et al. 2004) of decode(mu), means over uint8 images; and the reconstructions, uint8."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    vae, psnr, ssim, decoded = sampler.generator.vae, 0.0, 0.0, []
    for x in as_floats(images):
        x = x.to(sampler.device)
        x_rec = vae.decode(vae.encode(x)[0])
        psnr -= 10 * (x_rec - x).square().mean(dim=(1, 2, 3)).log10().sum().item()
        similarity = structural_similarity_index_measure(x_rec, x, data_range=1.0)
        assert isinstance(similarity, Tensor)  # a tuple only where its gradient or image is asked for
        ssim += len(x) * similarity.item()
        decoded.append(as_bytes(x_rec))
    return psnr / len(images), ssim / len(images), torch.cat(decoded)


class Evaluation(NamedTuple):
    """All that was measured, and the images of the sheet, uint8 (N, C, H, W)."""

    figures: dict[str, Any]  # what `--json` writes
    update: list[UpdatePart]
    reliability: quality.Reliability
    samples: dict[str, Tensor]  # 16 by name, see `LABELS`; the same places are the same latents
    nearest: tuple[Tensor, Tensor, Tensor]  # generated, the reference image nearest to each, and their distances (N,)
    reconstructed: tuple[Tensor, Tensor]  # held-out images and their reconstructions


def evaluate(
    sampler: Sampler, saved: dict[str, Any], features: quality.ImageFeatures, *, images: int = 1000,
    folder: str | None = None, critic_steps: int = 200, cache: Path | None = None,
) -> Evaluation:  # fmt: skip
    """Measures a checkpoint.

    Args:
        saved: the checkpoint's content.
        images: images decoded by each generator, and real ones that they are compared with (fewer if there aren't).
        folder: other real images than the run's own.
        critic_steps: of the fresh critics; 0 leaves them out.
        cache: a folder that keeps the features of real images.
    """
    real = real_images(sampler, saved, folder)
    critic = load_critic(sampler, saved)
    update, mean_update = update_statistics(sampler, evaluation_seeds(min(images, UPDATE_IMAGES)))
    seeds = evaluation_seeds(images + len(real.held_out))  # the images that critics score come last
    progress = partial(tqdm, leave=False, disable=None, unit="batch")
    decoded = decode_generators(sampler, seeds, mean_update)
    batches = [*progress(decoded, "decoding", sum(1 for _ in seed_batches(seeds)))]
    generated = {name: torch.cat([batch[name] for batch in batches]) for name in LABELS}
    reference, held_out = (quality.real_features(features, x, cache) for x in (real.reference, real.held_out))
    count = min(images, len(reference))
    compared = reference[torch.arange(count) * len(reference) // count]  # evenly over the sorted set
    rows: dict[str, dict[str, float]] = {}
    for name, x in progress(generated.items(), "comparing"):
        fake, fresh = quality.image_features(features, as_floats(x[:images])), x[images:]
        kid, kid_std = quality.kernel_distance(compared, fake, subset_size=min(500, max(2, count // 2)))
        precision, recall = quality.precision_recall(compared, fake[:count])
        near = quality.nearest(fake, reference)
        rows[name] = {
            "kid": kid, "kid_std": kid_std, "frechet": quality.frechet_distance(compared, fake),
            "precision": precision, "recall": recall, "nearest_distance": near.values.median().item(),
            "critic_gap": _gap(critic, real.held_out, fresh),
        }  # fmt: skip
        if name == "updated":
            closest = near.values.argsort()[:10]
            pairs = (x[closest], real.reference[near.indices[closest]], near.values[closest])
        if critic_steps and name != "moved":
            train, test = (real.reference, x[:images]), (real.held_out, fresh)
            gap, train_gap = fresh_critic_gap(sampler.config, sampler.device, train, test, critic_steps)
            rows[name] |= {"fresh_critic_gap": gap, "fresh_critic_train_gap": train_gap}

    real_row = {"nearest_distance": quality.nearest(held_out, reference, real.held_out_index).values.median().item()}
    if (kid_size := min(len(held_out), count) // 2) >= 2:
        real_row["kid"], real_row["kid_std"] = quality.kernel_distance(compared, held_out, subset_size=kid_size)
    fresh = generated["updated"][images:]
    p_real, p_fake = (critic.calibration(scores(critic, x).to(sampler.device)).cpu() for x in (real.held_out, fresh))
    calibration = quality.reliability(p_real, p_fake)
    psnr, ssim, reconstructed = reconstruction(sampler, real.held_out)
    figures = {
        "checkpoint": str(sampler.path), "step": sampler.step,
        "features": features.name, "frechet_is_fid": features.is_inception,
        "images": images, "real_images": count, "held_out_images": len(real.held_out),
        "moved": rows.pop("moved"), "generators": rows, "held_out": real_row,
        "update": {part.name: part._asdict() for part in update},
        "update_between_image_fraction": update[-1].between_image_fraction,
        "update_saturated_fraction": update[-1].saturated_fraction, "update_relative_size": update[-1].relative_size,
        "reconstruction_psnr_db": psnr, "reconstruction_ssim": ssim,
        "probability_ece": calibration.error, "probability_ece_if_perfect": calibration.expected_error,
        "nearest_among": real.reference_name, "notes": real.notes,
    }  # fmt: skip
    samples = {name: x[:16] for name, x in generated.items()}
    return Evaluation(figures, update, calibration, samples, pairs, (real.held_out[:10], reconstructed[:10]))


# ------------------------------------------------------------------------------------------------- tables and the sheet


def tables(evaluation: Evaluation) -> Iterator[str]:
    """The figures in Markdown, line by line."""
    figures = evaluation.figures
    among = figures["nearest_among"]
    column = among.replace("|", "\\|")  # a folder's name may hold what ends a cell
    formats = {"frechet": ".2f", "precision": ".3f", "recall": ".3f", "nearest_distance": ".2f", "critic_gap": ".2f",
               "fresh_critic_gap": ".2f"}  # fmt: skip
    yield f"# {figures['checkpoint']}, step {figures['step']:,}\n"
    yield f"{figures['images']:,} generated, {figures['real_images']:,} real images; features: {figures['features']}.\n"
    yield _row("decoded with", "KID ± spread", "FID" if figures["frechet_is_fid"] else "Fréchet distance", "precision",
               "recall", f"to the nearest of the {column}", "critic's gap", "fresh critic's gap")  # fmt: skip
    yield 8 * "|---" + "|"
    rows = {LABELS[name]: row for name, row in (figures["generators"] | {"moved": figures["moved"]}).items()}
    for label, row in (rows | {"held-out real images": figures["held_out"]}).items():
        kid = f"{row['kid']:.4f} ± {row['kid_std']:.4f}" if "kid" in row else "–"
        yield _row(label, kid, *(f"{row[key]:{form}}" if key in row else "–" for key, form in formats.items()))
    copied = "far below the held-out row's, images are copied"
    if among != TRAINING_IMAGES:
        copied = "those are not the training images, so it does not tell whether the run copies"
    yield (
        "\nSmaller is nearer to real, but for precision and recall. Gaps: mean score of held-out real images minus "
        f"that of fresh generated ones. Nearest: median distance of features to the nearest of the {among}; {copied}. "
        f"*{LABELS['moved']}*: what θ + Δ is to decode where loss.lambda_video is not 0.\n"
    )
    yield _row("updated tensor", "weights", "Δ / rms θ", "predicted numbers at their bound", "constant",
               "between images", "between motions")  # fmt: skip
    yield 7 * "|---" + "|"
    for part in evaluation.update:
        fractions = ["–" if math.isnan(x) else f"{x:.1%}" for x in part[3:]]
        yield _row(part.name, f"{part.weights:,}", f"{part.relative_size:.2%}", *fractions)
    yield (
        f"\nHeld-out images: reconstruction PSNR {figures['reconstruction_psnr_db']:.2f} dB, SSIM "
        f"{figures['reconstruction_ssim']:.3f}; expected calibration error of the probability "
        f"{figures['probability_ece']:.3f} ({figures['probability_ece_if_perfect']:.3f} if it were perfect), against "
        "fresh images of θ + Δ."
    )
    yield from (f"- {note}" for note in figures["notes"])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def plot_sheet(evaluation: Evaluation) -> Any:
    """A matplotlib Figure of samples, nearest reference images, reconstructions and diagrams."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figures = evaluation.figures
    figure = Figure(figsize=(15, 15), layout="constrained")
    figure.suptitle("{checkpoint}, step {step:,}, {features}".format_map(figures), fontsize=12, parse_math=False)
    top, middle, bottom = figure.subfigures(3, 1, squeeze=False, height_ratios=[3.5, 5.2, 4.6]).flat
    top.get_layout_engine().set(wspace=0.03)  # between the grids
    for axis, (name, x) in zip(top.subplots(1, len(LABELS)), evaluation.samples.items(), strict=True):
        _show(axis, LABELS[name], [x], rows=4)
    generated, reference, distances = evaluation.nearest
    text = (
        f"of all θ + Δ, those nearest to one of the {figures['nearest_among']} (above), and that one (below); "
        f"distances {distances[0]:.1f} to {distances[-1]:.1f}"
    )
    near, rebuilt = middle.subplots(2, 1)
    _show(near, textwrap.fill(text, 160, break_on_hyphens=False), [generated, reference])
    _show(rebuilt, "held-out images (above) and their reconstructions (below)", evaluation.reconstructed)
    calibration, sizes, kid = bottom.subplots(1, 3)
    _plot_reliability(calibration, evaluation.reliability)
    _plot_update(sizes, evaluation.update)
    rows = figures["generators"] | {"moved": figures["moved"]}
    means, spreads = ([row[key] for row in rows.values()] for key in ("kid", "kid_std"))
    kid.bar([textwrap.fill(LABELS[name], 9) for name in rows], means, yerr=spreads, capsize=4, color="C2")
    kid.set_title("kernel distance to real images (KID)\nwith the spread of its subsets", fontsize=10)
    kid.tick_params(axis="x", labelsize=9)
    kid.grid(alpha=0.25, axis="y")
    return figure


def _show(axis: Any, title: str, stacks: Sequence[Tensor], rows: int = 1) -> None:
    """Grids of `rows` rows, one below the other."""
    height, width = stacks[0].shape[-2:]
    grids = [tile_images(x, rows, -(-len(x) // rows), scale_for(height, width, at_least=64)) for x in stacks]
    axis.imshow([row for grid in grids for row in grid], interpolation="none")
    axis.set_title(title, fontsize=11, parse_math=False)  # a folder's name may hold $
    axis.axis("off")


def _plot_reliability(axis: Any, result: quality.Reliability) -> None:
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="perfect")
    axis.plot(result.probability, result.real_fraction, marker="o", label="critic")
    for x, y, count in zip(result.probability, result.real_fraction, result.images, strict=True):
        axis.annotate(str(count), (x, y), textcoords="offset points", xytext=(6, -10), fontsize=8, color="0.35")
    error = f"expected calibration error {result.error:.3f} ({result.expected_error:.3f} if perfect)"
    axis.set_title(f"probability of being real, held-out and fresh images\n{error}", fontsize=10)
    axis.set(xlabel="probability (numbers: images)", ylabel="fraction that is real")
    axis.set(xlim=(-0.03, 1.06), ylim=(-0.06, 1.06))
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="upper left")


def _plot_update(axis: Any, parts: list[UpdatePart]) -> None:
    """One bar a tensor, as long as Δ / rms θ, in three parts by their fractions of the mean square."""
    left = [0.0] * len(parts)
    for column, label in enumerate(("constant", "between images", "between motions"), start=4):
        lengths = [part.relative_size * max(float(part[column]), 0.0) for part in parts]
        axis.barh([part.name.removeprefix("decoder.") for part in parts], lengths, left=left, label=label)
        left = [a + b for a, b in zip(left, lengths, strict=True)]
    for row, part in enumerate(parts):
        if part.relative_size:
            axis.text(left[row], row, f" {part.between_image_fraction:.0%} images", va="center", fontsize=8)
    axis.set_title("size of the update, Δ / rms θ,\nand what its variance belongs to", fontsize=10)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%" if value else "0")
    axis.grid(alpha=0.25, axis="x")
    axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3)


# ---------------------------------------------------------------------------------------------------------- the command


def build_parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(description=description, epilog=examples, formatter_class=raw)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder, or a checkpoint file")
    add("--best", action="store_true", help="the run's best checkpoint instead of its newest")
    add("--data", metavar="FOLDER", help="real images to compare with (the run's own)")
    add("--images", type=int_between("images", 10, 100_000), default=1000, metavar="N", help="images decoded (1000)")
    add("--features", default=quality.FEATURES[0], metavar="NAME", help=" or ".join(quality.FEATURES))
    steps = int_between("critic-steps", 0, 100_000)
    add("--critic-steps", type=steps, default=200, metavar="N", help="of the fresh critics; 0 leaves them out (200)")
    add("--json", metavar="FILE", help="also write the numbers as JSON")
    add("--sheet", metavar="FILE", help="images and diagrams, a .png (evaluation.png in the run's folder)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:<number>")
    return parser


def work(arguments: list[str] | None) -> str:
    options = build_parser().parse_args(arguments)
    if options.sheet and Path(options.sheet).suffix.lower() != ".png":
        raise UserError(f"--sheet {options.sheet}: images are written as .png; change the file's ending")
    device = command_device(options.device)
    sampler, saved = load_sampler_with_content(options.run, device, options.best)
    folder = sampler.path.absolute().parent.parent
    in_run = RunDirectory.holds_run(folder)
    features, cache = quality.load_features(options.features, device), folder / "cache" if in_run else None
    try:
        evaluation = evaluate(sampler, saved, features, images=options.images, folder=options.data,
                              critic_steps=options.critic_steps, cache=cache)  # fmt: skip
    except BrokenImageError as error:
        raise UserError(str(error)) from None
    print_line("\n".join(tables(evaluation)))
    written = [options.sheet or str((folder if in_run else Path()) / "evaluation.png")]
    with os_errors_as_user_errors(written[0]), atomic_write(written[0]) as part:
        plot_sheet(evaluation).savefig(part, dpi=100, format="png")
    if options.json:
        figures = json.loads(json.dumps(evaluation.figures), parse_constant=lambda _: None)  # JSON has no NaN: null
        with atomic_write(options.json) as part:
            part.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        written.append(options.json)
    return f"\nwritten: {', '.join(written)}"


def main(arguments: list[str] | None = None) -> int:
    return run_command(lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
