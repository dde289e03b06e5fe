"""The recurrent supernet of DARTS and its search step, transcribed from the published code.

The reference that `nas/nets/torch/rnn.py` and `nas/bilevel/search_text.py` of the examples are tested and timed against.
Source: Liu, Simonyan, Yang, "DARTS", 2019, the recurrent part of the published code (model.py, model_search.py, architect.py,
train_search.py), with SparseNAS's linear weights where `linear`, in today's PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NODES, OPERATIONS = 8, ("tanh", "relu", "sigmoid", "identity")


def activation(name: str):
    return {"tanh": torch.tanh, "relu": F.relu, "sigmoid": torch.sigmoid, "identity": lambda x: x}[name]


class NaiveCell(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.w0 = nn.Parameter(torch.empty(2 * hidden, 2 * hidden).uniform_(-0.04, 0.04))
        self.ws = nn.ParameterList(torch.empty(hidden, 2 * hidden).uniform_(-0.04, 0.04) for _ in range(NODES))
        self.bn = nn.BatchNorm1d(hidden, affine=False)

    def cell(self, x: Tensor, h_prev: Tensor, x_mask: Tensor | None, h_mask: Tensor | None, probs: Tensor) -> Tensor:
        if self.training:
            xh = torch.cat([x * x_mask, h_prev * h_mask], dim=-1)
        else:
            xh = torch.cat([x, h_prev], dim=-1)
        c0, h0 = torch.split(xh.mm(self.w0), self.hidden, dim=-1)
        c0, h0 = c0.sigmoid(), h0.tanh()
        s0 = h_prev + c0 * (h0 - h_prev)
        s0 = self.bn(s0)
        states, offset = s0.unsqueeze(0), 0
        for i in range(NODES):
            masked = states * h_mask.unsqueeze(0) if self.training else states
            ch = masked.view(-1, self.hidden).mm(self.ws[i]).view(i + 1, -1, 2 * self.hidden)
            c, h = torch.split(ch, self.hidden, dim=-1)
            c = c.sigmoid()
            s = torch.zeros_like(s0)
            for k, name in enumerate(OPERATIONS):
                unweighted = states + c * (activation(name)(h) - states)
                s = s + torch.sum(probs[offset : offset + i + 1, k].unsqueeze(-1).unsqueeze(-1) * unweighted, dim=0)
            s = self.bn(s)
            states = torch.cat([states, s.unsqueeze(0)], 0)
            offset += i + 1
        return torch.mean(states[-NODES:], dim=0)

    def forward(self, inputs: Tensor, hidden: Tensor, x_mask: Tensor | None, h_mask: Tensor | None, probs: Tensor):
        hiddens = []
        for t in range(len(inputs)):
            hidden = self.cell(inputs[t], hidden, x_mask, h_mask, probs)
            hiddens.append(hidden)
        hiddens = torch.stack(hiddens)
        return hiddens, hiddens[-1]


class NaiveLanguageModel(nn.Module):
    """masks: dropout masks of a batch (embedding, x, h, output), which comparisons share; None draws them."""

    def __init__(self, vocabulary: int, hidden: int, softmax: bool = False):
        super().__init__()
        self.encoder = nn.Embedding(vocabulary, hidden)
        self.cell = NaiveCell(hidden)
        self.decoder = nn.Linear(hidden, vocabulary)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.04, 0.04)
        nn.init.zeros_(self.decoder.bias)
        start = 1e-3 * torch.randn(36, 4) if softmax else 0.25 + 1e-3 * torch.randn(36, 4)
        self.weights, self.softmax = nn.Parameter(start), softmax

    def parts(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p is not self.weights]

    def draw(self, batch: int):
        keep = lambda p: self.weights.new_empty(batch, self.cell.hidden).bernoulli_(1 - p).div_(1 - p)
        return keep(0.2), keep(0.75), keep(0.25), keep(0.75)

    def forward(self, words: Tensor, hidden: Tensor, masks: tuple | None = None):
        masks = masks or self.draw(words.shape[1])
        probs = F.softmax(self.weights, dim=-1) if self.softmax else self.weights
        emb = self.encoder(words)
        emb = emb * masks[0]
        raw, hidden = self.cell(emb, hidden, masks[1], masks[2], probs)
        output = raw * masks[3]
        logit = self.decoder(output.view(-1, output.size(2)))
        return F.log_softmax(logit, dim=-1).view(*words.shape, -1), hidden, raw


class NaiveTextSearch:
    """The loop: Adam for the architecture on a validation batch (first order, or unrolled), clipped SGD for the weights."""

    def __init__(self, model: NaiveLanguageModel, batch: int, second_order: bool = False):
        self.model, self.second_order = model, second_order
        self.sgd = torch.optim.SGD(model.parts(), lr=20.0, weight_decay=5e-7)
        self.adam = torch.optim.Adam([model.weights], lr=3e-3, weight_decay=1e-3)
        self.hidden = self.hidden_valid = model.weights.new_zeros(batch, model.cell.hidden)

    def loss(self, words: Tensor, targets: Tensor, hidden: Tensor, masks: tuple | None = None):
        log_prob, hidden, raw = self.model(words, hidden, masks)
        return F.nll_loss(log_prob.view(-1, log_prob.size(2)), targets.reshape(-1)), hidden.detach(), raw

    def architecture_gradient(self, train: tuple, valid: tuple, masks: tuple = (None, None)) -> Tensor:
        model = self.model
        if not self.second_order:
            model.zero_grad()
            loss, self.hidden_valid, _ = self.loss(*valid, self.hidden_valid, masks[1])
            loss.backward()
            return model.weights.grad
        eta, start = self.sgd.param_groups[0]["lr"], [p.detach().clone() for p in model.parts()]
        grads = torch.autograd.grad(self.loss(*train, self.hidden, masks[0])[0], model.parts())
        clip = min(0.25 / (torch.cat([g.flatten() for g in grads]).norm().item() + 1e-6), 1.0)
        with torch.no_grad():
            for p, g in zip(model.parts(), grads):
                p.sub_(eta * (clip * g + 5e-7 * p))
        loss, self.hidden_valid, _ = self.loss(*valid, self.hidden_valid, masks[1])
        outer, *v = torch.autograd.grad(loss, [model.weights, *model.parts()])
        scale = min(0.25 / (torch.cat([g.flatten() for g in v]).norm().item() + 1e-6), 1.0)
        v = [scale * g for g in v]
        R = 1e-2 / torch.cat([g.flatten() for g in v]).norm()
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, s, g in zip(model.parts(), start, v):
                    p.copy_(s + sign * R * g)
            sides.append(torch.autograd.grad(self.loss(*train, self.hidden, masks[0])[0], model.weights)[0])
        with torch.no_grad():
            for p, s in zip(model.parts(), start):
                p.copy_(s)
        return outer - eta * clip * (sides[0] - sides[1]) / (2 * R)

    def step(self, train: tuple, valid: tuple) -> None:
        model, group = self.model, self.sgd.param_groups[0]
        usual = group["lr"]
        group["lr"] = usual * len(train[0]) / 35
        model.weights.grad = self.architecture_gradient(train, valid)
        self.adam.step()
        self.sgd.zero_grad()
        loss, self.hidden, raw = self.loss(*train, self.hidden)
        loss = loss + 1e-3 * (raw[1:] - raw[:-1]).pow(2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parts(), 0.25)
        self.sgd.step()
        group["lr"] = usual
