"""Hidden states of a language model against those of `transformers`, on random weights, and its captions."""

import json

import jax
import numpy as np
import pytest
import tokenizers

from t2i_jax.interop.decoder_lm import table
from t2i_jax.interop.names import to_theirs
from t2i_jax.text.decoder_lm import DecoderLM, DecoderLMShape

TINY = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
STRETCHED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STRETCHED |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}
MODELS = {
    "Llama": {"rope_parameters": STRETCHED, "attention_bias": True, "tie_word_embeddings": False},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
}


@pytest.mark.parametrize("kind", MODELS)
def test_hidden_states_are_those_of_transformers(kind, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**(TINY | MODELS[kind])))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + ("norm" in name))
    model.eval().save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 50, (2, 12))
    with torch.no_grad():
        wanted = model(torch.tensor(ids), output_hidden_states=True).hidden_states
    for layer in (-1, 2) if kind == "Llama" else (-2,):
        text = DecoderLM(str(tmp_path), 12, layer)
        decoder = text.load()
        found = jax.jit(text.features)(decoder, ids, np.ones((2, 12), bool))
        close = wanted[layer].numpy()
        np.testing.assert_allclose(found, close, atol=1e-4 * np.abs(close).max())
    assert text.feature_shape[1] == 32
    layer = text.shape.transformer
    kinds = dict(zip(("bias", "out_bias"), layer.biases, strict=True)) | {"qk_norm": layer.qk_norm, "last": False}
    back = to_theirs(decoder, table(layer.heads, layer.num_kv_heads, layer.head_size, **kinds))
    assert all(np.array_equal(v, model.state_dict()[k].numpy()) for k, v in back.items())


def test_captions_are_set_into_the_template_and_padded(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.BPE({c: n for n, c in enumerate("catd: ")}, []))
    words.enable_padding(length=9)  # folders may say so; a text pads by itself
    words.save(str(tmp_path / "tokenizer.json"))
    ids, mask = DecoderLM(str(tmp_path), 6, template="d: {}")(["cat", "", "catcat"])
    np.testing.assert_array_equal(ids, [[3, 4, 5, 0, 1, 2], [0] * 6, [3, 4, 5, 0, 1, 2]])
    np.testing.assert_array_equal(mask, [[True] * 6, [False] * 6, [True] * 6])
    ids, mask = DecoderLM(str(tmp_path), 4)(["at"])
    np.testing.assert_array_equal(mask, [[True, True, False, False]])


def test_what_cannot_be_read_is_told(tmp_path):
    config = TINY | {"model_type": "llama"}
    for field, value in {"model_type": "mamba", "mlp_bias": True, "rope_scaling": {"rope_type": "yarn"}}.items():
        with pytest.raises(ValueError, match={"rope_scaling": "yarn"}.get(field, field)):
            DecoderLMShape.read(config | {field: value})
    with pytest.raises(ValueError, match="hidden states 0 to 3"):
        DecoderLMShape.read(config, 4)
    with pytest.raises(ValueError, match="no vocab_size"):
        DecoderLMShape.read({k: v for k, v in config.items() if k != "vocab_size"})
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        DecoderLM(str(tmp_path))(["a cat"])
    for content, said in {
        "version https://git-lfs.github.com/spec/v1\n": "Git LFS pointer",
        "{}": "as a tokenizer",
    }.items():
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{said}"):
            DecoderLM(str(tmp_path))(["a cat"])
    with pytest.raises(ValueError, match="template"):
        DecoderLM("somewhere", template="describe")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="no weights"):
        DecoderLM(str(tmp_path)).load()
