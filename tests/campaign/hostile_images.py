"""Files that are called images: read rightly, or refused by name, without a program started, memory filled or a false feature stored."""

from __future__ import annotations

import os
import random
import struct
import zlib
from pathlib import Path

import made
import numpy as np
from PIL import Image
from referee import Kind, Wrong

from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
from vlmfilm_plugin.errors import ImageReadError
from vlmfilm_plugin.features.images import read_image
from vlmfilm_plugin.features.store.store import FeatureStore
from vlmfilm_plugin.warmup.encode import warm_up

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
SUFFIXES = (".png", ".tif", ".jpg", ".bmp", ".gif", ".webp", ".ppm", ".jp2")
WRITTEN = {".png": "PNG", ".tif": "TIFF", ".jpg": "JPEG", ".bmp": "BMP", ".gif": "GIF", ".webp": "WEBP", ".ppm": "PPM"}
MAGICS = (
    b"", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"\xff\xd8\xff\xe0", b"BM", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8 ", b"P6\n",
    b"\0\0\0\x0cjP  \r\n\x87\n", EPS, b"%PDF-1.4\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0\0\0 ftypavif", b"8BPS", b"SIMPLE  =",
    b"\x1f\x8b\x08", b"PK\3\4", b"#!/bin/sh\n", b"<!DOCTYPE x [<!ENTITY a 'a'>]>", b"\x93NUMPY", b"SQLite format 3\0",
)  # fmt: skip


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(chance: random.Random) -> tuple[str, bytes]:
    """Return a file whose header says that it is enormous, or whose text is."""
    side = chance.choice([20_000, 60_000, 2**31 - 1, 2**32 - 1])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    gif = struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + b"\0" * 6 + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
    kinds = {
        ".png": png + chunk(b"IDAT", zlib.compress(b"\0" * 10_000_000)) + chunk(b"IEND", b""),
        ".bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, min(side, 2**31 - 1), min(side, 2**31 - 1), 1, 24, 0, 0, 0, 0, 0, 0),
        ".gif": b"GIF89a" + gif + b"\2\0;",
        ".ppm": b"P6\n%d %d\n255\n" % (side, side),
        ".tif": b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIIHHII", 256, 4, 1, side % 2**32, 257, 4, 1, side % 2**32) + b"\0" * 4,
    }
    suffix = chance.choice([*kinds, "text"])
    if suffix != "text":
        return suffix, kinds[suffix]
    small = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    text = chunk(chance.choice([b"zTXt", b"iCCP"]), b"a\0\0" + zlib.compress(b"\0" * 100_000_000, 1))
    return ".png", small + text + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


def whole(path: Path, chance: random.Random) -> np.ndarray:  # type: ignore[type-arg]
    """Write a sound image of some mode, and return what a reader must see, read before anything is damaged."""
    mode = chance.choice(["L", "RGB"]) if path.suffix in (".jpg", ".ppm", ".webp", ".bmp") else chance.choice(["L", "RGB", "P", "1", "I;16", "LA"])
    mode = "L" if path.suffix == ".gif" or (mode == "I;16" and path.suffix != ".png") or (mode == "LA" and path.suffix != ".png") else mode
    noise = np.random.default_rng(chance.randrange(2**32)).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(noise).convert(mode)
    image.save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    return np.asarray(read_image(path))


def damage(path: Path, chance: random.Random) -> str:
    """Truncate a file, or change some bytes of it."""
    data = bytearray(path.read_bytes())
    if chance.random() < 0.5:
        path.write_bytes(data[: chance.randrange(len(data))])
        return "truncated"
    for _ in range(chance.randrange(1, 10)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    path.write_bytes(data)
    return "changed"


class HostileImages(Kind):
    name, full, short = "hostile image", 2400, 60

    def prepare(self, folder: Path) -> None:
        self.programs, self.fuse = folder / "bin", folder / "started"
        self.programs.mkdir()
        for name in ("gs", "gswin32c", "gswin64c", "magick", "dvipng", "mutool"):
            (self.programs / name).write_text(f"#!/bin/sh\ntouch {self.fuse}\n")
            (self.programs / name).chmod(0o755)

    def attempt(self, number: int, folder: Path, chance: random.Random) -> str:
        os.environ["PATH"] = (
            f"{self.programs}{os.pathsep}{os.environ['PATH']}" if str(self.programs) not in os.environ["PATH"] else os.environ["PATH"]
        )
        path, truth, way = folder / f"image{chance.choice(SUFFIXES)}", None, number % 4
        if way == 0:
            path.write_bytes(chance.choice(MAGICS) + chance.randbytes(chance.choice([0, 3, 100, 5000])))
        elif way == 1:
            suffix, data = bomb(chance)
            path = folder / f"image{suffix}"
            path.write_bytes(data)
        else:
            path = folder / f"image{chance.choice(list(WRITTEN))}"
            truth, kind = whole(path, chance), damage(path, chance)
        try:
            read = np.asarray(read_image(path))
        except ImageReadError as error:
            if str(path) not in str(error):
                raise Wrong("the file is not named") from error
            return "refused"
        finally:
            if self.fuse.exists():
                raise Wrong("a program was started")
        if way == 0 and read.size:
            raise Wrong("noise was read as an image")
        if way == 1 and read.size > 1000:
            raise Wrong("a bomb was decoded")
        if truth is not None and kind == "truncated" and read.shape == truth.shape and not (read == truth).all():
            raise Wrong(f"a truncated {path.suffix} was read, with other pixels")
        return "read"


class HostileSets(Kind):
    """Folders of images among which some are bad: `warmup` names those, stores the others' true features, and nothing for the bad ones."""

    name, full, short, limit_s = "hostile data set", 160, 5, 60.0

    def attempt(self, number: int, folder: Path, chance: random.Random) -> str:
        good = made.images(folder / "images", 6)
        truth = {path.name: made.described(path) for path in good}
        settings = {"encoder": "descriptor", "cache_dir": str(folder / "cache"), "dataset_root": str(folder / "images")}
        way = ("bad files", "black", "twelve bits", "stack", "links")[number % 5]
        bad = []
        if way == "bad files":
            for index in range(chance.randrange(1, 4)):
                bad.append(folder / "images" / f"bad{index}{chance.choice(SUFFIXES)}")
                bad[-1].write_bytes(chance.choice([EPS, bomb(chance)[1], b"", chance.randbytes(500), good[0].read_bytes()[:60]]))
        elif way in ("black", "twelve bits"):
            for path in good:
                twelve = np.random.default_rng(1).integers(0, 4096, (16, 16)).astype(np.uint16)
                values = twelve if way == "twelve bits" else np.zeros((16, 16), np.uint8)
                Image.fromarray(values).save(path)
        elif way == "stack":
            bad.append(folder / "images" / f"stack{chance.choice(['.tif', '.gif', '.webp', '.png'])}")
            frames = [Image.fromarray(np.full((16, 16, 3), value, np.uint8)) for value in (0, 120, 250)]
            frames[0].save(bad[-1], save_all=True, append_images=frames[1:])
        else:
            (folder / "images" / "loop").symlink_to(folder / "images")
            (folder / "images" / "gone.png").symlink_to(folder / "nothing.png")
            (folder / "images" / "folder.png").mkdir()
            bad.append(folder / "images" / "gone.png")
            os.mkfifo(folder / "images" / "pipe.png")
            bad.append(folder / "images" / "pipe.png")
        report = warm_up(folder / "images", (), settings, show_progress=False)
        if way in ("black", "twelve bits"):
            raise Wrong(f"a data set of {way} was encoded")
        if sorted(Path(path).name for path, _ in report.failures) != sorted(path.name for path in bad) or report.encoded != len(good):
            raise Wrong(f"bad: {[path.name for path in bad]}, reported: {report.failures}")
        identity = DescriptorEncoder().identity
        with FeatureStore(folder / "cache") as store:
            rows = store.read(identity, store.keys(identity))
        stored = {key.rpartition(":")[2]: row.feature for key, row in rows.items()}
        if set(stored) != set(truth) or any(not np.array_equal(stored[name], truth[name]) for name in truth):
            raise Wrong(f"stored: {sorted(stored)}")
        return "named"
