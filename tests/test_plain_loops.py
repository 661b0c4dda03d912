"""
Every objective as train.py runs it, and SPO as train_spo.py does, against plain loops written here in float64: own
losses, importance weights, AdamW, learning rate, clipping, average and mean over the pairs. Nothing of the trainers is
used, only order(), draw() and randomness() of data.py and the sampler's steps, which have tests of their own. Logged
rows, final weights and final average are compared.
"""
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from conftest import on_ranks, spo_main, train_main
from data import draw, order, randomness
from fsdp_utils import make_optimizer
from model import CONFIGS, ScoreHead, WanModel
from sample import step_coefficients, step_distribution, uniform_grid
from step_folder import stored_weights
from weights import open_wan

# Each of these matters in seven steps: the learning rate rises in three and falls in the last, the average leaves its
# warm-up at the sixth step (so late that the last weights still remember it), an epoch (24 pairs) ends before the last,
# and weights decay nearly as fast as they learn.
SETTINGS = {
    "seed": 5, "steps": 7, "batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 3, "decay_steps": 2,
    "weight_decay": 3.0, "max_grad_norm": 2.0, "loss_scale": 0.0, "ema_decay": 0.39, "flow_shift": 2.5,
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
        context = load_file(folder / "real" / "empty_caption.context")["context"].double()
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
    """The inputs of an objective for these pairs, (B,) each: errors of both branches, sigma, outputs."""
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
    """
    The row that the log must have for the pairs of a step: means over all of them, some also by quarters of sigma.
    """
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

def trained(main, base, data, out, settings, ranks, flags):
    """The run by a trainer: rows of the log, {name: weight} of the policy, of the average, and what is exported."""
    argv = ["--init", str(base), "--data", str(data), "--out", str(out), *flags.split()]
    for name, value in vars(settings).items():
        argv += [f"--{name}", *str(value).split()]
    if ranks == 1:
        main(argv)                                         # in this process, which starts no other
    else:
        on_ranks(ranks, main, argv)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    states = []
    for part in ("policy", "ema"):
        tensors, read = stored_weights(out / f"step_{settings.steps:06d}", part)
        states.append({name: read(name) for name in tensors})
    return rows, *states, load_file(out / "export" / "diffusion_pytorch_model.safetensors")


def step_numbers(out):
    return sorted(int(folder.name.removeprefix("step_")) for folder in out.glob("step_*"))


def assert_same_rows(rows, expected):
    for row, plain in zip(rows, expected, strict=True):
        for name, value in plain.items():
            if isinstance(value, dict):                    # by_sigma, by_step: lists
                assert row[name].keys() == value.keys(), row["step"]
                for key, numbers in value.items():
                    for got, number in zip(row[name][key], numbers, strict=True):
                        assert is_same(key, got, number, plain), (row["step"], name, key)
            else:
                assert is_same(name, row[name], value, plain), (row["step"], name, row[name], value)


def is_same(name, got, expected, plain):
    """
    Whether a number of a row equals the plain loop's up to float32. Margins are differences of errors about 3, times
    beta.
    """
    if expected is None or got is None:                    # no pair in this quarter, or at this sampler step
        return got is expected
    slack = 3e-4 * plain["margin_abs"] + 1e-4 if name.startswith("margin") else 3e-6
    return got == pytest.approx(expected, rel=5e-5, abs=slack)


def assert_same_weights(weights, expected, start):
    """Differences are relative to how far each tensor moved: equal starts must not hide unequal steps."""
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
    "ipo": (1, "--save_every 3 --keep 9", {"loss": "ipo", "tau": 5.0}),
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
    data = tmp_path / "data"
    shutil.copytree(world / "data", data)
    save_file({"context": torch.full((2, 32), 0.5)}, data / "real" / "empty_caption.context")
    rows, policy, average, exported = trained(train_main, base, data, tmp_path / "out", settings, ranks, flags)
    expected, plain_policy, plain_average = plain_run(base, data, settings)
    assert_same_rows(rows, expected)
    model, _ = plain_model(base, settings.loss, settings.seed)
    start = model.state_dict()
    assert_same_weights(policy, plain_policy, start)
    assert_same_weights(average, plain_average, start)
    assert all(torch.equal(exported[name], weight) for name, weight in average.items())

    norms = [row["grad_norm"] for row in rows]             # the run did what it is there for
    assert min(norms) < settings.max_grad_norm < max(norms)
    if name == "ipo":
        assert step_numbers(tmp_path / "out") == [3, 6, 7]
    if settings.loss == "dpo_cm":                          # some pairs are dropped, in the last step all of them
        kept = [row["kept"] for row in rows]
        assert 0 < min(kept[:-1]) < max(kept) < 1 and kept[-1] == 0


def test_from_scratch_a_run_starts_at_the_weights_that_its_seed_draws(world, tmp_path):
    settings = SimpleNamespace(loss="sft", seed=9, steps=1, batch_size=1, learning_rate=1e-12, weight_decay=0.0)
    _, policy, average, _ = trained(train_main, "scratch", world / "data", tmp_path / "out", settings, 1, "")
    torch.manual_seed(9)
    for name, weight in WanModel(CONFIGS["tiny"]).state_dict().items():
        assert torch.allclose(policy[name], weight, rtol=0, atol=1e-9), name
        assert torch.allclose(average[name], weight, rtol=0, atol=1e-9), name


# ------------------------------------------------------------------------------------------------------------------
# SPO

SPO_SETTINGS = {
    "seed": 5, "steps": 3, "batch_size": 4, "sample_steps": 6, "flow_shift": 2.5, "unbranched": 0.2, "pool": 3,
    "threshold": "0.005 0.03", "beta": 30.0, "clip": 0.15, "updates": 2, "learning_rate": 2e-3, "warmup_steps": 3,
    "weight_decay": 3.0, "max_grad_norm": 1.0, "ema_decay": 0.32}
SPO_POOLS = range(2, 5)    # of six sampler steps, a fifth (two) without a pool, and the last has none


def spo_noise(settings, stream, positions, shape):
    draws = [torch.randn(shape, generator=randomness(settings.seed, position, stream)) for position in positions]
    return torch.stack(draws).double()


def run_plain(model, x, sigma, context):
    return model(x, torch.full((len(x),), 1000 * sigma).double(), context)


def plain_roll_out(settings, policy, ref, judge, context, positions):
    """[(sigma, sigma_next, parent, best, worst, scores (B, pool), is a pair (B,))], one for each pool."""
    shape = (12, 3, 4, 6)
    sigmas = uniform_grid(settings.sample_steps, settings.flow_shift)
    thresholds = [float(number) for number in settings.threshold.split()]
    low, high = thresholds[0], thresholds[-1]              # at sigma 0 and 1
    x = spo_noise(settings, "start", positions, shape)
    transitions = []
    for step in range(settings.sample_steps - 1):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        mean, std = step_distribution(x, run_plain(policy, x, sigma, context), sigma, sigma_next, *settings.kernel)
        candidates, scores = [], []
        for k in range(settings.pool if step in SPO_POOLS else 1):
            candidate = mean + std * spo_noise(settings, f"step {step} candidate {k}", positions, shape)
            latents = candidate - sigma_next * run_plain(ref, candidate, sigma_next, context)
            noise = spo_noise(settings, f"judged at {sigma_next}", positions, shape)
            scores.append(run_plain(judge, (1 - sigma_next) * latents + sigma_next * noise, sigma_next, context))
            candidates.append(candidate)
        scores = torch.stack(scores, dim=1)
        if step in SPO_POOLS:
            rows = range(len(positions))
            best = torch.stack([candidates[scores[row].argmax()][row] for row in rows])
            worst = torch.stack([candidates[scores[row].argmin()][row] for row in rows])
            gap = scores.max(dim=1).values - scores.min(dim=1).values
            is_pair = torch.tanh(gap / 2) > low + (high - low) * sigma_next
            transitions.append((sigma, sigma_next, x, best, worst, scores, is_pair))
        generators = [randomness(settings.seed, position, f"step {step} next") for position in positions]
        following = [torch.randint(len(candidates), (), generator=generator) for generator in generators]
        x = torch.stack([candidates[k][row] for row, k in enumerate(following)])
    return transitions


def plain_spo(settings, policy, ref, transition, context):
    """Losses and log-ratios (n,) of the pairs of a transition."""
    sigma, sigma_next, x, best, worst, _, is_pair = transition
    x, best, worst, context = x[is_pair], best[is_pair], worst[is_pair], context[is_pair]
    mean, std = step_distribution(x, run_plain(policy, x, sigma, context), sigma, sigma_next, *settings.kernel)
    with torch.no_grad():
        v_ref = run_plain(ref, x, sigma, context)
        ref_mean, _ = step_distribution(x, v_ref, sigma, sigma_next, *settings.kernel)
        _, b, _ = step_coefficients(sigma, sigma_next, *settings.kernel)
    weight = min(std / abs(b), 10.0) if settings.step_weight == "inverse" else 1.0
    ratios = []
    for state in (best, worst):
        squares = (state - ref_mean) ** 2 - (state - mean) ** 2
        ratios.append(weight * squares.mean(dim=(1, 2, 3, 4)) / (2 * std ** 2))
    low, high = math.log(1 - settings.clip), math.log(1 + settings.clip)
    logit = settings.beta * (ratios[0].clamp(low, high) - ratios[1].clamp(low, high))
    return torch.log(1 + torch.exp(-logit)), ratios


def load_plain(folder):
    model = WanModel(open_wan(folder)[0]).double()
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return model


def plain_spo_run(base, data, settings):
    """Rows of the log, and {name: weight} of the policy and of its average after the last step."""
    policy, ref, judge = load_plain(base), load_plain(base), load_plain(base.parent / "judge")
    weights = {name: weight.data for name, weight in policy.named_parameters()}
    average = {name: weight.clone() for name, weight in weights.items()}
    optimizer = PlainAdamW(weights, settings.weight_decay, 1e-8 / settings.beta)
    rows = []
    for step in range(settings.steps):
        positions = range(step * settings.batch_size, (step + 1) * settings.batch_size)
        files = [data / f"{order(settings.seed, position, PAIRS):03d}.safetensors" for position in positions]
        contexts = [load_file(file)["context"].double() for file in files]
        context = torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True)
        with torch.no_grad():
            transitions = plain_roll_out(settings, policy, ref, judge, context, positions)
        turns = torch.randperm(len(SPO_POOLS), generator=randomness(settings.seed, step, "updates")).tolist()
        seen, norms = {}, []
        for update in range(settings.updates):
            pools = [pool for pool in turns[update::settings.updates] if transitions[pool][-1].any()]
            if not pools:
                continue
            seen |= {pool: plain_spo(settings, policy, ref, transitions[pool], context) for pool in pools}
            loss = torch.cat([seen[pool][0] for pool in pools]).mean()
            gradients = torch.autograd.grad(loss / settings.beta, list(policy.parameters()))
            norms.append(math.sqrt(sum((gradient ** 2).sum().item() for gradient in gradients)))
            shrink = min(1.0, settings.max_grad_norm / max(norms[-1], 1e-9))
            done = settings.updates * step + update
            learning_rate = settings.learning_rate * min(1, (done + 1) / settings.warmup_steps)
            optimizer.step({name: shrink * gradient for name, gradient in zip(weights, gradients)}, learning_rate)
            decay = min(settings.ema_decay, (done + 1) / (done + 10))
            for name, weight in weights.items():
                average[name] = decay * average[name] + (1 - decay) * weight
        rows.append(plain_spo_row(settings, step, transitions, seen) |
                    {"grad_norm": sum(norms) / len(norms), "updates": len(norms), "lr": learning_rate})
    return rows, weights, average


def plain_spo_row(settings, step, transitions, seen):
    gaps = [scores.max(dim=1).values - scores.min(dim=1).values for *_, scores, _ in transitions]
    by_step = {"score": [scores.mean().item() for *_, scores, _ in transitions],
               "gap": [gap.mean().item() for gap in gaps],
               "kept": [is_pair.double().mean().item() for *_, is_pair in transitions]}
    margins = {pool: settings.beta * (ratios[0] - ratios[1]).detach() for pool, (_, ratios) in seen.items()}
    for name, value in (("margin", lambda margin: margin), ("accuracy", lambda margin: (1 + margin.sign()) / 2)):
        by_step[name] = [value(margins[k]).mean().item() if k in margins else None for k in range(len(transitions))]
    row = {name: sum(by_step[name]) / len(transitions) for name in ("score", "gap", "kept")}
    ratios = [torch.cat([of_pool[side] for _, of_pool in seen.values()]).detach() for side in (0, 1)]
    limits = (1 - settings.clip, 1 + settings.clip)
    outside = [((ratio.exp() < limits[0]) | (ratio.exp() > limits[1])).double() for ratio in ratios]
    margin = settings.beta * (ratios[0] - ratios[1])
    means = {"loss": torch.cat([loss for loss, _ in seen.values()]), "margin": margin, "margin_abs": margin.abs(),
             "accuracy": (1 + margin.sign()) / 2, "clipped": (outside[0] + outside[1]) / 2,
             "ratio_win": ratios[0].exp().clamp(*limits), "ratio_lose": ratios[1].exp().clamp(*limits)}
    row |= {name: values.mean().item() for name, values in means.items()}
    return row | {"step": step, "skipped": 0, "score_end": by_step["score"][-1], "by_step": by_step,
                  "pairs": sum(len(loss) for loss, _ in seen.values())}


SPO_CASES = [   # ranks, flags, settings
    (1, "--grad_accum 2 --save_every 2", {"kernel": "ddim", "eta": 0.9, "step_weight": "none"}),
    (2, "", {"kernel": "dance", "eta": 0.6, "step_weight": "inverse", "threshold": "0.01"})]


@pytest.mark.parametrize("ranks, flags, changes", SPO_CASES)
def test_a_run_of_spo_is_the_plain_loop(world, base, tmp_path, ranks, flags, changes):
    settings = SimpleNamespace(**SPO_SETTINGS | changes)
    data = world / "data" / "real"
    flags += f" --score {base.parent / 'judge'}"
    rows, policy, average, exported = trained(spo_main, base, data, tmp_path / "out", settings, ranks, flags)
    settings.kernel = (settings.kernel, settings.eta)
    expected, plain_policy, plain_average = plain_spo_run(base, data, settings)
    assert_same_rows(rows, expected)
    start = load_plain(base).state_dict()
    assert_same_weights(policy, plain_policy, start)
    assert_same_weights(average, plain_average, start)
    assert all(torch.equal(exported[name], weight) for name, weight in average.items())
    assert step_numbers(tmp_path / "out") == ([2, 3] if "--save_every 2" in flags else [3])


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
