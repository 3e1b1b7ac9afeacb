"""What the families declare they are, for the type checker alone: each line is an error where a signature is not that
of its Protocol."""

from t2i_jax.codecs.kl import KL
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.core.types import Classifier, Family, GaussianFamily, Likelihood, ReadsCodec, SharesForward, TokenByToken
from t2i_jax.models.any_order import AnyOrder
from t2i_jax.models.ar import AR
from t2i_jax.models.clip import CLIP
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.masked import Masked
from t2i_jax.models.noised_classifier import NoisedClassifier
from t2i_jax.models.stream import Stream
from t2i_jax.models.var import VAR
from t2i_jax.models.vq_diffusion import VQDiffusion

families: list[Family] = [AR(), Stream(), Masked(), AnyOrder(), VAR(), VQDiffusion(), Diffusion()]
token_by_token: list[TokenByToken] = [AR(), Stream()]
likelihoods: list[Likelihood] = [AR(), Stream(), AnyOrder(), VAR(), VQDiffusion()]
reads_codec: list[ReadsCodec] = [VAR()]
gaussian: list[GaussianFamily] = [Diffusion()]
classifiers: list[Classifier] = [NoisedClassifier(), CLIP()]
shared_forward: list[SharesForward] = [VQGAN(), KL()]
