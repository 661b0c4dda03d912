"""
Preference objectives for rectified-flow models: pure functions of per-video numbers. Each one works when copied alone.

Flow       x_sigma = (1 - sigma) * latents + sigma * noise,   v_target = noise - latents,   with sigma in [0, 1] and
           1 = pure noise, so that latents = x_sigma - sigma * v and noise = x_sigma + (1 - sigma) * v. The model gets
           timestep = 1000 * sigma.
Errors     err_win, err_lose (policy, with gradient), ref_err_win, ref_err_lose (frozen reference, without): all (B,),
           from flow_error. Both videos of a pair share sigma and noise; policy and reference see the same x_sigma,
           sigma and conditions.
               win_gap  = err_win  - ref_err_win      below 0: the policy denoises the win better than the reference
               lose_gap = err_lose - ref_err_lose     above 0: it denoises the lose worse
               margin   = -beta * (win_gap - lose_gap) = reward_win - reward_lose,   reward = -beta * gap
               dgr      = beta * sigmoid(-margin)     the DPO gradient ratio: DPO's gradient per unit of error, beta / 2
                                                      at first, 0 when the pair is learnt
               accuracy = 1 where margin > 0, 1/2 at a tie, else 0
               loss_dpo = -log sigmoid(margin)        without weights and penalties
           These mean the same for every offline objective (ipo_loss has no beta). If its sigmoid holds another number
           than margin, the metrics also have that number, as "logit", and dgr is that of the logit. spo_loss and
           preference_loss have no errors: their docstrings say what margin and loss_dpo are there.
Returns    losses (B,) and metrics {name: detached (B,)}. No loss averages over pairs: losses.mean() is for the caller.
Gradient   of an offline objective: d losses = c_win * d err_win - c_lose * d err_lose, two numbers per pair that each
           docstring gives. A new objective must keep this form: it may read the errors, and nothing else that needs
           a gradient. So the two branches can be back-propagated one at a time, or on two ranks, with c_win and c_lose
           from autograd on the four errors alone.
beta       multiplies a difference of *mean* squared errors, with no extra 1/2 (hundreds to thousands; a |margin| above
           5 is saturated). 5000 in Diffusion-DPO, VideoDPO and RealDPO, which halve it inside, is 2500 here; 100 in
           flow_grpo is 50; diffusers' 2500 is 2500. For errors summed over N elements, beta_sum = beta / N.
"""
import torch
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------------------------
# the flow convention


def add_noise(latents, noise, sigma):
    """
    x_sigma = (1 - sigma) * latents + sigma * noise, (B, ...), float32 or higher.

    sigma: (B,), or with all axes, such as (B,1,F,1,1) where a clean first frame has sigma 0.
    """
    sigma = sigma.to(torch.promote_types(sigma.dtype, torch.float32))            # mixes bf16 latents in float32 too
    sigma = sigma.reshape(sigma.shape + (1,) * (latents.ndim - sigma.ndim))      # (B,) -> (B,1,1,1,1)
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents, noise):
    """v_target = noise - latents = d x_sigma / d sigma, (B, ...), float32 or higher."""
    dtype = torch.promote_types(torch.promote_types(latents.dtype, noise.dtype), torch.float32)
    return noise.to(dtype) - latents.to(dtype)


def shift_sigma(sigma, flow_shift):
    """
    Sigmas of a uniform grid in [0, 1], moved towards noise where flow_shift > 1, any shape:

        flow_shift * sigma / (1 + (flow_shift - 1) * sigma)

    Written so that 0 and 1 stay exactly 0 and 1. ValueError unless flow_shift > 0.
    """
    if not flow_shift > 0:
        raise ValueError(f"flow_shift is {flow_shift}: expected a number above 0 (1 leaves sigma unchanged)")
    return flow_shift * sigma / ((1 - sigma) + flow_shift * sigma)


def unshift_sigma(sigma, flow_shift):
    """The inverse of shift_sigma: sigma / (flow_shift - (flow_shift - 1) * sigma)."""
    if not flow_shift > 0:
        raise ValueError(f"flow_shift is {flow_shift}: expected a number above 0 (1 leaves sigma unchanged)")
    return sigma / (sigma + flow_shift * (1 - sigma))


def next_sigma(sigma, steps, flow_shift):
    """
    The sigma that a sampler of this many steps reaches from sigma in one step, any shape: one cell of the uniform grid
    down, or 0,

        shift(max(unshift(sigma) - 1 / steps, 0))

    sigma itself need not lie on the grid. ValueError unless steps >= 1 and flow_shift > 0.
    """
    if not steps >= 1:
        raise ValueError(f"steps is {steps}: expected at least 1")
    return shift_sigma((unshift_sigma(sigma, flow_shift) - 1 / steps).clamp(min=0), flow_shift)


def flow_error(v_pred, v_target, mask=None):
    """
    Mean squared velocity error of each video: (B, ...), (B, ...) -> (B,).

    The mean is over *all* axes but the first, in float32 or higher whatever the inputs are: at beta 1000 an error that
    is wrong by 1e-3 makes a margin that is wrong by 1, and bf16 has two to three digits.
    mask: broadcastable to v_pred, 1 = counts; each video's sum is divided by its own count. For padding, and for
    frames that are given clean.
    ValueError if the shapes differ (broadcasting would hide it), or if a video's mask is empty.
    """
    if v_pred.shape != v_target.shape:
        raise ValueError(f"v_pred is {tuple(v_pred.shape)} but v_target is {tuple(v_target.shape)}: "
                         f"expected equal shapes (B, ...)")
    dtype = torch.promote_types(torch.promote_types(v_pred.dtype, v_target.dtype), torch.float32)
    squared = (v_pred.to(dtype) - v_target.to(dtype)).square().flatten(1)        # (B, C*F*H*W)
    if mask is None:
        return squared.mean(1)
    mask = mask.to(dtype).expand(v_pred.shape).flatten(1)                        # (B, C*F*H*W)
    count = mask.sum(1)                                                          # (B,)
    if (count == 0).any():
        empty = (count == 0).nonzero()[0].item()
        raise ValueError(f"mask leaves no element of video {empty} of the batch: expected at least one 1 per video")
    return (squared * mask).sum(1) / count


# ----------------------------------------------------------------------------------------------------------------------
# offline objectives: functions of four errors


def sft_loss(err_win):
    """losses = err_win: plain flow matching on the wins. c_win, c_lose = 1, 0."""
    assert err_win.ndim == 1, "one error per video, (B,)"
    return err_win, {"loss_sft": err_win.detach()}


def dpo_loss(err_win, err_lose, ref_err_win, ref_err_lose, beta):
    """
    Diffusion-DPO (Wallace et al. 2023, Eq. 14) on velocity errors, that is, Flow-DPO with constant beta (Liu et al.
    2025). All errors (B,):

        losses = -log sigmoid(margin),   margin = -beta * (win_gap - lose_gap)

    log 2 where policy and reference agree. c_win, c_lose = dgr, dgr. beta: see the head of this file (no 1/2).
    ValueError unless beta > 0.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}: expected a number above 0")
    assert err_win.ndim == 1, "one error per video, (B,)"
    assert err_win.shape == err_lose.shape == ref_err_win.shape == ref_err_lose.shape, "four errors of one shape, (B,)"
    win_gap = err_win - ref_err_win
    lose_gap = err_lose - ref_err_lose
    margin = -beta * (win_gap - lose_gap)
    losses = -F.logsigmoid(margin)                     # not log(sigmoid()), which is -inf below a margin of about -104
    metrics = {"loss_dpo": losses, "margin": margin, "accuracy": (1 + margin.sign()) / 2,
               "win_gap": win_gap, "lose_gap": lose_gap, "dgr": beta * torch.sigmoid(-margin),
               "reward_win": -beta * win_gap, "reward_lose": -beta * lose_gap}
    return losses, {name: value.detach() for name, value in metrics.items()}


def regdpo_loss(err_win, err_lose, ref_err_win, ref_err_lose, beta, r=None, r_scale=1.0, r_min=0.0):
    """
    Reg-DPO (arXiv 2511.01450, gradient Eq. 49): DPO plus SFT on the wins, at no extra forward pass. Mean squared
    velocity errors (B,), each from flow_error: err of the policy, ref_err of a frozen reference under no_grad; both
    videos of a pair share noise and sigma.

        losses = -log sigmoid(margin) + r * err_win
        margin = -beta * ((err_win - ref_err_win) - (err_lose - ref_err_lose)),   dgr = beta * sigmoid(-margin)
        r      = the number given; for None, max(r_scale * dgr, r_min) of each pair, detached

    The gradient is (dgr + r) * d err_win - dgr * d err_lose: c_win, c_lose = dgr + r, dgr, both beta / 2 or more at
    first, so divide the loss by beta before a gradient is clipped. The paper uses r = dgr (the defaults) and, fixed, 25
    to 500 at beta 1000.
    Two things are inferred, since the paper does not say them: r takes no gradient (Eq. 49 treats it as a constant),
    and each pair has its own (dgr is inside the expectation in Eqs. 41-42, and a batch mean would depend on how the
    batch is cut).
    r = r_scale * dgr keeps c_win : c_lose at (1 + r_scale) : 1 for ever and vanishes with dgr, so under Adam it acts as
    DPO with a weaker lose branch; only a fixed r, or r_min, keeps pulling on pairs that are learnt.
    ValueError: beta <= 0; r, r_scale or r_min < 0; r given together with r_scale or r_min, which would do nothing.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}: expected a number above 0")
    if not (r_scale >= 0 and r_min >= 0 and (r is None or r >= 0)):
        raise ValueError(f"r, r_scale, r_min are {r}, {r_scale}, {r_min}: expected 0 or more each")
    if r is not None and (r_scale != 1.0 or r_min != 0.0):
        raise ValueError(f"r={r} is fixed, so r_scale={r_scale} and r_min={r_min} would do nothing: "
                         f"give r alone, or no r")
    assert err_win.ndim == 1, "one error per video, (B,)"
    assert err_win.shape == err_lose.shape == ref_err_win.shape == ref_err_lose.shape, "four errors of one shape, (B,)"
    win_gap = err_win - ref_err_win
    lose_gap = err_lose - ref_err_lose
    margin = -beta * (win_gap - lose_gap)
    # Were dgr not detached, the value would stay right but the DPO part of the gradient would grow by the factor
    # 1 + r_scale * err_win * beta * sigmoid(margin): 51 at beta 1000, err_win 0.1, margin 0.
    dgr = beta * torch.sigmoid(-margin).detach()
    if r is None:
        r = (r_scale * dgr).clamp(min=r_min)           # (B,)
    else:
        r = torch.full_like(dgr, r)
    loss_dpo = -F.logsigmoid(margin)
    loss_sft = r * err_win
    metrics = {"loss_dpo": loss_dpo, "loss_sft": loss_sft, "r": r,
               "margin": margin, "accuracy": (1 + margin.sign()) / 2, "win_gap": win_gap, "lose_gap": lose_gap,
               "dgr": dgr, "reward_win": -beta * win_gap, "reward_lose": -beta * lose_gap}
    return loss_dpo + loss_sft, {name: value.detach() for name, value in metrics.items()}


def importance_weight(err, sigma, sigma_next):
    """
    Agreement exp(-KL), per element, of the policy's sampler step sigma -> sigma_next with the data's: three (B,) ->
    (B,) in [0, 1], detached. The posterior q(x_next | x_sigma, latents) and the policy's p(x_next | x_sigma) are
    Gaussians of one variance, and

        weight = exp(-KL(q || p) / elements),   KL / elements = (SNR_next - SNR) * sigma^2 / 2 * err
        SNR    = ((1 - sigma) / sigma)^2

    SDPO (arXiv 2505.21893) weighs by p / q; its equations are not public, so this closed form is ours. The mean over
    elements is inferred: for a whole video log(p / q) is in the thousands and p / q underflows. The weight is near 1 at
    high noise and small near clean latents. A longer step lowers it, so take sigma_next from next_sigma with the steps
    and the shift of the sampler in question (50 steps are usual).
    Where sigma_next <= 5e-4, at the end of the grid, the weight is 0; between that and 1e-3, sigma_next counts as 1e-3.
    err: the branch's own err_win or err_lose. ValueError unless 0 <= sigma_next <= sigma <= 1.
    """
    if (sigma_next < 0).any() or (sigma_next > sigma).any() or (sigma > 1).any():
        raise ValueError(f"sigma is {sigma.tolist()} and sigma_next is {sigma_next.tolist()}: "
                         f"expected 0 <= sigma_next <= sigma <= 1")
    assert err.ndim == 1 and err.shape == sigma.shape == sigma_next.shape, "one number per video, (B,)"
    # (SNR_next - SNR) * sigma^2, written without the difference of two nearly equal numbers
    rise = (sigma - sigma_next) * (sigma + sigma_next - 2 * sigma * sigma_next) / sigma_next.clamp(min=1e-3).square()
    weight = torch.exp(-(0.5 * rise * err.detach()).clamp(max=20))               # >= 2e-9: 0 marks the end of the grid
    is_end = sigma_next <= 5e-4                                                  # a step to 0 has no density to compare
    return torch.where(is_end, torch.zeros_like(weight), weight)


def dpo_cm_loss(err_win, err_lose, ref_err_win, ref_err_lose, beta, weight_win, weight_lose, threshold, clip):
    """
    DPO-C&M, clip and mask (the simpler method of SDPO, arXiv 2505.21893): DPO weighted outside the sigmoid.
    Everything (B,):

        weight = min(weight_win, weight_lose)       from importance_weight; takes no gradient
        kept   = 1 where weight >= threshold, else 0
        losses = kept * clamp(weight, 1 - clip, 1 + clip) * -log sigmoid(margin)   (weight <= 1: only 1 - clip acts)

    c_win, c_lose = kept * clipped weight * dgr, both. A masked pair has loss 0 and gradient 0 but stays in the graph,
    so that ranks keep in step. The objective averages over *kept* pairs: the caller divides the sum over all ranks by
    max(1, sum of metrics["kept"] over all ranks); losses.mean() would shrink the step by the fraction kept instead.
    The method is known from descriptions only: the minimum over the two branches is inferred, threshold 0.9 is
    reported, clip is not (at 0.1 the mask does all the work). loss_dpo in the metrics is unweighted.
    ValueError: beta <= 0; threshold or clip outside [0, 1].
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}: expected a number above 0")
    if not (0 <= threshold <= 1 and 0 <= clip <= 1):
        raise ValueError(f"threshold is {threshold} and clip is {clip}: expected both in [0, 1] "
                         f"(weights are clipped to [1 - clip, 1 + clip])")
    assert err_win.ndim == 1, "one error per video, (B,)"
    assert err_win.shape == err_lose.shape == ref_err_win.shape == ref_err_lose.shape, "four errors of one shape, (B,)"
    assert weight_win.shape == weight_lose.shape == err_win.shape, "one weight per video, (B,)"
    win_gap = err_win - ref_err_win
    lose_gap = err_lose - ref_err_lose
    margin = -beta * (win_gap - lose_gap)
    loss_dpo = -F.logsigmoid(margin)
    weight = torch.minimum(weight_win, weight_lose).detach()
    kept = (weight >= threshold).to(margin.dtype)
    # A product, not torch.where: NaN errors must not pass as a masked pair.
    losses = kept * weight.clamp(1 - clip, 1 + clip) * loss_dpo
    metrics = {"loss_dpo": loss_dpo, "kept": kept, "weight_win": weight_win, "weight_lose": weight_lose,
               "margin": margin, "accuracy": (1 + margin.sign()) / 2, "win_gap": win_gap, "lose_gap": lose_gap,
               "dgr": beta * torch.sigmoid(-margin), "reward_win": -beta * win_gap, "reward_lose": -beta * lose_gap}
    return losses, {name: value.detach() for name, value in metrics.items()}


def sdpo_loss(err_win, err_lose, ref_err_win, ref_err_lose, beta, weight_win, weight_lose, clip):
    """
    SDPO, importance-sampled DPO (arXiv 2505.21893; called SIPO in its third version), weights inside the sigmoid.
    Everything (B,):

        losses = -log sigmoid(logit),   logit = -beta * (w_win * win_gap - w_lose * lose_gap)
        w      = clamp(weight, 1 - clip, 1 + clip) of each branch, detached   (weight <= 1: only 1 - clip acts)

    c_win, c_lose = w_win * dgr, w_lose * dgr, with dgr of the logit. That weights are inside and one per branch is
    inferred from descriptions of the third version, whose equations are not public. Its beta for video (0.02) has
    another unit.
    Weights come from importance_weight; the metrics hold them unclipped, and loss_dpo without them.
    Not Diffusion-SDPO, which is diffusion_sdpo_loss below. ValueError: beta <= 0; clip outside [0, 1] (0 is plain DPO).
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}: expected a number above 0")
    if not 0 <= clip <= 1:
        raise ValueError(f"clip is {clip}: expected [0, 1] (weights are clipped to [1 - clip, 1 + clip])")
    assert err_win.ndim == 1, "one error per video, (B,)"
    assert err_win.shape == err_lose.shape == ref_err_win.shape == ref_err_lose.shape, "four errors of one shape, (B,)"
    assert weight_win.shape == weight_lose.shape == err_win.shape, "one weight per video, (B,)"
    win_gap = err_win - ref_err_win
    lose_gap = err_lose - ref_err_lose
    w_win = weight_win.detach().clamp(1 - clip, 1 + clip)
    w_lose = weight_lose.detach().clamp(1 - clip, 1 + clip)
    logit = -beta * (w_win * win_gap - w_lose * lose_gap)
    margin = -beta * (win_gap - lose_gap)
    losses = -F.logsigmoid(logit)
    metrics = {"loss_dpo": -F.logsigmoid(margin), "logit": logit, "weight_win": weight_win, "weight_lose": weight_lose,
               "margin": margin, "accuracy": (1 + margin.sign()) / 2, "win_gap": win_gap, "lose_gap": lose_gap,
               "dgr": beta * torch.sigmoid(-logit), "reward_win": -beta * win_gap, "reward_lose": -beta * lose_gap}
    return losses, {name: value.detach() for name, value in metrics.items()}


def ipo_loss(err_win, err_lose, ref_err_win, ref_err_lose, tau):
    """
    IPO (Azar et al. 2023, Eq. 17) on velocity errors, which stops at a finite margin, where DPO pulls for ever. All
    errors (B,):

        losses = (margin - 1 / (2 * tau))^2,   margin = lose_gap - win_gap, without beta

    1 / (4 tau^2) where policy and reference agree. c_win, c_lose = 2 * (1 / (2 tau) - margin), both: negative past the
    target, where they pull back. Gaps are 1e-3 to 1e-2, hence tau 25 to 100 (target 0.02 to 0.005).
    ValueError unless tau > 0.
    """
    if not tau > 0:
        raise ValueError(f"tau is {tau}: expected a number above 0")
    assert err_win.ndim == 1, "one error per video, (B,)"
    assert err_win.shape == err_lose.shape == ref_err_win.shape == ref_err_lose.shape, "four errors of one shape, (B,)"
    win_gap = err_win - ref_err_win
    lose_gap = err_lose - ref_err_lose
    margin = lose_gap - win_gap
    losses = (margin - 1 / (2 * tau)).square()
    metrics = {"margin": margin, "accuracy": (1 + margin.sign()) / 2, "win_gap": win_gap, "lose_gap": lose_gap}
    return losses, {name: value.detach() for name, value in metrics.items()}


def dpop_loss(err_win, err_lose, ref_err_win, ref_err_lose, beta, penalty):
    """
    DPO-Positive (Pal et al. 2024, arXiv 2402.13228) on velocity errors: a win denoised worse than by the reference
    pushes back. All errors (B,):

        losses = -log sigmoid(logit),   logit = margin - beta * penalty * max(win_gap, 0)

    c_win, c_lose = dgr * (1 + penalty), dgr where win_gap > 0; elsewhere dgr, dgr, as in dpo_loss.
    loss_dpo in the metrics is -log sigmoid(margin), without the penalty.
    ValueError: beta <= 0; penalty < 0.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}: expected a number above 0")
    if not penalty >= 0:
        raise ValueError(f"penalty is {penalty}: expected 0 or more")
    assert err_win.ndim == 1, "one error per video, (B,)"
    assert err_win.shape == err_lose.shape == ref_err_win.shape == ref_err_lose.shape, "four errors of one shape, (B,)"
    win_gap = err_win - ref_err_win
    lose_gap = err_lose - ref_err_lose
    margin = -beta * (win_gap - lose_gap)
    logit = margin - beta * penalty * F.relu(win_gap)                # relu'(0) = 0: the first step is plain DPO's
    losses = -F.logsigmoid(logit)
    metrics = {"loss_dpo": -F.logsigmoid(margin), "logit": logit, "margin": margin, "accuracy": (1 + margin.sign()) / 2,
               "win_gap": win_gap, "lose_gap": lose_gap, "dgr": beta * torch.sigmoid(-logit),
               "reward_win": -beta * win_gap, "reward_lose": -beta * lose_gap}
    return losses, {name: value.detach() for name, value in metrics.items()}


def safeguard_coefficient(v_pred_win, v_target_win, v_pred_lose, v_target_lose, mu, mask=None):
    """
    Diffusion-SDPO's safeguard (arXiv 2511.03317), the factor for the lose branch's gradient: four (B, ...) -> (B,) in
    [0, 1], detached. With d_win = v_pred_win - v_target_win and d_lose likewise (the gradients of the two errors with
    respect to the outputs, up to a factor 2 / N):

        1 where <d_win, d_lose> <= 0, else min(1, (1 - mu) * |d_win|^2 / <d_win, d_lose>)

    so that a step in output space along -d_win + coefficient * d_lose has <step, d_win> <= -mu * |d_win|^2: to first
    order the win error falls. mu in [0, 1]; published values are 0.9 (SD1.5) and 0.6 (SDXL). One factor per video is
    inferred: the public code takes one per batch, and adds 1e-9 to a divisor that cannot be 0 here. mask (1 = counts):
    see flow_error. Needs the outputs of both videos in one place. ValueError if mu is outside [0, 1] or the shapes
    differ.
    """
    if not 0 <= mu <= 1:
        raise ValueError(f"mu is {mu}: expected [0, 1]")
    if not v_pred_win.shape == v_target_win.shape == v_pred_lose.shape == v_target_lose.shape:
        raise ValueError(f"v_pred_win, v_target_win, v_pred_lose, v_target_lose are {tuple(v_pred_win.shape)}, "
                         f"{tuple(v_target_win.shape)}, {tuple(v_pred_lose.shape)}, {tuple(v_target_lose.shape)}: "
                         f"expected equal shapes (B, ...)")
    dtype = torch.promote_types(torch.promote_types(v_pred_win.dtype, v_target_win.dtype), torch.float32)
    d_win = (v_pred_win.detach().to(dtype) - v_target_win.to(dtype)).flatten(1)        # (B, C*F*H*W)
    d_lose = (v_pred_lose.detach().to(dtype) - v_target_lose.to(dtype)).flatten(1)     # (B, C*F*H*W)
    if mask is not None:                                           # d_lose enters through its product with d_win alone
        d_win = d_win * mask.to(dtype).expand(v_pred_win.shape).flatten(1)
    dot = (d_win * d_lose).mean(1)                                 # (B,); a mask's count cancels in bound / dot
    bound = (1 - mu) * d_win.square().mean(1)                                          # (B,)
    return torch.where(dot > bound, bound / dot, torch.ones_like(dot))                 # dot <= 0 <= bound: 1


def diffusion_sdpo_loss(err_win, err_lose, ref_err_win, ref_err_lose, beta, safeguard):
    """
    Diffusion-SDPO, safeguarded DPO (arXiv 2511.03317): the value of dpo_loss, with the lose branch's gradient
    multiplied by safeguard, (B,) in [0, 1], from safeguard_coefficient. All errors (B,).

    c_win, c_lose = dgr, safeguard * dgr.
    Not SDPO of arXiv 2505.21893, which is sdpo_loss. ValueError unless beta > 0.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}: expected a number above 0")
    assert err_win.ndim == 1, "one error per video, (B,)"
    assert err_win.shape == err_lose.shape == ref_err_win.shape == ref_err_lose.shape, "four errors of one shape, (B,)"
    assert safeguard.shape == err_win.shape, "one safeguard per pair, (B,)"
    err_lose = err_lose.detach() + safeguard * (err_lose - err_lose.detach())      # the same value, a smaller gradient
    win_gap = err_win - ref_err_win
    lose_gap = err_lose - ref_err_lose
    margin = -beta * (win_gap - lose_gap)
    losses = -F.logsigmoid(margin)
    metrics = {"loss_dpo": losses, "safeguard": safeguard, "margin": margin, "accuracy": (1 + margin.sign()) / 2,
               "win_gap": win_gap, "lose_gap": lose_gap, "dgr": beta * torch.sigmoid(-margin),
               "reward_win": -beta * win_gap, "reward_lose": -beta * lose_gap}
    return losses, {name: value.detach() for name, value in metrics.items()}


# ----------------------------------------------------------------------------------------------------------------------
# online, step by step; and the model that judges


def spo_loss(logp_win, logp_lose, ref_logp_win, ref_logp_lose, beta, clip):
    """
    SPO, step-aware preference optimisation (arXiv 2406.04314, after its public code), for two next states drawn from
    one x_sigma. Everything (B,):

        losses    = -log sigmoid(logit),   logit = beta * (log_ratio_win - log_ratio_lose)
        log_ratio = clamp(logp - ref_logp, log(1 - clip), log(1 + clip))

    logp: log-probability of that transition, *mean* over its elements, so beta (10 in SPO, 500 in LPO) has another unit
    than an error's beta. A branch outside the clip has no gradient in either direction (this is not PPO's minimum, and
    the ratio is to the reference), and |logit| <= beta * log((1 + clip) / (1 - clip)): 2.007 for 10 and 0.1. In the
    metrics margin, accuracy and rewards are those before the clamp, the ratios those after it; clipped is the fraction
    of the pair's two branches outside the clip.
    ValueError: beta <= 0; clip outside (0, 1).
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}: expected a number above 0")
    if not 0 < clip < 1:
        raise ValueError(f"clip is {clip}: expected (0, 1) (ratios are clipped to [1 - clip, 1 + clip])")
    assert logp_win.ndim == 1, "one number per transition, (B,)"
    assert logp_win.shape == logp_lose.shape == ref_logp_win.shape == ref_logp_lose.shape, "four of one shape, (B,)"
    low, high = torch.log1p(torch.tensor([-clip, clip], dtype=torch.float64)).tolist()
    log_ratio_win = logp_win - ref_logp_win
    log_ratio_lose = logp_lose - ref_logp_lose
    inside_win = log_ratio_win.clamp(low, high)                      # clamped as logs, so that no ratio overflows
    inside_lose = log_ratio_lose.clamp(low, high)
    logit = beta * (inside_win - inside_lose)
    margin = beta * (log_ratio_win - log_ratio_lose)
    losses = -F.logsigmoid(logit)
    clipped = ((inside_win != log_ratio_win).to(margin.dtype) + (inside_lose != log_ratio_lose).to(margin.dtype)) / 2
    metrics = {"loss_dpo": losses, "logit": logit, "margin": margin, "accuracy": (1 + margin.sign()) / 2,
               "ratio_win": inside_win.exp(), "ratio_lose": inside_lose.exp(), "clipped": clipped,
               "reward_win": beta * log_ratio_win, "reward_lose": beta * log_ratio_lose}
    return losses, {name: value.detach() for name, value in metrics.items()}


def preference_loss(score_win, score_lose):
    """
    Bradley-Terry (1952), to train a model of preferences. Scores (B,), on a logit scale:

        losses = -log sigmoid(margin),   margin = score_win - score_lose
    """
    assert score_win.ndim == 1 and score_win.shape == score_lose.shape, "one score per video, (B,)"
    margin = score_win - score_lose
    losses = -F.logsigmoid(margin)
    metrics = {"margin": margin, "accuracy": (1 + margin.sign()) / 2, "score_win": score_win, "score_lose": score_lose}
    return losses, {name: value.detach() for name, value in metrics.items()}
