"""The models of this project as one writes them plainly in PyTorch, and their training step in eager mode.

What `consort-client bench` and the parity test are held against. A model is made from the `[model]` table of a
run's specification; parameters have the names of the checkpoint's tensors.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class LlamaBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        width, self.head = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"]
        self.input_layernorm = nn.RMSNorm(width, eps=c["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(width, eps=c["rms_norm_eps"])
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        keys = c["num_key_value_heads"] * self.head
        for name, rows in [("q_proj", width), ("k_proj", keys), ("v_proj", keys), ("o_proj", width)]:
            setattr(self.self_attn, name, nn.Linear(width, rows, bias=False))
        for name in ["gate_proj", "up_proj"]:
            setattr(self.mlp, name, nn.Linear(width, c["intermediate_size"], bias=False))
        self.mlp.down_proj = nn.Linear(c["intermediate_size"], width, bias=False)

    def forward(self, x, cosines, sines):
        attention, mlp = self.self_attn, self.mlp
        batch, time, width = x.shape
        normed = self.input_layernorm(x)
        heads = lambda y: y.view(batch, time, -1, self.head).transpose(1, 2)
        q, k, v = (heads(f(normed)) for f in [attention.q_proj, attention.k_proj, attention.v_proj])
        q, k = rotate(q, cosines, sines), rotate(k, cosines, sines)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        x = x + attention.o_proj(y.transpose(1, 2).reshape(batch, time, width))
        normed = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


def rotate(x, cosines, sines):
    left, right = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-right, left], dim=-1) * sines


class Llama(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.model.layers = nn.ModuleList(LlamaBlock(c) for _ in range(c["num_hidden_layers"]))
        self.model.norm = nn.RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        if c["tie_word_embeddings"]:
            self.lm_head.weight = self.model.embed_tokens.weight
        head = c["hidden_size"] // c["num_attention_heads"]
        frequencies = c["rope_theta"] ** (-torch.arange(0, head, 2) / head)
        angles = torch.outer(torch.arange(c["max_position_embeddings"]), frequencies).repeat(1, 2)
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, tokens):
        time = tokens.shape[1]
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, self.cosines[:time], self.sines[:time])
        return self.lm_head(self.model.norm(x))


class Conv1D(nn.Module):
    """A linear layer whose weight is stored input-first, as GPT-2's checkpoints have it."""

    def __init__(self, columns, rows):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(columns, rows)), nn.Parameter(torch.empty(rows))

    def forward(self, x):
        return F.linear(x, self.weight.t(), self.bias)


class Gpt2Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        width, self.heads = c["n_embd"], c["n_head"]
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, eps=c["layer_norm_epsilon"]) for _ in range(2))
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = Conv1D(width, 3 * width), Conv1D(width, width)
        self.mlp.c_fc, self.mlp.c_proj = Conv1D(width, 4 * width), Conv1D(4 * width, width)

    def forward(self, x):
        batch, time, width = x.shape
        q, k, v = self.attn.c_attn(self.ln_1(x)).split(width, dim=2)
        q, k, v = (y.view(batch, time, self.heads, -1).transpose(1, 2) for y in [q, k, v])
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn.c_proj(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.transformer = t = nn.Module()
        t.wte, t.wpe = nn.Embedding(c["vocab_size"], c["n_embd"]), nn.Embedding(c["n_positions"], c["n_embd"])
        t.h = nn.ModuleList(Gpt2Block(c) for _ in range(c["n_layer"]))
        t.ln_f = nn.LayerNorm(c["n_embd"], eps=c["layer_norm_epsilon"])

    def forward(self, tokens):
        t = self.transformer
        x = t.wte(tokens) + t.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in t.h:
            x = block(x)
        return F.linear(t.ln_f(x), t.wte.weight)


def make_model(table):
    """The model of a specification's `[model]` table, with weights like those of a new run."""
    model = {"llama": Llama, "gpt2": Gpt2}[table["architecture"]](table)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.zero_()
        for module in model.modules():
            if isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
                module.weight.fill_(1.0)
    return model


def groups(model, weight_decay):
    """Parameters as an optimizer wants them: gains and biases do not decay."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]


def loss_of(model, batch):
    """Mean cross-entropy of each token but the first of `[sequences, length + 1]`."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def step(model, optimizer, batch, clip, bf16=False):
    """One training step; the loss stays on the device."""
    with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=bf16):
        loss = loss_of(model, batch)
    loss.backward()
    if clip > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()
