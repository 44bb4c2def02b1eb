"""Prints the demo's closing table. Called by deploy/demo; reads what it left in the demo's folder.

usage: demo.py FOLDER STEPS SECONDS MEMORY SITE...
"""

import json
import pathlib
import sys

folder, steps, seconds = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
memory, sites = sys.argv[4], sys.argv[5:]


def perplexity(model, site):
    return json.loads((folder / f"evaluation-{model}-{site}.json").read_text())["perplexity"]


def mean(values):
    return sum(values) / len(values)


def row(name, values):
    print(f"{name:<22}" + "".join(f"{value:>12.2f}" for value in [*values, mean(values)]))


models = {f"alone at {site}": f"alone-{site}" for site in sites}
table = {
    name: [perplexity(model, site) for site in sites]
    for name, model in {"untrained": "untrained", **models, "federated": "federated"}.items()
}
own = [perplexity(f"alone-{site}", site) for site in sites]

print("\nPerplexity (per byte) on each site's held-out text; rows are models, columns are texts.\n")
print(f"{'':<22}" + "".join(f"{name:>12}" for name in [*sites, "mean"]))
row("(a) untrained", table["untrained"])
for site in sites:
    row(f"(b) alone: {site}", table[f"alone at {site}"])
row("(b) each at its own", own)
row("(c) federated", table["federated"])

federated = mean(table["federated"])
best = min(mean(table[name]) for name in models)
print()
for name, other in [("the best model that one site trained alone", best), ("each site's own model on its own text", mean(own))]:
    if federated < other:
        print(f"The federated model beats {name}: {federated:.2f} against {other:.2f}, mean over all sites' text.")
    else:
        print(f"The federated model does NOT beat {name}: {federated:.2f} against {other:.2f}, mean over all sites' text.")

run = json.loads((folder / "run.json").read_text())
model_bytes = 4 * run["parameters"]
per_step = steps * len(sites) * model_bytes
print(f"""
model               {run["parameters"] / 1e6:.2f}M parameters, {run["architecture"]}
tokens trained      {run["tokens"] / 1e6:.2f}M over {len(sites)} sites, {run["rounds"]} rounds of {steps // run["rounds"]} local steps
bytes from sites    {run["bytes_up"] / 1e6:.1f} MB; a gradient per step would be {per_step / 1e6:.0f} MB, {per_step / run["bytes_up"]:.0f} times as much
bytes to sites      {run["bytes_down"] / 1e6:.1f} MB
wall-clock          {seconds / 60:.1f} minutes for the federated part, a SIGKILL of two processes included
aggregator memory   {memory} at its peak""")
