"""
Everything under --out, kept so that nothing is lost: config, checkpoints, stopping and resuming, skipped steps.

    out/config.json   out/log.jsonl, a row a step   out/step_000500/   out/latest, the step folder to resume from

A file or folder gets its final name when it is whole; the names of unfinished ones start with a dot.
"""
import fcntl
import functools
import json
import math
import os
import shutil
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from samples import weights_digest, write_whole
from fsdp_utils import state_options
from step_folder import Planner, Reader
from tracker import TRACKERS, check_tracker

AT_END = ExitStack()    # closes what a trainer's main has opened, however main ends: closes_at_end

# ------------------------------------------------------------------------------------------------------------------
# starting and resuming

def check_common_flags(args, ranks):
    """Refuse numbers that no trainer can use. Raises ValueError."""
    counts = (
        "steps",
        "batch_size",
        "grad_accum",
        "keep",
        "save_every",
        "sample_steps",
        "updates",
        "log_every",
        "toy_clips",
    )
    for name in counts:
        if getattr(args, name, 1) < 1:                     # not every trainer has all of them
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
    check_tracker(args.tracker)
    ranges = [   # flag, is it fine, what is expected
        ("max_grad_norm", args.max_grad_norm > 0, "above 0 ('inf' switches clipping off)"),
        ("learning_rate", args.learning_rate > 0, "above 0"),
        ("ema_decay", 0 <= args.ema_decay < 1, "0 or more, below 1"),
        ("caption_dropout", 0 <= getattr(args, "caption_dropout", 0) <= 1, "a share, 0 to 1"),
        ("eval_clips", not 0 < args.eval_clips < 64, "0, or at least 64 (a Frechet distance of fewer says nothing)"),
    ]
    for name, is_fine, expected in ranges:
        if not is_fine:
            raise ValueError(f"--{name} {getattr(args, name)}: expected {expected}")
    share = ranks.data_ranks * args.grad_accum
    if args.batch_size % share:
        raise ValueError(f"--batch_size {args.batch_size} does not divide over {ranks.data_ranks} data ranks x "
                         f"--grad_accum {args.grad_accum}; take a multiple of {share}")


def find_checkpoint(out, resume):
    """
    The step folder that --resume names: `latest` (of the run's folder out) or a path. ValueError if it is not whole.
    """
    if resume == "latest":
        pointer = Path(out) / "latest"
        if not pointer.exists():
            raise ValueError(f"--resume latest: {pointer} does not exist; {out} has no checkpoint. Leave out --resume "
                             "to start anew, or name a step folder")
        folder = Path(out) / pointer.read_text(encoding="utf-8-sig").strip()
    else:
        folder = Path(resume)
    if not (folder / "meta.json").exists():
        raise ValueError(f"--resume {resume}: {folder} holds no whole checkpoint (meta.json is missing); name a folder "
                         f"like {out}/step_000500")
    return folder


def check_folder(out, resume):
    """
    The step folder that --resume selects in the run's folder `out`, as text, or "" to start a new run. `auto` is
    `latest` where there is one; ranks that torchrun --max-restarts restarts resume from `latest` as well, whatever the
    flag says. ValueError where there is nothing to resume from, and where something would be overwritten.
    """
    out = Path(out)
    log, latest = out / "log.jsonl", out / "latest"
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if is_restart or resume == "auto":
        if latest.exists():
            resume = "latest"
        elif resume in ("auto", "latest"):
            resume = ""
    elif not resume and log.exists() and log.stat().st_size:
        how = (
            "resume it (--resume latest)"
            if latest.exists()
            else "it was stopped before its first checkpoint: delete it"
        )
        raise ValueError(f"{out} already holds a run; {how}, or choose another --out")
    elsewhere = resume not in ("", "latest") and Path(resume).resolve().parent != out.resolve()
    if elsewhere and not is_restart and log.exists():
        raise ValueError(f"--resume {resume} is not in --out {out}, which holds another run; choose another --out")
    return str(find_checkpoint(out, resume)) if resume else ""


def run_settings(args, may_change, **contents):
    """
    {name: value} of everything that decides a run's numbers and must not change on resume: every flag but those in
    may_change, and fingerprints of what --init, --data and the like hold.
    """
    flags = {name: value for name, value in vars(args).items() if name not in may_change and name != "defaults"}
    contents["init_lora"] = weights_digest(args.init_lora) if args.init_lora else "fresh"
    return flags | contents


def describe_run(args, dataset, tokens, start, ranks, name, model, memory):
    """
    A description of the run that is about to start, as lines of text. name: of the model; memory: the line about it;
    tokens: of a video.
    """
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share_trained = "" if trained == parameters else f", {trained:,} of them trained"
    item = dataset[0]
    unit = "pairs" if "lose" in item else "samples"
    data = (f"{len(dataset):,} {unit} in {'the embedded world' if args.data == 'toy' else args.data}, latents "
            f"{tuple(item['win'].shape)} = {tokens:,} tokens, context {tuple(item['context'].shape)}")
    unpaired = getattr(dataset, "unpaired", ())
    if unpaired:
        data += f"; {len(unpaired)} real samples have no negative and are left out"
    share = args.batch_size // (ranks.data_ranks * args.grad_accum)
    step = (
        f"a step: {args.batch_size} {unit} = {ranks.data_ranks} data ranks x {args.grad_accum} accumulation x {share}"
    )
    sharing = ranks.world // ranks.data_ranks
    if sharing > 1:
        branches = "one branch each" if sharing > args.cp_size else "both branches"
        step += f" (one data rank: {sharing} ranks, {branches}, tokens over {args.cp_size})"
    epochs = (args.steps - start) * args.batch_size / len(dataset)
    model_line = f"{name}: {parameters:,} parameters{share_trained}; {ranks.world} ranks on {ranks.device.type}"
    return [f"{model_line}, torch {torch.__version__}", memory, data,
            f"{step}; steps {start} to {args.steps} = {epochs:.1f} epochs; log in {args.out / 'log.jsonl'}"]


def begin_log(args, start, **facts):
    """
    Write config.json, and log.jsonl without the rows from step `start` on, which will be repeated. Called by rank 0.
    Returns the rows that stay. A damaged line, such as the half row of a killed run or the zeros of a power cut, is
    dropped and reported.
    """
    flags = {name: value for name, value in vars(args).items() if name != "defaults"}
    config = flags | facts | {"torch": torch.__version__}
    write_whole(args.out / "config.json", json.dumps(config, indent=1, default=str).encode())
    log = args.out / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    rows, kept = [], []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            is_before = line.endswith(b"\n") and row["step"] < start
        except (ValueError, TypeError, KeyError):
            print(f"{log}:{number}: not a row of a log; the line is dropped", flush=True)
            continue
        if is_before:
            rows.append(row)
            kept.append(line)
    write_whole(log, b"".join(kept))
    if args.resume:
        folder = Path(args.resume).resolve()
        if folder.parent == args.out.resolve():            # an older step: no kill may leave `latest` ahead of the log
            write_whole(args.out / "latest", f"{folder.name}\n".encode())
    return rows


def lock_folder(out, ranks):
    """
    Lock the run's folder until the function decorated with closes_at_end ends; a kill releases it too. The first rank
    holds the lock. All ranks call it. ValueError on every rank where another run holds it.
    """
    is_free = True
    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
        AT_END.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_free = False
        except OSError:                                    # a file system without locks
            pass
    answer = [is_free]
    dist.broadcast_object_list(answer)
    if not answer[0]:
        raise ValueError(f"--out {out}: another run is writing to this folder; wait for it, stop it, or choose another "
                         "--out")


def closes_at_end(main):
    """Decorator of a trainer's main: closes the lock, the log and the tracker, however main ends."""
    @functools.wraps(main)
    def wrapper(*args, **options):
        with AT_END:
            return main(*args, **options)
    return wrapper


def add_folder_flags(parser, save_every):
    """Add the flags about checkpoints, tracking and resuming."""
    add = parser.add_argument
    add("--save_every", type=int, default=save_every, help="steps between checkpoints")
    add("--keep", type=int, default=2, help="number of checkpoints kept on disk")
    add("--save_minutes", type=float, default=30.0,
        help="also save every this many minutes (0: off). SIGTERM and SIGINT save too, and stop")
    add("--tracker", default="none", choices=["none", *TRACKERS],
        help="also send rows, previews and flags to TensorBoard (out/RUN/tensorboard) or to Weights & Biases")
    add("--resume", default="", help="a step folder, 'latest', or 'auto': latest where there is one. Ranks "
                                     "restarted by torchrun --max-restarts resume by themselves")


# ------------------------------------------------------------------------------------------------------------------
# signals, unreadable samples, skipped steps

class Signals:
    """
    Signals and the clock. SIGTERM and SIGINT are noted, not obeyed at once: asks() joins the sums that a step takes
    over all ranks anyway, so that every rank saves and stops after the same step, whichever rank got the signal. A
    second signal, more than five seconds later (torchrun passes the first on), is obeyed.
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
        save_is_due = 0 < self.seconds < time.monotonic() - self.saved
        return {"asks/stop": float(self.noted > 0), "asks/save": float(save_is_due)}

    def save(self, *state):
        """save_checkpoint, which also restarts the clock."""
        folder = save_checkpoint(*state)
        self.saved = time.monotonic()
        return folder

    def close(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def leave(self, folder):
        """End a run that a signal stopped, after all ranks saved `folder`."""
        self.close()
        if dist.get_rank() == 0:
            print(f"stopped by a signal; {folder} is saved, resume with --resume latest", flush=True)
        dist.destroy_process_group()


def read_items(dataset, indices, skip):
    """
    The items at these indices. With `skip` all ranks call it together: an item that one of them cannot read is bad for
    all from then on, so that ranks that share a pair read the same one even where a file system shows a file to only
    some.
    """
    while True:
        items = [dataset[index] for index in indices]
        if not skip:
            return items
        bad_of_ranks = [None] * dist.get_world_size()
        dist.all_gather_object(bad_of_ranks, dataset.bad)
        union = {index: reason for bad in bad_of_ranks for index, reason in bad.items()}
        is_news = any(bad.keys() != union.keys() for bad in bad_of_ranks)
        news = union.keys() - dataset.reported
        dataset.bad |= union
        dataset.reported |= news
        if news and dist.get_rank() == 0:
            reasons = "; ".join(union[index] for index in sorted(news)[:8])
            print(f"{len(union)} of {len(dataset)} samples or pairs are unreadable and replaced by the next good ones; "
                  f"new: {reasons}", flush=True)
        if not is_news:
            return items


def report_skipped(step, skipped, samples, limit=10):
    """
    Say why a step changed nothing: its loss or gradient is not finite, the `skipped`-th time in a row. Rank 0 names the
    samples whose loss is not finite or, where only a gradient is not finite, all samples of the step. `limit` in a row
    raise RuntimeError on every rank. samples: this rank's, [(name, loss)].
    """
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, samples)
    everyone = [sample for of_rank in of_ranks for sample in of_rank]
    guilty = {name for name, loss in everyone if not math.isfinite(loss)}
    names = sorted(guilty or {name for name, _ in everyone})
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    text = ("the loss or its gradient was not finite, and the step changed nothing; it came from "
            f"{'; '.join(names[:8])}{more}")
    if skipped >= limit:
        raise RuntimeError(f"{skipped} steps in a row up to step {step} were skipped: {text}. The last checkpoint is "
                           "whole; look at these files, or start a new run with a lower --learning_rate or --beta")
    if dist.get_rank() == 0:
        print(f"step {step:>5}  skipped: {text}", flush=True)


def check_first_margin(margin, beta, half):
    """
    Check the mean absolute margin of the first step, where policy and reference are the same weights: it is 0 but for
    rounding, and the preference loss is log 2. beta: what multiplies errors in this margin.

    In float32 more than 1e-6 * beta raises RuntimeError. half: matrices run in bf16, where kernels of the two may round
    differently; more than 0.02 prints a warning, more than 0.1 raises, whatever beta.
    """
    text = (f"policy and reference are the same weights at step 0, but their margins differ by {margin:.2g} on "
            "average: they do not take the same numerical path, so every later margin would be wrong by as much (and "
            "the preference loss is not log 2)")
    if margin > (0.1 if half else 1e-6 * beta):
        raise RuntimeError(text)
    if half and margin > 0.02 and dist.get_rank() == 0:
        print(f"WARNING: {text}. Up to 0.1 this is noise of bf16 kernels", flush=True)


# ------------------------------------------------------------------------------------------------------------------
# checkpoints

def state_of(policy, optimizer, ema):
    """The contents of a checkpoint: this rank's shards, {"model", "optimizer", and "ema" where there is one}."""
    model, moments = get_state_dict(policy, optimizer, options=state_options(policy))
    state = {"model": model, "optimizer": moments}
    if isinstance(ema, nn.Module):
        state["ema"] = get_model_state_dict(ema)
    elif ema is not None:                                  # of adapters: tensors that a load fills in place
        state["ema"] = dict(ema.named_parameters())
    return state


def save_checkpoint(out, step, states, meta, keep):
    """
    Write out/step_000500 (every rank its shards) and then name it in out/latest. All ranks call it. Returns the folder.
    states: {"": (policy, optimizer, ema)}, or one such triple for each of several folders in the step folder.

    A folder gets its final name when it is whole, and `latest` changes by an atomic replace after that: a run killed at
    any moment leaves a checkpoint to resume from. meta: what must be equal on resume, as JSON. keep: this many
    checkpoints stay, this one included; older ones are deleted after it is whole. Later ones, which a run resumed from
    an earlier step leaves behind, stay until the run passes them. ValueError if it cannot be written, on a full disk
    for example: unfinished files are deleted, and `latest` stays as it was.
    """
    out, is_first_rank = Path(out), dist.get_rank() == 0
    name = f"step_{step:06d}"
    temporary, final = out / f".{name}.tmp", out / name
    if is_first_rank:
        remove_leftovers(out)
    dist.barrier()
    try:
        for folder, state in states.items():
            dcp.save(state_of(*state), checkpoint_id=temporary / folder)
        if is_first_rank:
            write_whole(temporary / "meta.json", json.dumps(meta | {"step": step}, indent=1).encode())
            # a run that was resumed from before this step passes it again
            if final.exists():
                os.rename(final, out / f".{name}.old")
            os.rename(temporary, final)
            write_whole(out / "latest", f"{name}\n".encode())
    except (CheckpointException, OSError) as error:
        if is_first_rank:
            shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(f"{final} could not be written ({first_cause(error)}); the checkpoint before it, which "
                         f"{out / 'latest'} names, is whole. Make room, and resume with --resume latest") from error
    if is_first_rank:
        older = [folder for folder in step_folders(out) if step_number(folder) < step]
        for folder in older[:max(0, len(older) - (keep - 1))]:
            os.rename(folder, out / f".{folder.name}.old")                     # no folder is half there under its name
        remove_leftovers(out)
    dist.barrier()
    return final


def remove_leftovers(out):
    """Delete unfinished and replaced checkpoints, of killed runs too."""
    for path in [*out.glob(".step_*"), *out.glob(".*.tmp")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def step_number(folder):
    return int(folder.name.removeprefix("step_"))


def step_folders(out):
    """The step folders of a run, in the order of their steps (step_1000000 comes after step_999999)."""
    return sorted((folder for folder in out.glob("step_*") if folder.name[5:].isdigit()), key=step_number)


def first_cause(error):
    """The first message in a CheckpointException of several ranks, or in any other error."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def check_same_run(folder, settings):
    """
    ValueError if an entry of settings (run_settings: what decides the numbers of a run) differs from the one that the
    checkpoint in `folder` was written with. Nothing to check where folder is "".
    """
    if not folder:
        return
    saved = json.loads((Path(folder) / "meta.json").read_text())
    export = f"give its weights to --init of a new run (python weights.py {folder} --out DIR)"
    for name, value in settings.items():
        if name not in saved:
            raise ValueError(f"--resume {folder}: it was written by an earlier version, which did not record {name}, "
                             f"so its numbers cannot be continued; {export}")
        if saved[name] != value:
            raise ValueError(f"--resume {folder}: it was trained with {name} = {saved[name]}, this run has {name} = "
                             f"{value}; resume with the same flags, or {export}")


def load_checkpoint(folder, states):
    """
    Load a checkpoint, written on any number of ranks, into states (see save_checkpoint). Returns the step it was
    written after, and how many steps in a row were skipped before it; 0, 0 where folder is "".
    ValueError if the checkpoint is damaged, and if ranks do not see the same one.
    """
    if not folder:
        return 0, 0
    saved = json.loads((Path(folder) / "meta.json").read_text())
    steps_seen = [None] * dist.get_world_size()
    dist.all_gather_object(steps_seen, saved["step"])
    if len(set(steps_seen)) > 1:
        raise ValueError(f"--resume {folder}: the ranks see checkpoints of steps {steps_seen}; --out must be on a file "
                         "system that all nodes see alike. Name the step folder")
    for name, (policy, optimizer, ema) in states.items():
        state = state_of(policy, optimizer, ema)
        try:
            dcp.load(state, storage_reader=Reader(Path(folder) / name), planner=Planner())
        except CheckpointException as error:
            raise ValueError(f"--resume {folder}: it is damaged ({first_cause(error)}); resume from another step "
                             "folder") from error
        set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                       options=state_options(policy))
        if isinstance(ema, nn.Module):
            set_model_state_dict(ema, state["ema"])
    return saved["step"], saved.get("skipped", 0)
