"""Weight perturbations, as their papers and released codes have them: one whole step each.

``loss`` maps a model to the scalar loss of the batch. The ascent runs on a copy of the model, so
that no ascent pass touches BatchNorm's running statistics; ``statistics_at_centre`` says that the
pass at the centre is one that updates them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module], Tensor]
Optimizer = torch.optim.Optimizer


def _grads(model: nn.Module, loss: Loss) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _global(tensors: dict[str, Tensor]) -> Tensor:
    return torch.sqrt(sum(t.pow(2).sum() for t in tensors.values()))  # type: ignore[arg-type]


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers()}


def _set_buffers(model: nn.Module, values: dict[str, Tensor]) -> None:
    for n, b in model.named_buffers():
        b.data.copy_(values[n])


def step_at(
    model: nn.Module, optimizer: Optimizer, loss: Loss, v: dict[str, Tensor], centre_bn: str
) -> None:
    """Take the gradient at w + v, go back to w, step. ``centre_bn``: what the buffers end as."""
    saved = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = _buffers(model)
    if centre_bn in ("centre", "both"):
        loss(model)
    at_centre = _buffers(model)
    for n, p in model.named_parameters():
        if n in v:
            p.data.add_(v[n])
    _grads(model, loss)
    for n, p in model.named_parameters():
        p.data.copy_(saved[n])
    if centre_bn == "centre":
        _set_buffers(model, at_centre)
    elif centre_bn == "none":
        _set_buffers(model, before)
    optimizer.step()


def awp_form1(model: nn.Module, loss: Loss, gamma: float, steps: int) -> dict[str, Tensor]:
    """K times w_l += gamma/K ||w0_l|| / (||g_l|| + 1e-20) g_l on tensors of more than 1 dim."""
    proxy = copy.deepcopy(model)
    norms = {n: p.detach().norm() for n, p in proxy.named_parameters()}
    total: dict[str, Tensor] = {}
    for _ in range(steps):
        g = _grads(proxy, loss)
        for n, p in proxy.named_parameters():
            if p.dim() > 1:
                d = gamma / steps * norms[n] / (g[n].norm() + 1e-20) * g[n]
                p.data.add_(d)
                total[n] = total.get(n, 0) + d
    return total


def awp_released_step(
    model: nn.Module, optimizer: Optimizer, loss: Loss, gamma: float, lr: float = 0.01
) -> dict[str, Tensor]:
    """The used code: a proxy takes one SGD step on -loss; the optimizer steps AT w + v."""
    proxy = copy.deepcopy(model)
    proxy.train()
    helper = torch.optim.SGD(proxy.parameters(), lr=lr)
    helper.zero_grad()
    (-loss(proxy)).backward()
    helper.step()
    old, new = model.state_dict(), proxy.state_dict()
    v = {}
    for n in old:
        if old[n].dim() > 1 and "weight" in n:
            diff = new[n] - old[n]
            v[n] = gamma * old[n].norm() / (diff.norm() + 1e-20) * diff
    parameters = dict(model.named_parameters())
    for n, d in v.items():
        parameters[n].data.add_(d)
    _grads(model, loss)
    optimizer.step()
    for n, d in v.items():
        parameters[n].data.sub_(d)
    return v


def awp_global(model: nn.Module, loss: Loss, gamma: float) -> dict[str, Tensor]:
    """MAIR: v = gamma ||w|| / (||g|| + 1e-16) g, both over all parameters."""
    g = _grads(copy.deepcopy(model), loss)
    w = {n: p.detach() for n, p in model.named_parameters()}
    return {n: gamma * _global(w) / (_global(g) + 1e-16) * g[n] for n in g}


def amp(
    model: nn.Module, loss: Loss, epsilon: float, zeta: float, steps: int, whole: bool
) -> dict[str, Tensor]:
    """delta += zeta g; delta *= min(1, epsilon / (||delta|| + 1e-12)), per tensor or whole."""
    proxy = copy.deepcopy(model)
    centre = {n: p.detach().clone() for n, p in proxy.named_parameters()}
    delta = {n: torch.zeros_like(p) for n, p in centre.items()}
    for _ in range(steps):
        g = _grads(proxy, loss)
        delta = {n: delta[n] + zeta * g[n] for n in delta}
        length = _global(delta)
        for n in delta:
            size = float(length if whole else delta[n].norm())
            delta[n] = delta[n] * min(1.0, epsilon / (size + 1e-12))
        for n, p in proxy.named_parameters():
            p.data.copy_(centre[n] + delta[n])
    return delta


def sam(
    model: nn.Module, loss: Loss, rho: float, p: float = 2, steps: int = 1
) -> dict[str, Tensor]:
    """K times v += rho/K sign(g) |g|^(q-1) / (sum |g|^q)^(1/p); davda54's 1e-12 left out."""
    proxy = copy.deepcopy(model)
    v = {n: torch.zeros_like(w) for n, w in proxy.named_parameters()}
    for _ in range(steps):
        g = _grads(proxy, loss)
        if p == float("inf"):
            d = {n: rho / steps * torch.sign(g[n]) for n in g}
        else:
            q = p / (p - 1)
            total = sum((g[n].abs() ** q).sum() for n in g) ** (1 / p)
            d = {n: rho / steps * torch.sign(g[n]) * g[n].abs() ** (q - 1) / total for n in g}
        for n, w in proxy.named_parameters():
            w.data.add_(d[n])
            v[n] = v[n] + d[n]
    return v


def asam(model: nn.Module, loss: Loss, rho: float, eta: float) -> dict[str, Tensor]:
    """Samsung's: T = |w| + eta for names with "weight", else 1; v = rho T^2 g / ||T g||."""
    g = _grads(copy.deepcopy(model), loss)
    scale = {
        n: p.detach().abs() + eta if "weight" in n else torch.ones_like(p)
        for n, p in model.named_parameters()
    }
    length = _global({n: scale[n] * g[n] for n in g}) + 1e-16
    return {n: rho * scale[n] ** 2 * g[n] / length for n in g}


def gsam_step(model: nn.Module, optimizer: Optimizer, loss: Loss, rho: float, alpha: float) -> None:
    """g_p - alpha (g - cos ||g|| g_p / ||g_p||), g at w, g_p at w + rho g / ||g||."""
    v = sam(model, loss, rho)
    proxy = copy.deepcopy(model)
    g = _grads(proxy, loss)
    for n, p in proxy.named_parameters():
        p.data.add_(v[n])
    g_p = _grads(proxy, loss)
    size, size_p = _global(g), _global(g_p)
    cosine = sum((g[n] * g_p[n]).sum() for n in g) / (size * size_p)
    loss(model)  # BatchNorm's statistics are those of the pass at the centre
    for n, p in model.named_parameters():
        p.grad = g_p[n] - alpha * (g[n] - cosine * size * g_p[n] / size_p)
    optimizer.step()


def msam_step(
    model: nn.Module, optimizer: Optimizer, losses: list[tuple[Loss, float]], rho: float
) -> None:
    """SAM's gradient for each chunk, averaged with the chunks' shares of the batch."""
    total: dict[str, Tensor] = {}
    for loss, share in losses:
        v = sam(model, loss, rho)
        proxy = copy.deepcopy(model)
        for n, p in proxy.named_parameters():
            p.data.add_(v[n])
        for n, g in _grads(proxy, loss).items():
            total[n] = total.get(n, 0) + share * g
        loss(model)
    for n, p in model.named_parameters():
        p.grad = total[n]
    optimizer.step()


def random_relative(
    model: nn.Module, draws: dict[str, Tensor], gamma: float, group: str
) -> dict[str, Tensor]:
    """v = gamma ||w|| r / ||r|| for filters, tensors or all, on tensors of more than 1 dim."""
    w = {n: p.detach() for n, p in model.named_parameters() if p.dim() > 1}
    if group == "global":
        return {n: gamma * _global(w) * draws[n] / _global(draws) for n in w}
    if group == "tensor":
        return {n: gamma * w[n].norm() * draws[n] / draws[n].norm() for n in w}
    return {
        n: torch.stack(
            [gamma * a.norm() * r / r.norm() for a, r in zip(w[n], draws[n], strict=True)]
        )
        for n in w
    }
