"""Small things to test with: tiny random checkpoints of every supported family."""

from pathlib import Path
from typing import Any

_TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # far below the context, so that scaling matters in short tests
}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-rope-llama3": {"model_type": "llama", "rope_parameters": _LLAMA3_ROPE},
    "llama-rope-linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1, "head_dim": None},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True, "head_dim": None},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3-biases": {"model_type": "qwen3", "attention_bias": True, "tie_word_embeddings": True},
}
"""Configurations `tiny_checkpoint` can write: what differs from the common tiny model."""


def tiny_checkpoint(variant: str, folder: Path, seed: int = 0, shard_size: str = "5GB", **changes: Any) -> Path:
    """Write a tiny random checkpoint (config, safetensors, byte-level tokenizer) through transformers; return `folder`.

    `variant` is a key of VARIANTS; `changes` go into the config. Norms and biases are random too, so that forgetting
    one of them shows. About 0.3 MB.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**_TINY, **VARIANTS[variant], **changes}
    config = AutoConfig.for_model(**{key: value for key, value in settings.items() if value is not None})
    for key, value in settings.items():
        if value is None and key != "head_dim":
            setattr(config, key, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.15 if parameter.dim() > 1 else 0.1)
    model.save_pretrained(folder, max_shard_size=shard_size)
    _tiny_tokenizer().save_pretrained(folder)
    return folder


def _tiny_tokenizer() -> Any:
    """Every byte is a token; <|bos|> is 256, <|eos|> 257; a chat template with one line per message."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|bos|>", "<|eos|>")])
    template = (
        "{% for message in messages %}<|bos|>{{ message['role'] }}: {{ message['content'] }}<|eos|>{% endfor %}"
        "{% if add_generation_prompt %}<|bos|>assistant: {% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", chat_template=template
    )
