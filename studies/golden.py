"""Trains six tiny runs of 20 steps with fixed settings on the CPU, and prints the SHA-256 of each checkpoint's tensors.

Before a refactoring `python -m studies.golden --write FILE`, after it `--compare FILE`: status 1 where a run has other
tensors, whatever their names. The hashes hold for one machine and one version of torch only.
"""

import hashlib
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from checkpoints import load_checkpoint
from configuration import UserError, load_config
from training import train
from util import CommandParser, atomic_write, run_command

SMALL = """image.size=16 vae.channels=[4,8] vae.latent_dim=6 critic.channels=[4,8] weight_predictor.hidden_size=8
    weight_predictor.bound=0.7 video.frames=3 training.batch_size=4 training.n_critic=2 training.steps=20
    runtime.device=cpu output.name=run output.samples=2 output.tensorboard=false data.root=data/emoji/flags"""
CASES = {name: f"weight_predictor.head={name}" for name in ("low_rank", "full", "per_channel")} | {
    "off": "weight_predictor.update=off", "shared": "weight_predictor.sharing=shared video.detach=no training.clip=1",
    "rollout": """loss.rollout_frames=6 loss.rollout_fraction=0.75 loss.adversarial_frame=random data.mirror=true
        training.diffaugment=[color,translation,cutout] data.holdout=0.2""",
}  # fmt: skip


def train_and_hash(settings: str) -> str:
    torch.set_num_threads(1)  # sums are rounded in the same order then
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        train(load_config(None, [*SMALL.split(), *settings.split(), f"output.root={folder}"]))
        saved = load_checkpoint(f"{folder}/run/checkpoints/step_000020.pt") | {"log": None}
    hashes = sorted(tensor_hash(leaf) for leaf in tree_leaves(saved) if isinstance(leaf, torch.Tensor))
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's type, shape and values."""
    values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)};".encode() + values).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m studies.golden", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", metavar="FILE", help="save the hashes there")
    parser.add_argument("--compare", metavar="FILE", help="compare them with those that were saved there")

    def run() -> int:
        options = parser.parse_args(arguments)
        if options.compare and not Path(options.compare).is_file():
            raise UserError(f"--compare: there is no file {options.compare}")
        lines = [f"{case} {train_and_hash(settings)}" for case, settings in CASES.items()]
        if options.write:
            with atomic_write(options.write) as part:
                part.write_text("\n".join(lines))
        before = Path(options.compare).read_text().splitlines() if options.compare else lines
        print(*(line if line in before else f"{line} DIFFERS" for line in lines), sep="\n")
        return int({*lines} != {*before})

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
