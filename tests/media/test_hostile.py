"""A folder of hostile files: every one gives pixels or one sentence, in bounded memory, without a warning."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from diffalign import media
from diffalign.media.files import reading
from tests.media.hostile import KINDS, image, video, write_corpus

VIDEOS = (".mp4", ".webm", ".avi", ".gif")
IMAGE_PIXELS, VIDEO_PIXELS, VIDEO_FRAMES = 2**20, 2**20, 64

PIXELS = {  # these must be read, and in this size (height, width)
    "a JPEG named PNG": (32, 48),
    "one pixel": (1, 1),
    "CMYK": (32, 48),
    "colour of 16 bits": (8, 8),
    "palette with transparency": (32, 48),
    "an animated PNG": (32, 48),
    "an animated WebP": (32, 48),
    "an animated GIF": (32, 48),
    "turned by EXIF": (48, 32),
    "a name that is no UTF-8": (32, 48),
    "thousands of chunks": (8, 8),
    "a turned video": (32, 32),
}
EITHER = {what for what in KINDS if what.startswith(("a cut", "a spoilt"))} | {"unknown critical chunk"}


def read(path):
    """The pixels of an image or video, uint8 (F, 3, H, W)."""
    if path.suffix in VIDEOS:
        return media.open_video(path, max_frames=VIDEO_FRAMES, max_pixels=VIDEO_PIXELS).frames
    return media.to_uint8(media.from_pil(media.open_image(path, max_pixels=IMAGE_PIXELS)))


def pixels_or_reason(path):
    """`read`, or the sentence that says why not, checked to be one: it names the file, and can be printed."""
    try:
        return read(path)
    except media.MediaError as error:
        message = str(error)
    assert message.isprintable(), ascii(message)
    assert message.endswith("."), message
    assert path.name[:5] in message, message
    return message


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("hostile"), 2 * len(KINDS))


def test_every_file_gives_pixels_or_a_reason(corpus, recwarn):
    assert {what for _, what in corpus} == set(KINDS)
    for path, what in corpus:
        found = pixels_or_reason(path)
        if what in PIXELS:
            assert not isinstance(found, str), f"{what}: {found}"
            assert found.dtype == torch.uint8
            assert tuple(found.shape[-2:]) == PIXELS[what], what
        elif what not in EITHER:
            assert isinstance(found, str), f"{what} was read, as {tuple(found.shape)}"
    assert not recwarn.list


def test_the_filters_of_warnings_are_put_back_in_whatever_order_threads_leave(tmp_path):
    """Filters are the process's own: if each file put back those that it found, the second would silence for good."""
    file, before = tmp_path / "file", list(warnings.filters)
    file.write_bytes(b"x")
    first, second = (reading(file, media.ImageError, 10) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    warnings.warn("while one is open", UserWarning, stacklevel=1)  # would be an error here
    second.__exit__(None, None, None)
    assert warnings.filters == before
    with pytest.warns(UserWarning, match="told"):
        warnings.warn("told", UserWarning, stacklevel=1)


REASONS = {
    "a BMP named PNG": "not a PNG, JPEG, WEBP image",
    "a PNG bomb": "12000 x 12000 pixels: at most 1048576",
    "a JPEG bomb": "12000 x 12000 pixels",
    "grey of 16 bits": "more than 8 bits a channel",
    "empty image": "is empty",
    "empty video": "is empty",
    "a folder": "is a folder",
    "a named pipe": "is a device",
    "a link to nothing": "is a link to nothing",
    "a sparse file of 4 GiB": "4,294,967,296 bytes",
    "a video turned askew": "only quarter turns",
    "a long video": "has 100 frames: at most 64",
    "a long video without a count": "more than 64 frames",
    "a large video": "2 frames of 2048 x 2048 pixels",
    "a PNG named MP4": "no video of a kind that is read",
    "a video larger than its header says": "has more than 1048576 pixels",
    "sound only": "holds no video",
}


def test_the_reasons_say_what_is_wrong(corpus):
    for path, what in corpus[: len(KINDS)]:
        if what in REASONS:
            with pytest.raises(media.MediaError, match=REASONS[what]):
                read(path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read as Linux tells it")
def test_hostile_files_take_bounded_memory(tmp_path):
    """Read in a process of its own, so that its peak is that of reading; a bomb alone would take hundreds of MiB."""
    write_corpus(tmp_path / "corpus", 300)
    (tmp_path / "good.png").write_bytes(image("PNG"))
    (tmp_path / "good.mp4").write_bytes(video())
    script = (
        "import json, re, sys, warnings\n"
        "from pathlib import Path\n"
        "warnings.simplefilter('error')\n"
        "from tests.media.test_hostile import pixels_or_reason, read\n"
        # Not resource.getrusage, whose peak begins with that of the process that started this one.
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 2**10\n"
        "folder = Path(sys.argv[1])\n"
        "shapes = [list(read(folder / name).shape) for name in ('good.png', 'good.mp4')]\n"
        "before = peak()\n"
        "found = [pixels_or_reason(path) for path in sorted((folder / 'corpus').iterdir())]\n"
        "reasons = sum(isinstance(row, str) for row in found)\n"
        "print(json.dumps({'shapes': shapes, 'rows': len(found), 'reasons': reasons, 'growth': peak() - before}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["shapes"] == [[1, 3, 32, 48], [12, 3, 32, 32]]
    assert found["rows"] == 300
    assert 150 < found["reasons"] < 300
    assert found["growth"] < 128, found
