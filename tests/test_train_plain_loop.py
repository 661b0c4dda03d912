"""
Every objective as train.py runs it, against a plain loop written here in float64: own losses, importance weights,
AdamW, learning rate, clipping, average and mean over the pairs. Of the trainer's data only order(), draw() and
randomness() are used, which have tests of their own. Logged rows, final weights and final average are compared.
"""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import on_ranks, train_main
from data import draw, order, randomness
from fsdp_utils import make_optimizer
from model import CONFIGS, ScoreHead, WanModel
from step_folder import stored_weights
from weights import open_wan

# Each of these matters in seven steps: the learning rate rises in three and falls in the last, the average leaves its
# warm-up at the fourth step, an epoch (24 pairs) ends before the last, and weights decay nearly as fast as they learn.
SETTINGS = {
    "seed": 5, "steps": 7, "batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 3, "decay_steps": 2,
    "weight_decay": 3.0, "max_grad_norm": 2.0, "loss_scale": 0.0, "ema_decay": 0.28, "flow_shift": 2.5,
    "min_timestep": 150.0, "max_timestep": 950.0, "timestep_sampling": "logit_normal"}
PAIRS = 24    # of the fixture `world`


# ------------------------------------------------------------------------------------------------------------------
# objectives: (settings, pair) -> losses (B,), and the numbers that the log must hold, {name: (B,)}

def margin_of(settings, pair):
    win_gap, lose_gap = pair.err_win - pair.ref_err_win, pair.err_lose - pair.ref_err_lose
    return settings.beta * (lose_gap - win_gap)


def plain_sft(settings, pair):
    return pair.err_win, {"loss_sft": pair.err_win}


def plain_dpo(settings, pair):
    margin = margin_of(settings, pair)
    return torch.log(1 + torch.exp(-margin)), {"margin": margin}


def plain_regdpo(settings, pair):
    loss_dpo, metrics = plain_dpo(settings, pair)
    if not hasattr(settings, "r"):
        dgr = settings.beta / (1 + torch.exp(metrics["margin"]))
        r = torch.maximum(settings.r_scale * dgr, torch.tensor(settings.r_min)).detach()
    else:
        r = torch.full_like(loss_dpo, settings.r)
    return loss_dpo + r * pair.err_win, metrics | {"loss_dpo": loss_dpo, "r": r}


def plain_weight(settings, err, sigma):
    """exp(-KL / elements) of one step of a sampler whose uniform grid is shifted by flow_shift."""
    shift = settings.flow_shift
    uniform = sigma / (shift - (shift - 1) * sigma)
    uniform_next = uniform - 1 / settings.weight_steps
    assert (uniform_next > 0).all(), "the end of the grid has a rule of its own"
    sigma_next = shift * uniform_next / (1 + (shift - 1) * uniform_next)
    snr, snr_next = ((1 - sigma) / sigma) ** 2, ((1 - sigma_next) / sigma_next) ** 2
    return torch.exp(-(snr_next - snr) * sigma ** 2 / 2 * err.detach())


def plain_weights(settings, pair):
    weight_win = plain_weight(settings, pair.err_win, pair.sigma)
    return weight_win, plain_weight(settings, pair.err_lose, pair.sigma)


def plain_dpo_cm(settings, pair):
    loss_dpo, metrics = plain_dpo(settings, pair)
    weight_win, weight_lose = plain_weights(settings, pair)
    smaller = torch.minimum(weight_win, weight_lose)
    kept = (smaller >= settings.threshold).double()
    clipped = smaller.clamp(1 - settings.clip, 1 + settings.clip)
    metrics |= {"kept": kept, "weight_win": weight_win, "weight_lose": weight_lose}
    return kept * clipped * loss_dpo, metrics


def plain_sdpo(settings, pair):
    weight_win, weight_lose = plain_weights(settings, pair)
    limits = (1 - settings.clip, 1 + settings.clip)
    win_gap, lose_gap = pair.err_win - pair.ref_err_win, pair.err_lose - pair.ref_err_lose
    logit = -settings.beta * (weight_win.clamp(*limits) * win_gap - weight_lose.clamp(*limits) * lose_gap)
    metrics = {"margin": margin_of(settings, pair), "weight_win": weight_win, "weight_lose": weight_lose}
    return torch.log(1 + torch.exp(-logit)), metrics


def plain_ipo(settings, pair):
    margin = margin_of(SimpleNamespace(beta=1.0), pair)
    return (margin - 1 / (2 * settings.tau)) ** 2, {"margin": margin}


def plain_dpop(settings, pair):
    margin = margin_of(settings, pair)
    worse = torch.relu(pair.err_win - pair.ref_err_win)
    return torch.log(1 + torch.exp(-margin + settings.beta * settings.penalty * worse)), {"margin": margin}


def plain_diffusion_sdpo(settings, pair):
    v_win, target_win, v_lose, target_lose = pair.outputs
    d_win, d_lose = (v_win - target_win).detach().flatten(1), (v_lose - target_lose).detach().flatten(1)
    bound = (1 - settings.mu) * (d_win * d_win).sum(1) / (d_win * d_lose).sum(1)
    safeguard = torch.where(bound > 0, bound.clamp(max=1), 1.0)
    err_lose = pair.err_lose.detach() + safeguard * (pair.err_lose - pair.err_lose.detach())
    margin = settings.beta * ((err_lose - pair.ref_err_lose) - (pair.err_win - pair.ref_err_win))
    return torch.log(1 + torch.exp(-margin)), {"margin": margin, "safeguard": safeguard}


def plain_preference(settings, pair):
    margin = pair.err_win - pair.err_lose                  # of two scores
    return torch.log(1 + torch.exp(-margin)), {"margin": margin, "score_win": pair.err_win, "score_lose": pair.err_lose}


OBJECTIVES = {
    "sft": plain_sft, "dpo": plain_dpo, "regdpo": plain_regdpo, "dpo_cm": plain_dpo_cm, "sdpo": plain_sdpo,
    "ipo": plain_ipo, "dpop": plain_dpop, "diffusion_sdpo": plain_diffusion_sdpo, "preference": plain_preference}


# ------------------------------------------------------------------------------------------------------------------
# the plain loop

def plain_model(folder, loss, seed):
    """The model to train, in float64, and the names of the weights that learn."""
    config, _ = open_wan(folder)
    model = WanModel(config).double()
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    if loss != "preference":
        return model, [name for name, _ in model.named_parameters()]
    torch.manual_seed(seed)
    model.head = ScoreHead(config).double()
    scores = WanModel(type(config)(**vars(config) | {"scores": True})).double()
    scores.load_state_dict(model.state_dict())
    return scores, [name for name, _ in scores.named_parameters() if name.startswith("head.")]


def plain_pair(folder, settings, position):
    """Latents of win and lose, noise, sigma and context at a position of the run, in float64."""
    index = order(settings.seed, position, PAIRS)
    win, lose = (load_file(folder / kind / f"{index:03d}.safetensors") for kind in ("real", "negatives"))
    shift = 1.0 if settings.loss == "preference" else settings.flow_shift
    limits = (shift, settings.min_timestep, settings.max_timestep, settings.timestep_sampling)
    sigma, noise = draw(settings.seed, position, win["latents"].shape, *limits)
    context = win["context"].double()
    if settings.loss == "sft" and torch.rand((), generator=randomness(settings.seed, position, "dropout")) < 0.4:
        context = context[:0]
    sigma = torch.tensor(sigma).double()                   # as float32 has it
    return SimpleNamespace(win=win["latents"].double(), lose=lose["latents"].double(), noise=noise.double(),
                           sigma=sigma, context=context)


def plain_error(model, latents, pair):
    """The mean squared error of one video's velocity, or its score; the velocity and its target."""
    x_sigma = (1 - pair.sigma) * latents + pair.sigma * pair.noise
    v_pred = model(x_sigma[None], 1000 * pair.sigma[None], pair.context[None])
    if model.config.scores:
        return v_pred, None, None
    v_target = (pair.noise - latents)[None]
    return ((v_pred - v_target) ** 2).mean().view(1), v_pred, v_target


def plain_errors(model, pairs):
    """What an objective sees of these pairs, (B,) each: errors of both branches, sigma, outputs."""
    win = [plain_error(model, pair.win, pair) for pair in pairs]
    lose = [plain_error(model, pair.lose, pair) for pair in pairs]
    columns = []
    if not model.config.scores:
        columns = [torch.cat([branch[column] for branch in branches]) for branches in (win, lose) for column in (1, 2)]
    err_win, err_lose = torch.cat([err for err, _, _ in win]), torch.cat([err for err, _, _ in lose])
    sigma = torch.stack([pair.sigma for pair in pairs])
    return SimpleNamespace(err_win=err_win, err_lose=err_lose, sigma=sigma, outputs=columns)


def plain_learning_rate(settings, step):
    full = settings.learning_rate
    if step < settings.warmup_steps:
        return full * (step + 1) / settings.warmup_steps
    left = settings.steps - step                           # this step included
    return full * left / settings.decay_steps if left < settings.decay_steps else full


class PlainAdamW:
    """Loshchilov and Hutter 2019, Algorithm 2; norms, biases and modulation do not decay."""
    def __init__(self, weights, decay, eps):
        self.weights, self.decay, self.eps, self.count = weights, decay, eps, 0
        self.first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    def step(self, gradients, learning_rate):
        self.count += 1
        for name, weight in self.weights.items():
            self.first[name] = 0.9 * self.first[name] + 0.1 * gradients[name]
            self.second[name] = 0.95 * self.second[name] + 0.05 * gradients[name] ** 2
            mean = self.first[name] / (1 - 0.9 ** self.count)
            root = (self.second[name] / (1 - 0.95 ** self.count)).sqrt()
            is_matrix = weight.ndim >= 2 and not name.endswith("modulation")
            weight -= learning_rate * (self.decay if is_matrix else 0.0) * weight
            weight -= learning_rate * mean / (root + self.eps)


def plain_run(base, data, settings):
    """Rows of the log, and {name: weight} of the policy and of its average after the last step."""
    model, names = plain_model(base, settings.loss, settings.seed)
    ref, _ = plain_model(base, settings.loss, settings.seed)
    weights = {name: weight.data for name, weight in model.named_parameters() if name in names}
    average = {name: weight.data.clone() for name, weight in model.named_parameters()}
    beta = getattr(settings, "beta", 1.0)
    loss_scale = settings.loss_scale or (settings.tau if settings.loss == "ipo" else 1 / beta)
    optimizer = PlainAdamW(weights, settings.weight_decay, 1e-8 * loss_scale)
    rows = []
    for step in range(settings.steps):
        begin = step * settings.batch_size
        pairs = [plain_pair(data, settings, position) for position in range(begin, begin + settings.batch_size)]
        seen = plain_errors(model, pairs)
        with torch.no_grad():
            of_ref = plain_errors(ref, pairs)
        seen.ref_err_win, seen.ref_err_lose = of_ref.err_win, of_ref.err_lose
        losses, metrics = OBJECTIVES[settings.loss](settings, seen)
        counted = metrics["kept"].sum().item() if "kept" in metrics else settings.batch_size
        loss = losses.sum() / max(1, counted)

        learning = [weight for name, weight in model.named_parameters() if name in names]
        gradients = torch.autograd.grad(loss_scale * loss, learning, retain_graph=True)
        norm = math.sqrt(sum((gradient ** 2).sum().item() for gradient in gradients))
        shrink = min(1.0, settings.max_grad_norm / norm) if norm else 1.0
        gradients = {name: shrink * gradient for name, gradient in zip(names, gradients)}
        learning_rate = plain_learning_rate(settings, step)
        rows.append(plain_row(settings, step, seen, losses, metrics) |
                    {"loss": loss.item(), "grad_norm": norm, "lr": learning_rate, "step": step, "skipped": 0})
        if counted:
            optimizer.step(gradients, learning_rate)
            decay = min(settings.ema_decay, (step + 1) / (step + 10))
            for name, weight in model.named_parameters():
                average[name] = decay * average[name] + (1 - decay) * weight.data
    return rows, dict(model.state_dict()), average


def plain_row(settings, step, seen, losses, metrics):
    """What the log must say of the pairs of a step: means over all of them, of some by quarters of sigma too."""
    if settings.loss == "sft":
        return {"err_win": seen.err_win.mean().item(), "loss_sft": seen.err_win.mean().item()}
    margin = metrics["margin"].detach()
    c_win, c_lose = torch.autograd.grad(losses.sum(), (seen.err_win, seen.err_lose), retain_graph=True)
    columns = metrics | {"c_win": c_win, "c_lose": -c_lose, "margin_abs": margin.abs(),
                         "accuracy": (margin > 0).double() + (margin == 0).double() / 2}
    binned = {"margin": margin, "accuracy": columns["accuracy"]}
    if settings.loss != "preference":
        columns |= {name: getattr(seen, name) for name in ("err_win", "err_lose", "ref_err_win", "ref_err_lose")}
        columns |= {"win_gap": seen.err_win - seen.ref_err_win, "lose_gap": seen.err_lose - seen.ref_err_lose}
        binned |= {name: columns[name] for name in ("err_win", "win_gap", "lose_gap")}
    row = {name: values.mean().item() for name, values in columns.items()}
    row |= {"margin_min": margin.min().item(), "margin_max": margin.max().item()}
    quarters = (4 * seen.sigma).floor()
    row["by_sigma"] = {}
    for name, values in binned.items():
        parts = [values[quarters == quarter] for quarter in range(4)]
        row["by_sigma"][name] = [part.mean().item() if len(part) else None for part in parts]
    return row


# ------------------------------------------------------------------------------------------------------------------
# the comparison

def trained(base, data, out, settings, ranks, flags):
    """The same run by train.py: rows of the log, {name: weight} of the policy, of the average, and what is exported."""
    argv = ["--init", str(base), "--data", str(data), "--out", str(out), *flags.split()]
    for name, value in vars(settings).items():
        argv += [f"--{name}", str(value)]
    on_ranks(ranks, train_main, argv)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    states = []
    for part in ("policy", "ema"):
        tensors, read = stored_weights(out / f"step_{settings.steps:06d}", part)
        states.append({name: read(name) for name in tensors})
    return rows, *states, load_file(out / "export" / "diffusion_pytorch_model.safetensors")


def assert_same_rows(rows, expected):
    for row, plain in zip(rows, expected, strict=True):
        for name, value in plain.items():
            if name == "by_sigma":
                assert row[name].keys() == value.keys(), row["step"]
                for key, quarters in value.items():
                    for got, number in zip(row[name][key], quarters, strict=True):
                        assert is_same(key, got, number, plain), (row["step"], "by_sigma", key)
            else:
                assert is_same(name, row[name], value, plain), (row["step"], name, row[name], value)


def is_same(name, got, expected, plain):
    """Is a number of a row the plain loop's but for float32? Margins are differences of errors about 3, times beta."""
    if expected is None or got is None:                    # no pair in this quarter
        return got is expected
    slack = 3e-4 * plain["margin_abs"] + 1e-4 if name.startswith("margin") else 3e-6
    return got == pytest.approx(expected, rel=5e-5, abs=slack)


def assert_same_weights(weights, expected, start):
    """Compared to how far each tensor moved; equal starts must not hide unequal steps."""
    assert weights.keys() == expected.keys()
    differences, paths = [], []
    for name, wanted in expected.items():
        path, difference = (wanted - start[name]).flatten(), (weights[name].double() - wanted).flatten()
        assert difference.norm() <= 5e-3 * path.norm() + 1e-7, (name, difference.norm() / path.norm())
        paths.append(path)
        differences.append(difference)
    assert torch.cat(differences).norm() <= 5e-4 * torch.cat(paths).norm()


WITH_WEIGHTS = {"beta": 20.0, "weight_steps": 40}
CASES = {   # ranks, how the run is cut, settings
    "sft": (1, "--grad_accum 2", {"loss": "sft", "caption_dropout": 0.4}),
    "dpo": (2, "--backward pair", {"loss": "dpo", "beta": 20.0}),
    "regdpo": (1, "--backward sequential", {"loss": "regdpo", "beta": 20.0, "r_scale": 0.7, "r_min": 7.5}),
    "regdpo with a fixed r": (1, "", {"loss": "regdpo", "beta": 20.0, "r": 4.0, "loss_scale": 0.1}),
    "dpo_cm": (2, "--grad_accum 2", {"loss": "dpo_cm", **WITH_WEIGHTS, "threshold": 0.965, "clip": 0.02}),
    "sdpo": (1, "--ref cached", {"loss": "sdpo", **WITH_WEIGHTS, "clip": 0.08}),
    "ipo": (1, "", {"loss": "ipo", "tau": 5.0}),
    "dpop": (1, "--checkpointing full", {"loss": "dpop", "beta": 20.0, "penalty": 3.0}),
    "diffusion_sdpo": (1, "--backward sequential", {"loss": "diffusion_sdpo", "beta": 20.0, "mu": 0.4}),
    "preference": (1, "", {"loss": "preference", "max_grad_norm": 0.18}),
}


def test_every_objective_is_compared_with_a_plain_loop():
    assert {changes["loss"] for _, _, changes in CASES.values()} == set(train.OBJECTIVES)


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_plain_loop(world, base, tmp_path, name):
    ranks, flags, changes = CASES[name]
    settings = SimpleNamespace(**SETTINGS | changes)
    rows, policy, average, exported = trained(base, world / "data", tmp_path / "out", settings, ranks, flags)
    expected, plain_policy, plain_average = plain_run(base, world / "data", settings)
    assert_same_rows(rows, expected)
    model, _ = plain_model(base, settings.loss, settings.seed)
    start = model.state_dict()
    assert_same_weights(policy, plain_policy, start)
    assert_same_weights(average, plain_average, start)
    assert all(torch.equal(exported[name], weight) for name, weight in average.items())

    norms = [row["grad_norm"] for row in rows]             # the run did what it is there for
    assert min(norms) < settings.max_grad_norm < max(norms)
    if settings.loss == "dpo_cm":                          # some pairs are dropped, in the last step all of them
        kept = [row["kept"] for row in rows]
        assert 0 < min(kept[:-1]) < max(kept) < 1 and kept[-1] == 0


def test_from_scratch_a_run_starts_at_the_weights_that_its_seed_draws(world, tmp_path):
    settings = SimpleNamespace(loss="sft", seed=9, steps=1, batch_size=1, learning_rate=1e-12, weight_decay=0.0)
    _, policy, average, _ = trained("scratch", world / "data", tmp_path / "out", settings, 1, "")
    torch.manual_seed(9)
    for name, weight in WanModel(CONFIGS["tiny"]).state_dict().items():
        assert torch.allclose(policy[name], weight, rtol=0, atol=1e-9), name
        assert torch.allclose(average[name], weight, rtol=0, atol=1e-9), name


# ------------------------------------------------------------------------------------------------------------------
# the optimizer

def test_the_optimizer_scales_eps_with_the_loss_and_decays_matrices_only():
    # gradients as small as eps: m / (sqrt(v) + eps) is 1/2, so a step at learning rate 0.1 takes 0.05 from all;
    # weights are 1, so a decay of 0.2 takes 0.1 * 0.2 * 1 from those that decay
    model = torch.nn.Module()
    shapes = {"matrix": (3, 4), "convolution": (3, 4, 1, 2, 2), "bias": (3,), "modulation": (1, 6, 3),
              "emb_pos": (1, 5, 4), "frozen": (3, 3)}
    for name, shape in shapes.items():
        setattr(model, name, torch.nn.Parameter(torch.ones(shape), requires_grad=name != "frozen"))
    for loss_scale in (1.0, 1e-3):
        for param in model.parameters():
            param.data.fill_(1.0)
            param.grad = torch.full_like(param, 1e-8 * loss_scale)
        optimizer = make_optimizer(model, 0.2, loss_scale)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
        expected = {"matrix": 0.93, "convolution": 0.93, "bias": 0.95, "modulation": 0.95, "emb_pos": 0.95,
                    "frozen": 1.0}
        for name, value in expected.items():
            assert torch.allclose(getattr(model, name), torch.tensor(value), rtol=0, atol=1e-5), (name, loss_scale)
