"""The objectives: values worked out by hand, gradients, invariances, extremes; and what their signatures promise."""
import ast
import inspect
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import losses
from losses import add_noise, flow_error, next_sigma, shift_sigma, unshift_sigma, velocity_target
from losses import dpo_loss, dpop_loss, ipo_loss, preference_loss, regdpo_loss, sft_loss, spo_loss
from losses import diffusion_sdpo_loss, dpo_cm_loss, importance_weight, safeguard_coefficient, sdpo_loss

BETA = 2.0
LOG_2 = 0.6931471805599453


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def numbers(metrics):
    """{name: number} of the metrics of one pair."""
    return {name: x.item() for name, x in metrics.items()}


def exactly(value):
    return pytest.approx(value, rel=1e-12, abs=1e-15)


# Six pairs (err_win, err_lose, ref_err_win, ref_err_lose): right, wrong, tie, win got worse, both got better, far off.
PAIRS = torch.stack([column(0.5, 0.9, 0.8, 0.7), column(0.6, 0.4, 0.5, 0.5), column(0.3, 0.8, 0.3, 0.8),
                     column(0.9, 1.4, 0.7, 0.9), column(0.2, 0.5, 0.6, 0.8), column(3.0, 0.1, 0.2, 4.0)])
WEIGHT_WIN = column(0.95, 0.70, 0.99, 0.92, 1.30, 0.85)
WEIGHT_LOSE = column(0.91, 0.99, 0.40, 0.93, 1.50, 0.90)
SAFEGUARD = column(1.0, 0.3, 0.0, 0.7, 0.5, 0.1)


def errors(requires_grad=False):
    """The six pairs as four tensors (6,); on request the two policy errors are leaves."""
    err_win, err_lose, ref_err_win, ref_err_lose = PAIRS.unbind(1)
    err_win = err_win.clone().requires_grad_(requires_grad)
    err_lose = err_lose.clone().requires_grad_(requires_grad)
    return err_win, err_lose, ref_err_win, ref_err_lose


def run_loss(name, four, rows=slice(None), beta=BETA):
    """
    One offline objective on the pairs, or on some rows of them. The weights have a graph, and no gradient may pass
    through it.
    """
    err_win, err_lose, ref_err_win, ref_err_lose = four
    weight_win = WEIGHT_WIN[rows] + err_win - err_win.detach()
    weight_lose = WEIGHT_LOSE[rows] + err_lose - err_lose.detach()
    safeguard = SAFEGUARD[rows] + err_lose - err_lose.detach()
    return {
        "sft": lambda: sft_loss(err_win),
        "dpo": lambda: dpo_loss(*four, beta),
        "regdpo": lambda: regdpo_loss(*four, beta),
        "regdpo fixed r": lambda: regdpo_loss(*four, beta, r=0.7),
        "regdpo floor": lambda: regdpo_loss(*four, beta, r_scale=0.5, r_min=0.4),
        "dpo_cm": lambda: dpo_cm_loss(*four, beta, weight_win, weight_lose, threshold=0.8, clip=0.1),
        "sdpo": lambda: sdpo_loss(*four, beta, weight_win, weight_lose, clip=0.2),
        "diffusion_sdpo": lambda: diffusion_sdpo_loss(*four, beta, safeguard),
        "ipo": lambda: ipo_loss(*four, tau=beta),
        "dpop": lambda: dpop_loss(*four, beta, penalty=3.0),
    }[name]()


OFFLINE = ["sft", "dpo", "regdpo", "regdpo fixed r", "regdpo floor", "dpo_cm", "sdpo", "diffusion_sdpo", "ipo", "dpop"]
every_offline_loss = pytest.mark.parametrize("name", OFFLINE)


def coefficients(name, win_gap, lose_gap):
    """c_win, c_lose (6,) of the same objectives, from their formulas."""
    D = lambda x: BETA * torch.sigmoid(BETA * x)                     # dgr where the sigmoid holds -beta * x
    dgr = D(win_gap - lose_gap)
    if name == "sft":
        return torch.ones_like(dgr), torch.zeros_like(dgr)
    if name == "dpo":
        return dgr, dgr
    if name == "regdpo":
        return 2 * dgr, dgr
    if name == "regdpo fixed r":
        return dgr + 0.7, dgr
    if name == "regdpo floor":
        return dgr + column(*(max(0.5 * x, 0.4) for x in dgr.tolist())), dgr
    if name == "dpo_cm":   # minimum of the two, dropped below 0.8, clipped to [0.9, 1.1]
        weight = column(0.91, 0, 0, 0.92, 1.1, 0.9)
        return weight * dgr, weight * dgr
    if name == "sdpo":                                               # clipped to [0.8, 1.2]
        w_win, w_lose = column(0.95, 0.8, 0.99, 0.92, 1.2, 0.85), column(0.91, 0.99, 0.8, 0.93, 1.2, 0.9)
        return w_win * D(w_win * win_gap - w_lose * lose_gap), w_lose * D(w_win * win_gap - w_lose * lose_gap)
    if name == "diffusion_sdpo":
        return dgr, SAFEGUARD * dgr
    if name == "ipo":                                                # target 1 / (2 * 2)
        return 2 * (win_gap - lose_gap + 0.25), 2 * (win_gap - lose_gap + 0.25)
    if name == "dpop":
        worse = column(0, 1, 0, 1, 0, 1)
        dgr = D(win_gap - lose_gap + 3 * worse * win_gap)
        return dgr * (1 + 3 * worse), dgr
    raise KeyError(name)


# ----------------------------------------------------------------------------------------------------------------------
# the flow convention


def test_noise_is_added_by_each_videos_own_sigma():
    # B equals W, so that a sigma spread over the last axis instead of the first would pass unnoticed by broadcasting
    latents, noise = torch.ones(2, 1, 1, 1, 2), torch.zeros(2, 1, 1, 1, 2)
    x_sigma = add_noise(latents, noise, torch.tensor([0.25, 1.0]))
    assert x_sigma.flatten(1).tolist() == [[0.75, 0.75], [0.0, 0.0]]


def test_sigma_0_is_the_latents_and_sigma_1_the_noise():
    latents = torch.randn(2, 3, 2, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.full((2, 3, 2, 2, 2), 7.0).double()
    assert torch.equal(add_noise(latents, noise, column(0, 0)), latents)
    assert torch.equal(add_noise(latents, noise, column(1, 1)), noise)


def test_sigma_per_frame_keeps_a_given_first_frame_clean():
    latents, noise = torch.zeros(2, 1, 3, 1, 1), torch.ones(2, 1, 3, 1, 1)
    sigma = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.9, 0.9]]).reshape(2, 1, 3, 1, 1)
    assert torch.equal(add_noise(latents, noise, sigma), sigma)


def test_velocity_is_the_slope_of_x_sigma_and_gives_latents_and_noise_back():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 3, 2, 2, generator=generator).double()
    noise = torch.randn(2, 4, 3, 2, 2, generator=generator).double()
    v_target, sigma = velocity_target(latents, noise), column(0.3, 0.8)
    x_sigma, s = add_noise(latents, noise, sigma), sigma.reshape(2, 1, 1, 1, 1)
    slope = (add_noise(latents, noise, sigma + 0.1) - x_sigma) / 0.1
    torch.testing.assert_close(v_target, slope, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x_sigma - s * v_target, latents, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x_sigma + (1 - s) * v_target, noise, rtol=1e-12, atol=1e-12)


def test_bf16_latents_are_mixed_in_float32():
    latents, noise = torch.tensor([[1.0]], dtype=torch.bfloat16), torch.tensor([[2 ** -9]], dtype=torch.bfloat16)
    assert velocity_target(latents, noise).item() == 2 ** -9 - 1   # bf16 would round to -1
    # bf16 would round to 0.5
    assert add_noise(latents, noise, torch.tensor([0.5], dtype=torch.bfloat16)).item() == 0.5 + 2 ** -10


def test_shift_matches_numbers_worked_by_hand():
    assert shift_sigma(column(0.5), 3.0).item() == exactly(0.75)               # 3/2 / (1 + 2/2)
    # an expert boundary of 0.875 set before the shift lands at 0.988
    assert shift_sigma(column(0.875), 12.0).item() == exactly(10.5 / 10.625)
    assert shift_sigma(column(0.3), 1.0).item() == exactly(0.3)
    assert unshift_sigma(column(0.75), 3.0).item() == exactly(0.5)


@pytest.mark.parametrize("flow_shift", [0.1, 1.0, 3.0, 5.0, 12.0])
def test_shift_keeps_the_ends_exactly_rises_and_is_undone(flow_shift):
    for dtype in (torch.float32, torch.float64):
        assert shift_sigma(torch.tensor([0, 1], dtype=dtype), flow_shift).tolist() == [0, 1]
    sigma = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = shift_sigma(sigma, flow_shift)
    assert (shifted.diff() > 0).all()
    torch.testing.assert_close(unshift_sigma(shifted, flow_shift), sigma, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(shifted, flow_shift * sigma / (1 + (flow_shift - 1) * sigma), rtol=1e-12, atol=1e-15)


def test_next_sigma_walks_the_samplers_grid_from_noise_to_0():
    # 20 steps, shift 3: u = 1, 0.95, 0.9, ... shifted, 3 u / (1 + 2 u); 0.75 -> u 0.45 -> 1.35 / 1.9
    sigma = column(1.0)
    for step in range(1, 21):
        sigma = next_sigma(sigma, 20, 3.0)
        u = 1 - step / 20
        assert sigma.item() == pytest.approx(3 * u / (1 + 2 * u), rel=1e-12, abs=1e-14)      # twenty roundings of 1
    assert next_sigma(column(0.75), 20, 3.0).item() == exactly(1.35 / 1.9)
    assert next_sigma(column(0.01), 20, 3.0).item() == 0.0            # less than a step from the end: to 0, not below
    assert next_sigma(column(0.37), 50, 1.0).item() == exactly(0.35)  # between grid points: one cell down


# ----------------------------------------------------------------------------------------------------------------------
# flow_error


def test_flow_error_matches_numbers_worked_by_hand():
    v_pred = torch.zeros(2, 1, 1, 2, 2)
    v_target = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 2]]).reshape(2, 1, 1, 2, 2)
    assert flow_error(v_pred, v_target).tolist() == [7.5, 1.0]       # (1+4+9+16)/4, 4/4


@pytest.mark.parametrize("shape", [(5, 6), (5, 1), (5, 4, 6, 7), (5, 4, 3, 6, 7)])
def test_flow_error_is_one_number_per_video_for_any_number_of_axes(shape):
    # a widely used trainer averages 5-D latents over three axes and so takes one sigmoid per pixel column
    generator = torch.Generator().manual_seed(0)
    v_pred = torch.randn(shape, generator=generator).double()
    v_target = torch.randn(shape, generator=generator).double()
    err = flow_error(v_pred, v_target)
    assert err.shape == (5,)
    for i in range(5):
        assert err[i].item() == exactly(F.mse_loss(v_pred[i], v_target[i]).item())


def test_accuracy_on_noise_is_one_half_and_never_above_one():
    generator = torch.Generator().manual_seed(0)
    four = [flow_error(*torch.randn(2, 2000, 2, 2, 2, 3, generator=generator)) for _ in range(4)]
    _, metrics = dpo_loss(*four, beta=BETA)
    assert metrics["accuracy"].shape == (2000,) and metrics["accuracy"].max() <= 1
    assert abs(metrics["accuracy"].mean().item() - 0.5) < 0.05       # standard deviation 0.011


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flow_error_of_half_precision_is_computed_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    v_pred, v_target = torch.randn(2, 1, 200_000, generator=generator).to(dtype)
    want = (v_pred.double() - v_target.double()).square().mean().item()
    err = flow_error(v_pred, v_target)
    assert err.dtype == torch.float32
    assert err.item() == pytest.approx(want, rel=1e-6)
    # half arithmetic fails this test
    assert (v_pred - v_target).square().mean().item() != pytest.approx(want, rel=1e-5)
    large = torch.full((1, 4), 300.0, dtype=dtype)
    assert flow_error(large, -large).item() == 360_000   # above float16's largest number


def test_flow_error_does_not_lower_float64():
    v_pred, v_target = torch.full((1, 8), 1 + 1e-10, dtype=torch.float64), torch.ones(1, 8, dtype=torch.float64)
    # 1 + 1e-10 itself is rounded at 1e-6 of the difference
    assert flow_error(v_pred, v_target).item() == pytest.approx(1e-20, rel=1e-5)
    assert flow_error(v_pred.float(), v_target).dtype == flow_error(v_pred, v_target.float()).dtype == torch.float64


def test_mask_of_ones_is_the_mean():
    generator = torch.Generator().manual_seed(0)
    v_pred, v_target = torch.randn(2, 3, 4, 3, 2, 2, generator=generator).double()
    want = flow_error(v_pred, v_target)
    for mask in (torch.ones(3, 4, 3, 2, 2), torch.ones(1, 1, 1, 1, 1), torch.ones(3, 1, 3, 1, 1, dtype=torch.bool)):
        torch.testing.assert_close(flow_error(v_pred, v_target, mask), want, rtol=1e-12, atol=0)


def test_mask_divides_each_video_by_its_own_count():
    # first video: (1 + 4) / 2; second: 16 / 1. One count for the batch would give (5 / 1.5, 16 / 1.5).
    v_pred, v_target = torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.zeros(2, 3)
    assert flow_error(v_pred, v_target, torch.tensor([[1, 1, 0], [1, 0, 0]])).tolist() == [2.5, 16.0]


def test_mask_of_a_given_first_frame_equals_leaving_it_out():
    generator = torch.Generator().manual_seed(0)
    v_pred, v_target = torch.randn(2, 3, 4, 5, 2, 2, generator=generator).double()
    mask = torch.ones(1, 1, 5, 1, 1)
    mask[:, :, 0] = 0
    torch.testing.assert_close(flow_error(v_pred, v_target, mask), flow_error(v_pred[:, :, 1:], v_target[:, :, 1:]),
                               rtol=1e-12, atol=0)


def test_gradient_of_a_masked_error_is_0_where_masked():
    v_pred = column(1, 2, 3).reshape(1, 3).requires_grad_()
    flow_error(v_pred, torch.zeros(1, 3), torch.tensor([[1, 0, 1]])).sum().backward()
    assert v_pred.grad.tolist() == [[1.0, 0.0, 3.0]]                 # 2 * difference / count


def test_an_empty_mask_is_refused_with_the_videos_number():
    with pytest.raises(ValueError, match="video 1"):
        flow_error(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([[1, 0, 0], [0, 0, 0]]))


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 4, 3\).*\(2, 1, 3\)"):
        flow_error(torch.ones(2, 4, 3), torch.ones(2, 1, 3))


# ----------------------------------------------------------------------------------------------------------------------
# values worked by hand


def one_pair():
    # win_gap = -0.3, lose_gap = 0.2, at beta 2 margin = -2 * (-0.3 - 0.2) = 1
    return column(0.5), column(0.9), column(0.8), column(0.7)


SOFTPLUS_MINUS_1 = 0.31326168751822286      # log(1 + exp(-1))
DGR_1 = 0.5378828427399902                  # 2 / (1 + e)


def test_sft_loss_is_the_error_of_the_win():
    value, metrics = sft_loss(column(0.5, 0.7))
    assert value.tolist() == metrics["loss_sft"].tolist() == [0.5, 0.7]


def test_dpo_loss_matches_numbers_worked_by_hand():
    value, metrics = dpo_loss(*one_pair(), beta=2.0)
    assert value.item() == exactly(SOFTPLUS_MINUS_1)
    want = {"loss_dpo": SOFTPLUS_MINUS_1, "margin": 1.0, "accuracy": 1.0, "win_gap": -0.3, "lose_gap": 0.2,
            "dgr": DGR_1, "reward_win": 0.6, "reward_lose": -0.4}
    assert numbers(metrics) == exactly(want)


def test_regdpo_loss_matches_numbers_worked_by_hand():
    for arguments, r in [({}, DGR_1), ({"r_scale": 0.2}, 0.2 * DGR_1), ({"r_scale": 0.2, "r_min": 0.125}, 0.125),
                         ({"r": 3.0}, 3.0), ({"r": 0.0}, 0.0)]:
        value, metrics = regdpo_loss(*one_pair(), beta=2.0, **arguments)
        assert value.item() == exactly(SOFTPLUS_MINUS_1 + 0.5 * r)
        want = {"loss_dpo": SOFTPLUS_MINUS_1, "loss_sft": 0.5 * r, "r": r, "margin": 1.0, "accuracy": 1.0,
                "win_gap": -0.3, "lose_gap": 0.2, "dgr": DGR_1, "reward_win": 0.6, "reward_lose": -0.4}
        assert numbers(metrics) == exactly(want)


def test_dpo_cm_loss_matches_numbers_worked_by_hand():
    # min(0.95, 0.92) kept unchanged | min(0.95, 0.8) below the threshold | 0.9 exactly at it | 1.3 clipped to 1.1
    for weight_win, weight_lose, kept, weight in [(0.95, 0.92, 1, 0.92), (0.95, 0.8, 0, 0.9), (0.8, 0.95, 0, 0.9),
                                                  (0.9, 0.9, 1, 0.9), (1.5, 1.3, 1, 1.1)]:
        value, metrics = dpo_cm_loss(*one_pair(), beta=2.0, weight_win=column(weight_win),
                                     weight_lose=column(weight_lose), threshold=0.9, clip=0.1)
        assert value.item() == exactly(kept * weight * SOFTPLUS_MINUS_1)
        want = {"loss_dpo": SOFTPLUS_MINUS_1, "kept": kept, "weight_win": weight_win, "weight_lose": weight_lose,
                "margin": 1.0, "accuracy": 1.0,
                "win_gap": -0.3, "lose_gap": 0.2, "dgr": DGR_1, "reward_win": 0.6, "reward_lose": -0.4}
        assert numbers(metrics) == exactly(want)
    value, _ = dpo_cm_loss(*one_pair(), beta=2.0, weight_win=column(0.7), weight_lose=column(0.6), threshold=0.5,
                           clip=0.1)
    assert value.item() == exactly(0.9 * SOFTPLUS_MINUS_1)          # kept, and clipped from below


def test_sdpo_loss_matches_numbers_worked_by_hand():
    # no clip: -2 * (0.5 * -0.3 - 0.8 * 0.2) = 0.62; both clipped to 0.9: 0.9 * 1;
    # one clipped to 0.7: -2 * (0.7 * -0.3 - 0.8 * 0.2) = 0.74; clip 0: plain DPO
    for epsilon, logit in [(1.0, 0.62), (0.1, 0.9), (0.3, 0.74), (0.0, 1.0)]:
        value, metrics = sdpo_loss(*one_pair(), beta=2.0, weight_win=column(0.5), weight_lose=column(0.8), clip=epsilon)
        assert value.item() == exactly(math.log1p(math.exp(-logit)))
        want = {"loss_dpo": SOFTPLUS_MINUS_1, "logit": logit, "weight_win": 0.5, "weight_lose": 0.8, "margin": 1.0,
                "accuracy": 1.0, "win_gap": -0.3,
                "lose_gap": 0.2, "dgr": 2 / (1 + math.exp(logit)), "reward_win": 0.6, "reward_lose": -0.4}
        assert numbers(metrics) == exactly(want)
    _, metrics = sdpo_loss(*one_pair(), beta=2.0, weight_win=column(1.9), weight_lose=column(1.2), clip=0.25)
    assert metrics["logit"].item() == exactly(-2 * (1.25 * -0.3 - 1.2 * 0.2))


def test_ipo_loss_matches_numbers_worked_by_hand():
    value, metrics = ipo_loss(*one_pair(), tau=25.0)                 # (0.5 - 0.02)^2
    assert value.item() == exactly(0.2304)
    assert numbers(metrics) == exactly({"margin": 0.5, "accuracy": 1.0, "win_gap": -0.3, "lose_gap": 0.2})


def test_dpop_loss_matches_numbers_worked_by_hand():
    # win_gap = 0.1, lose_gap = 0.2: margin 0.2, logit 0.2 - 2 * 5 * 0.1 = -0.8
    value, metrics = dpop_loss(column(0.9), column(0.9), column(0.8), column(0.7), beta=2.0, penalty=5.0)
    assert value.item() == exactly(math.log1p(math.exp(0.8)))
    want = {"loss_dpo": math.log1p(math.exp(-0.2)), "logit": -0.8, "margin": 0.2, "accuracy": 1.0, "win_gap": 0.1,
            "lose_gap": 0.2, "dgr": 2 / (1 + math.exp(-0.8)), "reward_win": -0.2, "reward_lose": -0.4}
    assert numbers(metrics) == pytest.approx(want, rel=1e-12)


def test_diffusion_sdpo_loss_has_the_value_and_metrics_of_dpo_loss():
    value, metrics = diffusion_sdpo_loss(*errors(), beta=BETA, safeguard=SAFEGUARD)
    want_value, want = dpo_loss(*errors(), beta=BETA)
    assert torch.equal(value, want_value) and torch.equal(metrics.pop("safeguard"), SAFEGUARD)
    assert metrics.keys() == want.keys() and all(torch.equal(metrics[name], want[name]) for name in want)


def test_dgr_matches_the_published_table():
    table = [(1000, 0.0, 500), (1000, -0.001, 268.941), (1000, -0.005, 6.69285), (1000, -0.01, 0.0453979),
             (1000, -0.02, 2.06115e-6), (100, -0.01, 26.8941)]
    for beta, gap, dgr in table:
        _, metrics = dpo_loss(column(gap), column(0.0), column(0.0), column(0.0), beta=beta)
        assert metrics["dgr"].item() == pytest.approx(dgr, rel=2e-6)
        assert metrics["dgr"].item() == exactly(beta / (1 + math.exp(-beta * gap)))


def test_dpo_loss_is_exact_at_every_margin():
    # torch's softplus(-margin) drops the log1p term below margin -20, an error of 6e-11 at -20.5; log(sigmoid(margin))
    # fails from 37 on
    margins = [-700.0, -20.5, -1e-3, 1e-3, 20.5, 40.0, 700.0]
    zero = torch.zeros(7, dtype=torch.float64)
    value, _ = dpo_loss(-column(*margins), zero, zero, zero, beta=1.0)
    assert value.tolist() == pytest.approx([max(-m, 0) + math.log1p(math.exp(-abs(m))) for m in margins], rel=1e-12,
                                           abs=0)


def test_only_the_sft_term_tells_the_ideal_path_from_the_cheating_ones():
    # from (10, 10) with reference 10, each path ends at win_gap - lose_gap = -10:
    # better wins, both worse, both far worse
    err_win, err_lose, ref = column(5, 50, 500), column(15, 60, 510), column(10, 10, 10)
    value, metrics = dpo_loss(err_win, err_lose, ref, ref, beta=0.1)
    assert value.tolist() == [exactly(SOFTPLUS_MINUS_1)] * 3 and metrics["margin"].tolist() == exactly([1, 1, 1])
    value, metrics = regdpo_loss(err_win, err_lose, ref, ref, beta=0.1, r=0.2)
    assert metrics["loss_sft"].tolist() == exactly([1, 10, 100])
    assert (value - SOFTPLUS_MINUS_1).tolist() == pytest.approx([1, 10, 100], rel=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# at the start, ties, conventions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_policy_and_reference_agree_the_loss_is_log_2_bit_for_bit_and_accuracy_one_half(dtype):
    err_win, err_lose = torch.rand(2, 37, generator=torch.Generator().manual_seed(0), dtype=dtype)
    four, ones = (err_win, err_lose, err_win.clone(), err_lose.clone()), torch.ones_like(err_win)
    log_2 = torch.full((37,), LOG_2, dtype=dtype)
    for value, metrics in [dpo_loss(*four, beta=1000.0), regdpo_loss(*four, beta=1000.0, r=0.0),
                           dpop_loss(*four, beta=1000.0, penalty=50.0),
                           dpo_cm_loss(*four, beta=1000.0, weight_win=ones, weight_lose=ones, threshold=0.9, clip=0.1),
                           sdpo_loss(*four, beta=1000.0, weight_win=ones, weight_lose=0.3 * ones, clip=0.9),
                           diffusion_sdpo_loss(*four, beta=1000.0, safeguard=0.3 * ones)]:
        assert torch.equal(value, log_2) and torch.equal(metrics["loss_dpo"], log_2)
        assert torch.equal(metrics["accuracy"], 0.5 * ones) and torch.equal(metrics["dgr"], 500 * ones)
    value, metrics = regdpo_loss(*four, beta=1000.0, r=300.0)
    torch.testing.assert_close(value, log_2 + 300 * err_win, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)
    assert torch.equal(regdpo_loss(*four, beta=1000.0)[1]["r"], 500 * ones)
    value, metrics = ipo_loss(*four, tau=25.0)
    torch.testing.assert_close(value, 0.0004 * ones) and torch.equal(metrics["accuracy"], 0.5 * ones)


def test_a_tie_counts_half_right_and_a_wrong_pair_nothing():
    ref, ones = column(0.5, 0.5, 0.5), column(1, 1, 1)
    four = column(0.4, 0.5, 0.6), ref, ref, ref
    for _, metrics in [dpo_loss(*four, beta=7.0), regdpo_loss(*four, beta=7.0), ipo_loss(*four, tau=7.0),
                       dpop_loss(*four, beta=7.0, penalty=1.0),
                       dpo_cm_loss(*four, beta=7.0, weight_win=0.5 * ones, weight_lose=0.9 * ones, threshold=0.1,
                                   clip=0.1),
                       sdpo_loss(*four, beta=7.0, weight_win=0.5 * ones, weight_lose=0.9 * ones, clip=0.9),
                       diffusion_sdpo_loss(*four, beta=7.0, safeguard=ones),
                       spo_loss(-four[0], -ref, -ref, -ref, beta=7.0, clip=0.5), preference_loss(-four[0], -ref)]:
        assert metrics["accuracy"].tolist() == [1.0, 0.5, 0.0]


def test_half_convention_of_other_code_is_half_the_beta_here():
    err_win, err_lose, ref_err_win, ref_err_lose = errors()
    inside = -0.5 * 5000 * ((err_win - err_lose) - (ref_err_win - ref_err_lose))  # as Diffusion-DPO's script defines it
    _, metrics = dpo_loss(err_win, err_lose, ref_err_win, ref_err_lose, beta=2500.0)
    torch.testing.assert_close(metrics["margin"], inside, rtol=1e-12, atol=1e-12)


def test_summed_errors_need_beta_divided_by_the_number_of_elements():
    value, _ = dpo_loss(*errors(), beta=1000.0)
    summed, _ = dpo_loss(*(2_096_640 * x for x in errors()), beta=1000.0 / 2_096_640)
    torch.testing.assert_close(summed, value, rtol=1e-12, atol=1e-12)


@every_offline_loss
def test_beta_is_not_ignored(name):
    same = torch.equal(run_loss(name, errors())[0], run_loss(name, errors(), beta=2 * BETA)[0])
    assert same == (name == "sft")


# ----------------------------------------------------------------------------------------------------------------------
# gradients


@every_offline_loss
def test_gradient_is_the_objectives_two_coefficients(name):
    # As the trainer gets them: autograd on leaf errors. Catches an undetached dgr, weight or safeguard, all of which
    # leave the value right.
    four = errors(requires_grad=True)
    value, _ = run_loss(name, four)
    grad_win, grad_lose = torch.autograd.grad(value.sum(), four[:2], allow_unused=True)
    c_win, c_lose = coefficients(name, (four[0] - four[2]).detach(), (four[1] - four[3]).detach())
    assert grad_win.tolist() == exactly(c_win.tolist())
    assert (-grad_lose if grad_lose is not None else torch.zeros(6)).tolist() == exactly(c_lose.tolist())


@every_offline_loss
def test_branches_back_propagated_one_at_a_time_give_the_joint_gradient(name):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 6, 5, generator=generator).double()                   # win, lose
    targets = torch.randn(2, 6, 4, generator=generator).double()
    weight = torch.randn(5, 4, generator=generator).double().requires_grad_()
    ref_weight = weight.detach() + 0.1
    ref_err_win, ref_err_lose = (flow_error(x @ ref_weight, y) for x, y in zip(inputs, targets))

    err_win, err_lose = (flow_error(x @ weight, y) for x, y in zip(inputs, targets))
    joint, = torch.autograd.grad(run_loss(name, (err_win, err_lose, ref_err_win, ref_err_lose))[0].mean(), weight)

    leaves = err_win.detach().requires_grad_(), err_lose.detach().requires_grad_()
    d_win, d_lose = torch.autograd.grad(run_loss(name, (*leaves, ref_err_win, ref_err_lose))[0].mean(), leaves,
                                        allow_unused=True)
    win, = torch.autograd.grad((d_win * flow_error(inputs[0] @ weight, targets[0])).sum(), weight)
    lose = 0
    if d_lose is not None:
        lose, = torch.autograd.grad((d_lose * flow_error(inputs[1] @ weight, targets[1])).sum(), weight)
    torch.testing.assert_close(win + lose, joint, rtol=1e-12, atol=1e-14)


def test_gradient_reaches_the_prediction_as_dgr_times_two_differences_over_n():
    generator = torch.Generator().manual_seed(0)
    v_win, v_lose, target_win, target_lose = torch.randn(4, 2, 3, 2, 2, 2, generator=generator).double()
    v_win.requires_grad_(), v_lose.requires_grad_()
    value, metrics = dpo_loss(flow_error(v_win, target_win), flow_error(v_lose, target_lose), column(1.5, 2.5),
                              column(2.0, 2.0), beta=BETA)
    value.sum().backward()
    dgr = metrics["dgr"].reshape(2, 1, 1, 1, 1)
    torch.testing.assert_close(v_win.grad, dgr * 2 * (v_win - target_win).detach() / 24, rtol=1e-12, atol=0)
    torch.testing.assert_close(v_lose.grad, -dgr * 2 * (v_lose - target_lose).detach() / 24, rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [0.2, 1.0, 4.0])
def test_regdpo_with_r_proportional_to_dgr_is_dpo_with_a_weaker_lose_branch(k):
    four = errors(requires_grad=True)
    reg = torch.autograd.grad(regdpo_loss(*four, beta=BETA, r_scale=k)[0].sum(), four[:2])
    weak = torch.full((6,), 1 / (1 + k), dtype=torch.float64)
    safe = torch.autograd.grad(diffusion_sdpo_loss(*four, beta=BETA, safeguard=weak)[0].sum(), four[:2])
    for a, b in zip(reg, safe):
        torch.testing.assert_close(a, (1 + k) * b, rtol=1e-12, atol=0)


def test_only_a_fixed_r_or_a_floor_still_pulls_on_a_saturated_pair():
    err_win = column(0.1).requires_grad_()
    saturated = err_win, column(0.6), column(0.3), column(0.3)                     # margin 500 at beta 1000

    def pull(**arguments):
        value, _ = regdpo_loss(*saturated, beta=1000.0, **arguments)
        return torch.autograd.grad(value.sum(), err_win)[0].item()

    assert pull() < 1e-200
    assert pull(r=125.0) == exactly(125) and pull(r_min=25.0) == exactly(25)


def test_gradient_is_finite_and_right_where_log_of_sigmoid_is_not():
    err_win = column(1e6, 0.0).requires_grad_()
    value, _ = dpo_loss(err_win, column(0.0, 1e6), column(0.0, 0.0), column(0.0, 0.0), beta=1000.0)
    grad, = torch.autograd.grad(value.sum(), err_win)
    assert value.tolist() == [1e9, 0.0] and grad.tolist() == [1000.0, 0.0]


# ----------------------------------------------------------------------------------------------------------------------
# invariances


@every_offline_loss
def test_pairs_do_not_mix(name):
    # one by one, in reversed order and twice over: the same numbers, metrics included.
    # A batch mean or a batch-wide r, mask or lambda fails this.
    value, metrics = run_loss(name, errors())
    for rows in ([0], [1], [2], [3], [4], [5], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5] * 2):
        some_value, some_metrics = run_loss(name, [x[rows] for x in errors()], rows)
        assert some_value.tolist() == value[rows].tolist()
        assert some_metrics.keys() == metrics.keys()
        assert all(x.tolist() == metrics[key][rows].tolist() for key, x in some_metrics.items())


def test_two_pairs_of_opposite_margin_do_not_cancel():
    # log sigmoid of the batch mean is log 2 here; the mean of log sigmoids is not
    value, metrics = dpo_loss(column(0.0, 1.0), column(1.0, 0.0), column(0.5, 0.5), column(0.5, 0.5), beta=3.0)
    assert metrics["margin"].tolist() == [3.0, -3.0]
    assert value.tolist() == exactly([math.log1p(math.exp(-3)), 3 + math.log1p(math.exp(-3))])
    assert value.mean().item() != pytest.approx(LOG_2, abs=0.5)


def test_n_negatives_are_the_mean_of_n_single_negatives_and_each_one_counts():
    err_win, ref_err_win = column(0.5, 0.6), column(0.55, 0.5)
    err_lose = column(0.9, 0.2, 0.6, 0.4, 0.5, 0.8).reshape(2, 3)
    ref_err_lose = column(0.5, 0.6, 0.7, 0.3, 0.6, 0.5).reshape(2, 3)
    together, _ = dpo_loss(err_win.repeat_interleave(3), err_lose.flatten(), ref_err_win.repeat_interleave(3),
                           ref_err_lose.flatten(), beta=BETA)
    single = [dpo_loss(err_win, err_lose[:, n], ref_err_win, ref_err_lose[:, n], beta=BETA)[0] for n in range(3)]
    single = torch.stack(single, dim=1)
    torch.testing.assert_close(together.reshape(2, 3).mean(1), single.mean(1), rtol=1e-12, atol=0)
    assert together.unique().numel() == 6


@every_offline_loss
def test_a_common_shift_of_policy_and_reference_changes_dpo_nothing_and_regdpo_something(name):
    err_win, err_lose, ref_err_win, ref_err_lose = errors()
    value, _ = run_loss(name, (err_win, err_lose, ref_err_win, ref_err_lose))
    same = lambda *shifted: torch.allclose(run_loss(name, shifted)[0], value, rtol=1e-12, atol=1e-13)
    only_gaps = name in ("dpo", "dpo_cm", "sdpo", "diffusion_sdpo", "ipo", "dpop")
    assert same(err_win + 0.5, err_lose, ref_err_win + 0.5, ref_err_lose) == only_gaps
    assert same(err_win, err_lose + 0.5, ref_err_win, ref_err_lose + 0.5)
    only_difference = name in ("dpo", "dpo_cm", "diffusion_sdpo", "ipo")
    assert same(err_win + 0.5, err_lose + 0.5, ref_err_win, ref_err_lose) == only_difference
    assert same(err_win, err_lose, ref_err_win + 0.5, ref_err_lose + 0.5) == (name not in ("sdpo", "dpop"))


def test_swapping_win_and_lose_mirrors_the_loss():
    err_win, err_lose, ref_err_win, ref_err_lose = errors()
    value, metrics = dpo_loss(err_win, err_lose, ref_err_win, ref_err_lose, beta=BETA)
    swapped, swapped_metrics = dpo_loss(err_lose, err_win, ref_err_lose, ref_err_win, beta=BETA)
    torch.testing.assert_close(value - swapped, -metrics["margin"], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(metrics["dgr"] + swapped_metrics["dgr"], torch.full((6,), BETA, dtype=torch.float64),
                               rtol=1e-12, atol=0)
    assert torch.equal(metrics["accuracy"] + swapped_metrics["accuracy"], torch.ones(6, dtype=torch.float64))


@every_offline_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_errors_stay_finite_and_the_dtype_is_kept(name, dtype):
    four = [torch.tensor(x, dtype=dtype) for x in ([1e6, 0, 1e4, 0, 1e-30, 0], [0, 1e6, 0, 1e4, 0, 0],
                                                   [0, 1e6, 1e4, 0, 0, 0], [1e6, 0, 0, 1e4, 1e-30, 0])]
    four[0].requires_grad_(), four[1].requires_grad_()
    value, metrics = run_loss(name, four, beta=1000.0)
    grads = [g for g in torch.autograd.grad(value.sum(), four[:2], allow_unused=True) if g is not None]
    if name not in ("dpo_cm", "sdpo", "diffusion_sdpo"):        # these three were given float64 weights
        assert value.dtype == dtype
    for x in [value, *metrics.values(), *grads]:
        assert x.isfinite().all()


@every_offline_loss
def test_metrics_are_detached_and_one_number_per_pair(name):
    four = errors(requires_grad=True)
    value, metrics = run_loss(name, four)
    assert value.shape == (6,) and value.requires_grad
    assert metrics and all(x.shape == (6,) and not x.requires_grad for x in metrics.values())


@every_offline_loss
def test_errors_that_are_not_one_number_per_pair_are_refused(name):
    # (B, W) from a mean over too few axes; (B, 1) next to (B,), which would broadcast to (B, B)
    with pytest.raises(AssertionError, match=r"\(B,\)"):
        run_loss(name, [x[:, None].expand(6, 6) for x in errors()])
    if name != "sft":
        err_win, err_lose, ref_err_win, ref_err_lose = errors()
        with pytest.raises(AssertionError, match=r"\(B,\)"):
            run_loss(name, [err_win, err_lose, ref_err_win, ref_err_lose[:, None]])


@pytest.mark.parametrize("shape", [(6, 1), (1,), ()])
def test_other_inputs_that_are_not_one_number_per_pair_are_refused(shape):
    weight = torch.full(shape, 0.95, dtype=torch.float64)
    for call in (lambda: dpo_cm_loss(*errors(), beta=BETA, weight_win=weight, weight_lose=weight, threshold=0.9,
                                     clip=0.1),
                 lambda: sdpo_loss(*errors(), beta=BETA, weight_win=WEIGHT_WIN, weight_lose=weight, clip=0.1),
                 lambda: diffusion_sdpo_loss(*errors(), beta=BETA, safeguard=weight),
                 lambda: importance_weight(PAIRS[:, 0], sigma=weight, sigma_next=weight - 0.1),
                 lambda: spo_loss(*errors()[:3], weight, beta=BETA, clip=0.1),
                 lambda: preference_loss(PAIRS[:, 0], weight)):
        with pytest.raises(AssertionError, match=r"\(B,\)"):
            call()


# ----------------------------------------------------------------------------------------------------------------------
# importance weight, DPO-C&M


def test_importance_weight_matches_numbers_worked_by_hand():
    # sigma 0.5 -> 0.25: SNR 1 -> 9, (9 - 1) * 0.25 / 2 * 0.4 = 0.4
    weight = importance_weight(column(0.4).requires_grad_(), column(0.5), column(0.25))
    assert weight.item() == exactly(math.exp(-0.4)) and not weight.requires_grad


@pytest.mark.parametrize("sigma, sigma_next",
                         [(1.0, 0.9), (0.95, 0.9), (0.7, 0.4), (0.5, 0.45), (0.2, 0.1), (0.05, 0.03)])
def test_importance_weight_is_the_gaussian_kl_per_element(sigma, sigma_next):
    # Bayes' rule, and torch's KL between the true posterior of x_next and the one with the model's latents put in.
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 1, 16, generator=generator).double()
    x_sigma, v_target = (1 - sigma) * latents + sigma * noise, noise - latents
    v_pred = v_target + 0.3 * torch.randn(1, 16, generator=generator).double()

    keep = (1 - sigma) / (1 - sigma_next)                                   # x_sigma = keep * x_next + fresh noise
    variance = sigma ** 2 - keep ** 2 * sigma_next ** 2
    precision = 1 / sigma_next ** 2 + keep ** 2 / variance
    mean = lambda clean: ((1 - sigma_next) * clean / sigma_next ** 2 + keep * x_sigma / variance) / precision
    posterior = lambda clean: torch.distributions.Normal(mean(clean), precision ** -0.5)
    kl = torch.distributions.kl_divergence(posterior(latents), posterior(x_sigma - sigma * v_pred)).mean().item()

    weight = importance_weight(flow_error(v_pred, v_target), column(sigma), column(sigma_next))
    # 1e-12 of the weight: -log loses a digit where it is near 1
    assert -math.log(weight.item()) == pytest.approx(kl, rel=1e-11)
    assert weight.item() == exactly(math.exp(-kl))


@pytest.mark.parametrize("step, thresholds", [(1 / 1000, (0.0023, 0.0043, 0.0109)), (1 / 50, (0.046, 0.082, 0.186)),
                                              (1 / 20, (0.11, 0.19, 0.38))])
def test_importance_weight_crosses_0_9_where_the_table_says(step, thresholds):
    half_digit = {1 / 1000: 5e-5, 1 / 50: 5e-4, 1 / 20: 5e-3}[step]
    for err, sigma in zip((0.1, 0.3, 1.0), thresholds):
        below, above = (importance_weight(column(err), column(x), column(x - step)).item()
                        for x in (sigma - half_digit, sigma + half_digit))
        assert below < 0.9 < above


def test_importance_weight_lies_in_0_1_and_falls_with_error_step_and_towards_clean():
    sigma = torch.linspace(0.02, 1, 50, dtype=torch.float64)
    weight = torch.stack([importance_weight(err * torch.ones_like(sigma), sigma, next_sigma(sigma, 50, 1.0))
                          for err in (0.0, 0.1, 1.0, 100.0)])
    assert (weight >= 0).all() and (weight <= 1).all()
    assert (weight[0, 1:] == 1).all()                                       # a perfect policy takes the data's step
    assert (weight.diff(dim=0)[:, 1:-1] < 0).all()                          # more error, less weight
    assert (weight[1:].diff(dim=1)[:, :-1] >= 0).all()                      # more noise, more weight
    longer, shorter = (importance_weight(column(0.5), column(0.5), column(x)) for x in (0.4, 0.45))
    assert longer < shorter


def test_importance_weight_is_0_at_the_end_of_the_grid_and_finite_just_before():
    weight = importance_weight(column(0.1, 0.1, 0.1, 1e6), column(0.02, 0.02, 0.001, 0.5), column(0.0, 5e-4, 6e-4, 0.4))
    assert weight[:2].tolist() == [0.0, 0.0]
    # 0.5 * (4e-4) * (16e-4 - 12e-7) / (1e-3)^2 * 0.1: sigma_next counts as 1e-3
    assert weight[2].item() == exactly(math.exp(-0.5 * 4e-4 * (1.6e-3 - 1.2e-6) / 1e-6 * 0.1))
    assert weight[3].item() == exactly(math.exp(-20))


def test_importance_weight_does_not_cancel_in_float32():
    sigma, sigma_next, err = torch.tensor([0.5]), torch.tensor([0.5 - 2 ** -14]), torch.tensor([4096.0])
    exact = importance_weight(err.double(), sigma.double(), sigma_next.double())
    assert exact.item() == pytest.approx(math.exp(-0.25), rel=1e-3)   # 0.5 * 2^-14 * about (1 - 0.5) / 0.25 * 4096
    assert importance_weight(err, sigma, sigma_next).item() == pytest.approx(exact.item(), rel=2e-7)
    naive = ((1 - sigma_next) / sigma_next) ** 2 - ((1 - sigma) / sigma) ** 2
    assert torch.exp(-0.5 * naive * sigma ** 2 * err).item() != pytest.approx(exact.item(), rel=2e-6)


def test_masked_pairs_have_loss_0_and_gradient_0_but_a_graph():
    four = errors(requires_grad=True)
    low = torch.full((6,), 0.1, dtype=torch.float64)
    value, metrics = dpo_cm_loss(*four, beta=1000.0, weight_win=low, weight_lose=low, threshold=0.9, clip=0.1)
    assert value.tolist() == metrics["kept"].tolist() == [0.0] * 6
    loss = value.sum() / metrics["kept"].sum().clamp(min=1)                # the caller's line
    grads = torch.autograd.grad(loss, four[:2])
    assert loss.item() == 0 and all(g.tolist() == [0.0] * 6 for g in grads)


def test_a_masked_pair_does_not_change_the_average_over_kept_pairs():
    weight = column(0.95, 0.95, 0.2, 0.95, 0.2, 0.95)
    value, metrics = dpo_cm_loss(*errors(), beta=BETA, weight_win=weight, weight_lose=weight, threshold=0.9, clip=0.1)
    kept = [0, 1, 3, 5]
    want = 0.95 * dpo_loss(*(x[kept] for x in errors()), beta=BETA)[0].mean()
    assert (value.sum() / metrics["kept"].sum()).item() == exactly(want.item())


def test_a_nan_error_is_not_hidden_by_the_mask():
    nan = column(math.nan)
    weight = importance_weight(nan, column(0.5), column(0.4))
    value, _ = dpo_cm_loss(nan, column(0.5), column(0.5), column(0.5), beta=BETA, weight_win=weight, weight_lose=weight,
                           threshold=0.9, clip=0.1)
    assert value.isnan().all()


# ----------------------------------------------------------------------------------------------------------------------
# relatives


def test_dpop_is_dpo_while_the_win_is_no_worse_than_the_reference():
    four = errors(requires_grad=True)
    no_worse = (four[0] <= four[2]).tolist()
    assert no_worse == [True, False, True, False, True, False]
    values = dpop_loss(*four, beta=BETA, penalty=50.0)[0], dpo_loss(*four, beta=BETA)[0]
    results = [(value, *torch.autograd.grad(value.sum(), four[:2])) for value in values]
    for penalised, plain in zip(*results):
        assert (penalised == plain).tolist() == no_worse


def test_safeguard_matches_numbers_worked_by_hand():
    # mu 0.75, |d_win|^2 = 1: dot 1 -> 0.25; dot -1 -> 1; dot 0.125 -> min(1, 2); dot 0 -> 1; dot 0.5 -> 0.5;
    # a perfect win -> 1
    d_win = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 0.0]])
    d_lose = torch.tensor([[1.0, 1.0], [-1.0, 5.0], [0.125, 1.0], [0.0, 3.0], [0.5, -4.0], [1.0, 1.0]])
    target_win, target_lose = torch.full((6, 2), 3.0), torch.full((6, 2), -2.0)
    coefficient = safeguard_coefficient(target_win + d_win, target_win, target_lose + d_lose, target_lose, mu=0.75)
    assert coefficient.tolist() == [0.25, 1.0, 1.0, 1.0, 0.5, 1.0]


@pytest.mark.parametrize("mu", [0.0, 0.2, 0.9, 1.0])
def test_safeguarded_step_lowers_the_win_error_to_first_order(mu):
    generator = torch.Generator().manual_seed(0)
    v_win, target_win, target_lose = torch.randn(3, 200, 3, 2, 2, 2, generator=generator).double()
    d_win = v_win - target_win
    share = torch.linspace(-2, 2, 200).double().reshape(200, 1, 1, 1, 1)
    v_lose = target_lose + d_win * share + torch.randn(200, 3, 2, 2, 2, generator=generator)
    d_lose = v_lose - target_lose
    coefficient = safeguard_coefficient(v_win, target_win, v_lose, target_lose, mu)
    assert ((coefficient >= 0) & (coefficient <= 1)).all()
    d_win, d_lose = d_win.flatten(1), d_lose.flatten(1)
    dot, norm = (d_win * d_lose).sum(1), d_win.square().sum(1)
    step = -d_win + coefficient[:, None] * d_lose
    assert ((step * d_win).sum(1) <= -mu * norm + 1e-12).all()
    assert (coefficient[dot <= 0] == 1).all()
    bound = coefficient < 1   # where it acts, it takes no more than it must
    assert bound.sum() > 20
    torch.testing.assert_close((step * d_win).sum(1)[bound], -mu * norm[bound], rtol=1e-11, atol=1e-11)


def test_safeguard_is_scale_free_per_video_detached_and_in_float32():
    generator = torch.Generator().manual_seed(0)
    v_win, target_win, v_lose, target_lose = torch.randn(4, 3, 4, 2, 3, 3, generator=generator)
    v_lose = target_lose + v_win - target_win + 0.1 * v_lose
    want = safeguard_coefficient(v_win, target_win, v_lose, target_lose, mu=0.5)
    assert (want < 1).all()
    v_win.requires_grad_()
    v_lose.requires_grad_()
    assert not safeguard_coefficient(v_win, target_win, v_lose, target_lose, mu=0.5).requires_grad
    # an epsilon of 1e-9 would show
    tiny = safeguard_coefficient(1e-6 * v_win, 1e-6 * target_win, 1e-6 * v_lose, 1e-6 * target_lose, mu=0.5)
    torch.testing.assert_close(tiny, want, rtol=1e-5, atol=0)
    alone = safeguard_coefficient(v_win[1:2], target_win[1:2], v_lose[1:2], target_lose[1:2], mu=0.5)
    torch.testing.assert_close(alone, want[1:2], rtol=1e-6, atol=0)
    half = [x.detach().bfloat16() for x in (v_win, target_win, v_lose, target_lose)]
    torch.testing.assert_close(safeguard_coefficient(*half, mu=0.5),
                               safeguard_coefficient(*(x.float() for x in half), mu=0.5), rtol=1e-6, atol=0)


def test_safeguard_mask_equals_leaving_the_masked_frame_out():
    generator = torch.Generator().manual_seed(0)
    four = list(torch.randn(4, 3, 4, 5, 2, 2, generator=generator).double())
    four[2] = four[3] + four[0] - four[1] + 0.5 * four[2]
    mask = torch.ones(1, 1, 5, 1, 1)
    mask[:, :, 0] = 0
    want = safeguard_coefficient(*(x[:, :, 1:] for x in four), mu=0.5)
    assert (want < 1).all()
    torch.testing.assert_close(safeguard_coefficient(*four, mu=0.5, mask=mask), want, rtol=1e-12, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# SPO, preference model


def test_spo_loss_matches_numbers_worked_by_hand():
    # inside the clip: 10 * (0.05 + 0.02) = 0.7; both outside: 10 * log(1.1 / 0.9) = 2.00671, loss 0.126131;
    # one outside: 10 * (log 1.1 - 0.01)
    value, metrics = spo_loss(column(0.05, 0.2, 3.0), column(-0.02, -0.3, 0.01), column(0, 0, 0), column(0, 0, 0),
                              beta=10.0, clip=0.1)
    logit = [0.7, 10 * math.log(1.1 / 0.9), 10 * (math.log(1.1) - 0.01)]
    assert metrics["logit"].tolist() == exactly(logit)
    assert value.tolist() == exactly([math.log1p(math.exp(-x)) for x in logit])
    assert metrics["logit"][1].item() == pytest.approx(2.00671, abs=5e-6)
    assert value[1].item() == pytest.approx(0.126131, abs=5e-7)
    assert metrics["margin"].tolist() == exactly([0.7, 5.0, 29.9]) and metrics["clipped"].tolist() == [0.0, 1.0, 0.5]
    assert metrics["ratio_win"].tolist() == exactly([math.exp(0.05), 1.1, 1.1])
    assert metrics["ratio_lose"].tolist() == exactly([math.exp(-0.02), 0.9, math.exp(0.01)])
    assert metrics["reward_win"].tolist() == exactly([0.5, 2.0, 30.0])
    assert metrics["reward_lose"].tolist() == exactly([-0.2, -3.0, 0.1])


def test_spo_gradient_vanishes_on_a_clamped_branch_in_both_directions():
    logp_win, logp_lose = column(0.2, -0.2, 0.05, 0.3).requires_grad_(), column(0.2, -0.2, 0.3, 0.05).requires_grad_()
    zero = column(0, 0, 0, 0)
    value, metrics = spo_loss(logp_win, logp_lose, zero, zero, beta=10.0, clip=0.1)
    grad_win, grad_lose = torch.autograd.grad(value.sum(), (logp_win, logp_lose))
    pull = (10 * torch.sigmoid(-metrics["logit"])).tolist()
    assert grad_win.tolist() == exactly([0, 0, -pull[2], 0]) and grad_lose.tolist() == exactly([0, 0, 0, pull[3]])


def test_spo_of_two_gaussian_steps_from_one_parent_needs_only_the_means():
    # (logp - ref_logp)_win - (logp - ref_logp)_lose = mean((x_win - x_lose) * (mean - ref_mean)) / variance:
    # the quadratic terms cancel
    generator = torch.Generator().manual_seed(0)
    x_win, x_lose, ref_mean, change = torch.randn(4, 2, 12, generator=generator).double()
    mean, std = (ref_mean + 0.01 * change).requires_grad_(), 0.5
    logp = lambda x, mean: torch.distributions.Normal(mean, std).log_prob(x).mean(1)
    value, metrics = spo_loss(logp(x_win, mean), logp(x_lose, mean), logp(x_win, ref_mean), logp(x_lose, ref_mean),
                              beta=10.0, clip=0.9)
    want = 10 * ((x_win - x_lose) * (mean - ref_mean)).mean(1) / std ** 2
    assert metrics["clipped"].tolist() == [0, 0]
    torch.testing.assert_close(metrics["logit"], want.detach(), rtol=1e-11, atol=1e-13)
    value, metrics = spo_loss(logp(x_win, mean), logp(x_lose, mean), logp(x_win, mean.detach()),
                              logp(x_lose, mean.detach()), beta=10.0, clip=0.1)
    assert torch.equal(value, torch.full((2,), LOG_2, dtype=torch.float64))
    grad, = torch.autograd.grad(value.sum(), mean)
    torch.testing.assert_close(grad, -(10 / 2) * (x_win - x_lose) / std ** 2 / 12, rtol=1e-11, atol=1e-13)


def test_spo_extremes_are_finite():
    for dtype in (torch.float32, torch.float64):
        logp_win = torch.tensor([1e6, -1e6, 1e4, 1e3], dtype=dtype, requires_grad=True)
        logp_lose = torch.tensor([-1e6, 1e6, 1e4, 0.0], dtype=dtype, requires_grad=True)
        value, metrics = spo_loss(logp_win, logp_lose, torch.zeros_like(logp_win), torch.zeros_like(logp_win),
                                  beta=500.0, clip=0.1)
        for x in (value, *metrics.values(), *torch.autograd.grad(value.sum(), (logp_win, logp_lose))):
            assert x.isfinite().all() and x.dtype == dtype and not (x.requires_grad and x is not value)


def test_preference_loss_is_torchs_binary_cross_entropy_of_the_score_difference():
    score_win = column(2.0, 0.5, 1.0, 1e4, -1e4).requires_grad_()
    score_lose = column(0.5, 2.0, 1.0, 0.0, 0.0).requires_grad_()
    value, metrics = preference_loss(score_win, score_lose)
    want = F.binary_cross_entropy_with_logits(score_win - score_lose, torch.ones(5, dtype=torch.float64),
                                              reduction="none")
    torch.testing.assert_close(value, want, rtol=1e-12, atol=0)
    assert value[0].item() == exactly(math.log1p(math.exp(-1.5)))
    assert metrics["accuracy"].tolist() == [1, 0, 0.5, 1, 0] and metrics["margin"].tolist() == [1.5, -1.5, 0, 1e4, -1e4]
    assert torch.equal(metrics["score_win"], score_win) and torch.equal(metrics["score_lose"], score_lose)
    assert not any(x.requires_grad for x in metrics.values())
    grad_win, grad_lose = torch.autograd.grad(value.sum(), (score_win, score_lose))
    torch.testing.assert_close(grad_lose, torch.sigmoid(-metrics["margin"]), rtol=1e-12, atol=0)
    assert torch.equal(grad_win, -grad_lose)


# ----------------------------------------------------------------------------------------------------------------------
# the contract


FOUR = dict(err_win=column(0.5), err_lose=column(0.9), ref_err_win=column(0.8), ref_err_lose=column(0.7))
LOGP = dict(logp_win=column(0.0), logp_lose=column(0.0), ref_logp_win=column(0.0), ref_logp_lose=column(0.0))
WEIGHTS = dict(weight_win=column(0.9), weight_lose=column(0.9))
BAD_BETA = [dict(beta=0), dict(beta=math.nan)]
VELOCITIES = dict(v_pred_win=column(0.0)[None], v_target_win=column(1.0)[None], v_pred_lose=column(0.0)[None],
                  v_target_lose=column(1.0)[None])


@pytest.mark.parametrize("function, good, bad", [
    (dpo_loss, FOUR | dict(beta=1), [dict(beta=-1)] + BAD_BETA),
    (regdpo_loss, FOUR | dict(beta=1),
     BAD_BETA + [dict(r=-1), dict(r=math.nan), dict(r_scale=-1), dict(r_min=-1), dict(r=1, r_scale=2),
                 dict(r=1, r_min=2)]),
    (dpo_cm_loss, FOUR | WEIGHTS | dict(beta=1, threshold=0.9, clip=0.1),
     BAD_BETA + [dict(threshold=1.1), dict(threshold=-0.1), dict(clip=1.1), dict(clip=-0.1), dict(clip=math.nan),
                 dict(threshold=math.nan)]),
    (sdpo_loss, FOUR | WEIGHTS | dict(beta=1, clip=0.1),
     BAD_BETA + [dict(clip=1.1), dict(clip=-0.1), dict(clip=math.nan)]),
    (diffusion_sdpo_loss, FOUR | dict(beta=1, safeguard=column(1.0)), BAD_BETA),
    (ipo_loss, FOUR | dict(tau=1), [dict(tau=0), dict(tau=-1), dict(tau=math.nan)]),
    (dpop_loss, FOUR | dict(beta=1, penalty=0), BAD_BETA + [dict(penalty=-1), dict(penalty=math.nan)]),
    (spo_loss, LOGP | dict(beta=1, clip=0.1), BAD_BETA + [dict(clip=0), dict(clip=1), dict(clip=-0.1)]),
    (safeguard_coefficient, VELOCITIES | dict(mu=0.5),
     [dict(mu=1.1), dict(mu=-0.1), dict(v_target_lose=column(1.0, 1.0)[None])]),
    (importance_weight, dict(err=column(0.5), sigma=column(0.5), sigma_next=column(0.4)),
     [dict(sigma=column(1.1)), dict(sigma=column(0.3)), dict(sigma_next=column(-0.1))]),
    (shift_sigma, dict(sigma=column(0.5), flow_shift=3), [dict(flow_shift=0), dict(flow_shift=-3)]),
    (unshift_sigma, dict(sigma=column(0.5), flow_shift=3), [dict(flow_shift=0), dict(flow_shift=-3)]),
    (next_sigma, dict(sigma=column(0.5), steps=50, flow_shift=3), [dict(steps=0), dict(steps=-1), dict(flow_shift=0)]),
], ids=lambda x: getattr(x, "__name__", ""))
def test_parameters_out_of_range_are_refused_with_name_and_value(function, good, bad):
    function(**good)
    for arguments in bad:
        name = list(arguments)[0]
        with pytest.raises(ValueError, match=f"{name}.*expected|{name}.*would do nothing") as raised:
            function(**good | arguments)
        if not isinstance(arguments[name], torch.Tensor):
            assert str(arguments[name]) in str(raised.value)


PUBLIC = {name: f for name, f in vars(losses).items() if inspect.isfunction(f)}


def test_signatures_are_the_contract():
    four = "err_win, err_lose, ref_err_win, ref_err_lose"
    for name, want in {"flow_error": "v_pred, v_target, mask=None", "sft_loss": "err_win", "dpo_loss": f"{four}, beta",
                       "regdpo_loss": f"{four}, beta, r=None, r_scale=1.0, r_min=0.0",
                       "importance_weight": "err, sigma, sigma_next",
                       "dpo_cm_loss": f"{four}, beta, weight_win, weight_lose, threshold, clip",
                       "sdpo_loss": f"{four}, beta, weight_win, weight_lose, clip",
                       "spo_loss": "logp_win, logp_lose, ref_logp_win, ref_logp_lose, beta, clip",
                       "preference_loss": "score_win, score_lose"}.items():
        assert str(inspect.signature(PUBLIC[name])) == f"({want})"


def test_what_changes_what_is_learned_has_no_default():
    defaults = {(name, p.name) for name, f in PUBLIC.items() for p in inspect.signature(f).parameters.values()
                if p.default is not p.empty}
    assert defaults == {("flow_error", "mask"), ("safeguard_coefficient", "mask"), ("regdpo_loss", "r"),
                        ("regdpo_loss", "r_scale"), ("regdpo_loss", "r_min")}


def test_the_file_imports_torch_only():
    tree = ast.parse(Path(losses.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {alias.name for node in imports for alias in node.names} == {"torch", "torch.nn.functional"}


@pytest.mark.parametrize("name", PUBLIC)
def test_each_function_works_when_copied_alone(name):
    # all but next_sigma, which is two lines on shift_sigma and unshift_sigma
    tree = ast.parse(inspect.getsource(PUBLIC[name]))
    ours = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & PUBLIC.keys()
    assert ours == ({"shift_sigma", "unshift_sigma"} if name == "next_sigma" else set())
