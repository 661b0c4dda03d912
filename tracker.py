"""
A run in TensorBoard or in Weights & Biases: every number of its log, its previews, its flags.

    python train.py --tracker tensorboard      # then: tensorboard --logdir out
    python train.py --tracker wandb            # WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE as wandb documents them

Neither package is needed otherwise. An error in a tracker never stops a run.
"""
import importlib
import uuid

import numpy as np

from samples import write_whole


class TensorBoard:
    """Event files in out/tensorboard. A resumed run adds a file there, which replaces the steps from `start` on."""

    def __init__(self, out, start, config):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(out / "tensorboard", purge_step=start)
        rows = "\n".join(f"| {name} | {value} |" for name, value in config.items())
        self.writer.add_text("config", f"| flag | value |\n| --- | --- |\n{rows}", start)
        self.writer.flush()

    def numbers(self, step, numbers):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()                                # a run killed now loses no row

    def picture(self, step, name, path):
        from PIL import Image
        self.writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self, failed):
        self.writer.close()


class Wandb:
    """A run of Weights & Biases. Its id is kept in out/wandb_id, by which a resumed run finds it again."""

    def __init__(self, out, start, config):
        import wandb
        self.image = wandb.Image
        id_file = out / "wandb_id"
        if not id_file.exists():
            write_whole(id_file, uuid.uuid4().hex[:12].encode())
        wandb.login(timeout=60)                            # on a terminal it asks, and nobody may be there
        self.run = wandb.init(id=id_file.read_text(), resume="allow", name=out.name, dir=str(out))
        self.run.config.update(config, allow_val_change=True)
        self.run.define_metric("*", step_metric="step")    # wandb's own count refuses steps that a resume repeats

    def numbers(self, step, numbers):
        self.run.log(numbers | {"step": step})

    def picture(self, step, name, path):
        self.run.log({name: self.image(str(path)), "step": step})

    def close(self, failed):
        self.run.finish(exit_code=int(failed))


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb}    # flag, and name of the package that it needs


def check_tracker(name):
    """ValueError where the package that --tracker names cannot be imported."""
    if name not in TRACKERS:
        return
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"--tracker {name}: the package {name} cannot be imported ({error}); pip install {name}, or "
                         "leave out --tracker") from error


def numbers_of(row):
    """Every number of a row, flat: {"loss": 2, "by": {"r": [1, None]}} -> {"loss": 2, "by/r/0": 1}."""
    numbers = {}
    for name, value in row.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            for inner_name, number in numbers_of(value).items():
                numbers[f"{name}/{inner_name}"] = number
        elif isinstance(value, (int, float)):
            numbers[name] = value
    return numbers


class Tracker:
    """
    The tracker that --tracker names, or none. Its errors are printed as warnings, only the first of several in a row,
    and the run continues without sending.
    """

    def __init__(self, name, out, start, config):
        self.name, self.backend, self.has_failed = name, None, False
        if name in TRACKERS:
            self.backend = self.attempt(TRACKERS[name], out, start, config)

    def attempt(self, action, *arguments):
        """Return action(*arguments), or None where it raises."""
        try:
            result = action(*arguments)
        except Exception as error:                         # whatever it is: no tracker is worth a run
            if not self.has_failed:
                print(f"WARNING: --tracker {self.name}: {type(error).__name__}: {error}; the run continues", flush=True)
            self.has_failed = True
            return None
        self.has_failed = False
        return result

    def row(self, row):
        if self.backend:
            self.attempt(self.backend.numbers, row["step"], numbers_of(row))

    def picture(self, step, name, path):
        """path: a PNG file."""
        if self.backend:
            self.attempt(self.backend.picture, step, name, path)

    def close(self, failed):
        if self.backend:
            self.attempt(self.backend.close, failed)
