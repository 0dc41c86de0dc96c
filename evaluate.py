"""Measures the pictures of a run: how near to real ones, copied or invented, and what the predicted update does.

python evaluate.py runs/quick                                   tables in Markdown, and runs/quick/evaluation.png
python evaluate.py runs/quick --json evaluation.json            the same numbers for programs
python evaluate.py runs/quick --features inception              with the standard Inception: FID (a download)
python evaluate.py runs/quick/checkpoints/best.pt --data photos --picture photos.png

Everything is drawn from fixed seeds, so that two runs are compared on the same latents and motions. `evaluation.py`
explains the four generators.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from command_line import OneLineParser, drawing_device, run_command, say, whole_number

# isort: split
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints import load_checkpoint
from configuration import UserError
from evaluation import (
    DRAWN,
    GENERATORS,
    Reliability,
    UpdatePart,
    as_bytes,
    as_floats,
    draw_generators,
    evaluation_seeds,
    fresh_critic_gap,
    real_features,
    reliability,
    scores,
    seed_batches,
    update_statistics,
)
from evaluation_picture import EvaluationPicture, save_evaluation_picture
from image_data import TrainingImages, open_images
from image_files import BrokenImageError, shown_path
from model_definitions import Discriminator, build_discriminator
from pictures import written_whole
from quality import (
    FEATURES,
    PictureFeatures,
    frechet_distance,
    kernel_distance,
    load_features,
    picture_features,
    precision_recall,
)
from random_draws import stable_seed
from run_directory import RunDirectory
from sampling import Sampler, load_sampler

MOST_REAL = 5000
"""Real pictures that are looked at: those that generated ones are compared with, and the nearest are searched among."""
UPDATE_IMAGES = 256
"""Images whose updates are taken apart: the accumulated moments need no more."""
JUDGED = 500
"""Generated pictures that critics are asked about; they were not among those that KID or a fresh critic saw. Of new
real ones as many, at most."""
TRAINING = "training pictures"
"""What known pictures are called where the run was trained on them."""


class RealPictures(NamedTuple):
    """Real pictures, uint8 (N, C, H, W)."""

    known: Tensor
    """Trained on; of another folder, those that are not in `new`."""
    new: Tensor
    """Never trained on, nor fitted to; of a run that holds none out, some of `known`."""
    new_index: Tensor | None
    """int64: the index in `known` of each new picture; None where they are not among those."""
    known_are: str
    """What `known` is called: `TRAINING`, or the pictures of another folder."""
    notes: list[str]
    """What a reader must know about them."""


def real_pictures(sampler: Sampler, saved: dict[str, Any], folder: str | None) -> RealPictures:
    """The run's own pictures, or those of another folder.

    Raises:
        UserError: there are none, too few, or one is broken.
    """
    data = sampler.config.data if folder is None else replace(sampler.config.data, root=folder)

    def opened(holdout: float) -> TrainingImages:
        return open_images(replace(data, holdout=holdout), sampler.config.image, batch_size=1, seed=0, device="cpu")

    images = opened(data.holdout)
    own = images.fingerprint == saved["pictures"]["fingerprint"]
    if not own and images.held_out_count:
        images = opened(0)
    if images.count < 10:
        raise UserError(f"--data: {data.root} holds {images.count} pictures; at least 10 are needed to compare with")
    looked_at = as_bytes(images.fixed_sample(min(images.count, MOST_REAL)))
    # They are sorted by class: the first ones would be those of a few classes only.
    random = torch.Generator().manual_seed(stable_seed("new pictures"))
    order = torch.randperm(len(looked_at), generator=random)
    notes = [f"real pictures: {images.description}"]
    if not own:
        root = shown_path(data.root)
        count = min(JUDGED, len(order) // 2)
        notes.append(
            f"{root} is not the set of pictures that the run was trained on: distances are to its pictures, {count} of "
            "which, chosen at random, are kept apart as held-out ones"
        )
        known = looked_at[order[count:].sort().values]
        return RealPictures(known, looked_at[order[:count]], None, f"pictures of {root}", notes)
    if not images.held_out_count or len(new := images.held_out_halves()[1]) < 2:
        notes.append(
            "the run holds no pictures out, or too few (data.holdout): what is said of held-out ones is of "
            f"{len(order[:JUDGED])} training ones, chosen at random"
        )
        return RealPictures(looked_at, looked_at[order[:JUDGED]], order[:JUDGED], TRAINING, notes)
    notes.append(f"held-out pictures: {len(new)}; the other half is what the critic's probability was fitted to")
    return RealPictures(looked_at, new[:JUDGED], None, TRAINING, notes)


def load_critic(sampler: Sampler, saved: dict[str, Any]) -> Discriminator:
    """The critic that was trained with the sampler's networks."""
    with torch.random.fork_rng(devices=[]):
        critic = build_discriminator(sampler.config)
    try:
        critic.load_state_dict(saved["discriminator"])
    except (KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{sampler.path}: a checkpoint, but not with this project's critic ({reason})") from None
    return critic.to(sampler.device).requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------- measuring


class Evaluation(NamedTuple):
    """All that was measured, and what the picture shows of it."""

    figures: dict[str, Any]
    """What `--json` writes."""
    update: list[UpdatePart]
    reliability: Reliability
    picture: EvaluationPicture
    notes: list[str]


def evaluate(
    sampler: Sampler,
    saved: dict[str, Any],
    features: PictureFeatures,
    *,
    images: int = 1000,
    folder: str | None = None,
    critic_steps: int = 200,
    cache: Path | None = None,
) -> Evaluation:
    """Measures a checkpoint.

    Args:
        saved: the checkpoint's content.
        images: pictures drawn by each generator, and real ones that they are compared with (fewer if there aren't).
        folder: other real pictures than the run's own.
        critic_steps: of the fresh critics; 0 leaves them out.
        cache: a folder that keeps the features of real pictures.
    """
    real = real_pictures(sampler, saved, folder)
    critic = load_critic(sampler, saved)
    update, mean_update = update_statistics(sampler, evaluation_seeds(min(images, UPDATE_IMAGES)))
    count = images + len(real.new)  # those that critics judge come last
    drawn: dict[str, list[Tensor]] = {name: [] for name in DRAWN}
    seeds = evaluation_seeds(count)
    batches = zip(seed_batches(seeds), draw_generators(sampler, seeds, mean_update), strict=True)
    for _, batch in _progress(batches, "drawing", len(list(seed_batches(seeds)))):
        for name, pictures in batch.items():
            drawn[name].append(as_bytes(pictures))
    generated = {name: torch.cat(parts) for name, parts in drawn.items()}

    known = real_features(features, real.known, cache)
    held_out = real_features(features, real.new, cache)
    spread = torch.arange(min(images, len(known))) * len(known) // min(images, len(known))
    compared = known[spread]  # evenly over the sorted set, as many as are drawn
    rows: dict[str, dict[str, float]] = {}
    nearest: dict[str, tuple[Tensor, Tensor]] = {}
    for name, pictures in _progress(generated.items(), "comparing", len(generated)):
        found = picture_features(features, as_floats(pictures[:images]))
        kid, kid_std = kernel_distance(compared, found, subset_size=min(500, max(2, len(compared) // 2)))
        precision, recall = precision_recall(compared, found[: len(compared)])
        nearest[name] = torch.cdist(found.double(), known.double()).min(dim=1)
        fresh = pictures[images:]
        rows[name] = {
            "kid": kid,
            "kid_std": kid_std,
            "frechet": frechet_distance(compared, found),
            "precision": precision,
            "recall": recall,
            "nearest_distance": nearest[name][0].median().item(),
            "critic_gap": (scores(critic, real.new).mean() - scores(critic, fresh).mean()).item(),
        }
        if critic_steps and name in GENERATORS:
            gap, train_gap = fresh_critic_gap(sampler.config, real.known, pictures[:images], real.new, fresh,
                                              steps=critic_steps, device=sampler.device)  # fmt: skip
            rows[name] |= {"fresh_critic_gap": gap, "fresh_critic_train_gap": train_gap}

    real_row = {"nearest_distance": _nearest_of_new(held_out, known, real.new_index).median().item()}
    kid_size = min(len(held_out), len(compared)) // 2
    if kid_size >= 2:
        real_row["kid"], real_row["kid_std"] = kernel_distance(compared, held_out, subset_size=kid_size)
    p_real, p_fake = (
        critic.calibration(scores(critic, pictures).to(sampler.device)).cpu()
        for pictures in (real.new, generated["updated"][images:])
    )
    believed = reliability(p_real, p_fake)
    psnr, ssim, reconstructed = _reconstruction(sampler, real.new)
    figures = {
        "checkpoint": str(sampler.path),
        "step": sampler.step,
        "features": features.name,
        "frechet_is_fid": features.is_inception,
        "images": images,
        "real_images": len(compared),
        "held_out_images": len(real.new),
        "nearest_among": real.known_are,
        "generators": {name: rows[name] for name in GENERATORS},
        "moved": rows["moved"],
        "held_out": real_row,
        "update": {part.name: part._asdict() for part in update},
        "update_between_image_share": update[-1].between_image_share,
        "update_saturated_share": update[-1].saturated_share,
        "update_relative_size": update[-1].relative_size,
        "reconstruction_psnr_db": psnr,
        "reconstruction_ssim": ssim,
        "probability_ece": believed.error,
        "probability_ece_if_perfect": believed.expected_error,
        "notes": real.notes,
    }
    distance, index = nearest["updated"]
    suspicious = distance.argsort()[:10]
    picture = EvaluationPicture(
        samples={DRAWN[name]: pictures[:16] for name, pictures in generated.items()},
        nearest=(generated["updated"][:images][suspicious], real.known[index[suspicious]], distance[suspicious]),
        nearest_among=real.known_are,
        reconstructed=(real.new[:10], reconstructed[:10]),
        reliability=believed,
        update=update,
        kid={DRAWN[name]: (row["kid"], row["kid_std"]) for name, row in rows.items()},
        title=f"{sampler.path}, step {sampler.step:,}, {features.name}",
    )
    return Evaluation(figures, update, believed, picture, real.notes)


def _nearest_of_new(new: Tensor, known: Tensor, new_index: Tensor | None) -> Tensor:
    """How far new real pictures are from the nearest known one, by their features (N, D) and (M, D).

    A picture that is among the known ones, at `new_index`, doesn't count itself.
    """
    distance = torch.cdist(new.double(), known.double())
    if new_index is not None:
        distance[torch.arange(len(new)), new_index] = math.inf
    return distance.min(dim=1).values


@torch.no_grad()
def _reconstruction(sampler: Sampler, pictures: Tensor) -> tuple[float, float, Tensor]:
    """PSNR in dB and SSIM (Wang et al. 2004), means over pictures of what decode(mu) makes of them; and that, uint8."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    psnr = ssim = 0.0
    drawn = []
    for x in as_floats(pictures):
        x = x.to(sampler.device)
        x_rec = sampler.generator.vae.decode(sampler.generator.vae.encode(x)[0])
        share = len(x) / len(pictures)
        psnr += share * peak_signal_noise_ratio(x_rec, x, data_range=1.0, dim=(1, 2, 3)).item()
        similarity = structural_similarity_index_measure(x_rec, x, data_range=1.0)
        assert isinstance(similarity, Tensor)  # a tuple only where its gradient or image is asked for
        ssim += share * similarity.item()
        drawn.append(as_bytes(x_rec))
    return psnr, ssim, torch.cat(drawn)


def _progress(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
    return iter(tqdm(items, what, total, leave=False, disable=None, unit="batch"))


# ---------------------------------------------------------------------------------------------------------- the tables


def tables(evaluation: Evaluation) -> Iterator[str]:
    """The figures in Markdown, line by line."""
    figures = evaluation.figures
    among = figures["nearest_among"]
    column = among.replace("|", "\\|")  # a folder's name may hold what ends a cell
    distance = "FID" if figures["frechet_is_fid"] else "Fréchet distance"
    yield f"# {figures['checkpoint']}, step {figures['step']:,}"
    yield ""
    yield f"{figures['images']:,} generated, {figures['real_images']:,} real pictures; features: {figures['features']}."
    yield ""
    yield (
        f"| drawn with | KID ± spread | {distance} | precision | recall | to the nearest of the {column} | "
        "critic's gap | fresh critic's gap |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name, row in (figures["generators"] | {"moved": figures["moved"]}).items():
        cells = [
            f"{row['kid']:.4f} ± {row['kid_std']:.4f}",
            f"{row['frechet']:.2f}",
            f"{row['precision']:.3f}",
            f"{row['recall']:.3f}",
            f"{row['nearest_distance']:.2f}",
            f"{row['critic_gap']:.2f}",
            f"{row['fresh_critic_gap']:.2f}" if "fresh_critic_gap" in row else "–",
        ]
        yield f"| {DRAWN[name]} | {' | '.join(cells)} |"
    row = figures["held_out"]
    kid = f"{row['kid']:.4f} ± {row['kid_std']:.4f}" if "kid" in row else "–"
    yield f"| held-out real pictures | {kid} | – | – | – | {row['nearest_distance']:.2f} | – | – |"
    yield ""
    copied = (
        "far below the held-out row's, pictures are copied"
        if among == TRAINING
        else "those are not the training pictures, so it does not tell whether the run copies"
    )
    yield (
        "Smaller is nearer to real, but for precision and recall. Gaps: mean score of held-out real pictures minus "
        f"that of fresh generated ones. Nearest: median distance of features to the nearest of the {among}; {copied}. "
        f"*{DRAWN['moved']}*: what θ + Δ is to draw where loss.lambda_video is not 0."
    )
    yield ""
    yield "| updated tensor | weights | Δ / rms θ | at the bound | constant | between images | between motions |"
    yield "|---|---|---|---|---|---|---|"
    for part in evaluation.update:
        shares = [
            "–" if math.isnan(share) else f"{share:.1%}"
            for share in (part.constant_share, part.between_image_share, part.between_motion_share)
        ]
        yield (
            f"| {part.name} | {part.weights:,} | {part.relative_size:.2%} | {part.saturated_share:.1%} | "
            f"{' | '.join(shares)} |"
        )
    yield ""
    yield (
        f"Held-out pictures: reconstruction PSNR {figures['reconstruction_psnr_db']:.2f} dB, SSIM "
        f"{figures['reconstruction_ssim']:.3f}; expected calibration error of the probability "
        f"{figures['probability_ece']:.3f} ({figures['probability_ece_if_perfect']:.3f} if it were perfect), against "
        f"fresh pictures of θ + Δ."
    )
    for note in evaluation.notes:
        yield f"- {note}"


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for what cannot be told."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --------------------------------------------------------------------------------------------------------- the command


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description="Measure the pictures of a run, and what the predicted update does.",
        epilog=__doc__.partition("\n\n")[2] if __doc__ else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a checkpoint file")
    parser.add_argument("--best", action="store_true", help="the run's best checkpoint instead of its newest")
    parser.add_argument("--data", metavar="FOLDER", help="real pictures to compare with (the run's own)")
    parser.add_argument(
        "--images", type=whole_number("images", 10, 100_000), default=1000, metavar="N", help="pictures drawn (1000)"
    )
    parser.add_argument("--features", default=FEATURES[0], metavar="NAME", help=" or ".join(FEATURES))
    parser.add_argument(
        "--critic-steps", type=whole_number("critic-steps", 0, 100_000), default=200, metavar="N",
        help="training steps of the fresh critics; 0 leaves them out (200)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")
    parser.add_argument("--picture", metavar="FILE", help="the picture, a .png (evaluation.png in the run's folder)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:<number>")
    return parser


def work(arguments: list[str] | None) -> str:
    options = build_parser().parse_args(arguments)
    if options.picture and Path(options.picture).suffix.lower() != ".png":
        raise UserError(f"--picture {options.picture}: pictures are written as .png; change the file's ending")
    device = drawing_device(options.device)
    sampler = load_sampler(options.run, device, options.best)
    saved = load_checkpoint(sampler.path)
    folder = sampler.path.absolute().parent.parent
    in_run = RunDirectory.holds_run(folder)
    try:
        evaluation = evaluate(
            sampler,
            saved,
            load_features(options.features, device),
            images=options.images,
            folder=options.data,
            critic_steps=options.critic_steps,
            cache=folder / "cache" if in_run else None,
        )
    except BrokenImageError as error:
        raise UserError(str(error)) from None
    for line in tables(evaluation):
        say(line)
    written = [options.picture or str((folder if in_run else Path()) / "evaluation.png")]
    save_evaluation_picture(evaluation.picture, written[0])
    if options.json:
        with written_whole(options.json) as part:
            text = json.dumps(_without_nan(evaluation.figures), indent=2, ensure_ascii=False)
            part.write_text(text + "\n", encoding="utf-8")
        written.append(options.json)
    return f"\nwritten: {', '.join(written)}"


def main(arguments: list[str] | None = None) -> int:
    return run_command(lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
