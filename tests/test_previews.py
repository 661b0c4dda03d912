"""Previews of data that is not of the embedded world: the same noise each time; real, before and now side by side."""
import torch

import weights
from conftest import SHAPE, main_fails, run
from data import open_data
from samples import read_sample, sample_files, write_sample
from model import CONFIGS
from weights import load_wan
from sample import Sampler, generate
from samples import seed_of
from evaluate import Preview
from pictures import contact_sheet, false_colours


def panes(folder):
    """The samples of a folder, each cut into its panes: (samples, panes, C, F, H, W)."""
    samples = [read_sample(path)["latents"].split(SHAPE[3], dim=3) for path in sample_files(folder)]
    return torch.stack([torch.stack(panes_of_sample) for panes_of_sample in samples])


def test_previews_show_real_before_and_now_with_the_same_noise_on_any_number_of_ranks(world, tmp_path):
    run(world, tmp_path / "out", "--sample_every", "2", "--steps", "4", "--sample_steps", "2", ranks=2)
    step, after = (panes(tmp_path / "out" / "samples" / name) for name in ("step_000002", "after"))
    assert step.shape == (4, 3, *SHAPE) and torch.equal(step[:, :2], after[:, :2])
    samples = Preview(open_data(world / "data", pairs=True), Sampler(steps=2)).items
    assert torch.equal(step[:, 0], torch.stack([sample["win"] for sample in samples]))
    contexts = [sample["context"] for sample in samples]
    seeds = [seed_of("preview", i) for i in range(4)]
    for path, pane in ((world / "base", step[:, 1]), (tmp_path / "out" / "export", after[:, 2])):
        made = generate(load_wan(path, CONFIGS["tiny"]), contexts, seeds, SHAPE, Sampler(steps=2))
        assert (made - pane).norm() < 1e-4 * made.norm()
    # training shows
    assert (step[:, 2] - step[:, 1]).norm() > 1e-4 * step[:, 1].norm() < (after[:, 2] - step[:, 2]).norm()
    first = read_sample(tmp_path / "out" / "samples" / "after" / "000.safetensors")
    assert first["metadata"]["source"] == "real | before | after"
    assert first["metadata"]["prompt"] == samples[0]["metadata"]["prompt"]
    # pictures, in false colours, and a page of the last
    folder = tmp_path / "out" / "samples"
    for name, latents in (("step_000002", step), ("after", after)):
        clips = [false_colours(latents[:, i], step[:, 0]) for i in range(3)]
        clips = [clip[i] for i in range(4) for clip in clips]
        assert (folder / f"{name}.png").read_bytes() == contact_sheet(clips, group=3)
    page = (folder / "after.html").read_text()
    for text in ("out: previews", *(f"<h2>{sample['metadata']['prompt']}</h2>" for sample in samples),
                 "<th>real</th>", "<th>before</th>", "<th>after</th>", "--decode"):
        assert text in page


def test_previews_are_spread_over_the_data_and_of_one_shape(tmp_path):
    for i in range(6):
        shape = SHAPE if i else (*SHAPE[:3], 4)
        for name in ("real", "negatives"):
            write_sample(tmp_path / name / f"{i}.safetensors", torch.full(shape, float(i)), torch.zeros(1 + i, 32), {})
    # the first is alone of its shape
    assert len(Preview(open_data(tmp_path, pairs=True), Sampler()).items) == 1
    for name in ("real", "negatives"):
        (tmp_path / name / "0.safetensors").unlink()
    samples = Preview(open_data(tmp_path, pairs=True), Sampler(), count=2).items
    assert [sample["win"].mean().item() for sample in samples] == [1.0, 4.0]


def test_an_expert_of_two_cannot_be_previewed_alone(world, tmp_path, monkeypatch):
    monkeypatch.setitem(weights.BOUNDARIES, "tiny", 875)
    message = main_fails(world, tmp_path, "--sample_every", "5", "--min_timestep", "900")
    assert "--sample_every: one expert of tiny cannot sample alone" in message
