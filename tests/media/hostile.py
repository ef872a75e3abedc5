"""A folder of files that a scorer must survive: broken, lying, huge, oddly named, or not files at all."""

import io
import os
import struct
import zlib
from functools import cache
from pathlib import Path

import av
import numpy as np
from PIL import Image

BIG = 12_000  # pixels a side that the header of a bomb promises: below where Pillow itself refuses


def write_corpus(folder: Path, number: int) -> list[tuple[Path, str]]:
    """Writes ``number`` entries, of every kind in turn, the same every time. Returns each path and what is wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = []
    for index in range(number):
        what, (suffix, make) = list(KINDS.items())[index % len(KINDS)]
        path = folder / f"{index:05d}{suffix}"
        if what == "a name that is no UTF-8":
            path = Path(os.fsdecode(os.fsencode(folder) + b"/%05d-\xff\xfe\n.png" % index))
        made = make(np.random.default_rng(index)) if make else special(what, path)
        if made is not None:
            path.write_bytes(made)
        corpus.append((path, what))
    return corpus


def special(what, path):
    if what == "a folder":
        path.mkdir()
    elif what == "a named pipe":
        os.mkfifo(path)
    elif what == "a link to nothing":
        path.symlink_to("nothing.png")
    elif what == "a sparse file of 4 GiB":
        path.write_bytes(PNG + struct.pack(">I", 2**31 - 1) + b"iCCP")
        os.truncate(path, 2**32)
    return None


@cache
def image(form, mode="RGB", **options):
    size = (48, 32)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))
    if mode == "one":
        picture = picture.crop((0, 0, 1, 1))
    elif mode == "I;16":
        picture = Image.fromarray(np.arange(48 * 32, dtype=np.uint16).reshape(size[::-1]) * 40)
    elif mode == "palette with transparency":
        picture = picture.convert("P")
        options["transparency"] = bytes(range(256))
    elif mode == "animated":
        options |= {"save_all": True, "append_images": [picture.rotate(90), picture.rotate(180)]}
    elif mode == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    else:
        picture = picture.convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


PNG = b"\x89PNG\r\n\x1a\n"


def chunk(kind, body=b""):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks, width=8, height=8, depth=8, colour=2):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return PNG + header + b"".join(chunks) + chunk(b"IEND")


def pixels(size):
    return chunk(b"IDAT", zlib.compress(bytes(size)))


@cache
def zipped_bomb():
    return zlib.compress(bytes(64 * 2**20), 9)  # 64 kB


@cache
def png_bomb():
    """600 kB that become 576 MiB: every pixel is there."""
    return png(chunk(b"IDAT", zlib.compress(bytes(BIG * (BIG + 1)), 1)), width=BIG, height=BIG, colour=0)


def jpeg_bomb(rng):
    data = bytearray(image("JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", BIG, BIG)
    return bytes(data)


def webp_bomb(rng):
    canvas = struct.pack("<I", 16382)[:3]
    body = (
        b"WEBPVP8X"
        + struct.pack("<I", 10)
        + b"\x02\0\0\0"
        + canvas
        + canvas
        + b"ANIM"
        + struct.pack("<I", 6)
        + bytes(6)
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


@cache
def video(form="mp4", codec="libx264", size=32, frames=12, pixel_format="yuv420p", turned=0, options=()):
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    with av.open(buffer, "w", format=form, options=dict(options)) as container:
        stream = container.add_stream(codec, rate=8, options={"preset": "ultrafast"} if codec == "libx264" else {})
        stream.width = stream.height = size
        stream.pix_fmt = pixel_format
        if turned:
            stream.set_display_rotation(turned)
        for _ in range(frames):
            still = np.zeros((size, size, 3), np.uint8)
            still[:16, :16] = rng.integers(0, 255, (16, 16, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(still, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@cache
def audio():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def lying_avi(rng):
    """The container says 16 x 16, the stream in it 2048 x 2048."""
    return video("avi", "mpeg4", 2048, 1).replace(struct.pack("<II", 2048, 2048), struct.pack("<II", 16, 16))


def large_index(rng):
    """Of 2 kB, with an index that promises 2**26 samples of one byte."""
    data, count = bytearray(video()), 2**26
    for table, at, numbers in ((b"stsz", 8, (1, count)), (b"stsc", 16, (count,)), (b"stts", 12, (count,))):
        start = data.index(table) + at
        data[start : start + 4 * len(numbers)] = struct.pack(f">{len(numbers)}I", *numbers)
    return bytes(data)


def cut(data):
    return lambda rng: data()[: rng.integers(1, len(data()))]


def spoilt(data):
    """Some bytes are others."""

    def make(rng):
        found = bytearray(data())
        for at in rng.integers(0, len(found), rng.integers(1, 20)):
            found[at] = rng.integers(256)
        return bytes(found)

    return make


def whole(data):
    return lambda rng: data()


FRAGMENTS = (("movflags", "frag_keyframe+empty_moov"),)
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"

# what -> (suffix, a maker of the bytes; None: see `special`)
KINDS = {
    "a cut PNG": (".png", cut(lambda: image("PNG"))),
    "a cut JPEG": (".jpg", cut(lambda: image("JPEG"))),
    "a cut WebP": (".webp", cut(lambda: image("WEBP"))),
    "a spoilt PNG": (".png", spoilt(lambda: image("PNG"))),
    "a spoilt JPEG": (".jpg", spoilt(lambda: image("JPEG"))),
    "a spoilt WebP": (".webp", spoilt(lambda: image("WEBP"))),
    "a JPEG named PNG": (".png", whole(lambda: image("JPEG"))),
    "a BMP named PNG": (".png", whole(lambda: image("BMP"))),
    "a video named PNG": (".png", whole(video)),
    "a PNG named MP4": (".mp4", whole(lambda: image("PNG"))),
    "a PNG bomb": (".png", whole(png_bomb)),
    "a JPEG bomb": (".jpg", jpeg_bomb),
    "a WebP bomb": (".webp", webp_bomb),
    "a text bomb": (".png", lambda rng: png(chunk(b"zTXt", b"a\0\0" + zipped_bomb()), pixels(200))),
    "a profile bomb": (".png", lambda rng: png(chunk(b"iCCP", b"a\0\0" + zipped_bomb()), pixels(200))),
    "one pixel": (".png", whole(lambda: image("PNG", "one"))),
    "CMYK": (".jpg", whole(lambda: image("JPEG", "CMYK"))),
    "grey of 16 bits": (".png", whole(lambda: image("PNG", "I;16"))),
    "colour of 16 bits": (".png", lambda rng: png(pixels(8 * 49), depth=16)),
    "palette with transparency": (".png", whole(lambda: image("PNG", "palette with transparency"))),
    "an animated PNG": (".png", whole(lambda: image("PNG", "animated"))),
    "an animated WebP": (".webp", whole(lambda: image("WEBP", "animated"))),
    "an animated GIF": (".gif", whole(lambda: image("GIF", "animated"))),
    "turned by EXIF": (".jpg", whole(lambda: image("JPEG", "turned"))),
    "empty image": (".png", whole(bytes)),
    "empty video": (".mp4", whole(bytes)),
    "a folder": (".png", None),
    "a named pipe": (".png", None),
    "a link to nothing": (".png", None),
    "a sparse file of 4 GiB": (".png", None),
    "a name that is no UTF-8": (".png", whole(lambda: image("PNG"))),
    "random bytes as image": (".png", lambda rng: rng.bytes(500)),
    "random bytes as video": (".mp4", lambda rng: rng.bytes(500)),
    "random bytes after a PNG's first ones": (".png", lambda rng: PNG + rng.bytes(500)),
    "no pixels": (".png", lambda rng: png()),
    "no width": (".png", lambda rng: png(pixels(10), width=0)),
    "two headers": (".png", lambda rng: png(png(width=BIG, height=BIG)[8:33], pixels(200))),
    "thousands of chunks": (".png", lambda rng: png(chunk(b"tEXt", b"a\0b") * 2000, pixels(200))),
    "a chunk longer than the file": (".png", lambda rng: png()[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT"),
    "unknown critical chunk": (".png", lambda rng: png(chunk(b"ABCD", b"x"), pixels(200))),
    "a depth that does not exist": (".png", lambda rng: png(pixels(200), depth=7)),
    "a cut MP4": (".mp4", cut(video)),
    "a cut MP4 of fragments": (".mp4", cut(lambda: video(options=FRAGMENTS))),
    "a cut WebM": (".webm", cut(lambda: video("webm", "libvpx"))),
    "a cut AVI": (".avi", cut(lambda: video("avi", "mpeg4"))),
    "a spoilt MP4": (".mp4", spoilt(video)),
    "a spoilt WebM": (".webm", spoilt(lambda: video("webm", "libvpx"))),
    "a spoilt AVI": (".avi", spoilt(lambda: video("avi", "mpeg4"))),
    "a spoilt GIF": (".gif", spoilt(lambda: video("gif", "gif", pixel_format="rgb8"))),
    "a turned video": (".mp4", whole(lambda: video(turned=90))),
    "a video turned askew": (".mp4", whole(lambda: video(turned=30))),
    "a long video": (".mp4", whole(lambda: video(size=16, frames=100))),
    "a long video without a count": (".webm", whole(lambda: video("webm", "libvpx", 16, 100))),
    "a large video": (".mp4", whole(lambda: video(size=2048, frames=2))),
    "a video larger than its header says": (".avi", lying_avi),
    "an index of millions of samples": (".mp4", large_index),
    "sound only": (".mp4", whole(audio)),
    "a playlist named MP4": (".mp4", whole(lambda: PLAYLIST)),
}
