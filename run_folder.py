"""
A run's folder, so that nothing is lost: its log, its checkpoints, stopping and going on, steps that are skipped, and the reference's errors, scored once.

    out/config.json   out/log.jsonl, a row a step   out/step_000500/   out/latest, the step folder to go on from   out/ref_errors.safetensors

Every file and folder has its name only when it is whole; what is unfinished starts with a dot. Nothing is unpickled but plain tensors, numbers and the
handful of classes that the index of a checkpoint is made of.
"""
import fcntl
import json
import math
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from tqdm import tqdm

from data import write_whole
from fsdp_utils import extremes, total
from weights import Planner, Reader, find_checkpoint

# ------------------------------------------------------------------------------------------------------------------
# beginning, and going on


def check_folder(out, resume):
    """
    What --resume comes to in the run's folder out: the step folder to go on from, as text, or "" to start anew. `auto` is `latest` where there is one; ranks
    that torchrun --max-restarts has started again go on from `latest` too, whatever was asked of the first.
    Raises ValueError where there is nothing to go on from, and where something would be overwritten.
    """
    out, log, again = Path(out), Path(out) / "log.jsonl", int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if again or resume == "auto":
        resume = "latest" if (out / "latest").exists() else "" if resume in ("auto", "latest") else resume
    elif not resume and log.exists() and log.stat().st_size:
        how = "go on with it (--resume latest)" if (out / "latest").exists() else "it was stopped before its first checkpoint: delete it"
        raise ValueError(f"{out} already holds a run; {how}, or choose another --out")
    if resume not in ("", "latest") and not again and log.exists() and Path(resume).resolve().parent != out.resolve():
        raise ValueError(f"--resume {resume} is not in --out {out}, which holds another run; choose another --out")
    return str(find_checkpoint(out, resume)) if resume else ""


def begin_log(args, start, **facts):
    """config.json, and log.jsonl without the rows from step `start` on, which will be done again. By rank 0 alone. Returns the rows that stay."""
    flags = {name: value for name, value in vars(args).items() if name != "defaults"}
    write_whole(args.out / "config.json", json.dumps(flags | facts | {"torch": torch.__version__}, indent=1, default=str).encode())
    log = args.out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < start]       # a kill cuts the last line
    write_whole(log, "".join(lines).encode())
    if args.resume and (folder := Path(args.resume).resolve()).parent == args.out.resolve():
        write_whole(args.out / "latest", f"{folder.name}\n".encode())          # of an older step: a kill before the next one must not lead past the log
    return [json.loads(line) for line in lines]


def append_row(path, row):
    """One more line of log.jsonl. Seven digits are more than a curve shows and halve the log."""
    try:
        with open(path, "a") as log:
            log.write(json.dumps(json.loads(json.dumps(row), parse_float=lambda digits: float(f"{float(digits):.7g}"))) + "\n")
    except OSError as error:
        raise ValueError(f"{path} could not be written ({error}); make room, and go on with --resume latest") from error


# ------------------------------------------------------------------------------------------------------------------
# being stopped, and steps that are skipped

class Signals:
    """
    Signals and the clock. SIGTERM and SIGINT are noted, not obeyed: asks() goes into the sums that a step adds up over all ranks anyway, so that every rank
    saves and stops after the same step, whichever of them got it. A second signal, more than five seconds later (torchrun passes the first on), is obeyed.
    """
    def __init__(self, save_minutes):
        self.seconds, self.saved, self.noted = 60 * save_minutes, time.monotonic(), 0.0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number, frame):
        if self.noted and time.monotonic() - self.noted > 5:
            raise KeyboardInterrupt
        self.noted = self.noted or time.monotonic()

    def asks(self):
        """{"asks/stop", "asks/save": 1.0 or 0.0}, of this rank."""
        return {"asks/stop": float(self.noted > 0), "asks/save": float(0 < self.seconds < time.monotonic() - self.saved)}

    def save(self, *state):
        """save_checkpoint, from which the clock starts again."""
        folder = save_checkpoint(*state)
        self.saved = time.monotonic()
        return folder

    def close(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def leave(self, folder):
        """The end of a run that was stopped, after all ranks saved folder."""
        self.close()
        if dist.get_rank() == 0:
            print(f"stopped by a signal; {folder} is saved, go on with --resume latest", flush=True)
        dist.destroy_process_group()


def read_items(dataset, indices):
    """
    The items at these indices. With dataset.skip all ranks call it together: what one of them cannot read is bad for all from then on (dataset.agreed), so that
    ranks that share a pair read the same one even where a file system shows a file to only some of them.
    """
    while True:
        items = [dataset[index] for index in indices]
        if not dataset.skip:
            return items
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, {index: why for index, why in dataset.bad.items() if index not in dataset.agreed})
        new = {index: why for mine in found for index, why in mine.items()}
        if not new:
            return items
        dataset.bad |= new
        dataset.agreed |= new.keys()
        if dist.get_rank() == 0:
            print(f"{len(dataset.bad)} of {len(dataset)} samples or pairs are bad, the next good ones stand in; new: {'; '.join(list(new.values())[:8])}", flush=True)


def report_skipped(step, skipped, samples, limit=10):
    """
    A step whose loss or gradient is not finite changes nothing; this is the `skipped`-th in a row. Rank 0 says whose it was: the samples whose own loss is
    not finite or, where the losses are and a gradient is not, all of the step. `limit` in a row raise RuntimeError on every rank.
    samples: this rank's, [(name, loss)].
    """
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, samples)
    names = sorted({name for mine in found for name, loss in mine if not math.isfinite(loss)} or {name for mine in found for name, _ in mine})
    text = f"the loss or its gradient was not finite, and the step changed nothing; it came from {'; '.join(names[:8])}{f' and {len(names) - 8} more' * (len(names) > 8)}"
    if skipped >= limit:
        raise RuntimeError(f"{skipped} steps in a row up to step {step} were skipped: {text}. The last checkpoint is whole; look at these files, or start a new run "
                           "with a lower --learning_rate or --beta")
    if dist.get_rank() == 0:
        print(f"step {step:>5}  skipped: {text}", flush=True)


# ------------------------------------------------------------------------------------------------------------------
# checkpoints

def state_of(policy, optimizer, ema):
    """What a checkpoint holds: this rank's shards, {"model", "optimizer", and "ema" where there is one}."""
    model, moments = get_state_dict(policy, optimizer)
    return {"model": model, "optimizer": moments} | ({"ema": get_model_state_dict(ema)} if ema is not None else {})


def save_checkpoint(out, step, policy, optimizer, ema, meta, keep):
    """
    Write out/step_000500 (every rank its shards) and then name it in out/latest. All ranks call it.

    A folder appears under its name only when it is whole, and `latest` changes by an atomic replace after that: a run killed at any moment leaves a
    checkpoint to resume from. meta: what must be equal on resume, as JSON. keep: how many checkpoints stay, this one included (older ones go, after it is
    whole; later ones, of a run that was resumed from before them, stay until they are passed). Returns the folder.
    Raises ValueError if it cannot be written, on a full disk for example: what is unfinished is deleted, and `latest` stays as it was.
    """
    out, first = Path(out), dist.get_rank() == 0
    name = f"step_{step:06d}"
    temporary, final = out / f".{name}.tmp", out / name
    if first:
        for left in [*out.glob(".step_*"), *out.glob(".*.tmp")]:              # by killed runs
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    dist.barrier()
    state = state_of(policy, optimizer, ema)
    try:
        dcp.save(state, checkpoint_id=temporary)
        if first:
            write_whole(temporary / "meta.json", json.dumps(meta | {"step": step}, indent=1).encode())
            if final.exists():                             # a run that was resumed from before it passes it again; `latest` does not name it
                os.rename(final, out / f".{name}.old")
            os.rename(temporary, final)
            write_whole(out / "latest", f"{name}\n".encode())
    except (CheckpointException, OSError) as error:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise ValueError(f"{final} could not be written ({cause}); the checkpoint before it, which {out / 'latest'} names, is whole. Make room, and go on with --resume latest") from error
    if first:
        older = sorted(folder for folder in out.glob("step_*") if folder.name < name)
        for folder in older[:max(0, len(older) - (keep - 1))]:
            os.rename(folder, out / f".{folder.name}.old")                     # so that no folder is half there under its name
        for passed in out.glob(".step_*.old"):
            shutil.rmtree(passed)
    dist.barrier()
    return final


def load_checkpoint(folder, policy, optimizer, ema, meta):
    """
    Fill policy, optimizer and ema from a checkpoint, written on any number of ranks. Returns the step it was written after, and how many in a row were skipped
    before it; 0, 0 where folder is "".

    Raises ValueError if an entry of meta (what decides the numbers of a run) is not what the checkpoint was written with, if it is damaged, and if ranks do
    not see the same one.
    """
    if not folder:
        return 0, 0
    saved = json.loads((Path(folder) / "meta.json").read_text())
    for key, value in meta.items():
        if saved.get(key) != value:
            raise ValueError(f"--resume {folder}: it was trained with {key} = {saved.get(key)}, this run has {key} = {value}; "
                             f"resume with the same flags, or give its weights to --init of a new run (train.py --export {folder} --out DIR)")
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, saved["step"])
    if len(set(seen)) > 1:
        raise ValueError(f"--resume {folder}: the ranks see checkpoints of steps {seen}; --out must be on a file system that all nodes see alike. Name the step folder")
    state = state_of(policy, optimizer, ema)
    try:
        dcp.load(state, storage_reader=Reader(folder), planner=Planner())
    except CheckpointException as error:
        raise ValueError(f"--resume {folder}: it is damaged ({next(iter(error.failures.values()))[0]}); resume from another step folder") from error
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if ema is not None:
        set_model_state_dict(ema, state["ema"])
    return saved["step"], saved.get("skipped", 0)


# ------------------------------------------------------------------------------------------------------------------
# the reference, scored once

def open_errors(path, key, positions):
    """
    What is known of the reference's errors: (positions or more, 2) float32, win and lose, NaN where a position is not scored yet. All ranks read the file.

    key {name: value} is all that decides them but the position. Raises ValueError if the file at path was scored with another, or is no such file.
    """
    errors = torch.full((positions, 2), float("nan"))
    if Path(path).exists():
        try:
            with safe_open(path, "pt") as file:
                found, stored = json.loads(file.metadata()["key"]), file.get_tensor("errors")
            if stored.shape[1:] != (2,) or stored.dtype != torch.float32 or not isinstance(found, dict):
                raise ValueError(f"errors {tuple(stored.shape)} {stored.dtype}")
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: not the errors of a reference, (positions, 2) float32 with their key ({error}); delete it to score them again") from error
        for name, value in key.items():
            if found.get(name) != value:
                raise ValueError(f"{path}: the reference's errors in it were scored with {name} = {found.get(name)}, this run has {name} = {value}; "
                                 f"use the same, another --out, or delete that file to score them again")
        errors = torch.cat([stored, errors[len(stored):]])
    return errors


@torch.no_grad()
def score_reference(path, key, errors, steps, batch_size, score, positions, ranks, every=30.0):
    """
    Score what is missing of the positions of these steps and fill it into errors (of open_errors), on every rank alike.

    score(range of positions) -> (2, B). positions(step) -> the ranges of this rank, as in training, so that an error is what it would be there to the last
    bit. The file at path is written whole every so many seconds and at the end: a run that is killed goes on from there, and of two at once neither undoes
    what the other has scored.
    """
    def write():
        if ranks.rank == 0:
            folder = os.open(Path(path).parent, os.O_RDONLY)
            with suppress(OSError):                        # of a file system without locks
                fcntl.flock(folder, fcntl.LOCK_EX)         # until it is closed, also by a kill
            known = open_errors(path, key, len(errors))
            known[:len(errors)] = torch.where(errors.isnan(), known[:len(errors)], errors)
            write_whole(path, save({"errors": known}, metadata={"key": json.dumps(key)}))
            os.close(folder)
        return time.monotonic()

    dist.barrier()                                         # everyone has read the file
    written, speaks = time.monotonic(), ranks.rank % (ranks.world // ranks.data_ranks) == 0        # the first of the ranks that share their pairs
    steps = [step for step in steps if errors[step * batch_size:(step + 1) * batch_size].isnan().any()]
    for step in tqdm(steps, desc="reference errors", unit="step", disable=ranks.rank != 0 or not steps):
        mine = torch.zeros(batch_size, 2)
        for part in positions(step):
            mine[part.start - step * batch_size:part.stop - step * batch_size] = score(part).T.cpu() * speaks
        mine = mine.to(ranks.device)
        dist.all_reduce(mine)                              # every position has one speaker, so the sum is that one's number
        errors[step * batch_size:(step + 1) * batch_size] = mine.cpu()
        if time.monotonic() - written > every:
            written = write()
    if steps:
        write()
    dist.barrier()

# ------------------------------------------------------------------------------------------------------------------
# a row of the log

def diagnostics(m):
    """
    What the four errors say beside the loss (how to read it: README). m {name: (B,)} -> {name: (B,)}; the mean over pairs makes shares of ones and zeros.
    """
    right = (m["margin"] > 0).float()
    found = {"accuracy_strict": right, "margin_abs": m["margin"].abs()}
    if "err_win" in m:
        found |= {"win_ratio": m["err_win"] / m["ref_err_win"], "lose_ratio": m["err_lose"] / m["ref_err_lose"],
                  "gap_mean": (m["win_gap"] + m["lose_gap"]) / 2, "win_gap_positive": (m["win_gap"] > 0).float(),
                  "win_worse_though_right": right * (m["win_gap"] > 0), "loser_driven": right * (m["lose_gap"] > -m["win_gap"])}
    return found | ({"saturated": (m["margin"].abs() > 5).float()} if "dgr" in m else {})    # a margin with beta in it


BINS = 4                                                                      # of sigma, for the curves by noise level


BINNED = ("err_win", "win_gap", "lose_gap", "margin", "accuracy")


def add_up(sums, metrics, sigma):
    """Add one micro-batch's metrics (B,) to the running sums {name: float}, overall and by bin of sigma."""
    bins = (sigma * BINS).long().clamp(max=BINS - 1)
    for name, values in (metrics | {"pairs": torch.ones_like(sigma)}).items():
        sums[name] = sums.get(name, 0.0) + values.sum().item()
        if name in BINNED or name == "pairs":
            for i in range(BINS):
                sums[f"{name}/{i}"] = sums.get(f"{name}/{i}", 0.0) + values[bins == i].sum().item()


def summarise(sums, margins, device):
    """
    Sums of every rank -> means over all pairs of the step, in one all-reduce. Curves by sigma become lists under "by_sigma" (null where no pair fell).
    margins: list of this rank's; the smallest and the largest of all ranks' go into the row, since a mean hides the one pair that has run away.
    """
    names = sorted(sums)
    sums = dict(zip(names, total([sums[name] for name in names], device)))
    row = {name: value / sums["pairs"] for name, value in sums.items() if "/" not in name}
    row["by_sigma"] = {name: [sums[f"{name}/{i}"] / sums[f"pairs/{i}"] if sums[f"pairs/{i}"] else None for i in range(BINS)]
                       for name in BINNED if name in sums}
    for name in {"win_worse_though_right", "loser_driven"} & sums.keys():     # shares of the pairs that count as right
        row[name] = sums[name] / max(1, sums["accuracy_strict"])
    if margins:
        row["margin_min"], row["margin_max"] = extremes(margins, device)
    if "kept" in sums:                                                        # dpo_cm averages over the pairs it kept
        row["loss"] *= sums["pairs"] / max(1, sums["kept"])
    return row, sums
