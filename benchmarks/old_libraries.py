"""Do the folders that this project writes load in the libraries of the released code? Runs with those, not with ours.

    pip install --target /tmp/old --no-deps transformers==4.30.2 tokenizers==0.13.3 peft==0.6.2 \\
        huggingface_hub==0.17.3 accelerate==0.24.1 requests urllib3 idna charset-normalizer certifi
    PYTHONPATH=/tmp/old python benchmarks/old_libraries.py experiments/RUN RL_models/RUN/0 --lora experiments/RUN/LORA

Loads each folder as the released scripts do, with `from_pretrained(folder, patch_size=...)` on a T5 that takes
`patch_size` as an argument of its own, its tokenizer with `AutoTokenizer`, and the adapter with peft, on the first
folder. Prints one line each; exit status 1 if any does not load. Of the image layers only names and shapes are
checked. Torch and safetensors may be any version that runs there.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def load_model(folder: Path):
    """The T5 in `folder`, with image layers where its config.json names a shape, by the old library's own code."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    shape = json.loads((folder / "config.json").read_text()).get("image_patch_size")

    class Model(T5ForConditionalGeneration):
        _keys_to_ignore_on_load_missing = [r"decoder.embed_tokens.weight", r"encoder.embed_tokens.weight"]

        def __init__(self, config: T5Config, patch_size):
            super().__init__(config)
            if patch_size is not None:
                self.encoder.image_dense = torch.nn.Linear(patch_size[1], config.d_model)
                self.encoder.mha_layer = torch.nn.MultiheadAttention(config.d_model, num_heads=1, batch_first=True)
                self.encoder.gate_dense = torch.nn.Linear(2 * config.d_model, config.d_model)

    model, loading = Model.from_pretrained(str(folder), patch_size=shape, output_loading_info=True)
    if wrong := {key: value for key, value in loading.items() if value}:
        raise ValueError(f"{wrong}")
    return model


def check_tokenizer(folder: Path) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    text = "Question: Which is farther north?\nOptions: (A) Oklahoma (B) Louisiana"
    ids = tokenizer(text)["input_ids"]
    if ids[-1] != 1 or tokenizer.unk_token_id in ids or not tokenizer.decode(ids).startswith("Question: Which"):
        raise ValueError(f"the tokenizer makes {ids} of {text!r}")
    return f"{type(tokenizer).__name__}, {len(tokenizer)} pieces, ids {ids[:6]}"


def check_adapter(model, folder: Path) -> str:
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, str(folder))
    if not (layers := sum(".lora_A." in name for name, _ in adapted.named_parameters())):
        raise ValueError("no layer has an adapter")
    return f"{layers} layers, targets {' '.join(sorted(adapted.peft_config['default'].target_modules))}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="model folders")
    parser.add_argument("--lora", type=Path, action="append", default=[], help="adapter on the first of them; repeat")
    args = parser.parse_args()
    import peft
    import tokenizers
    import transformers

    print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, peft {peft.__version__}")
    results = []

    def check(name: str, function, *arguments):
        try:
            found, result = function(*arguments), "ok  "
            text = found if isinstance(found, str) else f"{found.num_parameters()} parameters"
        except Exception as error:  # whatever the old libraries raise is the answer
            found, result = None, "FAIL"
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"{result}  {name}: {text}")
        results.append(result)
        return found

    for folder in (*args.folders, *args.lora):
        check(f"tokenizer {folder}", check_tokenizer, folder)
    first, *_ = [check(f"model {folder}", load_model, folder) for folder in args.folders]
    for folder in args.lora:
        check(f"adapter {folder}", check_adapter, first, folder)
    return int("FAIL" in results)


if __name__ == "__main__":
    sys.exit(main())
