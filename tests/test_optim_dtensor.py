"""LARS and LAMB on parameters cut in pieces over processes, as FSDP2 cuts them, along one mesh dimension or two."""

import copy
import math
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn
from waiting import free_port

from fastlocal import LAMB, LARS

# Uneven pieces, one process left without any, a plain parameter beside them, one whole on both.
SHAPES = [(5, 3), (1, 4), (7,), (2, 3, 2), (3, 2), (4, 2)]
PLACEMENTS = [(Shard(0),), (Shard(0),), (Shard(0),), (Shard(1),), None, (Replicate(),)]
# Copies of pieces as hybrid sharding has them, pieces of pieces, pieces along two dimensions, copies of copies.
PLACEMENTS_2D = [
    (Replicate(), Shard(0)),
    (Shard(0), Shard(0)),
    (Shard(0), Replicate()),
    (Shard(0), Shard(1)),
    None,
    (Replicate(), Replicate()),
]
FORMS: list[tuple[Any, dict[str, Any]]] = [
    (LAMB, {}),
    (LAMB, {"max_grad_norm": 0.5, "decay": "l2", "trust_clip": (0.1, 5.0)}),
    (LAMB, {"adapt": "matrices", "bias_correction": "step"}),
    (LARS, {}),
    (LARS, {"norm": "joint", "dampening": 0.5}),
    (LARS, {"momentum": 0.0, "trust_clip": True}),
    (LARS, {"master_weights": True, "dtype": torch.bfloat16}),
    (LAMB, {"master_weights": True, "dtype": torch.bfloat16}),
]


def cut(tensor, placement, mesh):
    return tensor.clone() if placement is None else distribute_tensor(tensor, mesh, placement)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_form(optimizer, options, mesh, placements):
    options = {"lr": 0.1, "weight_decay": 0.1, **options}
    dtype = options.pop("dtype", torch.float32)
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]
    expected = [nn.Parameter(s.clone()) for s in starts]
    params = [nn.Parameter(cut(s, placement, mesh)) for s, placement in zip(starts, placements, strict=True)]
    plain, opt = optimizer(expected, foreach=False, **options), optimizer(params, **options)
    for number in range(4):
        for p, e, placement in zip(params, expected, placements, strict=True):
            grad = torch.randn(e.shape, generator=generator).to(dtype)
            e.grad, p.grad = grad, cut(grad, placement, mesh)
        if number == 2:  # only one process has seen the infinity
            opt.found_inf = torch.tensor(float(dist.get_rank() == 1))
            for p, placement in zip(params, placements, strict=True):
                p.grad = None if placement is None else p.grad  # nothing tells the others about a plain one
            before = [whole(p.detach()).clone() for p in params]
            opt.step()
            del opt.found_inf
            assert all(torch.equal(whole(p.detach()), b) for p, b in zip(params, before, strict=True))
            continue
        if number == 3:  # through a checkpoint
            saved = copy.deepcopy(opt.state_dict())
            opt = optimizer(params, **options)
            opt.load_state_dict(saved)
        versions = [p._version for p in params]
        opt.step()
        plain.step()
        assert all(p._version > v for p, v in zip(params, versions, strict=True))
        compare(params, expected, opt, plain)


def compare(params, expected, opt, plain):
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(whole(p.detach()), e.detach(), rtol=1e-6, atol=1e-6)
        for name, value in opt.state[p].items():
            torch.testing.assert_close(whole(value), plain.state[e][name], rtol=1e-6, atol=1e-6)
            if name != "step" and isinstance(p, DTensor):
                assert value.placements == p.placements


def process(rank, port, mesh_shape):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=math.prod(mesh_shape))
    try:
        names = ("replicate", "shard")[-len(mesh_shape) :]
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
        for optimizer, options in FORMS if mesh.ndim == 1 else FORMS[1::3]:  # clipped, joint norm, masters
            check_form(optimizer, options, mesh, PLACEMENTS if mesh.ndim == 1 else PLACEMENTS_2D)
        for optimizer in (LAMB, LARS):
            check_fsdp(optimizer, mesh)
        if mesh.ndim == 1:
            check_errors(mesh)
    finally:
        dist.destroy_process_group()


def check_errors(mesh):
    param = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    param.grad = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    with pytest.raises(RuntimeError, match="has no kernels for DTensors"):
        LAMB([param], fused=True).step()
    param.grad = distribute_tensor(torch.ones(4, 2), mesh, [Replicate()])
    with pytest.raises(TypeError, match="with the parameter's placements"):
        LAMB([param]).step()
    turned = DeviceMesh("cpu", [1, 0])  # the pieces change places
    param.grad = distribute_tensor(torch.ones(4, 2), turned, [Shard(0)])
    with pytest.raises(TypeError, match="with the parameter's placements"):
        LAMB([param]).step()


def check_fsdp(optimizer, mesh):
    """A model under fully_shard against the same model alone, through distributed checkpointing."""
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    models = [copy.deepcopy(alone) for _ in range(2)]
    for model in models:
        fully_shard(model, mesh=mesh)
    options = {"lr": 0.1, "weight_decay": 0.1}
    expected, first, second = (optimizer(m.parameters(), **options) for m in (alone, *models))
    inputs = torch.randn(4, 3)

    def step(model, opt):
        opt.zero_grad()
        model(inputs).square().sum().backward()
        opt.step()

    step(alone, expected)
    step(models[0], first)
    set_model_state_dict(models[1], get_model_state_dict(models[0]))
    set_optimizer_state_dict(models[1], second, get_optimizer_state_dict(models[0], first))
    step(alone, expected)
    step(models[1], second)
    for p, e in zip(models[1].parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(p.detach()), e.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mesh_shape", [(2,), (2, 2)], ids=["sharded", "hybrid sharded"])
def test_pieces_of_parameters_step_as_the_whole_would(mesh_shape):
    port = free_port()
    spawn(process, (port, mesh_shape), nprocs=math.prod(mesh_shape))
