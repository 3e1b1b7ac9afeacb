"""Whatever is given wrong to any command ends in one line and status 2; what is accepted is done.

Random inputs of five kinds for every command, called in this process: 50 of each kind, and 1,000 in the long tests.
T2I_FUZZ_SEED chooses others; a failure prints the seed and the command line.
"""

import contextlib
import dataclasses
import io
import itertools
import os
import secrets
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from t2i_jax import cli
from tests.fixtures.fuzzing import BASE, CONFIGURED, LEAVES, W, World, flags

MANY = pytest.param(1000, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("fuzz") / "world")


def tried(world: World, count: int, inputs: st.SearchStrategy[list[str]]) -> None:
    """`count` inputs; reports the first that is handled wrongly, and how."""
    number = int(os.environ.get("T2I_FUZZ_SEED", 0 if count < 100 else secrets.randbelow(2**32)))
    calls = itertools.count(1)

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(inputs)
    def one(case: list[str] | tuple[list[str], dict[str, bytes]]) -> None:
        argv, files = case if isinstance(case, tuple) else (case, {})
        if next(calls) % 100 == 0:
            jax.clear_caches()  # each input may compile programs of its own
        if fault := world.fault(argv, files):
            description = f"T2I_FUZZ_SEED={number}: t2i {shlex.join(argv)}\n{argv!r}\n{files!r}"
            pytest.fail(f"{description}\n{fault}", pytrace=False)

    one()


def test_every_command_is_known():
    """A command that is new is not forgotten: what it takes is known, and it is tried below."""
    assert set(LEAVES) == set(BASE)
    assert {leaf[0] for leaf in LEAVES} == set(cli.COMMANDS)


@pytest.mark.parametrize("leaf", BASE, ids=" ".join)
def test_every_command_has_a_call_that_works(world, leaf):
    argv = [*leaf, *BASE[leaf]]
    assert not (fault := world.fault(argv)), f"t2i {shlex.join(argv)}\n{fault}"


# --- inputs -----------------------------------------------------------------------------------------------------------

NUMBERS = ["0", "-1", "1", "2", "3", "-0", "-7", "+5", "1e3", "1e9", "1000000007", "2147483647", "2147483648"]
NUMBERS += [str(sign * 2**n + d) for n in (31, 32, 53, 63, 64) for sign in (1, -1) for d in (-1, 0)] + [str(10**30)]
NUMBERS += ["nan", "-nan", "inf", "-inf", "1e400", "-1e400", "1e-400", "1e38", "1e39", "-1e39", "5e-324", "1e-30"]
NUMBERS += [
    "abc",
    "",
    " ",
    "1.5",
    "0.5",
    "-0.5",
    "1.0",
    "0x10",
    "0b1",
    "１２",
    "٣",
    "½",
    "−1",
    "1_000",
    "1,2",
    "1 2",
    "1/2",
]
NUMBERS += [
    "None",
    "True",
    "false",
    "[]",
    "(1, 2)",
    "1e",
    "--1",
    "1.2.3",
    "9" * 60,
    "9" * 400,
    "-" + "9" * 400,
    "9" * 5000,
    "1\n",
    "1;2",
    "0" * 400,
]

LONG = ("compare", "train", "evaluate", "data build", "fit")
"""Commands whose accepted inputs take seconds, as those of `bench` do; they are tried less often."""
OFTEN = [leaf for leaf in LEAVES for _ in range(1 if leaf[0] == "bench" or " ".join(leaf) in LONG else 5)]


def parts(kind: Any) -> set[Any]:
    """The plain types in an annotation."""
    if get_origin(kind) is Annotated:
        return parts(get_args(kind)[0])
    return {kind} if not get_args(kind) or get_origin(kind) is Literal else set().union(*map(parts, get_args(kind)))


def with_flag(leaf: tuple[str, ...], flag: str, value: str, joined: bool = True) -> list[str]:
    """The working call of a command, with one flag set to something."""
    base = [word for word in BASE[leaf] if word.partition("=")[0] != flag]
    return [*leaf, *base, *([f"{flag}={value}"] if joined else [flag, value])]


def positions(leaf: tuple[str, ...]) -> list[int]:
    return [i for i, word in enumerate(BASE[leaf]) if not word.startswith("--")]


@st.composite
def wrong_numbers(draw: Any) -> list[str]:
    """A number of a command, of its config or of its model, that is none or is out of range."""
    leaf = draw(st.sampled_from(OFTEN))
    named = [flag for flag, kind in flags(leaf).items() if parts(kind) & {int, float}]
    if not named:  # a command without numbers
        return draw(wrong_names())
    # Numbers between are accepted, and make much work.
    far = st.integers(max_value=-1) | st.integers(min_value=10**9)
    value = draw(st.sampled_from(NUMBERS) | far.map(str) | st.floats().map(str))
    return with_flag(leaf, draw(st.sampled_from(named)), value, draw(st.integers(0, 3)) > 0)


WORDS = ["", " ", "x", "None", "none", "TRUE", "0", "-1", "train", "val", "test", "trian", "train+val", "train+", "+"]
WORDS += ["ddim", "DDIM", "dmmp", "euler", "heun", "ddpm,ddim", "pixels", "inception", "inception:", "inception:x"]
WORDS += ["efficientnet", "data=1", "data=0", "data=-2", "data=-1,fsdp=-1", "rows=2", "data=", "data=1,data=1"]
WORDS += ["data=9999999999999999999", "data=²", "tensor=2,", "h100", "h100:", "h100:8x8", "v5e:4", "v5e:0x4", "h100:²"]
WORDS += [f"h100:{10**30}", "t5:", "clip:x", "lm:x,length=3", "unigram", "bpe", "adamw", "adaam", "__import__", "sgd"]
WORDS += ["bfloat16", "float64", "cosine", "twemoji", "twemoji,twemoji", "twemoij", "all,", "label:int32:1", "x:y:z"]
WORDS += ["codes:int32:-1", "image:float128:8x8x3", "1M", "7M", "llamagen-xxl", "glyphs", "dit", "dti", "(", "[a", "*"]
WORDS += ["a\0b", "caf\udce9", "é✓", "x" * 3000, "a b", "a,b", 'a"b', "{}", '{"a": 1}', "%s", "\x1b[31m", "\n", "[red]"]


@st.composite
def wrong_names(draw: Any) -> list[str]:
    """A name that is none: of a choice, of a field, of a flag, of a command."""
    leaf = draw(st.sampled_from(OFTEN))
    every = flags(leaf)
    word = draw(st.sampled_from(WORDS) | st.text(max_size=20))
    how = draw(st.sampled_from(["value", "value", "value", "flag", "flag", "more", "place", "command"]))
    if how == "value":
        plain = [f for f, kind in every.items() if not parts(kind) & {int, float, Path}]
        return with_flag(leaf, draw(st.sampled_from(plain or list(every))), word, draw(st.booleans()))
    if how == "flag":  # misspelt
        flag = draw(st.sampled_from(list(every)))
        at = draw(st.integers(2, len(flag)))
        flag = flag[:at] + draw(st.sampled_from(["z", "-", ".", "=", " ", "_", "x.y", ""])) + flag[at:]
        return [*leaf, *BASE[leaf], flag + draw(st.sampled_from(["", "=", "=1", "=x"]))]
    if how == "more":
        return [
            *leaf,
            *BASE[leaf],
            draw(st.sampled_from(["--help", "-h", "-x", "--", "-", "--x", "---"]) | st.just(word)),
        ]
    if how == "place" and leaf in (("convert",), ("data", "build")):
        return [*leaf, word, *BASE[leaf][1:]]
    if how == "command" and word not in LEAVES:
        return [*leaf[:-1], word, *BASE[leaf]] if word not in cli.COMMANDS else [word]
    if leaf == ("bench", "sample"):  # without a config it draws by a large model
        return [*leaf, "--shape", word]
    some = draw(st.permutations(BASE[leaf]))[draw(st.integers(0, 2)) :]
    short = [word for word in BASE[leaf] if word.startswith("--steps=") and word not in some]  # else it takes an hour
    return [*leaf, *some, *short]


@st.composite
def wrong_paths(draw: Any, world: World) -> list[str]:
    """A path that is missing, or leads to something else."""
    leaf = draw(st.sampled_from(OFTEN))
    kinds = {field.name: str(field.type) for field in dataclasses.fields(LEAVES[leaf])}
    files = [n for n, kind in kinds.items() if ("Path" in kind or "File" in kind) and "Positional" not in kind]
    named: list[Any] = [f"--{n.replace('_', '-')}" for n in files]
    named += positions(leaf) * 2
    named += ["--codec", "--data.source.path"] if leaf in CONFIGURED else []
    named += ["--back"] if leaf == ("convert",) else ["--rerank"] if leaf == ("sample",) else []
    if not named:  # a command without paths
        return draw(wrong_names())
    where, path = draw(st.sampled_from(named)), draw(st.sampled_from(world.paths()))
    if isinstance(where, int):
        base = list(BASE[leaf])
        base[where] = path
        return [*leaf, *base]
    if where == "--back":
        return ["convert", draw(st.sampled_from(["dit", "kl"])), path, "--back", "--out=file.safetensors"]
    if where == "--mask":
        return [*with_flag(leaf, where, path), f"--image={W}/pictures/1.png"]
    return with_flag(leaf, where, path)


TEXTS = ["a red square", "1", "0", "", " ", "\ufeff1", "\0", "\ud83d", "caf\udce9", "a\nb", "\u2028", "\x85", "\x0c"]
TEXTS += ["a red square, blue", '"1"', '{"prompt": "1"}', "[1, 2]", "prompt,seed", "-1", "--seed=1", "１", "1.0", "1e0"]
TEXTS += [
    "🏳️‍🌈" * 9,
    "e\u0301",
    "\u202eabc",
    "\x1b[31m",
    "a" * 5000,
    "word " * 1000,
    "[bold]x[/]",
    "[/]",
    "%s {0} \\",
    "٣",
]
ENCODINGS = [
    "utf-8",
    "utf-8",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "cp1252",
    "latin-1",
    "shift-jis",
]


@st.composite
def odd_bytes(draw: Any) -> bytes:
    """What a file of prompts or of captions may hold."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=60))
    lines = draw(st.lists(st.sampled_from(TEXTS) | st.text(max_size=30), max_size=4))
    text = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\u2028"])).join(lines)
    return text.encode(draw(st.sampled_from(ENCODINGS)), "replace")


@st.composite
def odd_prompts(draw: Any) -> tuple[list[str], dict[str, bytes]]:
    """Prompts as arguments and in files, and captions of images."""
    how = draw(st.sampled_from(["arguments", "arguments", "file", "file", "captions"]))
    if how == "captions":
        files = {f"odd/{n}.png": PICTURE for n in range(3)} | {f"odd/{n}.txt": draw(odd_bytes()) for n in range(3)}
        return ["data", "vocab", f"{W}/pictures.py", "--out=words.model", "--size=300"], files
    model = draw(st.sampled_from(["run", "words", "words"]))
    base = ["sample", f"{W}/{model}", "--out=out", "--mesh=data=1", f"--count={draw(st.integers(1, 2))}"]
    if how == "file":
        return [*base, "--prompts=prompts.txt"], {"prompts.txt": draw(odd_bytes())}
    words = draw(st.lists(st.sampled_from(TEXTS) | st.text(st.characters(), max_size=30), min_size=1, max_size=3))
    return [*base[:2], *words, *base[2:]], {}


def noise(size: tuple[int, int], spread: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, spread + 1, (*size[::-1], 3))
    return Image.fromarray(values.astype(np.uint8))


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F", "HSV", "PA", "RGBX", "La"]
SIZES = [(8, 8)] * 6 + [(1, 1), (8, 9), (16, 16), (7, 300), (64, 2)]
FORMATS = ["PNG", "PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "JPEG2000", "AVIF"]


@st.composite
def odd_picture(draw: Any) -> bytes:
    """An image of any mode, format and size, perhaps damaged."""
    size, mode, form = (draw(st.sampled_from(x)) for x in (SIZES, MODES, FORMATS))
    image = plain = noise(size, draw(st.integers(0, 255)))
    with contextlib.suppress(ValueError):
        image = image.convert(mode)
    more: dict[str, Any] = {}
    if draw(st.booleans()):
        more["transparency"] = draw(st.sampled_from([0, 255]))
    if form in ("GIF", "PNG", "TIFF", "WEBP") and draw(st.booleans()):
        more |= {"save_all": True, "append_images": [image.copy().rotate(90)] * draw(st.integers(1, 3))}
    if form in ("JPEG", "PNG", "WEBP", "TIFF") and draw(st.booleans()):
        about = Image.Exif()
        about[0x0112] = draw(st.integers(0, 9))  # which side is up
        more["exif"] = about
    data = b""
    for options in (more, {}):  # not every format takes every mode
        for one in (image, plain):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, SystemError):
                file = io.BytesIO()
                one.save(file, form, **options)
                data = data or file.getvalue()
    change = draw(st.sampled_from(["", "", "", "cut", "more", "byte", "other"]))
    if change == "cut":
        return data[: int(draw(st.floats(0, 1)) * len(data))]
    if change == "byte" and data:
        at = int(draw(st.floats(0, 0.999)) * len(data))
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    return {"more": data + b"more", "other": draw(st.binary(max_size=40))}.get(change, data)


@st.composite
def odd_images(draw: Any) -> tuple[list[str], dict[str, bytes]]:
    """Images and masks to draw on, and images in folders of data."""
    how = draw(st.sampled_from(["image", "mask", "both", "encode"] * 4 + ["evaluate", "train"]))
    suffix = draw(st.sampled_from(["png", "jpg", "gif", "webp", "PNG", "tif", "bmp"]))
    odd = {f"odd/{n}.{suffix}": draw(odd_picture()) for n in range(3)}
    if how in ("image", "mask", "both"):
        image, mask = f"--image=odd/0.{suffix}", f"--mask=odd/1.{suffix}"
        flags = [
            image if how != "mask" else f"--image={W}/pictures/1.png",
            mask if how != "image" else "--strength=0.5",
        ]
        return ["sample", f"{W}/run", "1", "--out=out", "--mesh=data=1", *flags], odd
    files = odd | {f"odd/good{n}.png": PICTURE for n in range(3)}
    files |= {str(Path(name).with_suffix(".txt")): b"a red square" for name in files}
    if how == "encode":
        base = [f"{W}/picture_codes.py", "--out=codes", "--splits=train", "--batch-size=4"]
        return ["encode", *base], files
    if how == "evaluate":
        base = ["--out=report", f"--data={W}/pictures.py", "--count=4", "--batch-size=4", "--spaces=pixels"]
        return ["evaluate", f"{W}/words", *base], files
    return ["train", f"{W}/pictures.py", "--run=run"], files


def as_png() -> bytes:
    file = io.BytesIO()
    noise((8, 8), 60).save(file, "PNG")
    return file.getvalue()


PICTURE = as_png()

# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [50, MANY])
def test_numbers(world, count):
    tried(world, count, wrong_numbers())


@pytest.mark.parametrize("count", [50, MANY])
def test_names(world, count):
    tried(world, count, wrong_names())


@pytest.mark.parametrize("count", [50, MANY])
def test_paths(world, count):
    tried(world, count, wrong_paths(world))


@pytest.mark.parametrize("count", [50, MANY])
def test_prompts(world, count):
    tried(world, count, odd_prompts())


@pytest.mark.parametrize("count", [50, MANY])
def test_images(world, count):
    tried(world, count, odd_images())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_process_of_its_own_says_the_same(name):
    """What only a whole process shows: its exit status, and what is printed to its streams by whatever code."""
    leaf = next(leaf for leaf in LEAVES if leaf[0] == name)
    words = [*leaf, *(word.replace(W, "nowhere") for word in BASE[leaf] if not word.startswith("--out")), "--out=x/y"]
    done = subprocess.run([sys.executable, "-m", "t2i_jax.cli", *words, "--colour=red"], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith(f"t2i {name}: "), done.stderr
    assert not Path("x").exists()
