"""Stochastic steps against closed forms; roll-outs and their pools; SPO's objective; one curve however it is cut."""
import contextlib
import dataclasses
import fcntl
import io
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import toy
import train_spo
import weights
from conftest import on_ranks, spo_fails, spo_main
from data import randomness
from samples import read_sample, seed_of, write_sample
from model import CONFIGS, WanModel
from sample import KERNELS, Sampler, generate, log_density, step_coefficients, step_distribution, uniform_grid
from weights import save_wan

# (sigma, sigma_next)
STEPS = [(1.0, 0.97), (1.0, 0.3), (0.983, 0.964), (0.75, 0.71), (0.75, 0.1), (0.5, 0.4999), (0.25, 0.136), (0.136, 0.0),
         (0.02, 0.01)]


# ----------------------------------------------------------------------------------------------------------------------
# stochastic steps

def tensors(*shape, count=3, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("t, s", STEPS)
def test_ddim_with_eta_1_is_the_posterior_of_the_noising_and_with_eta_0_the_euler_step(t, s):
    # x_t = alpha x_s + noise of variance sigma2, x_s = (1-s) latents + s noise: multiply the two Gaussians in x_s
    x, v, _ = tensors(2, 3, 4)
    mean, std = step_distribution(x, v, t, s, "ddim", 0.0)
    assert std == 0
    assert (mean - (x + (s - t) * v)).abs().max() < 1e-10
    mean, std = step_distribution(x, v, t, s, "ddim", 1.0)
    if s == 0:                                             # the posterior is a point: the latents themselves
        assert std == 0
        assert (mean - (x - t * v)).abs().max() < 1e-10
        return
    alpha = (1 - t) / (1 - s)
    sigma2 = t**2 - (alpha * s) ** 2
    variance = 1 / (alpha**2 / sigma2 + 1 / s**2)
    expected = variance * (alpha / sigma2 * x + (1 - s) / s**2 * (x - t * v))
    assert abs(std**2 - variance) < 1e-10
    assert (mean - expected).abs().max() < 1e-10


@pytest.mark.parametrize("t, s", STEPS)
def test_ddim_takes_its_direction_and_its_noise_from_one_budget(t, s):
    # Song et al. 2021, Eq. 12, in this flow's words: x_s = (1-s) latents + sqrt(s^2 - std^2) noise_pred + std z, with
    # both predictions from v
    x, v, _ = tensors(2, 3, 4)
    for eta in (0.3, 0.7, 1.0):
        mean, std = step_distribution(x, v, t, s, "ddim", eta)
        alpha = (1 - t) / (1 - s)
        assert abs(std - eta * s / t * math.sqrt(t**2 - (alpha * s) ** 2)) < 1e-10
        latents_pred, noise_pred = x - t * v, x + (1 - t) * v
        expected = (1 - s) * latents_pred + math.sqrt(s**2 - std**2) * noise_pred
        assert (mean - expected).abs().max() < 1e-10


@pytest.mark.parametrize("t, s", STEPS)
def test_the_sde_steps_are_euler_maruyama_of_their_equations(t, s):
    x, v, _ = tensors(2, 3, 4)
    score = -(x + (1 - t) * v) / t                         # of the marginal: -noise_pred / t
    published = {"flow_grpo": (0.7, 0.7 * math.sqrt(t / (1 - (s if t == 1 else t)))), "dance": (0.3, 0.3)}
    for kernel, (eta, g) in published.items():
        mean, std = step_distribution(x, v, t, s, kernel, eta)
        assert (mean - (x + (s - t) * (v - g**2 / 2 * score))).abs().max() < 1e-10
        assert abs(std - g * math.sqrt(t - s)) < 1e-10
        mean, std = step_distribution(x, v, t, s, kernel, 0.0)
        assert std == 0
        assert (mean - (x + (s - t) * v)).abs().max() < 1e-10


def test_a_short_ancestral_step_is_the_flow_grpo_sde_with_eta_root_2():
    a, b, std = step_coefficients(0.6, 0.599, "ddim", 1.0)
    a_sde, b_sde, std_sde = step_coefficients(0.6, 0.599, "flow_grpo", math.sqrt(2))
    # a step of 0.001: equal to first order
    assert [1 - a, b, std**2] == pytest.approx([1 - a_sde, b_sde, std_sde**2], rel=0.01)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_variance_of_a_point_mass_at_every_step_size(eta):
    # all latents one point: v = (x - point) / t, so x_next - (1-s) point has the variance (a t + b)^2 + std^2, which
    # must be s^2
    for steps, shift in ((2, 1.0), (5, 3.0), (20, 3.0), (50, 5.0), (1000, 1.0)):
        sigmas = uniform_grid(steps, shift)
        for t, s in zip(sigmas[:-1], sigmas[1:]):
            a, b, std = step_coefficients(t, s, "ddim", eta)
            assert abs((a * t + b) ** 2 + std**2 - s**2) < 1e-10
    # and the SDEs' Euler steps do not: what 20 steps of shift 3 leave in the last step with a density, 0.25 to 0.136
    t, s = uniform_grid(20, 3.0)[-3:-1]
    for kernel, sde_eta, left in (("flow_grpo", 0.7, 1.53), ("flow_grpo", math.sqrt(2), 4.09), ("dance", 0.3, 1.27)):
        a, b, std = step_coefficients(t, s, kernel, sde_eta)
        assert ((a * t + b) ** 2 + std**2) / s**2 == pytest.approx(left, abs=0.005)


@pytest.mark.parametrize("kernel, eta", [("ddim", 1.0), ("ddim", 0.5), ("flow_grpo", 0.7), ("dance", 0.3)])
def test_short_steps_keep_to_the_marginals_of_the_flow_with_every_kernel(kernel, eta):
    # latents N(0, 0.5^2): x_sigma has variance sigma^2 + 0.25 (1 - sigma)^2 and v = c x, so a step takes it to
    # (a + b c)^2 variance + std^2. From 0.9 to 0.1 (flow_grpo's noise is infinite at 1) the error must halve with the
    # step.
    def marginal(sigma):
        return sigma**2 + 0.25 * (1 - sigma) ** 2

    errors = []
    for steps in (200, 400):
        sigmas = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64).tolist()
        variance = marginal(0.9)
        for t, s in zip(sigmas[:-1], sigmas[1:]):
            a, b, std = step_coefficients(t, s, kernel, eta)
            variance = (a + b * (t - 0.25 * (1 - t)) / marginal(t)) ** 2 * variance + std**2
        errors.append(variance / marginal(0.1) - 1)
    assert abs(errors[0]) < 0.05
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)


def test_the_log_density_is_the_normal_ones_mean_over_elements():
    x, mean, _ = tensors(2, 3, 4, 5)
    expected = torch.distributions.Normal(mean, 0.37).log_prob(x).flatten(1).mean(1)
    assert (log_density(x, mean, 0.37) - expected).abs().max() < 1e-10
    assert log_density(x.float(), mean.float(), 0.37).dtype == torch.float64
    with pytest.raises(ValueError, match="deterministic step"):
        log_density(x, mean, 0.0)


@pytest.mark.parametrize("step, words", [
    ((0.5, 0.5, "ddim", 1.0), "sigma 0.5 to 0.5"),
    ((0.5, 0.7, "ddim", 1.0), "sigma 0.5 to 0.7"),
    ((1.2, 0.5, "ddim", 1.0), "sigma 1.2"),
    ((0.5, 0.2, "ddim", 1.1), "at most 1 with ddim"),
    ((0.5, 0.2, "dance", -0.1), "eta is -0.1"),
    ((0.5, 0.2, "ddpm", 1.0), "ddim, flow_grpo"),
])
def test_steps_that_lead_nowhere_are_refused(step, words):
    with pytest.raises(ValueError, match=words):
        step_coefficients(*step)


# ----------------------------------------------------------------------------------------------------------------------
# the roll-out

class Gaussian(torch.nn.Module):
    """The exact velocity of latents N(1, 0.5^2), plus `change`; counts its forwards."""
    def __init__(self, change=0.0):
        super().__init__()
        self.change, self.forwards = torch.nn.Parameter(torch.tensor(change)), 0

    def forward(self, x, timestep, context):
        self.forwards += 1
        s = (timestep / 1000).view(-1, 1, 1, 1, 1)
        centred = x - (1 - s)
        return -1 + centred * (s - 0.25 * (1 - s)) / (s**2 + 0.25 * (1 - s) ** 2) + self.change * torch.sin(7 * x)


@pytest.fixture
def spo_args(tmp_path):
    """A function that takes flags in one string and returns checked arguments of train_spo.py."""
    def make(flags=""):
        args = train_spo.parse_args(["--updates", "1", "--out", str(tmp_path / "out"), *flags.split()])
        train_spo.check_args(args, SimpleNamespace(data_ranks=1))
        return args
    return make


def make_batch(positions, shape=(1, 1, 1, 1)):
    """Captions without content, at these positions of the run; shape (C, F, H, W) of the latents."""
    items = [{"win": torch.empty(shape, device="meta"), "context": torch.zeros(1, 4), "name": ""} for _ in positions]
    return train_spo.make_batch(items, positions, "cpu")


def roll_out(args, positions, score, seed=0, branch_from=0, shape=(1, 1, 1, 1), model=None):
    return train_spo.roll_out(args, model or Gaussian(), score, make_batch(positions, shape), seed, branch_from)


def larger_is_better(x, sigma, batch):
    return 3 * x.flatten(1).sum(1)


def kolmogorov_smirnov(a, b):
    """
    Largest distance of two empirical distribution functions; of two samples of n from one distribution it is above
    1.95 sqrt(2 / n) once in 1000 times.
    """
    a, b = a.flatten().sort().values, b.flatten().sort().values
    values = torch.cat([a, b])
    share_a = torch.searchsorted(a, values, right=True) / len(a)
    share_b = torch.searchsorted(b, values, right=True) / len(b)
    return (share_a - share_b).abs().max().item()


def test_pools_leave_the_distribution_of_the_samples_alone(spo_args, monkeypatch):
    args, n = spo_args("--sample_steps 5"), 1200
    bound = 1.95 * math.sqrt(2 / n)
    plain, _, _ = roll_out(args, range(n), larger_is_better, seed=1, branch_from=5)
    pooled, _, _ = roll_out(args, range(n), larger_is_better, seed=2)
    assert kolmogorov_smirnov(plain, pooled) < bound
    assert plain.mean().item() == pytest.approx(1, abs=0.06)
    assert pooled.mean().item() == pytest.approx(1, abs=0.06)

    # and the same test does notice a roll-out that keeps the winner
    scores = []

    def remember(x, sigma, batch):
        scores.append(larger_is_better(x, sigma, batch))
        return scores[-1]

    def winner(seed, position, step, pool):
        return int(torch.stack([of_member[position] for of_member in scores[-pool:]]).argmax())

    monkeypatch.setattr(train_spo, "next_member", winner)
    greedy, _, _ = roll_out(args, range(n), remember, seed=2)
    assert kolmogorov_smirnov(plain, greedy) > 4 * bound


def test_a_roll_out_continues_from_every_member_of_a_pool_equally_often():
    picks = [[train_spo.next_member(seed, position, 3, 4) for position in range(2000)] for seed in (0, 1)]
    picks = torch.tensor(picks)
    for row in picks:                                      # chi squared, 3 degrees of freedom: above 16.3 once in 1000
        assert ((row.bincount(minlength=4) - 500) ** 2 / 500).sum() < 16.3
    assert (picks[0] == picks[1]).float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_a_pool_depends_on_seed_position_step_and_candidate_only(spo_args):
    args, shape = spo_args("--sample_steps 6"), (2, 2, 3, 2)
    latents, together, _ = roll_out(args, range(4, 8), larger_is_better, shape=shape)
    latents_alone, alone, _ = roll_out(args, [6], larger_is_better, shape=shape)
    assert torch.equal(latents[2:3], latents_alone)
    for many, one in zip(together, alone, strict=True):
        for name in ("x", "win", "lose", "scores", "kept"):
            assert torch.equal(getattr(many, name)[2:3], getattr(one, name)), name
    numbers = torch.cat([torch.cat([t.win, t.lose, t.x]) for t in together]).flatten()
    # no two candidates share their noise; a parent is a win at times
    assert len(numbers.unique()) > 0.7 * len(numbers)
    another_seed, _, _ = roll_out(args, range(4, 8), larger_is_better, seed=1, shape=shape)
    assert not torch.equal(latents, another_seed)


def test_candidates_are_draws_of_the_step_and_the_next_parent_is_one_of_them(spo_args):
    args = spo_args("--sample_steps 5 --pool 3")
    scored = []

    def score(x, sigma, batch):
        scored.append(x)
        return x.flatten(1).sum(1)

    model = Gaussian()
    _, transitions, _ = roll_out(args, range(900), score, branch_from=1, model=model)
    assert model.forwards == 5 and len(scored) == 3 * 3    # a pool costs its scores, and the policy nothing
    assert len(transitions) == 3                           # of steps 0 to 4 the first is unbranched, the last noiseless
    assert [t.sigma_next > 0 for t in transitions] == [True] * 3
    for i, transition in enumerate(transitions):
        members = torch.stack(scored[3 * i:3 * i + 3], dim=1)                 # (900, 3, 1, 1, 1, 1)
        timestep = torch.full((900,), 1000 * transition.sigma)
        v = Gaussian()(transition.x, timestep, None).detach()
        mean, std = step_distribution(transition.x, v, transition.sigma, transition.sigma_next, "ddim", 1.0)
        # Monte Carlo: 2700 standard normals, independent within a pool
        z = ((members - mean[:, None]) / std).flatten(1)
        assert abs(z.mean()) < 4 / math.sqrt(2700)
        assert abs(z.var() - 1) < 4 * math.sqrt(2 / 2700)
        assert (torch.corrcoef(z.T) - torch.eye(3)).abs().max() < 4 / math.sqrt(900)
        assert torch.equal(transition.win.flatten(), members.flatten(1).amax(1))
        assert torch.equal(transition.lose.flatten(), members.flatten(1).amin(1))
        if i + 1 < len(transitions):
            parents = transitions[i + 1].x.flatten()
            assert (parents[:, None] == members.flatten(1)).any(dim=1).all()


def test_a_pair_needs_a_preference_above_the_threshold_which_may_rise_with_sigma(spo_args):
    # tanh(gap / 2) > 0.3 from a gap of 0.6190 on, 0.5 from 1.0986 on
    args = spo_args("--sample_steps 3 --pool 2 --threshold 0.3 0.5 --flow_shift 1")
    assert train_spo.threshold_at(args.threshold, 0.0) == 0.3
    assert train_spo.threshold_at(args.threshold, 1.0) == 0.5
    gap = 2 * math.atanh(0.3 + 0.2 * 2 / 3)                # at sigma 2/3
    for more, is_kept in ((-1e-3, False), (1e-3, True)):
        scores = [0.0, gap + more, 0.0, gap]               # of two pools, at sigma 2/3 and 1/3
        _, transitions, _ = roll_out(args, [0], lambda x, sigma, batch: torch.tensor([scores.pop(0)]))
        assert [t.kept.item() for t in transitions] == [is_kept, True]        # at sigma 1/3 less is needed
    assert 2 * math.atanh(0.3) == pytest.approx(0.619, abs=1e-3)


def test_a_score_that_is_nan_stops_the_roll_out(spo_args):
    with pytest.raises(ValueError, match="not finite at sigma"):
        roll_out(spo_args(), [0], lambda x, sigma, batch: torch.full((1,), math.nan))


# ----------------------------------------------------------------------------------------------------------------------
# the objective

def make_transition(args, policy, ref, sigma=0.75, sigma_next=0.6):
    """
    Three next states each for win and lose, drawn from ref in float64: the Transition, its batch, and the noise of
    both.
    """
    x, z_win, z_lose = tensors(3, 2, 2, 2, count=3)[:, :, None]               # (3, 1, 2, 2, 2) each
    with torch.no_grad():
        v = ref(x, torch.full((3,), 1000 * sigma), None)
        mean, std = step_distribution(x, v, sigma, sigma_next, args.kernel, args.eta)
    kept = torch.tensor([True, False, True])
    transition = train_spo.Transition(sigma, sigma_next, x, mean + std * z_win, mean + std * z_lose, None, kept)
    ref.forwards = policy.forwards = 0
    return transition, make_batch(range(3), (1, 2, 2, 2)), z_win, z_lose


@pytest.mark.parametrize("kernel", KERNELS)
def test_siblings_need_one_forward_of_each_model_and_only_the_means_count(kernel, spo_args):
    """
    For two children of one parent the quadratic terms cancel, and the margin is
    beta (b / std) mean((z_win - z_lose) (v - v_ref)).
    """
    args = spo_args(f"--kernel {kernel} --clip 0.99")
    policy, ref = Gaussian(0.02), Gaussian()
    transition, batch, z_win, z_lose = make_transition(args, policy, ref)
    rows = torch.tensor([0, 2])
    loss, metrics = train_spo.transition_loss(args, policy, ref, transition, batch, rows)
    assert (policy.forwards, ref.forwards) == (1, 1)
    timestep = torch.full((2,), 750.0)
    v, v_ref = policy(transition.x[rows], timestep, None), ref(transition.x[rows], timestep, None)
    _, b, std = step_coefficients(0.75, 0.6, kernel, args.eta)
    expected = 500 * b / std * ((z_win - z_lose)[rows] * (v - v_ref)).flatten(1).mean(1)
    assert (metrics["margin"] - expected.detach()).abs().max() < 1e-8
    assert expected.abs().min() > 1e-2
    assert metrics["clipped"].tolist() == [0, 0]
    assert (loss - torch.nn.functional.softplus(-expected)).abs().max() < 1e-8

    args.step_weight = "inverse"
    assert std / abs(b) < train_spo.LARGEST_WEIGHT
    _, metrics = train_spo.transition_loss(args, policy, ref, transition, batch, rows)
    assert (metrics["margin"] - expected.detach() * std / abs(b)).abs().max() < 1e-8


def test_the_first_loss_is_log_2_and_its_gradient_the_closed_form(spo_args):
    args = spo_args()
    policy, ref = Gaussian(0.0), Gaussian()
    transition, batch, z_win, z_lose = make_transition(args, policy, ref)
    loss, metrics = train_spo.transition_loss(args, policy, ref, transition, batch, torch.arange(3))
    assert torch.equal(loss, torch.full((3,), math.log(2), dtype=torch.float64))
    assert metrics["margin"].abs().max() == 0
    gradient, = torch.autograd.grad(loss.sum(), policy.change)
    _, b, std = step_coefficients(0.75, 0.6, "ddim", 1.0)
    dv = torch.sin(7 * transition.x)                       # d v / d change
    expected = -(500 / 2) * (b / std) * ((z_win - z_lose) * dv).flatten(1).mean(1).sum()
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-5)        # the parameter is float32


def test_a_pair_with_both_ratios_clamped_has_the_bounded_loss_and_no_gradient(spo_args):
    # beta 10, clip 0.1: the logit is at most 10 log(1.1 / 0.9) = 2.00671, the loss at least 0.126131
    args = spo_args("--beta 10 --clip 0.1")
    policy, ref = Gaussian(5.0), Gaussian()
    transition, batch, _, _ = make_transition(args, policy, ref)
    _, b, _ = step_coefficients(0.75, 0.6, "ddim", 1.0)
    with torch.no_grad():
        v = policy(transition.x, torch.full((3,), 750.0), None)
        mean, _ = step_distribution(transition.x, v, 0.75, 0.6, "ddim", 1.0)
        ref_mean = mean - b * 5 * torch.sin(7 * transition.x)
    near, far = mean, ref_mean - (mean - ref_mean)         # as the policy would have it, and away from it
    best_logit = 10 * math.log(1.1 / 0.9)
    for win, lose, logit in ((near, far, best_logit), (far, near, -best_logit)):
        clamped = dataclasses.replace(transition, win=win, lose=lose)
        loss, metrics = train_spo.transition_loss(args, policy, ref, clamped, batch, torch.arange(3))
        assert metrics["clipped"].tolist() == [1, 1, 1]
        assert metrics["logit"].tolist() == pytest.approx([logit] * 3, rel=1e-6)
        if logit > 0:
            assert loss.tolist() == pytest.approx([0.126131] * 3, abs=1e-6)
        assert torch.autograd.grad(loss.sum(), policy.change)[0].item() == 0


def test_the_weight_of_early_steps_is_bounded(spo_args):
    args = spo_args("--step_weight inverse")
    policy, ref = Gaussian(0.02), Gaussian()
    transition, batch, _, _ = make_transition(args, policy, ref, 0.983, 0.964)
    _, b, std = step_coefficients(0.983, 0.964, "ddim", 1.0)
    assert std / abs(b) == pytest.approx(31, abs=1)
    _, weighted = train_spo.transition_loss(args, policy, ref, transition, batch, torch.arange(3))
    args.step_weight = "none"
    _, plain = train_spo.transition_loss(args, policy, ref, transition, batch, torch.arange(3))
    assert (weighted["margin"] / plain["margin"] - 10).abs().max() < 1e-6


def test_guidance_pushes_the_velocity_away_from_the_empty_caption():
    class Summing(torch.nn.Module):
        def forward(self, x, timestep, context):
            return 0 * x + context.sum(dim=(1, 2)).view(-1, 1, 1, 1, 1)

    batch = {"context": torch.full((2, 3, 1), 1.0), "names": ["", ""]}
    x = torch.zeros(2, 1, 1, 1, 1)
    for guidance, expected in ((1.0, 3.0), (2.5, 7.5), (0.0, 0.0)):
        v = train_spo.velocity(Summing(), x, 0.5, batch, guidance)
        assert torch.equal(v, torch.full((2, 1, 1, 1, 1), expected))


def knows(clips):
    """The velocity of latents that are known."""
    return lambda x, timestep, context: (x - clips) / (timestep / 1000).view(-1, 1, 1, 1, 1)


def test_the_toy_score_is_the_drift_of_the_clip_behind_the_noise():
    captions, videos = toy.make_clips(4, seed=5)
    latents = toy.encode_pixels(videos)
    shuffled = latents[:, :, torch.tensor([0, 5, 2, 7, 4, 1, 6, 3])]          # the frames out of order
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    batch = {"context": torch.zeros(4, 1, 32), "names": captions}
    for clips, worst, best in ((latents, -0.3, 0.0), (shuffled, -8.0, -1.0)):
        score = train_spo.toy_score(knows(clips), guidance=1.0)(0.2 * clips + 0.8 * noise, 0.8, batch)
        assert score.shape == (4,)
        assert score.min() >= worst and score.max() <= best


def test_a_preference_model_sees_the_candidates_of_a_pool_under_one_noise():
    """
    Two candidates with the same clip under different noise score the same, another clip does not, and each score is the
    model's for that clip noised at this sigma.
    """
    shape, seen = (2, 1, 2, 3, 3), []
    clips, first, second = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))

    def judge(x, timestep, context):
        assert timestep.tolist() == [300.0, 300.0]
        seen.append(x)
        return x.flatten(1).sum(1)

    batch = {"context": torch.zeros(2, 1, 4), "names": ["", ""], "positions": [5, 9]}

    def score(clips, noise, batch=batch):
        return train_spo.preference_score(judge, knows(clips), 1.0, 0)(0.7 * clips + 0.3 * noise, 0.3, batch)

    assert (score(clips, first) - score(clips, second)).abs().max() < 1e-5
    assert (score(clips + 1, first) - score(clips, first) - 0.7 * 18).abs().max() < 1e-4
    noise = (seen[0] - 0.7 * clips) / 0.3
    assert abs(noise.mean()) < 0.7 and 0.6 < noise.std() < 1.4
    assert (noise[0] - noise[1]).abs().max() > 0.5
    score(clips.flip(0), first, batch | {"positions": [9, 5]})                # the noise is the position's
    assert torch.allclose(seen[-1], seen[0].flip(0), atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# the run

FLAGS = """--batch_size 4 --steps 2 --sample_steps 5 --pool 3 --threshold 0.05 --updates 2 --warmup_steps 2
    --save_every 1 --learning_rate 5e-4"""


def spo_argv(folder, out, flags=""):
    paths = ["--init", str(folder / "base"), "--data", str(folder / "data"), "--score", str(folder / "scorer")]
    return [*paths, "--out", str(out), *FLAGS.split(), *flags.split()]


def run_spo(folder, out, flags="", ranks=1):
    """Rows of the log, exported weights, weights before."""
    on_ranks(ranks, spo_main, spo_argv(folder, out, flags))
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    exported = load_file(out / "export" / "diffusion_pytorch_model.safetensors")
    return rows, exported, load_file(folder / "base" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="session")
def one_rank(spo_world, tmp_path_factory):
    return run_spo(spo_world, tmp_path_factory.mktemp("one") / "out")


def flatten(tensors):
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def same_run(one, other):
    """Assert that two results of run_spo have the same pools, losses and final weights."""
    for a, b in zip(one[0], other[0], strict=True):
        assert a["pairs"] == b["pairs"] and a["by_step"]["kept"] == b["by_step"]["kept"]
        for name in ("score", "gap", "loss", "margin_abs", "grad_norm", "lr", "ratio_win", "ratio_lose"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-6), (a["step"], name)
    a, b, start = flatten(one[1]), flatten(other[1]), flatten(other[2])
    assert (b - start).norm() > 1e-4 * start.norm()
    assert (a - b).norm() <= 2e-2 * (b - start).norm()


def test_the_log_of_a_run_says_what_pools_pairs_and_ratios_did(one_rank):
    rows = one_rank[0]
    assert [row["step"] for row in rows] == [0, 1]
    first = rows[0]
    pools = 3                                              # of 5 steps: not the first (0.2 of 5) and not the last
    assert set(first["by_step"]) == {"score", "gap", "kept", "margin", "accuracy"}
    assert all(len(values) == pools for values in first["by_step"].values())
    assert first["pairs"] == round(4 * sum(first["by_step"]["kept"]))
    assert 0 < first["pairs"] < 4 * pools                  # the threshold drops some
    assert first["policy_forwards"] == 4 * 5 + first["pairs"]
    assert first["policy_backwards"] == first["pairs"]
    assert first["score_forwards"] == 4 * 3 * pools
    # the first update is made where the policy is the reference
    assert 0.0 in first["by_step"]["margin"] and first["updates"] == 2
    assert rows[-1]["margin_abs"] > 1e-3 and rows[-1]["ratio_win"] != 1
    expected = {"lr", "seconds", "seconds_rollout", "seconds_score", "memory_gib", "clipped", "reward_win",
                "reward_lose", "logit"}
    assert expected <= first.keys()
    assert 0 < first["seconds_score"] < first["seconds_rollout"] < first["seconds"]


def test_captions_without_a_pair_cost_one_row_of_weight_0(monkeypatch):
    weight, seen, sums = torch.ones(1, requires_grad=True), [], Counter()

    def loss_of(args, policy, ref, transition, batch, rows):
        seen.append(rows.tolist())
        loss = weight.expand(len(rows))
        return loss, {"margin": loss.detach(), "accuracy": loss.detach()}

    monkeypatch.setattr(train_spo, "transition_loss", loss_of)
    rolled = []
    for kept in ([False, False], [True, True]):
        rolled.append(({"names": ["a", "b"]}, [None, SimpleNamespace(kept=torch.tensor(kept))]))
    samples = train_spo.step_backward(None, None, None, rolled, 1, 0.5, sums)
    assert seen == [[0], [0, 1]] and samples == [("a", 1.0), ("b", 1.0)]
    assert sums["pairs"] == sums["loss"] == sums["margin/1"] == 2 and weight.grad.item() == 0.5 * 2


def test_with_ref_offload_the_reference_and_the_preference_model_wait_on_the_cpu(spo_world, tmp_path, monkeypatch):
    build, offloaded = train_spo.build_model, []

    def note(path, *arguments, offload, **options):
        offloaded.append((Path(path).name, offload))
        return build(path, *arguments, offload=offload, **options)

    monkeypatch.setattr(train_spo, "build_model", note)
    spo_main(spo_argv(spo_world, tmp_path / "out", "--ref offload --steps 1"))
    policy_ref_average = [("base", False), ("base", True), ("base", False)]
    assert offloaded == [*policy_ref_average, ("scorer", True)]


CUTS = [
    (1, "--grad_accum 2"),
    (2, "--grad_accum 2"),
    pytest.param(2, "--checkpointing full --ref offload --cp_size 2", marks=pytest.mark.slow),
    pytest.param(2, "--checkpointing chunked --chunk_tokens 5 --offload_activations --offload_params",
                 marks=pytest.mark.slow),
]


@pytest.mark.parametrize("ranks, flags", CUTS)
def test_one_curve_however_it_is_cut(spo_world, one_rank, tmp_path, ranks, flags):
    if (ranks, flags) == (2, "--grad_accum 2"):
        # one caption at a time: some have no pair where others have, and none may wait for it
        assert any(0 < share < 1 for row in one_rank[0] for share in row["by_step"]["kept"])
    same_run(run_spo(spo_world, tmp_path / "out", flags, ranks), one_rank)


def test_a_run_that_stops_and_resumes_is_the_same_run_to_the_last_bit_and_on_two_ranks_the_same_curve(
        spo_world, one_rank, tmp_path):
    run_spo(spo_world, tmp_path / "out", "--steps 1")
    shutil.copytree(tmp_path / "out", tmp_path / "two")
    rows, exported, _ = run_spo(spo_world, tmp_path / "out", "--resume latest")

    def numbers(row):
        return {name: value for name, value in row.items() if name != "memory_gib" and not name.startswith("seconds")}

    assert [numbers(row) for row in rows] == [numbers(row) for row in one_rank[0]]
    assert all(torch.equal(exported[name], value) for name, value in one_rank[1].items())
    same_run(run_spo(spo_world, tmp_path / "two", "--resume latest", ranks=2), one_rank)


def test_what_is_exported_is_the_average_and_what_is_rolled_out_the_policy(spo_world, tmp_path):
    # the average's decay is (n + 1) / (n + 10) at first: 0.1 of the base stays
    flags = "--steps 1 --updates 1 --ema_decay"
    rows, average, base = run_spo(spo_world, tmp_path / "average", f"{flags} 0.95")
    rows_without, policy, _ = run_spo(spo_world, tmp_path / "none", f"{flags} 0")
    assert rows[0]["grad_norm"] == rows_without[0]["grad_norm"]
    for name, start in base.items():
        assert torch.allclose(average[name], 0.1 * start + 0.9 * policy[name], rtol=0, atol=1e-6), name
    assert any((policy[name] - start).abs().max() > 1e-4 for name, start in base.items())


def test_a_roll_out_without_a_pair_changes_nothing(spo_world, tmp_path):
    rows, exported, base = run_spo(spo_world, tmp_path / "out", "--threshold 0.9999999 --steps 1", ranks=2)
    assert rows[0]["pairs"] == 0 and rows[0]["updates"] == 0
    assert "loss" not in rows[0]
    assert all(torch.equal(exported[name], value) for name, value in base.items())


@pytest.mark.parametrize("flags, words", [
    ("--pool 1", ["--pool 1", "at least 2"]),
    ("--threshold 1", ["--threshold [1.0]", "[0, 1)"]),
    ("--threshold -0.1", ["--threshold [-0.1]", "[0, 1)"]),
    ("--threshold 0.1 0.2 0.3", ["one or two numbers"]),
    ("--eta 0", ["--eta 0.0", "density"]),
    ("--eta 1.5", ["eta is 1.5", "at most 1 with ddim"]),
    ("--unbranched 0.96", ["--unbranched 0.96", "the last, which has no noise"]),
    ("--unbranched -0.2", ["--unbranched -0.2"]),
    ("--sample_steps 1", ["--sample_steps 1"]),
    ("--updates 16", ["--updates 16", "at most the 15 steps"]),
    ("--clip 0", ["clip is 0"]),
    ("--beta 0", ["beta is 0"]),
    ("--flow_shift 0", ["flow_shift is 0"]),
    ("--cp_size 3", ["--cp_size 3"]),
    ("--batch_size 3 --grad_accum 2", ["--batch_size 3", "multiple of 2"]),
    ("--chunk_tokens 64", ["--chunk_tokens 64", "--checkpointing"]),
    ("--guidance 2", ["--guidance 2.0", "negative prompt"]),
    ("--score toy", ["--score toy", "preference model"]),
    ("--score nowhere", ["--score nowhere", "no such file"]),
    ("--score toy_base", ["a model of velocities", "--loss preference"]),
    ("--resume latest", ["--resume latest", "no checkpoint"]),
])
def test_bad_flags_are_refused_with_the_flag_and_what_to_do(spo_world, tmp_path, flags, words):
    message = spo_fails(spo_world, tmp_path, *flags.split())
    assert all(word in message for word in words), message


def save_tiny(path, **changes):
    """A random tiny model of one block at path. Returns its config."""
    config = dataclasses.replace(CONFIGS["tiny"], num_layers=1, **changes)
    torch.manual_seed(4)
    model = WanModel(config)
    torch.nn.init.normal_(model.head.head if config.scores else model.head.head.weight, std=0.1)
    save_wan(model, path)
    return config


def test_a_preference_model_of_another_latent_size_is_refused(spo_world, tmp_path):
    for changes, word in (({"in_dim": 16, "out_dim": 16}, "out_dim is 16, expected 12"),
                          ({"text_dim": 64}, "text_dim is 64, expected 32"),
                          ({"in_dim": 28}, "in_dim is 28, expected 12")):
        save_tiny(tmp_path / "other", scores=True, **changes)
        message = spo_fails(spo_world, tmp_path, "--score", str(tmp_path / "other"))
        assert word in message and "--score" in message
    small = save_tiny(tmp_path / "small", scores=True, dim=64)
    # a smaller model of the same latents may judge
    assert train_spo.open_judge(tmp_path / "small", CONFIGS["tiny"]) == small


def test_samples_of_two_sizes_in_one_batch_are_refused_by_name(spo_world, tmp_path):
    sample = read_sample(spo_world / "data" / "007.safetensors")
    for name, frames in (("a", 3), ("b", 2)):
        path = tmp_path / "mixed" / f"{name}.safetensors"
        write_sample(path, sample["latents"][:, :frames], sample["context"], {})
    message = spo_fails(spo_world, tmp_path, "--data", str(tmp_path / "mixed"))
    assert "b.safetensors: latents (12, 2, 4, 6)" in message


def test_resuming_with_another_kernel_is_refused_and_leaves_the_run_alone(spo_world, tmp_path):
    run_spo(spo_world, tmp_path / "run", "--steps 1")
    before = (tmp_path / "run" / "log.jsonl").read_text()
    flags = [*FLAGS.split(), "--out", str(tmp_path / "run")]
    message = spo_fails(spo_world, tmp_path / "no", *flags, "--kernel", "dance", "--resume", "latest")
    assert "kernel = ddim" in message and "kernel = dance" in message
    assert (tmp_path / "run" / "log.jsonl").read_text() == before
    assert "already holds a run" in spo_fails(spo_world, tmp_path / "no", *flags)


def test_samples_or_weights_replaced_under_a_run_are_refused_by_their_contents(spo_world, tmp_path):
    shutil.copytree(spo_world, tmp_path / "world")
    run_spo(tmp_path / "world", tmp_path / "run", "--steps 1")
    flags = [*FLAGS.split(), "--out", str(tmp_path / "run"), "--resume", "latest"]
    shutil.move(tmp_path / "world", tmp_path / "moved")    # the same contents elsewhere are fine
    run_spo(tmp_path / "moved", tmp_path / "run", "--resume latest")

    path = tmp_path / "moved" / "data" / "007.safetensors"
    sample = read_sample(path)
    write_sample(path, sample["latents"] + 1, sample["context"], sample["metadata"])
    assert "trained with data = " in spo_fails(tmp_path / "moved", tmp_path / "no", *flags)
    shutil.copy(spo_world / "data" / "007.safetensors", path)
    save_tiny(tmp_path / "moved" / "scorer", scores=True)
    assert "trained with score = " in spo_fails(tmp_path / "moved", tmp_path / "no", *flags)


def test_a_second_run_in_the_same_folder_is_refused(spo_world, tmp_path):
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)                 # as a run that lives holds it
    with pytest.raises(ValueError, match="another run is writing to this folder"):
        run_spo(spo_world, tmp_path / "out", "--steps 1", ranks=2)
    assert list((tmp_path / "out").iterdir()) == []
    os.close(descriptor)
    run_spo(spo_world, tmp_path / "out", "--steps 1", ranks=2)


def test_what_may_change_on_resume_is_the_list_and_every_name_in_it_is_a_flag():
    flags = vars(train_spo.parse_args([])).keys()
    assert train_spo.MAY_CHANGE <= flags
    decides = """seed kernel eta sample_steps flow_shift guidance unbranched pool threshold beta clip step_weight
        batch_size updates learning_rate weight_decay warmup_steps max_grad_norm ema_decay
        lora_rank lora_alpha lora_targets init_lora"""
    assert flags - train_spo.MAY_CHANGE == set(decides.split())


# ----------------------------------------------------------------------------------------------------------------------
# what is judged in the embedded world

def plain_roll_out(model, caption, index):
    """One held-out clip's latents by three steps of ddim (eta 1, shift 3), with the noise of its index."""
    sigmas = [1.0, 6 / 7, 3 / 5, 0.0]                      # 3 u / (1 + 2 u) of 1, 2/3, 1/3 and 0
    x = torch.randn(12, 8, 8, 8, generator=randomness("held out", index, "start"))[None]
    for step in range(3):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        with torch.no_grad():
            v = model(x, torch.tensor([1000 * sigma]), toy.encode_text(caption)[None])
        if sigma_next == 0:
            return (x - sigma * v)[0]
        z = torch.randn(12, 8, 8, 8, generator=randomness("held out", index, f"step {step} candidate 0"))
        mean, std = step_distribution(x, v, sigma, sigma_next, "ddim", 1.0)
        x = mean + std * z


def test_a_run_in_the_embedded_world_judges_the_reference_and_the_average_on_held_out_captions(
        base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    marked, mark = [], evaluate.HeldOut.mark

    def remember(held_out, title, latents, keep=False):
        marked.append((title, held_out.captions, latents))
        return mark(held_out, title, latents, keep)

    monkeypatch.setattr(evaluate.HeldOut, "mark", remember)
    flags = f"""--init {base} --out out --steps 1 --batch_size 2 --sample_steps 3 --unbranched 0 --pool 2 --updates 1
        --threshold 0 --ema_decay 0.5 --learning_rate 1e-2 --warmup_steps 1 --eval_clips 64"""
    train_spo.main(train_spo.parse_args(flags.split()))
    captions, _ = toy.make_clips(64, seed=1, held_out=True)
    assert [title for title, _, _ in marked] == ["before, ddim 1", "before", "after, ddim 1", "after"]
    sampler = Sampler(steps=3)
    for which, path in enumerate((base, tmp_path / "out" / "export")):
        model = weights.load_wan(path, weights.open_wan(base)[0])
        (_, stochastic_captions, stochastic), (_, euler_captions, euler) = marked[2 * which:2 * which + 2]
        assert stochastic_captions == euler_captions == captions
        for i in (0, 5, 63):
            assert torch.allclose(stochastic[i], plain_roll_out(model, captions[i], i), atol=1e-4)
            seed, context = seed_of("held out", i), toy.encode_text(captions[i])
            assert torch.allclose(euler[i], generate(model, [context], [seed], (12, 8, 8, 8), sampler)[0], atol=1e-4)
    assert (marked[3][2] - marked[1][2]).abs().max() > 0.01
    assert len(json.loads((tmp_path / "out" / "samples" / "marks.json").read_text())) == 4


# ----------------------------------------------------------------------------------------------------------------------
# experts, given first frames, and two numerical paths

def test_experts_are_refused_before_anything_is_loaded(spo_world, tmp_path, monkeypatch):
    monkeypatch.setattr(train_spo, "build_model", None)    # loads weights
    monkeypatch.setattr(train_spo, "open_captions", None)
    monkeypatch.setitem(CONFIGS, "small-a14b", save_tiny(tmp_path / "one" / "expert"))
    monkeypatch.setitem(weights.BOUNDARIES, "small-a14b", 875.0)
    message = spo_fails(spo_world, tmp_path, "--init", str(tmp_path / "one" / "expert"))
    assert "--init: one expert of small-a14b cannot sample alone" in message
    for name in ("high_noise_model", "low_noise_model"):
        shutil.copytree(tmp_path / "one" / "expert", tmp_path / "both" / name)
    message = spo_fails(spo_world, tmp_path, "--init", str(tmp_path / "both" / "high_noise_model"))
    assert "one of two experts" in message
    message = spo_fails(spo_world, tmp_path, "--init", str(tmp_path / "both"))
    assert f"--init {tmp_path / 'both'}: two experts" in message


@pytest.fixture
def ti2v_world(tmp_path):
    """A small TI2V model base/, a preference model scorer/, and data/ of four samples, each with its first frame."""
    for name, scores in (("base", False), ("scorer", True)):
        save_tiny(tmp_path / "ti2v" / name, in_dim=48, out_dim=48, dim=64, num_heads=2, scores=scores)
    generator = torch.Generator().manual_seed(0)
    for i in range(4):
        latents = torch.randn(48, 3, 4, 4, generator=generator)
        context = torch.randn(3, 32, generator=generator)
        path = tmp_path / "ti2v" / "data" / f"{i:03d}.safetensors"
        write_sample(path, latents, context, {"prompt": f"caption {i}"}, first_latent=latents[:, :1])
    return tmp_path / "ti2v"


class Remembering(torch.nn.Module):
    """A model that keeps its inputs (x, timestep)."""
    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.inputs = model, model.config, []

    def forward(self, x, timestep, context):
        self.inputs.append((x, timestep))
        return self.model(x, timestep, context)


def test_a_roll_out_from_a_given_first_frame_shows_it_clean_to_every_model_and_keeps_it(ti2v_world, spo_args):
    args = spo_args("--sample_steps 5 --pool 2")
    items = train_spo.open_captions(
        SimpleNamespace(data=str(ti2v_world / "data"), batch_size=4, grad_accum=1),
        weights.open_wan(ti2v_world / "base")[0], SimpleNamespace(data_ranks=1))
    batch = train_spo.make_batch([items[i] for i in range(4)], range(4), "cpu")
    policy, ref, judge = (Remembering(weights.load_wan(ti2v_world / name)) for name in ("base", "base", "scorer"))
    score = train_spo.preference_score(judge, ref, 1.0, 0)
    latents, transitions, _ = train_spo.roll_out(args, policy, score, batch, 0, branch_from=1)
    assert torch.equal(latents[:, :, :1], batch["first_latent"])
    assert latents[:, :, 1:].std() > 0.1
    assert (len(policy.inputs), len(ref.inputs), len(judge.inputs)) == (5, 6, 6)
    for model in (policy, ref, judge):
        for x, timestep in model.inputs:
            assert torch.equal(x[:, :, :1], batch["first_latent"])
            assert (timestep[:, :4] == 0).all()            # the 4 tokens of frame 0
            assert (timestep[:, 4:] == timestep[0, -1]).all() and timestep[0, -1] > 0

    # the given frame is not drawn: its numbers in win, lose and parent change nothing
    changed = dict.fromkeys(("x", "win", "lose"))
    for name in changed:
        changed[name] = getattr(transitions[0], name).clone()
        changed[name][:, :, 0] += 3.0
    moved = weights.load_wan(ti2v_world / "base")
    with torch.no_grad():
        moved.head.head.weight.mul_(1.1)
    rows = torch.arange(4)
    loss, metrics = train_spo.transition_loss(args, moved, ref.model, transitions[0], batch, rows)
    same_loss, _ = train_spo.transition_loss(
        args, moved, ref.model, dataclasses.replace(transitions[0], **changed), batch, rows)
    assert metrics["margin"].abs().min() > 1e-4
    assert torch.equal(loss, same_loss)


def test_a_model_of_given_first_frames_is_trained(ti2v_world, tmp_path):
    rows, exported, base = run_spo(ti2v_world, tmp_path / "out", "--threshold 0")
    assert rows[0]["pairs"] == 4 * 3
    assert rows[0]["first_margin"] == 0
    assert rows[1]["margin_abs"] > 1e-4
    assert any((exported[name] - value).abs().max() > 1e-5 for name, value in base.items())


def spo_in_bf16(argv, noise):
    """
    train_spo.main as on a machine with bf16 matrices, where the reference's velocity is off by a share `noise`, at
    random. Returns the printed text and the error that ends the run.
    """
    build_model, matrix_dtype = train_spo.build_model, train_spo.matrix_dtype

    def build_inexact(*arguments, trained=False, **options):
        model = build_model(*arguments, trained=trained, **options)
        generator = torch.Generator().manual_seed(0)

        def disturb(module, inputs, v):
            return v * (1 + noise * torch.randn(v.shape, generator=generator))

        if not trained:
            model.register_forward_hook(disturb)
        return model

    train_spo.build_model, train_spo.matrix_dtype = build_inexact, lambda device_type: torch.bfloat16
    printed, error = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            spo_main(argv)
    except RuntimeError as stopped:
        error = str(stopped)
    finally:
        train_spo.build_model, train_spo.matrix_dtype = build_model, matrix_dtype
    return printed.getvalue(), error


def test_the_first_margin_is_logged_and_in_bf16_a_small_one_passes_a_larger_one_warns_and_a_large_one_stops(
        spo_world, one_rank, tmp_path):
    assert one_rank[0][0]["first_margin"] == 0             # float32: policy and reference take the same path
    assert "first_margin" not in one_rank[0][1]
    for noise, low, high in ((1e-3, 0.001, 0.02), (1e-2, 0.02, 0.1)):
        out = tmp_path / f"{noise}"
        [(printed, error)] = on_ranks(1, spo_in_bf16, spo_argv(spo_world, out, "--steps 1"), noise)
        row = json.loads((out / "log.jsonl").read_text().splitlines()[0])
        assert low < row["first_margin"] < high and not error
        assert ("WARNING: policy and reference" in printed) == (low == 0.02)
    [(_, error)] = on_ranks(1, spo_in_bf16, spo_argv(spo_world, tmp_path / "stops", "--steps 1"), 0.1)
    assert "do not take the same numerical path" in error
    assert (tmp_path / "stops" / "log.jsonl").read_text() == ""
