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
import toy
from data import open_data, read_sample, write_sample
from model import CONFIGS, WanModel
from sample import Sampler
from weights import save_wan

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    model = WanModel(CONFIGS["tiny"])
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    folder = tmp_path_factory.mktemp("base")
    save_wan(model, folder)
    return folder, model.eval()


@pytest.fixture
def pairs(tmp_path):
    for i in range(10):
        g = torch.Generator().manual_seed(i)
        write_sample(tmp_path / "real" / f"{i:02d}.safetensors", torch.randn(12, 2, 4, 4, generator=g), toy.encode_text(toy.CAPTIONS[i]),
                     {"prompt": toy.CAPTIONS[i], "encoder": "pixel", "fps": "8"})
    return tmp_path


def make_negatives(model, folder, steps, model_name="m", name="negatives", per_sample=1, rank=0, world=1, batch_size=64):
    """The number of negatives that were missing in the folder and are made."""
    sampler = Sampler(steps=steps)
    settings = sample.negative_settings(model_name, sampler)
    missing = sample.missing_negatives(folder, settings, name, per_sample, rank, world)
    sample.make_negatives(model, missing, settings, sampler, batch_size)
    return len(missing)


class PointMass(torch.nn.Module):
    """The exact velocity of data that is one point: v = (x - point) / sigma. With a context, another point."""
    def __init__(self):
        super().__init__()
        self.point = torch.nn.Parameter(torch.full((1, 2, 1, 1, 1), 3.0))

    def forward(self, x, timestep, context):
        shift = context.sum(dim=(1, 2)).view(-1, 1, 1, 1, 1)
        return (x - self.point - shift) / (timestep / 1000).view(-1, 1, 1, 1, 1)


def test_the_sigma_grid_is_the_shifted_uniform_one():
    # 4 steps, shift 3: u = 1, 3/4, 1/2, 1/4, 0 -> 3u / (1 + 2u) = 1, 0.9, 0.75, 0.5, 0
    assert sample.uniform_grid(4, 3.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0.0])


def test_the_grid_of_unipc_is_the_official_one():
    # u = 0.999 (1 - i / N). 50 steps, shift 5, the last: u = 0.01998, 5u / (1 + 4u) = 0.0999 / 1.07992 = 0.092507 (diffusers would end on 96)
    grid = sample.official_grid(50, 5.0)
    assert grid[0] == pytest.approx(4.995 / 4.996) and grid[49] == pytest.approx(0.0999 / 1.07992) and grid[50] == 0
    assert [int(1000 * sigma) for sigma in sample.official_grid(9, 1.0)] == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("flow_shift", [1.0, 5.0, 12.0])
def test_unipc_is_that_of_diffusers_on_the_same_grid(steps, flow_shift):
    scheduler = pytest.importorskip("diffusers").UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
    model = lambda x, timestep: torch.sin(2 * x + timestep / 200) + 0.2 * x.roll(1, -1) ** 2 / (1 + x.abs())           # nothing linear about it
    noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(steps))
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
        found = sample.unipc(lambda x, i: model(x, scheduler.timesteps[i]), noise, sigmas)
        assert (found - expected).abs().max() <= 1e-5
    if steps > 2:
        assert (sample.euler(lambda x, i: model(x, scheduler.timesteps[i]), noise, sigmas) - expected).abs().max() > 0.01


@pytest.mark.parametrize("steps", [1, 7])
def test_euler_ends_on_the_data_whatever_the_number_of_steps(steps):
    x = sample.generate(PointMass(), [torch.zeros(1, 4)] * 2, [1, 2], (2, 3, 4, 5), Sampler(steps=steps))
    assert torch.allclose(x, torch.full((2, 2, 3, 4, 5), 3.0), atol=1e-5)


def test_euler_converges_to_the_exact_path_of_a_gaussian():
    # data N(0, 0.5^2): v = x * (sigma - 0.25 (1 - sigma)) / (sigma^2 + 0.25 (1 - sigma)^2); the flow keeps x / std(sigma), so x ends at 0.5 * noise
    class Gaussian(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))
        def forward(self, x, timestep, context):
            s = (timestep / 1000).view(-1, 1, 1, 1, 1)
            return x * (s - 0.25 * (1 - s)) / (s ** 2 + 0.25 * (1 - s) ** 2)
    noise = torch.randn((1, 2, 2, 2), generator=torch.Generator().manual_seed(5))
    errors = [(sample.generate(Gaussian(), [torch.zeros(1, 4)], [5], (1, 2, 2, 2), Sampler(steps=steps, flow_shift=1.0))[0] - 0.5 * noise).norm() / noise.norm() for steps in (20, 40, 80)]
    assert errors[2] < 0.01 and errors[0] / errors[1] == pytest.approx(2, rel=0.15) and errors[1] / errors[2] == pytest.approx(2, rel=0.15)     # first order


def test_guidance_moves_from_the_unconditional_to_beyond_the_conditional():
    # conditional points 3 + 2, unconditional 3: guidance g ends at 3 + 2 g
    context = [torch.full((2, 4), 0.25)]
    for guidance in (0.0, 1.0, 2.5):
        x = sample.generate(PointMass(), context, [0], (2, 1, 2, 2), Sampler(steps=5, flow_shift=1.0, guidance=guidance))
        assert torch.allclose(x, torch.full_like(x, 3 + 2 * guidance), atol=1e-4)
    negative = torch.full((1, 4), -0.25)                                       # its own point: 3 - 1; 2 + 2 * (5 - 2)
    x = sample.generate(PointMass(), context, [0], (2, 1, 2, 2), Sampler(steps=5, flow_shift=1.0, guidance=2.0), negative=negative)
    assert torch.allclose(x, torch.full_like(x, 8.0), atol=1e-4)


class Expert(torch.nn.Module):
    """Writes down what it is asked; v = 1 with a caption, 0 without. It answers on the CPU only, which plays the GPU; meta plays the CPU."""
    def __init__(self, name, log, device="cpu"):
        super().__init__()
        self.name, self.log, self.place = name, log, torch.nn.Parameter(torch.zeros(1, device=device))

    def to(self, device):
        self.log.append(f"{self.name} to {torch.device(device)}")
        self.place = torch.nn.Parameter(torch.zeros(1, device=device))
        return self

    def forward(self, x, timestep, context):
        assert self.place.device.type == "cpu"
        self.log.append((self.name, timestep[0].item()))
        return torch.zeros_like(x) + context.amax(dim=(1, 2)).view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("flow_shift, boundary, high_steps", [(12.0, 0.875, 26), (5.0, 0.9, 15)])       # Wan2.2's T2V and I2V, 40 steps
def test_the_experts_change_where_they_do_in_the_official_sampler(flow_shift, boundary, high_steps):
    log = []
    sample.generate(Expert("high", log), [torch.ones(1, 4)], [0], (1, 1, 2, 2),
                    Sampler("unipc", 40, flow_shift, boundary=boundary), low=lambda: Expert("low", log))
    asked = [entry for entry in log if isinstance(entry, tuple)]
    assert [name for name, _ in asked] == ["high"] * high_steps + ["low"] * (40 - high_steps)
    assert asked[high_steps - 1][1] >= 1000 * boundary > asked[high_steps][1]


def test_each_expert_has_its_guidance():
    # shift 1, 4 steps: sigma 1, 3/4 | 1/2, 1/4, 0; v = guidance, so x = noise - 4 * (1 - 1/2) - 3 * (1/2 - 0)
    noise = torch.randn((1, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    sampler = Sampler(steps=4, flow_shift=1.0, guidance=4.0, boundary=0.6)
    low = Expert("low", [])
    x = sample.generate(Expert("high", []), [torch.ones(1, 4)], [0], (1, 1, 2, 2), replace(sampler, low_guidance=3.0), low=lambda: low)
    assert torch.allclose(x[0], noise - 3.5, atol=1e-5)
    x = sample.generate(Expert("high", []), [torch.ones(1, 4)], [0], (1, 1, 2, 2), sampler, low=lambda: low)
    assert torch.allclose(x[0], noise - 4, atol=1e-5)                           # the same for both where it is not given


def test_one_expert_at_a_time_is_on_the_gpu():
    log = []

    def load_low():
        log.append("load low")
        return Expert("low", log)
    sample.generate(Expert("high", log), [torch.ones(1, 4)], [0], (1, 1, 2, 2), Sampler(steps=3, flow_shift=1.0, boundary=0.8), low=load_low)
    assert [line if isinstance(line, str) else line[0] for line in log] == ["high", "high to cpu", "load low", "low to cpu", "low", "low", "low to cpu", "high to cpu"]


class Ti2v(torch.nn.Module):
    """Mixes frames, as attention does, so that a wrong frame 0 spoils the others."""
    config = CONFIGS["wan2.2-ti2v-5b"]

    def __init__(self):
        super().__init__()
        self.p, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, x, timestep, context):
        self.seen.append((x, timestep))
        return torch.tanh(x + x.roll(1, 2)) + timestep.view(len(x), 1, x.shape[2], -1).mean(-1)[..., None, None] / 1000


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_a_given_first_frame_is_seen_clean_and_put_back_after_every_step(solver):
    first = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    model = Ti2v()
    found = sample.generate(model, [torch.ones(1, 4)] * 2, [1, 2], (3, 3, 4, 4), Sampler(solver, 5, 5.0), first_latent=first)
    for x, timestep in model.seen:
        assert torch.equal(x[:, :, :1], first) and timestep.shape == (2, 12) and not timestep[:, :4].any() and (timestep[:, 4:] == timestep[0, 4]).all()
    assert torch.equal(found[:, :, :1], first)

    x = torch.stack([torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    x[:, :, :1] = first
    scheduler = pytest.importorskip("diffusers").UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    scheduler.set_timesteps(sigmas=0.999 * (1 - np.arange(5) / 5))
    sigmas = sample.uniform_grid(5, 5.0)
    for i in range(5):                                                         # the official way
        timestep = scheduler.timesteps[i].float() if solver == "unipc" else 1000 * sigmas[i]
        v = model(x, torch.full((2, 12), timestep).index_fill(1, torch.arange(4), 0), None)
        x = scheduler.step(v, scheduler.timesteps[i], x, return_dict=False)[0] if solver == "unipc" else x + (sigmas[i + 1] - sigmas[i]) * v
        x[:, :, :1] = first
    assert torch.allclose(found, x, atol=1e-5)


def test_conditions_are_the_same_in_both_branches_of_guidance():
    class Image(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))
        def forward(self, x, timestep, context, y, clip_features):
            assert torch.equal(*y.chunk(2)) and torch.equal(y[:2], given["y"]) and torch.equal(*clip_features.chunk(2))
            return x * 0
    given = {"y": torch.randn(2, 4, 1, 2, 2), "clip_features": torch.randn(2, 5, 3)}
    sample.generate(Image(), [torch.ones(1, 4)] * 2, [0, 1], (2, 1, 2, 2), Sampler(steps=1, guidance=5.0), **given)


@pytest.mark.parametrize("sampler, words", [
    (Sampler("dpm"), "solver 'dpm': expected one of euler, unipc"),
    (Sampler(boundary=1.0), "boundary 1.0: two experts need"),
    (Sampler(), "boundary 0.0: two experts need"),
])
def test_what_generate_cannot_do_is_refused(sampler, words):
    with pytest.raises(ValueError, match=words):
        sample.generate(PointMass(), [torch.zeros(1, 4)], [0], (2, 1, 2, 2), sampler, low=PointMass)


def test_a_video_does_not_depend_on_the_batch_it_is_made_in(base):
    context = [toy.encode_text(caption) for caption in ("red", "a large blue square", "")]
    together = sample.generate(base[1], context, [7, 8, 9], (12, 2, 4, 4), Sampler(steps=3, guidance=2.0))
    for i in range(3):
        alone = sample.generate(base[1], context[i:i + 1], [7 + i], (12, 2, 4, 4), Sampler(steps=3, guidance=2.0))
        assert torch.allclose(alone[0], together[i], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_a_renoised_clip_starts_at_its_noised_self_and_takes_only_the_steps_below():
    asked = []
    class Asked(PointMass):
        def forward(self, x, timestep, context):
            asked.append((x.clone(), timestep[0].item()))
            return torch.zeros_like(x)
    real = torch.full((1, 2, 1, 4, 4), 5.0)
    noise = sample.generate(Asked(), [torch.zeros(1, 4)], [7], (2, 1, 4, 4), Sampler(steps=1))             # velocity 0: comes out as it went in
    asked.clear()
    sample.generate(Asked(), [torch.zeros(1, 4)], [7], (2, 1, 4, 4), Sampler(steps=4, renoise=0.8), real=real)
    assert [timestep for _, timestep in asked] == pytest.approx([800, 750, 500])                      # of the grid 1, 0.9, 0.75, 0.5, 0
    assert torch.allclose(asked[0][0], 0.2 * real + 0.8 * noise)


def test_a_renoised_negative_is_closer_to_its_real_clip(base, pairs):
    folder, model = base
    sample.main(sample.parse_args(["--pairs", str(pairs), "--init", str(folder), "--steps", "4"]))
    sample.main(sample.parse_args(["--pairs", str(pairs), "--init", str(folder), "--steps", "4", "--name", "negatives_near", "--renoise", "0.3"]))
    real, far, near = (read_sample(pairs / name / "00.safetensors") for name in ("real", "negatives", "negatives_near"))
    distance = lambda other: (other["latents"].float() - real["latents"].float()).square().mean()
    assert distance(near) < 0.5 * distance(far) and near["metadata"]["renoise"] == "0.3" and "renoise" not in far["metadata"]
    with pytest.raises(ValueError, match="was made with"):
        sample.main(sample.parse_args(["--pairs", str(pairs), "--init", str(folder), "--steps", "4", "--renoise", "0.3"]))
    with pytest.raises(ValueError, match="--renoise 1.5"):
        sample.main(sample.parse_args(["--pairs", str(pairs), "--init", str(folder), "--renoise", "1.5"]))


def test_negatives_pair_with_their_real_sample_and_say_how_they_were_made(base, pairs):
    assert make_negatives(base[1], pairs, steps=2, per_sample=2, batch_size=4) == 20
    found = open_data(pairs, pairs=True)
    assert len(found) == 20
    one, other = read_sample(pairs / "negatives" / "03.safetensors"), read_sample(pairs / "negatives_1" / "03.safetensors")
    real = read_sample(pairs / "real" / "03.safetensors")
    assert torch.equal(one["context"], real["context"]) and not torch.equal(one["latents"], other["latents"])
    assert one["metadata"]["prompt"] == toy.CAPTIONS[3] and one["metadata"]["encoder"] == "pixel" and one["metadata"]["noise_seed"] != other["metadata"]["noise_seed"]
    again = sample.generate(base[1], [real["context"]], [int(one["metadata"]["noise_seed"])], (12, 2, 4, 4), Sampler(steps=2))
    assert torch.allclose(again[0], one["latents"], atol=1e-4)                 # the recorded seed makes the same clip again


def test_any_number_of_ranks_makes_the_same_files_once(base, pairs, tmp_path_factory):
    made = [make_negatives(base[1], pairs, steps=2, rank=0, world=1)]
    alone = {p.name: read_sample(p)["latents"] for p in (pairs / "negatives").glob("*")}
    for path in (pairs / "negatives").glob("*"):
        path.unlink()
    for rank in (2, 0, 1):
        for path in (pairs / "negatives").glob("*"):
            path.rename(pairs / path.name)                                     # as if the ranks ran at the same time, none seeing the others' files
        made.append(make_negatives(base[1], pairs, steps=2, rank=rank, world=3))
    assert made == [10, 3, 4, 3]
    for path in list(pairs.glob("*.safetensors")) + list((pairs / "negatives").glob("*")):
        assert torch.allclose(read_sample(path)["latents"], alone[path.name], atol=1e-4)


def test_what_is_there_is_kept_and_other_settings_are_refused(base, pairs):
    make_negatives(base[1], pairs, steps=2)
    (pairs / "negatives" / "04.safetensors").unlink()
    before = (pairs / "negatives" / "05.safetensors").stat().st_mtime_ns
    assert make_negatives(base[1], pairs, steps=2) == 1
    assert (pairs / "negatives" / "05.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="was made with .*'steps': '2'.*'steps': '3'.*another --name"):
        make_negatives(base[1], pairs, steps=3)
    with pytest.raises(ValueError, match="was made with"):
        make_negatives(base[1], pairs, steps=2, model_name="another model")


def test_a_negative_whose_real_sample_has_changed_is_refused_and_one_that_does_not_tell_is_kept(base, pairs):
    make_negatives(base[1], pairs, steps=1)
    real, lose = (read_sample(pairs / name / "04.safetensors") for name in ("real", "negatives"))
    write_sample(pairs / "real" / "04.safetensors", real["latents"] + 1, real["context"], real["metadata"])
    with pytest.raises(ValueError, match="negatives/04.safetensors was made for .*real/04.safetensors.* has changed .*delete the negative"):
        make_negatives(base[1], pairs, steps=1)
    older = {name: value for name, value in lose["metadata"].items() if name != "real"}
    write_sample(pairs / "negatives" / "04.safetensors", lose["latents"], lose["context"], older)
    assert make_negatives(base[1], pairs, steps=1) == 0


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped_and_leaves_no_half_file(base, pairs):
    command = [sys.executable, str(ROOT / "sample.py"), "--init", str(base[0]), "--pairs", str(pairs), "--steps", "20", "--batch_size", "1"]
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
    assert done.returncode == 0 and f"{10 - len(left)} negatives made" in done.stdout, done.stdout + done.stderr
    assert len(open_data(pairs, pairs=True)) == 10


def test_prompts_become_videos_a_sheet_and_samples(base, tmp_path):
    pytest.importorskip("av", reason="mp4 files need PyAV (requirements-video.txt)")
    (tmp_path / "prompts.txt").write_text("large red circle moving fast left\n\nsmall blue square moving slowly up\n")
    sample.main(sample.parse_args(["--init", str(base[0]), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out"), "--steps", "2"]))
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["00000.mp4", "00000.safetensors", "00001.mp4", "00001.safetensors", "contact_sheet.png"]
    assert read_sample(tmp_path / "out" / "00001.safetensors")["metadata"]["prompt"] == "small blue square moving slowly up"


def test_prompts_of_any_kind_become_numbered_files_in_the_folder_and_nothing_else(base, tmp_path):
    pytest.importorskip("av", reason="mp4 files need PyAV (requirements-video.txt)")
    prompts = ["../../outside", "/etc/passwd", "a\0b", "x" * 5000, "猫 \u202e\n~", "-rf *", "same", "same", "a.txt/../b.txt", ""]
    before = set(tmp_path.parent.iterdir())
    args = sample.parse_args(["--init", str(base[0]), "--out", str(tmp_path / "a" / "out"), "--steps", "1", "--prompts", "x"])
    args.prompts = prompts                                                     # what no shell would pass on, too
    sample.main(args)
    out = tmp_path / "a" / "out"
    assert sorted(path.name for path in out.iterdir()) == sorted([f"{i:05d}.{kind}" for i in range(10) for kind in ("mp4", "safetensors")] + ["contact_sheet.png"])
    assert [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*")) if out not in path.parents] == [Path("a"), Path("a/out")] and set(tmp_path.parent.iterdir()) == before
    assert [read_sample(out / f"{i:05d}.safetensors")["metadata"]["prompt"] for i in range(10)] == prompts


def test_samples_that_are_there_are_not_overwritten(base, tmp_path):
    write_sample(tmp_path / "00000.safetensors", torch.zeros(12, 2, 4, 4), torch.zeros(0, 32), {})
    with pytest.raises(ValueError, match="holds samples already"):
        sample.main(sample.parse_args(["--init", str(base[0]), "--prompts", "a red ball", "--out", str(tmp_path)]))


def test_ranks_that_start_late_still_make_their_own_share(base, pairs):
    """Ranks of sample.py do not wait for each other: the second may look when the first has written files."""
    made = [make_negatives(base[1], pairs, steps=1, rank=rank, world=2) for rank in range(2)]
    assert made == [5, 5] and len(open_data(pairs, pairs=True)) == 10


@pytest.mark.parametrize("flags, words", [
    ([], "either --prompts or --pairs"),
    (["--prompts", "a", "--pairs", "b"], "either --prompts or --pairs"),
    (["--pairs", "nowhere"], "nowhere/real: no such folder"),
    (["--pairs", "x", "--name", "losers"], "--name losers.*starts with 'negatives'"),
    (["--prompts", "nowhere.txt"], "nowhere.txt: no such file"),
])
def test_bad_flags_are_refused_with_what_to_do(base, flags, words):
    with pytest.raises(ValueError, match=words):
        sample.main(sample.parse_args(["--init", str(base[0]), *flags]))


def test_a_missing_or_broken_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        sample.main(sample.parse_args(["--init", "nowhere", "--prompts", "a"]))
