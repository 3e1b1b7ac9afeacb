"""Sizes by the shapes of published KL autoencoders; their names are those of `interop.vqgan`."""

from __future__ import annotations

from t2i_jax.interop import vqgan
from t2i_jax.interop.names import Fields, Tensors

# Training losses, and the averages that latent diffusion saves with the weights, with dots taken out of their names.
UNUSED = vqgan.IGNORED + r"|^model_ema\."


def describe(tensors: Tensors, style: vqgan.Style) -> Fields:
    """The sizes given by the shapes of `tensors` (arrays or abstract), as fields of the codec and its autoencoder.

    Errors: ValueError where a name that every such file has is not there.
    """
    found, shape = vqgan.autoencoder(tensors, style), lambda name: tuple(tensors[name].shape)
    moments, latent = shape("encoder.conv_out.weight")[0], found["latent"]
    if moments != 2 * latent:
        raise ValueError(
            f"encoder.conv_out gives {moments} channels and decoder.conv_in takes {latent}: "
            "a KL autoencoder gives twice as many, mean and log-variance"
        )
    convolutions = "quant_conv.weight" in tensors
    return {
        "autoencoder": found | {"moments": True},
        "channels": shape("post_quant_conv.weight")[1] if convolutions else latent,
        "convolutions": convolutions,
    }
