"""Policies: replayed traces with hand-computed intervals."""

import math

import pytest

from fastlocal import QSR, AdaComm, ConsensusDistance, FixedInterval, PostLocal, Stats, ValidationLoss
from fastlocal.policy import Policy

ALL = [
    FixedInterval(3),
    PostLocal(10, 4),
    ValidationLoss(16, total_epochs=10),
    QSR(4, 0.1),
    AdaComm(8),
    ConsensusDistance(0.5),
]


def replay(policy, losses):
    """The interval after each observed validation loss."""
    stats, intervals = Stats(), []
    for loss in losses:
        stats.val_loss, stats.observations = loss, stats.observations + 1
        intervals.append(policy.next_interval(stats))
    return intervals


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: type(policy).__name__)
def test_every_policy_satisfies_the_protocol_and_its_state_is_plain(policy):
    assert isinstance(policy, Policy)
    assert policy.next_interval(Stats(lr=0.1)) >= 1
    assert all(value is None or isinstance(value, (int, float, str)) for value in policy.state_dict().values())


def test_fixed_and_post_local_intervals():
    assert FixedInterval(7).next_interval(Stats(local_steps=100)) == 7
    policy = PostLocal(10, 4)
    assert [policy.next_interval(Stats(local_steps=n)) for n in (0, 9, 10, 50)] == [1, 1, 4, 4]


def test_validation_loss_doubles_below_the_threshold_of_its_phase():
    # 10 epochs: threshold 0.02 for epochs 1-2, 0.005 for 3-8, 0.001 for 9-10.
    # δ:      -     .01    .01   .004    .1     .004   .0009  .0009  .0009  .01
    deltas = [None, 0.01, 0.01, 0.004, 0.1, 0.004, 0.006, 0.006, 0.0009, 0.01]
    losses = [4.0]
    for delta in deltas[1:]:
        losses.append(losses[-1] * (1 - delta))
    policy = ValidationLoss(4, total_epochs=10, minimum=4, maximum=64)
    assert replay(policy, losses) == [4, 8, 8, 16, 16, 32, 32, 32, 64, 64]


def test_validation_loss_halves_after_a_rise_but_only_after_30_percent_of_the_epochs():
    losses = [4.0, 4.2, 4.4, 4.6, 4.65, 4.8, 5.0]  # δ: −.05 −.048 −.045 −.011 −.032 −.042
    policy = ValidationLoss(16, total_epochs=10)
    assert replay(policy, losses) == [16, 16, 16, 8, 8, 4, 4]


def test_validation_loss_stays_within_its_bounds_and_ignores_a_loss_seen_before():
    policy = ValidationLoss(32, total_epochs=4, maximum=64)
    stats = Stats(val_loss=4.0, observations=1)
    policy.next_interval(stats)
    stats.val_loss, stats.observations = 3.999, 2
    assert [policy.next_interval(stats) for _ in range(3)] == [64, 64, 64]
    stats.val_loss, stats.observations = 3.998, 3
    assert policy.next_interval(stats) == 64


def test_validation_loss_goes_on_from_its_state():
    losses = [4.0, 3.99, 3.98, 3.97, 4.5, 4.49, 4.48, 5.0]
    whole = ValidationLoss(8, total_epochs=8)
    expected = replay(whole, losses)
    first, second = ValidationLoss(8, total_epochs=8), ValidationLoss(8, total_epochs=8)
    stats, intervals = Stats(), []
    for index, loss in enumerate(losses):
        if index == 3:
            second.load_state_dict(first.state_dict())
        stats.val_loss, stats.observations = loss, index + 1
        intervals.append((first if index < 3 else second).next_interval(stats))
    assert intervals == expected


def test_qsr_follows_the_square_of_the_inverse_rate():
    policy = QSR(4, 0.2, maximum=500)
    assert [policy.next_interval(Stats(lr=lr)) for lr in (0.4, 0.1, 0.05, 0.03, 0.01, 0.0)] == [
        4,
        4,
        16,
        44,
        400,
        500,
    ]


def test_qsr_waits_for_the_end_of_a_warmup():
    policy = QSR(4, 0.2, start_step=10)
    assert [policy.next_interval(Stats(lr=0.02, local_steps=n)) for n in (0, 9, 10)] == [4, 4, 100]


def test_consensus_distance_ignores_warmup_and_rounds_cut_short():
    policy = ConsensusDistance(1.0, initial=16)
    assert policy.next_interval(Stats(rounds=3, drift=0.0, round_steps=0)) == 16
    assert policy.next_interval(Stats(rounds=4, drift=1.0, round_steps=16)) == 16
    assert policy.next_interval(Stats(rounds=5, drift=0.1, round_steps=2)) == 16
    assert policy.next_interval(Stats(rounds=6, drift=0.5, round_steps=8)) == 16  # half the way, half the drift


def test_qsr_survives_a_rate_whose_square_underflows():
    assert QSR(4, 0.2, maximum=500).next_interval(Stats(lr=1e-200)) == 500


def test_adacomm_shrinks_with_the_square_root_of_the_training_loss():
    policy = AdaComm(16)
    assert policy.next_interval(Stats()) == 16
    losses = [4.0, 1.0, 0.5, 0.0, 8.0]
    expected = [16, 8, math.ceil(16 * math.sqrt(0.125)), 1, math.ceil(16 * math.sqrt(2))]
    assert [policy.next_interval(Stats(train_loss=loss)) for loss in losses] == expected
    other = AdaComm(16)
    other.load_state_dict(policy.state_dict())
    assert other.next_interval(Stats(train_loss=1.0)) == 8


def test_consensus_distance_steers_the_drift_to_its_target():
    policy = ConsensusDistance(1.0, initial=8, maximum=32)
    trace = []
    for rounds, drift in enumerate([0.0, 0.8, 4.0, 1.0, 0.0, 0.0, 0.0]):
        trace.append(policy.next_interval(Stats(rounds=rounds, drift=drift, round_steps=policy.interval)))
    # first round; ×1.25; halved at most; on target; doubled thrice against the bound
    assert trace == [8, 10, 5, 5, 10, 20, 32]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FixedInterval(0), "interval must be at least 1, got 0"),
        (lambda: FixedInterval(True), "interval must be an int, got True"),
        (lambda: PostLocal(-1, 4), "start_step must be at least 0, got -1"),
        (lambda: ValidationLoss(16, total_epochs=0), "total_epochs must be at least 1, got 0"),
        (lambda: ValidationLoss(2, total_epochs=5), r"initial must lie in .* \[4, 64\], got 2"),
        (
            lambda: ValidationLoss(8, total_epochs=5, minimum=8, maximum=4),
            "maximum must be at least minimum = 8, got 4",
        ),
        (lambda: QSR(4, math.nan), "alpha must be positive and finite, got nan"),
        (lambda: AdaComm(8, maximum=4), "maximum must be at least initial = 8, got 4"),
        (lambda: ConsensusDistance(0.0), "target must be positive and finite, got 0.0"),
    ],
)
def test_wrong_settings_are_named_with_value_and_rule(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()
