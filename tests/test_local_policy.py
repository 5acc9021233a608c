"""The policy's place in a wrapper: when it is asked, what it is told, what it may answer."""

import pytest
import torch
from local_runs import make, run
from torch import nn

from fastlocal import QSR, FixedInterval, LocalSGD, ValidationLoss, Workers


class Growing:
    """No more than the protocol asks for."""

    calls = 0

    def next_interval(self, stats):
        self.calls += 1
        return stats.rounds + 1

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state_dict):
        self.calls = state_dict["calls"]


def test_a_policy_of_ones_own_chooses_the_interval_once_a_round():
    policy = Growing()
    optimizer, team = make(interval=policy)
    run(optimizer, team, 6)
    assert optimizer.stats.rounds == 3  # 1 + 2 + 3 steps
    assert policy.calls == 3


def test_a_policy_that_does_not_say_whether_it_reads_the_drift_is_told_it():
    team = Workers(nn.ParameterList([torch.zeros(1)]), 2)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=1.0), team, Growing())
    for model, value in zip(team, (1.0, 5.0), strict=True):
        model[0].grad = torch.tensor([value])
    optimizer.step()
    assert optimizer.stats.drift == 2.0


def test_a_policy_that_answers_nonsense_is_named():
    class Broken(FixedInterval):
        def next_interval(self, stats):
            return 0

    optimizer, team = make(interval=Broken(1))
    with pytest.raises(ValueError, match="the interval from Broken must be at least 1, got 0"):
        run(optimizer, team, 1)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_observing_a_loss_that_is_not_finite_is_an_error(loss):
    optimizer, _ = make(interval=ValidationLoss(16, total_epochs=3))
    with pytest.raises(ValueError, match="val_loss must be finite, got"):
        optimizer.observe(val_loss=loss)
    assert optimizer.stats.val_loss is None


def test_losses_are_observed_together_or_alone_and_neither_where_one_is_not_finite():
    optimizer, _ = make(LocalSGD)
    optimizer.observe(val_loss=2.0, train_loss=3.0)
    optimizer.observe(train_loss=1.0)
    for bad in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"train_loss must be finite, got {bad}"):
            optimizer.observe(val_loss=5.0, train_loss=bad)
    stats = optimizer.stats
    assert (stats.val_loss, stats.train_loss, stats.observations) == (2.0, 1.0, 1)


def test_a_loss_of_zero_is_one_that_was_observed():
    optimizer, _ = make(LocalSGD)
    optimizer.observe(val_loss=0.0, train_loss=0.0)
    stats = optimizer.stats
    assert (stats.val_loss, stats.train_loss, stats.observations) == (0.0, 0.0, 1)


def test_a_policy_is_told_the_highest_rate_of_the_groups():
    team = Workers(nn.Linear(2, 1), 2)
    each = [[p for p in team.parameters() if p.dim() == dim] for dim in (1, 2)]
    inner = torch.optim.SGD([{"params": each[0], "lr": 0.1}, {"params": each[1], "lr": 0.5}], lr=0.3)
    optimizer = LocalSGD(inner, team, QSR(1, alpha=1.0, start_step=0))
    for rate, interval in ((0.5, 4), (0.05, 100)):  # (1 / 0.5)², (1 / 0.1)²
        inner.param_groups[1]["lr"] = rate
        for parameter in team.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.sync()
        assert optimizer.stats.interval == interval


def test_a_policy_is_asked_once_a_round_even_if_the_first_step_fails():
    class Counting(FixedInterval):
        asked = 0

        def next_interval(self, stats):
            self.asked += 1
            return 2

    policy = Counting(2)
    optimizer, team = make(interval=policy)

    def fail():
        raise KeyError("data")

    for _ in range(3):
        with pytest.raises(KeyError):
            optimizer.step(fail)
    run(optimizer, team, 2)
    assert policy.asked == 1


def test_the_policy_may_be_set_to_an_interval_and_other_choices_not_at_all():
    optimizer, team = make(LocalSGD, interval=2)
    run(optimizer, team, 2)
    optimizer.policy = 3
    run(optimizer, team, 2)
    assert optimizer.stats.interval == 3
    with pytest.raises(ValueError, match="interval must be at least 1, got 0"):
        optimizer.policy = 0
    choices = {"inner_state": "reset", "buffers": "keep", "impl": "reference", "wire_dtype": None, "timeout": 3.0}
    choices |= {"warmup_steps": 9, "inner": optimizer.inner, "rows": team.rows}
    for name, value in choices.items():
        with pytest.raises(AttributeError, match=f"{name} was chosen when the optimizer was built"):
            setattr(optimizer, name, value)
    with pytest.raises(AttributeError, match="interval was chosen .* cannot be set: set policy"):
        optimizer.interval = 7
