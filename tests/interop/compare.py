"""Loads checkpoints as a user of `transformers` does. Usage: compare.py FOLDER TEXT

Beside each checkpoint FOLDER/NAME lies NAME.json, what `consort-client logits` printed for the UTF-8 bytes of
TEXT. Prints the largest difference; fails with an assertion that says what differs.
"""

import json
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

# In units of the logits' own standard deviation: fp32 on both sides, summed in another order.
DIFFERENCE_MAX = 1e-4


def compare(checkpoint, text, ours):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer(text)["input_ids"]
    assert tokens == ours["tokens"] == list(text.encode()), f"the text is tokenised to {tokens}"
    decoded = tokenizer.decode(tokens)
    assert decoded == text, f"the tokens are decoded to {decoded!r}"

    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    for key in ["missing_keys", "unexpected_keys", "mismatched_keys"]:
        assert not info[key], f"{key}: {info[key]}"
    model.eval()
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0]
        expected = torch.tensor(ours["logits"])
        assert theirs.shape == expected.shape, f"{theirs.shape} logits where we have {expected.shape}"
        difference = (theirs - expected).abs().max().item() / expected.std().item()
        assert difference < DIFFERENCE_MAX, f"logits differ by {difference} standard deviations"

    generation = GenerationConfig.from_pretrained(checkpoint)
    assert generation.eos_token_id == tokenizer.eos_token_id == 256, f"eos {generation.eos_token_id}"
    generated = model.generate(torch.tensor([tokens]), max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > len(tokens), "nothing is generated"
    print(f"{checkpoint.name}: logits differ by at most {difference:.1e} standard deviations")


folder, text = pathlib.Path(sys.argv[1]), sys.argv[2]
# What training leaves beside its checkpoint is none.
compared = [path for path in sorted(folder.iterdir()) if (path / "config.json").exists()]
assert compared, f"no checkpoints in {folder}"
for checkpoint in compared:
    compare(checkpoint, text, json.loads(checkpoint.with_suffix(".json").read_text()))
