"""
Differences between models that were marked on the same captions and noise, with 95 % intervals.

Two models meet the same caption with the same noise, so what differs is the models: a difference is taken caption by
caption and seed by seed, and its interval comes from a bootstrap over captions and over seeds.
"""
import numpy as np

DRAWS = 4000                                       # of the bootstrap


def mark_table(runs, mark, guidance, when):
    """Marks (seeds, captions) of the runs of one setting, as experiments/run.py keeps them."""
    return np.array([run["judged"][when][guidance][mark] for run in runs])


def paired_difference(first, second, seed=0):
    """
    The mean of first - second and its 95 % interval: (mean, low, high).

    first, second: (seeds, captions), row i of both from the same training seed; a base, which has no seeds, has one row
    and is compared with every seed.
    """
    difference = first - second                                                # (seeds, captions)
    seeds, captions = difference.shape
    generator = np.random.default_rng(seed)
    means = np.empty(DRAWS)
    for i in range(DRAWS):
        drawn_seeds = generator.integers(seeds, size=seeds)
        drawn_captions = generator.integers(captions, size=captions)
        means[i] = difference[drawn_seeds][:, drawn_captions].mean()
    return difference.mean(), *np.quantile(means, (0.025, 0.975))


def paired_frechet(first, second, seed=0):
    """
    The same for the Fréchet distance, which belongs to a set of clips. first, second: lists, a run each, of
    {"frechet": number, "frechet_resampled": [numbers]}, the latter over the same draws of captions in every run.
    """
    second = second * len(first) if len(second) == 1 else second
    plain = np.mean([a["frechet"] - b["frechet"] for a, b in zip(first, second)])
    resampled = np.array([np.subtract(a["frechet_resampled"], b["frechet_resampled"]) for a, b in zip(first, second)])
    seeds, draws = resampled.shape
    generator = np.random.default_rng(seed)
    means = [resampled[generator.integers(seeds, size=seeds), generator.integers(draws)].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, (0.025, 0.975)) + plain - resampled.mean()  # a drawn set is farther from real clips
    return plain, low, high


def in_words(mean, low, high, digits=3):
    """-0.266 [-0.301, -0.232]; an interval without 0 is set in bold."""
    text = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if low > 0 or high < 0 else text
