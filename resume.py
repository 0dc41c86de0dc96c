"""How a run goes on where it was stopped: what it saves to that end, from which checkpoint, under which settings."""

import math
from typing import Any, NamedTuple

from configuration import Config, UserError, config_from_dict, config_to_dict
from distributed import ALONE, World
from evaluation import CALIBRATED, as_bytes, calibrate
from image_data import TrainingImages
from run_directory import RunDirectory, free_name
from sampling import Sampler
from training_log import Log
from training_state import TrainingState

# Settings that change when, where and how fast, but no weight: a run goes on with new values of them.
FREE = {
    *("data.root", "data.on_broken", "data.memory_gb", "data.workers"),  # which pictures these are is checked apart
    *("training.steps", "training.epochs", "training.max_minutes"),
    "runtime.*",
    "output.*",
}
# Settings without which the saved weights, or what Adam knows of them, have no place: no run goes on with other values.
SHAPES = {
    *("image.size", "image.channels", "vae.*", "discriminator.*", "video.height", "video.width"),
    *(f"weight_predictor.{key}" for key in ("update", "train_gru", "layers", "update_size", "head")),
    *(f"weight_predictor.{key}" for key in ("rank", "hidden_size", "num_layers")),
}
# All others change what is learned: a run goes on with new values only if the user says so.


class Difference(NamedTuple):
    """One setting whose value is another one than when the checkpoint was written."""

    key: str
    before: Any
    now: Any

    @property
    def effect(self) -> str:
        """`free`, `shapes` or `learning`."""
        section = self.key.partition(".")[0]
        for effect, keys in (("free", FREE), ("shapes", SHAPES)):
            if self.key in keys or f"{section}.*" in keys:
                return effect
        return "learning"

    def __str__(self) -> str:
        return f"{self.key} {_text(self.before)} -> {_text(self.now)}"


def differences(saved: dict[str, Any], config: Config, source: str) -> list[Difference]:
    """The settings that differ between a checkpoint's `config` and today's, in the order of config.yaml.

    Raises:
        UserError: the saved settings are none that this version knows.
    """
    before, now = config_to_dict(config_from_dict(saved["config"], source)), config_to_dict(config)
    return [
        Difference(f"{section}.{key}", before[section][key], value)
        for section, settings in now.items()
        for key, value in settings.items()
        if value != before[section][key]
    ]


def check_settings(changed: list[Difference], run: str, accept_changes: bool) -> None:
    """Refuses settings under which the run would no longer be the one that was begun.

    Raises:
        UserError: a change that the weights cannot follow; or, unless `accept_changes`, one that alters the learning.
    """
    new_run = "put it back, or start a new run with another output.name"
    if shapes := [change for change in changed if change.effect == "shapes"]:
        raise UserError(
            f"cannot resume {run}: {_listed(shapes)}: the saved weights don't fit other networks; {new_run}"
        )
    learning = [change for change in changed if change.effect == "learning"]
    if learning and not accept_changes:
        raise UserError(
            f"cannot resume {run}: {_listed(learning)}: this changes what is learned; {new_run}, "
            "or go on with it on purpose with --accept-changes"
        )


def check_pictures(saved: dict[str, Any], fingerprint: str, count: int, run: str, accept_changes: bool) -> None:
    """Refuses another set of pictures than the run was begun with: its place in the data would mean nothing.

    Raises:
        UserError: other names or another number of pictures, unless `accept_changes`.
    """
    before = saved["pictures"]
    if fingerprint != before["fingerprint"] and not accept_changes:
        what = (
            f"holds {count:,} readable pictures, and held {before['count']:,}"
            if count != before["count"]
            else "holds pictures of other names"
        )
        raise UserError(
            f"cannot resume {run}: data.root now {what} when the run was begun; bring them back, start a new run "
            "with another output.name, or go on with these on purpose with --accept-changes"
        )


def _listed(changed: list[Difference]) -> str:
    return ", ".join(str(change) for change in changed)


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def resume_point(run: RunDirectory, config: Config, accept_changes: bool) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest whole checkpoint of a run that is there already, or None, and what to tell about it.

    Raises:
        UserError: no checkpoint is whole, or the settings are of another run.
    """
    if not run.exists:
        return None, []
    saved, path, damaged = run.checkpoints.newest()
    notes = [f"warning: {line}; passed over" for line in damaged]
    if saved is None or path is None:
        return None, [*notes, f"{run.path} has no checkpoint yet: starting again from step 0"]
    changed = differences(saved, config, str(path))
    check_settings(changed, str(run.path), accept_changes)
    run.checkpoints.link(saved)  # in case the process was killed before it came to that
    notes.append(f"resuming {run.path} after step {saved['step']:,} ({path.name})")
    notes += [f"  changed setting: {change}" for change in changed]
    return saved, notes


def already_finished(run: RunDirectory, config: Config, step: int) -> int:
    """Says that there is nothing left to do, and how to go on. Returns the exit status."""
    training = config.training
    further = f"training.epochs={2 * training.epochs:g}" if training.epochs else f"training.steps={2 * step}"
    print(f"{run.path} is finished: {step:,} steps. To train it further, add for example {further};")
    print(f"to begin a new run, add output.name={free_name(run.path)}")
    run.close()
    return 0


class CheckpointKeeper:
    """Saves the state of a run with all that resuming it needs, and remembers which checkpoint was the best.

    A full disk may have room again when the next checkpoint is due. So a run ends only when `PATIENCE` checkpoints in
    a row could not be written, or its last one.
    """

    PATIENCE = 3

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        images: TrainingImages,
        saved: dict[str, Any] | None,
        world: World = ALONE,
    ) -> None:
        self.run, self.config, self.world = run, config, world
        self.pictures = {"fingerprint": images.fingerprint, "count": images.count}
        self.best: dict[str, Any] | None = saved["best"] if saved else None
        if images.held_out_count:
            self.calibrated_on = images.held_out_halves()[0][:CALIBRATED]
        else:
            self.calibrated_on = as_bytes(images.fixed_sample(min(images.count, CALIBRATED)))
        self.failed = 0

    def save(self, state: TrainingState, log: Log, last: bool) -> None:
        """Writes a checkpoint of this moment; `last`: nothing comes after it. All processes take part.

        Raises:
            UserError: it cannot be written, and that was the last chance.
        """
        training = self.config.training
        sampler = Sampler(state.generator_ema, self.config, state.step, self.run.path)
        calibrate(state.discriminator, sampler, self.calibrated_on, self.world)
        self._judge(state.step, log)
        content = state.to_dict() | {
            "images_seen": state.step * training.n_critic * training.batch_size,
            "config": config_to_dict(self.config),
            "update_spec": state.generator.spec.to_dict(),
            "pictures": self.pictures,
            "log": log.state(),
            "best": self.best,
        }
        try:
            self.run.save_checkpoint(content)
            self.failed = 0
        except UserError as error:
            self.failed += 1
            if last or self.failed == self.PATIENCE or not self.run.exists:
                log.close()
                raise UserError(
                    f"training stopped at step {state.step}: {error}; {self._kept()}; mend that, and the same command "
                    "goes on from there"
                ) from None
            log.line(f"warning: {error}; {self._kept()}; training goes on and tries again at the next checkpoint")

    def _judge(self, step: int, log: Log) -> None:
        """Notes whether this is the best checkpoint so far, by the newest mean of `output.best_metric`."""
        metric = self.config.output.best_metric
        if metric == "quality/kid" and log.evaluated != step:  # the newest figure is of an older step
            return
        value = log.latest.get(metric, math.nan) if metric else math.nan
        if math.isnan(value):
            return
        if self.best is None or self.best["metric"] != metric or value < self.best["value"]:
            self.best = {"metric": metric, "value": value, "step": step}

    def _kept(self) -> str:
        path = self.run.path / "checkpoints" / "latest.pt"
        return f"{path} is whole" if path.exists() else "no checkpoint was written yet"
