"""Trains two iterations on a GPU that isn't there: tensors claim to lie on `cuda:0`, but hold nothing.

python -m studies.fake_cuda                             a list of configurations
python -m studies.fake_cuda runtime.precision=tf32      the default settings but for these
python -m studies.fake_cuda --counts                    also the lines that launch most kernels

Networks, the images' order, random numbers, passes and steps are the project's own, run by `CudaGraphSteps` under
torch's `FakeTensorMode`. That finds what a GPU would not do, would wait for, or could not hold in a graph:

    a tensor on the wrong device         an error of FakeTensorMode
    .item(), masks as indices, nonzero   the same: a number or a shape depends on data
    .cpu(), torch.tensor(...)            copies from or to memory that isn't pinned
    a result on the CPU, a gradient of another type, device or shape than its weight

It also counts kernel launches, roughly: one for most operations. It cannot see numbers, memory and time.
Replaced is what asks the driver: the GRU, autograd's engine, recording, random generators, pinned memory.
"""

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configuration import Config, UserError, load_config
from image_data import TrainingImages
from step_runners import CudaGraphSteps
from studies.benchmark import SOURCE
from training import build_networks, iteration
from training_log import Log
from training_step import NoiseSampler, TrainingState
from util import CommandParser, run_command
from video_synth import TrainingClips

FILES, CUDA = {str(path) for path in Path(__file__).parent.parent.glob("*.py")}, torch.device("cuda", 0)

# fmt: off
JOINT, ALONE = (f"weight_predictor.start=0 weight_predictor.alone={fraction}" for fraction in (1, 0))
QUICK = f"""{JOINT} image.size=32 vae.channels=[8,16,16] critic.channels=[8,16,16] training.batch_size=8
    vae.latent_dim=8 weight_predictor.hidden_size=16 video.height=16 video.width=16"""
TF32, SHARED, AUGMENTED, OFF, FULL, PER_CHANNEL = (
    "runtime.precision=tf32", "weight_predictor.sharing=shared", "training.diffaugment=[color,translation,cutout]",
    "weight_predictor.update=off", "weight_predictor.head=full", "weight_predictor.head=per_channel",
)
CLIPS = "data.clips=x video.source=clips video.input=changes"
CONFIGURATIONS = ["", JOINT, ALONE, f"{JOINT} {TF32}", OFF, " ".join(SOURCE)] + [f"{QUICK} {settings}" for settings in (
    f"{FULL} weight_predictor.layers=[decoder.stage1.*]", FULL, PER_CHANNEL, AUGMENTED, SHARED, OFF, "image.channels=1",
    "loss.lambda_video=0", "loss.rollout_fraction=1", "loss.rollout_fraction=0",
    "loss.rollout_frames=0", "loss.adversarial_frame=random", "loss.base_fake_fraction=1", "loss.base_fake_fraction=0",
    "video.detach=false data.mirror=true", "training.clip=1", CLIPS, f"{CLIPS} {ALONE}",
    "video.shift=0 video.zoom=0 video.rotation=0 video.brightness=0 video.contrast=0 video.noise=0",
)]
"""Overrides, the empty ones first: the defaults."""

NO_KERNEL = ("empty", "new_empty", "unsafe_split", "_unsafe_view", "promote_types", "device", "is_pinned", "_record")
"""Beginnings of the names of operations that launch none, besides views."""
KERNELS: dict[str, Callable[[Any], int]] = {
    "im2col": lambda args: len(args[0]),  # the backward of fold: one for each image (ATen/native/cuda/Im2Col.cu)
    "convolution": lambda args: 1 + (args[2] is not None),
    "convolution_backward": lambda args: sum(args[-1]),
    "_cudnn_rnn": lambda args: args[9] * (2 + 2 * args[0].shape[1]),  # layers and frames: a guess, as is the next
    "_cudnn_rnn_backward": lambda args: args[13] * (6 + 2 * args[0].shape[1]) + 1,
    "_foreach_copy_": lambda args: 1 if len({x.dtype for x in tree_leaves(args[:2])}) == 1 else len(args[0]),
    **dict.fromkeys(["index_put", "index_put_", "_index_put_impl_"], lambda _: 12),  # sorts
    "max_pool2d_with_indices_backward": lambda _: 2,  # zeros first, as in the next
    **dict.fromkeys(["select_backward", "slice_backward", "_foreach_norm"], lambda _: 2),
}
"""Operation -> how many it launches with these arguments, roughly; all others launch one."""
# fmt: on


class Watch(TorchDispatchMode):
    """Notes launches and mistakes of an iteration's parts, which are functions wrapped by `during`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[tuple[str, str, str]] = Counter()  # of (part, operation, `file:line` of the project)
        self.mistakes: list[str] = []
        self._part = ""
        self._line = ""  # of the forward operation whose backward runs
        self._lines: dict[int, str] = {}  # number of a node of autograd's graph -> the line that made it

    def during(self, part: str, do: Callable[..., Any]) -> Callable[..., Any]:
        """`do`, as this part of an iteration."""

        def watched(*arguments: Any) -> Any:
            outer, self._part = self._part, part
            result = do(*arguments)
            self._part = outer  # after an error, `note` still needs to know the part
            return result

        return watched

    def note(self, mistake: str, line: str) -> None:
        if (text := f"{self._part or 'the beginning'}: {mistake} at {line}") not in self.mistakes:
            self.mistakes.append(text)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, line = function._overloadpacket.__name__, self._line or project_line()
        self._lines.setdefault(torch.autograd._get_sequence_nr() - 1, line)  # a node is made before it computes
        result = function(*args, **kwargs or {})
        if self._part and name == "lift_fresh":
            self.note("torch.tensor(...) or the like", line)
        if not self._part or function.is_view or name.startswith(NO_KERNEL):
            return result
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ([args, kwargs], result))
        if not outputs or any(x.numel() for x in outputs):
            self.launches[self._part, name, line] += KERNELS.get(name, lambda _: 1)(args)
        before = {x.device.type for x in inputs if not hasattr(x, "lies_in_pinned_memory")}
        after = {x.device.type for x in outputs}
        if "copy" in name and len(before | after) > 1:
            self.note(f"{name} from {'/'.join(before)} to {'/'.join(after)}", line)
        elif after == {"cpu"}:
            self.note(f"{name} on the CPU", line)
        if any(x.dtype == torch.float16 for x in outputs):
            self.note(f"{name} in fp16, where gradients may vanish", line)
        return result

    def grad(self, outputs: Tensor, inputs: Any, *, allow_unused: bool = False, materialize_grads: bool = False) -> Any:
        """`torch.autograd.grad` of a scalar, node by node, those made last first."""
        leaves: dict[Any, dict[int, Tensor]] = {}
        given: dict[Any, dict[int, Tensor]] = {outputs.grad_fn: {0: torch.ones_like(outputs)}}  # node -> its gradients
        with torch.no_grad():
            while given:
                node = max(given, key=lambda node: node._sequence_nr())
                gradients = given.pop(node)
                self._line = self._lines.get(node._sequence_nr(), "")
                run = node if callable(node) else node.apply  # of an autograd.Function
                results = run(*(gradients.get(place) for place in range(len(node._input_metadata))))
                results = results if isinstance(results, tuple) else (results,)
                for (following, place), gradient in zip(node.next_functions, results, strict=callable(node)):
                    if following is not None and gradient is not None:
                        expected = following._input_metadata[place]
                        if gradient.shape != expected.shape:  # broadcast forward
                            gradient = gradient.sum_to_size(expected.shape)
                        gradient = gradient.to(expected.dtype)
                        places = (leaves if hasattr(following, "variable") else given).setdefault(following, {})
                        places[place] = places[place] + gradient if place in places else gradient
            self._line = ""
            found = {id(node.variable): gradients[0] for node, gradients in leaves.items()}
            found |= {id(x): torch.zeros_like(x) for x in inputs if materialize_grads and id(x) not in found}
        return tuple(found.get(id(x)) if allow_unused else found[id(x)] for x in inputs)


def project_line() -> str:
    """The innermost line of the project's modules that is running, `file:line`."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename not in FILES:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _gru(self: nn.GRU, x: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`nn.GRU.forward` as ATen has it with cuDNN."""
    hx = x.new_zeros(self.num_layers, len(x), self.hidden_size) if hx is None else hx
    weights: list[Tensor] = [self.get_parameter(name) for name in self._flat_weights_names]
    if not hx.is_contiguous():
        raise RuntimeError("rnn: hx is not contiguous")
    if len({tensor.dtype for tensor in (x, hx, *weights)}) > 1:
        raise RuntimeError("rnn: input, hidden state and weights are of different types")
    flat = x.new_empty(sum(tensor.numel() for tensor in weights))  # where `flatten_parameters` has put them
    states, hidden, *_ = torch._cudnn_rnn(x, weights, 4, flat, hx, None, 3, self.hidden_size, 0, self.num_layers,
                                          True, 0.0, self.training, False, [], None)  # fmt: skip
    return states, hidden


def _gru_backward(*args: Any) -> tuple[Any, ...]:
    """The shapes of what `_cudnn_rnn_backward` returns: gradients of input, hidden state, cell state and weights."""
    x, weights, hx, mask = args[0], args[1], args[4], args[-1]
    return torch.empty_like(x), torch.empty_like(hx), None, [torch.empty_like(w) for w in weights] if mask[3] else []


def _to(self: nn.Module, device: torch.device, memory_format: torch.memory_format) -> nn.Module:
    """`nn.Module.to`, which cannot put fake parameters on another device."""
    for module in self.modules():
        for name, value in module._parameters.items():
            if value is not None:
                layout = memory_format if value.dim() == 4 else torch.preserve_format
                moved = value.detach().to(device, memory_format=layout)
                module._parameters[name] = nn.Parameter(moved, value.requires_grad)
        module._buffers |= {name: value.to(device) for name, value in module._buffers.items() if value is not None}
    return self


def _pinned(self: Tensor) -> Tensor:
    copy = self.detach()
    copy.lies_in_pinned_memory = True  # type: ignore[attr-defined]
    return copy


class _Generator(torch.Generator):
    """Of the CPU, wherever it should be: nothing is sampled."""

    def __new__(cls, device: Any = None) -> "_Generator":
        return super().__new__(cls)


@contextmanager
def fake_cuda() -> Iterator[Watch]:
    """Inside, tensors on "cuda" can be made and used, and hold nothing. Random seeds and torch stay as they were."""
    watch, mode = Watch(), FakeTensorMode(allow_fallback_kernels=False)
    replaced = {
        "autograd.grad": watch.grad, "nn.GRU.forward": _gru, "nn.Module.to": _to, "Generator": _Generator,
        "Tensor.pin_memory": _pinned, "manual_seed": mock.Mock(), "nn.RNNBase.flatten_parameters": mock.Mock(),
        "cuda.is_available": lambda: False, "cuda.mem_get_info": lambda *_: (2**40, 2**40),
        "from_numpy": lambda array: torch.empty(array.shape, dtype=getattr(torch, str(array.dtype))),
        "nn.utils.clip_grad._has_foreach_support": lambda *_: True,  # for fake tensors too
        "_subclasses.fake_tensor.FakeTensorMode.__deepcopy__": lambda self, memo: self,  # copies are of the same mode
        **{f"cuda.{name}": mock.MagicMock() for name in ("CUDAGraph", "Stream", "current_stream", "graph", "stream")},
    }  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL", "Meta"))
        with suppress(RuntimeError):  # a later torch may have its own
            library.impl("_cudnn_rnn_backward", _gru_backward)
        for name, replacement in replaced.items():
            stack.enter_context(mock.patch(f"torch.{name}", replacement, create=True))
        stack.enter_context(mode)
        yield stack.enter_context(watch)


def look_at(config: Config) -> Watch:
    """What an iteration with these settings launches, and its mistakes. Raises UserError: wrong settings."""
    with fake_cuda() as watch:
        try:
            _train(config, watch)
        except Exception as error:
            while isinstance(error.__cause__, Exception):  # of a graph that could not be recorded
                error = error.__cause__
            if isinstance(error, UserError):
                raise error from None
            frames = traceback.extract_tb(error.__traceback__)
            lines = [f"{Path(one.filename).name}:{one.lineno}" for one in frames if one.filename in FILES]
            watch.note(f"{type(error).__name__}: {str(error)[:200]}", (lines or ["?"])[-1])
    return watch


def _train(config: Config, watch: Watch) -> None:
    """Two iterations. Counted are both passes, where the first one records them, and all else in the second one."""
    state = TrainingState(*build_networks(config), config, CUDA)
    runner, noise = CudaGraphSteps(state, log=lambda _: None), NoiseSampler(config, CUDA)
    images = _images(config)
    log = Log(None, 2, config, images, world=mock.Mock(is_main=False))
    log.steps_before = None  # on a busy machine it would wait, to tell the time
    for kind, networks in {"critic": ["critic"], "generator": ["vae", "predictor"]}.items():
        weights = [weight for network in networks for weight in state.parameters[network]]
        run, step = getattr(runner, f"{kind}_pass"), getattr(runner, f"{kind}_step")
        setattr(runner, run.__name__, watch.during(f"{kind} pass", _once(run, weights, watch)))
        setattr(runner, step.__name__, watch.during(f"{kind} step", step))
        setattr(noise, kind, watch.during(f"{kind} noise", getattr(noise, kind)))
    next_batch, clips = watch.during("data", images.batches().__next__), None
    if noise.clip_count:
        shape = config.image.channels, config.image.size, config.image.size
        frames = torch.empty(12, *shape, dtype=torch.uint8)
        windows = TrainingClips(frames.split(6), [True, False], window=noise.window, count=noise.clip_count, seed=0,
                                device=CUDA)  # fmt: skip
        clips = iter(watch.during("data", windows.batches().__next__), None)
    for number in (1, 2):
        watch.launches = Counter({key: count for key, count in watch.launches.items() if key[0].endswith("pass")})
        watch.during("log", log.collect)(number, iteration(runner, noise, iter(next_batch, None), number, clips))


def _images(config: Config) -> TrainingImages:
    """10,000 images on the GPU, from no files."""
    folder = mock.Mock(root="", samples=[("image", 0)] * 10_000, classes=[], left_out="")
    load = mock.Mock(side_effect=lambda shape, _: (torch.empty(shape, dtype=torch.uint8), range(shape[0])))
    with mock.patch.object(TrainingImages, "_load", load):
        return TrainingImages(folder, config.data, config.image, batch_size=config.training.batch_size, seed=0,
                              device=CUDA)  # fmt: skip


def _once(run: Callable[..., Any], weights: list[nn.Parameter], watch: Watch) -> Callable[..., Any]:
    """`run` at the first call, and the same output at later ones: a warm-up does what is recorded after it."""
    done: list[Any] = []

    def call(*inputs: Any) -> Any:
        if not done:
            done.append(run(*inputs))
            is_like, needs = ([(x.dtype, x.device, x.shape) for x in some] for some in (done[0].gradients, weights))
            if is_like != needs[: len(is_like)]:  # before updates begin, the predictor has none
                watch.note("a gradient of another type, device or shape than its weight", run.__name__)
        return done[0]

    return call


def part_launches(watch: Watch, n_critic: int) -> dict[str, int]:
    """Launches of each part, each time it runs; and of a whole iteration, in the passes and outside of them."""
    parts: Counter[str] = Counter()
    for (part, *_), count in watch.launches.items():
        parts[part] += count
    inside = n_critic * parts["critic pass"] + parts["generator pass"]
    outside = sum(count for part, count in parts.items() if not part.endswith("pass"))
    for part in ("data", "critic noise", "critic step"):
        parts[part] //= n_critic
    return {**parts, "in the passes": inside, "outside": outside}


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m studies.fake_cuda", description=__doc__)
    parser.add_argument("--counts", action="store_true", help="of each part, the lines that launch most kernels")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of a single configuration")

    def run() -> int:
        options, mistakes = parser.parse_args(arguments), 0
        for settings in [" ".join(options.overrides)] if options.overrides else CONFIGURATIONS:
            config = load_config(None, settings.split())
            watch = look_at(config)
            parts = part_launches(watch, config.training.n_critic)
            name = " ".join(settings.replace(QUICK, "quick").split()) or "defaults"
            print(f"{name}: " + ", ".join(f"{part} {count:,}" for part, count in parts.items()),
                  *(f"MISTAKE in {mistake}" for mistake in watch.mistakes), sep="\n    ", flush=True)  # fmt: skip
            mistakes += len(watch.mistakes)
            for part in parts if options.counts else ():
                counts = Counter({key: count for key, count in watch.launches.items() if key[0] == part})
                for (_, operation, line), count in counts.most_common(40):
                    print(f"    {count:5,} {operation} at {line}, {part}")
        return min(mistakes, 1)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
