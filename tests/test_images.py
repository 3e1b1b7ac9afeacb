"""An image is what a viewer shows, whatever its file is like; a mask marks what is painted white."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, TiffImagePlugin

from t2i_jax.core.errors import DataError
from t2i_jax.data.images import TURNS, TooSmall, draft_side, image_endings, levels, open_image, open_mask
from t2i_jax.data.transforms import to_square

FEW = settings(max_examples=25, deadline=None)


def saved(image, kind="PNG", **more):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **more)
    return buffer.getvalue()


def pixels(image):
    return np.asarray(open_image(image)).astype(int)


def quarters(side=16):
    x = np.zeros((side, side, 3), np.uint8)
    h = side // 2
    x[:h, :h], x[:h, h:], x[h:, :h], x[h:] = (220, 30, 30), (30, 180, 30), (30, 30, 200), x[h:]
    x[h:, :h], x[h:, h:] = (30, 30, 200), (240, 240, 240)
    return x


def ramp():
    """Grey values from 0 to 1 as floats (16, 16)."""
    return np.linspace(0, 1, 256).reshape(16, 16)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(x, kind, extra=b""):
    """A PNG of 16 bits from numbers (i, j) or (i, j, c), of PNG's own colour type `kind`."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in x)
    head = struct.pack(">IIBBBBB", x.shape[1], x.shape[0], 16, kind, 0, 0, 0)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def with_chunk(data, kind, content, before=b"IDAT"):
    at = data.index(before) - 4
    return data[:at] + chunk(kind, content) + data[at:]


# --- orientation ------------------------------------------------------------------------------------------------------


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


BACK = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
"""The transposition that undoes each orientation, as pillow numbers them."""


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_upright(orientation, kind):
    upright = Image.fromarray(quarters(32))
    stored = upright.transpose(Image.Transpose(BACK[orientation])) if orientation > 1 else upright
    more = {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif(orientation)}
    more |= {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    assert np.abs(pixels(saved(stored, kind, **more)) - quarters(32)).max() < 25


@pytest.mark.parametrize("orientation", TURNS)
def test_a_reduced_jpeg_that_is_turned_shows_the_same_crop(orientation):
    """Also where the size is no multiple of the reduction, so that the last row lies partly outside."""
    upright = detailed(131, 117)
    stored = upright.transpose(Image.Transpose(BACK[orientation]))
    whole, turned = saved(upright, "JPEG", quality=95), saved(stored, "JPEG", quality=95, exif=exif(orientation))
    assert open_image(turned, 8, 1.0).size != (131, 117)
    for x, y in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        reduced, full = (to_square(open_image(b, n, 1.0), 8, Fixed(1.0, (x, y))) for b, n in ((turned, 8), (whole, 0)))
        assert psnr(reduced, full) > 38


@FEW
@given(st.binary(max_size=60), st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_a_broken_exif_is_none(junk, kind):
    more = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    data = saved(quarters(), kind, exif=b"Exif\0\0" + junk, **more)
    assert open_image(data).size == (16, 16)


# --- numbers of other kinds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, kind",
    [
        ((ramp() * 65535).round().astype(np.uint16), "PNG"),
        ((ramp() * 65535).round().astype(np.uint16), "TIFF"),
        ((ramp() * 65535).round().astype(np.int32), "TIFF"),
        ((ramp() * (2**31 - 1)).astype(np.int32), "TIFF"),
        ((ramp() * 255).round().astype(np.int32), "TIFF"),
        (ramp().astype(np.float32), "TIFF"),
        ((ramp() * 255).astype(np.float32), "TIFF"),
        ((ramp() * 65535).astype(np.float32), "TIFF"),
        ((ramp() * 3e6).astype(np.float32), "TIFF"),
        ((ramp() * 2 - 1).astype(np.float32), "TIFF"),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.dtype}-{x.max():.0f}",
)
def test_deep_grey_keeps_its_range(x, kind):
    assert np.abs(pixels(saved(x, kind)) - (ramp() * 255)[..., None]).max() <= 1
    assert np.abs(pixels(x) - (ramp() * 255)[..., None]).max() <= 1  # and as an array


def test_a_tiff_of_deep_planes_is_refused():
    x = np.moveaxis(quarters(), 2, 0).astype("<u2") * 257
    end = 8 + 2 + 12 * 10 + 4
    tags = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 3, end)]
    tags += [(277, 3, 1, 3), (278, 4, 1, 16), (279, 4, 3, end + 12), (284, 3, 1, 2)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    places = struct.pack("<6I", *(end + 24 + 512 * i for i in range(3)), 512, 512, 512)
    data = b"II*\0" + struct.pack("<IH", 8, 10) + entries + bytes(4) + places + x.tobytes()
    with pytest.raises(DataError, match="more than 8 bits in separate planes"):
        open_image(data)


def test_16_bits_in_both_byte_orders():
    x = (ramp() * 65535).round().astype(np.uint16)
    other = Image.frombytes("I;16B", (16, 16), x.astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels(saved(other, "TIFF")), pixels(saved(x, "TIFF")))


def tiff(x, bits, photometric, kind):
    """A TIFF of one strip from the bytes of 16x16 numbers, little-endian; kind: 1 unsigned, 2 signed, 3 float."""
    tags = [(256, 3, 16), (257, 3, 16), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 4, 16), (279, 4, len(x)), (339, 3, kind)]
    entries = b"".join(struct.pack("<HHII", tag, size, 1, value) for tag, size, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(x)) + x + struct.pack("<H", len(tags)) + entries + bytes(4)


def packed_12_bits(x):
    pairs = np.rint(x * 4095).astype(int).reshape(-1, 2)
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)


@pytest.mark.parametrize(
    "data",
    [
        tiff(np.rint((1 - ramp()) * 65535).astype("<u2").tobytes(), 16, 0, 1),
        tiff(np.rint(ramp() * 32767).astype("<i2").tobytes(), 16, 1, 2),
        tiff((ramp() * (2**32 - 1)).astype("<u4").tobytes(), 32, 1, 1),
        tiff((1 - ramp()).astype("<f4").tobytes(), 32, 0, 3),
        tiff(packed_12_bits(ramp()), 12, 1, 1),
        b"P5\n16 16\n65535\n" + np.rint(ramp() * 65535).astype(">u2").tobytes(),
        b"P5\n16 16\n1023\n" + np.rint(ramp() * 1023).astype(">u2").tobytes(),
    ],
    ids=["white is 0", "signed 16", "unsigned 32", "float, white is 0", "12 bits", "PGM", "PGM of 10 bits"],
)
def test_deep_grey_of_formats_that_say_their_range(data):
    assert np.abs(pixels(data) - (ramp() * 255)[..., None]).max() <= 1


@pytest.mark.parametrize("where", [3, 8, 10**7])
def test_a_tiff_with_a_broken_exif_pointer(where):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[34665] = where
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(pixels(saved(quarters(), "TIFF", tiffinfo=tags)), quarters())


@FEW
@given(st.floats(-0.4, 0.0), st.floats(1.0, 1.9))
def test_floats_a_little_outside_are_clipped(low, high):
    """Sharpened and very bright images are not taken for those of another range."""
    x = ramp().astype(np.float32)
    x[0, 0], x[-1, -1] = low, high
    found = levels(x)
    np.testing.assert_array_equal(found.ravel()[1:-1], np.rint(ramp() * 255).ravel()[1:-1])


def test_numbers_that_are_none():
    x = np.array([[np.nan, 0.5], [np.inf, 1.0]], np.float32)
    np.testing.assert_array_equal(levels(x), [[0, 128], [255, 255]])
    with pytest.raises(DataError, match="no finite value"):
        open_image(np.full((2, 2), np.nan))
    with pytest.raises(DataError, match="numbers, not of"):
        open_image(np.array([["a"]]))


@given(st.sampled_from([(3, 8, 8), (8,), (8, 8, 5), (0, 8, 3), (8, 8, 0), (2, 8, 8, 3)]))
def test_arrays_of_other_shapes_are_refused(shape):
    with pytest.raises(DataError, match=r"\(i, j, c\) with 1 to 4 channels"):
        open_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("channels", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, bool])
def test_arrays_of_any_channels_and_numbers(channels, dtype):
    most = {np.uint8: 255, np.uint16: 65535}.get(dtype, 1)
    x = np.full((4, 4, channels) if channels else (4, 4), most, dtype)
    assert (pixels(x) == 255).all()
    if channels in (2, 4):
        x[..., -1] = 0
        x[..., 0] = 0
        assert (pixels(x) == 255).all()  # nothing is seen but white paper


# --- transparency -----------------------------------------------------------------------------------------------------


def test_clear_colours_of_16_bits():
    grey = (ramp() * 65535).round().astype(np.uint16)
    grey[0] = 12345
    found = pixels(png(grey, 0, chunk(b"tRNS", struct.pack(">H", 12345))))
    assert (found[0] == 255).all() and np.abs(found[1:] - (ramp() * 255)[1:, :, None]).max() <= 1
    colour = quarters().astype(np.uint16) * 257
    found = pixels(png(colour, 2, chunk(b"tRNS", struct.pack(">HHH", *colour[0, 0]))))
    np.testing.assert_array_equal(found[8:], quarters()[8:])
    assert (found[:8, :8] == 255).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_clear_greys_of_few_bits(bits, share):
    top = 2**bits - 1
    x = np.rint(ramp() * top).astype(np.uint8)
    clear = int(np.rint(share * top))
    rows = np.unpackbits(x[..., None], axis=-1)[..., 8 - bits :].reshape(16, -1)
    body = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, bits, 0, 0, 0, 0)) + chunk(b"tRNS", struct.pack(">H", clear))
    found = pixels(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b""))
    np.testing.assert_array_equal(found[..., 0], np.where(x == clear, 255, x.astype(int) * 255 // top))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white_in_every_mode(mode, kind):
    image = Image.fromarray(quarters()).convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.arange(16)[:, None] < 8, 0, 255).repeat(16, 1).astype(np.uint8)))
    if mode == "P":
        data = saved(image.quantize(8))
    else:
        data = saved(image.convert(mode), kind)
    found = pixels(data)
    assert (found[:8] == 255).all()
    lower = Image.fromarray(quarters()).convert("L" if mode == "LA" else "RGB").convert("RGB")
    np.testing.assert_array_equal(found[8:], np.asarray(lower)[8:])


# --- colour profiles --------------------------------------------------------------------------------------------------


def profile(swap=False, space="sRGB"):
    """sRGB, or that with the primaries of red and green exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes())
    count = struct.unpack(">I", data[128:132])[0]
    tags = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    if swap:
        r, g = tags[b"rXYZ"] + 4, tags[b"gXYZ"] + 4
        data[r : r + 8], data[g : g + 8] = bytes(data[g : g + 8]), bytes(data[r : r + 8])
    return bytes(data)


def grey_profile(gamma):
    """A grey profile of version 2 with this gamma."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"g\0" + bytes(78)
    text += bytes(-len(text) % 4)
    parts, table, at = b"", b"", 128 + 4 + 12 * 3
    for name, tag in ((b"wtpt", white), (b"kTRC", curve), (b"desc", text)):
        table += name + struct.pack(">II", at + len(parts), len(tag))
        parts += tag
    body = struct.pack(">I", 3) + table + parts
    head = struct.pack(">I", 128 + len(body)) + bytes(4) + b"\x02\x10\0\0mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + body


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_colour_profile_becomes_srgb(kind):
    more = {"lossless": True} if kind == "WEBP" else {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    stored = np.ascontiguousarray(quarters(32)[..., [1, 0, 2]])
    assert np.abs(pixels(saved(stored, kind, icc_profile=profile(True), **more)) - quarters(32)).max() < 30


def test_a_colour_profile_keeps_transparency():
    stored = np.dstack([quarters()[..., [1, 0, 2]], np.full((16, 16), 255, np.uint8)])
    stored[:8, :8, 3] = 0
    found = pixels(saved(stored, icc_profile=profile(True)))
    assert (found[:8, :8] == 255).all() and np.abs(found[8:] - quarters()[8:]).max() <= 2


@FEW
@given(st.binary(max_size=200) | st.just(profile()), st.sampled_from(["RGB", "L"]))
def test_srgb_and_broken_profiles_change_nothing(data, mode):
    image = Image.fromarray(quarters()).convert(mode)
    np.testing.assert_array_equal(pixels(saved(image, icc_profile=data)), pixels(saved(image)))


def test_a_grey_profile():
    x = np.rint(ramp() * 255).astype(np.uint8)
    found = pixels(saved(x, icc_profile=grey_profile(1.0)))[..., 0]
    light = ramp()
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(found - srgb * 255).max() <= 3
    np.testing.assert_array_equal(pixels(saved(quarters(), icc_profile=grey_profile(1.0))), quarters())  # not its kind


def test_cmyk_with_a_profile_that_is_none():
    stored = Image.fromarray(quarters()).convert("CMYK")
    assert np.abs(pixels(saved(stored, "TIFF", icc_profile=profile())) - quarters()).max() <= 2


def test_lab_is_as_exact_as_its_8_bits():
    exact, lab, srgb = ImageCms.Flags.NOOPTIMIZE, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    to_lab = ImageCms.buildTransform(srgb, lab, "RGB", "LAB", flags=exact)
    stored = ImageCms.applyTransform(Image.fromarray(quarters()), to_lab)
    assert np.abs(pixels(saved(stored, "TIFF")) - quarters()).max() <= 5


# --- files ------------------------------------------------------------------------------------------------------------


def test_endings_are_those_that_pillow_reads():
    endings = image_endings()
    assert {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2"} <= endings
    assert not {".pdf", ".eps", ".psd", ".txt", ".json", ".h5", ".mpg"} & endings


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt"])
@pytest.mark.parametrize("place", [b"IDAT", b"IEND"])
def test_long_texts_do_not_matter(kind, place):
    text = b"x" * 3_000_000
    content = {"zTXt": b"Comment\0\0" + zlib.compress(text), "tEXt": b"Comment\0" + text}
    content["iTXt"] = b"Comment\0\1\0\0\0" + zlib.compress(text)
    data = with_chunk(saved(quarters()), kind.encode(), content[kind], place)
    np.testing.assert_array_equal(pixels(data), quarters())


@pytest.mark.parametrize("kind", [b"iCCP", b"eXIf", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"tEXt"])
def test_damaged_chunks_beside_the_image_do_not_matter(kind):
    np.testing.assert_array_equal(pixels(with_chunk(saved(quarters()), kind, b"\xff")), quarters())


@FEW
@given(st.integers(0, 2**20), st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
def test_a_cut_file_is_one_named_fault(at, kind):
    data = saved(detailed(40, 40), kind)
    try:
        open_image(data[: at % len(data)])
    except DataError as error:
        assert "\n" not in str(error) and "BytesIO" not in str(error)


@FEW
@given(st.binary(max_size=300))
def test_other_bytes_are_no_image(data):
    with pytest.raises(DataError):
        open_image(data)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "an empty file"),
        (b"<html>404</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "no image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image, of a kind that is not read here"),
    ],
)
def test_what_is_no_image_is_named_with_its_file(data, message, tmp_path):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.jpg: (.|\n)*{message}"):
        open_image(tmp_path / "a.jpg")


def test_a_string_of_a_record_names_no_file(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(quarters()))
    with pytest.raises(DataError, match="not str .*a path is none"):
        open_image(str(tmp_path / "a.png"))
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), quarters())


def test_too_many_pixels_are_refused_by_name_of_the_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="MAX_IMAGE_PIXELS"):
        open_image(saved(quarters()))


def test_names_do_not_matter_and_the_first_frame_counts(tmp_path):
    (tmp_path / "a.png").write_bytes(
        saved(quarters(), "TIFF", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    )
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), quarters())


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 40))
def test_small_images_are_told_by_their_short_side(w, h, least):
    data = saved(np.zeros((h, w, 3), np.uint8))
    for image in (data, np.zeros((h, w, 3), np.uint8)):
        if min(w, h) < least:
            with pytest.raises(TooSmall, match=f"{w}x{h}"):
                open_image(image, smallest_side=least)
        else:
            assert open_image(image, smallest_side=least).size == (w, h)


# --- reduced JPEGs ----------------------------------------------------------------------------------------------------


def detailed(w, h, seed=0):
    """1/f noise: much detail, independent in the three colours."""
    rng = np.random.default_rng(seed)
    f = np.fft.rfft2(rng.normal(size=(h, w, 3)), axes=(0, 1))
    k = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None]) + 1 / w
    x = np.fft.irfft2(f / k[..., None], s=(h, w), axes=(0, 1))
    return Image.fromarray(np.clip((x - x.mean()) / x.std() * 45 + 127, 0, 255).astype(np.uint8))


class Fixed:
    """Draws one share of the side and one place."""

    def __init__(self, share, place):
        self.share, self.place = share, place

    def uniform(self, low, high, size=None):
        return self.share if size is None else np.array(self.place)


def psnr(a, b):
    return 10 * np.log10(255**2 / max(((a.astype(float) - b) ** 2).mean(), 1e-9))


@settings(max_examples=12, deadline=None)
@given(
    st.integers(256, 2100),
    st.sampled_from([32, 64, 96, 128, 256]),
    st.floats(0.8, 1.0),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_a_reduced_jpeg_gives_the_crops_of_the_full_one(short, size, share, x, y):
    data = saved(detailed(short + 48, short), "JPEG", quality=95, subsampling=0)
    full = open_image(data)
    crop = lambda image, rng=None: to_square(image, size, rng, 0.8)
    assert psnr(crop(open_image(data, size, 1.0)), crop(full)) >= 43
    at = lambda: Fixed(share, (x, y))
    reduced = open_image(data, size, 0.8)
    assert psnr(crop(reduced, at()), crop(full, at())) >= 48
    assert share * min(reduced.size) >= min(2 * size, share * short - 1)  # nothing is enlarged that need not be


@given(st.integers(1, 512), st.floats(0.05, 1.0))
def test_decoded_are_at_least_twice_what_the_smallest_crop_needs(size, smallest):
    assert draft_side(size, smallest) >= 2 * size / smallest


# --- masks ------------------------------------------------------------------------------------------------------------


TOP = np.zeros((16, 16), bool)
TOP[:8] = True
PAINT = np.where(TOP, 255, 0).astype(np.uint8)
MASKS = {
    "grey": PAINT,
    "colour": np.dstack([PAINT] * 3),
    "white paint on nothing": np.dstack([np.full((16, 16, 3), 255, np.uint8), PAINT]),
    "grey and alpha": np.dstack([np.full((16, 16), 255, np.uint8), PAINT]),
    "16 bits": np.where(TOP, 40000, 300).astype(np.uint16),
    "0 and 1": TOP.astype(np.uint8),
    "0 and 1 of 16 bits": TOP.astype(np.uint16),
    "0 and 255 of 16 bits": PAINT.astype(np.uint16),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, tmp_path):
    data = saved(MASKS[name])
    (tmp_path / "m.png").write_bytes(data)
    for mask in (data, tmp_path / "m.png", MASKS[name], saved(MASKS[name], "TIFF")):
        found = open_mask(mask)
        assert found.dtype == bool
        np.testing.assert_array_equal(found, TOP)


def test_masks_of_one_bit_floats_and_booleans():
    np.testing.assert_array_equal(open_mask(TOP), TOP)
    np.testing.assert_array_equal(open_mask(saved(TOP)), TOP)
    np.testing.assert_array_equal(open_mask(saved(TOP.astype(np.float32), "TIFF")), TOP)
    np.testing.assert_array_equal(open_mask(saved(Image.fromarray(PAINT).convert("P"))), TOP)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_masks_of_other_colour_spaces(mode):
    painted = Image.fromarray(np.dstack([PAINT] * 3))
    if mode == "LAB":
        stored = Image.merge("LAB", [Image.fromarray(PAINT), *[Image.new("L", (16, 16), 128)] * 2])
    else:
        stored = painted.convert(mode)
    np.testing.assert_array_equal(open_mask(saved(stored, "TIFF")), TOP)


def test_a_mask_is_turned_as_its_image():
    stored = Image.fromarray(PAINT).transpose(Image.Transpose.ROTATE_90)
    np.testing.assert_array_equal(open_mask(saved(stored, exif=exif(6))), TOP)


@pytest.mark.parametrize("value, message", [(0, "marks nothing"), (100, "marks nothing"), (255, "whole image")])
def test_a_mask_of_nothing_or_everything_is_refused(value, message, tmp_path):
    (tmp_path / "m.png").write_bytes(saved(np.full((4, 4), value, np.uint8)))
    with pytest.raises(DataError, match=rf"m\.png: .*{message}"):
        open_mask(tmp_path / "m.png")
