"""overlap_steps: a sync whose outcome comes some steps later."""

import copy
import io

import pytest
import torch
from local_runs import make, measured, parameters_of, poison, run
from torch import nn

from fastlocal import ConsensusDistance, DiLoCo, LocalSGD, SlowMo, ValidationLoss, Workers

KINDS = [LocalSGD, SlowMo, DiLoCo]
WORKERS = 3


def drawn(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(kind, interval, overlap, steps, weights, rates):
    """Plain SGD towards a point of each worker's own, in float64; the parameters and the drift after each step."""
    points = drawn(1, WORKERS, 5)
    x = drawn(2, 5).repeat(WORKERS, 1)
    anchor, momentum, last_rate = x[0].clone(), torch.zeros(5, dtype=torch.float64), None
    under_way, in_round, of_round, seen, drift = None, 0, [], [], 0.0
    for step in range(steps):
        x = x - rates[step] * (x - points)
        of_round.append(rates[step])
        in_round += 1
        if under_way is not None and in_round >= min(overlap, interval):
            sent, rate = under_way
            mean = (sent * weights[:, None]).sum(0) / weights.sum()
            drift = (sent - mean).norm(dim=1).mean().item()
            delta = anchor - mean
            if kind is LocalSGD:
                y = mean
            elif kind is SlowMo:
                momentum = (0.5 * rate / last_rate if last_rate else 0.0) * momentum + delta
                y, last_rate = anchor - 0.8 * momentum, rate
            else:
                momentum = 0.9 * momentum + delta
                y = anchor - 0.7 * (delta + 0.9 * momentum)
            x, anchor, under_way = y + (x - sent), y, None
        if in_round == interval:
            under_way, in_round, of_round = (x.clone(), sum(of_round) / len(of_round)), 0, []
        seen.append((x.clone(), drift))
    return seen


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 4.0, 2.0]])
@pytest.mark.parametrize(("interval", "overlap"), [(4, 1), (4, 2), (4, 3), (3, 3), (2, 5), (1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_late_sync_is_the_outer_step_from_what_was_sent_and_then_what_was_done_since(
    kind, interval, overlap, weights
):
    rates = [0.1 + 0.02 * step for step in range(17)]
    expected = by_hand(kind, interval, overlap, 17, torch.tensor(weights, dtype=torch.float64), rates)
    model = nn.Module()
    model.x = nn.Parameter(drawn(2, 5))
    team = Workers(model, WORKERS)
    options = {"slow_lr": 0.8} if kind is SlowMo else {}
    inner = torch.optim.SGD(team.parameters(), lr=1.0)
    optimizer = kind(inner, team, measured(interval), weights=weights, overlap_steps=overlap, **options)
    for step, (x, drift) in enumerate(expected):
        inner.param_groups[0]["lr"] = rates[step]
        for worker, point in zip(team, drawn(1, WORKERS, 5), strict=True):
            worker.x.grad = worker.x.detach() - point
        optimizer.step()
        torch.testing.assert_close(torch.stack([w.x.detach() for w in team]), x, rtol=0, atol=1e-12)
        assert optimizer.stats.drift == pytest.approx(drift, rel=1e-6)
        assert optimizer.stats.rounds == (step + 1) // interval


@pytest.mark.parametrize("options", [{}, {"wire_dtype": torch.bfloat16}, {"inner_state": "average"}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_late_sync_that_is_ended_at_once_is_one_that_was_not_late(kind, options):
    results = []
    for overlap in (0, 2):
        optimizer, team = make(kind, interval=3, overlap_steps=overlap, **options)
        for first in range(0, 12, 3):
            run(optimizer, team, 3, first=first)
            optimizer.sync()
        optimizer.sync()
        results.append((parameters_of(team), vars(optimizer.stats) | {"seconds_in_sync": 0, "drift": 0}))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_sync_in_a_round_ends_the_late_one_and_then_this_one():
    optimizer, team = make(SlowMo, interval=4, overlap_steps=3)
    run(optimizer, team, 5)
    assert optimizer.stats.rounds == 1
    assert not torch.equal(parameters_of(team[0]), parameters_of(team[1]))
    optimizer.sync()
    assert optimizer.stats.rounds == 2
    assert all(torch.equal(parameters_of(team[0]), parameters_of(model)) for model in team)


def test_a_late_sync_sends_the_bytes_that_any_sync_sends_and_keeps_every_parameter_where_it_is():
    late, team = make(LocalSGD, interval=4, overlap_steps=2)
    plain, others = make(LocalSGD, interval=4)
    places = [p.data_ptr() for p in team.parameters()]
    for optimizer, workers in ((late, team), (plain, others)):
        run(optimizer, workers, 9)
    assert late.stats.bytes_on_wire == plain.stats.bytes_on_wire
    assert late.stats.bytes_synchronous == plain.stats.bytes_synchronous
    assert 0 < late.stats.seconds_in_sync < 60
    assert [p.data_ptr() for p in team.parameters()] == places


def test_parameters_that_a_late_sync_changes_are_new_to_autograd():
    optimizer, team = make(LocalSGD, interval=2, overlap_steps=1)
    run(optimizer, team, 2)
    weight = next(team[0].parameters())
    before = weight._version
    optimizer.sync()
    assert weight._version > before


@pytest.mark.parametrize("wire_dtype", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_saved_or_copied_while_a_sync_is_under_way_ends_the_same(kind, wire_dtype):
    def build():
        return make(kind, interval=measured(4), overlap_steps=3, wire_dtype=wire_dtype)

    whole, team = build()
    run(whole, team, 14)
    for stop in range(3, 10):
        first, halves = build()
        run(first, halves, stop)
        file = io.BytesIO()
        torch.save((halves.state_dict(), first.state_dict()), file)
        copied, twins = copy.deepcopy((first, halves))
        assert copied.overlap_steps == 3
        run(first, halves, 14 - stop, first=stop)
        run(copied, twins, 14 - stop, first=stop)
        second, again = build()
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again.load_state_dict(saved[0])
        second.load_state_dict(saved[1])
        run(second, again, 14 - stop, first=stop)
        for optimizer, workers in ((first, halves), (copied, twins), (second, again)):
            assert torch.equal(parameters_of(workers), parameters_of(team))
            assert optimizer.stats.drift == whole.stats.drift
            assert optimizer.stats.rounds == whole.stats.rounds


def test_a_state_saved_while_a_sync_is_under_way_is_checked_before_anything_is_taken():
    first, team = make(SlowMo, interval=4, overlap_steps=3)
    run(first, team, 5)
    state = first.state_dict()
    for spoil, message in (
        (lambda own: own["sending"].pop("weights"), "lacks 'weights'"),
        (lambda own: own["sending"]["blocks"][0].pop("rows"), "lacks 'rows'"),
        (lambda own: own["sending"]["blocks"].pop(), "must be a list of 1"),
        (lambda own: own["sending"].update(weights=torch.ones(2)), r"\['weights'\] must be a tensor of shape \(3,\)"),
        (lambda own: own["sending"]["blocks"][0].update(rates=torch.ones(2)), "must be a tensor of shape"),
        (lambda own: own["sending"].update(reads_drift=1), "must be True or False"),
        (lambda own: own.update(sending=3), "must be a dict"),
    ):
        damaged = copy.deepcopy(state)
        spoil(damaged["fastlocal"])
        before = copy.deepcopy(first.state_dict()["fastlocal"]["sending"])
        with pytest.raises(ValueError, match=message):
            first.load_state_dict(damaged)
        torch.testing.assert_close(first.state_dict()["fastlocal"]["sending"], before, rtol=0, atol=0)
    fewer, _ = make(SlowMo, workers=2, interval=4, overlap_steps=3)
    with pytest.raises(ValueError, match="number of workers"):
        fewer.load_state_dict(state)


def test_a_state_from_before_there_were_late_syncs_has_none_under_way():
    first, team = make(SlowMo, interval=4)
    run(first, team, 5)
    state = first.state_dict()
    assert state["fastlocal"].pop("sending") is None
    late, _ = make(SlowMo, interval=4, overlap_steps=3)
    late.load_state_dict(state)
    assert late.steps_in_round == 1


def test_a_loaded_state_replaces_the_sync_that_is_under_way():
    first, team = make(SlowMo, interval=4, overlap_steps=3)
    run(first, team, 3)
    saved = copy.deepcopy((team.state_dict(), first.state_dict()))
    run(first, team, 1, first=3)
    whole = copy.deepcopy((first, team))
    team.load_state_dict(saved[0])
    first.load_state_dict(saved[1])
    for optimizer, workers, start in ((first, team, 3), (*whole, 4)):
        run(optimizer, workers, 12 - start, first=start)
    assert torch.equal(parameters_of(team), parameters_of(whole[1]))


def test_a_sync_that_leaves_a_worker_out_ends_at_once():
    late, team = make(LocalSGD, interval=3, overlap_steps=2)
    plain, others = make(LocalSGD, interval=3)
    for optimizer, workers in ((late, team), (plain, others)):
        run(optimizer, workers, 2)
        poison(workers[1])
        run(optimizer, workers, 1, first=2)
        assert optimizer.stats.excluded == 1
        assert parameters_of(workers).isfinite().all()
    assert torch.equal(parameters_of(team), parameters_of(others))


def test_a_state_saved_right_after_a_round_was_closed_has_anchors_that_loaded_weights_do_not_move():
    first, team = make(SlowMo, interval=4, overlap_steps=3)
    run(first, team, 4)
    state = copy.deepcopy(first.state_dict())
    assert state["fastlocal"]["rows"] == []
    second, again = make(SlowMo, interval=4, overlap_steps=3, seed=1)
    again.load_state_dict(team.state_dict())
    second.load_state_dict(state)
    with torch.no_grad():
        next(again[0].parameters()).add_(1.0)  # counts as progress of the round
    anchor = second._outers[0].anchor.clone()
    run(second, again, 1, first=4)
    assert torch.equal(second._outers[0].anchor, anchor)


def test_two_optimizers_may_load_one_state_with_a_sync_under_way():
    first, team = make(SlowMo, interval=4, overlap_steps=3)
    run(first, team, 5)
    saved = copy.deepcopy((team.state_dict(), first.state_dict()))
    results = []
    for _ in range(2):
        second, again = make(SlowMo, interval=4, overlap_steps=3)
        again.load_state_dict(saved[0])
        second.load_state_dict(saved[1])
        run(second, again, 5, first=5)
        results.append(parameters_of(again))
    assert torch.equal(*results)


def test_a_parameter_that_has_left_its_row_while_a_sync_is_under_way_is_an_error_that_may_be_mended():
    optimizer, team = make(SlowMo, interval=4, overlap_steps=3)
    run(optimizer, team, 5)
    weight = next(team[1].parameters())
    row = weight.data
    weight.data = row.clone()
    with pytest.raises(RuntimeError, match="no longer lies in its row"):
        optimizer.sync()
    weight.data = row
    optimizer.sync()
    assert optimizer.stats.rounds == 2


def test_a_worker_that_is_spoilt_while_a_sync_is_under_way_is_left_out_of_the_next():
    optimizer, team = make(SlowMo, interval=4, overlap_steps=3)
    run(optimizer, team, 5)
    poison(team[1])
    run(optimizer, team, 2, first=5)
    assert optimizer.stats.excluded == 0
    assert parameters_of(team[0]).isfinite().all()  # what it had sent before was finite
    assert not parameters_of(team[1]).isfinite().all()
    run(optimizer, team, 1, first=7)
    assert optimizer.stats.excluded == 1
    assert parameters_of(team).isfinite().all()


def test_where_all_are_spoilt_nothing_is_sent():
    optimizer, team = make(SlowMo, interval=3, overlap_steps=2)
    run(optimizer, team, 2)
    for model in team:
        poison(model)
    with pytest.raises(RuntimeError, match="no worker's parameters are finite"):
        run(optimizer, team, 1, first=2)


def test_low_precision_parameters_add_what_they_have_done_since_to_what_became_of_the_sync():
    model = nn.Module()
    model.x = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    team = Workers(model, 2)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=1.0), team, 2, overlap_steps=1)
    for step in range(3):
        for number, worker in enumerate(team):
            worker.x.grad = torch.full_like(worker.x, -1.0 - 2 * number - 4 * step)
        optimizer.step()
    # Sent were 1 + 5 and 3 + 7, the mean is 8; the third step adds 9 and 11.
    assert [worker.x.tolist() for worker in team] == [[17.0, 17.0], [19.0, 19.0]]


def test_a_warm_up_has_nothing_to_be_late_with():
    late, team = make(LocalSGD, interval=2, warmup_steps=4, overlap_steps=1)
    plain, others = make(LocalSGD, interval=2, warmup_steps=4)
    for optimizer, workers in ((late, team), (plain, others)):
        run(optimizer, workers, 5)
    assert torch.equal(parameters_of(team), parameters_of(others))


def test_an_overlap_that_cannot_be_is_refused():
    for value, error, message in (
        (-1, ValueError, "overlap_steps must be at least 0, got -1"),
        (True, TypeError, "overlap_steps must be an int, got True"),
        (1.0, TypeError, "overlap_steps must be an int, got 1.0"),
    ):
        with pytest.raises(error, match=message):
            make(overlap_steps=value)
    with pytest.raises(ValueError, match="ConsensusDistance may decide from the drift of the last sync"):
        make(interval=ConsensusDistance(1.0), overlap_steps=2)
    team = Workers(nn.Linear(2, 1), 2)
    for name, others in (("bias", "weight"), ("weight", "bias")):
        inner = torch.optim.SGD([p for worker in team for n, p in worker.named_parameters() if n == name], lr=1.0)
        with pytest.raises(ValueError, match=f"and '{others}' is in none of its groups: two optimizers would each"):
            LocalSGD(inner, team, 2, overlap_steps=1)
    optimizer, _ = make(interval=ValidationLoss(4, total_epochs=9), overlap_steps=2)
    with pytest.raises(ValueError, match="ConsensusDistance may decide from the drift"):
        optimizer.policy = ConsensusDistance(1.0)
    assert isinstance(optimizer.policy, ValidationLoss)
    optimizer.policy = measured(3)
    told = ValidationLoss(4, total_epochs=9)
    told.reads_drift = True  # which its class does not; the stats are to hold the drift
    assert make(interval=told, overlap_steps=2)[0].policy is told
    with pytest.raises(AttributeError, match="overlap_steps was chosen when the optimizer was built"):
        optimizer.overlap_steps = 3
