"""Makes the small file of a finished run that comes with the project: its averaged generator, and its critic.

    python training.py --config configs/64.yaml
    python data/build_pretrained.py runs/emoji-64 data/pretrained/emoji_64.pt

Without optimizers and training weights, and in half precision, a checkpoint is a tenth as large. generate.py and
training.init_from read it like any other one; it cannot be resumed.
"""

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from checkpoints import Checkpoints, load_checkpoint
from configuration import Config, config_to_dict
from sampling import find_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, or a checkpoint file")
    parser.add_argument("out", type=Path, help="the file to write")
    options = parser.parse_args()
    saved = load_checkpoint(find_checkpoint(options.run))
    kept = {key: saved[key] for key in ("step", "config", "update_spec")}
    kept["config"]["output"] = config_to_dict(Config())["output"]  # not the folders of the machine that trained it
    for part in ("generator_ema", "critic"):
        kept[part] = {name: x.half() if x.dtype == torch.float32 else x for name, x in saved[part].items()}
    with tempfile.TemporaryDirectory(dir=options.out.parent) as folder:
        Checkpoints(Path(folder), keep=1).save(kept).replace(options.out)
    content = options.out.read_bytes()
    size, digest = f"{len(content) / 1e6:.1f} MB", hashlib.sha256(content).hexdigest()
    print(f"{options.out}: step {saved['step']:,}, {size}, SHA-256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
