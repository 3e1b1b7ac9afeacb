"""Every released file is taken whole: its configuration is recognised, no name is missing or left over."""

import re

import jax
import pytest

from t2i_jax.convert import convert, find
from t2i_jax.interop.names import to_ours
from tests.fixtures.released import released, tensors_of

FORMATS = {
    r"llamagen_GPT-.*": "llamagen",
    r"llamagen_VQ-\d+": "llamagen-vq",
    r"taming_vqgan_f16_\d+": "taming-vqgan",
    r"taming_vqgan_gumbel_.*": "taming-gumbel",
    r"clip_gen_gpt2_.*": "clipgen",
    r"clip_gen_vqgan": "clipgen-vqgan",
    r"vq_diffusion_.*": "vq_diffusion",
    r"mindalle_.*": "mindalle",
    r"maskgit_transformer_.*": "maskgit",
    r"maskgit_tokenizer_.*": "maskgit-vqgan",
    r"openai_dvae_.*": "openai_dvae",
    r"dit_.*": "dit",
    r"adm_classifier_.*": "adm_classifier",
    r"adm_\d.*": "adm",
    r"glide_.*": "glide",
    r"karlo_prior": "karlo_prior",
    r"karlo_decoder": "karlo_decoder",
    r"karlo_sr": "karlo_sr",
    r"dfgan_netG": "dfgan",
    r"ssagan_netG": "ssagan",
    r"damsm_.*|dfgan_text_encoder_.*": "damsm",
    r"attngan_.*_G": "attngan",
    r"attngan_.*_D\d": "attngan-discriminator",
    r"dmgan_.*_G": "dmgan",
    r"dmgan_D\d": "dmgan-discriminator",
    r"var_d\d+": "var",
    r"var_vqvae": "var-vqvae",
    r"stackgan_v2_.*_G": "stackgan_v2",
    r"stackgan_v2_.*_D\d": "stackgan_v2-discriminator",
}
"""Which format a file of names and shapes belongs to, by its name; those of MAR are in its own tests."""
LONG = r"dit_.*|adm_.*|glide_.*|karlo_.*"

KNOWN = {file: format for file in released() for name, format in FORMATS.items() if re.fullmatch(name, file)}
CASES = [pytest.param(file, marks=pytest.mark.slow if re.fullmatch(LONG, file) else ()) for file in KNOWN]


@pytest.mark.parametrize("file", CASES)
def test_a_released_file_is_taken_whole(file):
    tensors, format = tensors_of(file), find(KNOWN[file])
    for pattern, to in format.renames:
        tensors = {re.sub(pattern, to, name): tensor for name, tensor in tensors.items()}
    config, model = convert(KNOWN[file], tensors)
    buffers = sum(t.size for k, t in tensors.items() if re.search(format.unused, k)) if format.unused else 0
    table = format.table(config)
    placed = {name for line in table.values() for n in range(200) for name in line.layer(n)} & tensors.keys()
    buffers -= sum(tensors[k].size for k in placed if format.unused and re.search(format.unused, k))
    assert sum(x.size for x in jax.tree.leaves(model)) == released()[file]["numel_state_dict"] - buffers

    # A renamed tensor is reported as one too many and one too few.
    name = next(n for n in placed if ".0." not in n)
    broken = {("unknown" if k == name else k): v for k, v in tensors.items()}
    abstract = jax.eval_shape(config.init, jax.random.key(0))
    with pytest.raises(ValueError, match="unknown: unused") as error:
        jax.eval_shape(lambda tensors: to_ours(abstract, tensors, table, format.unused), broken)
    assert f"{name}: missing" in str(error.value)


@pytest.mark.parametrize("parts", [("dfgan_netG", "dfgan_netD", "dfgan_netC"), ("ssagan_netG", "ssagan_netD")])
def test_both_players_of_a_gan_are_taken_whole(parts):
    """Under the keys of a checkpoint, or from files beside each other; what is not used is given back, too."""
    format = find(parts[0].partition("_")[0])
    several = {part.partition("_")[2]: tensors_of(part) for part in parts}
    named = lambda part, name: f"{part}.{name.removeprefix('module.')}"
    tensors = {named(part, name): t for part, some in several.items() for name, t in some.items()}
    config, _ = convert(parts[0].partition("_")[0], tensors)
    table = format.table(config)
    assert tensors.keys() == {line.names[0] for line in table.values()} | format.buffers(config).keys()
    assert config.network.size == (256, 256) and config.condition.dim == 256
