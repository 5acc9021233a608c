"""Policies: replayed traces with hand-computed intervals."""

import io
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch

from fastlocal import QSR, AdaComm, ConsensusDistance, FixedInterval, PostLocal, Stats, ValidationLoss
from fastlocal.policy import OriginalValidationLoss, Policy

ALL = [
    FixedInterval(3),
    PostLocal(10, 4),
    ValidationLoss(16, total_epochs=10),
    OriginalValidationLoss(16, total_epochs=10),
    QSR(4, 0.1),
    AdaComm(8),
    ConsensusDistance(0.5),
]


def replay(policy, losses, train_losses=()):
    """The interval after each observed validation loss."""
    stats, intervals = Stats(), []
    for loss, train_loss in itertools.zip_longest(losses, train_losses):
        stats.val_loss, stats.train_loss, stats.observations = loss, train_loss, stats.observations + 1
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


def test_the_original_rule_doubles_below_the_threshold_of_its_phase():
    # 10 epochs: threshold 0.02 for epochs 1-2, 0.005 for 3-8, 0.001 for 9-10.
    # δ:      -     .01    .01   .004    .1     .004   .0009  .0009  .0009  .01
    deltas = [None, 0.01, 0.01, 0.004, 0.1, 0.004, 0.006, 0.006, 0.0009, 0.01]
    losses = [4.0]
    for delta in deltas[1:]:
        losses.append(losses[-1] * (1 - delta))
    policy = OriginalValidationLoss(4, total_epochs=10, minimum=4, maximum=64)
    assert replay(policy, losses) == [4, 8, 8, 16, 16, 32, 32, 32, 64, 64]


def test_the_original_rule_halves_after_a_rise_but_only_after_30_percent_of_the_epochs():
    losses = [4.0, 4.2, 4.4, 4.6, 4.65, 4.8, 5.0]  # δ: −.05 −.048 −.045 −.011 −.032 −.042
    policy = OriginalValidationLoss(16, total_epochs=10)
    assert replay(policy, losses) == [16, 16, 16, 8, 8, 4, 4]


def test_the_original_rule_stays_within_its_bounds_and_ignores_a_loss_seen_before():
    policy = OriginalValidationLoss(32, total_epochs=4, maximum=64)
    stats = Stats(val_loss=4.0, observations=1)
    policy.next_interval(stats)
    stats.val_loss, stats.observations = 3.999, 2
    assert [policy.next_interval(stats) for _ in range(3)] == [64, 64, 64]
    stats.val_loss, stats.observations = 3.998, 3
    assert policy.next_interval(stats) == 64


def test_validation_loss_doubles_after_three_stalls_in_a_row():
    # 12 epochs: a fall of less than 2 % is a stall in epochs 1-2, of less than 0.5 % in 3-9.
    # fall in %:         1    .4   .4   .4   1    .4   .4   .4
    losses = [4.0]
    for fall in (0.01, 0.004, 0.004, 0.004, 0.01, 0.004, 0.004, 0.004):
        losses.append(losses[-1] * (1 - fall))
    policy = ValidationLoss(8, total_epochs=12, smoothing=0.0)
    # Stalls in a row:               0  1  2  3  1   0   1   2   3
    assert replay(policy, losses) == [8, 8, 8, 16, 16, 16, 16, 16, 32]


def test_validation_loss_counts_a_small_rise_as_a_stall_and_more_than_one_percent_as_none():
    losses = [4.0, 4.01, 4.02, 4.03, 4.06, 4.05, 4.03]  # above 4.0 by .25 .5 .75 1.5 1.25 .75 %
    assert replay(ValidationLoss(4, total_epochs=20, smoothing=0.0), losses) == [4, 4, 4, 8, 8, 8, 8]


def test_validation_loss_halves_after_three_rises_in_a_row_and_each_halving_needs_another_rise():
    # 10 epochs, so rises count from the fourth on. The mark is 4.0, then 4.5 once the interval was halved.
    losses = [4.0, 4.5, 4.5, 4.5, 4.5, 4.5, 4.6, 4.6, 4.6, 4.6]
    policy = ValidationLoss(32, total_epochs=10, smoothing=0.0)
    # Rises in a row:                0   0   0   1   2   3   1   2   3   0
    assert replay(policy, losses) == [32, 32, 32, 32, 32, 16, 16, 16, 8, 8]


def test_validation_loss_counts_no_rise_while_the_training_loss_falls():
    losses = [4.0, 4.5, 4.5, 4.5, 4.5, 4.5, 4.6, 4.6, 4.6, 4.6]
    falling = [3.0 - epoch / 10 for epoch in range(10)]
    assert replay(ValidationLoss(32, total_epochs=10, smoothing=0.0), losses, falling) == [32] * 10
    # From the fifth epoch on it stays where it is: rises in a row are 1, 2, 3 in the sixth, seventh and eighth.
    stays = falling[:5] + [falling[4]] * 5
    intervals = replay(ValidationLoss(32, total_epochs=10, smoothing=0.0), losses, stays)
    assert intervals == [32] * 7 + [16] * 3


def test_validation_loss_needs_twice_the_stalls_after_a_halving():
    # 20 epochs: rises count from the seventh on; the seventh, eighth and ninth halve, then the loss stays.
    policy = ValidationLoss(32, total_epochs=20, smoothing=0.0)
    intervals = replay(policy, [4.0, 3.0, 2.0, 1.5, 1.2, 1.0] + [1.05] * 9)
    assert intervals == [32] * 8 + [16] * 5 + [16, 32]


def test_validation_loss_ignores_one_outlier_that_halves_under_the_original_rule():
    losses = [4.0] + [3.0] * 10
    losses[6] = 3.3
    assert replay(OriginalValidationLoss(64, total_epochs=11), losses)[6:8] == [32, 32]
    assert replay(ValidationLoss(64, total_epochs=11), losses) == [64] * 11


def test_validation_loss_smooths_with_an_average_that_starts_at_the_first_loss():
    policy = ValidationLoss(16, total_epochs=10, smoothing=0.5)
    replay(policy, [4.0, 2.0, 1.0])
    # Weights 1, 2, 4 of 7: (4 + 4 + 4)/7.
    assert policy.weighted_sum / policy.weight == pytest.approx(12 / 7, abs=1e-15)


def test_under_noise_the_smoothed_rule_reaches_long_intervals_and_the_original_one_does_not():
    # A loss that comes to a standstill, with errors of 2 %: the second half of 100 epochs, ten times.
    def mean_interval(rule):
        total = 0
        for seed in range(10):
            noise = random.Random(seed)
            losses = [2.0 * (1 + 2 * 0.9**epoch) * (1 + noise.gauss(0, 0.02)) for epoch in range(100)]
            total += sum(replay(rule(16, total_epochs=100), losses)[50:])
        return total / 500

    assert mean_interval(ValidationLoss) > 48
    assert mean_interval(OriginalValidationLoss) < 16


@pytest.mark.parametrize("rule", [ValidationLoss, OriginalValidationLoss])
def test_validation_loss_goes_on_from_its_state(rule):
    losses = [4.0, 3.99, 3.98, 3.97, 3.96, 3.95, 4.5, 4.6, 4.6, 4.6, 4.6, 4.6, 4.61, 4.6, 4.6]
    train_losses = [3.0] * 6 + [2.9] * 9  # the first rise of the validation loss is none
    expected = replay(rule(8, total_epochs=15), losses, train_losses)
    assert len(set(expected)) > 2
    for stop in range(len(losses)):
        first, second = rule(8, total_epochs=15), rule(8, total_epochs=15)
        assert replay(first, losses[:stop], train_losses[:stop]) == expected[:stop]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        stats, rest = Stats(observations=stop), []
        for loss, train_loss in zip(losses[stop:], train_losses[stop:], strict=True):
            stats.val_loss, stats.train_loss, stats.observations = loss, train_loss, stats.observations + 1
            rest.append(second.next_interval(stats))
        assert rest == expected[stop:]


def test_a_loss_below_zero_that_falls_all_the_time_never_halves_the_interval():
    losses = [-float(epoch) for epoch in range(40)]
    assert min(replay(ValidationLoss(64, total_epochs=40), losses)) == 64
    assert min(replay(OriginalValidationLoss(64, total_epochs=40), losses)) == 64


def test_qsr_follows_the_square_of_the_inverse_rate():
    policy = QSR(4, 0.2, maximum=500, start_step=0)
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


def test_qsr_begins_when_the_rate_is_lower_than_it_has_been():
    # A warm-up from 0, as schedulers have it, with one rate an epoch; then a decay, and a warm restart.
    rates = (0.0, 0.0, 0.02, 0.02, 0.2, 0.2, 0.05, 0.2, 0.02)
    expected = [4, 4, 4, 4, 4, 4, 16, 4, 100]
    policy = QSR(4, 0.2)
    assert [policy.next_interval(Stats(lr=lr)) for lr in rates] == expected
    for restart in range(len(rates)):
        policy = QSR(4, 0.2)
        found = [policy.next_interval(Stats(lr=lr)) for lr in rates[:restart]]
        again = QSR(1, 1.0)
        again.load_state_dict(policy.state_dict())
        assert found + [again.next_interval(Stats(lr=lr)) for lr in rates[restart:]] == expected


def test_a_state_of_qsr_from_before_it_waited_goes_on_as_it_did():
    policy = QSR(1, 1.0)
    policy.load_state_dict({"base": 4, "alpha": 0.2, "maximum": 1024, "start_step": 0})
    assert policy.next_interval(Stats(lr=0.02)) == 100


def test_consensus_distance_ignores_warmup_and_rounds_cut_short():
    policy = ConsensusDistance(1.0, initial=16)
    assert policy.next_interval(Stats(rounds=3, drift=0.0, round_steps=0)) == 16
    assert policy.next_interval(Stats(rounds=4, drift=1.0, round_steps=16)) == 16
    assert policy.next_interval(Stats(rounds=5, drift=0.1, round_steps=2)) == 16
    assert policy.next_interval(Stats(rounds=6, drift=0.5, round_steps=8)) == 16  # half the way, half the drift


def test_a_short_round_whose_drift_exceeds_the_target_already_halves_the_interval():
    policy = ConsensusDistance(1.0, initial=256)
    trace = []
    for rounds, drift in enumerate([0.9, 1.5, 1.5, 1.2, 1.2, 1.0, math.nan, math.inf], start=1):
        trace.append(policy.next_interval(Stats(rounds=rounds, drift=drift, round_steps=20)))
    # Below the target it says nothing; halved at most; then 32 · 1/(1.2 · 32/20) = 16.7; a whole round at the target.
    assert trace == [256, 128, 64, 32, 17, 20, 20, 20]
    before = policy.interval
    assert policy.next_interval(Stats(rounds=20, drift=9.0, round_steps=0)) == before  # of the warm-up


def test_qsr_survives_a_rate_whose_square_underflows():
    assert QSR(4, 0.2, maximum=500, start_step=0).next_interval(Stats(lr=1e-200)) == 500


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
        (lambda: PostLocal(-1, 4), "start_step must be a whole number of at least 0, got -1"),
        (lambda: PostLocal(0.3, 4), "start_step must be a whole number of at least 0, got 0.3"),
        (lambda: QSR(4, 0.1, start_step=math.inf), "start_step must be a whole number of at least 0, got inf"),
        (lambda: ValidationLoss(16, total_epochs=0), "total_epochs must be a whole number of at least 1, got 0"),
        (lambda: ValidationLoss(2, total_epochs=5), r"initial must lie in .* \[4, 64\], got 2"),
        (
            lambda: ValidationLoss(8, total_epochs=5, minimum=8, maximum=4),
            "maximum must be at least minimum = 8, got 4",
        ),
        (lambda: ValidationLoss(8, total_epochs=5, smoothing=1.0), r"smoothing must be in \[0, 1\), got 1.0"),
        (lambda: ValidationLoss(8, total_epochs=5, patience=0), "patience must be at least 1, got 0"),
        (lambda: QSR(4, math.nan), "alpha must be positive and finite, got nan"),
        (lambda: AdaComm(8, maximum=4), "maximum must be at least initial = 8, got 4"),
        (lambda: ConsensusDistance(0.0), "target must be positive and finite, got 0.0"),
        (lambda: ConsensusDistance(math.inf), "target must be positive and finite, got inf"),
        (lambda: QSR(4, 0.0), "alpha must be positive and finite, got 0.0"),
        (lambda: ValidationLoss(8, total_epochs=5, smoothing=-0.1), r"smoothing must be in \[0, 1\), got -0.1"),
    ],
)
def test_wrong_settings_are_named_with_value_and_rule(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()


@pytest.mark.parametrize("total", [0, -3, 1.9, math.nan, math.inf])
def test_a_run_has_at_least_one_observation(total):
    with pytest.raises(ValueError, match=f"total_epochs must be a whole number of at least 1, got {total}"):
        ValidationLoss(16, total_epochs=total)


@pytest.mark.parametrize(
    ("base", "alpha", "lr", "interval"), [(1, 0.3, 0.1, 9), (1, 0.6, 0.2, 9), (1, 0.7, 0.1, 49), (1, 0.29, 0.1, 8)]
)
def test_qsr_is_the_square_where_the_quotient_is_a_whole_number(base, alpha, lr, interval):
    assert QSR(base, alpha, start_step=0).next_interval(Stats(lr=lr)) == interval


@pytest.mark.parametrize("policy", [FixedInterval(3), PostLocal(5, 7), QSR(2, 0.1, maximum=9, start_step=4)])
def test_settings_of_a_policy_without_a_memory_come_back(policy):
    policy.reads_drift = True  # no setting
    settings = policy.state_dict()
    assert "reads_drift" not in settings
    other = {FixedInterval: FixedInterval(1), PostLocal: PostLocal(0, 1), QSR: QSR(1, 1.0)}[type(policy)]
    other.load_state_dict(settings)
    assert other.state_dict() == settings
    other.load_state_dict({})  # of a version that kept none
    assert other.state_dict() == settings
    with pytest.raises((TypeError, ValueError)):
        other.load_state_dict(dict.fromkeys(settings, -1))


@pytest.mark.parametrize(
    "policy",
    [
        QSR(2, np.float64(0.1), start_step=np.int64(3)),
        ValidationLoss(16, total_epochs=np.int64(10), smoothing=np.float64(0.5)),
        ConsensusDistance(np.float64(0.5)),
        PostLocal(np.int64(10), 4),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_settings_that_are_numpys_numbers_can_be_loaded_from_a_checkpoint(policy):
    policy.next_interval(Stats(val_loss=1.0, observations=1, lr=0.1))
    file = io.BytesIO()
    torch.save((policy.state_dict(), dict(vars(policy))), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)[0] == policy.state_dict()


def test_the_original_rule_doubles_on_falls_of_less_than_its_last_threshold():
    losses = [4.0, 3.5, 3.0, 2.5, 2.2, 2.0, 1.8]
    for _ in range(3):
        losses.append(losses[-1] * 0.997)
    assert replay(OriginalValidationLoss(4, total_epochs=10), losses) == [4] * 7 + [8, 8, 8]


def test_the_original_rule_does_not_double_on_equal_losses():
    assert replay(OriginalValidationLoss(8, total_epochs=10), [2.0] * 10) == [8] * 10


def test_adacomm_takes_no_root_of_a_loss_below_zero_and_refuses_to_begin_at_zero():
    policy = AdaComm(16)
    assert [policy.next_interval(Stats(train_loss=loss)) for loss in (4.0, -0.5)] == [16, 1]
    with pytest.raises(ValueError, match="train_loss must be positive at first, got 0.0"):
        AdaComm(16).next_interval(Stats(train_loss=0.0))


def test_a_consensus_interval_at_most_doubles_and_one_at_its_target_stays():
    policy = ConsensusDistance(1.0, initial=16)
    assert policy.next_interval(Stats(rounds=1, drift=0.25, round_steps=8)) == 32
    assert policy.next_interval(Stats(rounds=2, drift=1.0, round_steps=2)) == 32


def test_bounds_and_smoothing_that_are_not_given_are_those_of_the_documentation():
    grown = AdaComm(16)
    assert [grown.next_interval(Stats(train_loss=loss)) for loss in (1.0, 1e6)] == [16, 1024]
    assert QSR(4, 0.2, start_step=0).next_interval(Stats(lr=1e-6)) == 1024
    steered = ConsensusDistance(1.0)
    drifts = [4.0] * 6 + [0.0] * 12
    trace = [
        steered.next_interval(Stats(rounds=rounds, drift=drift, round_steps=steered.interval))
        for rounds, drift in enumerate(drifts, start=1)
    ]
    assert (trace[0], min(trace), trace[-1]) == (8, 1, 1024)
    assert replay(OriginalValidationLoss(32, total_epochs=10), [4.0, 3.99, 3.98]) == [32, 64, 64]
    smoothed = ValidationLoss(16, total_epochs=10)
    replay(smoothed, [1.0, 2.0])
    assert smoothed.weighted_sum / smoothed.weight == pytest.approx((0.8 * 1 + 2) / 1.8, abs=1e-15)


def test_bounds_that_are_given_hold():
    grown = AdaComm(16, maximum=20)
    assert [grown.next_interval(Stats(train_loss=loss)) for loss in (1.0, 4.0)] == [16, 20]
    steered = ConsensusDistance(1.0, initial=8, minimum=3)
    assert [
        steered.next_interval(Stats(rounds=rounds, drift=9.0, round_steps=steered.interval)) for rounds in (1, 2, 3)
    ] == [4, 3, 3]


def test_a_round_whose_drift_was_read_before_a_reload_is_not_read_again():
    first, second = ConsensusDistance(1.0, initial=8), ConsensusDistance(1.0)
    stats = Stats(rounds=1, drift=8.0, round_steps=8)
    assert first.next_interval(stats) == 4
    second.load_state_dict(first.state_dict())
    assert second.next_interval(stats) == 4


def test_a_loss_below_zero_that_stays_where_it_is_doubles_the_interval():
    assert replay(ValidationLoss(8, total_epochs=20), [-4.0] * 4) == [8, 8, 8, 16]


def test_each_halving_doubles_the_stalls_that_the_next_doubling_takes():
    # 20 epochs: rises count from the seventh on. The seventh and the eighth halve, so 1, then 2, then 4 are needed.
    losses = [4.0, 3.0, 2.0, 1.5, 1.2, 1.0, 1.05, 1.1, 1.1, 1.1, 1.1, 1.1]
    policy = ValidationLoss(32, total_epochs=20, smoothing=0.0, patience=1)
    assert replay(policy, losses) == [32] * 6 + [16, 8, 8, 8, 8, 16]


def test_a_training_loss_that_has_risen_and_falls_again_is_one_that_falls():
    losses, train_losses = [4.0] * 4 + [4.5] * 4, [1.0, 1.0, 1.0, 1.0, 3.0, 2.9, 2.8, 2.7]
    # 10 epochs: only in the fifth do both rise; in the last three the training loss is lower than an epoch before.
    policy = ValidationLoss(32, total_epochs=10, smoothing=0.0, patience=2, maximum=32)
    assert replay(policy, losses, train_losses) == [32] * 8
