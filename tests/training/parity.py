"""Trains as the trainer's parity test does, and prints losses and learning rates of all steps as JSON. Usage:
parity.py CASE

CASE is a JSON file: `model`, a specification's `[model]` table; `tensors`, names and shapes in the order of the flat
vector; `parameters` and `tokens`, files with the initial flat vector (f32) and the batches of all steps (int64,
[steps, sequences, length + 1]); `optimizer`, `schedule` and `precision` as in a specification; `clip`; `device`, "cpu" or "cuda".
"""

import json
import math
import pathlib
import sys

import torch
import transformers

import reference


class Adopt(torch.optim.Optimizer):
    """Algorithm 2 of arXiv 2411.02853 with c_t = t^(1/4), and decoupled weight decay; written from the paper."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state, g = self.state[p], p.grad
                if not state:
                    state.update(t=0, m=torch.zeros_like(p), v=g * g)
                    continue
                state["t"] += 1
                limit = state["t"] ** 0.25
                normed = (g / state["v"].sqrt().clamp(min=group["eps"])).clamp(-limit, limit)
                state["m"] = beta1 * state["m"] + (1 - beta1) * normed
                p -= group["lr"] * (group["weight_decay"] * p + state["m"])
                state["v"] = beta2 * state["v"] + (1 - beta2) * g * g


def make_optimizers(model, o):
    betas = (o["beta1"], o["beta2"])
    groups = reference.groups(model, o["weight_decay"])
    if o["kind"] == "adamw":
        return [torch.optim.AdamW(groups, lr=o["learning_rate"], betas=betas, eps=o["epsilon"], fused=True)]
    if o["kind"] == "adopt":
        return [Adopt(groups, {"lr": o["learning_rate"], "betas": betas, "eps": o["epsilon"]})]
    outside = ["embed_tokens", "lm_head", "wte", "wpe"]
    hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and not any(x in name for x in outside)]
    for group in groups:
        group["params"] = [p for p in group["params"] if all(p is not other for other in hidden)]
    muon = torch.optim.Muon(
        hidden,
        lr=o["learning_rate"],
        weight_decay=o["weight_decay"],
        momentum=o["momentum"],
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, torch.optim.AdamW(groups, lr=o["learning_rate"], betas=betas, eps=o["epsilon"], fused=True)]


def make_schedule(optimizer, s, steps):
    """From torch where it has one that begins its warm-up as ours does, else from transformers."""
    warmup, begin = s["warmup_steps"], s["warmup_from"]
    if s["kind"] == "warmup-stable-decay":
        assert warmup == 0, "there the first step's rate would be 0"
        return transformers.get_wsd_schedule(
            optimizer, 0, s["decay_steps"], num_training_steps=steps, decay_type="1-sqrt", min_lr_ratio=0
        )
    scheduler = torch.optim.lr_scheduler
    first = begin + (1 - begin) / warmup
    rise = scheduler.LinearLR(optimizer, start_factor=first, total_iters=warmup - 1)
    if s["kind"] == "constant":
        assert s["fraction"] == 1
        return rise
    peak = optimizer.param_groups[0]["initial_lr"]
    if s["kind"] == "infinite":
        return infinite(optimizer, s, steps, rise, peak)
    fall = scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=peak * s["final_fraction"])
    return scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warmup])


def infinite(optimizer, s, steps, rise, peak):
    """Section 7.4 of arXiv 2403.08763, a scheduler for each phase, which counts from its own beginning."""
    scheduler = torch.optim.lr_scheduler
    constant, annealing = s["constant_fraction"], s["annealing_steps"]
    cool = scheduler.CosineAnnealingLR(optimizer, T_max=s["cooldown_steps"], eta_min=peak * constant)
    hold = scheduler.LambdaLR(optimizer, lambda step: constant)
    fall = math.log(s["final_fraction"] / constant) / annealing
    anneal = scheduler.LambdaLR(optimizer, lambda step: constant * math.exp(fall * step))
    cooled = s["warmup_steps"] + s["cooldown_steps"]
    milestones = [s["warmup_steps"], cooled, steps - annealing]
    return scheduler.SequentialLR(optimizer, [rise, cool, hold, anneal], milestones=milestones)


def main():
    torch.set_num_threads(1)
    case = json.loads(pathlib.Path(sys.argv[1]).read_text())
    model = reference.make_model(case["model"])
    flat = torch.frombuffer(bytearray(pathlib.Path(case["parameters"]).read_bytes()), dtype=torch.float32)
    parameters, position = dict(model.named_parameters()), 0
    with torch.no_grad():
        for name, shape in case["tensors"]:
            count = math.prod(shape)
            parameters[name].copy_(flat[position : position + count].view(shape))
            position += count
    assert position == flat.numel(), f"{position} parameters of {flat.numel()}"
    model.to(case["device"])
    sequences, length = case["batch_size"], case["sequence_length"] + 1
    tokens = torch.frombuffer(bytearray(pathlib.Path(case["tokens"]).read_bytes()), dtype=torch.int64)
    batches = tokens.view(-1, sequences, length).to(case["device"])
    optimizers = make_optimizers(model, case["optimizer"])
    schedules = [make_schedule(optimizer, case["schedule"], len(batches)) for optimizer in optimizers]
    losses, rates = [], []
    for batch in batches:
        rates.append(optimizers[0].param_groups[0]["lr"])
        with torch.autocast(case["device"], dtype=torch.bfloat16, enabled=case["precision"] == "bf16"):
            loss = reference.loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), case["clip"])
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(loss.item())
    print(json.dumps({"losses": losses, "rates": rates}))


main()
