#!/usr/bin/env python3
"""Continue a text with an exported model.

python examples/evaluate/generate.py HF_FOLDER "def main(" [--tokens 40] [--temperature 0.8]
"""

import argparse
import os
from pathlib import Path

# The folder holds all files that are needed, so the hub is never contacted.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Print the text and its continuation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=40, help="maximum number of tokens to add")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the most likely token")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, torch_dtype="auto")
    sampling = {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature else {}
    tokens = tokenizer(arguments.text, return_tensors="pt")["input_ids"]
    longer = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=arguments.tokens,
        pad_token_id=tokenizer.eos_token_id, **sampling,
    )  # fmt: skip
    print(tokenizer.decode(longer[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
