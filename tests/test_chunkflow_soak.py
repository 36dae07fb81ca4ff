"""A sequence of 262,144 tokens trains on two cores and 24 GiB, at the peak memory that the tuner predicted."""

import json

import pytest

from chunkflow.tune import tune

LONGEST = 262_144
CONFIG = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": LONGEST,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_256k_tokens_train_at_the_predicted_peak(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    # Grid and proposals are measured on short sequences; the check of the last proposal trains the long one.
    found = tune(str(path), cap_bytes=1 << 30, longest=LONGEST, chunk_tokens=[1024, 2048], retain=[1, 2])
    print(found)
    assert found.measured_peak_bytes <= found.cap_bytes
    assert found.measured_peak_bytes == pytest.approx(found.predicted_peak_bytes, rel=0.05)
    above_base = found.measured_peak_bytes - found.fixed_bytes
    assert above_base >= LONGEST * 0.9 * 2 * (4 + 4) * 64  # keys, values and their fp32 gradients are in it
