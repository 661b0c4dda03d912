import io
import os
import re
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

av = pytest.importorskip("av", reason="real video needs PyAV: pip install -r requirements-video.txt")

from conftest import write_video
from samples import write_whole
from make_videos import refusal
from pictures import animated_png, contact_sheet, false_colours, page, png, to_rgb


def test_an_mp4_needs_even_sides_and_leaves_no_half_file(tmp_path, monkeypatch):
    assert "frames of 15 x 16 pixels; an mp4 needs even sides" in refusal(
        write_video, tmp_path / "a.mp4", torch.zeros(3, 2, 15, 16), 8
    )
    write_video(tmp_path / "a.mp4", torch.zeros(3, 2, 15, 17), 8, upscale=2)
    # killed when all but the last step is done
    monkeypatch.setattr(
        os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "b.mp4", torch.zeros(3, 2, 16, 16), 8)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_a_contact_sheet_shows_rows_of_evenly_spread_frames(tmp_path):
    levels = torch.linspace(-1, 0.9, 15)
    videos = [
        levels[None, :, None, None].expand(3, 15, 4, 6),
        torch.full((3, 15, 4, 6), -1.0),
        torch.full((3, 15, 4, 6), 0.1),
    ]
    write_whole(tmp_path / "sheet.png", contact_sheet(videos, columns=3, upscale=2, group=2))
    with av.open(str(tmp_path / "sheet.png")) as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert image.shape == ((8 + 2) + (8 + 8) + (8 + 2), 3 * (12 + 2), 3)  # the wider gap stands after the second row
    # frames 0, 7 and 14 of the first video: 127.5 * (1 + [-1, -0.05, 0.9])
    assert [image[4, x, 0] for x in (6, 20, 34)] == [
        0,
        121,
        242,
    ]
    assert (image[:8, 12:14] == 255).all() and (image[18:26] == 255).all()  # white lines between
    assert image[14, 6, 0] == 0 and image[30, 6, 0] == 140
    assert "takes videos of one shape" in refusal(contact_sheet, [torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 4, 6)])


def open_picture(content):
    image = pytest.importorskip("PIL.Image", reason="read by Pillow, which diffusers brings (requirements-video.txt)")
    return image.open(io.BytesIO(content))


def frames_of(content):
    """The frames (F, H, W, 3) of a PNG file, and the milliseconds that each stays."""
    file = open_picture(content)
    frames, durations = [], []
    for number in range(getattr(file, "n_frames", 1)):
        file.seek(number)
        frames.append(np.asarray(file.convert("RGB")))
        durations.append(file.info.get("duration"))
    return np.stack(frames), durations


def test_an_animated_png_plays_its_pictures_in_a_loop_and_other_readers_see_the_first():
    pictures = np.random.default_rng(0).integers(0, 256, (5, 6, 9, 3), dtype=np.uint8)
    content = animated_png(pictures, fps=8)
    frames, durations = frames_of(content)
    assert np.array_equal(frames, pictures) and durations == [125.0] * 5
    assert open_picture(content).info["loop"] == 0         # without end
    with av.open(io.BytesIO(png(pictures[0]))) as still, av.open(io.BytesIO(content), format="png_pipe") as moving:
        images = [next(file.decode(video=0)).to_ndarray(format="rgb24") for file in (still, moving)]
    assert np.array_equal(images[0], pictures[0]) and np.array_equal(images[1], pictures[0])


class Page(HTMLParser):
    """The content of a page: its tags in order, the cells of its tables, [(alt, bytes)] of its pictures."""
    def __init__(self, content):
        super().__init__()
        self.tags, self.texts, self.pictures = [], [], []
        self.feed(content.decode())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        if tag == "img":
            kind, _, data = attributes["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.pictures.append((attributes["alt"], b64decode(data)))

    def handle_data(self, text):
        self.texts += [text.strip()] if text.strip() else []


def test_a_page_shows_marks_and_of_every_caption_labelled_rows_without_scripts_or_other_files():
    generator = torch.Generator().manual_seed(0)
    rows = {label: torch.rand(2, 3, 4, 48, 32, generator=generator) * 2 - 1 for label in ("real", "after & before")}
    captions = ['a "red" <script>alert(1)</script>', "b"]
    marks = {"after": {"drift": 1.25, "broken": 0.5}, "better is": {"drift": "lower", "broken": "lower"}}
    content = page("a <run>", captions, rows, marks, fps=8, note="so & so")
    shown = Page(content)
    assert shown.texts[3:] == ["so & so", "drift", "broken", "after", "1.250", "0.500", "better is", "lower", "lower",
                               captions[0], "real", "after & before", "b", "real", "after & before"]
    assert "script" not in shown.tags and not re.search(rb"https?:|url\(|href", content)
    expected = [(f"{label}: {caption}", rows[label][i]) for i, caption in enumerate(captions) for label in rows]
    assert [alt for alt, _ in shown.pictures[::2]] == [alt for alt, _ in shown.pictures[1::2]] == [
        alt for alt, _ in expected]
    for (_, moving), (_, still), (_, video) in zip(shown.pictures[::2], shown.pictures[1::2], expected):
        frames, durations = frames_of(moving)
        assert np.array_equal(frames, to_rgb(video)) and durations == [125.0] * 4
        assert still == contact_sheet([video], upscale=2)  # 96 lines high, as they are shown
    assert b"<table>" not in page("a", [], rows, {}, fps=8)


def test_false_colours_are_the_directions_in_which_latents_vary_most():
    # of four channels the third varies most, then the first, then the fourth; the second is always 7
    values = torch.tensor([1.0, -1.0]).repeat(32).view(1, 4, 4, 4)
    like = torch.zeros(1, 4, 4, 4, 4)
    like[:, 2], like[:, 1] = 4 * values + 1, 7.0
    like[:, 0] = 2 * values.transpose(1, 3)
    like[:, 3] = values.transpose(2, 3)
    colours = false_colours(like, like)
    assert colours.shape == (1, 3, 4, 4, 4)
    spread = like[:, 2].std()                              # red is the third channel, up to its sign
    assert torch.allclose(colours[:, 0].abs(), ((like[:, 2] - 1) / (2 * spread)).abs(), atol=1e-5)
    # the colours are those of `like` whatever is shown: what is half as far from the mean is half as bright
    mean = like.mean((0, 2, 3, 4), keepdim=True)
    assert torch.allclose(false_colours(mean + (like - mean) / 2, like), colours / 2, atol=1e-5)
    assert torch.isfinite(false_colours(torch.zeros(1, 4, 2, 2, 2), torch.zeros(1, 4, 2, 2, 2))).all()
