"""Formats of single-stream models and of the discrete codecs that they read."""

from collections.abc import Sequence

from t2i_jax.codecs.dvae import DVAE, DALLEPytorchVAE, OpenAIdVAE
from t2i_jax.convert import Format
from t2i_jax.core.family import with_fields
from t2i_jax.core.params import abstract
from t2i_jax.interop import dalle_pytorch, mindalle, openai_dvae
from t2i_jax.interop.names import Fields, Tensors
from t2i_jax.models.stream import Stream, StreamText
from t2i_jax.sampling.options import ARSampler


def _openai_dvae(tensors: Tensors, **fields: object) -> DVAE:
    found = openai_dvae.describe(tensors)
    network = {k: found[k] for k in ("channels", "groups", "blocks", "code") if k in found}
    known = {"codes": found["codes"], "half": found["half"], "network": OpenAIdVAE(**network)}
    return with_fields(DVAE(), **(known | fields))


def _mindalle(tensors: Tensors, *, heads: int = 0, **fields: object) -> Stream:
    found = mindalle.describe(tensors, heads)
    text = StreamText(**found.pop("text"))
    sampling = ARSampler(guidance=1.0, top_k=256)
    published = {"condition": text, "condition_dropout": 0.0, "sampling": sampling}
    return with_fields(Stream(), **(found | published | fields))


ATTENTION = {"full": "full", "axial_row": "row", "axial_col": "column", "conv_like": "window"}


def _dalle_pytorch(
    tensors: Tensors,
    *,
    heads: int = 8,
    grid: tuple[int, int] | None = None,
    text_length: int = 0,
    codes: int = 0,
    attn_types: str | Sequence[str] = ("full",),
    stable: bool = False,
    **fields: object,
) -> Stream:
    """attn_types: the kinds of attention, cycled over the layers, by their published names. stable: numbers are kept
    small, and embedded tokens get a tenth of the gradient; shared layers of the original become equal layers."""
    attn_types = (attn_types,) if isinstance(attn_types, str) else attn_types
    if wrong := [kind for kind in attn_types if kind not in ATTENTION]:
        raise ValueError(f"attn_types={wrong[0]!r}: known are {', '.join(ATTENTION)}")
    found = dalle_pytorch.describe(tensors, heads, grid, text_length, codes)
    text = StreamText(**found.pop("text"))
    attention = tuple(ATTENTION[kind] for kind in attn_types)
    found |= {"pb_relax": True, "embedding_gradient": 0.1} if stable else {}
    return with_fields(Stream(), **(found | {"condition": text, "attention": attention} | fields))


def _dalle_pytorch_vae(tensors: Tensors, **fields: object) -> DVAE:
    found = dalle_pytorch.describe_vae(tensors)
    network = DALLEPytorchVAE(**{k: found[k] for k in ("channels", "layers", "blocks", "code")})
    trained: Fields = dict(pixels="l2", temperature=0.9, anneal=0)
    return with_fields(DVAE(), **({"codes": found["codes"], "network": network} | trained | fields))


FORMATS = {
    "openai_dvae": Format(
        _openai_dvae,
        lambda config: openai_dvae.table(abstract(config)),
        needed=openai_dvae.NEEDED,
        title="the discrete VAE of DALL-E: a folder with encoder.pkl and decoder.pkl, or one of them alone",
        example="FOLDER",
        files={"encoder": "encoder.", "decoder": "decoder."},
    ),
    "mindalle": Format(
        _mindalle,
        lambda config: mindalle.table(config.transformer),
        needed=(mindalle.NEEDED,),
        title="minDALL-E's Transformer over text and image tokens",
        example="stage2_last.ckpt --codec models/taming-vqgan",
    ),
    "dalle_pytorch": Format(
        _dalle_pytorch,
        lambda config: dalle_pytorch.table(
            config.transformer,
            config.condition.num_embeddings,
            config.vocabulary,
            token_shift=config.token_shift,
            tied=config.tied,
            axial=config.positions == "axial",
        ),
        dalle_pytorch.UNUSED,
        needed=dalle_pytorch.NEEDED,
        renames=dalle_pytorch.RENAMES,
        title="DALLE-pytorch's Transformer over text and image tokens",
        example="dalle.pt --heads 8 --codec models/dalle_pytorch_vae",
    ),
    "dalle_pytorch_vae": Format(
        _dalle_pytorch_vae,
        lambda config: dalle_pytorch.vae_table(abstract(config)),
        dalle_pytorch.VAE_UNUSED,
        needed=(dalle_pytorch.VAE_NEEDED,),
        renames=dalle_pytorch.VAE_RENAMES,
        title="DALLE-pytorch's discrete VAE, alone or in the file of its Transformer",
        example="dalle.pt",
    ),
}
