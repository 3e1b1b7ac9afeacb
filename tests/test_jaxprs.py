"""Forms of traced and compiled programs: what is known counts right on every version of JAX, what is not is named."""

import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend import core
from jax.sharding import PartitionSpec as P

from t2i_jax.core import flops, jaxprs
from t2i_jax.core.jaxprs import UnknownForm
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.plan import hlo
from t2i_jax.plan.estimate import _kept, _moved
from t2i_jax.training import records
from t2i_jax.training.loop import train
from t2i_jax.training.trainer import Trainer
from tests.fixtures import toys

N = 4
X = jnp.ones((N, N))
ONE = 2.0 * N**3  # FLOPs of a product of X with itself
square = lambda x: x @ x


def halved(x):
    square_rule = jax.custom_vjp(square)
    square_rule.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x,))
    return square_rule(x)


def doubled(x):
    rule = jax.custom_jvp(square)
    rule.defjvp(lambda primals, tangents: (primals[0] @ primals[0], tangents[0]))
    return rule(x)


def kernel(x):
    def run(x, y):
        @pl.when(pl.program_id(0) >= 0)
        def _():
            y[...] = x[...] @ x[...]

    whole = pl.BlockSpec((N, N), lambda i: (0, 0))
    return pl.pallas_call(run, grid=(3,), in_specs=[whole], out_specs=whole, out_shape=x, interpret=True)(x)


def on_devices(x):
    mesh = MeshConfig(4, 2).build()
    return jax.shard_map(square, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False, axis_names={"data"})(x)


def partitioned(x):
    rule = custom_partitioning(square)
    rule.def_partition(
        partition=lambda *a: None, infer_sharding_from_operands=lambda *a: None, sharding_rule="a b -> a b"
    )
    return rule(x)


def convolved(x):
    return jax.lax.conv_general_dilated(
        jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 7)), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


PROGRAMS = {
    "product": (square, ONE),
    "batched product": (lambda x: jnp.einsum("bij,bjk->bik", jnp.ones((3, N, N)), jnp.ones((3, N, N))), 3 * ONE),
    "convolution": (convolved, 2.0 * (2 * 3 * 3 * 7) * (3 * 3 * 3)),
    "scan": (lambda x: jax.lax.scan(lambda c, w: (c @ w, c.sum()), x, jnp.ones((5, N, N))), 5 * ONE),
    "fori_loop": (lambda x: jax.lax.fori_loop(0, 6, lambda i, x: x @ x, x), 6 * ONE),
    "map": (lambda x: jax.lax.map(square, jnp.ones((5, N, N))), 5 * ONE),
    "while": (lambda x: jax.lax.while_loop(lambda x: (x @ x).sum() < 9, square, x), 7 * 2 * ONE),
    "cond": (lambda x: jax.lax.cond(x.sum() > 0, square, lambda x: x @ x @ x, x), 2 * ONE),
    "platform": (lambda x: jax.lax.platform_dependent(x, tpu=lambda x: x @ x @ x, default=square), ONE),
    "jit": (jax.jit(square), ONE),
    "remat": (jax.checkpoint(square), ONE),
    "remat, backwards": (jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(x @ x))(x).sum()), 4 * ONE),
    "custom_vjp": (halved, ONE),
    "custom_vjp, backwards": (jax.grad(lambda x: halved(x).sum()), 2 * ONE),
    "custom_jvp": (doubled, ONE),
    "composite": (jax.lax.composite(square, name="t2i.square"), ONE),
    "custom_partitioning": (partitioned, ONE),
    "kernel": (kernel, 3 * ONE),
    "shard_map": (on_devices, 4 * ONE),
    "sums over windows": (lambda x: jax.lax.reduce_window(x, 0.0, lambda a, b: a + 2 * b, (2, 2), (1, 1), "VALID"), 0),
    "scatter": (lambda x: x.at[0].add(1.0), 0),
    "search": (lambda x: jnp.searchsorted(x[0], x[1]) + jnp.argsort(x), 0),
    "draws": (lambda x: jax.random.categorical(jax.random.key(0), x), 0),
    "callback": (lambda x: jax.debug.callback(print, x), 0),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_known_forms_count_what_they_compute(name):
    function, expected = PROGRAMS[name]
    assert flops.count(function, X, trips=7) == expected


def equations(jaxpr):
    for e in jaxpr.eqns:
        yield e
        for inner in core.jaxprs_in_params(e.params):
            yield from equations(inner)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_parameter_that_is_gone_is_named_or_not_needed(name):
    """Whatever another version renames: the same count as before or one clear error, and no other."""
    for e in equations(jax.make_jaxpr(PROGRAMS[name][0])(X).jaxpr):
        whole = repr(jaxprs.read(e))
        for gone in e.params:
            params = {f"new_{k}" if k == gone else k: v for k, v in e.params.items()}
            changed = SimpleNamespace(primitive=e.primitive, params=params, invars=e.invars, outvars=e.outvars)
            try:
                assert repr(jaxprs.read(changed)) == whole
            except UnknownForm as error:
                assert f"'{e.primitive.name}'" in str(error) and jax.__version__ in str(error)


def test_results_of_a_scan_are_carried_or_stacked():
    def step(carry, x):
        return (carry[0] @ x, carry[1] + 1), (carry[0], x.sum())

    loop = lambda xs: jax.lax.scan(step, (X, 0.0), xs)
    (e,) = (e for e in jax.make_jaxpr(loop)(jnp.ones((5, N, N))).jaxpr.eqns if e.primitive.name == "scan")
    form = jaxprs.read(e)
    assert isinstance(form, jaxprs.Scan) and form.length == 5 and not form.reverse
    assert [a.shape for a in form.stacked] == [(5, N, N), (5,)]
    other = SimpleNamespace(primitive=e.primitive, params=e.params | {"length": 7}, invars=e.invars, outvars=e.outvars)
    with pytest.raises(UnknownForm, match="neither carried nor stacked"):
        jaxprs.read(other)


def test_branches_count_for_what_is_kept_and_moved():
    """The dearest branch of a cond, though its programs are in a tuple, and the body of a loop of unknown length."""
    wide = jnp.ones((N, 8 * N))
    cond = jax.make_jaxpr(lambda x: jax.lax.cond(x.sum() > 0, lambda x: x @ wide, lambda x: (x @ x) @ wide, x))(X).jaxpr
    size = lambda *shapes: 4.0 * sum(map(math.prod, shapes))
    big = size((N, N), (N, 8 * N), (N, 8 * N))
    assert _kept(cond) == (0.0, size((N, 8 * N))) and _moved(cond) == big + size((N, N)) * 3
    loop = jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, square, x))(X).jaxpr
    assert _kept(loop) == (0.0, size((N, N))) and _moved(loop) == size((N, N)) * 3


def made(name, **params):
    """A function of one primitive that gives what it takes."""
    primitive = core.Primitive(name)
    primitive.def_abstract_eval(lambda *x, **_: x[0])
    return partial(primitive.bind, **params)


@pytest.mark.parametrize(
    "function",
    [
        made("new_loop", body=jax.make_jaxpr(square)(X)),
        made("new_branches", ways=(jax.make_jaxpr(square)(X),)),
        made("jit", one=jax.make_jaxpr(square)(X), two=jax.make_jaxpr(square)(X)),
        made("jit"),
        made("scan"),
        made("while", cond_jaxpr=3, body_jaxpr=3),
        made("cond"),
        made("dot_general"),
        made("block_scaled_dot"),
        made("ragged_dot_general"),
        made("ffi_call"),
        made("call_hi_primitive", _prim=None),
        made("call_hi_primitive", _prim=SimpleNamespace(expand=lambda x: 1 / 0, in_tree=jax.tree.structure((0,)))),
    ],
)
def test_unknown_forms_are_named_with_the_version(function):
    for count in (
        flops.count,
        lambda f, x: _kept(jax.make_jaxpr(f)(x).jaxpr),
        lambda f, x: _moved(jax.make_jaxpr(f)(x).jaxpr),
    ):
        with pytest.raises(UnknownForm) as caught:
            count(jax.jit(lambda x: function(x) + 1), X)
        message = str(caught.value)
        assert (
            f"'{function.func.__self__.name}'" in message
            and f"jax {jax.__version__}" in message
            and "\n" not in message
        )


@pytest.mark.parametrize("layout, shape", [(0, (2, 8, 3, 16)), (1, (2, 3, 8, 16))])
def test_products_in_attention_of_cudnn_are_counted(layout, shape):
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    run = lambda name: lambda x: made(f"dot_product_attention_{name}_wrapper", layout=layout)(x, x, x)
    product = 2.0 * 2 * 3 * 8 * 8 * 16
    assert flops.count(run("fwd"), q) == 2 * product and flops.count(run("bwd"), q) == 5 * product


def test_a_run_whose_flops_cannot_be_counted_goes_on(tmp_path, monkeypatch, capsys):
    def unknown(self, batch):
        raise UnknownForm("'new_dot' in a traced program", "an unknown primitive")

    monkeypatch.setattr(Trainer, "flops", unknown)
    train(toys.experiment(), tmp_path)
    assert capsys.readouterr().err.count("'new_dot'") == 1
    lines = records.read(tmp_path / "metrics.jsonl")
    assert any("images_per_second" in line for line in lines)
    assert not any("flops_per_second" in line for line in lines)


TEXT = """HloModule m
%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %one = s32[] constant(1)
  %next = s32[] add(%p#0, %one)
  %y = f32[8,8]{1,0} dot(%p#1, %p#1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %both = (s32[], f32[8,8]{1,0}) tuple(%next, %y)
}
%until (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%p#0, %n), direction=LT
}
ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[8,8]{1,0}) tuple(%zero, %x)
  %loop = (s32[], /*index=1*/f32[8,8]{1,0}) while(%begin), condition=%until, body=%body
  ROOT %sum = f32[8,8]{1,0} all-reduce(%loop#1), replica_groups={{0,1}}, to_apply=%until
}
"""


def test_elements_of_tuples_may_be_written_without_an_instruction():
    long = TEXT.replace("ROOT %sum", "%last = f32[8,8]{1,0} get-tuple-element(%loop), index=1\n  ROOT %sum")
    long = long.replace("(%loop#1)", "(%last)").replace("%p#0", "%i").replace("%p#1", "%a")
    lines = "  %i = s32[] get-tuple-element(%p), index=0\n  %a = f32[8,8]{1,0} get-tuple-element(%p), index=1\n"
    long = long.replace("  %one =", f"{lines}  %one =").replace("  %n =", f"{lines}  %n =")
    short, whole = hlo.count(TEXT), hlo.count(long)
    assert short.flops == whole.flops == 5 * 2 * 8**3 and short.unknown_loops == 0
    assert short.bytes == whole.bytes and short.collectives == whole.collectives


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("ENTRY ", "", "entry"),
        ("dot(", "ragged-dot(", "'ragged-dot'"),
        ("lhs_contracting_dims", "lhs_contracts", "'dot'.*lhs_contracting_dims"),
        ("(%p#1, %p#1)", "(%p#1, p#1)", "'y'.*operand 'p#1'"),
        ("(%p#1, %p#1)", "(%q#1, %p#1)", "'y'.*operand q is not defined"),
        ("body=%body", "block=%body", "'while'.*body"),
        ("condition=%until", "until=%until", "'while'.*condition"),
        ("replica_groups={{0,1}}", "device_list=[0,1]", "'all-reduce'.*groups"),
        ("replica_groups={{0,1}}", "replica_groups={}", "'all-reduce'.*groups"),
        ("ROOT %sum = f32", "ROOT %sum = real", "type 'real'"),
    ],
)
def test_unknown_forms_of_a_compiled_program_are_named(old, new, message):
    assert old in TEXT
    with pytest.raises(UnknownForm, match=message) as caught:
        hlo.count(TEXT.replace(old, new))
    assert f"jax {jax.__version__}" in str(caught.value)
