"""Whatever ranks share the work and wherever memory is saved, the gradient is that of the loss written down plainly."""
import copy
import dataclasses
import hashlib
import shutil
import weakref
from collections import Counter
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import experts
import fsdp_utils
import losses
import memory
import toy
import train
from conftest import main_fails, on_ranks, pair_loss, run, same_run, textbook_error, train_main
from data import open_data
from evaluate import sample_held_out, sampler_of
from experiments import variants
from fsdp_utils import ContextParallel, build_model, start_ranks
from memory import MemoryFlags, check_memory_flags, save_memory
from model import CONFIGS, WanModel
from ref_cache import open_errors, score_reference
from samples import read_sample
from weights import save_wan

CONFIG = dataclasses.replace(CONFIGS["tiny"], dim=32, ffn_dim=64, num_layers=2)
LOSSES = ("sft", "dpo", "regdpo", "sdpo", "diffusion_sdpo")


def arguments(loss, flags=""):
    args = train.parse_args(["--loss", loss, "--min_timestep", "300", "--batch_size", "4", *flags.split()])
    args.beta = 20.0                                       # two random models are far apart; 1000 would saturate
    return args


def double(batch):
    return {name: value.double() if torch.is_tensor(value) else value for name, value in batch.items()}


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """
    A folder with a policy, a reference and, in expected.pt, for every loss the gradient of its mean over four pairs as
    one would write it down: {loss: {parameter name: gradient}}.
    """
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(3)
    models = [WanModel(CONFIG).double() for _ in range(2)]
    for model, name in zip(models, ("policy", "ref")):
        torch.nn.init.normal_(model.head.head.weight, std=0.2)
        save_wan(model, folder / name)
    policy, ref = models
    batch = double(train.read_batch(arguments("dpo"), open_data(world / "data", pairs=True), range(4), "cpu"))
    sigma = batch["sigma"]

    with torch.no_grad():
        ref_win, ref_lose = (textbook_error(ref, batch, side)[0] for side in ("win", "lose"))
    parameters, expected = dict(policy.named_parameters()), {}

    def gradient(losses_of_pairs):
        return dict(zip(parameters, torch.autograd.grad(losses_of_pairs.mean(), list(parameters.values()))))
    for loss in LOSSES:
        args = arguments(loss)
        win, v_win, target_win = textbook_error(policy, batch, "win")
        lose, v_lose, target_lose = textbook_error(policy, batch, "lose")
        if loss == "sft":
            expected[loss] = gradient(win)
        else:
            outputs = (v_win, target_win, v_lose, target_lose)
            expected[loss] = gradient(pair_loss(args, win, lose, ref_win, ref_lose, sigma, outputs)[0])
    args = arguments("regdpo")                             # the branches of one loss apart, each with the other held
    win, lose = (textbook_error(policy, batch, side)[0] for side in ("win", "lose"))
    expected["win"] = gradient(pair_loss(args, win, lose.detach(), ref_win, ref_lose, sigma)[0])
    lose, _, _ = textbook_error(policy, batch, "lose")
    expected["lose"] = gradient(pair_loss(args, win.detach(), lose, ref_win, ref_lose, sigma)[0])
    torch.save(expected, folder / "expected.pt")
    return folder


@lru_cache
def plain_gradients(folder):
    return torch.load(folder / "expected.pt")


def sharded_models(args, folder):
    """Ranks, policy and reference in float64, as train.py lays them out."""
    ranks = start_ranks(args.backward == "pair", args.cp_size, args.replicate)
    flags = check_memory_flags(args)
    torch.set_default_dtype(torch.float64)
    try:
        ref = build_model(folder / "ref", CONFIG, ranks, flags, offload=args.ref == "offload").requires_grad_(False)
        policy = build_model(folder / "policy", CONFIG, ranks, flags, trained=True, offload=args.offload_params)
    finally:
        torch.set_default_dtype(torch.float32)
    return ranks, policy, ref


def worst(policy, expected):
    """The worst difference in the rows that this rank holds, relative to the whole gradient of a parameter."""
    differences = []
    for name, param in policy.named_parameters():
        rows = expected[name][slice(*fsdp_utils.my_rows(param))]
        differences.append(((param.grad.to_local() - rows).norm() / expected[name].norm()).item())
    return max(differences)


def worst_gradients(world, folder, flags, kinds):
    """
    {loss: worst relative difference of a gradient from the plain one}, of this rank's share of the four pairs,
    back-propagated as the flags say.
    """
    expected, differences = plain_gradients(folder), {}
    args = arguments("dpo", flags)
    ranks, policy, ref = sharded_models(args, folder)
    per_rank = 4 // ranks.data_ranks
    positions = range(ranks.data_rank * per_rank, (ranks.data_rank + 1) * per_rank)
    batch = double(train.read_batch(args, open_data(world / "data", pairs=True), positions, "cpu"))
    ref_errors = train.reference_errors(args, ref, batch, ranks)
    for loss in kinds:
        args = arguments(loss, flags)
        policy.zero_grad()
        ref_or_errors = ref if loss == "regdpo" and args.ref != "cached" else ref_errors
        train.backward_batch(args, policy, ref_or_errors, batch, ranks.world / 4, ranks)
        differences[loss] = worst(policy, expected[loss])
    return differences


@pytest.mark.parametrize("ranks, flags", [
    (2, ""),
    (2, "--backward sequential --replicate 2"),
    (2, "--backward pair --checkpointing chunked --offload_activations"),
    (2, "--cp_size 2 --ref cached --checkpointing chunked --chunk_tokens 5 --offload_activations"),
    (2, "--cp_size 2 --backward sequential --checkpointing full --offload_activations --offload_params --ref offload"),
    (4, "--backward pair --ref cached --checkpointing chunked --chunk_tokens 4"),
    (4, "--cp_size 4 --checkpointing selective"),
    (4, "--cp_size 2 --backward pair --checkpointing chunked"),
    (4, "--replicate 2 --backward sequential --offload_params --checkpointing selective"),
    (8, "--cp_size 2 --backward pair --replicate 2 --checkpointing full --chunk_tokens 9")])
def test_the_gradient_of_every_loss_is_that_of_one_process_and_one_graph(world, plain, ranks, flags):
    refused = set()
    if "--backward" in flags:
        refused.add("sft")
    if "--backward pair" in flags:
        refused.add("diffusion_sdpo")
    kinds = [loss for loss in LOSSES if loss not in refused]
    for differences in on_ranks(ranks, worst_gradients, world, plain, flags, kinds):
        assert max(differences.values()) < 1e-12, differences


# ----------------------------------------------------------------------------------------------------------------------
# context parallelism

def shared_tokens(cases):
    """one_difference of each of the cases, in a group of four ranks."""
    group = start_ranks(cp_size=4).cp_group
    return [one_difference(group, *case) for case in cases]


def one_difference(group, grid, per_token, mode):
    """
    The worst relative difference of velocity and gradients between a model whose tokens the ranks share and a whole
    one. grid: of tokens; per_token: whether each has a timestep of its own; mode: of checkpointing.
    """
    config = dataclasses.replace(CONFIG, in_dim=15, image_dim=8)
    torch.manual_seed(0)
    model = WanModel(config).double()
    torch.nn.init.normal_(model.head.head.weight, std=0.2)
    shared = copy.deepcopy(model)
    ContextParallel(shared, group)
    save_memory(shared, MemoryFlags(mode), trained=True)
    f, h, w = grid
    x, y = torch.randn(2, 12, f, 2 * h, 2 * w).double(), torch.randn(2, 3, f, 2 * h, 2 * w).double()
    timestep = torch.tensor([900.0, 300.0]).double()
    if per_token:
        timestep = timestep[:, None] * (torch.arange(f * h * w) >= h * w)
    inputs = (x, timestep, torch.randn(2, 5, 32).double(), y, torch.randn(2, 257, 8).double())
    mask = torch.ones(1, 1, f, 1, 1).double()
    mask[:, :, 0] = f == 1                                 # as for a first frame that is given
    outputs = []
    for each in (model, shared):
        v = each(*inputs)
        losses.flow_error(v, torch.ones_like(v), mask).sum().backward()
        outputs.append((v.detach(), [p.grad for p in each.parameters()]))
    (v, gradients), (v_shared, parts) = outputs
    for part in parts:
        dist.all_reduce(part)                              # the sum over shares, which FSDP takes in training
    with torch.no_grad():                                  # sampling needs nothing special
        again = shared(*inputs)
    differences = [((v_shared - v).norm() / v.norm()).item(), ((again - v).norm() / v.norm()).item()]
    for part, gradient in zip(parts, gradients):
        if gradient.norm() > 1e-12:
            differences.append(((part - gradient).norm() / gradient.norm()).item())
    return max(differences)


def test_tokens_shared_by_four_ranks_change_nothing_whether_they_divide_or_not():
    # of 5 tokens the last rank has none, of 1 only the first has it
    cases = [((3, 2, 2), False, "selective"), ((2, 3, 3), True, "selective"), ((5, 1, 1), True, "chunked"),
             ((1, 1, 1), False, "full")]
    for differences in on_ranks(4, shared_tokens, cases):
        assert max(differences) < 1e-12, differences


def held_out(folder, cp_size):
    args = arguments("sft", f"--sample_steps 2 --init {folder / 'base'}")
    ranks = start_ranks(cp_size=cp_size)
    captions = toy.make_clips(5, seed=1, held_out=True)[0]
    model = build_model(args.init, CONFIGS["tiny"], ranks)
    return sample_held_out(model, sampler_of(args), captions, ranks).tolist()


def test_evaluations_sample_the_same_clips_when_ranks_share_the_tokens(world):
    alone = torch.tensor(on_ranks(1, held_out, world, 1)[0])
    assert alone.std() > 0.1
    for shared in on_ranks(4, held_out, world, 2):
        assert (torch.tensor(shared) - alone).abs().max() < 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# the two branches' gradients

def branch_norms(world, folder, flags):
    """The metrics of add_branches for two micro-batches, and the worst difference of the sum that it leaves."""
    args, expected = arguments("regdpo", flags), plain_gradients(folder)
    ranks, policy, ref = sharded_models(args, folder)
    dataset, aside = open_data(world / "data", pairs=True), [None] * len(list(policy.parameters()))
    per_rank = 2 // ranks.data_ranks
    for micro in range(2):
        begin = 2 * micro + ranks.data_rank * per_rank
        batch = double(train.read_batch(args, dataset, range(begin, begin + per_rank), "cpu"))
        variants.backward_by_branch(args, policy, ref, batch, ranks.world / 4, ranks, aside)
    norms = variants.add_branches(list(policy.parameters()), aside, 3.0)
    return norms, worst(policy, expected["regdpo"]), aside


@pytest.mark.parametrize("ranks, flags", [
    (2, "--backward sequential"), (4, "--backward sequential --replicate 2 --cp_size 2 --offload_params")])
def test_branch_norms_and_their_cosine_are_those_of_the_branches_differentiated_apart(world, plain, ranks, flags):
    expected = plain_gradients(plain)
    win, lose = (torch.cat([g.flatten() for g in expected[kind].values()]) for kind in ("win", "lose"))
    cosine = (win @ lose / win.norm() / lose.norm()).item()
    for norms, difference, aside in on_ranks(ranks, branch_norms, world, plain, flags):
        assert norms["grad_norm_win"] == pytest.approx(3 * win.norm().item(), rel=1e-10)
        assert norms["grad_norm_lose"] == pytest.approx(3 * lose.norm().item(), rel=1e-10)
        assert norms["grad_cosine"] == pytest.approx(cosine, rel=1e-10)
        assert difference < 1e-12 and set(aside) == {None}


# ----------------------------------------------------------------------------------------------------------------------
# who holds what

def one_step(folder, flags):
    """
    A digest of the whole weights as this rank sees them after a step from random ones, how many numbers it holds, and
    how many exist.
    """
    args = arguments("sft", f"--init scratch {flags}")
    ranks = start_ranks(cp_size=args.cp_size, replicate=args.replicate)
    policy = build_model("scratch", CONFIG, ranks, offload=args.offload_params)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)
    batch = train.read_batch(args, open_data(folder, pairs=False), [ranks.data_rank], "cpu")
    before = torch.cat([p.full_tensor().flatten() for p in policy.parameters()]).detach()
    train.backward_batch(args, policy, None, batch, 1.0, ranks)
    optimizer.step()
    after = torch.cat([p.full_tensor().flatten() for p in policy.parameters()]).detach()
    assert (after - before).abs().max() > 5e-4             # the head starts at zero, so few others move in a first step
    digest = hashlib.sha256(after.numpy().tobytes()).hexdigest()
    return digest, sum(p.to_local().numel() for p in policy.parameters()), len(after)


@pytest.mark.parametrize("flags, groups", [("", 1), ("--replicate 2 --offload_params", 2)])
def test_four_ranks_train_one_model_and_by_default_each_holds_a_quarter_of_it(world, flags, groups):
    digests, held, whole = zip(*on_ranks(4, one_step, world / "data", flags))
    assert len(set(digests)) == 1
    assert sum(held) == groups * whole[0]
    assert max(held) < 1.2 * groups * whole[0] / 4         # modulations of one row stay whole on one rank


def plan(*flags, videos=2):
    """The plan of 2^31 numbers over 8 ranks, 1 GiB each, and of 2 videos whose tokens 4 ranks share."""
    ranks = SimpleNamespace(mesh=SimpleNamespace(shape=(2, 8)), device=torch.device("cpu"), cp_size=4)
    config = CONFIGS["wan2.1-t2v-1.3b"]
    weight = SimpleNamespace(numel=lambda: 2 ** 31, dtype=torch.float32, requires_grad=True)
    model = SimpleNamespace(config=config, parameters=lambda: [weight])
    return memory.memory_plan(train.parse_args(flags), model, 2 ** 15 - 3, videos, True, ranks)


def test_the_plan_says_what_is_on_each_rank_and_what_on_the_cpu():
    # kept: 2 videos x 30 blocks x 2^13 tokens x 1536 channels = 0.703125 * 2^30, times these bytes of memory.kept_bytes
    line = plan()                                          # 36 + 4 * (11 + 2 * 8960 / 1536)
    assert "weights 1.000, gradients 1.000, AdamW 2.000, reference 1.000, ema 1.000, kept activations 89.062" in line
    line = plan("--checkpointing", "full", "--offload_params", "--chunk_tokens", "4096", "--ref", "offload",
                "--ema_decay", "0")                        # 2 bytes
    assert ("weights 1.000 (CPU), gradients 1.000 (CPU), AdamW 2.000 (CPU), reference 1.000 (CPU), kept activations "
            "1.406; plus") in line
    line = plan("--checkpointing", "selective", "--ref", "cached", "--backward", "sequential")         # 4 + 9 * 4
    assert "reference 1.000 while it is scored, then 0" in line and "kept activations 28.125;" in line
    assert "kept activations 5.625;" in plan("--checkpointing", "chunked")                              # 4 + 4
    line = plan("--checkpointing", "chunked", "--offload_activations")                                  # 4 + 4 * 4
    assert "kept activations 14.062 (CPU)" in line
    line = plan("--checkpointing", "full", "--offload_activations")                                     # 4
    assert "kept activations 2.812 (CPU)" in line
    assert "kept activations 0.000" in plan(videos=0)      # frozen blocks


# ----------------------------------------------------------------------------------------------------------------------
# kept activations on the CPU

class Late(memory.Offload):
    """A device that copies as late as allowed: when a copy is waited for, in the order of the requests."""
    made = []

    def __init__(self):
        super().__init__()
        self.asked, self.done, self.most = [], 0, 0
        self.made.append(self)

    def copy(self, target, source):
        if target._base is None:                           # on the "device": what is not there yet must not pass for it
            target.fill_(float("nan"))
        self.asked.append((target, weakref.ref(source)))
        return len(self.asked)

    def wait(self, event):
        while self.done < event:
            target, source = self.asked[self.done]
            assert source() is not None, "its memory was given back before it was copied"
            target.copy_(source())
            self.asked[self.done], self.done = None, self.done + 1

    def keep(self, flat):
        kept = super().keep(flat)
        on_device = [reference for reference in self.leaving if reference() is not None and reference().x is not None]
        self.most = max(self.most, len(on_device))
        return kept


# {size of a buffer in hidden states: how many} of 5 blocks: x before each; q, k, v and the output of attention
@pytest.mark.parametrize("flags, expected", [
    (MemoryFlags("full", 0, True), {1: 5}), (MemoryFlags("full", 5, True), {1: 5}),
    (MemoryFlags("chunked", 5, True), {1: 5 * 5}), (MemoryFlags("off", -1, True), None)])
def test_offloaded_activations_are_copied_before_they_leave_and_back_before_they_are_used(monkeypatch, flags, expected):
    torch.manual_seed(0)
    plain = WanModel(dataclasses.replace(CONFIG, num_layers=5, text_len=4))
    torch.nn.init.normal_(plain.head.head.weight, std=0.2)
    late = copy.deepcopy(plain)
    monkeypatch.setattr(memory, "Offload", Late)
    save_memory(late, flags, trained=True)
    save_memory(plain, dataclasses.replace(flags, offload_activations=False), trained=True)
    store = Late.made[-1]

    def buffers():                                         # hidden states of 2 videos of 27 tokens, 32 wide
        return Counter(len(buffer) / (2 * 27 * 32 * 4) for buffer in store.free)
    in_first_turn = None
    for _ in range(2):
        inputs = torch.randn(2, 12, 3, 6, 6), torch.tensor([900.0, 300.0]), torch.randn(2, 3, 32)
        for model in (plain, late):
            model.zero_grad()
            model(*inputs).square().mean().backward()
        for one, other in zip(plain.parameters(), late.parameters()):
            assert torch.equal(one.grad, other.grad)
        in_first_turn = in_first_turn or buffers()
        assert buffers() == (expected or in_first_turn)    # the second turn uses those of the first
        assert store.most == 2                             # two at a time still on the device
    with torch.no_grad():
        late(*inputs)
    assert buffers() == in_first_turn


# ----------------------------------------------------------------------------------------------------------------------
# the reference, scored once

def scored(path, key, steps, die_at):
    """
    Score two positions of each step on this rank; a position p has errors p + 1/4 and p + 1/2. Returns the steps it
    scored, and all errors.
    """
    ranks, calls = start_ranks(), []

    def positions(step):
        begin = 4 * step + 2 * ranks.rank
        return [range(begin, begin + 2)]

    def score(part):
        if part.start // 4 == die_at:
            raise KeyboardInterrupt
        calls.append(part.start // 4)
        return torch.tensor([[p + 0.25 for p in part], [p + 0.5 for p in part]])
    errors = open_errors(path, key, 4 * steps)
    try:
        score_reference(path, key, errors, range(steps), 4, score, positions, ranks, every=0.0)
    except KeyboardInterrupt:
        pass
    return calls, errors.tolist()


def test_scoring_resumes_where_it_was_killed_and_more_steps_score_only_what_is_missing(tmp_path):
    path, key = tmp_path / "ref_errors.safetensors", {"seed": 0, "data": "abc"}
    assert [calls for calls, _ in on_ranks(2, scored, path, key, 5, 3)] == [[0, 1, 2]] * 2
    for steps, expected in ((5, [3, 4]), (6, [5]), (4, []), (6, [])):
        for calls, errors in on_ranks(2, scored, path, key, steps, -1):
            assert calls == expected
            assert errors[:4 * steps] == [[p + 0.25, p + 0.5] for p in range(4 * steps)]
    with pytest.raises(ValueError, match="ref_errors.safetensors.* seed = 0, this run has seed = 1.*delete that file"):
        open_errors(path, key | {"seed": 1}, 4)


SMALL = ("--ema_decay", "0.9", "--batch_size", "4", "--steps", "4", "--save_every", "100")


@pytest.fixture(scope="module")
def with_average(world, tmp_path_factory):
    """The run that the ones below must repeat: one rank, everything in its place."""
    return run(world, tmp_path_factory.mktemp("live") / "out", *SMALL)


def cached_errors(out):
    """The only file of cached errors in a run's folder."""
    (file,) = out.glob("ref_errors_*.safetensors")
    return load_file(file)["errors"]


def rows_without_times(result):
    times = ("seconds", "memory_gib", "tokens_per_second")
    return [{key: value for key, value in row.items() if key not in times} for row in result[0]]


@pytest.fixture(scope="module")
def with_cache(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    return folder, run(world, folder / "out", *SMALL, "--ref", "cached")


def test_a_cached_reference_gives_the_same_run_to_the_last_bit(with_average, with_cache):
    folder, result = with_cache
    assert rows_without_times(result) == rows_without_times(with_average)
    assert all(torch.equal(result[1][name], with_average[1][name]) for name in result[1])
    errors = cached_errors(folder / "out")
    assert errors.shape == (16, 2)                         # 4 steps of 4 pairs
    for row, of_step in zip(result[0], errors.split(4)):
        assert [row["ref_err_win"], row["ref_err_lose"]] == pytest.approx(of_step.mean(0).tolist(), rel=1e-6)


@pytest.mark.slow
def test_a_run_cut_in_every_way_at_once_and_resumed_in_another_is_the_same_run(world, with_average, tmp_path):
    flags = (*SMALL, "--ref", "cached")
    cut = "--steps 2 --replicate 2 --cp_size 2 --offload_params --checkpointing full --offload_activations"
    run(world, tmp_path / "out", *flags, *cut.split(), ranks=4)
    cut = "--resume latest --backward sequential --checkpointing chunked --offload_activations --grad_accum 2"
    resumed = run(world, tmp_path / "out", *flags, *cut.split(), ranks=2)
    same_run(resumed, with_average)


def test_errors_of_another_numerical_path_are_another_file_and_those_of_the_same_are_used(world, with_cache, tmp_path):
    shutil.copytree(with_cache[0] / "out", tmp_path / "out")
    before = cached_errors(tmp_path / "out")
    (file,) = (tmp_path / "out").glob("ref_errors_*")
    content = file.read_bytes()
    flags = (*SMALL, "--ref", "cached", "--resume", "latest", "--steps", "5")
    run(world, tmp_path / "out", *flags, "--backward", "sequential")           # from step 4 on by another path
    assert len(list((tmp_path / "out").glob("ref_errors_*"))) == 2 and file.read_bytes() == content
    run(world, tmp_path / "out", *flags, "--steps", "6")                       # by the first path: two more steps
    errors = load_file(file)["errors"]
    assert torch.equal(errors[:16], before) and errors.shape == (24, 2)
    assert errors[:16].isfinite().all() and errors[16:20].isnan().all() and errors[20:].isfinite().all()


def test_a_run_of_another_seed_or_on_changed_data_is_refused_before_anything_is_loaded(
        world, with_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "build_model", lambda *args: pytest.fail("a model was loaded"))
    shutil.copytree(with_cache[0] / "out", tmp_path / "out")
    shutil.copytree(world / "data", tmp_path / "data")
    same = (*SMALL, *"--ref cached --resume latest --min_timestep 0 --learning_rate 2e-4 --warmup_steps 2".split(),
            "--max_grad_norm", "0.3")
    assert "seed = 0, this run has seed = 1" in main_fails(world, tmp_path, *same, "--seed", "1")
    message = main_fails(world, tmp_path, *same, "--min_timestep", "300")
    assert "min_timestep = 0.0, this run has min_timestep = 300.0" in message
    path = tmp_path / "data" / "negatives" / "007.safetensors"
    tensors = load_file(path)
    tensors["latents"] += 1e-3                             # the same names and sizes
    metadata = read_sample(world / "data" / "negatives" / path.name)["metadata"]
    save_file(tensors, path, metadata=metadata)
    assert "trained with data = " in main_fails(world, tmp_path, *same, "--data", str(tmp_path / "data"))


# ----------------------------------------------------------------------------------------------------------------------
# what cannot be

@pytest.mark.parametrize("flags, words", [
    ("--cp_size 2", ["--cp_size 2", "on 2 ranks", "start a multiple of 2"]),
    ("--cp_size 0", ["--cp_size 0"]),
    ("--replicate 2", ["--replicate 2", "1 ranks do not divide into 2 groups"]),
    ("--chunk_tokens 64", ["--chunk_tokens 64 does nothing", "--checkpointing off", "chunked or full"]),
    ("--loss sft --ref cached", ["--ref cached", "--loss sft has none"]),
])
def test_flags_that_do_not_go_together_are_refused_with_the_reason(world, tmp_path, flags, words):
    message = main_fails(world, tmp_path, *flags.split())
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


def refusal(argv):
    with pytest.raises(ValueError) as error:
        train_main(argv)
    return str(error.value)


@pytest.mark.parametrize("ranks, flags, words", [
    (3, "--cp_size 3", ["--cp_size 3", "4 heads", "--model tiny"]),
    (2, "--cp_size 2 --backward pair", ["--cp_size 2 with --backward pair", "each pair on 4 ranks"]),
    (3, "--replicate 2", ["3 ranks do not divide into 2 groups"]),
    (4, "--cp_size 2 --batch_size 3", ["--batch_size 3", "2 data ranks"])])
def test_ranks_that_do_not_fit_are_refused_on_every_one_of_them(world, tmp_path, ranks, flags, words):
    argv = ["--init", str(world / "base"), "--data", str(world / "data"), "--out", str(tmp_path / "out")]
    for message in on_ranks(ranks, refusal, [*argv, *flags.split()]):
        assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()
