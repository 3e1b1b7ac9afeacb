"""Plans: what a compiled program is read to cost, what is counted without compiling, and what a user reads."""

import dataclasses
import importlib
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from t2i_jax import plan as plans
from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.core import flops
from t2i_jax.core.config import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.jaxprs import UnknownForm
from t2i_jax.core.platform import ALONE
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.any_order import AnyOrder
from t2i_jax.models.ar import AR
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.masked import Masked
from t2i_jax.models.stream import Stream, StreamText
from t2i_jax.models.vq_diffusion import VQDiffusion
from t2i_jax.networks.condition import CaptionEncoder, ClassEmbedder, TextFeatures
from t2i_jax.networks.dit import DiT
from t2i_jax.networks.unet import UNet
from t2i_jax.noise.discrete import Chain
from t2i_jax.plan import hlo
from t2i_jax.plan.estimate import bytes_on_chip, resolved
from t2i_jax.plan.hlo_text import parse
from t2i_jax.plan.ready import batch_shapes, depths, shallow_copy_of_model
from t2i_jax.plan.sweep import changed, meshes, policies, turns
from t2i_jax.presets import preset
from t2i_jax.training.experiment import Experiment, Train
from tests.fixtures.families import losses_of

SMALL = with_fields(
    AR(), vocabulary=64, grid=(4, 4), width=32, depth=6, heads=2, condition=ClassEmbedder(10), dtype="bfloat16"
)
EXPERIMENT = Experiment(SMALL, Data(ArrayRecord("not/there"), image_size=32, batch_size=16))


def experiment(model, **fields):
    return dataclasses.replace(EXPERIMENT, model=model, **fields)


# ------------------------------------------------------------------------------------------- the text of a program


@pytest.mark.parametrize("layers", [2, 7])
def test_products_of_loops_count_as_often_as_they_run(layers):
    """The figure read from the compiled program is that of the traced function, forwards and backwards."""

    def loss(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    step = jax.grad(loss)
    arguments = jax.ShapeDtypeStruct((layers, 32, 32), jnp.float32), jax.ShapeDtypeStruct((8, 32), jnp.float32)
    costs = hlo.count(jax.jit(step).lower(*arguments).compile().as_text())
    assert costs.flops == flops.count(step, *arguments)
    assert costs.flops_once < costs.flops and costs.unknown_loops == 0 and not costs.collectives
    assert costs.bytes > layers * 32 * 32 * 4


PROGRAM = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input: bf16[64,16]) -> bf16[16,16] {
  %input = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = u32[] constant(0)
  %ar = bf16[64,16]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %part = bf16[16,16]{1,0:T(8,128)(2,1)} dynamic-slice(%ar, %zero, %zero), dynamic_slice_sizes={16,16}
}

%start (p: bf16[16,8]) -> (bf16[16,8], bf16[16,16]) {
  %p = bf16[16,8]{1,0} parameter(0)
  %ag = bf16[16,16]{1,0} all-gather(%p), channel_id=5, replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={1}
  ROOT %begin = (bf16[16,8]{1,0}, bf16[16,16]{1,0}) custom-call(%ag), custom_call_target="AsyncCollectiveStart"
}

%body (loop: (s32[], bf16[64,16], bf16[16,8])) -> (s32[], bf16[64,16], bf16[16,8]) {
  %loop = (s32[], bf16[64,16]{1,0}, bf16[16,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%loop), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %a = bf16[64,16]{1,0} get-tuple-element(%loop), index=1
  %b = bf16[16,8]{1,0} get-tuple-element(%loop), index=2
  %scattered = bf16[16,16]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %gathered = (bf16[16,8]{1,0}, bf16[16,16]{1,0}) fusion(%b), kind=kCustom, calls=%start
  %product = bf16[64,16]{1,0:T(8,128)S(1)} convolution(%a, %scattered), dim_labels=bf_io->bf
  ROOT %out = (s32[], bf16[64,16]{1,0}, bf16[16,8]{1,0}) tuple(%next, %product, %b)
}

%condition (loop: (s32[], bf16[64,16], bf16[16,8])) -> pred[] {
  %loop = (s32[], bf16[64,16]{1,0}, bf16[16,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%loop), index=0
  %n = s32[] constant(12)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: bf16[64,16], b: bf16[16,8]) -> bf16[64,16] {
  %a = bf16[64,16]{1,0} parameter(0)
  %b = bf16[16,8]{1,0} parameter(1)
  %first = s32[] constant(2)
  %begin = (s32[], bf16[64,16]{1,0}, bf16[16,8]{1,0}) tuple(%first, %a, %b)
  %loop = (s32[], bf16[64,16]{1,0}, bf16[16,8]{1,0}) while(%begin), condition=%condition, body=%body
  %last = bf16[64,16]{1,0} get-tuple-element(%loop), index=1
  %moved = bf16[64,16]{1,0} collective-permute(%last), channel_id=9, source_target_pairs={{0,4},{4,0}}
  ROOT %summed = bf16[64,16]{1,0} all-reduce(%moved), channel_id=7, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
}
"""


def test_collectives_of_a_tpu_program():
    """Loops without a known count are read from their condition; scatters inside fusions and asynchronous parts too."""
    costs = hlo.count(PROGRAM)
    found = {c.kind: c for c in costs.collectives}
    assert {k: (c.times, c.size, c.ids) for k, c in found.items()} == {
        "reduce-scatter": (10, 64 * 16 * 2, (0, 1, 2, 3)),
        "all-gather": (10, 16 * 16 * 2, (0, 1)),
        "collective-permute": (1, 64 * 16 * 2, (0, 4)),
        "all-reduce": (1, 64 * 16 * 2, (0, 2, 4, 6)),
    }
    assert found["all-gather"].asynchronous and not found["all-reduce"].asynchronous
    assert costs.flops == 10 * 2 * 64 * 16 * 16 and costs.unknown_loops == 0


SENT = """HloModule m
ENTRY %main (a: bf16[4,8,16]) -> bf16[4,8,16] {
  %a = bf16[4,8,16]{2,1,0} parameter(0)
  %token = token[] after-all()
  %send = (bf16[4,8,16]{2,1,0}, u32[], token[]) send(%a, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[4,8,16]{2,1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %done = (bf16[4,8,16]{2,1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %out = bf16[4,8,16]{2,1,0} get-tuple-element(%done), index=0
}
"""  # noqa: E501


def test_what_a_program_sends_to_other_slices_is_a_collective():
    (found,) = hlo.count(SENT).collectives
    assert (found.name, found.size, found.times) == ("all-reduce between slices", 4 * 8 * 16 * 2, 1)
    assert found.between and found.asynchronous
    with pytest.raises(UnknownForm, match="kind of transfer"):
        hlo.count(SENT.replace("ALL_REDUCE", "SOMETHING_NEW"))


OFFLOADED = """HloModule m
%part (p: bf16[4,8]) -> bf16[8,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %gathered = bf16[8,8]{1,0} all-gather(%p), channel_id=8, replica_groups={{0,1},{2,3}}, dimensions={0}
}
%async_computation (q: bf16[4,8]) -> bf16[8,8] {
  %q = bf16[4,8]{1,0} parameter(0)
  ROOT %call = bf16[8,8]{1,0} custom-call(%q), custom_call_target="offload", called_computations={%part}
}
ENTRY %main (a: bf16[4,8]) -> bf16[8,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %start = ((bf16[4,8]{1,0}), bf16[8,8]{1,0}) async-start(%a), async_execution_thread="sparsecore", calls=%async_computation
  ROOT %done = bf16[8,8]{1,0} async-done(%start)
}
"""  # noqa: E501


def test_collectives_of_other_cores_of_the_chip_count():
    (found,) = hlo.count(OFFLOADED).collectives
    assert (found.kind, found.size, found.ids, found.asynchronous) == ("all-gather", 8 * 8 * 2, (0, 1), True)


def test_a_product_written_as_a_convolution_with_holes_counts_its_pairs():
    """Batched products on TPUs: a window over the batch, of which one place meets a number."""
    window = "window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf"
    program = """HloModule m
ENTRY %main (a: bf16[8,16,32], b: bf16[8,32,64]) -> bf16[8,16,64] {
  %a = bf16[8,16,32]{2,1,0} parameter(0)
  %b = bf16[8,32,64]{2,1,0} parameter(1)
  ROOT %c = bf16[8,16,64]{2,1,0} convolution(%a, %b), WINDOW
}
"""
    assert hlo.count(program.replace("WINDOW", window)).flops == 2 * 8 * 16 * 32 * 64


def test_traffic_is_what_is_touched():
    """Of a stack the layer that is read and the layer that is written; of what is passed on, nothing."""
    program = """HloModule m
%inner (s: bf16[36,8,128], n: s32[]) -> bf16[1,8,128] {
  %s = bf16[36,8,128]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %layer = bf16[1,8,128]{2,1,0} dynamic-slice(%s, %n, %zero, %zero), dynamic_slice_sizes={1,8,128}
}
%outer (stack: bf16[36,8,128], n: s32[], out: bf16[36,8,128], flying: bf16[64,128]) -> (bf16[36,8,128], bf16[64,128]) {
  %stack = bf16[36,8,128]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %out = bf16[36,8,128]{2,1,0} parameter(2)
  %flying = bf16[64,128]{1,0} parameter(3)
  %zero = s32[] constant(0)
  %one = bf16[1,8,128]{2,1,0} fusion(%stack, %n), kind=kLoop, calls=%inner
  %new = bf16[36,8,128]{2,1,0} dynamic-update-slice(%out, %one, %n, %zero, %zero)
  %goes_on = bf16[64,128]{1,0} custom-call(%flying), custom_call_target="AsyncCollective"
  ROOT %both = (bf16[36,8,128]{2,1,0}, bf16[64,128]{1,0}) tuple(%new, %goes_on)
}
ENTRY %main (stack: bf16[36,8,128], n: s32[], out: bf16[36,8,128], flying: bf16[64,128]) -> bf16[2,8,128] {
  %stack = bf16[36,8,128]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %out = bf16[36,8,128]{2,1,0} parameter(2)
  %flying = bf16[64,128]{1,0} parameter(3)
  %f = (bf16[36,8,128]{2,1,0}, bf16[64,128]{1,0}) fusion(%stack, %n, %out, %flying), kind=kOutput, ALIAS, calls=%outer
  %g = bf16[36,8,128]{2,1,0} get-tuple-element(%f), index=0
  %begin = ((bf16[36,8,128]{2,1,0}), bf16[2,8,128]{2,1,0:S(1)}, s32[]) slice-start(%g), slice={[0:2], [0:8], [0:128]}
  ROOT %end = bf16[2,8,128]{2,1,0:S(1)} slice-done(%begin)
}
""".replace("ALIAS", "output_to_operand_aliasing={{0}: (2, {}), {1}: (3, {})}")
    layer = 8 * 128 * 2
    assert hlo.count(program).bytes == layer + layer + 2 * layer + 4  # read, written, sliced into the chip; an index
    assert hlo.spared(program) == 0


def test_what_is_updated_and_read_in_one_fusion_is_read_whole():
    """A cache that takes the newest keys and is looked at: written where it is new, read everywhere."""
    program = """HloModule m
%inside (cache: bf16[8,256,64], new: bf16[8,1,64], q: bf16[8,64], n: s32[]) -> (bf16[8,256], bf16[8,256,64]) {
  %cache = bf16[8,256,64]{2,1,0} parameter(0)
  %new = bf16[8,1,64]{2,1,0} parameter(1)
  %q = bf16[8,64]{1,0} parameter(2)
  %n = s32[] parameter(3)
  %zero = s32[] constant(0)
  %fuller = bf16[8,256,64]{2,1,0} dynamic-update-slice(%cache, %new, %zero, %n, %zero)
  %look = bf16[8,256]{1,0} dot(%fuller, %q), DIMENSIONS
  ROOT %both = (bf16[8,256]{1,0}, bf16[8,256,64]{2,1,0}) tuple(%look, %fuller)
}
ENTRY %main (cache: bf16[8,256,64], new: bf16[8,1,64], q: bf16[8,64], n: s32[]) -> (bf16[8,256], bf16[8,256,64]) {
  %cache = bf16[8,256,64]{2,1,0} parameter(0)
  %new = bf16[8,1,64]{2,1,0} parameter(1)
  %q = bf16[8,64]{1,0} parameter(2)
  %n = s32[] parameter(3)
  ROOT %f = (bf16[8,256]{1,0}, bf16[8,256,64]{2,1,0}) fusion(%cache, %new, %q, %n), kind=kOutput, ALIAS, calls=%inside
}
""".replace("ALIAS", "output_to_operand_aliasing={{1}: (0, {})}")
    sides = "lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"
    program = program.replace("DIMENSIONS", sides)
    whole, new, q, logits = (2 * n for n in (8 * 256 * 64, 8 * 64, 8 * 64, 8 * 256))
    assert hlo.count(program).bytes == whole + 2 * new + q + logits + 4


def test_computations_of_other_threads_of_a_chip_end_where_they_end():
    program = """HloModule m
%gathers (x: bf16[8,128]) -> bf16[32,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  ROOT %all = bf16[32,128]{1,0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[8,128]) -> bf16[32,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %begin = ((bf16[8,128]{1,0}), bf16[32,128]{1,0}, s32[]) async-start(%x), calls=%gathers
  ROOT %end = bf16[32,128]{1,0} async-done(%begin)
}
"""
    (gather,) = hlo.count(program).collectives
    assert gather.kind == "all-gather" and gather.group == 4 and gather.times == 1
    assert hlo.count(program).bytes == 5 * 8 * 128 * 2


def test_a_slice_fetched_ahead_is_the_slice_and_not_the_whole():
    program = """HloModule m
%part (x: bf16[64,128]) -> bf16[8,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  ROOT %rows = bf16[8,128]{1,0:S(1)} slice(%x), slice={[0:8], [0:128]}
}
ENTRY %main (x: bf16[64,128]) -> bf16[8,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %begin = ((bf16[64,128]{1,0}), bf16[8,128]{1,0:S(1)}, s32[]) async-start(%x), calls=%part
  ROOT %end = bf16[8,128]{1,0:S(1)} async-done(%begin)
}
"""
    assert hlo.count(program).bytes == 8 * 128 * 2


def test_what_stays_on_the_chip_spares_a_write_and_a_read():
    program = """HloModule m
%twice (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  ROOT %sum = bf16[8,128]{1,0} add(%x, %x)
}
ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %begin = (bf16[8,128]{1,0:S(1)}, bf16[8,128]{1,0}, u32[]) copy-start(%x)
  %ahead = bf16[8,128]{1,0:S(1)} copy-done(%begin)
  %stays = bf16[8,128]{1,0:S(1)} fusion(%ahead), kind=kLoop, calls=%twice
  ROOT %end = bf16[8,128]{1,0} fusion(%stays), kind=kLoop, calls=%twice
}
"""
    assert hlo.spared(program) == 2 * 8 * 128 * 2


def test_one_result_of_several_that_stays_on_the_chip_spares_the_same():
    """Whether the result is named by an instruction of its own or is not."""
    program = """HloModule m
%twice (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  ROOT %sum = bf16[8,128]{1,0} add(%x, %x)
}
%both (x: bf16[8,128]) -> (bf16[8,128], bf16[8,128]) {
  %x = bf16[8,128]{1,0} parameter(0)
  %sum = bf16[8,128]{1,0} add(%x, %x)
  ROOT %pair = (bf16[8,128]{1,0}, bf16[8,128]{1,0}) tuple(%sum, %x)
}
ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %two = (bf16[8,128]{1,0:S(1)}, bf16[8,128]{1,0}) fusion(%x), kind=kLoop, calls=%both
NAMED  ROOT %end = bf16[8,128]{1,0} fusion(RESULT), kind=kLoop, calls=%twice
}
"""
    named = "  %stays = bf16[8,128]{1,0:S(1)} get-tuple-element(%two), index=0\n"
    for line, result in (("", "%two#0"), (named, "%stays")):
        assert hlo.spared(program.replace("NAMED", line).replace("RESULT", result)) == 2 * 8 * 128 * 2


def test_kernels_of_attention_count_as_if_written_out():
    program = """HloModule m
ENTRY %main (q: bf16[4,2,384,64], k: bf16[4,1,256,64]) -> bf16[4,2,384,64] {
  %q = bf16[4,2,384,64]{3,2,1,0} parameter(0)
  %k = bf16[4,1,256,64]{3,2,1,0} parameter(1)
  %mask = s8[1,1,1]{2,1,0} parameter(2)
  %own.1 = bf16[4,2,384,64]{3,2,1,0} custom-call(%q), custom_call_target="tpu_custom_call"
  %splash_mha_NAME = bf16[4,2,384,64]{3,2,1,0} custom-call(%mask, %q, %k, %k), custom_call_target="tpu_custom_call" MORE
  ROOT %out = bf16[4,2,384,64]{3,2,1,0} copy(%splash_mha_NAME)
}
""".replace(" MORE", ', frontend_attributes={kernel_metadata={\n"about":"{}"\n}}, backend_config={"a":"1"}')
    assert parse(program)[0]["main"]["out"].root
    for name, products in {"fwd_residuals": 2, "dkv_no_residuals": 4, "dq_no_residuals": 3}.items():
        costs = hlo.count(program.replace("NAME", name))
        assert costs.flops == products * 2 * 4 * 2 * 384 * 256 * 64 and costs.unknown_kernels == ("own",)


def test_a_loop_that_data_end_counts_once_and_is_told():
    def halve(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ x, x)

    text = jax.jit(halve).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile().as_text()
    assert hlo.count(text).unknown_loops == 1


# ------------------------------------------------------------------------------------------------------ topologies


def test_topologies_are_read_and_wrong_ones_explained():
    assert plans.Topology.read("v5p:4x4x4").size == 64 and plans.Topology.read("h100:64").size == 64
    for text, word in {"v9:4x4": "v5e", "v5e:4": "v5e:4x4", "h100:2x4": "h100:8", "v5p:4x4xq": "v5p:4x4x4"}.items():
        with pytest.raises(ConfigError, match=word):
            plans.Topology.read(text)


def test_links_of_a_torus():
    """A closed ring has two links, a line one, a group over two dimensions the links of both."""
    pod = plans.Topology.read("v5e:16x8")
    row, column = [(i, 0, 0) for i in range(16)], [(0, j, 0) for j in range(8)]
    assert pod.wire(row, 16) == 2 * pod.chip.link and pod.wire(column, 8) == pod.chip.link
    assert pod.wire([(i, j, 0) for i in range(16) for j in range(8)], 128) == 3 * pod.chip.link


def test_every_peak_is_in_the_one_table():
    assert all(chip.flops > 1e14 and chip.memory > 1e10 for chip in plans.CHIPS.values())


# --------------------------------------------------------------------------------------------------------- batches

VAE = AutoencoderConfig(32, (2, 2), blocks=1, latent=8, attention=(), middle_attention=False, groups=8)
FAMILIES = [
    SMALL,
    with_fields(SMALL, condition=TextFeatures(16, 5)),
    with_fields(SMALL, condition=CaptionEncoder(50, 6, 16, 1, 2)),
    with_fields(Masked(), grid=(4, 4), patch=2, width=32, depth=1, heads=2),
    with_fields(AnyOrder(), grid=(4, 4), width=32, depth=1, heads=2),
    with_fields(Stream(), vocabulary=64, grid=(4, 4), condition=StreamText(50, 6), width=32, depth=1, heads=2),
    with_fields(VQDiffusion(), chain=Chain(64), grid=(4, 4), width=32, depth=1, heads=2),
    Diffusion(with_fields(DiT(), size=(8, 8), width=32, depth=1, heads=2)),
    VQGAN(VAE, QuantizerConfig(codes=64, dim=8), perceptual=0.0),
]


@pytest.mark.parametrize("model", FAMILIES, ids=lambda m: type(m).__name__)
def test_the_assumed_batch_is_one_that_the_loss_takes(model):
    e = experiment(model)
    batch, whence = plans.batch_of(e)
    assert "assumed" in whence and all(v.shape[0] == 16 for v in batch.values())
    key = jax.eval_shape(lambda: jax.random.key(0))
    built = jax.eval_shape(model.init, key)
    ready = {k: jax.ShapeDtypeStruct(v.shape, jnp.float32) if k == "image" else v for k, v in batch.items()}
    step = jax.ShapeDtypeStruct((), jnp.int32)
    found = jax.eval_shape(lambda *a: losses_of(model, *a), built, ready, key, step)
    assert found and all(output.loss.shape == () for output in found.values())


def test_inputs_can_be_told():
    batch, _ = plans.batch_of(EXPERIMENT, ("codes:int32:4x4", "label:int32:"))
    assert batch == batch_shapes(EXPERIMENT)
    with pytest.raises(ConfigError, match="codes:int32:16x16"):
        plans.batch_of(EXPERIMENT, ("codes",))


# --------------------------------------------------------------------------------------------------------- counting


@pytest.fixture(scope="module")
def traced():
    batch, _ = plans.batch_of(EXPERIMENT)
    return {remat: plans.trace(experiment(with_fields(SMALL, remat=remat)), batch) for remat in ("none", "full")}


def test_recomputation_costs_flops_and_saves_memory(traced):
    none, full = traced["none"], traced["full"]
    assert none.flops == pytest.approx(none.model_flops, rel=1e-3)
    assert full.flops > 1.2 * none.flops and full.model_flops == none.model_flops
    assert full.kept < none.kept / 3 and full.moved > none.moved


def test_splitting_parameters_divides_the_state_and_adds_traffic(traced):
    at = lambda **mesh: plans.estimate(
        EXPERIMENT, traced["none"], plans.Topology.read("h100:8"), {"data": 1, "fsdp": 1, "tensor": 1} | mesh
    )
    whole, split = at(data=8), at(fsdp=8)
    assert split.state < whole.state / 6 and split.flops == whole.flops
    assert set(whole.collectives) == {"all-reduce"} and set(split.collectives) == {"all-gather", "reduce-scatter"}
    assert at(data=4, tensor=2).parameters < whole.parameters


def test_nodes_are_joined_by_less_than_what_is_inside(traced):
    seconds = lambda where, n: (
        plans.estimate(
            EXPERIMENT, traced["none"], plans.Topology.read(where), {"data": n, "fsdp": 1, "tensor": 1}
        ).network_seconds
    )
    assert seconds("h100:8", 8) < seconds("h100:16", 16)


def test_between_slices_gradients_are_summed_once(traced):
    """Over the slower network goes what the chips of a slice have scattered among themselves, whatever lies within."""

    def at(where, between=25e9 / 8, **mesh):
        topology = plans.Topology.read(where)
        topology = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, between=between))
        return plans.estimate(EXPERIMENT, traced["none"], topology, {"tensor": 1} | mesh)

    whole, two = at("v5e:4x8", data=16, fsdp=2), at("v5e:4x4*2", data=16, fsdp=2)
    assert (two.state, two.flops, two.chips) == (whole.state, whole.flops, whole.chips)
    assert whole.between_seconds == 0 < two.between_seconds
    # It hides behind the backward pass, as long as it can.
    slow = at("v5e:4x4*2", between=1e6, data=16, fsdp=2)
    assert two.step_seconds == at("v5e:4x4*2", between=1e12, data=16, fsdp=2).step_seconds
    assert slow.step_seconds == pytest.approx(1.5 * slow.between_seconds / 0.8)
    sent = lambda plan: plan.collectives["all-reduce between slices"]["bytes"]
    gradients = plans.trace(EXPERIMENT, plans.batch_of(EXPERIMENT, encoded=True)[0]).target.params
    total = sum(x.size * 2 for x in jax.tree.leaves(gradients))
    # All chips of a slice together send each gradient once, in the type of the computation.
    assert sent(two) * 16 == pytest.approx(total, rel=0.02)
    assert sent(at("v5e:4x4*2", data=2, fsdp=16)) * 16 == pytest.approx(total, rel=0.1)  # vectors are not split
    assert two.between_seconds == pytest.approx(sent(two) / (25e9 / 8))
    four = at("v5e:4x4*4", data=32, fsdp=2)
    assert four.between_seconds == pytest.approx(1.5 * two.between_seconds)


def test_slices_are_read_and_checked():
    two = plans.Topology.read("v5e:4x4*2")
    assert two == plans.Topology.read("v5e:4x4").repeated(2) and two.size == 32 and str(two) == "v5e:4x4*2"
    assert plans.Topology.read(str(two)) == two and str(plans.Topology.read("v5e:4x4").repeated(1)) == "v5e:4x4"
    with pytest.raises(ConfigError, match="data=1 cannot be divided among 2 slices"):
        resolved(MeshConfig(1, 32), two)
    for text in ("v5e:4x4*0", "v5e:4x4*", "v5e:4x4*x", "v5e:4x4*2*2"):
        with pytest.raises(ConfigError, match=r"v5e:4x4\*2"):
            plans.Topology.read(text)
    with pytest.raises(ConfigError, match="ask for h100:16"):
        plans.Topology.read("h100:8*2")
    with pytest.raises(ConfigError, match="2 slices already"):
        two.repeated(2)
    tried = list(meshes(32, SMALL, 2))
    assert tried and all(m.data % 2 == 0 and m.data * m.fsdp * m.tensor == 32 for m in tried)


def test_a_chip_of_two_devices_is_paid_for_once(traced):
    topology = plans.Topology.read("tpu7x:2x2x1")
    assert topology.size == 8 and resolved(MeshConfig(-1, 4), topology) == {"data": 2, "fsdp": 4, "tensor": 1}
    plan = plans.estimate(EXPERIMENT, traced["none"], topology, {"data": 2, "fsdp": 4, "tensor": 1})
    assert plan.chips == 4 and plan.peak_flops * 2 == 2307e12 and "2 devices" in plan.notes[-1]


def test_meshes_fill_the_topology_or_say_so():
    pod = plans.Topology.read("v5e:4x4")
    assert resolved(MeshConfig(-1, 4, 2), pod) == {"data": 2, "fsdp": 4, "tensor": 2}
    for mesh in (MeshConfig(3), MeshConfig(-1, 3), MeshConfig(-1, -1)):
        with pytest.raises(ConfigError, match="16 chips"):
            resolved(mesh, pod)
    assert plans.read_mesh("fsdp=4,data=-1", MeshConfig()) == MeshConfig(-1, 4, 1)
    with pytest.raises(ConfigError, match="fsdp=4"):
        plans.read_mesh("fsdb=4", MeshConfig())
    tried = list(meshes(16, SMALL))
    assert all(m.data * m.fsdp * m.tensor == 16 for m in tried) and {m.tensor for m in tried} == {1, 2}


def test_a_sweep_ranks_what_fits():
    found = plans.run(EXPERIMENT, plans.Topology.read("h100:8"), sweeping=True, images=1e6, encoded=True)
    speed = [p.batch * p.steps_per_second for p in found]
    assert speed == sorted(speed, reverse=True) and all(p.fits for p in found)
    assert {p.remat for p in found} == set(policies(SMALL)) and {p.batch for p in found} == {16, 32, 64}
    best = found[0]
    assert best.chip_hours == pytest.approx(1e6 / best.batch * best.step_seconds / 3600 * 8)
    assert 0 < best.mfu < 1


def test_accumulation_must_divide_the_batch():
    e = experiment(SMALL, train=Train(accumulate=16))
    with pytest.raises(ConfigError, match="nothing fits"):
        plans.run(e, plans.Topology.read("h100:32"), sweeping=True, batch_sizes=(16,), encoded=True)


# ---------------------------------------------------------------------------------------------------------- shallow


def test_shallow_copies_are_shallow_and_otherwise_the_same():
    assert shallow_copy_of_model(SMALL, 2) == with_fields(SMALL, depth=2)
    deep = Diffusion(with_fields(DiT(), size=(8, 8), width=32, depth=9, heads=2))
    assert (
        depths(deep) == {"network.transformer.depth": 9}
        and shallow_copy_of_model(deep, 4).network.transformer.depth == 4
    )


def linear(e, batch, topology, sample=False):
    """Stands in for the compiler: everything grows with depth, and more than 32 images do not fit."""
    if e.data.batch_size > 32:
        raise plans.DoesNotFit("too large")
    counted = plans.estimate(e, plans.trace(EXPERIMENT, batch), topology, resolved(e.mesh, topology))
    kinds = {"all-gather": {"count": e.model.transformer.depth, "bytes": 10.0 * e.model.transformer.depth + 3}}
    return dataclasses.replace(
        counted, flops=5.0 * e.model.transformer.depth + 1, collectives=kinds, compile_seconds=1.0
    )


def test_shallow_copies_are_on_the_line_of_the_whole(monkeypatch):
    from t2i_jax.plan import compiled

    monkeypatch.setattr(compiled, "compile_plan", linear)
    batch, _ = plans.batch_of(EXPERIMENT, encoded=True)
    made = plans.plan_by_shallow_copies(EXPERIMENT, batch, plans.Topology.read("v5e:2x2"))
    assert made.flops == 31 and made.collectives == {"all-gather": {"count": 6, "bytes": 63}}
    assert "shallow copies of 2 and 4 layers" in made.method
    sampler = plans.plan_by_shallow_copies(EXPERIMENT, batch, plans.Topology.read("v5e:2x2"), sample=True)
    assert set(sampler.notes) - set(made.notes) and "on-chip memory between tokens" in sampler.notes[-1]
    with pytest.raises(ConfigError, match="above 4"):
        plans.plan_by_shallow_copies(experiment(shallow_copy_of_model(SMALL, 3)), batch, plans.Topology.read("v5e:2x2"))


def test_a_sweep_asks_the_compiler_for_the_best_and_believes_it(monkeypatch):
    module = importlib.import_module("t2i_jax.plan.sweep")
    monkeypatch.setattr(module, "compile_plan", linear)
    found = plans.run(
        experiment(SMALL), plans.Topology.read("v5e:2x2"), sweeping=True, compiles=2, batch_sizes=(16, 64), encoded=True
    )
    compiled = [p for p in found if p.compile_seconds]
    assert found[: len(compiled)] == compiled and all(p.batch == 16 for p in compiled)


def test_a_sweep_compiles_other_batches_and_policies_before_other_meshes_of_the_same():
    plan = lambda batch, remat: (SimpleNamespace(batch=batch, remat=remat), None, None)
    ranked = [plan(*x) for x in ((64, "dots"), (64, "dots"), (32, "none"), (64, "dots"), (32, "none"), (32, "dots"))]
    assert [(p.batch, p.remat) for p, *_ in turns(ranked)[:3]] == [(64, "dots"), (32, "none"), (32, "dots")]  # pyright: ignore
    assert turns(ranked)[3:] == [ranked[1], ranked[4], ranked[3]]  # pyright: ignore


DEEP = Diffusion(with_fields(DiT(), size=(8, 8), width=32, depth=6, heads=2))


@pytest.mark.parametrize("model", [SMALL, DEEP, Diffusion(UNet((8, 8), width=32)), VQGAN(VAE, QuantizerConfig(64, 8))])
def test_a_remat_policy_is_found_and_changed_wherever_it_lies(model):
    found = policies(model)
    if isinstance(model, VQGAN):
        assert found == ("none",) and changed(experiment(model), "none", 32).model == model
        return
    assert {"none", "full", "dots"} <= set(found)
    for policy in found:
        new = changed(experiment(model), policy, 32).model
        assert new.compute.remat == policy and changed(experiment(new), model.compute.remat, 32).model == model


def test_a_sweep_of_a_diffusion_transformer_tries_its_policies():
    found = plans.run(experiment(DEEP), plans.Topology.read("h100:8"), sweeping=True, batch_sizes=(16,), encoded=True)
    assert {p.remat for p in found} == {"none", "full", "dots", "branches"}
    peak = lambda policy: next(p.peak for p in found if p.remat == policy and p.mesh["data"] == 8)
    assert peak("full") < peak("none")


def test_a_sweep_compiles_shallow_copies_where_asked(monkeypatch):
    module = importlib.import_module("t2i_jax.plan.compiled")
    monkeypatch.setattr(module, "compile_plan", linear)
    where = plans.Topology.read("v5e:2x2")
    options = {"sweeping": True, "compiles": 1, "batch_sizes": (16,), "encoded": True, "shallow": True}
    best = plans.run(EXPERIMENT, where, **options)[0]
    assert "shallow copies of 2 and 4 layers" in best.method and best.flops == 31
    for topology, counted in ((where, True), (plans.Topology.read("h100:8"), False)):
        with pytest.raises(ConfigError, match="--shallow: its models are compiled"):
            plans.run(EXPERIMENT, topology, shallow=True, counted=counted)


def test_the_sampler_is_planned_from_the_same_state():
    batch, _ = plans.batch_of(EXPERIMENT, encoded=True)
    mesh = MeshConfig(1).build(jax.devices()[:1])
    text = plans.abstract_setup(EXPERIMENT, batch, mesh).lower_sample().as_text()
    assert "16x4x4xi32" in text.split("return")[0] or "tensor<16x4x4xi32>" in text


@pytest.mark.parametrize("depth", [2, pytest.param(52, marks=pytest.mark.slow)])
def test_a_model_larger_than_a_chip_is_sampled_abstractly(depth):
    """The 20B on eight chips: each holds an eighth of the weights, of keys and values, and no copy of the whole."""
    model = preset("20B", vocabulary=16384, grid=(2, 3), depth=depth, condition=ClassEmbedder(8))
    e, mesh = experiment(model, mesh=MeshConfig(1, 8, 1)), MeshConfig(1, 8, 1).build()
    made = plans.abstract_setup(e, plans.batch_of(e, encoded=True)[0], mesh)
    places, rows = model.length + 1, 2 * 16 // 8
    assert made.cache() == depth * (2 * rows * 8 * places * 128 + 1) * 4  # fp32, and where each cache ends
    share = bytes_on_chip(made.trainer.target.params, dict(mesh.shape))
    assert share > depth * (2 * 6144**2 + 3 * 6144 * 16384) / 8 * 4
    if depth == 2:  # what the compiler unrolls
        memory = made.lower_sample().compile().memory_analysis()
        assert memory.argument_size_in_bytes < 1.01 * share
        activations = 2 * 16 * (2 * 16384 + 4 * 6144) * 4
        assert memory.temp_size_in_bytes - made.cache() - activations < 1.5 * share


def test_the_plan_of_a_sampler_says_what_a_chip_holds():
    plan = plans.estimate(
        EXPERIMENT,
        plans.trace(EXPERIMENT, plans.batch_of(EXPERIMENT, encoded=True)[0]),
        plans.Topology.read("v5e:2x2"),
        {"data": 4, "fsdp": 1, "tensor": 1},
    )
    plan = dataclasses.replace(plan, what="sampler", cache=3 * 2.0**30, temporaries=5 * 2.0**30)
    rows = dict(zip(*(column._cells for column in plans.table(plan).columns), strict=True))
    assert rows["keys and values"] == "3 GiB" and rows["activations and other temporaries"] == "2 GiB"
    assert "optimiser state" not in rows


# ---------------------------------------------------------------------------------------------------------- command

CONFIG = """
from t2i_jax.core.family import with_fields
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.training.experiment import Experiment
model = with_fields(AR(64, (4, 4)), width=32, depth=2, heads=2, condition=ClassEmbedder(10))
experiment = Experiment(model,
                        Data(ArrayRecord("not/there"), batch_size=16))
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)
    return str(tmp_path / "c.py")


def test_command_counts_for_gpus(config, tmp_path, capsys):
    from t2i_jax.cli import main

    out = tmp_path / "plans" / "p.json"
    main(["plan", config, "--topology", "h100:8", "--mesh", "fsdp=8", "--model.transformer.depth=3", "--out", str(out)])
    (found,) = json.loads(out.read_text())
    assert found["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1} and found["fits"] and found["flops"] > 0
    shown = capsys.readouterr().out
    assert "Nothing was compiled" in shown and "expected MFU" in shown and "assumed" in shown
    assert "upper bound" in shown


def test_command_counts_the_network_between_slices(config, capsys):
    from t2i_jax.cli import main

    main(["plan", config, "--topology", "v5e:2x2", "--slices", "2", "--mesh", "data=4,fsdp=2", "--estimate"])
    shown = capsys.readouterr().out
    assert "v5e:2x2*2" in shown and "network between slices" in shown


def test_command_tells_what_is_wrong(config, capsys):
    from t2i_jax.cli import main

    for words, message in (
        (["--topology", "h100:8", "--mesh", "fsdp=3"], "8 chips"),
        (["--topology", "h100:8", "--sample"], "TPU compiler"),
        (["--topology", "x:8"], "no chip"),
        (["--topology", "v5e:2x2", "--slices", "2", "--mesh", "fsdp=8", "--estimate"], "among 2 slices"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["plan", config, *words])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"t2i_jax\[plan\]"):
        plans.devices_of(plans.Topology.read("v5e:2x2"))


TPU = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the TPU compiler (extra `plan`)")


@TPU
def test_meshes_lie_on_a_torus_and_between_slices_is_data_alone(monkeypatch):
    from jax.experimental import topologies

    for name, value in {**ALONE, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(name, value)
    described = lambda name, **more: list(topologies.get_topology_desc(name, "tpu", **more).devices)
    whole = MeshConfig(8, 64).build(described("v5p:8x8x8"))
    assert {d.coords[0] for d in whole.devices[0].flat} == {0} or {d.coords[2] for d in whole.devices[0].flat} == {0}
    # No axis of the torus is 16 or 32 long.
    assert MeshConfig(16, 32).build(described("v5p:8x8x8")).devices.shape == (16, 32, 1)
    two = described("v5e:4x4", num_slices=2)
    assert [d.slice_index for d in MeshConfig(4, 8).build(two).devices[:, 0, 0]] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="data=1 cannot be divided among 2 slices"):
        MeshConfig(1, 32).build(two)


@TPU
def test_the_tpu_compiler_agrees_with_the_count():
    """The real step, compiled for four chips: its products are those of the traced step, split in four."""
    e = experiment(with_fields(SMALL, depth=3, width=128), mesh=MeshConfig(1, 2, 2))
    topology = plans.Topology.read("v5e:2x2")
    batch, _ = plans.batch_of(e)
    made = plans.compile_plan(e, batch, topology)
    counted = plans.estimate(e, plans.trace(e, batch), topology, made.mesh)
    assert made.flops == pytest.approx(counted.flops, rel=0.05)
    assert made.parameters == counted.parameters and made.fits and made.peak > made.state
    assert made.collectives["all-gather"]["bytes"] > 0 and 0 < made.mfu < 1


@TPU
def test_the_tpu_compiler_sums_gradients_between_slices():
    """What the real program sends to the other slice is what is counted; some tables are summed in fp32."""
    e = experiment(with_fields(SMALL, depth=3, width=128), mesh=MeshConfig(4, 2, 1))
    two = plans.Topology.read("v5e:2x2*2")
    batch, _ = plans.batch_of(e)
    made = plans.compile_plan(e, batch, two)
    counted = plans.estimate(e, plans.trace(e, batch), two, made.mesh)
    sent, expected = (p.collectives["all-reduce between slices"]["bytes"] for p in (made, counted))
    assert expected <= sent < 2.2 * expected and made.between_seconds > 0 and made.chips == 8


@TPU
def test_a_program_that_jaxlib_cannot_read_is_read_as_the_compiler_wrote_it(monkeypatch):
    def unreadable(self):
        raise RuntimeError("async-update instruction should have 1 operands but sees 3")

    e = experiment(SMALL, mesh=MeshConfig(4, 1, 1))
    planned = lambda: plans.compile_plan(e, plans.batch_of(e)[0], plans.Topology.read("v5e:2x2"))
    read = planned()
    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    written = planned()
    same = lambda plan: (plan.flops, plan.bytes, plan.collectives, plan.step_seconds, plan.peak, plan.notes)
    assert same(read) == same(written)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    made = planned()
    assert made.method.startswith("compiled") and made.compile_seconds > 0 and 0 < made.mfu < 1
    assert made.peak > made.state and "cannot be read: async-update" in made.notes[-1]
