"""Takes models through `transformers`. Usage: agree.py FOLDER

For each checkpoint FOLDER/ours-N: loads it, which must need nothing and leave nothing over; saves it as
FOLDER/theirs-N, as `plan.json` in it says (number type, size of the files); and writes its logits after the
plan's tokens to FOLDER/theirs-N.json.
"""

import json
import pathlib
import shutil
import sys

import torch
from transformers import AutoModelForCausalLM

folder = pathlib.Path(sys.argv[1])
files, deviations = 0, []
for ours in sorted(folder.glob("ours-*")):
    plan = json.loads((ours / "plan.json").read_text())
    model, info = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32, output_loading_info=True)
    for key in ["missing_keys", "unexpected_keys", "mismatched_keys"]:
        assert not info[key], f"{model.config}\n{key}: {info[key]}"
    model.to(getattr(torch, plan["dtype"]))
    theirs = folder / ours.name.replace("ours", "theirs")
    model.save_pretrained(theirs, max_shard_size=plan["shard_bytes"])
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(ours / name, theirs / name)
    files += len(list(theirs.glob("*.safetensors")))
    # The weights are rounded as they were saved, the computation is not.
    model = AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([plan["tokens"]])).logits[0]
    deviations.append(logits.std().item())
    theirs.with_suffix(".json").write_text(json.dumps({"logits": logits.tolist()}))
print(f"{len(deviations)} models in {files} files, standard deviations of their logits "
      f"{min(deviations):.2f} to {max(deviations):.2f}")
