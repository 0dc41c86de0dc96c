"""Moves one's own image or clip by moving a network's weights: tunes a trained network to it, then draws the video.

python animate.py photo.jpg                                   the image in a seamless loop: moving.mp4
python animate.py photo.jpg --out zoom.webp --motion zoom=0.2 --size 128
python animate.py cat.gif --out on.mp4 --frames 2000          the clip, drawn by a network that goes on without end
python animate.py one.png two.png --seconds 90                side by side, tuned together
python animate.py photo.jpg --drive nod.mp4                   the image moves as the clip does
python generate.py moving.pt --out again.gif --seed 7         what was learnt is in moving.pt: here with another motion

An image is any file that training reads. A clip is a .gif, .webp, .png (APNG), .mp4, .webm, .mov, .mkv or .avi, or a
folder of frames. Beside the video lie a sheet of six frames (.png) and the tuned network (.pt). From Python: `tune`.
"""

import itertools
import math
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # under PYTHONSAFEPATH too

from util import CommandParser, UserError, answer_early, int_between, print_line, run_command, shown_path

INCLUDED = Path(__file__).parent / "data/pretrained/emoji_64.pt"
MOST_SECONDS, FRAME_RATE, LEAST_FRAMES = 6.0, 8.0, 16  # of a clip: how much is read; predictions a second, and in all
SIZES = ("32", "64", "128", "256")


def number_of_seconds(text: str) -> float:
    with suppress(ValueError):
        if 1 <= float(text) <= 86400:
            return float(text)
    raise UserError(f"--seconds must be a number from 1 to 86400, but is '{text}'")


def image_size(text: str) -> int:
    if text.strip() in SIZES:
        return int(text)
    raise UserError(f"--size must be one of {', '.join(SIZES)}, but is '{text}'")


def build_parser() -> ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = CommandParser(description=first, epilog=rest)
    add = parser.add_argument
    add("inputs", metavar="INPUT", nargs="+", help="images, or clips, or both")
    add("--out", metavar="FILE", default="moving.mp4", help=".mp4, .webp, .gif, .png (APNG), or a folder (%(default)s)")
    add("--run", metavar="RUN", default=INCLUDED, help="a run or checkpoint to begin with (the model included, 64 px)")
    add("--size", type=image_size, metavar="N", help=f"pixels a side: {', '.join(SIZES)} (the run's); weights "
        "that don't fit begin as random ones")  # fmt: skip
    add("--seconds", type=number_of_seconds, metavar="S", help="time to tune in (as long as was found good)")
    add("--motion", metavar="LIST", help="of images, as for generate.py: shift=0.2,zoom=0.1 or speed=0.5 (the run's)")
    add("--drive", metavar="CLIP", help="a clip that the images shall move as")
    add("--frames", type=int_between("frames", 1, 10_000_000), metavar="N", help="how many: without it, images move "
        "in a loop and clips are drawn four times; with it, the network goes on, on its own frames")  # fmt: skip
    add("--fps", metavar="F", help="frames a second (24)")
    add("--scale", metavar="K", help="show each pixel as K x K (small images are enlarged to be seen)")
    add("--compare", action="store_true", help="beside what it follows")
    add("--preview", metavar="FILE", help="a .png, written again and again: the images as they are drawn by now")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<number> (%(default)s)")
    add("--force", action="store_true", help="replace the three files of an earlier one")
    return parser


# Mistakes and --help are answered before torch is imported, which takes seconds.
EARLY = answer_early(build_parser().parse_args) if __name__ == "__main__" else None

import torch
from torch import Tensor
from tqdm import tqdm

import generate
from configuration import Config
from generator import Generator, state_rows
from image_data import failure_reason
from losses import squared_distance
from media import save_image, scale_for, tile_images, video_format
from model_definitions import ClipTarget, ImageTarget, PredictorState, Streams, WeightPredictorRNN
from sampling import BATCH, Sampler, Tuned, begin_sampler, clip_frames
from util import atomic_write, command_device
from video_synth import Clip, ClipFrames, Motion

# --------------------------------------------------------------------------------------------------------------- tuning


class Stage(NamedTuple):
    """A part of the tuning."""

    name: str
    share: float  # of the time
    steps: int  # for one image of 32 px
    rates: dict[str, float]  # Adam's learning rate of each part


STAGES = (
    Stage("drawing", 0.4, 450, {"z": 0.02, "decoder": 0.003, "head": 0.002, "target": 0.001}),
    Stage("moving", 0.6, 560, {"gru": 0.002}),
)
"""First z, the decoder and the head learn to draw each frame from a hidden state that is given; then the GRU learns to
be in these states. Both at once take much longer, and all together afterwards made rollouts worse."""

FREE_RATE = 10.0  # the free states of clips learn so many times faster than the network of images
DRAWN = 24  # frames drawn in a step
STREAMS, WINDOW, REPEATS = 16, 12, 8  # videos that the GRU watches; frames of each at a time, and steps with these
OWN, RESTART = 0.6, 0.02  # fraction of the videos that go on from their own frames; chance to begin a video anew
STATE_NOISE, HIDDEN_NOISE, FRAME_NOISE = 0.1, 0.05, 0.05  # so that small errors neither show nor grow


class Progress(NamedTuple):
    """How far the tuning is."""

    fraction: float  # of all, 0 to 1
    stage: str
    psnr: float  # of the still image, dB
    motion: float  # 1 - squared error of the frames drawn / squared distance of the right ones from the image
    images: Callable[[], Tensor]  # decodes them as they are drawn by now, (N, C, H, W)


class _Tuning:
    """The networks, the optimizer of a stage, and the videos that the GRU is in the middle of."""

    def __init__(self, generator: Generator, target: ImageTarget | ClipTarget, seed: int) -> None:
        assert isinstance(generator.predictor, WeightPredictorRNN)
        self.generator, self.target, self.random = generator, target, torch.Generator().manual_seed(seed)
        self.predictor, self.device = generator.predictor, target.images.device
        self.z = self._noise(len(target.images), generator.vae.latent_dim)
        self.parts: dict[str, list[Tensor]] = {
            "z": [self.z],
            "decoder": [*generator.vae.decoder.parameters()],
            "head": [self.predictor.to_update.weight, *generator.head.parameters()],
            "gru": [*self.predictor.norm.parameters(), *self.predictor.gru.parameters()],
            "target": [*target.parameters()],
        }
        for parameter in itertools.chain(*self.parts.values()):
            parameter.requires_grad_()
        self.streams = target.begin(STREAMS, self.random)
        self.time = self._begin(self.streams)  # of the frame that the GRU sees next, (STREAMS, 1)
        self.seen = torch.zeros(STREAMS, dtype=torch.long)  # how many frames it has seen
        self.state = self._first(self.streams)
        self.still = self.motion = torch.zeros(())

    def set_stage(self, stage: Stage) -> None:
        faster = FREE_RATE if isinstance(self.target, ClipTarget) else 1.0
        self.rates = [rate * (faster if part == "target" else 1) for part, rate in stage.rates.items()]
        groups = [{"params": self.parts[part]} for part in stage.rates]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)

    def learn(self, loss: Tensor, step: int, fraction: float) -> None:
        """A step of Adam, whose rates rise in the first 20 steps and fall in the second half of the stage."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * min(1.0, step / 20) * min(1.0, max(0.02, 2 * (1 - fraction)))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def draw(self, fraction: float) -> Iterator[Tensor]:
        """The loss of frames at random times, drawn from the states that the target gives, with noise on these."""
        generator, target = self.generator, self.target
        streams = target.begin(DRAWN, self.random)
        times = target.times(streams, self.random)
        states = target.states(streams, times)[:, 0]
        states = states + STATE_NOISE * self._noise(len(states), 1, uniform=True) * self._noise(*states.shape)
        features, prepared = generator.features(self.z), generator.prepare()
        drawn = generator.decode(features[streams[0]], generator.predict(states, prepared=prepared))
        right = target.video(streams, times, full_size=True)[:, 0]
        still = squared_distance(generator.decode_base(features), target.images).mean()
        error = squared_distance(drawn, right).mean()
        moved = squared_distance(right, target.images[streams[0]]).mean()
        self.still, self.motion = still.detach(), (1 - error / moved).detach()
        yield error + still

    def move(self, fraction: float) -> Iterator[Tensor]:
        """Goes on with the videos for a window, and yields the losses of `REPEATS` steps on it: squared errors of the
        GRU's states, whose inputs have noise, as has the state that it begins with.
        """
        own = torch.rand(STREAMS, generator=self.random) < OWN * min(1.0, 2 * fraction)
        own &= (self.seen >= self.target.seen_first) & (self.target.drive is None)
        times = self.time + self.target.pace * torch.arange(WINDOW, device=self.device)
        video = self.target.video(self.streams, times)
        frames = self.generator.downscale(video.flatten(0, 1)).unflatten(0, (-1, WINDOW))
        if own.any():
            frames[own] = self._roll(own.nonzero()[:, 0].to(self.device), times)
        judged = self.seen[:, None] + torch.arange(WINDOW) >= self.target.blind
        right = self.target.states(self.streams, times + self.target.pace).detach()
        for _ in range(REPEATS):
            level = FRAME_NOISE * self._noise(STREAMS, 1, 1, 1, 1, uniform=True)
            hidden = self.state.hidden + HIDDEN_NOISE * self._noise(*self.state.hidden.shape)
            state = self.state._replace(hidden=hidden)
            states, after = self.predictor.encode(frames + level * self._noise(*frames.shape), state)
            yield ((states - right).square().sum(2) * judged.to(self.device)).mean()
        self.state = after._replace(hidden=after.hidden.detach())
        self.time, self.seen = times[:, -1:] + self.target.pace, self.seen + WINDOW
        self._restart()

    @torch.no_grad()
    def _roll(self, rows: Tensor, times: Tensor) -> Tensor:
        """The window of some streams, each frame drawn from the state before it: (n, WINDOW, C, height, width)."""
        generator, state = self.generator, state_rows(self.state, rows)
        noise = self.target.noise(self.streams, times, generator.video_size)[rows]
        features = generator.features(self.z)[self.streams[0][rows]]
        return generator.rollout(features, state.hidden[-1][:, None], state, WINDOW, noise)

    def _restart(self) -> None:
        """Begins a few of the videos anew, or half of them where they are short."""
        chosen = torch.rand(STREAMS, generator=self.random) < (0.5 if self.target.drive else RESTART)
        streams = self.target.begin(STREAMS, self.random)
        time = self._begin(streams)
        if chosen.any():
            rows = chosen.nonzero()[:, 0].to(self.device)
            self.streams = tuple(old.index_copy(0, rows, x[rows]) for old, x in zip(self.streams, streams, strict=True))
            self.time, self.seen = self.time.index_copy(0, rows, time[rows]), self.seen.masked_fill(chosen, 0)
            first = self._first(tuple(x[rows] for x in self.streams))
            places = enumerate(zip(self.state, first, strict=True))  # only the hidden state has layers in front
            self.state = PredictorState(*(old.index_copy(int(not number), rows, new) for number, (old, new) in places))

    def _begin(self, streams: Streams) -> Tensor:
        """Times at which videos begin, (STREAMS, 1): any, but three of ten at 0; or 0, if they are to begin at rest."""
        time = self.target.times(streams, self.random).floor()
        time[torch.rand(STREAMS, generator=self.random) < (1 if self.target.drive else 0.3)] = 0
        return time

    @torch.no_grad()
    def _first(self, streams: Streams) -> PredictorState:
        """The GRU's state after the image."""
        return self.predictor.encode(self.generator.downscale(self.target.first_frames(streams))[:, None])[1]

    def _noise(self, *shape: int, uniform: bool = False) -> Tensor:
        return (torch.rand if uniform else torch.randn)(shape, generator=self.random).to(self.device)

    def progress(self, fraction: float, stage: str) -> Progress:
        """Waits for the device."""
        mean = self.still.item() / self.target.images[0].numel()
        return Progress(fraction, stage, -10 * math.log10(max(mean, 1e-10)), self.motion.item(), self.images)

    @torch.no_grad()
    def images(self) -> Tensor:
        """The still images, (N, C, H, W)."""
        return self.generator.vae.decode(self.z)


def tune(sampler: Sampler, videos: Tensor, names: list[str] | None = None, *, between: int = 1,
         lengths: Tensor | None = None, period_seconds: float | None = None, drive: Clip | None = None,
         seconds: float | None = None, seed: int = 0,
         report: Callable[[Progress], None] = lambda progress: None) -> Sampler:  # fmt: skip
    """Tunes a sampler's networks to images or clips: z, θ and the head to draw each frame, then the GRU to find it.

    Pivotal tuning (Roich et al. 2021, https://arxiv.org/abs/2106.05744) of a video: decoder and head learn each frame
    from a hidden state that is given, as an auto-decoder does (Bojanowski et al. 2018, https://arxiv.org/abs/1707.05776),
    and the GRU learns these states, watching the video and on its own frames.

    Args:
        sampler: networks for images of this size, from `begin_sampler`; all but their encoder are changed in place.
        videos: images (N, C, H, W) in [0, 1], which move as the sampler's seeds 0 to N - 1, or clips (N, T, C, H, W).
        names: of the N.
        between: frames of a clip for each prediction, which draws the first of them; T is a multiple of it.
        lengths: (N,) how many predictions each clip has; None: T / between.
        period_seconds: how long the longest clip lasts; None: 1/8 s for each prediction.
        drive: clips that the images are to move as: the GRU learns to read motion from their first frames.
        seconds: of tuning after its first step; None: as many steps as were found good, always the same.
        seed: of all that is random.
        report: is called about twice a second. KeyboardInterrupt ends the tuning, and what has been learnt is kept.

    Returns a sampler with `tuned` set, and with weights rounded to half precision, as it saves them.
    """
    generator, device, random = sampler.generator, sampler.device, torch.Generator().manual_seed(seed)
    assert isinstance(generator.predictor, WeightPredictorRNN)
    generator.train()  # cuDNN runs a GRU backward in this mode alone
    videos, hidden_size, clip = videos.to(device), generator.predictor.gru.hidden_size, drive
    target: ImageTarget | ClipTarget
    if videos.dim() == 5:
        whole = torch.full((len(videos),), videos.shape[1] // between)
        clip = Clip(videos[:, ::between], (whole if lengths is None else lengths).to(device))
        target = ClipTarget(hidden_size, videos, clip.lengths, between, random)
    else:
        motion = sampler.inputs(range(len(videos))).motion
        assert isinstance(motion, Motion)
        target = ImageTarget(generator.synthesizer, hidden_size, videos, motion, drive, random)
    tuning, began, shown = _Tuning(generator, target.to(device), seed), time.monotonic(), 0.0
    # Larger images have more to be learnt, and so have clips, and reading another image's motion.
    longer = max(1, videos.shape[-1] // 32), 4 if drive else 1 if clip is None else 1.75
    with suppress(KeyboardInterrupt), torch.enable_grad():
        before = 0.0
        for stage, losses, steps in zip(STAGES, (tuning.draw, tuning.move), longer, strict=True):
            tuning.set_stage(stage)
            step, fraction = 0, 0.0
            while fraction < 1:
                for loss in losses(fraction):
                    step += 1
                    tuning.learn(loss, step, fraction)
                if not before and step == 1:
                    began = time.monotonic()  # a GPU's first step takes seconds
                fraction = step / (steps * stage.steps)
                if seconds is not None:
                    fraction = (time.monotonic() - began - before * seconds) / (stage.share * seconds)
                if time.monotonic() - shown > 0.5:
                    report(tuning.progress(before + stage.share * min(1.0, fraction), stage.name))
                    shown = time.monotonic()
            before += stage.share
    report(tuning.progress(1.0, "tuned"))
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.copy_(parameter.half())
    frames = None
    if clip is not None:
        generator.synthesizer.frames = clip.frames.shape[1]
        frames = {"frames": (255 * clip.frames).round().byte().cpu(), "lengths": clip.lengths.cpu()}
    default = generate.PERIOD_SECONDS / sampler.speed if clip is None else clip.frames.shape[1] / FRAME_RATE
    names = names or [f"image {number}" for number in range(1, len(videos) + 1)]
    tuned = Tuned(names, tuning.z.detach().cpu(), period_seconds or default, frames)
    return Sampler(generator, sampler.config, sampler.step, sampler.path, tuned)


# --------------------------------------------------------------------------------------------------------------- inputs


def read_input(path: str, config: Config) -> ClipFrames:
    """Reads an image, or at most the first `MOST_SECONDS` of a clip. One that doesn't end where it began goes forth and
    back. Raises UserError: nothing in it can be read.
    """
    frames, times = list[Tensor](), list[float]()
    try:
        for moment, frame in clip_frames(path, config):
            if moment >= MOST_SECONDS and len(frames) > 1:
                print_line(f"{shown_path(path)}: its first {MOST_SECONDS:g} seconds")
                break
            frames.append(frame)
            times.append(moment)
    except Exception as error:  # damaged files raise nearly anything
        if len(frames) < 2:
            raise UserError(f"cannot read {shown_path(path)}: {failure_reason(path, error)}") from None
        print_line(f"{shown_path(path)}: only its first {len(frames)} frames: {failure_reason(path, error)}")
    if not frames:
        raise UserError(f"cannot read {shown_path(path)}: it has no frames")
    if len(frames) == 1:
        return ClipFrames(Path(path).stem, frames, [0.0])
    if not ClipFrames(path, frames, times).repeats:
        print_line(f"{shown_path(path)} does not end where it began: it is played forth and back")
        times += [2 * times[-1] - moment for moment in times[-2:0:-1]]
        frames += frames[-2:0:-1]
    return ClipFrames(Path(path).stem, frames, times)


def join_clips(inputs: list[ClipFrames], sampler: Sampler) -> tuple[Tensor, dict[str, Any]]:
    """The clips at one frame rate, an image as a clip of its synthetic video: frames (N, T, C, size, size) in [0, 1],
    T of the longest; and `between`, `lengths` and `period_seconds` for `tune`.
    """
    moving = [one for one in inputs if one.duration]
    own_rate = max(len(one.frames) / one.duration for one in moving)
    rate = min(own_rate, max(max(FRAME_RATE, LEAST_FRAMES / one.duration) for one in moving))
    between = max(1, math.floor(min(own_rate, generate.FPS) / rate + 0.01))
    synthesizer, videos, lengths = sampler.generator.synthesizer, list[Tensor](), list[int]()
    for seed, one in enumerate(inputs):
        lengths.append(max(2, round(rate * (one.duration or generate.PERIOD_SECONDS))))
        count, motion = between * lengths[-1], sampler.inputs([seed]).motion
        if one.duration:
            videos.append(one.resampled(count).float() / 255)
        elif isinstance(motion, Motion):
            times = torch.arange(count)[None] * (synthesizer.frames / count)
            image, motion = one.frames[0][None].float() / 255, Motion(*(x.cpu() for x in motion))
            videos.append(synthesizer(image, motion, times, full_size=True)[0])
    longest = between * max(lengths)
    frames = torch.stack([video[torch.arange(longest) % len(video)] for video in videos])
    return frames, {"between": between, "lengths": torch.tensor(lengths), "period_seconds": max(lengths) / rate}


def animate(options: Namespace) -> str:
    """Does what the options say; returns a line about what was written. Raises UserError: options that don't fit, an
    input that can't be read, a file that can't be written.
    """
    out, names = Path(options.out), ("fps", "scale", "frames")
    sheet, tuned = out.with_name(f"{out.stem}_sheet.png"), out.with_name(f"{out.stem}.pt")
    for path in (out, sheet, tuned, *([Path(options.preview)] if options.preview else [])):
        if os.path.exists(path) and not options.force:
            raise UserError(f"{path} is there already: --force replaces it, or give another name")
        if any(os.path.exists(path) and os.path.exists(one) and path.samefile(one) for one in options.inputs):
            raise UserError(f"{path} is an INPUT: give another name")
        with suppress(InterruptedError), atomic_write(path, folder=path == out and not out.suffix):
            raise InterruptedError  # it can be written: better known now than after the tuning
    passed_on = [f"--{name}={value}" for name in names if (value := getattr(options, name)) is not None]
    drawing = generate.build_parser().parse_args(["--out", options.out, *passed_on, *["--compare"] * options.compare])
    if out.suffix:
        video_format(out, drawing.fps or generate.FPS)
    if len(options.inputs) > BATCH:
        raise UserError(f"{len(options.inputs)} inputs are too many to tune together, {BATCH} are the most")
    sampler, line = begin_sampler(options.run, command_device(options.device), options.size)
    if "; new are" in line:
        print_line(line)
    inputs = [read_input(path, sampler.config) for path in options.inputs]
    clips = [read_input(options.drive, sampler.config)] if options.drive else inputs
    moving = [one.name for one in (inputs if options.drive else clips) if one.duration]
    if options.drive and (moving or not clips[0].duration):
        raise UserError(
            f"--drive {shown_path(options.drive)} must be a clip, and each INPUT an image that moves as it does"
        )
    if options.motion is not None and (options.drive or len(moving) == len(inputs)):
        raise UserError("--motion moves images; these move as their clip does")
    if options.motion is not None:
        sampler.set_motion(*generate.read_motion(options.motion, sampler))
    images = torch.stack([one.frames[0] for one in inputs]).float() / 255
    videos, more = images, dict[str, Any]()
    if options.drive or moving:
        frames, more = join_clips(clips, sampler)
        if options.drive:
            between, lengths = more.pop("between"), more.pop("lengths").to(sampler.device)
            more["drive"] = Clip(frames[:, ::between].to(sampler.device), lengths)
        else:
            videos = frames
    more |= {"seconds": options.seconds, "preview": options.preview}
    sampler = tune_with_bar(sampler, videos, [one.name for one in inputs], **more)
    sampler.save(tuned)
    assert sampler.tuned is not None
    save_image(sheet, generate.draw_sheet(sampler, sampler.inputs(range(len(inputs))), images))
    drawing.rollout = bool(options.frames or moving) and not options.drive
    drawing.loop = not drawing.rollout and not options.drive
    periods = 1 if options.drive else generate.PERIODS
    drawing.frames = options.frames or max(1, round(periods * sampler.tuned.seconds * (drawing.fps or generate.FPS)))
    return f"{generate.make_video(drawing, sampler, 'weights')}; {sheet}; {tuned}"


def tune_with_bar(
    sampler: Sampler, videos: Tensor, names: list[str], preview: str | None = None, **more: Any
) -> Sampler:
    """`tune`, with a bar on a terminal, a line about what was reached, and a `preview` that gets a line each time."""
    form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    began, last = time.monotonic(), Progress(0, "", math.nan, math.nan, lambda: videos)
    with tqdm(total=1.0, bar_format=form, disable=None, dynamic_ncols=True) as bar:

        def report(progress: Progress) -> None:
            nonlocal last
            bar.set_description_str(progress.stage, refresh=False)
            bar.set_postfix_str(f"still {progress.psnr:.1f} dB, motion {max(0.0, progress.motion):.0%}", refresh=False)
            bar.update(progress.fraction - bar.n)
            last = progress
            if preview:
                save_image(preview, tile_images(progress.images(), 1, len(names), scale_for(*videos.shape[-2:])))
                print_line(f"{progress.stage}: {progress.fraction:.0%} done, {progress.psnr:.1f} dB")

        sampler = tune(sampler, videos, names, report=report, **more)
    figures = f"the still image has {last.psnr:.1f} dB, {max(0.0, last.motion):.0%} of the motion can be drawn"
    print_line(f"tuned in {time.monotonic() - began:.0f} s: {figures}")
    return sampler


def main(arguments: list[str] | None = None) -> int:
    return run_command(lambda: animate(EARLY or build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
