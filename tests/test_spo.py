"""Stochastic steps against closed forms; the resampler; SPO's objective and its curve however it is cut."""
import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train_spo
from data import read_sample, write_sample
from model import CONFIGS, WanModel
from weights import save_wan
from sample import KERNELS, log_density, step_coefficients, step_distribution, uniform_grid
from conftest import on_ranks, spo_fails, spo_main

STEPS = [(1.0, 0.97), (1.0, 0.3), (0.983, 0.964), (0.75, 0.71), (0.75, 0.1), (0.5, 0.4999), (0.25, 0.136), (0.136, 0.0), (0.02, 0.01)]     # sigma, sigma_next


# ------------------------------------------------------------------------------------------------------------------
# stochastic steps

def tensors(*shape, count=3, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("t, s", STEPS)
def test_ddim_with_eta_1_is_the_posterior_of_the_noising_and_with_eta_0_the_euler_step(t, s):
    # x_t = alpha x_s + noise of variance sigma2, x_s = (1-s) latents + s noise: multiply the two Gaussians in x_s
    x, v, _ = tensors(2, 3, 4)
    mean, std = step_distribution(x, v, t, s, "ddim", 0.0)
    assert std == 0 and (mean - (x + (s - t) * v)).abs().max() < 1e-10
    mean, std = step_distribution(x, v, t, s, "ddim", 1.0)
    if s == 0:                                                                 # the posterior is a point: the latents themselves
        assert std == 0 and (mean - (x - t * v)).abs().max() < 1e-10
        return
    alpha = (1 - t) / (1 - s)
    sigma2 = t ** 2 - (alpha * s) ** 2
    variance = 1 / (alpha ** 2 / sigma2 + 1 / s ** 2)
    expected = variance * (alpha / sigma2 * x + (1 - s) / s ** 2 * (x - t * v))
    assert abs(std ** 2 - variance) < 1e-10 and (mean - expected).abs().max() < 1e-10


@pytest.mark.parametrize("t, s", STEPS)
def test_ddim_takes_its_direction_and_its_noise_from_one_budget(t, s):
    # Song et al. 2021, Eq. 12, in this flow's words: x_s = (1-s) latents + sqrt(s^2 - std^2) noise_pred + std z, with both predictions from v
    x, v, _ = tensors(2, 3, 4)
    for eta in (0.3, 0.7, 1.0):
        mean, std = step_distribution(x, v, t, s, "ddim", eta)
        alpha = (1 - t) / (1 - s)
        assert abs(std - eta * s / t * math.sqrt(t ** 2 - (alpha * s) ** 2)) < 1e-10
        assert (mean - ((1 - s) * (x - t * v) + math.sqrt(s ** 2 - std ** 2) * (x + (1 - t) * v))).abs().max() < 1e-10


@pytest.mark.parametrize("t, s", STEPS)
def test_the_sde_steps_are_euler_maruyama_of_their_equations(t, s):
    x, v, _ = tensors(2, 3, 4)
    score = -(x + (1 - t) * v) / t                                             # of the marginal: -noise_pred / t
    for kernel, eta, g in (("flow_grpo", 0.7, 0.7 * math.sqrt(t / (1 - (s if t == 1 else t)))), ("dance", 0.3, 0.3)):
        mean, std = step_distribution(x, v, t, s, kernel, eta)
        assert (mean - (x + (s - t) * (v - g ** 2 / 2 * score))).abs().max() < 1e-10
        assert abs(std - g * math.sqrt(t - s)) < 1e-10
        mean, std = step_distribution(x, v, t, s, kernel, 0.0)
        assert std == 0 and (mean - (x + (s - t) * v)).abs().max() < 1e-10


def test_a_short_ancestral_step_is_the_flow_grpo_sde_with_eta_root_2():
    (a, b, std), (a_sde, b_sde, std_sde) = (step_coefficients(0.6, 0.599, *kernel) for kernel in (("ddim", 1.0), ("flow_grpo", math.sqrt(2))))
    assert [1 - a, b, std ** 2] == pytest.approx([1 - a_sde, b_sde, std_sde ** 2], rel=0.01)                   # a step of 0.001: first order is all there is


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_variance_of_a_point_mass_at_every_step_size(eta):
    # all latents one point: v = (x - point) / t, so x_next - (1-s) point has the variance (a t + b)^2 + std^2, which must be s^2
    for steps, shift in ((2, 1.0), (5, 3.0), (20, 3.0), (50, 5.0), (1000, 1.0)):
        sigmas = uniform_grid(steps, shift)
        for t, s in zip(sigmas[:-1], sigmas[1:]):
            a, b, std = step_coefficients(t, s, "ddim", eta)
            assert abs((a * t + b) ** 2 + std ** 2 - s ** 2) < 1e-10
    # and the SDEs' Euler steps do not; what 20 steps of shift 3 leave in the last step with a density, .25 to .136
    t, s = uniform_grid(20, 3.0)[-3:-1]
    for kernel, of_eta, left in (("flow_grpo", 0.7, 1.53), ("flow_grpo", math.sqrt(2), 4.09), ("dance", 0.3, 1.27)):
        a, b, std = step_coefficients(t, s, kernel, of_eta)
        assert ((a * t + b) ** 2 + std ** 2) / s ** 2 == pytest.approx(left, abs=0.005)


@pytest.mark.parametrize("kernel, eta", [("ddim", 1.0), ("ddim", 0.5), ("flow_grpo", 0.7), ("dance", 0.3)])
def test_short_steps_keep_to_the_marginals_of_the_flow_with_every_kernel(kernel, eta):
    # latents N(0, 0.5^2): x_sigma has variance sigma^2 + 0.25 (1 - sigma)^2 and v = c x, so a step takes it to (a + b c)^2 variance + std^2. From 0.9 to 0.1
    # (flow_grpo's noise is infinite at 1) the error must halve with the step.
    marginal, errors = lambda sigma: sigma ** 2 + 0.25 * (1 - sigma) ** 2, []
    for steps in (200, 400):
        sigmas = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64).tolist()
        variance = marginal(0.9)
        for t, s in zip(sigmas[:-1], sigmas[1:]):
            a, b, std = step_coefficients(t, s, kernel, eta)
            variance = (a + b * (t - 0.25 * (1 - t)) / marginal(t)) ** 2 * variance + std ** 2
        errors.append(variance / marginal(0.1) - 1)
    assert abs(errors[0]) < 0.05 and errors[1] == pytest.approx(errors[0] / 2, rel=0.1)


def test_the_log_density_is_the_normal_ones_mean_over_elements():
    x, mean, _ = tensors(2, 3, 4, 5)
    want = torch.distributions.Normal(mean, 0.37).log_prob(x).flatten(1).mean(1)
    assert (log_density(x, mean, 0.37) - want).abs().max() < 1e-10
    assert log_density(x.float(), mean.float(), 0.37).dtype == torch.float64
    with pytest.raises(ValueError, match="deterministic step"):
        log_density(x, mean, 0.0)


@pytest.mark.parametrize("arguments, words", [((0.5, 0.5, "ddim", 1.0), "sigma 0.5 to 0.5"), ((0.5, 0.7, "ddim", 1.0), "sigma 0.5 to 0.7"), ((1.2, 0.5, "ddim", 1.0), "sigma 1.2"),
                                              ((0.5, 0.2, "ddim", 1.1), "at most 1 with ddim"), ((0.5, 0.2, "dance", -0.1), "eta is -0.1"), ((0.5, 0.2, "ddpm", 1.0), "ddim, flow_grpo")])
def test_steps_that_lead_nowhere_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        step_coefficients(*arguments)


# ------------------------------------------------------------------------------------------------------------------
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
        return -1 + centred * (s - 0.25 * (1 - s)) / (s ** 2 + 0.25 * (1 - s) ** 2) + self.change * torch.sin(7 * x)


def spo_args(*flags):
    args = train_spo.parse_args(["--updates", "1", *flags])
    train_spo.check_args(args, SimpleNamespace(data_ranks=1))
    return args


def rolled(args, positions, score, seed=0, branch_from=0, shape=(1, 1, 1, 1), model=None):
    batch = {"context": torch.zeros(len(positions), 1, 4), "names": [""] * len(positions)}
    return train_spo.roll_out(args, model or Gaussian(), score, batch, positions, seed, shape, branch_from)


def larger_is_better(x, sigma, batch):
    return 3 * x.flatten(1).sum(1)


def kolmogorov_smirnov(a, b):
    """Largest distance of two empirical distribution functions; of two samples of n from one distribution it is above 1.95 sqrt(2 / n) once in 1000 times."""
    a, b = a.flatten().sort().values, b.flatten().sort().values
    at = torch.cat([a, b])
    return (torch.searchsorted(a, at, right=True) / len(a) - torch.searchsorted(b, at, right=True) / len(b)).abs().max().item()


def test_pools_leave_the_distribution_of_the_samples_alone(tmp_path, monkeypatch):
    args, n = spo_args("--sample_steps", "5", "--out", str(tmp_path)), 1200
    bound = 1.95 * math.sqrt(2 / n)
    plain = rolled(args, range(n), larger_is_better, seed=1, branch_from=5)[0]
    pooled = rolled(args, range(n), larger_is_better, seed=2)[0]
    assert kolmogorov_smirnov(plain, pooled) < bound
    assert plain.mean().item() == pytest.approx(1, abs=0.06) and pooled.mean().item() == pytest.approx(1, abs=0.06)

    pools = []                                                                 # and the same test does find a roll-out that keeps the winner

    def remember(x, sigma, batch):
        pools.append(larger_is_better(x, sigma, batch))
        return pools[-1]
    monkeypatch.setattr(train_spo, "next_member", lambda seed, position, step, pool: int(torch.stack([scores[position] for scores in pools[-pool:]]).argmax()))
    assert kolmogorov_smirnov(plain, rolled(args, range(n), remember, seed=2)[0]) > 4 * bound


def test_every_member_is_as_likely_as_the_next_to_be_gone_on_from():
    picks = torch.tensor([[train_spo.next_member(seed, position, 3, 4) for position in range(2000)] for seed in (0, 1)])
    for row in picks:                                                          # chi squared with 3 degrees of freedom: above 16.3 once in 1000 times
        assert ((row.bincount(minlength=4) - 500) ** 2 / 500).sum() < 16.3
    assert (picks[0] == picks[1]).float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_a_pool_hangs_on_seed_position_step_and_candidate_only(tmp_path):
    args = spo_args("--sample_steps", "6", "--out", str(tmp_path))
    latents, together, _ = rolled(args, range(4, 8), larger_is_better, shape=(2, 2, 3, 2))
    alone = rolled(args, [6], larger_is_better, shape=(2, 2, 3, 2))
    assert torch.equal(latents[2:3], alone[0])
    for many, one in zip(together, alone[1], strict=True):
        assert all(torch.equal(many[name][2:3], one[name]) for name in ("x", "win", "lose", "scores", "kept"))
    flat = torch.cat([torch.cat([t["win"], t["lose"], t["x"]]) for t in together]).flatten()
    assert len(flat.unique()) > 0.7 * len(flat)                                # no two candidates share their noise; a parent is a win at times
    assert not torch.equal(latents, rolled(args, range(4, 8), larger_is_better, seed=1, shape=(2, 2, 3, 2))[0])


def test_candidates_are_draws_of_the_step_and_the_next_parent_is_one_of_them(tmp_path):
    args = spo_args("--sample_steps", "5", "--pool", "3", "--out", str(tmp_path))
    seen = []

    def score(x, sigma, batch):
        seen.append(x)
        return x.flatten(1).sum(1)
    model = Gaussian()
    _, transitions, _ = rolled(args, range(900), score, branch_from=1, model=model)
    assert model.forwards == 5 and len(seen) == 3 * 3                          # a pool costs its scores, and the policy nothing
    assert len(transitions) == 3                        # steps 1, 2, 3 of 0 .. 4: the first is unbranched, the last has no noise
    assert [t["sigma_next"] > 0 for t in transitions] == [True] * 3
    for i, transition in enumerate(transitions):
        members = torch.stack(seen[3 * i:3 * i + 3], dim=1)                    # (P, 3, 1, 1, 1, 1)
        mean, std = step_distribution(transition["x"], Gaussian()(transition["x"], torch.full((900,), 1000 * transition["sigma"]), None).detach(),
                                      transition["sigma"], transition["sigma_next"], "ddim", 1.0)
        z = ((members - mean[:, None]) / std).flatten(1)                       # Monte Carlo: 2700 standard normals, independent within a pool
        assert abs(z.mean()) < 4 / math.sqrt(2700) and abs(z.var() - 1) < 4 * math.sqrt(2 / 2700)
        assert (torch.corrcoef(z.T) - torch.eye(3)).abs().max() < 4 / math.sqrt(900)
        assert torch.equal(transition["win"].flatten(), members.flatten(1).amax(1)) and torch.equal(transition["lose"].flatten(), members.flatten(1).amin(1))
        if i + 1 < len(transitions):
            assert (transitions[i + 1]["x"].flatten()[:, None] == members.flatten(1)).any(dim=1).all()


def test_a_pair_needs_a_preference_above_the_threshold_which_may_rise_with_sigma(tmp_path):
    # tanh(gap / 2) > 0.3 from a gap of 0.6190 on, 0.5 from 1.0986 on
    args = spo_args("--sample_steps", "3", "--pool", "2", "--threshold", "0.3", "0.5", "--flow_shift", "1", "--out", str(tmp_path))
    assert train_spo.threshold_at(args.threshold, 0.0) == 0.3 and train_spo.threshold_at(args.threshold, 1.0) == 0.5
    at_two_thirds = 2 * math.atanh(0.3 + 0.2 * 2 / 3)
    for above, kept in ((-1e-3, False), (1e-3, True)):
        scores = iter([torch.zeros(1), torch.tensor([at_two_thirds + above]), torch.zeros(1), torch.tensor([at_two_thirds])])
        _, transitions, _ = rolled(args, [0], lambda x, sigma, batch: next(scores))
        assert [t["kept"].item() for t in transitions] == [kept, True]         # at sigma 1/3 less is needed
    assert 2 * math.atanh(0.3) == pytest.approx(0.619, abs=1e-3)


def test_a_score_that_is_not_a_number_stops_the_roll_out(tmp_path):
    with pytest.raises(ValueError, match="not finite at sigma"):
        rolled(spo_args("--out", str(tmp_path)), [0], lambda x, sigma, batch: torch.full((1,), math.nan))


# ------------------------------------------------------------------------------------------------------------------
# the objective

def one_transition(args, policy, ref, sigma=0.75, sigma_next=0.6, dtype=torch.float64):
    x, z_win, z_lose = tensors(3, 2, 2, 2, count=3).to(dtype)[:, :, None]      # (3, 1, 2, 2, 2)
    batch = {"context": torch.zeros(3, 1, 4), "names": ["a", "b", "c"]}
    with torch.no_grad():
        mean, std = step_distribution(x, ref(x, torch.full((3,), 1000 * sigma), None), sigma, sigma_next, args.kernel, args.eta)
    transition = {"sigma": sigma, "sigma_next": sigma_next, "x": x, "win": mean + std * z_win, "lose": mean + std * z_lose, "kept": torch.tensor([True, False, True])}
    ref.forwards = policy.forwards = 0
    return transition, batch, z_win, z_lose


@pytest.mark.parametrize("kernel", KERNELS)
def test_siblings_need_one_forward_of_each_model_and_only_the_means_count(kernel, tmp_path):
    """LOSSES of two children of one parent: the quadratic terms cancel, and the margin is beta (b / std) mean((z_win - z_lose) (v - v_ref))."""
    args = spo_args("--kernel", kernel, "--clip", "0.99", "--out", str(tmp_path))
    policy, ref = Gaussian(0.02), Gaussian()
    transition, batch, z_win, z_lose = one_transition(args, policy, ref)
    rows = torch.tensor([0, 2])
    loss, metrics = train_spo.transition_loss(args, policy, ref, transition, batch, rows)
    assert (policy.forwards, ref.forwards) == (1, 1)
    timestep = torch.full((2,), 750.0)
    v, v_ref = policy(transition["x"][rows], timestep, None), ref(transition["x"][rows], timestep, None)
    _, b, std = step_coefficients(0.75, 0.6, kernel, args.eta)
    want = 500 * b / std * ((z_win - z_lose)[rows] * (v - v_ref)).flatten(1).mean(1)
    assert (metrics["margin"] - want.detach()).abs().max() < 1e-8 and want.abs().min() > 1e-2 and metrics["clipped"].tolist() == [0, 0]
    assert (loss - torch.nn.functional.softplus(-want)).abs().max() < 1e-8

    args.step_weight = "inverse"
    assert std / abs(b) < train_spo.LARGEST_WEIGHT
    _, metrics = train_spo.transition_loss(args, policy, ref, transition, batch, rows)
    assert (metrics["margin"] - want.detach() * std / abs(b)).abs().max() < 1e-8


def test_the_first_loss_is_log_2_and_its_gradient_the_closed_form(tmp_path):
    args = spo_args("--out", str(tmp_path))
    policy, ref = Gaussian(0.0), Gaussian()
    transition, batch, z_win, z_lose = one_transition(args, policy, ref)
    loss, metrics = train_spo.transition_loss(args, policy, ref, transition, batch, torch.arange(3))
    assert torch.equal(loss, torch.full((3,), math.log(2), dtype=torch.float64)) and metrics["margin"].abs().max() == 0
    gradient, = torch.autograd.grad(loss.sum(), policy.change)
    _, b, std = step_coefficients(0.75, 0.6, "ddim", 1.0)
    dv = torch.sin(7 * transition["x"])                                        # d v / d change
    want = -(500 / 2) * (b / std) * ((z_win - z_lose) * dv).flatten(1).mean(1).sum()
    assert gradient.item() == pytest.approx(want.item(), rel=1e-5)             # the parameter is float32


def test_a_pair_with_both_ratios_clamped_has_the_bounded_loss_and_no_gradient(tmp_path):
    # beta 10, clip 0.1: the logit is at most 10 log(1.1 / 0.9) = 2.00671, the loss at least 0.126131
    args = spo_args("--beta", "10", "--clip", "0.1", "--out", str(tmp_path))
    policy, ref = Gaussian(0.0), Gaussian()
    transition, batch, _, _ = one_transition(args, policy, ref)
    change = torch.sin(7 * transition["x"])
    for sign, logit in ((1, 10 * math.log(1.1 / 0.9)), (-1, -10 * math.log(1.1 / 0.9))):
        with torch.no_grad():
            policy.change.fill_(5.0)
            _, b, std = step_coefficients(0.75, 0.6, "ddim", 1.0)
            mean, _ = step_distribution(transition["x"], policy(transition["x"], torch.full((3,), 750.0), None), 0.75, 0.6, "ddim", 1.0)
            ref_mean = mean - b * 5 * change
            near, far = mean, ref_mean - (mean - ref_mean)                     # as the policy would have it, and away from it
        sides = {"win": near, "lose": far} if sign > 0 else {"win": far, "lose": near}
        loss, metrics = train_spo.transition_loss(args, policy, ref, transition | sides, batch, torch.arange(3))
        assert metrics["clipped"].tolist() == [1, 1, 1] and metrics["logit"].tolist() == pytest.approx([logit] * 3, rel=1e-6)
        if sign > 0:
            assert loss.tolist() == pytest.approx([0.126131] * 3, abs=1e-6)
        assert torch.autograd.grad(loss.sum(), policy.change)[0].item() == 0


def test_the_weight_of_early_steps_is_bounded(tmp_path):
    args = spo_args("--step_weight", "inverse", "--out", str(tmp_path))
    policy, ref = Gaussian(0.02), Gaussian()
    transition, batch, z_win, z_lose = one_transition(args, policy, ref, 0.983, 0.964)
    _, b, std = step_coefficients(0.983, 0.964, "ddim", 1.0)
    assert std / abs(b) == pytest.approx(31, abs=1)
    _, metrics = train_spo.transition_loss(args, policy, ref, transition, batch, torch.arange(3))
    args.step_weight = "none"
    _, plain = train_spo.transition_loss(args, policy, ref, transition, batch, torch.arange(3))
    assert (metrics["margin"] / plain["margin"] - 10).abs().max() < 1e-6


def test_guidance_pushes_the_velocity_away_from_the_empty_caption():
    class Summing(torch.nn.Module):
        def forward(self, x, timestep, context):
            return 0 * x + context.sum(dim=(1, 2)).view(-1, 1, 1, 1, 1)
    batch = {"context": torch.full((2, 3, 1), 1.0), "names": ["", ""]}
    for guidance, want in ((1.0, 3.0), (2.5, 7.5), (0.0, 0.0)):
        assert torch.equal(train_spo.velocity(Summing(), torch.zeros(2, 1, 1, 1, 1), 0.5, batch, guidance), torch.full((2, 1, 1, 1, 1), want))


def test_the_toy_score_is_the_drift_of_the_clip_behind_the_noise():
    import toy
    captions, videos = toy.make_clips(4, seed=5)
    latents = toy.encode_pixels(videos)
    shuffled = latents[:, :, torch.tensor([0, 5, 2, 7, 4, 1, 6, 3])]           # the frames out of order
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    for clips, worst, best in ((latents, -0.3, 0.0), (shuffled, -8.0, -1.0)):
        knows = lambda x, timestep, context, clips=clips: (x - clips) / (timestep / 1000).view(-1, 1, 1, 1, 1)       # the velocity of latents that are known
        score = train_spo.toy_score(knows, guidance=1.0)(0.2 * clips + 0.8 * noise, 0.8, {"context": torch.zeros(4, 1, 32), "names": captions})
        assert score.shape == (4,) and score.min() >= worst and score.max() <= best


def test_a_preference_model_sees_the_candidates_of_a_pool_under_one_noise():
    """Two candidates for the same clip behind different noises score the same, another clip does not, and each score is the model's for that clip noised at this sigma."""
    shape, seen = (2, 1, 2, 3, 3), []
    clips, first, second = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))

    def scorer(x, timestep, context):
        assert timestep.tolist() == [300.0, 300.0]
        seen.append(x)
        return x.flatten(1).sum(1)
    behind = lambda clips: lambda x, timestep, context: (x - clips) / 0.3       # the velocity of latents that are known
    batch = {"context": torch.zeros(2, 1, 4), "names": ["", ""], "positions": [5, 9]}
    score = lambda clips, noise, batch=batch: train_spo.preference_score(scorer, behind(clips), 1.0, 0)(0.7 * clips + 0.3 * noise, 0.3, batch)
    assert (score(clips, first) - score(clips, second)).abs().max() < 1e-5
    assert (score(clips + 1, first) - score(clips, first) - 0.7 * 18).abs().max() < 1e-4
    noise = (seen[0] - 0.7 * clips) / 0.3
    assert abs(noise.mean()) < 0.7 and 0.6 < noise.std() < 1.4 and (noise[0] - noise[1]).abs().max() > 0.5
    for part in (0, 1):                                                        # it hangs on the position, not on the place in the batch
        score(clips.flip(0), first, batch | {"positions": [9, 5]})
        assert torch.allclose(seen[-1][part], seen[0][1 - part], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------
# the run

def run_spo(folder, out, *flags, ranks=1):
    """Rows of the log, exported weights, weights before."""
    argv = ["--init", str(folder / "base"), "--data", str(folder / "data"), "--score", str(folder / "scorer"), "--out", str(out), "--batch_size", "4", "--steps", "2",
            "--sample_steps", "5", "--pool", "3", "--threshold", "0.05", "--updates", "2", "--warmup_steps", "2", "--save_every", "1", "--learning_rate", "5e-4", *flags]
    on_ranks(ranks, spo_main, argv)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return rows, *(load_file(path / "diffusion_pytorch_model.safetensors") for path in (out / "export", folder / "base"))


@pytest.fixture(scope="session")
def one_rank(spo_world, tmp_path_factory):
    return run_spo(spo_world, tmp_path_factory.mktemp("one") / "out")


def same_run(mine, theirs):
    for a, b in zip(mine[0], theirs[0], strict=True):
        assert a["pairs"] == b["pairs"] and a["by_step"]["kept"] == b["by_step"]["kept"]                       # the same pools
        for name in ("score", "gap", "loss", "margin_abs", "grad_norm", "lr", "ratio_win", "ratio_lose"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-6), (a["step"], name)
    flat = lambda weights: torch.cat([weights[name].flatten().double() for name in sorted(weights)])
    a, b, start = flat(mine[1]), flat(theirs[1]), flat(theirs[2])
    assert (b - start).norm() > 1e-4 * start.norm() and (a - b).norm() <= 2e-2 * (b - start).norm()


def test_the_log_of_a_run_says_what_pools_pairs_and_ratios_did(one_rank):
    rows = one_rank[0]
    assert [row["step"] for row in rows] == [0, 1]
    first = rows[0]
    branched = 3                                                               # of 5 steps the first has no pool (0.2 of 5), nor has the last
    assert all(len(values) == branched for values in first["by_step"].values()) and set(first["by_step"]) == {"score", "gap", "kept", "margin", "accuracy"}
    assert first["pairs"] == round(4 * sum(first["by_step"]["kept"])) and 0 < first["pairs"] < 4 * branched    # the threshold drops some
    assert first["policy_forwards"] == 4 * 5 + first["pairs"] and first["policy_backwards"] == first["pairs"] and first["score_forwards"] == 4 * 3 * branched
    assert 0.0 in first["by_step"]["margin"] and first["updates"] == 2         # the first update is made where the policy is the reference
    assert rows[-1]["margin_abs"] > 1e-3 and rows[-1]["ratio_win"] != 1
    assert {"lr", "seconds", "seconds_rollout", "seconds_score", "memory_gib", "clipped", "reward_win", "reward_lose", "logit"} <= first.keys()
    assert first["seconds_score"] < first["seconds_rollout"] < first["seconds"]


@pytest.mark.parametrize("ranks, flags", [(1, ("--grad_accum", "2")), (2, ("--grad_accum", "2")), pytest.param(2, ("--checkpointing", "full", "--ref", "offload", "--cp_size", "2"), marks=pytest.mark.slow)])
def test_one_curve_however_it_is_cut(spo_world, one_rank, tmp_path, ranks, flags):
    if (ranks, flags[0]) == (2, "--grad_accum"):                               # one caption at a time: some have no pair where others have, and none may wait for it
        assert any(0 < share < 1 for row in one_rank[0] for share in row["by_step"]["kept"])
    same_run(run_spo(spo_world, tmp_path / "out", *flags, ranks=ranks), one_rank)


def test_a_run_that_stops_and_resumes_is_the_same_run_to_the_last_bit_and_on_two_ranks_the_same_curve(spo_world, one_rank, tmp_path):
    run_spo(spo_world, tmp_path / "out", "--steps", "1")
    shutil.copytree(tmp_path / "out", tmp_path / "two")
    resumed = run_spo(spo_world, tmp_path / "out", "--resume", "latest")
    strip = lambda row: {name: value for name, value in row.items() if not name.startswith("seconds") and name != "memory_gib"}
    assert [strip(row) for row in resumed[0]] == [strip(row) for row in one_rank[0]]
    assert all(torch.equal(resumed[1][name], one_rank[1][name]) for name in one_rank[1])
    same_run(run_spo(spo_world, tmp_path / "two", "--resume", "latest", ranks=2), one_rank)


def test_what_is_exported_is_the_average_and_what_is_rolled_out_the_policy(spo_world, tmp_path):
    flags = ("--steps", "1", "--updates", "1")                                 # the average's decay is (n + 1) / (n + 10) at first: 0.1 of the base stays
    rows, average, base = run_spo(spo_world, tmp_path / "average", *flags, "--ema_decay", "0.95")
    rows_without, policy, _ = run_spo(spo_world, tmp_path / "none", *flags, "--ema_decay", "0")
    assert rows[0]["grad_norm"] == rows_without[0]["grad_norm"]
    for name, start in base.items():
        assert torch.allclose(average[name], 0.1 * start + 0.9 * policy[name], rtol=0, atol=1e-6), name
    assert any((policy[name] - start).abs().max() > 1e-4 for name, start in base.items())


def test_a_roll_out_without_a_pair_changes_nothing(spo_world, tmp_path):
    rows, weights, base = run_spo(spo_world, tmp_path / "out", "--threshold", "0.9999999", "--steps", "1", ranks=2)
    assert rows[0]["pairs"] == 0 and rows[0]["updates"] == 0 and "loss" not in rows[0]
    assert all(torch.equal(weights[name], value) for name, value in base.items())


@pytest.mark.parametrize("flags, words", [
    (("--pool", "1"), ["--pool 1", "at least 2"]),
    (("--threshold", "1"), ["--threshold [1.0]", "[0, 1)"]),
    (("--threshold", "-0.1"), ["--threshold [-0.1]", "[0, 1)"]),
    (("--threshold", "0.1", "0.2", "0.3"), ["one or two numbers"]),
    (("--eta", "0"), ["--eta 0.0", "density"]),
    (("--eta", "1.5"), ["eta is 1.5", "at most 1 with ddim"]),
    (("--unbranched", "0.96"), ["--unbranched 0.96", "the last, which has no noise"]),
    (("--unbranched", "-0.2"), ["--unbranched -0.2"]),
    (("--sample_steps", "1"), ["--sample_steps 1"]),
    (("--updates", "16"), ["--updates 16", "at most the 15 steps"]),
    (("--clip", "0"), ["clip is 0"]),
    (("--beta", "0"), ["beta is 0"]),
    (("--flow_shift", "0"), ["flow_shift is 0"]),
    (("--cp_size", "3"), ["--cp_size 3"]),
    (("--batch_size", "3", "--grad_accum", "2"), ["--batch_size 3", "multiple of 2"]),
    (("--guidance", "2"), ["--guidance 2.0", "negative prompt"]),
    (("--score", "toy"), ["--score toy", "preference model"]),
    (("--score", "nowhere"), ["--score nowhere", "no such file"]),
    (("--score", "toy_base"), ["a model of velocities", "--loss preference"]),
    (("--resume", "latest"), ["--resume latest", "no checkpoint"]),
])
def test_bad_flags_are_refused_with_the_flag_and_what_to_do(spo_world, tmp_path, flags, words):
    message = spo_fails(spo_world, tmp_path, *flags)
    assert all(word in message for word in words), message


def test_a_preference_model_of_another_latent_size_is_refused(spo_world, tmp_path):
    for change, word in (({"in_dim": 16, "out_dim": 16}, "out_dim is 16, expected 12"), ({"text_dim": 64}, "text_dim is 64, expected 32"), ({"in_dim": 28}, "in_dim is 28, expected 12")):
        save_wan(WanModel(dataclasses.replace(CONFIGS["tiny"], num_layers=1, scores=True, **change)), tmp_path / "other")
        message = spo_fails(spo_world, tmp_path, "--score", str(tmp_path / "other"))
        assert word in message and "--score" in message
    small = dataclasses.replace(CONFIGS["tiny"], num_layers=1, dim=64, scores=True)
    train_spo.check_score("small", small, CONFIGS["tiny"])                     # a smaller model of the same latents may judge


def test_samples_of_two_sizes_in_one_batch_and_given_first_frames_are_refused_by_name(spo_world, tmp_path):
    sample = read_sample(spo_world / "data" / "007.safetensors")
    for name, frames in (("a", 3), ("b", 2)):
        write_sample(tmp_path / "mixed" / f"{name}.safetensors", sample["latents"][:, :frames], sample["context"], {})
    assert "b.safetensors: latents (12, 2, 4, 6)" in spo_fails(spo_world, tmp_path, "--data", str(tmp_path / "mixed"))
    ti2v = dataclasses.replace(CONFIGS["tiny"], in_dim=48, out_dim=48, num_layers=1)
    save_wan(WanModel(ti2v), tmp_path / "ti2v")
    save_wan(WanModel(dataclasses.replace(ti2v, scores=True)), tmp_path / "judge")
    write_sample(tmp_path / "given" / "a.safetensors", torch.zeros(48, 2, 4, 4), sample["context"], {}, first_latent=torch.zeros(48, 1, 4, 4))
    message = spo_fails(spo_world, tmp_path, "--init", str(tmp_path / "ti2v"), "--score", str(tmp_path / "judge"), "--data", str(tmp_path / "given"))
    assert "a.safetensors holds a first_latent" in message


def test_resuming_with_another_kernel_is_refused_and_leaves_the_run_alone(spo_world, one_rank, tmp_path):
    run_spo(spo_world, tmp_path / "run", "--steps", "1")
    before = (tmp_path / "run" / "log.jsonl").read_text()
    message = spo_fails(spo_world, tmp_path / "no", "--out", str(tmp_path / "run"), "--sample_steps", "5", "--pool", "3", "--updates", "2", "--warmup_steps", "2", "--learning_rate", "5e-4",
                        "--kernel", "dance", "--resume", "latest")
    assert "kernel = ddim" in message and "kernel = dance" in message and (tmp_path / "run" / "log.jsonl").read_text() == before
    assert "already holds a run" in spo_fails(spo_world, tmp_path / "no", "--out", str(tmp_path / "run"))
