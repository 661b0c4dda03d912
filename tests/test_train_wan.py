"""train.py on small models of every public type: conditions, experts, loading in shards."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from benchmarks import load_memory
from data import draw, open_data
from samples import write_sample
from make_golden import CASES
from conftest import pair_loss, POOLS, main_fails, run, same_run, textbook_error
from model import WanConfig, WanModel
from weights import load_wan, save_wan

MODELS = {
    "i2v": CASES["i2v-clip"],
    "flf2v": CASES["flf2v"],
    "i2v-a14b": CASES["i2v-a14b"],
    "ti2v": WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_dim=48, out_dim=48, text_dim=20, text_len=12),
}


def make_world(folder, config, pairs=8):
    """
    A random model that does predict something, and GT-Pairs for it. Losers carry conditions of their own, which nobody
    may read.
    """
    torch.manual_seed(0)
    model = WanModel(config)
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    save_wan(model, folder / "base")
    shape = (config.out_dim, 3, 4, 6)
    for i in range(pairs):
        g = torch.Generator().manual_seed(i)
        context = torch.randn(3 + i % 4, config.text_dim, generator=g)
        for kind in ("real", "negatives"):
            conditions = {name: torch.randn(of, generator=g) for name, of in config.condition_shapes(shape).items()}
            write_sample(
                folder / "data" / kind / f"{i:03d}.safetensors",
                torch.randn(shape, generator=g),
                context,
                {"prompt": f"caption {i}"},
                **conditions,
            )
    return folder


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    return {name: make_world(tmp_path_factory.mktemp(name), config) for name, config in MODELS.items()}


# ------------------------------------------------------------------------------------------------------------------
# image conditions

class Recorder(torch.nn.Module):
    """Stands for a model: keeps what it was given, and answers with zeros."""
    def __init__(self, config):
        super().__init__()
        self.config, self.calls, self.bias = config, [], torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, timestep, context, **conditions):
        self.calls.append({"x": x, "timestep": timestep, "context": context, **conditions})
        return torch.zeros_like(x) + self.bias


@pytest.mark.parametrize("backward", ["joint", "sequential"])
@pytest.mark.parametrize("name", MODELS)
def test_exactly_the_conditions_of_the_win_reach_both_branches_and_the_reference(worlds, name, backward):
    args = train.parse_args(["--backward", backward, "--min_timestep", "300"])
    dataset = open_data(worlds[name] / "data", pairs=True)
    batch = train.read_batch(args, dataset, range(3), "cpu")
    wins = [load_file(dataset.pairs[train.order(0, p, 8)][0]) for p in range(3)]
    policy, ref = Recorder(MODELS[name]), Recorder(MODELS[name])
    train.backward_batch(args, policy, ref, batch, 1.0, None)
    copies = 2 if backward == "joint" else 1
    assert (len(policy.calls), len(ref.calls)) == ((1, 1) if copies == 2 else (3, 2))
    for call in policy.calls + ref.calls:
        assert call.keys() - {"x", "timestep", "context"} == MODELS[name].condition_shapes((4, 3, 4, 6)).keys() - {
            "first_latent"
        }
        for key in call.keys() & {"y", "clip_features"}:
            assert torch.equal(call[key], torch.stack([win[key] for win in wins] * copies)), key
        if name == "ti2v":
            assert torch.equal(call["x"][:, :, :1], torch.stack([win["first_latent"] for win in wins] * copies))
    xs = [torch.cat([call["x"] for call in model.calls]) for model in (policy, ref)]
    if backward == "joint":
        # policy and reference see the same; win and lose differ
        assert torch.equal(*xs) and not torch.equal(*xs[0].chunk(2))


@pytest.mark.parametrize("loss", ["regdpo", "diffusion_sdpo"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_with_image_conditions_equal_those_of_the_loss_written_down_plainly(worlds, name, loss):
    """As in test_train.py, in float64."""
    args = train.parse_args(["--loss", loss, "--min_timestep", "300"])
    # two random models are far apart; 1000 would saturate
    args.beta = 20.0
    dataset = open_data(worlds[name] / "data", pairs=True)
    torch.manual_seed(1)
    policy, ref = (WanModel(MODELS[name]).double() for _ in range(2))
    for model in (policy, ref):
        torch.nn.init.normal_(model.head.head.weight, std=0.05)
    ref.requires_grad_(False)
    batch = {
        key: value.double() if torch.is_tensor(value) else value
        for key, value in train.read_batch(args, dataset, range(2), "cpu").items()
    }
    assert ("first_latent" in batch) == (name == "ti2v")
    win, v_win, t_win = textbook_error(policy, batch, "win")
    lose, v_lose, t_lose = textbook_error(policy, batch, "lose")
    ref_win, ref_lose = (textbook_error(ref, batch, side)[0] for side in ("win", "lose"))
    plain, _ = pair_loss(args, win, lose, ref_win, ref_lose, batch["sigma"], (v_win, t_win, v_lose, t_lose))
    expected = torch.autograd.grad(plain.sum(), list(policy.parameters()))
    assert max(g.abs().max() for g in expected) > 1e-3
    for args.backward in ("joint", "sequential"):
        policy.zero_grad()
        metrics = train.backward_batch(args, policy, ref, batch, 1.0, None)
        assert torch.allclose(metrics["loss"], plain, rtol=1e-10)
        for got, want in zip((p.grad for p in policy.parameters()), expected):
            assert (got - want).norm() <= 1e-9 * want.norm() + 1e-13, args.backward


@pytest.mark.parametrize("name, loss", [("i2v", "regdpo"), ("ti2v", "dpo")])
@pytest.mark.slow
def test_pair_parallel_image_to_video_is_the_curve_of_one_rank(worlds, name, loss, tmp_path):
    flags = ("--loss", loss, "--steps", "3", "--batch_size", "4", "--learning_rate", "2e-3")
    alone = run(worlds[name], tmp_path / "a", *flags)
    assert alone[0][0]["loss_dpo" if loss == "regdpo" else "loss"] == pytest.approx(0.6931472, rel=1e-6)
    same_run(run(worlds[name], tmp_path / "b", *flags, "--backward", "pair", "--grad_accum", "2", ranks=2), alone)


def test_the_clean_frame_of_ti2v_counts_neither_in_the_error_nor_in_what_it_is_divided_by(worlds):
    args = train.parse_args([])
    batch = train.read_batch(args, open_data(worlds["ti2v"] / "data", pairs=True), range(2), "cpu")
    model = load_wan(worlds["ti2v"] / "base").requires_grad_(False)
    inputs = train.branch(batch, "win", "lose")
    err, v_pred, v_target = train.flow_errors(model, inputs)
    other = {key: value.clone() for key, value in inputs.items()}
    other["latents"][:, :, 0] += 100
    other["noise"][:, :, 0] -= 100
    assert torch.equal(train.flow_errors(model, other)[0], err)
    other["latents"][:, :, 1] += 1e-3
    assert not torch.equal(train.flow_errors(model, other)[0], err)
    # by hand, for a model that says 0: the target's square over 48 channels x 2 frames x 4 x 6
    target = (inputs["noise"] - inputs["latents"])[:, :, 1:]
    assert torch.allclose(
        train.flow_errors(Recorder(MODELS["ti2v"]), inputs)[0],
        target.square().flatten(1).sum(1) / (48 * 2 * 4 * 6),
        rtol=1e-6,
    )
    # text-to-video with the same model: every frame counts
    text = {key: value for key, value in inputs.items() if key != "first_latent"}
    assert torch.allclose(
        train.flow_errors(Recorder(MODELS["ti2v"]), text)[0],
        (inputs["noise"] - inputs["latents"]).square().flatten(1).mean(1),
        rtol=1e-6,
    )


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
@pytest.mark.parametrize("low, high", [(875, 1000), (0, 900)])
def test_every_timestep_that_reaches_an_expert_is_inside_its_range(worlds, sampling, low, high):
    """A range cut before the shift of 12 would give the low-noise expert timesteps up to 990."""
    args = train.parse_args(
        ["--timestep_sampling", sampling, "--flow_shift", "12", "--min_timestep", str(low), "--max_timestep", str(high)]
    )
    dataset, model = open_data(worlds["i2v-a14b"] / "data", pairs=True), Recorder(MODELS["i2v-a14b"])
    for start in range(0, 240, 8):
        train.flow_errors(model, train.branch(train.read_batch(args, dataset, range(start, start + 8), "cpu"), "win"))
    timesteps = torch.cat([call["timestep"] for call in model.calls])
    assert low <= timesteps.min() < high - 0.3 * (high - low) < high - 0.05 * (high - low) < timesteps.max() <= high
    assert timesteps.tolist() == pytest.approx(
        [1000 * draw(0, p, (1,), 12.0, low, high, sampling)[0] for p in range(240)]
    )


# ------------------------------------------------------------------------------------------------------------------
# refused before anything is made

def poison(file):
    """The last bytes of the numbers: a file of the right size whose content is damaged."""
    content = bytearray(file.read_bytes())
    content[-4:] = b"\xff" * 4
    file.write_bytes(content)


def rename_in_index(folder):
    index = next(folder.glob("*.index.json"))
    index.write_text(index.read_text().replace("00002-of", "00009-of"))


SHARD = "diffusion_pytorch_model-00002-of-00006.safetensors"
DAMAGED = {
    "a corrupted shard": (
        lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1000]),
        SHARD + ": not a whole safetensors file",
    ),
    "a shard with other numbers": (
        lambda folder: poison(folder / SHARD),
        "has values that are not finite; the checkpoint is damaged",
    ),
    "a missing shard": (lambda folder: (folder / SHARD).unlink(), f"names {SHARD}, which is not there"),
    "an index that names a file that is not there": (
        rename_in_index,
        "names diffusion_pytorch_model-00009-of-00006.safetensors, which is not there",
    ),
    "a tensor of a wrong shape": (
        lambda folder: save_file(
            {
                name: tensor[:-1] if name == "blocks.0.ffn.0.bias" else tensor
                for name, tensor in load_file(folder / SHARD).items()
            },
            folder / SHARD,
        ),
        "tensor blocks.0.ffn.0.bias is (511,), expected (512,)",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_is_refused_before_training(world, tmp_path, name):
    damage, says = DAMAGED[name]
    save_wan(load_wan(world / "base"), tmp_path / "base", max_shard_bytes=10**6)
    assert name != "a tensor of a wrong shape" or "blocks.0.ffn.0.bias" in load_file(tmp_path / "base" / SHARD)
    damage(tmp_path / "base")
    assert says in main_fails(world, tmp_path, "--init", str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()


def test_samples_of_another_variant_are_refused_before_training(world, worlds, tmp_path):
    text, image, both = str(world / "data"), str(worlds["i2v-a14b"] / "data"), str(worlds["i2v"] / "data")
    for init, data, says in ((worlds["i2v"], image, "the condition clip_features is missing; this i2v model with "
                                                    "latents (4, 3, 4, 6) takes (257, 40)"),
                             (worlds["i2v-a14b"], both, "the condition clip_features is (257, 40); this i2v model "
                                                        "with latents (4, 3, 4, 6) takes no such condition"),
                             (worlds["i2v"], text, "latents are (12, 3, 4, 6), of 12 channels; this i2v model has 4")):
        message = main_fails(world, tmp_path, "--init", str(init / "base"), "--data", data)
        assert (
            "real/000.safetensors: " + says in message
            and "choose the model that it was encoded for (--init)" in message
        )
    assert "--model tiny --init" in main_fails(
        world, tmp_path, "--model", "tiny", "--init", str(worlds["i2v"] / "base")
    )
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------------
# large checkpoints

@pytest.mark.slow
def test_no_rank_holds_more_than_its_share_of_a_checkpoint_while_loading(tmp_path):
    """benchmarks/load_memory.py on a smaller scale: 114 MiB on 4 ranks; policy, reference and average."""
    nbytes = load_memory.write_checkpoint(load_memory.config_of(0.1), tmp_path, 30 * 2**20)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    for rank in load_memory.on_ranks(POOLS, str(tmp_path)):
        for part, (anonymous, _, held) in rank.items():
            assert anonymous < nbytes / 4 + 20 * 2**20 < nbytes / 2, (part, anonymous, held, nbytes)
            assert held > nbytes / 8, "the share does not show: what else was freed meanwhile?"
