"""Whatever is given wrong to any command ends in one line and status 2; what is accepted is done.

Random inputs of five kinds for every command, called in this process: 50 of each kind, and 1,000 in the long tests.
T2I_FUZZ_SEED chooses others; a failure prints the seed and the command line.
"""

import os
import secrets
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from fuzzing import BASE, CONFIGURED, LEAVES, W, World, flags
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from t2i_jax import cli

MANY = pytest.param(1000, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("fuzz") / "world")


def tried(world: World, count: int, inputs: st.SearchStrategy[list[str]]) -> None:
    """`count` inputs; the first that is taken wrongly is told, and what is wrong with it."""
    number = int(os.environ.get("T2I_FUZZ_SEED", 0 if count < 100 else secrets.randbelow(2**32)))

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
    def one(argv: list[str]) -> None:
        if fault := world.fault(argv):
            pytest.fail(f"T2I_FUZZ_SEED={number}: t2i {shlex.join(argv)}\n{argv!r}\n{fault}", pytrace=False)

    one()


def test_every_command_has_a_call_that_works(world):
    """A command that is new is not forgotten: what it takes is known, and it is tried below."""
    assert set(LEAVES) == set(BASE)
    assert {leaf[0] for leaf in LEAVES} == set(cli.COMMANDS)
    for leaf, base in BASE.items():
        argv = [*leaf, *base]
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
    "9" * 5000,
    "1\n",
    "1;2",
    "0" * 400,
]

LONG = ("data build", "bench solvers", "compare", "bench train", "bench plan", "train", "bench data")
"""Commands whose accepted inputs take seconds; they are tried less often."""
OFTEN = [leaf for leaf in LEAVES for _ in range(1 if " ".join(leaf) in LONG else 4)]


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
    value = draw(st.sampled_from(NUMBERS) | st.integers().map(str) | st.floats().map(str))
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
    return [*leaf, *draw(st.permutations(BASE[leaf]))[draw(st.integers(0, 2)) :]]


@st.composite
def wrong_paths(draw: Any, world: World) -> list[str]:
    """A path that is missing, or leads to something else."""
    leaf = draw(st.sampled_from(OFTEN))
    named: list[Any] = [
        f for f, kind in LEAVES[leaf].__annotations__.items() if "Path" in str(kind) or "File" in str(kind)
    ]
    named = [f"--{n.replace('_', '-')}" for n in named if "Positional" not in str(LEAVES[leaf].__annotations__[n])]
    named += positions(leaf) * 2
    named += ["--codec", "--data.source.path"] if leaf in CONFIGURED else []
    named += ["--back"] if leaf == ("convert",) else ["--rerank"] if leaf == ("sample",) else []
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
