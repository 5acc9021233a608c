"""LARS and LAMB as their papers and other libraries define them, written out in float64 NumPy.

Each function takes a list of weights, one list of gradients a step and one learning rate a step, and returns
the weights after the last step. No code is shared with fastlocal, nor copied from the libraries named.
"""

import numpy as np


def norm(x):
    return float(np.sqrt(np.sum(x * x)))


def ratio_or_one(numerator, denominator):
    return numerator / denominator if numerator > 0 and denominator > 0 else 1.0


def lamb_paper(weights, grads, lrs, beta1, beta2, eps, decay):
    """arXiv:1904.00962v5, algorithm 2, φ the identity."""
    weights = [w.copy() for w in weights]
    m = [np.zeros_like(w) for w in weights]
    v = [np.zeros_like(w) for w in weights]
    for t, (step_grads, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        for i, g in enumerate(step_grads):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            r = (m[i] / (1 - beta1**t)) / (np.sqrt(v[i] / (1 - beta2**t)) + eps)
            update = r + decay * weights[i]
            weights[i] = weights[i] - lr * ratio_or_one(norm(weights[i]), norm(update)) * update
    return weights


def lamb_apex(weights, grads, lrs, beta1, beta2, eps, decay, max_norm, averaging, l2, nvlamb=False):
    """apex's FusedLAMB: global clipping, two decay modes, a ratio only with decay or use_nvlamb."""
    weights = [w.copy() for w in weights]
    m = [np.zeros_like(w) for w in weights]
    v = [np.zeros_like(w) for w in weights]
    beta3 = 1 - beta1 if averaging else 1.0
    for t, (step_grads, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        total = np.sqrt(sum(norm(g) ** 2 for g in step_grads))
        clip = total / max_norm if total > max_norm else 1.0
        for i, g in enumerate(step_grads):
            g = g / clip
            if l2:
                g = g + decay * weights[i]
            m[i] = beta1 * m[i] + beta3 * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            u = (m[i] / (1 - beta1**t)) / (np.sqrt(v[i] / (1 - beta2**t)) + eps)
            if not l2:
                u = u + decay * weights[i]
            r = ratio_or_one(norm(weights[i]), norm(u)) if decay != 0 or nvlamb else 1.0
            weights[i] = weights[i] - lr * r * u
    return weights


def lamb_deepspeed(weights, grads, lrs, beta1, beta2, eps, decay, low, high):
    """DeepSpeed's FusedLamb: moments not debiased, the step is; the ratio is clamped where it exists."""
    weights = [w.copy() for w in weights]
    m = [np.zeros_like(w) for w in weights]
    v = [np.zeros_like(w) for w in weights]
    for t, (step_grads, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        step_size = lr * np.sqrt(1 - beta2**t) / (1 - beta1**t)
        for i, g in enumerate(step_grads):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            u = m[i] / (np.sqrt(v[i]) + eps) + decay * weights[i]
            wn, un = norm(weights[i]), norm(u)
            r = min(max(wn / un, low), high) if wn > 0 and un > 0 else 1.0
            weights[i] = weights[i] - step_size * r * u
    return weights


def lars_paper(weights, grads, lrs, momentum, trust, decay):
    """arXiv:1708.03888, algorithm 1: the learning rate inside the buffer, no ε."""
    weights = [w.copy() for w in weights]
    buffers = [np.zeros_like(w) for w in weights]
    for step_grads, lr in zip(grads, lrs, strict=True):
        for i, g in enumerate(step_grads):
            wn, gn = norm(weights[i]), norm(g)
            local = trust * wn / (gn + decay * wn) if wn > 0 and gn > 0 else 1.0
            buffers[i] = momentum * buffers[i] + lr * local * (g + decay * weights[i])
            weights[i] = weights[i] - buffers[i]
    return weights


def larc(weights, grads, lrs, momentum, trust, decay, eps, clip):
    """apex's LARC around SGD: the gradient is scaled, then SGD without decay steps.

    For tensors whose weights and gradients are not zero: LARC drops the decay of the others, which we keep.
    """
    weights = [w.copy() for w in weights]
    buffers = None
    for step_grads, lr in zip(grads, lrs, strict=True):
        scaled = []
        for w, g in zip(weights, step_grads, strict=True):
            local = trust * norm(w) / (norm(g) + norm(w) * decay + eps)
            if clip:
                local = min(local / lr, 1.0)
            scaled.append((g + decay * w) * local)
        buffers = scaled if buffers is None else [momentum * b + s for b, s in zip(buffers, scaled, strict=True)]
        weights = [w - lr * b for w, b in zip(weights, buffers, strict=True)]
    return weights


def lars_optax(weights, grads, lrs, momentum, trust, decay, eps, nesterov):
    """optax.lars: decay added first, ratio of the sum's norm, learning rate before the momentum trace."""
    weights = [w.copy() for w in weights]
    trace = [np.zeros_like(w) for w in weights]
    for step_grads, lr in zip(grads, lrs, strict=True):
        for i, g in enumerate(step_grads):
            u = g + decay * weights[i]
            wn, un = norm(weights[i]), norm(u)
            u = u * (trust * wn / (un + eps) if wn > 0 and un > 0 else 1.0)
            u = -lr * u
            trace[i] = u + momentum * trace[i]
            weights[i] = weights[i] + (u + momentum * trace[i] if nesterov else trace[i])
    return weights
