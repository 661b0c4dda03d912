"""
What to look at beside the loss: what tells wins from losers before training; what goes into a row of the log; errors of pairs that are never trained on.

    python probe.py data/wan --sigma 0.6        # the audit of a set of pairs: a folder with real/ and negatives*/, or a .jsonl
"""
import argparse
import sys
import zlib

import torch

from data import PairSet, collate, open_data, randomness
from fsdp_utils import extremes, spread, total


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


# ------------------------------------------------------------------------------------------------------------------
# pairs that are never trained on

def hold_back(dataset, count):
    """
    Takes `count` wins with all their losers out of a PairSet. Which, hangs on the names of the files alone. Pairs that share a file with these go from
    training too. Returns what is left to train on and what is held back, both PairSets. Raises ValueError where nothing would be left.
    """
    good = [pair for i, pair in enumerate(dataset.pairs) if i not in dataset.bad]
    wins = sorted({win for win, _ in good}, key=lambda path: (zlib.crc32(path.stem.encode()), str(path)))
    held = [pair for pair in good if pair[0] in set(wins[:count])]
    files = {path for pair in held for path in pair}
    left = [pair for pair in dataset.pairs if not files & set(pair)]
    if count < 1 or not left:
        raise ValueError(f"--hold_back {count}: the data has {len(wins)} different wins in {len(dataset)} pairs; expected 1 or more, and pairs left to train on")
    return PairSet(left, dataset.unpaired, dataset.skip), PairSet(held)


def sigma_steps(min_timestep, max_timestep, count=4):
    """The middles of `count` equal parts of the range of sigmas that is trained on."""
    return [(min_timestep + (max_timestep - min_timestep) * (i + 0.5) / count) / 1000 for i in range(count)]


class Probe:
    """
    The errors of fixed pairs, with fixed noise, at fixed sigmas: the same whatever the run's loss, seed and ranks, so that runs can be compared and a step
    with the next. model: the policy before its first update, which is the reference; its errors are kept. errors(model, batch) -> (2, B), win and lose.
    A preference model's scores stand in the errors' place, and have no reference.
    """

    def __init__(self, dataset, errors, model, sigmas, ranks, at_once):
        self.dataset, self.errors, self.sigmas, self.ranks, self.at_once = dataset, errors, sigmas, ranks, at_once
        self.ref = 0 if model.config.scores else self.score(model)

    @torch.no_grad()
    def score(self, model):
        """-> (pairs, sigmas, 2), on every rank."""
        def make(part):
            items = [self.dataset[i] for i in part]
            noise = [torch.randn(item["win"].shape, generator=randomness(0, i, "probe")) for i, item in zip(part, items)]
            batch = {name: value.to(self.ranks.device) for name, value in collate(items).items() if torch.is_tensor(value)}
            batch["noise"] = torch.stack(noise).to(self.ranks.device)
            return torch.stack([self.errors(model, batch | {"sigma": torch.full((len(part),), sigma, device=self.ranks.device)}).T for sigma in self.sigmas], dim=1)

        return spread(make, len(self.dataset), self.ranks, self.at_once)

    def __call__(self, model, beta):
        """{name: list, one number for each of "sigma"}: means over the pairs. margin is beta times what the win gained on the lose, whatever the loss."""
        err = self.score(model)
        if model.config.scores:
            margin, found = err[..., 0] - err[..., 1], {}
        else:
            gap = err - self.ref
            margin = -beta * (gap[..., 0] - gap[..., 1])                      # (pairs, sigmas)
            found = {"err_win": err[..., 0], "err_lose": err[..., 1], "ref_err_win": self.ref[..., 0], "ref_err_lose": self.ref[..., 1],
                     "win_gap": gap[..., 0], "lose_gap": gap[..., 1]}
        found |= {"margin": margin, "accuracy": (1 + margin.sign()) / 2}      # a tie counts half
        return {"pairs": len(err), "sigma": self.sigmas} | {name: values.mean(0).tolist() for name, values in found.items()}


# ------------------------------------------------------------------------------------------------------------------
# what tells wins from losers

def statistics(x):
    """
    Simple numbers of videos x (B, C, F, H, W), of each channel and of all together: {name: (B,)}. Grain and flicker are mean squares of the differences
    of neighbours in space and in time; "in flat parts": what a fifth of the differences stay below, since a busy picture hides grain in the mean.
    """
    found = {"mean": x.mean(dim=(2, 3, 4)), "std": x.flatten(2).std(dim=2)}
    for name, axis in (("grain", 4), ("flicker", 2)):
        change = x.diff(dim=axis).abs().flatten(2)                            # (B, C, elements)
        if change.numel():                                                    # one frame does not flicker
            found[name] = change.square().mean(dim=2)
            found[f"{name} in flat parts"] = change.kthvalue(1 + change.shape[2] // 5, dim=2).values
    return {f"{name}, {part}": values for name, of_channels in found.items()
            for part, values in [(f"channel {c}", of_channels[:, c]) for c in range(x.shape[1])] + [("all channels", of_channels.mean(1))]}


def best_threshold(win, lose):
    """win, lose (N,) -> share of the 2N numbers on the right side of the best threshold, the threshold, and whether wins are above it."""
    values, places = torch.cat([win, lose]).sort()
    is_win = (places < len(win)).float()
    above = (len(win) - is_win.cumsum(0) + (1 - is_win).cumsum(0)) / len(values)            # right if all up to here are losers, all behind it wins
    above[:-1][values[1:] == values[:-1]] = 0.5                                             # no threshold fits between equal numbers
    i = torch.where(above > 0.5, above, 1 - above).argmax()
    return max(above[i], 1 - above[i]).item(), (values[i] + values[min(i + 1, len(values) - 1)]).item() / 2, bool(above[i] > 0.5)


def auc(win, lose):
    """Share of all (win, lose) whose win has the larger number; ties count half."""
    return ((1 + (win[:, None] - lose[None, :]).sign()) / 2).mean().item()


def audit(pairs, sigmas):
    """
    How far one simple number of the noisy video tells wins from losers. pairs: list of (win, lose), (C, F, H, W) each. The number and its threshold are
    picked on every other pair and tried on the rest. Returns one {"sigma", "accuracy", "statistic", "auc"} for each sigma.
    """
    win, lose = (torch.stack([pair[i] for pair in pairs]) for i in range(2))
    noise = torch.stack([torch.randn(win.shape[1:], generator=randomness(0, i, "audit")) for i in range(len(pairs))])      # shared by the two, as in training
    rows = []
    for sigma in sigmas:
        of_win, of_lose = (statistics((1 - sigma) * side + sigma * noise) for side in (win, lose))
        fits = {name: best_threshold(of_win[name][::2], of_lose[name][::2]) for name in of_win}
        name = max(fits, key=lambda name: fits[name][0])
        _, threshold, above = fits[name]
        right = torch.cat([(of_win[name][1::2] > threshold) == above, (of_lose[name][1::2] > threshold) != above])
        rows.append({"sigma": sigma, "accuracy": right.float().mean().item(), "statistic": name, "auc": auc(of_win[name], of_lose[name])})
    return rows


def audit_report(dataset, lowest, most=128, elements=2 ** 26):
    """
    The audit of a PairSet in words, with a warning where training from sigma `lowest` up would learn a trivial difference. It looks at `most` pairs, fewer
    where videos are large.
    """
    shape = dataset[0]["win"].shape
    count = max(16, min(most, elements // shape.numel()))
    looked = [dataset[i * len(dataset) // count] for i in range(count)] if len(dataset) > count else [dataset[i] for i in range(len(dataset))]
    pairs = [(item["win"], item["lose"]) for item in looked if item["win"].shape == shape]
    lines = []
    same = sum(torch.equal(win, lose) for win, lose in pairs)
    if same:
        lines.append(f"WARNING: win and lose are the same in {same} of {len(pairs)} pairs, which teach nothing")
    if len(pairs) < 8:
        return "\n".join(lines + [f"no audit of {len(pairs)} pairs: 8 of one shape are needed"])
    rows = audit(pairs, sorted({0.0, lowest, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8}))
    lines.append(f"audit: how often the best of some simple numbers (brightness, grain, flicker, ...) tells win from lose in {len(pairs) // 2} pairs it was not picked on; chance is 0.5: "
                 + ", ".join(f"{'clean' if row['sigma'] == 0 else 'sigma {:g}'.format(row['sigma'])} {row['accuracy']:.2f}" for row in rows)
                 + f" (clean: {rows[0]['statistic']}, AUC {rows[0]['auc']:.2f})")
    found = next(row for row in rows if row["sigma"] == lowest)
    if found["accuracy"] > 0.9:
        hidden = next((row for row in rows if row["sigma"] > lowest and row["accuracy"] < 0.8), None)
        lines.append(f"WARNING: at the lowest noise trained on (sigma {lowest:g}) {found['statistic']} alone tells win from lose in {found['accuracy']:.0%}: accuracy will rise "
                     "without the samples getting better. Make wins and losers with the same encoder, at the same size and frame rate, the losers without guidance"
                     + (f"; or train above the noise that hides it, --min_timestep {1000 * hidden['sigma']:g} at least ({hidden['accuracy']:.0%} there; "
                        "a network sees more than one number)" if hidden else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("data", help="a folder with real/ and negatives*/, or a .jsonl of pairs")
    parser.add_argument("--sigma", type=float, default=0.0, help="the lowest that will be trained on: --min_timestep / 1000")
    given = parser.parse_args()
    try:
        print(audit_report(open_data(given.data, pairs=True), given.sigma))
    except ValueError as error:
        sys.exit(f"probe.py: {error}")
