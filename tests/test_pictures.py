import os

import pytest
import torch

av = pytest.importorskip("av", reason="real video needs PyAV: pip install -r requirements-video.txt")

from conftest import write_video
from samples import write_whole
from make_videos import refusal
from pictures import contact_sheet


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
