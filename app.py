"""A page in the browser to play with: images, how they move and by which weights, one's own photo or clip, and runs.

python app.py                    the model included
python app.py runs/quick         a run, while it trains too
python app.py moving.pt          what animate.py has tuned

It needs pip install -r requirements-app.txt. The page is for this computer alone (127.0.0.1) and sends nothing
anywhere; its files lie in a temporary folder that is removed when it ends, by Ctrl-C.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # under PYTHONSAFEPATH too

from util import CommandParser, UserError, answer_early, command_device, explain, int_between, print_line, run_command


def read_options(arguments: list[str] | None = None) -> Namespace:
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = CommandParser(description=first, epilog=rest)
    add = parser.add_argument
    add("source", metavar="RUN_OR_CHECKPOINT", nargs="?", help="a run's folder, or a .pt file (the model included)")
    add("--runs", metavar="FOLDER", default="runs", help="whose runs are offered besides (%(default)s)")
    add("--port", type=int_between("port", 1, 65535), metavar="N", help="of the page's address (7860, or one after it)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<number> (%(default)s)")
    add("--no-browser", action="store_true", help="print the address, and open no browser")
    options = parser.parse_args(arguments)
    if find_spec("gradio") is None:
        raise UserError("the package gradio is missing; pip install -r requirements-app.txt")
    return options


# Mistakes and --help are answered before torch is imported, which takes seconds.
EARLY = answer_early(read_options) if __name__ == "__main__" else None

FOLDER = TemporaryDirectory(prefix="page-")
# Gradio reads these when it is imported: its files go there, and nothing is reported or looked up anywhere.
os.environ |= {"GRADIO_TEMP_DIR": FOLDER.name, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}

import gradio as gr
from PIL import Image

import generate
from run_report import plot_losses, read_records, sampled_steps
from sampling import Sampler, latent_path, load_sampler

IMAGES = 16  # in the grid
BARS = gr.Progress(track_tqdm=True)  # as the default of an argument: shows tqdm's bars on the page
STYLE = "#grid .grid-container { grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); }"  # on a phone too
HOW = {"in a loop": "--loop", "going on, on its own frames": "--rollout"}


@contextmanager
def told() -> Iterator[None]:
    """Shows a mistake, or a limit of the system, as the one line that a command would print."""
    try:
        yield
    except Exception as error:
        if (line := explain(error)) is None:
            raise  # a mistake of ours, which the terminal shows
        line = re.sub(rf"{re.escape(FOLDER.name)}/\w+/", "", line)  # the user knows the file by its name
        raise gr.Error(line, duration=None, title="", print_exception=False) from None


class Page:
    """What the controls call. Every action is a function of the commands, and writes into a new folder of `FOLDER`.

    Attributes:
        sources: what is shown for a model -> its file, or its run's folder.
        runs: name -> folder of each run.
    """

    def __init__(self, options: Namespace) -> None:
        self.device, self.numbers = command_device(options.device), count(1)
        self.tuning: subprocess.Popen[str] | None = None
        given = [Path(options.source)] if options.source else []
        found = [*given, *sorted(path.parent for path in Path(options.runs).glob("*/metrics.jsonl"))]
        self.runs = {run.name: run for run in reversed(found) if os.path.exists(run / "metrics.jsonl")}
        trained = [run for run in self.runs.values() if os.path.exists(run / "checkpoints/latest.pt")]
        self.sources = {path.name or str(path): str(path) for path in [*given, generate.INCLUDED, *trained]}
        self.settings = self.load(next(iter(self.sources))).config.video

    def load(self, source: str) -> Sampler:
        """The newest networks of a model: a run may be training."""
        return load_sampler(self.sources[source], self.device)

    def file(self, name: str) -> str:
        """A file in a new folder; `name` is ours, never one from outside."""
        return str(Path(mkdtemp(prefix="made-", dir=FOLDER.name), name))

    def generate(self, source: str, name: str, *arguments: str) -> str:
        """Runs `generate.py`; returns the file that it wrote."""
        out = self.file(name)
        command = [self.sources[source], f"--out={out}", f"--device={self.device}", *arguments]
        generate.generate(generate.build_parser().parse_args(command))
        return out

    @told()
    def images(self, source: str, seed: float, show: str) -> list[tuple[Image.Image, str]]:
        """Images of `seed` and those that follow, each with its name; of a tuned network its own."""
        sampler = self.load(source)
        seeds = [int(seed) + k for k in range(generate.default_count(sampler, IMAGES))]
        samples = generate.sample_images(sampler, seeds, None)
        images = [generate.compose(show, [sample], (1, 1), None) for sample in samples]
        return [(image, f"seed {seed}") for image, seed in zip(images, seeds, strict=True)]

    @told()
    def between(self, source: str, seed: float, other: float, place: float) -> Image.Image:
        """The image at `place`, 0 to 1, of the way from a seed's latent to another's."""
        sampler = self.load(source)
        z = latent_path(sampler.inputs([int(seed), int(other)]).z[None], place)
        image = sampler.generator.vae.decode(z).cpu()
        return generate.compose("base", [("", dict.fromkeys(("x_base", "x_fake"), image))], (1, 1), None)

    @told()
    def walk(self, source: str, seed: float) -> str:
        """A walk through latent space that begins and ends at an image."""
        return self.generate(source, "walk.mp4", "--video=latent", f"--seed={int(seed)}")

    @told()
    def move(self, source: str, seed: float, how: str, seconds: float, ending: str, chosen: bool,
             _: Any = BARS, *strengths: float) -> tuple[str, str, str]:  # fmt: skip
        """The clip to be played, the one to be downloaded, and the picture of which weights move."""
        motion = ",".join(f"{name}={x}" for name, x in zip((*generate.MOTIONS, "speed"), strengths, strict=True))
        which = [f"--seed={int(seed)}", *[f"--motion={motion}"] * chosen]
        clip = [*which, "--grid=1x1", f"--frames={round(seconds * generate.FPS)}", HOW[how]]
        shown = self.generate(source, "clip.mp4", *clip)
        file = shown if ending == "mp4" else self.generate(source, f"clip.{ending}", *clip)
        return shown, file, self.generate(source, "layers.png", "--show=layers", *which)

    def tune(self, file: str | None, size: str, seconds: float) -> Iterator[tuple[Any, ...]]:
        """Runs `animate.py` on a file that was dropped: yields the image as it is drawn by now and a line about it,
        and at the end the clip, the network, and the latter as one of the models.
        """
        if file is None:
            raise gr.Error("Drop an image or a clip first.", title="", print_exception=False)
        out, preview, line = self.file("moving.mp4"), self.file("preview.png"), ""
        command = [sys.executable, str(Path(__file__).with_name("animate.py")), file, f"--out={out}", f"--size={size}",
                   f"--seconds={seconds}", f"--preview={preview}", f"--device={self.device}"]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as self.tuning:
            try:
                for line in self.tuning.stdout or ():
                    # Not its path: a browser would keep the first image of that name.
                    drawn = Image.open(preview) if os.path.exists(preview) else None
                    yield drawn, line, None, None, gr.skip()
            finally:
                self.tuning.terminate()  # the page may have been closed
        with told():
            if self.tuning.returncode:
                raise UserError(line.strip().removeprefix("error: ") or "stopped before it began")
        network, name = str(Path(out).with_suffix(".pt")), f"{Path(file).name} ({next(self.numbers)})"
        self.sources[name] = network
        models = gr.Dropdown([*self.sources], value=name)
        yield gr.skip(), "Done. The other tabs now show it: Move it in other ways.", out, network, models

    def stop(self) -> None:
        """Ends the tuning: the clip is then drawn with what has been learnt."""
        if self.tuning:
            self.tuning.send_signal(signal.SIGINT)

    @told()
    def curves(self, names: list[str]) -> tuple[str | None, Any]:
        """The loss curves of runs in one picture, and the slider over their steps."""
        last = max((step for name in names for step in sampled_steps(self.runs[name])), default=0)
        out = self.file("curves.png") if names else None
        if out:
            plot_losses({name: read_records(self.runs[name]) for name in names}, Path(out))
        return out, gr.Slider(maximum=max(1, last), value=last)

    @told()
    def history(self, names: list[str], step: float) -> tuple[list[tuple[Image.Image, str]], str | None]:
        """The samples of runs at the last step that has some by then, and the clip of the first run."""
        images, clip = list[tuple[Image.Image, str]](), None
        for run in (self.runs[name] for name in names):
            steps = sampled_steps(run)
            shown = max((k for k in steps if k <= step), default=min(steps, default=None))
            if shown is not None:
                images.append((Image.open(run / f"samples/step_{shown:06d}.png"), f"{run.name}, step {shown:,}"))
                if clip is None and os.path.exists(video := run / f"clips/step_{shown:06d}.mp4"):
                    shutil.copyfile(video, clip := self.file("clip.mp4"))
        return images, clip

    def build(self) -> gr.Blocks:
        """The page."""
        video = partial(gr.Video, autoplay=True, loop=True, interactive=False, buttons=["download"])
        gallery = partial(gr.Gallery, object_fit="contain", height="auto", show_label=False)
        image = partial(gr.Image, interactive=False, buttons=["download", "fullscreen"])
        with gr.Blocks(title="Moving images", analytics_enabled=False) as page:
            gr.Markdown("## Images that move by moving weights\nChoose one: the other tabs show it.")
            with gr.Row():
                source = gr.Dropdown([*self.sources], label="Model", value=next(iter(self.sources)))
                seed = gr.Number(0, label="Seed: which image", precision=0, minimum=0)
            with gr.Tab("Images"):
                with gr.Row():
                    show = gr.Radio(["base", "updated"], value="base", label="Without or with the update")
                    first = gr.Slider(0, 10_000, 0, step=IMAGES, label="From seed")
                grid = gallery(elem_id="grid", allow_preview=False)
            with gr.Tab("Move"), gr.Row():
                with gr.Column():
                    how = gr.Radio([*HOW], value=next(iter(HOW)), label="Video")
                    seconds = gr.Slider(1, 60, 4, step=1, label="Seconds")
                    ending = gr.Radio(["mp4", "webp", "gif"], value="mp4", label="File to download")
                    with gr.Accordion("Other motions than the model's own", open=False):
                        chosen = gr.Checkbox(label="Move like this:")
                        limits = {one.name: one.metadata.get("high", 1) for one in fields(self.settings)}
                        motion = [gr.Slider(0, limits[name], getattr(self.settings, name), label=name.capitalize())
                                  for name in generate.MOTIONS]  # fmt: skip
                        motion.append(gr.Slider(0.1, 4, 1, label="Speed"))
                    move = gr.Button("Move it", variant="primary")
                    layers = image(show_label=False)
                with gr.Column():
                    clip, file = video(label="Clip"), gr.File(label="Download", interactive=False)
            with gr.Tab("Between"), gr.Row():
                with gr.Column():
                    other = gr.Number(1, label="Seed of the other image", precision=0, minimum=0)
                    place = gr.Slider(0, 1, 0.5, label="From one to the other")
                    walk = gr.Button("Walk through latent space, and back")
                mixed, path = image(label="Between"), video(label="Walk")
            with gr.Tab("Your own"), gr.Row():
                with gr.Column():
                    own = gr.File(label="An image or a clip")
                    size = gr.Radio(["32", "64", "128", "256"], value="64", label="Pixels a side")
                    time = gr.Slider(1, 600, 60, step=1, label="Seconds to tune for")
                    tune = gr.Button("Tune", variant="primary")
                    stop = gr.Button("Stop, and take what it has learnt")
                with gr.Column():
                    said, drawn, tuned = gr.Markdown(), image(label="As it is drawn by now"), video(label="Clip")
                    network = gr.File(label="The network", interactive=False)
            with gr.Tab("Runs"):
                runs = gr.CheckboxGroup([*self.runs], value=[*self.runs][-1:], label="Runs")
                step = gr.Slider(0, 1, 0, step=1, label="Step")
                with gr.Row():
                    samples, past = gallery(columns=1), video(label="Clip of the first")
                curves = image(show_label=False)
            gr.on([page.load, source.change, show.change, first.release], self.images, [source, first, show], grid)
            grid.select(chosen_seed, None, seed)
            move.click(self.move, [source, seed, how, seconds, ending, chosen, *motion], [clip, file, layers],
                       show_progress_on=clip)  # fmt: skip
            gr.on([page.load, place.input, source.change, seed.change, other.change], self.between,
                  [source, seed, other, place], mixed, trigger_mode="always_last", show_progress="hidden")  # fmt: skip
            walk.click(self.walk, [source, seed], path)
            tune.click(self.tune, [own, size, time], [drawn, said, tuned, network, source])
            stop.click(self.stop, queue=False)
            found = gr.on([page.load, runs.change], self.curves, runs, [curves, step])
            found.then(self.history, [runs, step], [samples, past])
            step.input(self.history, [runs, step], [samples, past], trigger_mode="always_last")
        return page


def chosen_seed(event: gr.SelectData) -> int:
    """The seed of an image in the grid."""
    return int(event.value["caption"].removeprefix("seed "))


def work(options: Namespace) -> int:
    """Serves the page until Ctrl-C. Raises UserError: no usable checkpoint, or the port is taken."""
    # Where a script's background has it ignored, `animate.py` would inherit that, and Stop could not end its tuning.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    page = Page(options)
    try:
        _, address, _ = page.build().launch(
            server_name="127.0.0.1", server_port=options.port, share=False, inbrowser=not options.no_browser,
            max_file_size="1gb", footer_links=[], run_history=False, ssr_mode=False, quiet=True, show_error=True,
            prevent_thread_lock=True, css=STYLE,
        )  # fmt: skip
    except OSError:
        raise UserError(f"--port {options.port or '7860 to 7959'} is taken; give another one") from None
    print_line(f"the page is at {address} and Ctrl-C ends it")
    try:
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    finally:  # by SIGTERM too
        if page.tuning:
            page.tuning.terminate()
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run_command(lambda: work(EARLY or read_options(arguments)))


if __name__ == "__main__":
    sys.exit(main())
