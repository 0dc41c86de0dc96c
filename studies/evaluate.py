"""Measures the images of a run: how near to real ones, copied or invented, and how large the predicted update is.

python -m studies.evaluate runs/quick                            tables in Markdown; images: runs/quick/evaluation.png
python -m studies.evaluate runs/quick --json evaluation.json     the same numbers for programs
python -m studies.evaluate runs/quick/checkpoints/best.pt --data photos --sheet photos.png

Both generators decode the same fixed seeds, so that two runs are compared on the same latents and motions:
  base      θ       what the update is added to
  updated   θ + Δ   each image with the update predicted for it
  moved     no generator: the base image moved by the synthesizer, which θ + Δ follows where λ_video is not 0
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from util import CommandParser, UserError, int_between, print_line, run_command

# isort: split
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import quality
from generator import build_critic, stable_seed
from image_data import open_images
from media import labelled_grid, save_image, scale_for, tile_images
from quality import ImageFeatures, as_bytes, as_floats, evaluation_seeds, image_features, scores, seed_batches
from sampling import BATCH, Sampler, load_sampler_with_content
from util import atomic_write, command_device, one_line, os_errors_as_user_errors, shown_path

LABELS = {"base": "θ", "updated": "θ + Δ", "moved": "θ, moved exactly"}
TITLES = ("base", "updated", "base, moved exactly")  # its font has no θ and Δ
TRAINING_IMAGES = "training images"
MAX_REFERENCE = 5000  # real images that generated ones are compared with, and the nearest are searched among
CRITIC_IMAGES = 500  # held-out ones that the critic scores, at most; and generated ones that nothing else has seen
FEW_IMAGES = 200  # on a side: KID of a slight blur was 0.70 ± 0.03 with 200 emoji, ± 0.09 with 100, ± 0.15 with 50
STARTED = time.monotonic()


def progress(batches: Iterable[Any], count: int, doing: str) -> Iterator[Any]:
    """Batches of `count` images, with a bar on a terminal, elsewhere with lines on standard error now and then."""
    total, next_line = -(-count // BATCH), 0.0
    with tqdm(desc=doing, total=total, leave=False, disable=None, unit="batch") as bar:
        for number, batch in enumerate(chain([None], batches)):
            if bar.disable and (now := time.monotonic()) >= next_line:
                next_line, done = now + 20, min(number * count // total, count)
                with suppress(OSError):
                    print(f"{now - STARTED:.0f} s: {doing}, {done:,} of {count:,} images", file=sys.stderr, flush=True)
            if number:
                yield batch
                bar.update()


class RealImages(NamedTuple):
    """Real images, uint8 (N, C, H, W)."""

    reference: Tensor  # trained on; of another folder, all that are not in `held_out`
    held_out: Tensor  # neither trained nor calibrated on; of a run that holds none out, some of `reference`
    held_out_index: Tensor | None  # int64, where these stand in `reference`; None where they do not
    reference_name: str  # TRAINING_IMAGES, or the images of another folder
    notes: list[str]


def own_images(sampler: Sampler) -> str:
    """The run's `data.root`; a relative one from the folder that training stood in, if the run's place tells it."""
    root, output = sampler.config.data.root, sampler.config.output.folder
    run = sampler.path.absolute().parent.parent
    for place in (run, run.resolve()):
        stood = Path(*place.parts[: -len(output.parts)])
        if stood / output == place and os.path.isdir(stood / root):
            return str(stood / root)
    return root


def real_images(sampler: Sampler, saved: dict[str, Any], folder: str | None) -> RealImages:
    """The run's own images, or those of another folder. Raises UserError where there are too few, or one is broken."""
    data = replace(sampler.config.data, root=own_images(sampler) if folder is None else folder)
    open_with = partial(open_images, image=sampler.config.image, batch_size=1, seed=0, device="cpu")
    images = open_with(data)
    known = saved.get("images")  # the file that comes with the project has none
    is_training_set = images.fingerprint == known["fingerprint"] if known else folder is None
    if not is_training_set and images.held_out_count:
        images = open_with(replace(data, holdout=0.0))
    root = shown_path(data.root)
    if images.count < 10:
        raise UserError(f"{root} holds {images.count} image(s), and at least 10 are needed to compare with")
    reference = as_bytes(images.fixed_sample(min(images.count, MAX_REFERENCE)))
    # They are sorted by class: the first ones would be those of a few classes only.
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(stable_seed("new pictures")))
    notes = [f"real images: {images.description}"]
    if not is_training_set:
        count = min(CRITIC_IMAGES, len(order) // 2)
        notes.append(f"{root} is not the run's training set; {count} of its images, chosen at random, are held out")
        rest = reference[order[count:].sort().values]
        return RealImages(rest, reference[order[:count]], None, f"images of {root}", notes)
    if not images.held_out_count or len(held_out := images.held_out_halves(CRITIC_IMAGES)[1]) < 2:
        chosen, few = order[:CRITIC_IMAGES], "data.holdout leaves no images out, or too few"
        notes.append(f"{few}: held-out figures are of {len(chosen)} training ones, chosen at random")
        return RealImages(reference, reference[chosen], chosen, TRAINING_IMAGES, notes)
    notes.append(f"held-out images: {len(held_out)}; the other half calibrated the critic's probability")
    return RealImages(reference, held_out, None, TRAINING_IMAGES, notes)


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
def decode_generators(sampler: Sampler, seeds: Sequence[int]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches of images, uint8 (B, C, H, W), by name, see `LABELS`; and the sums over their updates, (2,), of the mean
    of (Δ / rms θ)² and of the saturated fraction.
    """
    generator = sampler.generator
    for batch in seed_batches(seeds):
        inputs = sampler.inputs(batch)
        output = generator(inputs.z, inputs.motion)
        end = torch.full_like(inputs.z[:, :1], generator.synthesizer.frames)  # the time whose update decodes x_fake
        moved = generator.synthesizer(output.x_base, inputs.motion, end, full_size=True)[:, 0]
        update = torch.stack([output.update.mean_square(), output.update.saturated_fraction(generator.head.bound)])
        images = {"base": output.x_base, "updated": output.x_fake, "moved": moved}
        yield {name: as_bytes(x) for name, x in images.items()}, update.cpu() * len(batch)


@torch.no_grad()
def reconstruction(sampler: Sampler, images: Tensor) -> tuple[float, float, Tensor]:
    """PSNR in dB and SSIM (Wang et al. 2004) of decode(mu), means over uint8 images; and the reconstructions, uint8."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    vae, psnr, ssim, decoded = sampler.generator.vae, 0.0, 0.0, []
    for x in (batch.to(sampler.device) for batch in as_floats(images)):
        x_rec = vae.decode(vae.encode(x)[0])
        psnr -= 10 * (x_rec - x).square().mean(dim=(1, 2, 3)).log10().sum().item()
        ssim += len(x) * torch.as_tensor(structural_similarity_index_measure(x_rec, x, data_range=1.0)).item()
        decoded.append(as_bytes(x_rec))
    return psnr / len(images), ssim / len(images), torch.cat(decoded)


class Evaluation(NamedTuple):
    """All that was measured, and the images of the sheet, uint8 (N, C, H, W)."""

    figures: dict[str, Any]  # what `--json` writes
    samples: dict[str, Tensor]  # 16 by name, see `LABELS`; the same places are the same latents
    nearest: tuple[Tensor, Tensor, Tensor]  # generated, the reference image nearest to each, and their distances (N,)
    reconstructed: tuple[Tensor, Tensor]  # held-out images and their reconstructions


def evaluate(
    sampler: Sampler, saved: dict[str, Any], features: ImageFeatures, images: int = 1000, folder: str | None = None
) -> Evaluation:
    """Measures a checkpoint, whose content is `saved`, by `images` images of each generator, and at most as many real
    ones: the run's own, or those in `folder`. Raises UserError where these are too few or cannot be read.
    """
    critic = load_critic(sampler, saved)
    try:
        real = real_images(sampler, saved, folder)
    except UserError as error:  # often about a setting of training, which is no option here
        reason = re.sub(r"^data\.\w+(=\S+)?:? |; (set|replace|change) [^;]*$", "", str(error))
        option = "" if folder is None else "--data: "
        raise UserError(f"{option}{reason}; name a folder of images with --data") from None
    psnr, ssim, reconstructed = reconstruction(sampler, real.held_out)  # first: a missing package shows before the work
    seeds = evaluation_seeds(images + len(real.held_out))  # the images that the critic scores come last
    decoded, updates = zip(*progress(decode_generators(sampler, seeds), len(seeds), "decoding"), strict=True)
    generated = {name: torch.cat([batch[name] for batch in decoded]) for name in LABELS}
    mean_square, saturated_fraction = (sum(updates) / len(seeds)).tolist()

    def features_of(x: Tensor, doing: str) -> Tensor:
        return image_features(features, progress(as_floats(x), len(x), f"comparing {doing}"))

    reference, held_out = features_of(real.reference, "real"), features_of(real.held_out, "held-out")
    count = min(images, len(reference))
    if count < FEW_IMAGES:
        more = "--images 1000" if images <= count else "more with --data"
        real.notes.append(f"only {count} images: KID and the Fréchet distance of so few say little; give {more}")
    compared = reference[torch.arange(count) * len(reference) // count]  # evenly over the sorted set
    score_real, score_fake = scores(critic, real.held_out), {}
    rows: dict[str, dict[str, float]] = {}
    for name, x in generated.items():
        fake, score_fake[name] = features_of(x[:images], f"generated ({name})"), scores(critic, x[images:])
        kid, kid_std = quality.kernel_distance(compared, fake, subset_size=min(500, max(2, count // 2)))
        precision, recall = quality.precision_recall(compared, fake[:count])
        near = quality.nearest(fake, reference)
        rows[name] = {
            "kid": kid, "kid_std": kid_std, "frechet": quality.frechet_distance(compared, fake),
            "precision": precision, "recall": recall, "nearest_distance": near.values.median().item(),
            "critic_gap": (score_real.mean() - score_fake[name].mean()).item(),
        }  # fmt: skip
        if name == "updated":
            closest = near.values.argsort()[:20]
            pairs = (x[closest], real.reference[near.indices[closest]], near.values[closest])
    real_row = {"nearest_distance": quality.nearest(held_out, reference, real.held_out_index).values.median().item()}
    if (kid_size := min(len(held_out), count) // 2) >= 2:
        real_row["kid"], real_row["kid_std"] = quality.kernel_distance(compared, held_out, subset_size=kid_size)
    p_real, p_fake = (critic.calibration(x.to(sampler.device)).cpu() for x in (score_real, score_fake["updated"]))
    calibration = quality.reliability(p_real, p_fake)
    figures = {
        "checkpoint": str(sampler.path), "step": sampler.step, "features": features.name,
        "images": images, "real_images": count, "held_out_images": len(real.held_out),
        "moved": rows.pop("moved"), "generators": rows, "held_out": real_row,
        "update_relative_size": math.sqrt(mean_square), "update_saturated_fraction": saturated_fraction,
        "reconstruction_psnr_db": psnr, "reconstruction_ssim": ssim,
        "probability_ece": calibration.error, "probability_ece_if_perfect": calibration.expected_error,
        "nearest_among": real.reference_name, "notes": real.notes,
    }  # fmt: skip
    samples = {name: x[:16] for name, x in generated.items()}
    return Evaluation(figures, samples, pairs, (real.held_out[:20], reconstructed[:20]))


def tables(figures: dict[str, Any]) -> Iterator[str]:
    """The figures in Markdown, line by line."""
    among = figures["nearest_among"]
    column = among.replace("|", "\\|")  # a folder's name may hold what ends a cell
    formats = {"frechet": ".2f", "precision": ".3f", "recall": ".3f", "nearest_distance": ".2f", "critic_gap": ".2f"}
    yield f"# {figures['checkpoint']}, step {figures['step']:,}\n"
    yield f"{figures['images']:,} generated, {figures['real_images']:,} real images; features: {figures['features']}.\n"
    measures = f"KID ± spread | Fréchet distance | precision | recall | to the nearest of the {column} | critic's gap"
    yield f"| decoded with | {measures} |\n{7 * '|---'}|"
    rows = {LABELS[name]: row for name, row in (figures["generators"] | {"moved": figures["moved"]}).items()}
    for label, row in (rows | {"held-out real images": figures["held_out"]}).items():
        kid = f"{row['kid']:.4f} ± {row['kid_std']:.4f}" if "kid" in row else "–"
        cells = [f"{row[key]:{form}}" if key in row else "–" for key, form in formats.items()]
        yield f"| {' | '.join([label, kid, *cells])} |"
    strangers = "those are not the training images, so it does not tell whether the run copies"
    copied = "far below the held-out row's, images are copied" if among == TRAINING_IMAGES else strangers
    yield (
        "\nSmaller is nearer to real, but for precision and recall. Gaps: mean score of held-out real images minus "
        f"that of fresh generated ones. Nearest: median distance of features to the nearest of the {among}; {copied}. "
        f"*{LABELS['moved']}*: what θ + Δ is to decode where loss.lambda_video is not 0.\n"
    )
    yield (
        f"Δ / rms θ: {figures['update_relative_size']:.2%} (root mean square), "
        f"{figures['update_saturated_fraction']:.1%} of the predicted numbers at their bound.\n"
    )
    yield (
        f"Held-out images: reconstruction PSNR {figures['reconstruction_psnr_db']:.2f} dB, SSIM "
        f"{figures['reconstruction_ssim']:.3f}; expected calibration error of the probability "
        f"{figures['probability_ece']:.3f} ({figures['probability_ece_if_perfect']:.3f} if it were perfect), against "
        "fresh images of θ + Δ."
    )
    yield from (f"- {note}" for note in figures["notes"])


def draw_sheet(evaluation: Evaluation) -> np.ndarray:
    """Samples of each generator; generated images above the real ones nearest to them; reconstructions: (H, W, 3)."""

    def tiles(rows: int, *stacks: Tensor) -> np.ndarray:
        images = torch.cat(stacks)
        scale = scale_for(images.shape[2], images.shape[3], at_least=64)
        return tile_images(images, rows, -(-len(images) // rows), scale)[None]

    generated, reference, distances = evaluation.nearest
    known = evaluation.figures["nearest_among"] == TRAINING_IMAGES  # a folder's name may have any letters
    near = f"one of the {TRAINING_IMAGES if known else 'images of --data'} (above), and that one (below)"
    pages = [np.asarray(labelled_grid(columns, scale=1)) for columns in (
        {title: tiles(4, x) for title, x in zip(TITLES, evaluation.samples.values(), strict=True)},
        {f"updated images nearest to {near}, {distances[0]:.1f} to {distances[-1]:.1f} apart":
         tiles(2, generated, reference)},
        {"held-out images (above) and their reconstructions (below)": tiles(2, *evaluation.reconstructed)},
    )]  # fmt: skip
    width = max(page.shape[1] for page in pages)
    return np.vstack([np.pad(page, ((0, 0), (0, width - page.shape[1]), (0, 0)), mode="edge") for page in pages])


def write_json(path: str, figures: dict[str, Any]) -> None:
    figures = json.loads(json.dumps(figures), parse_constant=lambda _: None)  # JSON has no NaN: null
    text = json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path) as part, os_errors_as_user_errors(path):
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # a name's surrogates as JSON escapes them


def work(options: argparse.Namespace) -> int:
    if options.sheet and Path(options.sheet).suffix.lower() != ".png":
        raise UserError(f"--sheet {options.sheet}: images are written as .png; change the file's ending")
    for path in filter(None, (options.json, options.sheet)):
        with suppress(InterruptedError), atomic_write(path):  # can it be written? Before minutes of work
            raise InterruptedError
    sampler, saved = load_sampler_with_content(options.run, device := command_device(options.device), options.best)
    for part in ("generator", "generator_ema"):
        saved.pop(part, None)  # the sampler has the latter; a small file has no other
    if sampler.tuned:
        raise UserError(f"{sampler.path}: a network tuned to one input is measured by python -m studies.living")
    run = sampler.path.absolute().parent.parent
    sheet = options.sheet or str((run if os.path.exists(run / "run.lock") else Path()) / "evaluation.png")
    features = quality.load_features(device)
    evaluation = evaluate(sampler, saved, features, options.images, options.data)
    figures, written, failed = evaluation.figures, list[str](), list[str]()
    outputs = [
        (options.json, lambda: write_json(options.json, figures)),
        (sheet, lambda: save_image(sheet, draw_sheet(evaluation))),
        ("the tables", lambda: print_line("\n".join([*tables(figures), f"\nwritten: {', '.join(written)}"]))),
    ]
    for name, write in outputs:
        try:
            if name:
                write()
                written.append(name)
        except Exception as error:  # of any kind: it may not cost the other results
            failed.append(str(error) if isinstance(error, UserError) else f"cannot write {name}: {error!r}")
    if failed:
        raise UserError(one_line("; ".join(failed)))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m studies.evaluate", description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder, or a checkpoint file")
    add("--best", action="store_true", help="the run's best checkpoint instead of its newest")
    add("--data", metavar="FOLDER", help="real images to compare with (the run's own)")
    number = int_between("images", 10, 100_000)
    add("--images", type=number, default=1000, metavar="N", help="images decoded (1000)")
    add("--json", metavar="FILE", help="also write the numbers as JSON")
    add("--sheet", metavar="FILE", help="images, a .png (evaluation.png in the run's folder)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:<number>")
    return run_command(lambda: work(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
