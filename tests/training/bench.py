"""Times the plain PyTorch training step of a specification's model. Usage: bench.py SPECIFICATION DEVICE THREADS STEPS

Takes STEPS steps on random tokens for each line on standard input, and prints a JSON line about them: the
counterpart of `consort-client bench --on-line --json`.
"""

import json
import pathlib
import resource
import sys
import time
import tomllib

import torch

import reference

specification, device, threads, steps = sys.argv[1], torch.device(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
spec = tomllib.loads(pathlib.Path(specification).read_text())
training = spec["training"]
torch.set_num_threads(threads)
torch.manual_seed(0)
model = reference.make_model(spec["model"]).to(device)
optimizer = torch.optim.AdamW(reference.groups(model, 0.1), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
shape = (training["batch_size"], training["sequence_length"] + 1)
bf16 = training.get("precision") == "bf16"


def take(count):
    for _ in range(count):
        batch = torch.randint(spec["model"]["vocab_size"], shape).to(device)
        loss = reference.step(model, optimizer, batch, training["gradient_clip"], bf16)
    return loss.item()


def peak_memory():
    """Of the GPU's memory what tensors held, of the host's all that this process held, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


take(2)
for _ in sys.stdin:
    began = time.perf_counter()
    loss = take(steps)
    tokens_per_second = steps * training["batch_size"] * training["sequence_length"] / (time.perf_counter() - began)
    result = {
        "tokens_per_second": tokens_per_second,
        "peak_memory_bytes": peak_memory(),
        "loss": loss,
        "torch": torch.__version__,
    }
    print(json.dumps(result), flush=True)
