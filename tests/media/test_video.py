"""Videos in and out: what was saved comes back, upright, within bounds, and frames are sampled by their time."""

import sys

import av
import numpy as np
import pytest
import torch

from diffalign import media
from tests.media.hostile import image, video


def colours(height=48, width=64, frames=9):
    """A video that fades, red to the right and green downwards."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([torch.stack([x, y, torch.full_like(x, index / frames)]) for index in range(frames)])


@pytest.mark.parametrize(("height", "width", "fps"), [(48, 64, 8), (47, 63, 7.5), (48, 64, 30000 / 1001)])
def test_what_was_saved_comes_back(tmp_path, height, width, fps):
    frames = colours(height, width)
    media.save_video(frames, tmp_path / "deep" / "saved.mp4", fps)
    read = media.open_video(tmp_path / "deep" / "saved.mp4")
    assert read.frames.dtype == torch.uint8
    assert read.frames.shape == frames.shape
    assert read.fps == pytest.approx(fps, rel=1e-9)
    error = (read.frames.int() - media.to_uint8(frames).int()).abs().float()
    assert error.mean() < 3  # lossy; a wrong colour matrix would be off by 10 and more
    assert error.max() < 16
    media.save_video(media.to_uint8(frames), tmp_path / "eight.mp4", fps)
    assert torch.equal(media.open_video(tmp_path / "eight.mp4").frames, read.frames)


def test_the_file_says_its_colours(tmp_path):
    media.save_video(colours(), tmp_path / "saved.mp4", 8)
    with av.open(str(tmp_path / "saved.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (int(frame.colorspace), int(frame.color_range)) == (1, 1)  # BT.709, limited range


@pytest.mark.parametrize(
    ("suffix", "codec", "pixel_format"),
    [("matroska", "ffv1", "bgr0"), ("avi", "ffv1", "bgr0"), ("mov", "png", "rgb24")],
)
def test_lossless_files_are_read_to_the_bit(tmp_path, suffix, codec, pixel_format):
    (tmp_path / "lossless").write_bytes(video(suffix, codec, frames=3, pixel_format=pixel_format))
    read = media.open_video(tmp_path / "lossless")
    rng = np.random.default_rng(0)
    for frame in read.frames:
        expected = np.zeros((32, 32, 3), np.uint8)
        expected[:16, :16] = rng.integers(0, 255, (16, 16, 3))
        assert np.array_equal(frame.permute(1, 2, 0).numpy(), expected)
    assert read.fps == 8


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("angle", [0, 90, 180, 270])
def test_turned_and_mirrored_videos_are_upright(tmp_path, angle, mirrored):
    still = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "turned.mov"), "w") as container:
        stream = container.add_stream("png", rate=8)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "rgb24"
        stream.set_display_rotation(angle, hflip=mirrored)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(still, format="rgb24")))
        container.mux(stream.encode(None))
    read = media.open_video(tmp_path / "turned.mov").frames[0].permute(1, 2, 0).numpy()
    # FFmpeg's angle is counter-clockwise, and it mirrors what was turned.
    expected = np.rot90(still, angle // 90)
    assert np.array_equal(read, expected[:, ::-1] if mirrored else expected)


def test_bounds_are_kept_to_the_frame_and_pixel(tmp_path):
    path = tmp_path / "twelve.webm"
    path.write_bytes(video("webm", "libvpx"))  # 12 frames of 32 x 32, and no count in the header
    assert len(media.open_video(path, max_frames=12, max_pixels=12 * 32 * 32).frames) == 12
    with pytest.raises(media.VideoError, match="more than 11 frames"):
        media.open_video(path, max_frames=11)
    with pytest.raises(media.VideoError, match="more than 11 frames of 32 x 32"):
        media.open_video(path, max_pixels=12 * 32 * 32 - 1)
    with pytest.raises(media.VideoError, match=r"twelve\.webm .*1023 pixels"):
        media.open_video(path, max_pixels=1023)


def test_other_files_are_refused_and_missing_ones_told(tmp_path):
    (tmp_path / "image.mp4").write_bytes(image("PNG"))
    with pytest.raises(media.VideoError, match=r"image\.mp4 is no video"):
        media.open_video(tmp_path / "image.mp4")
    with pytest.raises(FileNotFoundError, match="none"):
        media.open_video(tmp_path / "none.mp4")
    assert issubclass(media.VideoError, media.MediaError)
    assert issubclass(media.ImageError, media.MediaError)


def test_a_playlist_reads_no_other_file(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(video())
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {tmp_path / 'secret.mp4'}\n")
    with pytest.raises(media.VideoError, match=r"list\.mp4"):
        media.open_video(tmp_path / "list.mp4")


def test_without_pyav_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install 'diffalign\[video\]'"):
        media.open_video(tmp_path / "any.mp4")


def test_what_is_no_video_is_not_saved(tmp_path):
    for frames, fps, told in [(torch.rand(3, 4, 4), 8, "F, 3"), (torch.rand(0, 3, 4, 4), 8, "one frame")]:
        with pytest.raises(ValueError, match=told):
            media.save_video(frames, tmp_path / "no.mp4", fps)
    with pytest.raises(ValueError, match="fps is 0"):
        media.save_video(torch.rand(2, 3, 4, 4), tmp_path / "no.mp4", 0)


def test_indices_at_equal_distances_keep_first_and_last():
    assert media.uniform_indices(11, 3) == [0, 5, 10]
    assert media.uniform_indices(11, 1) == [0]
    assert media.uniform_indices(11, 20) == list(range(11))
    for number in range(2, 12):
        index = media.uniform_indices(11, number)
        assert (index[0], index[-1], len(set(index))) == (0, 10, number)
