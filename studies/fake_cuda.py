"""Runs two iterations of training on a GPU that isn't there: tensors claim to lie on `cuda:0`, but only shapes flow.

python -m studies.fake_cuda                               a list of configurations
python -m studies.fake_cuda runtime.precision=bf16        the defaults with these settings
python -m studies.fake_cuda --counts                      for each part, which operations launch kernels, and where

Networks, random numbers, data, passes and steps are the project's own, run as `CudaGraphSteps` under torch's
`FakeTensorMode`. That finds what a GPU would not do, or would make the host wait for:

    a tensor on the wrong device            an error of FakeTensorMode
    .item(), a mask as index, nonzero       an error of FakeTensorMode, since shape or value depend on numbers
    .cpu(), torch.tensor(...)               copies that wait, or that read memory which is not pinned
    work on the CPU                         results that lie there
    wrong gradients                         of another type, device or shape than their weights

It also counts kernel launches, roughly: most operations launch one. It cannot see whether cuDNN has a kernel, wrong
numbers, memory and time.

Replaced are the GRU, which asks the driver (`torch._cudnn_rnn` is called as ATen would), autograd's engine, which asks
it for streams, random generators, pinned memory, and recording and replaying a graph.
"""

import itertools
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configuration import Config, UserError, load_config
from image_data import TrainingImages
from step_runners import CudaGraphSteps
from training import build_networks, iteration
from training_log import Log
from training_step import NoiseSampler, TrainingState
from util import CommandParser, run_command

ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda", 0)

QUICK = ["image.size=32", "vae.channels=[8,16,16]", "critic.channels=[8,16,16]", "training.batch_size=8",
         "vae.latent_dim=8", "weight_predictor.hidden_size=16", "video.height=16", "video.width=16"]  # fmt: skip
AUGMENTED = [*QUICK, "training.diffaugment=[color,translation,cutout]"]
BF16 = "runtime.precision=bf16"
CONFIGURATIONS: dict[str, list[str]] = {
    "defaults": [],
    "source sizes": ["weight_predictor.layers=[decoder.stage1.*,decoder.stage2.*]", "weight_predictor.head=full",
                     "weight_predictor.bound=0.2", "video.height=128", "video.width=128", "loss.lambda_video=0"],
    "bf16": [BF16],
    "update off, full size": ["weight_predictor.update=off"],
    "head full": [*QUICK, "weight_predictor.head=full", "weight_predictor.layers=[decoder.stage1.*]"],
    "head full, bf16": [*QUICK, "weight_predictor.head=full", BF16],
    "head per_channel": [*QUICK, "weight_predictor.head=per_channel"],
    "head per_channel, bf16": [*QUICK, "weight_predictor.head=per_channel", BF16],
    "no video loss": [*QUICK, "loss.lambda_video=0"],
    "DiffAugment": AUGMENTED,
    "DiffAugment, bf16": [*AUGMENTED, BF16],
    "shared": [*QUICK, "weight_predictor.sharing=shared"],
    "shared, bf16": [*QUICK, "weight_predictor.sharing=shared", BF16],
    "update constant": [*QUICK, "weight_predictor.update=constant"],
    "update off": [*QUICK, "weight_predictor.update=off"],
    "update off, bf16": [*QUICK, "weight_predictor.update=off", BF16],
    "input other": [*QUICK, "weight_predictor.input_video=other"],
    "input static": [*QUICK, "weight_predictor.input_video=static"],
    "GRU frozen": [*QUICK, "weight_predictor.train_gru=false"],
    "all rolled out": [*QUICK, "loss.rollout_fraction=1"],
    "none rolled out": [*QUICK, "loss.rollout_fraction=0"],
    "no rollout frames": [*QUICK, "loss.rollout_frames=0"],
    "adversarial frame random": [*QUICK, "loss.adversarial_frame=random"],
    "gradients through the video": [*QUICK, "video.detach=false"],
    "clipping": [*QUICK, *(f"training.clip_{name}=1" for name in ("vae", "predictor", "critic"))],
    "no motion": [*QUICK, *(f"video.{name}=0" for name in ("shift", "zoom", "rotation", "brightness", "contrast",
                                                           "noise"))],
    "grey, mirrored": [*QUICK, "image.channels=1", "data.mirror=true"],
    "all base": [*QUICK, "loss.base_fake_fraction=1"],
    "none base": [*QUICK, "loss.base_fake_fraction=0"],
}  # fmt: skip
"""Name -> overrides."""

# ------------------------------------------------------------------------------------------------- what is watched

VIEWS = {
    "view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "select", "slice", "split", "unbind",
    "split_with_sizes", "squeeze", "unsqueeze", "detach", "alias", "as_strided", "unfold", "diagonal", "empty",
    "empty_like", "empty_strided", "new_empty", "new_empty_strided", "unsafe_split", "chunk", "device", "is_pinned",
    "promote_types", "_record_function_enter_new", "_record_function_exit", "sym_size", "sym_stride",
}  # fmt: skip
"""Operations that launch no kernel."""

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "lift_fresh")
"""Beginnings of the names of those that wait. `lift_fresh` is torch.tensor(...), whose numbers come from the host."""


class Operation(NamedTuple):
    """Where kernels were launched."""

    part: str
    """Of the iteration, such as `critic pass` or `data`."""
    name: str
    line: str
    """`file:line` of the project; in a backward pass that of the forward operation."""


class Watch(TorchDispatchMode):
    """Counts launches and notes what a GPU would not do, inside functions that `during` has wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[Operation] = Counter()
        self.findings: list[str] = []
        self._part = ""
        self._line = ""  # that of the forward operation whose backward runs
        self._lines: dict[int, str] = {}  # number of a node in autograd's graph -> line that made it

    def during(self, part: str, do: Callable[..., Any]) -> Callable[..., Any]:
        """`do`, whose operations belong to `part` of the iteration."""

        def watched(*arguments: Any) -> Any:
            outer, self._part = self._part, part
            try:
                return do(*arguments)
            finally:
                self._part = outer

        return watched

    def note(self, what: str, line: str) -> None:
        finding = f"{self._part or 'start'}: {what} at {line}"
        if finding not in self.findings:
            self.findings.append(finding)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._overloadpacket.__name__
        line = self._line or project_line()
        if self._part and name.startswith(WAITING):
            self.note(name, line)
        self._lines.setdefault(torch._C._autograd._get_sequence_nr() - 1, line)
        result = function(*args, **kwargs or {})
        if not self._part or name in VIEWS:
            return result
        sources, results = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        self.launches[Operation(self._part, name, line)] += launches(name, args, sources, results)
        before = {x.device.type for x in sources if not hasattr(x, "is_in_pinned_memory")}
        after = {x.device.type for x in results}
        if "copy" in name and len(before | after) > 1:
            self.note(f"{name} from {'/'.join(before)} to {'/'.join(after)}", line)
        elif after == {"cpu"}:
            self.note(f"{name} on the CPU", line)
        return result

    def grad(self, outputs: Tensor, inputs: Any, *, allow_unused: bool = False, materialize_grads: bool = False) -> Any:
        """`torch.autograd.grad` of a scalar, one node after another."""
        inputs, root = list(inputs), outputs.grad_fn
        waiting: Counter[Any] = Counter()
        seen, stack = {root}, [root]
        while stack:
            for node, _ in stack.pop().next_functions:  # type: ignore[union-attr]
                waiting[node] += 1
                if node is not None and node not in seen:
                    seen.add(node)
                    stack.append(node)
        given: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(outputs)}}
        found: dict[int, Tensor] = {}
        ready: list[Any] = [root]
        with torch.no_grad():
            while ready:
                node = ready.pop()
                gradients = given.pop(node, {})
                if hasattr(node, "variable"):
                    found |= {id(node.variable): gradient for gradient in gradients.values()}
                    continue
                self._line = self._lines.get(node._sequence_nr(), "")
                for (following, place), gradient in zip(node.next_functions, _backward(node, gradients), strict=True):
                    if gradient is not None and following is not None:
                        places = given.setdefault(following, {})
                        gradient = _fitted(gradient, following, place)
                        places[place] = gradient if place not in places else places[place] + gradient
                    waiting[following] -= 1
                    if following is not None and not waiting[following]:
                        ready.append(following)
            self._line = ""
            missing = [x for x in inputs if id(x) not in found]
            assert not missing or allow_unused
            found |= {id(x): torch.zeros_like(x) for x in missing if materialize_grads}
            return tuple(found.get(id(x)) for x in inputs)


def _backward(node: Any, gradients: dict[int, Tensor]) -> Sequence[Tensor | None]:
    """Gradients of a node's inputs from those of its outputs."""
    if not gradients:
        return [None] * len(node.next_functions)
    arguments = [gradients.get(place) for place in range(len(node._input_metadata))]
    result = node(*arguments) if callable(node) else node.apply(*arguments)  # of a torch.autograd.Function
    result = result if isinstance(result, tuple) else (result,)
    return result[: len(node.next_functions)]  # arguments of a Function that are no tensors come last


def _fitted(gradient: Tensor, node: Any, place: int) -> Tensor:
    """As the engine does it: summed over what was broadcast, in the type of the forward pass."""
    expected = node.variable if hasattr(node, "variable") else node._input_metadata[place]
    if gradient.shape != expected.shape:
        gradient = gradient.sum_to_size(expected.shape)
    return gradient if gradient.dtype == expected.dtype else gradient.to(expected.dtype)


def launches(name: str, args: Any, sources: list[Tensor], results: list[Tensor]) -> int:
    """Kernels that an operation launches on CUDA, roughly; cuDNN may take some more to change layouts."""
    if results and not any(x.numel() for x in results):
        return 0
    match name:
        case "im2col":  # the backward of fold launches one for each image (aten/src/ATen/native/cuda/Im2Col.cu)
            return len(args[0])
        case "convolution":
            return 1 + (args[2] is not None)
        case "convolution_backward":
            return sum(args[-1])
        case "_cudnn_rnn":  # an assumption: layers · (2 + 2 T)
            return args[9] * (2 + 2 * args[0].shape[1])
        case "_cudnn_rnn_backward":
            return args[13] * (6 + 2 * args[0].shape[1]) + 1
        case "index_put" | "index_put_" | "_index_put_impl_":  # sorts
            return 12
        case "_foreach_norm" | "select_backward" | "slice_backward" | "max_pool2d_with_indices_backward":
            return 2  # of the last three one writes zeros
        case "_foreach_copy_" if len({x.dtype for x in sources}) > 1:
            return len(sources) // 2
    return 1


def project_line() -> str:
    """The innermost line of the project's own modules that is being run, as `file:line`."""
    frame = sys._getframe(1)
    while frame.f_back and os.path.dirname(frame.f_code.co_filename) != str(ROOT):  # noqa: PTH120 (it is called often)
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


# ---------------------------------------------------------------------------------------------------- the fake GPU


def _gru(self: nn.GRU, x: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`nn.GRU.forward` as ATen's `gru` does it with cuDNN; in autocast it casts to fp16, whatever type was asked for
    (`at::autocast::_cudnn_rnn_cast_reflatten` says `at::kHalf`).
    """
    hx = x.new_zeros(self.num_layers, len(x), self.hidden_size) if hx is None else hx
    weights = [getattr(self, name) for name in self._flat_weights_names]
    is_cast = torch.is_autocast_enabled("cuda")
    with torch.autocast("cuda", enabled=False):
        x, hx, *weights = ((each.half() if is_cast else each) for each in (x, hx, *weights))
        if not hx.is_contiguous():
            raise RuntimeError("rnn: hx is not contiguous")
        if len({each.dtype for each in (x, hx, *weights)}) > 1:
            raise RuntimeError("rnn: inputs, hidden state and weights are of different types")
        if torch.is_grad_enabled() and not self.training:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        flat = x.new_empty(sum(each.numel() for each in weights))  # where `flatten_parameters` has put them
        states, hidden, *_ = torch._cudnn_rnn(x, weights, 4, flat, hx, None, 3, self.hidden_size, 0, self.num_layers,
                                              True, 0.0, self.training, False, [], None)  # fmt: skip
    return states, hidden


def _cudnn_rnn_backward(*args: Any) -> tuple[Any, ...]:
    """Shapes of the gradients of input, hidden state, cell state and weights."""
    x, weights, hx, mask = args[0], args[1], args[4], args[-1]
    return (torch.empty_like(x) if mask[0] else None, torch.empty_like(hx) if mask[1] else None, None,
            [torch.empty_like(weight) for weight in weights] if mask[3] else [])  # fmt: skip


class CpuGenerator(torch.Generator):
    """Stands for one on the GPU: nothing is sampled."""

    def __new__(cls, device: Any = None) -> "CpuGenerator":
        return super().__new__(cls)


def _to(self: nn.Module, device: torch.device, memory_format: torch.memory_format) -> nn.Module:
    """`nn.Module.to`, which cannot swap fake parameters for others."""
    for module in self.modules():
        for name, value in module._parameters.items():
            if value is not None:
                layout = memory_format if value.dim() == 4 else torch.preserve_format
                moved = value.detach().to(device, memory_format=layout)
                module._parameters[name] = nn.Parameter(moved, value.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return self


def _pinned(self: Tensor) -> Tensor:
    copy = self.detach()
    copy.is_in_pinned_memory = True  # type: ignore[attr-defined]
    return copy


@contextmanager
def fake_cuda() -> Iterator[Watch]:
    """Inside, tensors on "cuda" can be made and used, and hold nothing. Changes neither random seeds nor torch."""
    watch, mode = Watch(), FakeTensorMode(allow_fallback_kernels=False)
    replaced: dict[str, Any] = {
        "torch.autograd.grad": watch.grad,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.mem_get_info": lambda *_: (2**40, 2**40),
        "torch.from_numpy": lambda array: torch.empty(array.shape, dtype=getattr(torch, str(array.dtype))),
        "torch.Generator": CpuGenerator,
        "torch.manual_seed": lambda seed: None,
        "torch.nn.GRU.forward": _gru,
        "torch.nn.RNNBase.flatten_parameters": lambda self: None,
        "torch.nn.utils.clip_grad._has_foreach_support": lambda *_: True,  # of fake tensors, too
        "torch.Tensor.pin_memory": _pinned,
        "torch.nn.Module.to": _to,
    } | {f"torch.cuda.{name}": mock.MagicMock() for name in ("CUDAGraph", "graph", "stream", "Stream",
                                                             "current_stream")}  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL", "Meta"))
        library.impl("_cudnn_rnn_backward", _cudnn_rnn_backward)
        for name, substitute in replaced.items():
            stack.enter_context(mock.patch(name, substitute))
        # Copies of networks otherwise hold copies of the mode.
        stack.enter_context(mock.patch.object(FakeTensorMode, "__deepcopy__", lambda self, memo: self, create=True))
        stack.enter_context(mode)
        stack.enter_context(watch)
        yield watch


# ---------------------------------------------------------------------------------------------------- two iterations


def look_at(overrides: list[str]) -> Watch:
    """What an iteration with these settings launches, and what is wrong with it. Raises UserError: wrong settings."""
    config = load_config(None, overrides)
    with fake_cuda() as watch:
        try:
            _run(config, watch)
        except Exception as error:
            cause = error
            while isinstance(cause.__cause__, Exception):  # of a graph that could not be recorded
                cause = cause.__cause__
            if isinstance(cause, UserError):
                raise
            trace, line = cause.__traceback__, ""
            while trace:
                if Path(trace.tb_frame.f_code.co_filename).parent == ROOT:
                    line = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
                trace = trace.tb_next
            watch.note(f"{type(cause).__name__}: {str(cause).splitlines()[0][:160]}", line)
    return watch


def _run(config: Config, watch: Watch) -> None:
    """Two iterations: the first one records both passes and makes Adam's moments, the second one is counted."""
    state = TrainingState(*build_networks(config), config, CUDA)
    runner, noise, images = CudaGraphSteps(state), NoiseSampler(config, CUDA), _images(config)
    log = Log(None, 2, config, images, world=mock.Mock(is_main=False))
    for kind, networks in {"critic": ["critic"], "generator": ["vae", "predictor"]}.items():
        weights = [weight for network in networks for weight in state.parameters[network]]
        recorded: Any = _once(watch.during(f"{kind} pass", getattr(runner, f"{kind}_pass")), weights, watch)
        setattr(runner, f"{kind}_pass", recorded)
        setattr(runner, f"{kind}_step", watch.during(f"{kind} step", getattr(runner, f"{kind}_step")))
        setattr(noise, kind, watch.during(f"{kind} noise", getattr(noise, kind)))
    source = images.batches()
    batches = map(watch.during("data", lambda _: next(source)), itertools.count())
    for step in (1, 2):
        for operation in [*watch.launches]:
            if not operation.part.endswith("pass"):
                del watch.launches[operation]
        watch.during("log", log.collect)(step, iteration(runner, noise, batches, step))
        state.step = step


def _images(config: Config) -> TrainingImages:
    """10,000 images on the GPU, from no files."""
    folder = mock.Mock(root="", samples=[("image", 0)] * 10_000, classes=[], left_out="")
    load = mock.Mock(side_effect=lambda shape, _: (torch.empty(shape, dtype=torch.uint8), range(len(folder.samples))))
    with mock.patch.object(TrainingImages, "_load", load):
        return TrainingImages(folder, config.data, config.image, batch_size=config.training.batch_size,
                              seed=config.training.seed, device=CUDA, progress=False)  # fmt: skip


def _once(run: Callable[..., Any], weights: list[nn.Parameter], watch: Watch) -> Callable[..., Any]:
    """`run` at the first call, and its output again at all others: the warm-up before a recording does the same."""
    outputs: list[Any] = []

    def call(*inputs: Any) -> Any:
        if not outputs:
            outputs.append(run(*inputs))
            for weight, gradient in zip(weights, outputs[0].gradients, strict=True):
                expected, given = ((x.dtype, x.device, x.shape) for x in (weight, gradient))
                if expected != given:
                    watch.note(f"a gradient is {given}, its weight {expected}", "the pass")
            for value in tree_leaves(outputs[0].metrics):
                if value.device != CUDA:
                    watch.note(f"a metric on {value.device}", "the pass")
        return outputs[0]

    return call


# --------------------------------------------------------------------------------------------------------- the report


def part_launches(watch: Watch, n_critic: int) -> dict[str, int]:
    """Launches of each part of an iteration, each time it happens; `in the passes` and `outside` of a whole one."""
    parts: Counter[str] = Counter()
    for operation, count in watch.launches.items():
        parts[operation.part] += count
    inside = n_critic * parts["critic pass"] + parts["generator pass"]
    outside = sum(count for part, count in parts.items() if not part.endswith("pass"))
    for part in ("data", "critic noise", "critic step"):
        parts[part] //= n_critic
    return {**parts, "in the passes": inside, "outside": outside}


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m studies.fake_cuda", description=__doc__)
    parser.add_argument("--counts", action="store_true", help="the operations that launch most in each part")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings; without any, the whole list")

    def run() -> int:
        options = parser.parse_args(arguments)
        overrides = options.overrides
        wrong = 0
        for name, settings in ({" ".join(overrides): overrides} if overrides else CONFIGURATIONS).items():
            watch = look_at(settings)
            parts = part_launches(watch, load_config(None, settings).training.n_critic)
            wrong += bool(watch.findings)
            counts = ", ".join(f"{part} {count:,}" for part, count in parts.items())
            print(f"{name:<28} {'WRONG' if watch.findings else 'ok'}; launches: {counts}", flush=True)
            print(*(f"    {finding}\n" for finding in watch.findings), sep="", end="")
            for part in parts if options.counts else ():
                print(f"  {part}")
                lines = Counter({op: count for op, count in watch.launches.items() if op.part == part}).most_common(40)
                print(*(f"    {count:6,} {op.name:<34} {op.line}\n" for op, count in lines), sep="", end="")
        return int(wrong > 0)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
