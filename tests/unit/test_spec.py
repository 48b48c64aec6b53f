"""ModelSpec: configs in the words of transformers 4 and 5, refusals, costs."""

import pytest

from disagg.errors import ModelError
from disagg.model.spec import SEED, ModelSpec, shorten

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}


def spec(**changes):
    return ModelSpec.from_config({**LLAMA, **changes})


def test_families_differ_in_fields():
    """What each family always has, and what its class assumes when a key is missing."""
    assert (spec().family, spec().head_dim, spec().qkv_bias, spec().tied) == ("llama", 16, False, False)
    biased = spec(attention_bias=True, mlp_bias=True)
    assert (biased.qkv_bias, biased.out_bias, biased.mlp_bias) == (True, True, True)
    qwen2 = spec(architectures=["Qwen2ForCausalLM"], tie_word_embeddings=True)
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.qk_norm, qwen2.tied) == (True, False, False, True)
    qwen3 = spec(architectures=["Qwen3ForCausalLM"])
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    without_groups = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert ModelSpec.from_config(without_groups).num_kv_heads == 4


def test_both_spellings_of_rope():
    """rope_parameters (transformers 5) and rope_theta with rope_scaling (4) mean the same."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    new = spec(rope_parameters={**scaling, "rope_theta": 5e5})
    old = spec(rope_theta=5e5, rope_scaling=scaling)

    assert new == old
    assert (new.rope.kind, new.rope.theta, new.rope.original_len) == ("llama3", 5e5, 64)
    assert spec(rope_scaling={"type": "linear", "factor": 2.0}).rope.kind == "linear"
    assert spec(rope_scaling=None).rope.kind == "default"


def test_eos_ids_of_both_files():
    """The config's and the generation config's end-of-sequence ids are joined."""
    assert spec().eos_ids == (2,)
    assert ModelSpec.from_config(LLAMA, {"eos_token_id": [7, 2, 5]}).eos_ids == (2, 5, 7)
    assert spec(eos_token_id=None).eos_ids == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not supported: use one of LlamaForCausalLM"),
        ({"architectures": None}, "none; model_type"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported: only default, linear and"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs a factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "Quantised"),
        ({"num_attention_heads": 3}, "3 query heads for 2"),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 128}, "--max-len 128"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 64,
          "max_window_layers": 1}, "--max-len 64"),
    ],
)  # fmt: skip
def test_refusals_name_what_is_supported(changes, words):
    """Whatever would be computed wrongly is refused in a sentence."""
    with pytest.raises(ModelError, match=words) as caught:
        spec(**changes)
    assert str(caught.value).endswith(".")


def test_inactive_sliding_windows_are_fine():
    """A window that no position or no layer ever meets changes nothing."""
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 128}
    assert ModelSpec.from_config(mistral, max_len=128).max_len == 128
    assert spec(architectures=["MistralForCausalLM"], sliding_window=None).max_len == 256
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64}
    assert spec(**qwen, use_sliding_window=False).max_len == 256
    assert spec(**qwen, use_sliding_window=True, max_window_layers=2).max_len == 256


def test_context_can_only_be_shortened():
    """max_len lies between 1 and the model's own context."""
    assert ModelSpec.from_config(LLAMA, max_len=100).max_len == 100
    assert shorten(SEED, 100).max_len == 100
    for wrong in (0, 257):
        with pytest.raises(ModelError, match="1 to 256"):
            ModelSpec.from_config(LLAMA, max_len=wrong)
    with pytest.raises(ModelError, match="1 to 8192"):
        shorten(SEED, 8193)


def test_costs_by_hand():
    """FLOPs and bytes of a model small enough to add up on paper."""
    model = spec(hidden_size=4, num_attention_heads=2, num_key_value_heads=1, head_dim=2, intermediate_size=3,
                 num_hidden_layers=1, vocab_size=10)  # fmt: skip

    # q 4x4, k and v 2x4, out 4x4, gate, up and down 4x3; embedding and output 10x4
    assert model.layer_params == 16 + 8 + 8 + 16 + 36
    assert model.num_params == 84 + 80
    assert model.weight_bytes("float32") == 164 * 4
    assert model.kv_bytes_per_token("float16") == 2 * 1 * 1 * 2 * 2
    # 3 positions attend to 1 + 2 + 3; scores and values, 2 heads of 2
    assert model.prefill_flops(3) == 2 * 3 * 84 + 4 * 4 * 6 + 2 * 40
    assert model.decode_flops(3) == 2 * 84 + 4 * 4 * 3 + 2 * 40
    with pytest.raises(ModelError, match="float32, float16, bfloat16"):
        model.weight_bytes("int8")


def test_costs_add_up():
    """A prompt in two chunks costs what it costs in one, but for the logits of the extra chunk."""
    logits = 2 * SEED.vocab_size * SEED.hidden_size
    assert SEED.prefill_flops(40) + SEED.prefill_flops(60, 40) == SEED.prefill_flops(100) + logits


def test_seed_has_the_size_of_its_modules():
    """num_params counts the matrices of the real modules; norms and biases stay below 0.3 %."""
    from disagg.model.seed import draw

    weights = draw(SEED, 42)
    matrices = sum(tensor.numel() for tensor in weights.values() if tensor.dim() > 1)
    assert SEED.num_params == matrices
    assert sum(tensor.numel() for tensor in weights.values()) < 1.003 * matrices
