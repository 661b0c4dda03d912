"""Two experts in one run: whose turn it is, moving, one curve, resuming, what looks at both, what is exported."""
import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import experts
import train
from conftest import SHAPE, main_fails, on_ranks, pair_loss, textbook_error, train_main
from curves import Watch, split_experts
from data import draw, open_data
from experts import SIDES, own_step_of, share_of_high, side_of, timesteps_of
from fsdp_utils import start_ranks
from lora_files import merge_into, open_lora
from memory import MemoryFlags
from model import CONFIGS, WanModel
from run_log import numbers_in_words
from sample import Sampler, generate
from samples import read_sample, sample_files, seed_of
from step_folder import stored_weights
from weights import EXPERT_LORAS, find_experts, load_wan, main, parse_args, save_wan

NAME = "wan2.2-t2v-a14b"
CONFIG = dataclasses.replace(CONFIGS["tiny"], dim=32, ffn_dim=64, num_layers=2, num_heads=2)


@pytest.fixture(scope="module")
def both(world, tmp_path_factory):
    """A folder with two different small experts, both/, and the pairs of `world`, data/."""
    folder = tmp_path_factory.mktemp("experts")
    for seed, side in enumerate(SIDES):
        torch.manual_seed(seed)
        model = WanModel(CONFIG)
        nn.init.normal_(model.head.head.weight, std=0.1)
        save_wan(model, folder / "both" / f"{side}_model")
    shutil.copytree(world / "data", folder / "data")
    return folder


@pytest.fixture
def small_a14b(monkeypatch):
    """In this process, the small model is one of A14B's experts by its shape."""
    monkeypatch.setitem(CONFIGS, NAME, CONFIG)


def poisoned_copy(tensor):
    """A copy of a tensor; the original is NaN from then on, so that no computation can use it unnoticed."""
    local = tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
    copy = tensor.detach().clone()
    with torch.no_grad():
        local.fill_(float("nan"))
    return copy


def move_as_between_devices(self, side, device):
    """In place of Experts.move: all tensors get another storage, as on the way to a GPU and back."""
    expert = self.experts[side]
    assert device in ("cpu", self.device)
    for model in (expert.policy, expert.ref, expert.ema):
        if isinstance(model, nn.Module):
            model._apply(poisoned_copy)
        if isinstance(model, experts.Average):
            model.copies = {name: poisoned_copy(copy) for name, copy in model.copies.items()}
    for state in expert.optimizer.state.values():
        for name, tensor in state.items():
            state[name] = poisoned_copy(tensor)


def two_main(argv, moves=False):
    """train.py's main in a rank where the small model is A14B's; moves: an expert's tensors change their storage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, NAME, CONFIG)
        if moves:
            patch.setattr(experts.Experts, "move", move_as_between_devices)
        train_main(argv)


FLAGS = ("--batch_size 4 --steps 8 --switch_every 2 --flow_shift 5 --min_timestep 0 --learning_rate 1e-3 "
         "--warmup_steps 2 --ema_decay 0.9 --save_every 4 --keep 9 --hold_back 4 --probe_every 4 ").split()
LORA = "--lora_rank 4 --learning_rate 1e-2".split()
FULL = "--ref cached".split()


def train_two(both, out, *flags, ranks=1, moves=False):
    """Train both experts. Returns the rows of the log."""
    argv = ["--init", str(both / "both"), "--data", str(both / "data"), "--out", str(out), *FLAGS, *flags]
    if ranks == 1:
        two_main(argv, moves)                              # in this process, which starts no other
    else:
        on_ranks(ranks, two_main, argv, moves)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def exported(out):
    """{file: {name: tensor}} of what a run of adapters or of all weights exported."""
    files = sorted((out / "export").rglob("*.safetensors"))
    return {str(file.relative_to(out / "export")): load_file(file) for file in files}


def assert_close(one, other, tolerance=1e-2):
    """Whether two exports are equal up to this share of the size of each tensor."""
    assert one.keys() == other.keys() and len(one) == 2
    for file in one:
        assert one[file].keys() == other[file].keys()
        for name in one[file]:
            assert (one[file][name] - other[file][name]).norm() <= tolerance * other[file][name].norm(), (file, name)


def assert_equal(one, other):
    """Are two exports equal in every bit?"""
    assert one.keys() == other.keys() and len(one) == 2
    for file in one:
        assert one[file].keys() == other[file].keys()
        assert all(torch.equal(one[file][name], other[file][name]) for name in one[file])


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in ("seconds", "memory_gib", "tokens_per_second")}
            for row in rows]


def flags_of(*more):
    """The arguments of a run of both experts, as main completes them."""
    args = train.parse_args([*FLAGS, *more])
    args.model = NAME
    return args


# ----------------------------------------------------------------------------------------------------------------------
# whose turn it is

@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
@pytest.mark.parametrize("flow_shift, lowest, highest", [(5, 0, 1000), (1, 0, 1000), (12, 100, 950), (0.5, 600, 1000)])
def test_the_share_of_steps_is_that_of_the_sigmas(sampling, flow_shift, lowest, highest):
    limits = (float(flow_shift), float(lowest), float(highest))
    args = flags_of("--timestep_sampling", sampling, "--flow_shift", str(flow_shift), "--min_timestep", str(lowest),
                    "--max_timestep", str(highest))
    sigmas = torch.tensor([draw(0, position, (1,), *limits, sampling)[0] for position in range(4000)])
    assert share_of_high(args) == pytest.approx((sigmas >= 0.875).float().mean().item(), abs=0.025)
    for steps in (10, 37, 400):
        turns = -(-steps // 2)
        high = sum(side_of(args, 2 * turn) == "high_noise" for turn in range(turns))
        assert abs(high - turns * share_of_high(args)) < 1


def test_the_share_of_high_noise_by_hand():
    # u = sigma / (5 - 4 sigma) is 0.875 / 1.5 = 7 / 12 at the boundary: 5 / 12 above
    assert share_of_high(flags_of()) == pytest.approx(5 / 12)
    # at shift 1 and from timestep 750 on: 0.125 / 0.25
    assert share_of_high(flags_of("--flow_shift", "1", "--min_timestep", "750")) == pytest.approx(1 / 2)


def test_the_expert_of_a_step_is_a_function_of_seed_and_turn():
    args = flags_of("--switch_every", "3")
    for step in range(30):
        assert side_of(args, step) == side_of(args, step - step % 3) in SIDES
        assert side_of(args, step) == side_of(flags_of("--steps", "900", "--batch_size", "64", "--switch_every", "1"),
                                              step // 3)
    orders = {tuple(side_of(flags_of("--seed", str(seed)), step) for step in range(0, 24, 2)) for seed in range(20)}
    assert len(orders) > 5
    counts = {"high_noise": 0, "low_noise": 0}
    for step in range(100):
        side = side_of(args, step)
        assert own_step_of(args, step) == counts[side]
        counts[side] += 1
    one = train.parse_args([])
    assert side_of(one, 17) == "" and own_step_of(one, 17) == 17 and timesteps_of(one, 17) == (0, 1000)


def test_all_positions_of_a_step_draw_on_the_side_of_its_expert(both):
    args, dataset = flags_of("--min_timestep", "500", "--max_timestep", "990"), open_data(both / "data", pairs=True)
    for step in range(40):
        sigma = torch.cat([train.read_batch(args, dataset, range(first, first + 2), "cpu")["sigma"]
                           for first in (4 * step, 4 * step + 2)])
        lowest, highest = (0.875, 0.99) if side_of(args, step) == "high_noise" else (0.5, 0.875)
        assert lowest <= sigma.min() and sigma.max() <= highest and len(set(sigma.tolist())) == 4


# ----------------------------------------------------------------------------------------------------------------------
# training

@pytest.fixture(scope="module")
def lora_run(both, tmp_path_factory):
    """The folder and the log of a run that trains adapters on both experts."""
    out = tmp_path_factory.mktemp("lora") / "out"
    return out, train_two(both, out, *LORA)


@pytest.fixture(scope="module")
def full_run(both, tmp_path_factory):
    """
    The folder and the log of a run that trains all weights of both experts, which change their storage at every switch.
    """
    out = tmp_path_factory.mktemp("full") / "out"
    return out, train_two(both, out, *FULL, moves=True)


def test_each_expert_starts_at_a_margin_of_exactly_zero_and_moves(lora_run):
    out, rows = lora_run
    args = flags_of()
    assert [row["expert"] for row in rows] == [side_of(args, step) for step in range(8)]
    for side in SIDES:
        own = [row for row in rows if row["expert"] == side]
        assert len(own) >= 2 and own[0]["margin_abs"] == 0 and own[1]["margin_abs"] > 0
        assert [row["lr"] for row in own][:3] == pytest.approx([0.005, 0.01, 0.01][:len(own)])
        bins = [row["by_sigma"]["err_win"] for row in own]
        assert all(bins_of_row[3] is not None for bins_of_row in bins) == (side == "high_noise")
    for tensors in exported(out).values():
        assert all(tensor.abs().sum() > 0 for tensor in tensors.values())


def test_the_run_is_that_of_a_plain_loop_over_both(both, full_run, small_a14b):
    """Reg-DPO of all weights, with torch's AdamW: whose step it is, own warm-up, average and moments."""
    out, rows = full_run
    args = flags_of("--learning_rate", "1e-3")
    args.loss_scale = 1 / args.beta
    dataset, _ = train.evaluate.hold_back(open_data(both / "data", pairs=True), 4)
    models, averages, optimizers, counts = {}, {}, {}, {}
    for side in SIDES:
        models[side], averages[side] = (load_wan(both / "both" / f"{side}_model") for _ in range(2))
        weights_of = dict(models[side].named_parameters())
        matrices = [name for name, p in weights_of.items() if p.ndim > 1 and not name.endswith("modulation")]
        groups = [{"params": [p for name, p in weights_of.items() if name in matrices], "weight_decay": 1e-3},
                  {"params": [p for name, p in weights_of.items() if name not in matrices], "weight_decay": 0.0}]
        optimizers[side] = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8 * args.loss_scale)
        counts[side] = 0
    for step, row in enumerate(rows):
        side = side_of(args, step)
        model, average, optimizer, own_step = models[side], averages[side], optimizers[side], counts[side]
        ref = load_wan(both / "both" / f"{side}_model")
        batch = train.read_batch(args, dataset, range(4 * step, 4 * step + 4), "cpu")
        errors = [textbook_error(model, batch, name)[0] for name in ("win", "lose")]
        with torch.no_grad():
            ref_errors = [textbook_error(ref, batch, name)[0] for name in ("win", "lose")]
        losses, _ = pair_loss(args, *errors, *ref_errors, batch["sigma"])
        (args.loss_scale * losses.mean()).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (own_step + 1) / 2)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.9, (own_step + 1) / (own_step + 10))
        with torch.no_grad():
            for kept, weight in zip(average.parameters(), model.parameters()):
                kept.lerp_(weight, 1 - decay)
        counts[side] += 1
        for name, expected in (("loss", losses.mean().item()), ("ref_err_win", ref_errors[0].mean().item()),
                               ("grad_norm", norm)):
            assert row[name] == pytest.approx(expected, rel=1e-4), (step, name)
    for side in SIDES:
        trained = load_wan(out / "export" / f"{side}_model")
        start = load_wan(both / "both" / f"{side}_model")
        moved = 0.0
        for ours, theirs, before in zip(trained.parameters(), averages[side].parameters(), start.parameters()):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
            moved += (theirs - before).norm()
        assert moved > 0.01


def test_a_reference_that_is_not_the_policy_stops_either_expert_at_its_first_step(both, tmp_path, monkeypatch):
    build = experts.build_model

    def spoiled(path, config, ranks, memory, trained, *rest):
        model = build(path, config, ranks, memory, trained, *rest)
        if trained and path.name == "high_noise_model":    # the policy of the expert that comes second
            with torch.no_grad():
                model.head.head.bias.to_local().add_(0.05)
        return model

    monkeypatch.setattr(experts, "build_model", spoiled)
    with pytest.raises(RuntimeError, match="same numerical path"):
        train_two(both, tmp_path / "out", *FULL)
    torch.distributed.destroy_process_group()
    rows = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert len(rows) == 2 and "high_noise" not in "".join(rows)


@pytest.mark.parametrize("ranks, flags", [
    (1, "--grad_accum 2 --backward sequential --checkpointing full"), (2, "--backward pair --ref cached"),
    pytest.param(2, "--cp_size 2 --offload_params --checkpointing selective", marks=pytest.mark.slow)])
def test_one_curve_of_both_experts_however_it_is_cut_and_wherever_they_wait(both, lora_run, tmp_path, ranks, flags):
    out, rows = lora_run
    moves = "--offload_params" not in flags
    other = train_two(both, tmp_path / "out", *LORA, *flags.split(), ranks=ranks, moves=moves)
    for row, expected in zip(other, rows, strict=True):
        assert row["expert"] == expected["expert"]
        for name in ("loss", "err_win", "ref_err_win", "ref_err_lose", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-3), (row["step"], name)
    assert_close(exported(tmp_path / "out"), exported(out))


def test_storages_that_change_at_every_switch_leave_every_bit_as_it_is(both, lora_run, tmp_path):
    out, rows = lora_run
    assert without_times(train_two(both, tmp_path / "out", *LORA, moves=True)) == without_times(rows)
    assert_equal(exported(tmp_path / "out"), exported(out))


def test_with_offloaded_parameters_nothing_moves_and_otherwise_one_expert_at_a_time_is_on_the_device():
    moves = []

    class Recorder(nn.Module):
        def to(self, device):
            moves.append((self.name, str(device)))

    def expert(side):
        policy = Recorder()
        policy.name, policy.weight = side, nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.AdamW([policy.weight])
        optimizer.state[policy.weight]["exp_avg"] = torch.zeros(1)
        return experts.Expert(policy, None, None, optimizer)

    pair = experts.Experts.__new__(experts.Experts)
    pair.args = flags_of()
    pair.device, pair.on_device = "meta", "low_noise"
    pair.experts = {side: expert(side) for side in SIDES}
    moments = [expert.optimizer.state[expert.policy.weight] for expert in pair.experts.values()]
    assert pair.bring("low_noise") is pair.experts["low_noise"] and moves == []
    assert pair.bring("high_noise") is pair.experts["high_noise"]
    assert moves == [("low_noise", "cpu"), ("high_noise", "meta")]             # first out, then in
    assert [state["exp_avg"].device.type for state in moments] == ["meta", "cpu"]
    pair.args.offload_params = True
    pair.bring("low_noise")
    assert len(moves) == 2 and pair.on_device == "low_noise"


@pytest.mark.parametrize("name, flags, stop", [("lora_run", LORA, 4), ("full_run", FULL, 3)])
def test_a_run_of_both_resumes_bit_for_bit_between_two_turns_and_in_one(both, request, tmp_path, name, flags, stop):
    out, rows = request.getfixturevalue(name)
    sides = [row["expert"] for row in rows]
    assert (sides[stop - 1] != sides[stop]) == (stop == 4) and set(sides[stop - 1:]) == set(SIDES), "choose others"
    train_two(both, tmp_path / "out", *flags, "--steps", str(stop))
    resumed = train_two(both, tmp_path / "out", *flags, "--resume", "latest", moves=True)
    if stop == 3:
        resumed[2].pop("probe")                            # of a run that ends there
    assert without_times(resumed) == without_times(rows)
    assert_equal(exported(tmp_path / "out"), exported(out))


@pytest.mark.slow
def test_a_run_of_both_resumes_on_another_number_of_ranks(both, lora_run, tmp_path):
    out, rows = lora_run
    train_two(both, tmp_path / "out", *LORA, "--steps", "3", ranks=2, moves=True)
    resumed = train_two(both, tmp_path / "out", *LORA, "--resume", "latest")
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    assert_close(exported(tmp_path / "out"), exported(out))


def test_what_waits_is_counted(both, small_a14b):
    args = flags_of("--init", str(both / "both"), "--ref", "cached")
    args.loss_scale = 1.0
    ranks = start_ranks()
    pair = experts.Experts(args, CONFIG, CONFIG, {side: None for side in SIDES}, True, ranks, MemoryFlags())
    parameters = list(WanModel(CONFIG).parameters())
    # policy, reference, average and two moments in float32, and a count for each tensor
    expected = 4 * (5 * sum(p.numel() for p in parameters) + len(parameters))
    assert [experts.nbytes(expert) for expert in pair.experts.values()] == [expected, expected]
    pair.drop_references()
    assert experts.nbytes(pair.experts["low_noise"]) == expected - 4 * sum(p.numel() for p in parameters)
    torch.distributed.destroy_process_group()


def test_a_checkpoint_holds_each_expert_in_a_folder_of_its_own(lora_run):
    out, _ = lora_run
    for side in SIDES:
        names, read = stored_weights(out / "step_000008" / f"{side}_model")
        assert len(names) == 2 * 10 * 2
        layer = "blocks.1.ffn.2.lora_B.weight"
        assert torch.equal(read(layer), exported(out)[f"lora_{side}.safetensors"][f"diffusion_model.{layer}"])
    assert not (out / "step_000008" / ".metadata").exists()


# ----------------------------------------------------------------------------------------------------------------------
# what looks at both

def test_the_probe_asks_each_sigma_of_its_expert(both, lora_run):
    _, rows = lora_run
    _, held_back = train.evaluate.hold_back(open_data(both / "data", pairs=True), 4)
    asked = ("low_noise", "low_noise", "low_noise", "high_noise")
    models = [load_wan(both / "both" / f"{side}_model") for side in asked]
    probe = rows[-1]["probe"]
    assert probe["sigma"] == [0.125, 0.375, 0.625, 0.875]  # 0.875 is the high-noise expert's
    for i, (sigma, model) in enumerate(zip(probe["sigma"], models)):
        errors = []
        for number in range(len(held_back)):
            noise = torch.randn(SHAPE, generator=train.randomness(0, number, "probe"))
            item = held_back[number]
            batch = {"win": item["win"][None], "context": item["context"][None], "noise": noise[None],
                     "sigma": torch.tensor([sigma])}
            with torch.no_grad():
                errors.append(textbook_error(model, batch, "win")[0].item())
        assert probe["ref_err_win"][i] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert all(gap != 0 for gap in probe["win_gap"])       # both have been trained


@pytest.mark.parametrize("flags", [LORA, FULL], ids=["adapters", "all weights"])
def test_previews_are_sampled_with_both(both, tmp_path, flags):
    out = tmp_path / "out"
    train_two(both, out, *flags, "--steps", "4", "--sample_every", "3", "--sample_steps", "4", moves=True)
    _, held_back = train.evaluate.hold_back(open_data(both / "data", pairs=True), 4)
    paths = sample_files(out / "samples" / "after")
    assert len(paths) == 4
    if flags == LORA:
        convert(out / "step_000004", "--out", tmp_path / "merged")
    folders = {1: both / "both", 2: tmp_path / "merged" if flags == LORA else out / "export"}
    for number in (0, 3):
        panes = read_sample(paths[number])["latents"].split(SHAPE[3], dim=3)
        for pane, folder in folders.items():
            high, low = (load_wan(path) for path in find_experts(folder))
            # of the sigmas 1, 0.9375, 0.833 and 0.625 two are the high-noise expert's
            sampler = Sampler(steps=4, flow_shift=5.0, boundary=0.875)
            expected = generate(high, [held_back[number]["context"]], [seed_of("preview", number)], SHAPE, sampler,
                                low=lambda: low)[0]
            assert (panes[pane] - expected).norm() < 1e-4 * expected.norm()
            alone = generate(high, [held_back[number]["context"]], [seed_of("preview", number)], SHAPE,
                             Sampler(steps=4, flow_shift=5.0))[0]
            assert (panes[pane] - alone).norm() > 1e-2 * expected.norm()


def test_a_batch_with_timesteps_of_both_is_a_bug():
    asked = []
    pair = SimpleNamespace(args=SimpleNamespace(model=NAME), config=CONFIG)
    pair.bring = lambda side: SimpleNamespace(policy=lambda x, timestep, context: asked.append(side))
    model = experts.OneModel(pair, "policy")
    for timesteps in ([875.0, 1000.0], [874.9, 0.0]):
        model(None, torch.tensor(timesteps), None)
    assert asked == ["high_noise", "low_noise"]
    with pytest.raises(AssertionError, match="both sides of the boundary"):
        model(None, torch.tensor([875.0, 874.0]), None)


def test_a_line_on_the_terminal_says_which_expert_it_is():
    assert numbers_in_words({"step": 3, "expert": "low_noise", "loss": 0.5}, ("loss",)) == "low_noise  loss 0.5"
    assert numbers_in_words({"step": 3, "loss": 0.5}, ("loss",)) == "loss 0.5"


def test_each_expert_is_judged_by_its_own_rows():
    # margins of the high-noise expert are 1, and the low-noise expert's are 0 at its first step: no reference moved
    watch = Watch()
    said = []
    for step in range(60):
        side = "low_noise" if step % 20 >= 10 else "high_noise"
        margin = 0.0 if step == 10 else 1.0
        row = {"step": step, "expert": side, "margin_abs": margin, "skipped": int(step in (15, 16, 25))}
        said += watch(row)
    assert [line.split(":")[0].split()[1] for line in said] == ["15", "25"]
    assert "low noise: NOT FINITE" in said[0] and "high noise: NOT FINITE" in said[1]


def test_a_picture_shows_each_expert_as_a_curve_of_its_own():
    rows = [{"step": step, "expert": side} for step, side in enumerate(("low_noise", "high_noise", "low_noise"))]
    split = split_experts({"a14b": rows, "one": [{"step": 0}]})
    assert {name: [row["step"] for row in rows] for name, rows in split.items()} == {
        "a14b, low noise": [0, 2], "a14b, high noise": [1], "one": [0]}


# ----------------------------------------------------------------------------------------------------------------------
# exports

def convert(*argv):
    main(parse_args([str(word) for word in argv]))


def test_two_files_of_adapters_come_out_and_are_merged_into_their_expert(both, lora_run, tmp_path, small_a14b):
    out, _ = lora_run
    assert sorted(path.name for path in (out / "export").iterdir()) == sorted(EXPERT_LORAS)
    step = out / "step_000008"
    convert(step, "--out", tmp_path / "merged")
    convert(step, "--format", "diffusers", "--out", tmp_path / "diffusers")
    convert(step, "--out", tmp_path / "given", "--base", both / "both")
    assert find_experts(tmp_path / "diffusers") == (tmp_path / "diffusers/transformer",
                                                    tmp_path / "diffusers/transformer_2")
    for side, name in zip(SIDES, EXPERT_LORAS):
        adapters = open_lora(out / "export" / name)
        assert len(adapters) == 20
        base = load_wan(both / "both" / f"{side}_model").state_dict()
        read = merge_into(base.get, [(adapters, 1.0)])
        convert(step / f"{side}_model", "--format", "comfyui", "--out", tmp_path / f"{side}.safetensors")
        convert(out / "export" / name, "--out", tmp_path / "file" / side)
        diffusers_name = {"high_noise": "transformer", "low_noise": "transformer_2"}[side]
        for written in (f"merged/{side}_model", f"given/{side}_model", f"diffusers/{diffusers_name}",
                        f"{side}.safetensors", f"file/{side}"):
            state = load_wan(tmp_path / written).state_dict()
            assert all(torch.equal(state[key], read(key)) for key in state), written
        convert(step / f"{side}_model", "--format", "lora", "--out", tmp_path / f"lora_{side}.safetensors")
        again = load_file(tmp_path / f"lora_{side}.safetensors")
        assert all(torch.equal(tensor, again[key]) for key, tensor in exported(out)[name].items())
    for format in ("comfyui", "lora"):
        with pytest.raises(ValueError, match=f"holds two experts, and --format {format} is a file for one; give .*hig"):
            convert(step, "--format", format, "--out", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="--base .*high_noise_model is one model, and .* holds two experts"):
        convert(step, "--out", tmp_path / "x", "--base", both / "both" / "high_noise_model")


def test_a_public_folder_with_both_is_converted_as_a_whole(both, tmp_path):
    convert(both / "both", "--format", "diffusers", "--out", tmp_path / "out")
    for source, path in zip(find_experts(both / "both"), find_experts(tmp_path / "out")):
        one, other = load_wan(source).state_dict(), load_wan(path).state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_goes_on_from_both_files_and_from_both_experts(both, lora_run, tmp_path, small_a14b):
    out, _ = lora_run
    rows = train_two(both, tmp_path / "lora", *LORA, "--init_lora", str(out / "export"), "--steps", "4")
    convert(out / "step_000008", "--out", tmp_path / "both")
    (tmp_path / "data").symlink_to(both / "data")
    merged = train_two(tmp_path, tmp_path / "full", *FULL, "--steps", "4")
    started = set()
    for row, expected in zip(rows, merged, strict=True):
        if row["expert"] not in started:                   # the same model, once as adapters and once merged
            started.add(row["expert"])
            assert row["margin_abs"] == expected["margin_abs"] == 0
            assert row["err_win"] == pytest.approx(expected["err_win"], rel=1e-4)
    assert started == set(SIDES)
    header = safe_open(tmp_path / "lora" / "export" / EXPERT_LORAS[0], "pt").metadata()
    assert header["base"] == json.loads((tmp_path / "lora" / "step_000004" / "meta.json").read_text())["init"]


# ----------------------------------------------------------------------------------------------------------------------
# refused before anything is loaded

@pytest.mark.parametrize("init, flags, words", [
    ("both", "", "holds two experts: with --ref live there would be four models; give --lora_rank, or --ref cached"),
    ("both", "--ref offload", "with --ref offload there would be four models"),
    ("both", "--loss preference", "holds two experts: --loss preference trains one model; give .*high_noise_model or"),
    ("both", "--lora_rank 2 --min_timestep 875", "all on one side .* give .*high_noise_model, or a range on both"),
    ("both", "--lora_rank 2 --max_timestep 875", "all on one side .* give .*low_noise_model, or a range on both"),
    ("both", "--lora_rank 2 --steps 10", "--steps 10 --switch_every 10: one expert has no step, since 41.7% of"),
    ("both", "--lora_rank 2 --switch_every -1", "--switch_every -1"),
    ("both", "--lora_rank 2 --init_lora some.safetensors", "--init_lora .*: expected a folder with lora_high_noise"),
    ("both", "--lora_rank 2 --cp_size 3", "--cp_size 3"),
    ("both/high_noise_model", "--switch_every 5 --min_timestep 875", "--switch_every 5: --init .* is one model; leave"),
    ("both/low_noise_model", "--min_timestep 500", "is one of the two experts of wan2.2-t2v-a14b and samples only at"),
])
def test_what_cannot_work_is_refused_by_name(both, tmp_path, monkeypatch, small_a14b, init, flags, words):
    monkeypatch.setattr(experts, "build_model", lambda *args: pytest.fail("a model was built"))
    values = ["--init", str(both / init), "--data", str(both / "data"), "--min_timestep", "0", "--flow_shift", "5",
              "--steps", "100"]
    message = main_fails(both, tmp_path, *values, *flags.split())
    assert re.search(words, message), message
    assert not (tmp_path / "out").exists()


def test_two_folders_that_are_not_two_experts_are_refused(both, tmp_path, monkeypatch, small_a14b):
    monkeypatch.setitem(CONFIGS, "other", dataclasses.replace(CONFIG, num_layers=1))
    shutil.copytree(both / "both", tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "low_noise_model")
    save_wan(WanModel(CONFIGS["other"]), tmp_path / "mixed" / "low_noise_model")
    flags = ("--data", str(both / "data"), "--min_timestep", "0", "--lora_rank", "2", "--steps", "100")
    message = main_fails(both, tmp_path, "--init", str(tmp_path / "mixed"), *flags)
    assert f"--model {NAME} --init " in message
    assert "low_noise_model/config.json: num_layers is 1, expected 2" in message
    monkeypatch.delitem(CONFIGS, NAME)
    message = main_fails(both, tmp_path, "--init", str(both / "both"), *flags)
    assert "both: high_noise_model is t2v of width 32, 2 blocks; expected the two experts of wan2.2-t2v-a14b" in message


def test_two_experts_are_refused_where_one_model_is_expected(both, lora_run, tmp_path):
    for source, dtype in ((lora_run[0] / "step_000008" / "high_noise_model", "float32"),
                          (both / "both" / "high_noise_model", "bfloat16")):
        with pytest.raises(ValueError, match="both holds two experts: give .*high_noise_model .high noise. or"):
            convert(source, "--dtype", dtype, "--base", both / "both", "--out", tmp_path / "x")


def test_a_resume_with_other_turns_is_refused(both, lora_run, tmp_path, small_a14b):
    shutil.copytree(lora_run[0], tmp_path / "out")
    argv = [*FLAGS, *LORA, "--init", str(both / "both"), "--data", str(both / "data"), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="it was trained with switch_every = 2, this run has switch_every = 4"):
        train_main([*argv, "--switch_every", "4", "--resume", "latest"])
    torch.distributed.destroy_process_group()
