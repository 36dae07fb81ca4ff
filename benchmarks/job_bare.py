"""What any script under torchrun does before it can train: import torch and transformers, load the model. One rank.

torchrun ... -m benchmarks.job_bare FOLDER [MODEL]        (started by benchmarks.job)

MODEL is a folder of transformers or `smollm2`; without it, a small Llama with random weights is made.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    """Import and load; tell when. Nothing of this project is imported but where the package's file is looked for."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    imported = time.monotonic()
    if len(sys.argv) < 3:
        # The quickstart's sizes.
        LlamaForCausalLM(LlamaConfig(vocab_size=4096, hidden_size=128, intermediate_size=384, num_hidden_layers=2,
                                     num_attention_heads=2, num_key_value_heads=1))  # fmt: skip
    elif Path(sys.argv[2]).is_dir():
        AutoModelForCausalLM.from_pretrained(sys.argv[2])
    else:
        from launch.pretrained import pretrained_model

        pretrained_model(sys.argv[2])
    loaded = time.monotonic()
    path = Path(sys.argv[1]) / f"rank-{os.environ['RANK']}.json"
    path.write_text(json.dumps({"imported": imported, "loaded": loaded}))


if __name__ == "__main__":
    main()
