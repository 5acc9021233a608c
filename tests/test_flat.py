"""Flat rows: values, strides and storage of parameters, and what is refused."""

import pickle

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from fastlocal import LocalSGD, Workers
from fastlocal.flat import ALIGNMENT


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5, 3), nn.Linear(3, 1, bias=False))


def test_parameters_are_aligned_views_of_one_row_a_worker():
    team = Workers(make_model(), 2)
    (block,) = team.rows.blocks
    assert block.rows.shape == (2, sum(-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in team[0].parameters()))
    with torch.no_grad():
        block.rows[1] = 7.0
    assert all((p == 7).all() for p in team[1].parameters())
    assert not any((p == 7).any() for p in team[0].parameters())
    for parameter in team.parameters():
        assert parameter.data_ptr() % 64 == block.rows.data_ptr() % 64


def test_each_parameter_has_a_storage_of_its_own_over_the_common_memory():
    # By the storage those who save models tell whether two tensors are one.
    team = Workers(make_model(), 2)
    storages = [parameter.untyped_storage() for parameter in team.parameters()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert [storage.nbytes() for storage in storages] == [4 * p.numel() for p in team.parameters()]
    kept = team[1][0].weight
    before = kept.detach().clone()
    del team, storages  # the memory lives as long as one of them
    others = [torch.full((2, 4096), 3.0) for _ in range(64)]
    assert len(others) == 64
    assert torch.equal(kept, before)


def test_workers_that_a_spawned_process_has_been_given_are_named_at_the_next_sync():
    team = Workers(nn.Linear(2, 1), 2)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.1), team, 1)
    team[1].share_memory()
    for worker in team:
        worker(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="'weight' of worker 1 no longer lies in its row .*spawned process"):
        optimizer.step()


@pytest.mark.parametrize(
    "make_strided", [lambda t: t.to(memory_format=torch.channels_last), lambda t: t.transpose(0, 1)]
)
def test_dense_strides_are_kept(make_strided):
    model = nn.Conv2d(4, 6, 3)
    with torch.no_grad():
        model.weight.data = make_strided(model.weight.data)
    before, stride = model.weight.detach().clone(), model.weight.stride()
    team = Workers(model, 2)
    for worker in team:
        assert worker.weight.stride() == stride
        assert torch.equal(worker.weight, before)


def test_each_dtype_has_a_block_of_its_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2))
    team = Workers(model, 2)
    assert {block.rows.dtype: len(block.slots) for block in team.rows.blocks} == {torch.float32: 4, torch.bfloat16: 2}
    assert team.rows.num_bytes == 12 * 4 + 6 * 2


def test_tied_weights_stay_tied_and_are_stored_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    team = Workers(model, 2)
    assert team[1][0].weight is team[1][1].weight
    assert team.rows.num_bytes == 36
    assert len(list(team.parameters())) == 2


def test_frozen_parameters_are_not_moved_and_unfreezing_one_later_is_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    team = Workers(model, 2)
    assert [slot.name for slot in team.rows.blocks[0].slots] == ["1.weight", "1.bias"]
    team.rows.check()
    team[1][0].weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"'0.weight' of worker 1 became trainable"):
        team.rows.check()


def test_a_parameter_that_left_its_row_is_found_at_the_next_sync():
    team = Workers(make_model(), 2)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.1), team, 1)
    team[1][0].weight.data = team[1][0].weight.data.clone()
    with pytest.raises(RuntimeError, match=r"'0.weight' of worker 1 no longer lies in its row"):
        optimizer.step()


def test_a_parameter_that_was_transposed_where_it_lies_is_found_at_the_next_sync():
    team = Workers(nn.Linear(3, 3, bias=False), 2)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.1), team, 1)
    team[1].weight.data = team[1].weight.data.t()  # its rows would be averaged with the other's columns
    for worker in team:
        worker(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="'weight' of worker 1 no longer lies in its row"):
        optimizer.step()


def test_parameters_without_elements_are_accepted():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.empty = nn.Parameter(torch.empty(0, 3))
            self.one = nn.Parameter(torch.tensor(2.0))

    team = Workers(Odd(), 2)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.5), team, 1)
    team[0].one.grad, team[1].one.grad = torch.tensor(1.0), torch.tensor(3.0)
    optimizer.step()
    assert [worker.one.item() for worker in team] == [1.0, 1.0]
    assert team[1].empty.shape == (0, 3)


def test_parameters_that_share_memory_are_refused_and_pieces_of_one_tensor_are_not():
    embedding, output = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    output.weight.data = embedding.weight.data
    with pytest.raises(ValueError, match=r"parameter '0\.weight' and parameter '1\.weight' share memory"):
        Workers(nn.Sequential(embedding, output), 1)
    output.weight = embedding.weight  # tied as torch ties
    Workers(nn.Sequential(embedding, output), 2)
    whole = torch.arange(40.0).view(10, 4)

    def team_of(*pieces):
        return Workers(nn.ParameterList([nn.Parameter(piece) for piece in pieces]), 2)

    for pieces in (
        (whole[:, :2], whole[:, 2:]),
        (whole[:, 1:3], whole[3, 3:]),
        (whole[:5], whole[5:]),
        (whole[::2], whole[1::2]),
    ):
        values = [piece.clone() for piece in pieces]
        for value, parameter in zip(values, team_of(*pieces)[1], strict=True):
            assert torch.equal(value, parameter)
    for pieces in ((whole[:, 0:1], whole[:5, 1:3], whole[:5, 2:4]), (whole[:6], whole[5:]), (whole, whole.t())):
        with pytest.raises(ValueError, match="share memory"):
            team_of(*pieces)
    Workers(nn.Linear(2, 2, device="meta"), 1)


@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_what_shares_memory_with_a_parameter_that_moves_into_a_row_is_refused_by_name(kind):
    model = nn.Linear(4, 4)
    shared = model.weight.detach()[1:3]
    if kind == "buffer":
        model.register_buffer("tied", shared)
    else:
        model.register_parameter("tied", nn.Parameter(shared, requires_grad=False))
    for number in (1, 2):
        with pytest.raises(ValueError, match=f"parameter 'weight' and {kind} 'tied' share memory"):
            Workers(model, number)


def test_a_buffer_that_begins_before_the_parameter_it_shares_memory_with_is_found():
    model, whole = nn.Linear(2, 2), torch.zeros(4, 2)
    model.weight.data = whole[1:3]
    model.register_buffer("whole", whole)
    with pytest.raises(ValueError, match="parameter 'weight' and buffer 'whole' share memory"):
        Workers(model, 1)


def test_memory_that_frozen_parameters_and_buffers_share_with_each_other_is_theirs():
    model, whole = nn.Linear(4, 4), torch.arange(16.0)
    model.weight.data = whole[8:].view(2, 4)
    model.register_parameter("frozen", nn.Parameter(whole[:6], requires_grad=False))
    model.register_buffer("window", whole[2:8])
    model.register_buffer("itself", model.bias)
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    model.register_buffer("later", torch.empty(2, device="meta"))
    assert Workers(model, 1)[0].itself is model.bias


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.parametrize("kind", ["quantized", "conjugate", "negative"])
def test_frozen_parameters_whose_bytes_are_not_their_numbers_are_compared(kind):
    model = nn.Linear(2, 1)
    numbers = torch.tensor([1 + 2j, 3 - 1j])
    if kind == "quantized":
        frozen = torch.quantize_per_tensor(numbers.real, 0.5, 0, torch.qint8)
    else:
        frozen = numbers.conj() if kind == "conjugate" else numbers.conj().imag
    model.register_parameter("frozen", nn.Parameter(frozen, requires_grad=False))
    team = Workers(model, 2)
    model.load_state_dict({**model.state_dict(), "weight": torch.full((1, 2), 7.0)})
    LocalSGD(torch.optim.SGD(team.parameters(), lr=0.1), team, 1)
    assert team[1].weight.tolist() == [[7.0, 7.0]]


def test_rows_left_with_a_buffer_over_them_can_be_opened_again():
    team = Workers(nn.Linear(2, 1), 2)
    for worker in team:
        worker.register_buffer("seen", worker.weight.detach())
    assert len(pickle.loads(pickle.dumps(team))) == 2


def test_a_trained_parameter_of_several_tensors_is_refused_and_a_frozen_one_is_not():
    model = nn.Linear(2, 2)
    pair = TwoTensor(torch.zeros(2, 2), torch.ones(2, 2))
    model.register_parameter("pair", nn.Parameter(pair, requires_grad=False))
    team = Workers(model, 2)
    with torch.no_grad():
        model.pair.copy_(TwoTensor(torch.zeros(2, 2), torch.full((2, 2), 3.0)))
    LocalSGD(torch.optim.SGD(team.parameters(), lr=0.1), team, 1)
    assert [worker.pair.b[0, 0].item() for worker in team] == [3.0, 3.0]
    assert team.mean().pair.b[0, 0] == 3
    model.pair.requires_grad_(True)
    with pytest.raises(ValueError, match="parameter 'pair' is a TwoTensor, several tensors in one"):
        Workers(model, 1)
