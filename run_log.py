"""
The log: what a step's row holds, and where it goes: out/log.jsonl, the terminal, a tracker.
"""
import json
import sys
import time

import torch
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from fsdp_utils import extremes, total
from run_folder import AT_END, begin_log
from tracker import Tracker

# ------------------------------------------------------------------------------------------------------------------
# what a row holds

BINS = 4                                                   # of sigma, for the curves by noise level
BINNED = ("err_win", "win_gap", "lose_gap", "margin", "accuracy")


def diagnostics(metrics):
    """
    Diagnostics from the four errors, in addition to the loss (docs/CURVES.md explains them): {name: (B,)} in and
    out.
    """
    right = (metrics["margin"] > 0).float()
    extra = {"accuracy_strict": right, "margin_abs": metrics["margin"].abs()}
    if "dgr" in metrics:                                   # a margin with beta in it
        extra["saturated"] = (metrics["margin"].abs() > 5).float()
    if "err_win" in metrics:
        win_gap, lose_gap = metrics["win_gap"], metrics["lose_gap"]
        extra |= {
            "win_ratio": metrics["err_win"] / metrics["ref_err_win"],
            "lose_ratio": metrics["err_lose"] / metrics["ref_err_lose"],
            "gap_mean": (win_gap + lose_gap) / 2,
            "win_gap_positive": (win_gap > 0).float(),
            "win_worse_though_right": right * (win_gap > 0),
            "loser_driven": right * (lose_gap > -win_gap),
        }
    return extra


def add_up(sums, metrics, sigma, counts):
    """
    Add one micro-batch's metrics (B,) to the running sums {name: float}, overall and by bin of sigma, and its counts
    {name: number}.
    """
    for name, number in counts.items():
        sums[name] = sums.get(name, 0.0) + number
    bins = (sigma * BINS).long().clamp(max=BINS - 1)
    for name, values in (metrics | {"pairs": torch.ones_like(sigma)}).items():
        sums[name] = sums.get(name, 0.0) + values.sum().item()
        if name in BINNED or name == "pairs":
            for i in range(BINS):
                sums[f"{name}/{i}"] = sums.get(f"{name}/{i}", 0.0) + values[bins == i].sum().item()


def summarise(sums, margins, ranks):
    """
    Means over all pairs of the step, from the sums of every rank in one all-reduce. Returns the row, and the sums over
    all ranks, where a pair counts once for each rank that shares it.

    Curves by sigma become lists under "by_sigma" (null where a bin had no pair). margins: a list, this rank's; the
    smallest and the largest of all ranks go into the row, since a mean hides the one pair that runs away.
    """
    names = sorted(sums)
    sums = dict(zip(names, total([sums[name] for name in names], ranks.device)))
    row = {
        name: value / sums["pairs"]
        for name, value in sums.items()
        if "/" not in name and name not in ("pairs", "bad_samples")
    }
    row["by_sigma"] = {}
    for name in BINNED:
        if name in sums:
            counts = [sums[f"pairs/{i}"] for i in range(BINS)]
            row["by_sigma"][name] = [sums[f"{name}/{i}"] / count if count else None for i, count in enumerate(counts)]
    for name in {"win_worse_though_right", "loser_driven"} & sums.keys():     # shares of the pairs that count as right
        row[name] = sums[name] / max(1, sums["accuracy_strict"])
    if margins:
        row["margin_min"], row["margin_max"] = extremes(margins, ranks.device)
    if "kept" in sums:                                     # dpo_cm averages over the pairs it kept
        row["loss"] *= sums["pairs"] / max(1, sums["kept"])
    sharing = ranks.world // ranks.data_ranks
    row["bad_samples"] = round(sums["bad_samples"] / sharing)
    sources = {
        name.removeprefix("sources/"): round(sums[name] / sharing) for name in sums if name.startswith("sources/")
    }
    if len(sources) > 1:                                   # the folders of losers that the pairs came from
        row["sources"] = {name: count for name, count in sources.items() if count}
    return row, sums


# ------------------------------------------------------------------------------------------------------------------
# where a row goes

SHOWN = ("loss", "accuracy", "margin", "win_gap", "lose_gap", "dgr", "err_win", "kept", "grad_norm", "seconds")
ON_THE_BAR = ("loss", "accuracy", "margin", "seconds")


class Log:
    """
    The log of a run, on its first rank; on others it does nothing. A row goes to out/log.jsonl and to the tracker, and
    to the terminal: as a line every --log_every steps or, where people watch (sys.stdout is a terminal), into a bar.

    rows: those of the steps before a resumed run's first. run_folder.closes_at_end closes the log.
    """

    def __init__(self, args, start, ranks, shown=SHOWN):
        self.is_first, self.shown, self.start, self.steps = ranks.rank == 0, shown, start, args.steps
        self.path, self.every = args.out / "log.jsonl", getattr(args, "log_every", 1)
        self.rows, self.bar, self.step = [], None, start
        self.clock = Clock(args.steps)
        if not self.is_first:
            return
        self.rows = begin_log(args, start, ranks=ranks.world)
        config = json.loads((args.out / "config.json").read_text())
        self.tracker = Tracker(args.tracker, args.out, start, config)
        AT_END.push(self.close)

    def add(self, row, verdicts=()):
        """Write and show a row; verdicts: lines to print."""
        if not self.is_first:
            return
        append_row(self.path, row)
        self.tracker.row(row)
        self.step = row["step"]
        is_last = self.step + 1 == self.steps
        left = self.clock.time_left(row)
        if sys.stdout.isatty() and not self.bar:
            self.open_bar()
        if self.bar:
            self.bar.set_postfix_str(f"{numbers_in_words(row, ON_THE_BAR)}  {left}", refresh=False)
            self.bar.update(self.step + 1 - self.bar.n)
        elif self.step % self.every == 0 or is_last:
            print(f"step {self.step:>5}  {numbers_in_words(row, self.shown)}  {left}", flush=True)
        for verdict in verdicts:
            print(verdict, flush=True)
        if is_last:
            self.close_bar()

    def picture(self, path):
        """Send a PNG file, as of the last row."""
        if self.is_first:
            self.tracker.picture(self.step, "samples", path)

    def open_bar(self):
        """A bar at the bottom of the terminal; everything that is printed appears above it."""
        self.bar = tqdm(total=self.steps, initial=self.start, file=sys.stdout, dynamic_ncols=True, miniters=1,
                        bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}{postfix}")
        self.stdout, sys.stdout = sys.stdout, DummyTqdmFile(sys.stdout)

    def close_bar(self):
        """Leave the terminal as it was."""
        if self.bar:
            sys.stdout = self.stdout
            self.bar.close()
            self.bar = None

    def close(self, error_type, error, trace):
        """An exit of run_folder.AT_END: error_type is None where main has returned."""
        self.close_bar()
        self.tracker.close(failed=error_type is not None)


class Clock:
    """An estimate of the time left, at the mean pace since the first row, whose step may have compiled."""

    def __init__(self, steps):
        self.steps, self.first = steps, None

    def time_left(self, row):
        """The time left after this row, the next of this process, as "2:31 left"."""
        now, pace = time.monotonic(), row["seconds"]
        if self.first is None:
            self.first = (row["step"], now)
        elif row["step"] > self.first[0]:
            pace = (now - self.first[1]) / (row["step"] - self.first[0])
        return f"{duration(pace * (self.steps - row['step'] - 1))} left"


def duration(seconds):
    """151 -> "2:31", 7384 -> "2:03:04"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def numbers_in_words(row, names):
    """
    The numbers of these names that the row has, as "loss 0.6931  accuracy 0.5", after the expert's name if there are
    two.
    """
    words = [f"{name} {row[name]:.4g}" for name in names if name in row]
    return "  ".join([row["expert"], *words] if "expert" in row else words)


def append_row(path, row):
    """Append a row to log.jsonl. Seven digits are more than a curve shows and halve the log."""
    rounded = json.loads(json.dumps(row), parse_float=lambda digits: float(f"{float(digits):.7g}"))
    try:
        with open(path, "a") as log:
            log.write(json.dumps(rounded) + "\n")
    except OSError as error:
        raise ValueError(
            f"{path} could not be written ({error}); make room, and resume with --resume latest"
        ) from error
