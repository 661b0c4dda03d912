import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import streaming
import toy
from data import open_data
from samples import read_sample, write_sample
from model import CONFIGS, WanModel
from sample import Sampler
from tables import name_samples
from weights import save_wan

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder, model) of a tiny model whose velocity is not zero."""
    torch.manual_seed(0)
    model = WanModel(CONFIGS["tiny"])
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    folder = tmp_path_factory.mktemp("base")
    save_wan(model, folder)
    return folder, model.eval()


@pytest.fixture
def pairs(tmp_path):
    """A folder with ten samples in real/."""
    for i in range(10):
        latents = torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(i))
        metadata = {"prompt": toy.CAPTIONS[i], "encoder": "pixel", "fps": "8"}
        write_sample(tmp_path / "real" / f"{i:02d}.safetensors", latents, toy.encode_text(toy.CAPTIONS[i]), metadata)
    return tmp_path


def run(*flags):
    """What the command line does."""
    sample.main(sample.parse_args([str(flag) for flag in flags]))


def make_negatives(model, folder, steps, model_name="m", per_sample=1, rank=0, world=1, batch_size=64):
    """The number of negatives that were missing in the folder and are made."""
    sampler = Sampler(steps=steps)
    settings = sample.negative_settings(model_name, sampler)
    missing = sample.missing_negatives(folder, settings, "negatives", per_sample, rank, world)
    sample.make_negatives(model, missing, settings, sampler, batch_size)
    return len(missing)


def noise_of(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# grids and solvers

def test_the_uniform_grid_is_shifted():
    # 4 steps, shift 3: u = 1, 3/4, 1/2, 1/4, 0 -> 3u / (1 + 2u) = 1, 0.9, 0.75, 0.5, 0
    assert sample.uniform_grid(4, 3.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0.0])


def test_the_grid_of_unipc_is_the_official_one():
    # u = 0.999 (1 - i / N). 50 steps, shift 5, the last: u = 0.01998, 5u / (1 + 4u) = 0.0999 / 1.07992 = 0.092507
    # (diffusers would end on 96)
    grid = sample.official_grid(50, 5.0)
    assert grid[0] == pytest.approx(4.995 / 4.996)
    assert grid[49] == pytest.approx(0.0999 / 1.07992)
    assert grid[50] == 0
    timesteps = [int(1000 * sigma) for sigma in sample.official_grid(9, 1.0)]
    assert timesteps == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("flow_shift", [1.0, 5.0, 12.0])
def test_unipc_is_that_of_diffusers_on_the_same_grid(steps, flow_shift):
    scheduler = pytest.importorskip("diffusers").UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)

    def model(x, timestep):                                                    # nothing linear about it
        return torch.sin(2 * x + timestep / 200) + 0.2 * x.roll(1, -1) ** 2 / (1 + x.abs())

    def velocity(x, i):
        return model(x, scheduler.timesteps[i])

    noise = noise_of(steps, 2, 3, 2, 4, 4)
    for grid in ("official", "diffusers"):
        if grid == "official":
            scheduler.set_timesteps(sigmas=0.999 * (1 - np.arange(steps) / steps))
            sigmas = sample.official_grid(steps, flow_shift)
            assert scheduler.timesteps.tolist() == [int(1000 * sigma) for sigma in sigmas[:-1]]
        else:
            scheduler.set_timesteps(steps)
            sigmas = scheduler.sigmas.tolist()
        expected = noise
        for timestep in scheduler.timesteps:
            expected = scheduler.step(model(expected, timestep), timestep, expected, return_dict=False)[0]
        assert (sample.unipc(velocity, noise, sigmas) - expected).abs().max() <= 1e-5
    if steps > 2:
        assert (sample.euler(velocity, noise, sigmas) - expected).abs().max() > 0.01


class PointMass(torch.nn.Module):
    """The exact velocity of data that is one point: v = (x - point) / sigma. With a context, another point."""
    def __init__(self):
        super().__init__()
        self.point = torch.nn.Parameter(torch.full((1, 2, 1, 1, 1), 3.0))

    def forward(self, x, timestep, context):
        shift = context.sum(dim=(1, 2)).view(-1, 1, 1, 1, 1)
        return (x - self.point - shift) / (timestep / 1000).view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("steps", [1, 7])
def test_euler_ends_on_the_data_whatever_the_number_of_steps(steps):
    x = sample.generate(PointMass(), [torch.zeros(1, 4)] * 2, [1, 2], (2, 3, 4, 5), Sampler(steps=steps))
    assert torch.allclose(x, torch.full((2, 2, 3, 4, 5), 3.0), atol=1e-5)


def test_euler_converges_to_the_exact_path_of_a_gaussian():
    # data N(0, 0.5^2): v = x * (sigma - 0.25 (1 - sigma)) / (sigma^2 + 0.25 (1 - sigma)^2); the flow keeps
    # x / std(sigma), so x ends at 0.5 * noise
    class Gaussian(PointMass):
        def forward(self, x, timestep, context):
            s = (timestep / 1000).view(-1, 1, 1, 1, 1)
            return x * (s - 0.25 * (1 - s)) / (s ** 2 + 0.25 * (1 - s) ** 2)

    noise = noise_of(5, 1, 2, 2, 2)
    errors = []
    for steps in (20, 40, 80):
        x = sample.generate(Gaussian(), [torch.zeros(1, 4)], [5], (1, 2, 2, 2), Sampler(steps=steps, flow_shift=1.0))
        errors.append((x[0] - 0.5 * noise).norm() / noise.norm())
    assert errors[2] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)                 # first order
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


class Recorder(torch.nn.Module):
    """A model that records its inputs; its velocity is 0."""
    def __init__(self):
        super().__init__()
        self.p, self.asked = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, x, timestep, context):
        self.asked.append((x.clone(), timestep[0].item()))
        return torch.zeros_like(x)


def test_a_row_of_solvers_is_all_that_a_new_solver_needs(base, pairs, monkeypatch):
    sigmas_seen = []

    def halfway(velocity, x, sigmas):
        sigmas_seen.extend(sigmas)
        for i in range(len(sigmas) - 1):
            x = x + 0.5 * velocity(x, i)
        return x

    def squares(steps, flow_shift):
        return [(1 - i / steps) ** 2 * 0.9 for i in range(steps + 1)]

    monkeypatch.setitem(sample.SOLVERS, "halfway", (halfway, squares, lambda timestep: 10 * round(timestep / 10)))
    model = Recorder()
    sample.generate(model, [torch.zeros(1, 4)], [0], (1, 1, 2, 2), Sampler("halfway", 4))
    # 0.9 * (1, 9/16, 1/4, 1/16, 0) = 0.9, 0.50625, 0.225, 0.05625, 0; timesteps in tens
    assert sigmas_seen == pytest.approx([0.9, 0.50625, 0.225, 0.05625, 0])
    assert [timestep for _, timestep in model.asked] == [900, 510, 220, 60]
    run("--pairs", pairs, "--init", base[0], "--steps", 2, "--solver", "halfway")
    assert read_sample(pairs / "negatives" / "00.safetensors")["metadata"]["solver"] == "halfway"


# ----------------------------------------------------------------------------------------------------------------------
# generation

def test_guidance_does_not_make_up_an_empty_caption():
    # Wan's text encoder makes one row of "", its end mark; no rows are another input, which no model was trained on
    with pytest.raises(ValueError, match="guidance without `negative`"):
        sample.generate(PointMass(), [torch.zeros(1, 4)], [0], (2, 1, 2, 2), Sampler(steps=1, guidance=2.0))


def test_guidance_moves_from_the_unconditional_to_beyond_the_conditional():
    # conditional points 3 + 2, unconditional 3: guidance g ends at 3 + 2 g
    context = [torch.full((2, 4), 0.25)]
    sampler = Sampler(steps=5, flow_shift=1.0)
    for guidance in (0.0, 1.0, 2.5):
        x = sample.generate(PointMass(), context, [0], (2, 1, 2, 2), replace(sampler, guidance=guidance),
                            negative=torch.zeros(0, 4))
        assert torch.allclose(x, torch.full_like(x, 3 + 2 * guidance), atol=1e-4)
    negative = torch.full((1, 4), -0.25)                                       # its own point: 3 - 1; 2 + 2 * (5 - 2)
    x = sample.generate(PointMass(), context, [0], (2, 1, 2, 2), replace(sampler, guidance=2.0), negative=negative)
    assert torch.allclose(x, torch.full_like(x, 8.0), atol=1e-4)


class Expert(torch.nn.Module):
    """A model that records its inputs and its moves; v = 1 with a caption, 0 without."""
    def __init__(self, name, log):
        super().__init__()
        self.name, self.log, self.p = name, log, torch.nn.Parameter(torch.zeros(1))

    def to(self, device):
        self.log.append(f"{self.name} to {torch.device(device)}")
        return self

    def forward(self, x, timestep, context):
        self.log.append((self.name, timestep[0].item()))
        return torch.zeros_like(x) + context.amax(dim=(1, 2)).view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("flow_shift, boundary, high_steps", [(12.0, 0.875, 26), (5.0, 0.9, 15)])   # 40 steps of Wan2.2
def test_the_experts_change_where_they_do_in_the_official_sampler(flow_shift, boundary, high_steps):
    log = []
    sampler = Sampler("unipc", 40, flow_shift, boundary=boundary)
    sample.generate(Expert("high", log), [torch.ones(1, 4)], [0], (1, 1, 2, 2), sampler, low=lambda: Expert("low", log))
    asked = [entry for entry in log if isinstance(entry, tuple)]
    assert [name for name, _ in asked] == ["high"] * high_steps + ["low"] * (40 - high_steps)
    assert asked[high_steps - 1][1] >= 1000 * boundary > asked[high_steps][1]


def test_each_expert_has_its_guidance():
    # shift 1, 4 steps: sigma 1, 3/4 | 1/2, 1/4, 0; v = guidance, so x = noise - 4 * (1 - 1/2) - 3 * (1/2 - 0)
    noise = noise_of(0, 1, 1, 2, 2)
    sampler = Sampler(steps=4, flow_shift=1.0, guidance=4.0, boundary=0.6)
    for low_guidance, way in ((3.0, 3.5), (0.0, 4.0)):                         # 0: the same for both
        x = sample.generate(Expert("high", []), [torch.ones(1, 4)], [0], (1, 1, 2, 2),
                            replace(sampler, low_guidance=low_guidance), torch.zeros(1, 4),
                            low=lambda: Expert("low", []))
        assert torch.allclose(x[0], noise - way, atol=1e-5)


def test_one_expert_at_a_time_is_on_the_gpu():
    log = []

    def load_low():
        log.append("load low")
        return Expert("low", log)

    sampler = Sampler(steps=3, flow_shift=1.0, boundary=0.8)
    sample.generate(Expert("high", log), [torch.ones(1, 4)], [0], (1, 1, 2, 2), sampler, low=load_low)
    names = [entry if isinstance(entry, str) else entry[0] for entry in log]
    assert names == ["high", "high to cpu", "load low", "low to cpu", "low", "low", "low to cpu", "high to cpu"]


class Ti2v(torch.nn.Module):
    """Mixes frames, as attention does, so that a wrong frame 0 spoils the others."""
    config = CONFIGS["wan2.2-ti2v-5b"]

    def __init__(self):
        super().__init__()
        self.p, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, x, timestep, context):
        self.seen.append((x, timestep))
        per_frame = timestep.view(len(x), 1, x.shape[2], -1).mean(-1)[..., None, None]
        return torch.tanh(x + x.roll(1, 2)) + per_frame / 1000


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_a_given_first_frame_is_seen_clean_and_put_back_after_every_step(solver):
    first = noise_of(9, 2, 3, 1, 4, 4)
    model = Ti2v()
    made = sample.generate(model, [torch.ones(1, 4)] * 2, [1, 2], (3, 3, 4, 4), Sampler(solver, 5, 5.0),
                           first_latent=first)
    for x, timestep in model.seen:
        assert torch.equal(x[:, :, :1], first)
        assert timestep.shape == (2, 12)
        assert not timestep[:, :4].any() and (timestep[:, 4:] == timestep[0, 4]).all()
    assert torch.equal(made[:, :, :1], first)

    x = torch.stack([noise_of(seed, 3, 3, 4, 4) for seed in (1, 2)])
    x[:, :, :1] = first
    scheduler = pytest.importorskip("diffusers").UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    scheduler.set_timesteps(sigmas=0.999 * (1 - np.arange(5) / 5))
    sigmas = sample.uniform_grid(5, 5.0)
    for i in range(5):                                                         # the official way
        timestep = scheduler.timesteps[i].float() if solver == "unipc" else 1000 * sigmas[i]
        v = model(x, torch.full((2, 12), timestep).index_fill(1, torch.arange(4), 0), None)
        if solver == "unipc":
            x = scheduler.step(v, scheduler.timesteps[i], x, return_dict=False)[0]
        else:
            x = x + (sigmas[i + 1] - sigmas[i]) * v
        x[:, :, :1] = first
    assert torch.allclose(made, x, atol=1e-5)


def test_conditions_are_the_same_in_both_branches_of_guidance():
    conditions = {"y": torch.randn(2, 4, 1, 2, 2), "clip_features": torch.randn(2, 5, 3)}

    class Image(PointMass):
        def forward(self, x, timestep, context, y, clip_features):
            assert torch.equal(*y.chunk(2)) and torch.equal(y[:2], conditions["y"])
            assert torch.equal(*clip_features.chunk(2))
            return x * 0

    sampler = Sampler(steps=1, guidance=5.0)
    sample.generate(Image(), [torch.ones(1, 4)] * 2, [0, 1], (2, 1, 2, 2), sampler, torch.zeros(1, 4), **conditions)


@pytest.mark.parametrize("sampler, words", [
    (Sampler("dpm", boundary=0.9), "solver 'dpm': expected one of euler, unipc"),
    (Sampler(boundary=1.0), "boundary 1.0: two experts need"),
    (Sampler(), "boundary 0.0: two experts need"),
])
def test_what_generate_cannot_do_is_refused(sampler, words):
    with pytest.raises(ValueError, match=words):
        sample.generate(PointMass(), [torch.zeros(1, 4)], [0], (2, 1, 2, 2), sampler, low=PointMass)


def test_a_video_does_not_depend_on_the_batch_it_is_made_in(base):
    context = [toy.encode_text(caption) for caption in ("red", "a large blue square", "")]
    sampler, empty = Sampler(steps=3, guidance=2.0), toy.encode_text("")
    together = sample.generate(base[1], context, [7, 8, 9], (12, 2, 4, 4), sampler, empty)
    for i in range(3):
        alone = sample.generate(base[1], context[i:i + 1], [7 + i], (12, 2, 4, 4), sampler, empty)
        assert torch.allclose(alone[0], together[i], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_a_renoised_clip_starts_at_its_noised_self_and_takes_only_the_steps_below():
    model = Recorder()
    real = torch.full((1, 2, 1, 4, 4), 5.0)
    sample.generate(model, [torch.zeros(1, 4)], [7], (2, 1, 4, 4), Sampler(steps=4, renoise=0.8), real=real)
    assert [timestep for _, timestep in model.asked] == pytest.approx([800, 750, 500])   # of the grid 1, 0.9, 0.75, 0.5
    assert torch.allclose(model.asked[0][0], 0.2 * real + 0.8 * noise_of(7, 2, 1, 4, 4))


# ----------------------------------------------------------------------------------------------------------------------
# negatives

def test_a_renoised_negative_is_closer_to_its_real_clip(base, pairs):
    flags = ("--pairs", pairs, "--init", base[0], "--steps", 4)
    run(*flags)
    run(*flags, "--name", "negatives_near", "--renoise", 0.3)
    real, far, near = (read_sample(pairs / name / "00.safetensors") for name in ("real", "negatives", "negatives_near"))

    def distance(other):
        return (other["latents"].float() - real["latents"].float()).square().mean()

    assert distance(near) < 0.5 * distance(far)
    assert near["metadata"]["renoise"] == "0.3" and "renoise" not in far["metadata"]
    with pytest.raises(ValueError, match="was made with"):
        run(*flags, "--renoise", 0.3)
    with pytest.raises(ValueError, match="--renoise 1.5"):
        run(*flags, "--renoise", 1.5)


def test_negatives_pair_with_their_real_sample_and_say_how_they_were_made(base, pairs):
    assert make_negatives(base[1], pairs, steps=2, per_sample=2, batch_size=4) == 20
    assert len(open_data(pairs, pairs=True)) == 20
    folders = ("real", "negatives", "negatives_1")
    real, one, other = (read_sample(pairs / folder / "03.safetensors") for folder in folders)
    assert torch.equal(one["context"], real["context"])
    assert not torch.equal(one["latents"], other["latents"])
    assert one["metadata"]["prompt"] == toy.CAPTIONS[3] and one["metadata"]["encoder"] == "pixel"
    assert one["metadata"]["noise_seed"] != other["metadata"]["noise_seed"]
    seed = int(one["metadata"]["noise_seed"])
    again = sample.generate(base[1], [real["context"]], [seed], (12, 2, 4, 4), Sampler(steps=2))
    assert torch.allclose(again[0], one["latents"], atol=1e-4)


def test_the_settings_of_negatives_are_spelled_as_in_older_files():
    always = {"model": "m", "seed": "0", "steps": "20", "flow_shift": "3.0", "guidance": "1.0"}
    assert sample.negative_settings("m", Sampler()) == always
    sampler = Sampler("unipc", 40, 12.0, 4.0, 3.0, 0.875, 0.5)
    assert sample.negative_settings("m", sampler, seed=2, negative_prompt="grey") == always | {
        "seed": "2", "steps": "40", "flow_shift": "12.0", "guidance": "4.0", "solver": "unipc", "low_guidance": "3.0",
        "boundary": "0.875", "renoise": "0.5", "negative_prompt": "grey"}


def test_any_number_of_ranks_makes_the_same_files_once(base, pairs):
    made = [make_negatives(base[1], pairs, steps=2, rank=0, world=1)]
    negatives = pairs / "negatives"
    alone = {path.name: read_sample(path)["latents"] for path in negatives.glob("*")}
    for path in negatives.glob("*"):
        path.unlink()
    for rank in (2, 0, 1):
        for path in negatives.glob("*"):
            path.rename(pairs / path.name)         # as if the ranks ran at the same time, none seeing the others' files
        made.append(make_negatives(base[1], pairs, steps=2, rank=rank, world=3))
    assert made == [10, 3, 4, 3]
    for path in [*pairs.glob("*.safetensors"), *negatives.glob("*")]:
        assert torch.allclose(read_sample(path)["latents"], alone[path.name], atol=1e-4)


def test_ranks_that_start_late_still_make_their_own_share(base, pairs):
    """Ranks of sample.py do not wait for each other: the second may look when the first has written files."""
    made = [make_negatives(base[1], pairs, steps=1, rank=rank, world=2) for rank in range(2)]
    assert made == [5, 5] and len(open_data(pairs, pairs=True)) == 10


def test_existing_negatives_are_kept_and_other_settings_are_refused(base, pairs):
    make_negatives(base[1], pairs, steps=2)
    (pairs / "negatives" / "04.safetensors").unlink()
    before = (pairs / "negatives" / "05.safetensors").stat().st_mtime_ns
    assert make_negatives(base[1], pairs, steps=2) == 1
    assert (pairs / "negatives" / "05.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="was made with .*'steps': '2'.*'steps': '3'.*another --name"):
        make_negatives(base[1], pairs, steps=3)
    with pytest.raises(ValueError, match="was made with"):
        make_negatives(base[1], pairs, steps=2, model_name="another model")


def test_no_model_is_loaded_where_no_negative_is_missing(base, pairs, monkeypatch):
    flags = ("--pairs", pairs, "--init", base[0], "--steps", 1)
    run(*flags)
    monkeypatch.setattr(streaming, "load_wan", None)
    run(*flags)


def test_a_negative_whose_real_sample_has_changed_is_refused_and_one_that_does_not_say_is_kept(base, pairs):
    make_negatives(base[1], pairs, steps=1)
    real, lose = (read_sample(pairs / name / "04.safetensors") for name in ("real", "negatives"))
    write_sample(pairs / "real" / "04.safetensors", real["latents"] + 1, real["context"], real["metadata"])
    words = "negatives/04.safetensors was made for .*real/04.safetensors.* has changed .*delete the negative"
    with pytest.raises(ValueError, match=words):
        make_negatives(base[1], pairs, steps=1)
    older = {name: value for name, value in lose["metadata"].items() if name != "real"}
    write_sample(pairs / "negatives" / "04.safetensors", lose["latents"], lose["context"], older)
    assert make_negatives(base[1], pairs, steps=1) == 0


@pytest.mark.slow
def test_a_killed_run_resumes_and_leaves_no_half_file(base, pairs):
    command = [sys.executable, ROOT / "sample.py", "--init", base[0], "--pairs", pairs, "--steps", "20",
               "--batch_size", "1"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "1", "RANK": "0"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    negatives, deadline = pairs / "negatives", time.time() + 60
    while len(list(negatives.glob("*.safetensors"))) < 2 and time.time() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = list(negatives.glob("[!.]*.safetensors"))
    assert 2 <= len(left) < 10
    for path in left:
        read_sample(path)                                                      # whole
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{10 - len(left)} negatives made" in done.stdout
    assert len(open_data(pairs, pairs=True)) == 10


# ----------------------------------------------------------------------------------------------------------------------
# command line

def test_prompts_become_videos_a_sheet_and_samples(base, tmp_path):
    pytest.importorskip("av", reason="mp4 files need PyAV (requirements-video.txt)")
    (tmp_path / "prompts.txt").write_text("large red circle moving fast left\n\nsmall blue square moving slowly up\n")
    run("--init", base[0], "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out", "--steps", 2)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00000.mp4", "00000.safetensors", "00001.mp4", "00001.safetensors", "contact_sheet.png"]
    second = read_sample(tmp_path / "out" / "00001.safetensors")
    assert second["metadata"]["prompt"] == "small blue square moving slowly up"


def test_prompts_of_any_kind_become_numbered_files_in_the_folder_and_nothing_else(base, tmp_path):
    pytest.importorskip("av", reason="mp4 files need PyAV (requirements-video.txt)")
    lines = ["../../outside", "/etc/passwd", "a\0b", "x" * 5000, "猫 \u202e~", "-rf *", "same", "same", "a.txt/../b.txt"]
    before = set(tmp_path.parent.iterdir())
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    args = sample.parse_args(["--init", str(base[0]), "--out", str(tmp_path / "a" / "out"), "--steps", "1",
                              "--prompts", str(tmp_path / "lines.txt"), "", "x\ny"])
    sample.main(args)
    out = tmp_path / "a" / "out"
    names = [f"{i:05d}.{kind}" for i in range(11) for kind in ("mp4", "safetensors")]
    assert sorted(path.name for path in out.iterdir()) == [*names, "contact_sheet.png"]
    outside = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*")) if out not in path.parents]
    assert outside == [Path("a"), Path("a/out"), Path("lines.txt")]
    assert set(tmp_path.parent.iterdir()) == before
    made = [read_sample(out / f"{i:05d}.safetensors")["metadata"]["prompt"] for i in range(11)]
    assert made == [*lines, "", "x\ny"]


def prompts_made(base, folder, *prompts):
    """The prompts in the metadata of the samples that --prompts makes."""
    pytest.importorskip("av", reason="mp4 files need PyAV (requirements-video.txt)")
    run("--init", base[0], "--out", folder / "out", "--steps", 1, "--prompts", *prompts)
    return [read_sample(path)["metadata"]["prompt"] for path in sorted((folder / "out").glob("*.safetensors"))]


def test_prompt_files_may_be_several_of_any_case_of_suffix_among_prompts(base, tmp_path):
    (tmp_path / "a.TXT").write_text("red circle\nblue square\n")
    (tmp_path / "b.txt").write_text("green circle")
    made = prompts_made(base, tmp_path, tmp_path / "a.TXT", "a single prompt.", tmp_path / "b.txt")
    assert made == ["red circle", "blue square", "a single prompt.", "green circle"]


@pytest.mark.parametrize("content, expected", [
    (b"\xef\xbb\xbfred circle\r\nblue square", ["red circle", "blue square"]),   # a mark, as Notepad writes it
    ("a cat\u2028on a mat\x0bor\x85not\na dog".encode(), ["a cat\u2028on a mat\x0bor\x85not", "a dog"]),
])
def test_prompt_files_are_utf8_with_or_without_a_mark_split_at_line_feeds_only(base, tmp_path, content, expected):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert prompts_made(base, tmp_path, tmp_path / "prompts.txt") == expected


@pytest.mark.parametrize("prompts, words", [
    (["nowhere.TXT"], "nowhere.TXT: no such file"),
    (["a cat", "nowhere.txt"], "nowhere.txt: no such file"),
    (["clips/prompts"], "clips/prompts: this looks like a path"),
    (["prompts.jsonl"], "prompts.jsonl: this looks like a path"),
    (["FOLDER/latin.txt"], "latin.txt:2: not UTF-8"),
    (["FOLDER/utf16.txt"], "utf16.txt:1: not UTF-8"),
    (["FOLDER/good.txt", "FOLDER/../FOLDER/good.txt"], "good.txt: named twice"),
    (["FOLDER/blank.txt"], "blank.txt: the file has no line with a prompt"),
    (["FOLDER"], "this looks like a path"),
    (["a cat", "a \udce4 dog"], "--prompts: 'a .udce4 dog' is not UTF-8"),
])
def test_what_is_no_prompt_is_refused_by_name(base, tmp_path, monkeypatch, prompts, words):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "FOLDER"
    folder.mkdir()
    (folder / "latin.txt").write_bytes("a dog\nein Hündchen".encode("latin-1"))
    (folder / "utf16.txt").write_bytes("a dog".encode("utf-16"))
    (folder / "good.txt").write_text("a dog")
    (folder / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=words):
        run("--init", base[0], "--out", "out", "--steps", 1, "--prompts", *prompts)
    assert not Path("out").exists()


def test_text_that_no_sample_can_hold_is_refused_before_the_model_runs(base, pairs, monkeypatch):
    monkeypatch.setattr(streaming, "load_wan", None)
    with pytest.raises(ValueError, match="--negative_prompt: 'gr.udce4u' is not UTF-8"):
        run("--init", base[0], "--pairs", pairs, "--steps", 1, "--negative_prompt", "gr\udce4u")
    (pairs / "real" / "00.safetensors").rename(pairs / "real" / "\udce4.safetensors")
    with pytest.raises(ValueError, match="--pairs .*udce4.safetensors' is not UTF-8"):
        run("--init", base[0], "--pairs", pairs, "--steps", 1)


def test_existing_samples_are_not_overwritten(base, tmp_path):
    write_sample(tmp_path / "00000.safetensors", torch.zeros(12, 2, 4, 4), torch.zeros(0, 32), {})
    with pytest.raises(ValueError, match="holds samples already"):
        run("--init", base[0], "--prompts", "a red ball", "--out", tmp_path)


@pytest.mark.parametrize("flags, words", [
    ([], "either --prompts or --pairs"),
    (["--prompts", "a", "--pairs", "b"], "either --prompts or --pairs"),
    (["--pairs", "nowhere"], "nowhere/real: no such folder"),
    (["--pairs", "x", "--name", "losers"], "--name losers.*starts with 'negatives'"),
    (["--prompts", "nowhere.txt"], "nowhere.txt: no such file"),
    (["--prompts", "a", "--per_prompt", "0"], "--per_prompt 0: expected a number above 0"),
    (["--pairs", "x", "--per_prompt", "2"], "with --pairs there is --per_sample"),
    (["--pairs", "x", "--name_by", "prompt"], "--name_by are for --prompts"),
])
def test_bad_flags_are_refused_with_what_to_do(base, flags, words):
    with pytest.raises(ValueError, match=words):
        run("--init", base[0], *flags)


def test_a_missing_or_broken_model_is_named():
    with pytest.raises(ValueError, match="nowhere"):
        run("--init", "nowhere", "--prompts", "a")

# ----------------------------------------------------------------------------------------------------------------------
# several samples of a prompt, and their names

def names_of(*prompts, per_prompt=1, name_by="prompt"):
    return name_samples(list(prompts), per_prompt, name_by)


def test_samples_are_named_by_number_or_by_their_prompt():
    assert names_of("a", "b", "a", name_by="number") == [("00000", 0, 0), ("00001", 1, 0), ("00002", 2, 0)]
    assert names_of("a", "b", per_prompt=2, name_by="number") == [
        ("00000-0", 0, 0), ("00000-1", 0, 1), ("00001-0", 1, 0), ("00001-1", 1, 1)]
    assert names_of("a cat", "ein Hündchen.", per_prompt=2) == [
        ("a cat-0", 0, 0), ("a cat-1", 0, 1), ("ein Hündchen.-0", 1, 0), ("ein Hündchen.-1", 1, 1)]
    assert names_of("a", "a-1", "a-1", "a", per_prompt=2) == [                 # a prompt given again is made once
        ("a-0", 0, 0), ("a-1", 0, 1), ("a-1-0", 1, 0), ("a-1-1", 1, 1)]
    long = "x" * 179 + "yz"
    assert names_of(long, "b", name_by="prompt180") == [("x" * 179 + "y-0", 0, 0), ("b-0", 1, 0)]
    assert names_of("x" * 241) and names_of("é" * 120)     # 255 and 254 bytes with -0.safetensors


@pytest.mark.parametrize("prompts, options, words", [
    (["a and/or b"], {}, "'a and/or b-0.safetensors': no file's name has a slash"),
    (["a\nb"], {}, "a line feed"),
    (["a\0b"], {}, "control character"),
    (["../a"], {}, "a slash"),
    ([".. a"], {}, "begins with a dot"),
    (["-rf"], {}, "begins with a dot or a minus"),
    (["a", ""], {}, "is empty or"),
    (["x" * 242], {}, "takes 256 bytes, and a file's name has at most 255; .*--name_by number"),
    (["x" * 241], {"per_prompt": 11}, "takes 256 bytes"),
    (["猫" * 180], {"name_by": "prompt180"}, "takes 554 bytes"),
    (["x" * 180 + "a", "x" * 180 + "b"], {"name_by": "prompt180"}, "two prompts begin with 'xxx"),
])
def test_prompts_that_cannot_name_files_are_refused(prompts, options, words):
    with pytest.raises(ValueError, match=words):
        names_of(*prompts, **options)


def test_every_prompt_has_as_many_samples_as_asked_for_under_the_names_of_vbench(base, tmp_path):
    pytest.importorskip("av", reason="mp4 files need PyAV (requirements-video.txt)")
    longest = ("small red circle moving fast left and " + "very " * 50)[:210]  # VBench's longest has 210 bytes
    prompts = ["large blue square", longest]
    out = tmp_path / "named"
    flags = ("--init", base[0], "--steps", 1, "--batch_size", 1, "--prompts", *prompts)
    run(*flags, "--out", out, "--per_prompt", 3, "--name_by", "prompt")
    names = {f"{prompt}-{i}" for prompt in prompts for i in range(3)}
    assert {path.stem for path in out.glob("*.safetensors")} == names
    assert {path.name for path in (out / "videos").iterdir()} == {f"{name}.mp4" for name in names}
    assert {path.name for path in out.iterdir() if path.suffix != ".safetensors"} == {"videos", "contact_sheet.png"}
    made = {name: read_sample(out / f"{name}.safetensors") for name in names}
    assert all(sample["metadata"]["prompt"] == name[:-2] for name, sample in made.items())
    assert len({sample["latents"].sum().item() for sample in made.values()}) == 6

    run(*flags, "--out", tmp_path / "one")                 # the first of each, under numbers
    for number, prompt in enumerate(prompts):
        alone = read_sample(tmp_path / "one" / f"{number:05d}.safetensors")
        assert torch.equal(alone["latents"], made[f"{prompt}-0"]["latents"])
    with pytest.raises(ValueError, match="holds samples already"):
        run(*flags, "--out", out, "--name_by", "prompt")
