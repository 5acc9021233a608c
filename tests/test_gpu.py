"""What a GPU adds: graphs, streams, devices, loss scales, long offsets. Without one most bodies run interpreted."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastlocal import LAMB, LARS, FixedInterval, LocalSGD, SlowMo, Workers
from fastlocal.bench.measure import on_device
from fastlocal.comm.group import Group
from fastlocal.kernels import trust_ratio, trust_ratio_tables
from fastlocal.kernels.trust_ratio_common import BLOCK, NUM_WARPS
from fastlocal.kernels.trust_ratio_upload import Staging
from fastlocal.ops import averaging as ops
from fastlocal.reference import averaging as reference
from fastlocal.train import data
from fastlocal.train.config import Config
from fastlocal.train.loop import Training
from fastlocal.train.processes import Processes

GPU = pytest.mark.gpu
# With a GPU there is no interpreter, and the kernels cannot run on the CPU.
EVERYWHERE = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=GPU), *([] if torch.cuda.is_available() else ["cpu"])]
)
OPTIMIZERS = pytest.mark.parametrize(
    ("optimizer", "extra"),
    [(LAMB, {"max_grad_norm": 1.0}), (LARS, {"dampening": 0.5})],
    ids=["LAMB", "LARS"],
)


@pytest.fixture(params=["one launch", "two phases"])
def either_way(request, monkeypatch):
    """Both phases of a step in one launch, and each in its own."""
    constants = (BLOCK, NUM_WARPS, 1) if request.param == "one launch" else None
    monkeypatch.setattr(trust_ratio, "queue_constants", lambda *_: constants)


def pair(optimizer, extra, device, shapes=((70, 3), (5,), (1,))):
    """An optimizer with the kernels, and one of the same weights in float64 with the reference."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(s).to(device)) for s in shapes]
    exact = [nn.Parameter(p.detach().cpu().double()) for p in params]
    options = {"weight_decay": 0.1, "adapt": "all", **extra}
    fused = optimizer(params, lr=torch.tensor(0.1, device=device), fused=True, capturable=True, **options)
    plain = optimizer(exact, lr=0.1, foreach=False, **options)
    return params, exact, fused, plain


def require_equal(params, exact, tolerance=1e-5):
    for p, e in zip(params, exact, strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), e.detach(), rtol=tolerance, atol=tolerance)


def give(params, exact, grads):
    for p, e, g in zip(params, exact, grads, strict=True):
        p.grad, e.grad = g, g.cpu().double()


def recorded(call: Callable[[], object], device: str) -> Callable[[], object]:
    """What replays the call, which has not run; on a CPU, which has no graphs, the call itself."""
    if device == "cpu":
        return call
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@EVERYWHERE
@OPTIMIZERS
@pytest.mark.usefixtures("either_way")
def test_a_replayed_step_reads_gradients_and_rate_where_they_lie(optimizer, extra, device):
    params, exact, fused, plain = pair(optimizer, extra, device)
    grads = [torch.randn_like(p) for p in params]
    give(params, exact, grads)
    fused.step()
    plain.step()
    replay = recorded(fused.step, device)
    for rate in (0.1, 0.02, 0.3):
        for g in grads:
            g.copy_(torch.randn_like(g))
        give(params, exact, grads)
        fused.param_groups[0]["lr"].fill_(rate)
        plain.param_groups[0]["lr"] = rate
        replay()
        plain.step()
        require_equal(params, exact)


@EVERYWHERE
@OPTIMIZERS
@pytest.mark.usefixtures("either_way")
def test_replays_and_eager_steps_with_other_gradients_may_alternate(optimizer, extra, device):
    params, exact, fused, plain = pair(optimizer, extra, device)
    static, others = ([torch.randn_like(p) for p in params] for _ in range(2))
    for grads in (static, others):
        give(params, exact, grads)
        fused.step()
        plain.step()
    give(params, exact, static)
    replay = recorded(fused.step, device)
    for number in range(5):
        give(params, exact, others if number % 2 else static)
        if number % 2:
            fused.step()
        else:
            replay()
        plain.step()
        require_equal(params, exact)
        if number == 1:
            others = [torch.randn_like(p) for p in params]  # at other addresses


@EVERYWHERE
@OPTIMIZERS
@pytest.mark.usefixtures("either_way")
def test_forward_backward_and_step_replay_as_one_graph(optimizer, extra, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 7)).to(device)
    exact = copy.deepcopy(model).cpu().double()
    images = torch.randn(16, 20, device=device)
    fused = optimizer(model.parameters(), lr=0.1, weight_decay=0.1, fused=True, capturable=True, **extra)
    plain = optimizer(exact.parameters(), lr=0.1, weight_decay=0.1, foreach=False, **extra)

    def step(of, with_, inputs):
        with_.zero_grad()  # gradients are made anew: inside a graph their addresses are not those of the warm-up
        of(inputs).square().mean().backward()
        with_.step()

    if device == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(model, fused, images)
        torch.cuda.current_stream().wait_stream(side)
    else:
        step(model, fused, images)
    step(exact, plain, images.cpu().double())
    replay = recorded(lambda: step(model, fused, images), device)
    for _ in range(3):
        images.copy_(torch.randn(16, 20))
        replay()
        step(exact, plain, images.cpu().double())
        require_equal(model.parameters(), exact.parameters(), 1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_needs_state_made_before_and_capturable():
    param = nn.Parameter(torch.ones(8, device="cuda"))
    param.grad = torch.ones_like(param)
    for optimizer, message in (
        (LAMB([param]), "capturable=True"),
        (LAMB([param], capturable=True), "take one step before the capture"),
    ):
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(graph):
            optimizer.step()
        assert not optimizer.state[param]
    assert param.eq(1).all()


def test_a_step_that_is_recorded_keeps_tables_and_scalars_to_itself(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("shows without a GPU what a capture does to the tables")
    params, exact, fused, _ = pair(LARS, {}, "cpu")
    fused.param_groups[0]["lr"] = 0.1
    first, second = ([torch.randn_like(p) for p in params] for _ in range(2))
    give(params, exact, first)
    fused.step()
    with monkeypatch.context() as capture:
        capture.setattr(trust_ratio_tables, "is_capturing", lambda device: True)
        capture.setattr(trust_ratio, "is_capturing", lambda device: True)
        fused.step()
        rate = trust_ratio._on_device(fused._tables[0], "lr", 0.5, torch.device("cpu"))
    (tables,) = fused._tables[0]["captured"]
    pointers = tables.buckets[0].pointers
    addresses = pointers.clone()
    give(params, exact, second)
    fused.step()
    assert torch.equal(pointers, addresses)
    assert fused._tables[0]["lars"] is not tables
    assert rate == 0.5
    assert trust_ratio._on_device(fused._tables[0], "lr", 0.1, torch.device("cpu")).item() == pytest.approx(0.1)


def test_tables_built_in_a_capture_are_no_other_steps_and_outlive_a_refused_checkpoint(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("shows without a GPU what a capture does to the tables")
    params, exact, fused, _ = pair(LAMB, {}, "cpu")
    before, within = ([torch.randn_like(p) for p in params] for _ in range(2))
    give(params, exact, before)
    fused.step()
    kept = fused._tables[0]["lamb"]
    with monkeypatch.context() as capture:
        capture.setattr(trust_ratio_tables, "is_capturing", lambda device: True)
        capture.setattr(trust_ratio, "is_capturing", lambda device: True)
        give(params, exact, within)
        fused.step()
    # A capture records how they come onto the device: before the first replay they hold nothing there.
    (tables,) = fused._tables[0]["captured"]
    assert fused._tables[0]["lamb"] is kept
    fused.step()
    assert fused._tables[0]["lamb"] is not tables
    saved = fused.state_dict()
    saved["param_groups"][0]["lr"] = -1.0
    with pytest.raises(ValueError, match="Invalid learning rate"):
        fused.load_state_dict(saved)
    assert fused._tables[0]["captured"] == [tables]


def test_what_a_capture_uploads_lies_in_memory_set_aside_before_and_is_given_out_once(monkeypatch):
    made = []

    def pinned(num_bytes):
        made.append(torch.zeros(num_bytes, dtype=torch.uint8))
        return made[-1]

    monkeypatch.setattr(Staging, "_pinned", staticmethod(pinned))
    staging = Staging()
    staging.set_aside(0)
    assert not made
    staging.set_aside(1000)
    staging.set_aside(900)
    (room,) = made
    tables = [torch.arange(7, dtype=torch.int64), torch.arange(6, dtype=torch.int32).view(3, 2), torch.ones(3)]
    placed = [staging.place(table) for table in tables]
    first = room.data_ptr()
    assert [table.data_ptr() - first for table in placed] == [0, 64, 96]  # each at a multiple of 16
    for table, copy_of in zip(tables, placed, strict=True):
        assert torch.equal(copy_of, table)
    staging.set_aside(1000)  # for the next capture: this one's replays go on reading
    assert len(made) == 2
    assert staging.place(tables[0]).data_ptr() == made[1].data_ptr()


@EVERYWHERE
@OPTIMIZERS
def test_a_step_that_overflowed_is_skipped_and_the_next_is_unscaled(optimizer, extra, device):
    params, exact, fused, plain = pair(optimizer, extra, device)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=100)
    for overflows in (False, True, False):
        fused.zero_grad()
        factors = [torch.randn_like(p) for p in params]
        loss = sum((p * f).sum() for p, f in zip(params, factors, strict=True))
        scaler.scale(loss * torch.inf if overflows else loss).backward()
        scaler.step(fused)
        scaler.update()
        if not overflows:
            for e, f in zip(exact, factors, strict=True):
                e.grad = f.cpu().double()
            plain.step()
        require_equal(params, exact)
    assert scaler.get_scale() == 512.0
    if optimizer is LAMB:
        assert [fused.state[p]["step"].item() for p in params] == [2.0] * len(params)


@EVERYWHERE
@OPTIMIZERS
@pytest.mark.usefixtures("either_way")
def test_steps_queued_far_ahead_of_the_device_each_read_their_own_gradients(optimizer, extra, device):
    params, exact, fused, plain = pair(optimizer, extra, device)
    steps = [[torch.randn_like(p) for p in params] for _ in range(12 if device == "cuda" else 3)]
    if device == "cuda":
        torch.cuda._sleep(100_000_000)  # 50 ms: every step is issued before the first one runs
    for grads in steps:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        fused.step()
    for grads in steps:
        for e, g in zip(exact, grads, strict=True):
            e.grad = g.cpu().double()
        plain.step()
    require_equal(params, exact, 1e-4)


@pytest.mark.gpu
@OPTIMIZERS
def test_steps_on_a_side_stream_and_on_the_default_stream_agree(optimizer, extra):
    results = []
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            params, exact, fused, _ = pair(optimizer, extra, "cuda")
            generator = torch.Generator("cuda").manual_seed(1)
            for _ in range(4):
                give(params, exact, [torch.randn(p.shape, generator=generator, device="cuda") for p in params])
                fused.step()
        stream.synchronize()
        results.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@OPTIMIZERS
def test_one_group_may_lie_on_two_devices_neither_of_them_the_current_one(optimizer, extra):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    params, exact, fused, plain = pair(optimizer, extra, "cuda:0")
    last = f"cuda:{torch.cuda.device_count() - 1}"
    params[1].data = params[1].data.to(last)
    fused.param_groups[0]["lr"] = 0.1
    with torch.cuda.device(last):
        for _ in range(3):
            give(params, exact, [torch.randn_like(p) for p in params])
            fused.step()
            plain.step()
    require_equal(params, exact)


def test_what_is_kept_for_one_device_is_not_used_on_another():
    cache: dict = {}
    here = trust_ratio._on_device(cache, "lr", 0.25, torch.device("cpu"))
    there = trust_ratio._on_device(cache, "lr", 0.25, torch.device("meta"))
    assert (here.device.type, there.device.type) == ("cpu", "meta")
    assert trust_ratio._norm_buffers(cache, 3, torch.device("cpu"))[0].device.type == "cpu"
    assert trust_ratio._norm_buffers(cache, 3, torch.device("meta"))[0].device.type == "meta"


@EVERYWHERE
def test_the_outer_step_replays_as_a_graph(device):
    k, n = 3, 3000
    torch.manual_seed(0)
    rows, anchor, slow = torch.randn(k, n), torch.randn(n), torch.randn(n)
    exact = [t.double() for t in (rows, anchor, slow)]
    rows, anchor, slow = (t.to(device) for t in (rows, anchor, slow))
    weights = torch.tensor([1.0, 0.0, 2.0], device=device)
    parts = torch.empty(k, ops.num_drift_parts(n), device=device)
    options = {"direct": 0.1, "momentum": 0.7, "decay": 0.5, "gain": 1.0}

    def step():
        ops.outer_step_(rows, anchor, slow, weights, parts, **options, impl="triton")
        return ops.finite_rows(rows, impl="triton")

    if device == "cuda":
        kept = [t.clone() for t in (rows, anchor, slow)]
        step()  # compiles
        for t, before in zip((rows, anchor, slow), kept, strict=True):
            t.copy_(before)
    replay = recorded(step, device)
    for _ in range(2):
        fresh = torch.randn(k, n)
        rows.copy_(fresh)
        exact[0].copy_(fresh)
        replay()
        reference.outer_step_(*exact, weights.cpu(), torch.empty(parts.shape), **options)
        for t, e in zip((rows, anchor, slow), exact, strict=True):
            torch.testing.assert_close(t.cpu().double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_sync_is_timed_without_the_local_steps_before_it():
    workers = Workers(nn.Linear(40, 30).cuda(), 2)
    optimizer = LocalSGD(torch.optim.SGD(workers.parameters(), lr=0.1), workers, 1)
    for _ in range(2):  # the first compiles
        optimizer.stats.seconds_in_sync = 0.0
        for p in workers.parameters():
            p.grad = torch.ones_like(p)
        torch.cuda._sleep(1_000_000_000)  # half a second of something else
        optimizer.step()
    assert 0 < optimizer.stats.seconds_in_sync < 0.1


@EVERYWHERE
@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_a_worker_with_nan_is_left_out_and_goes_on_from_the_mean(device, impl):
    torch.manual_seed(0)
    workers = Workers(nn.Linear(40, 30).to(device), 3)
    optimizer = LocalSGD(torch.optim.SGD(workers.parameters(), lr=0.1), workers, 1, impl=impl)
    with torch.no_grad():
        workers[1].weight[3, 7] = torch.nan
        workers[2].weight.add_(1.0)
    mean = (workers[0].weight.detach().double() + workers[2].weight.detach().double()) / 2
    for worker in workers:
        for p in worker.parameters():
            p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.stats.excluded == 1
    for worker in workers:
        torch.testing.assert_close(worker.weight.detach().double(), mean, rtol=1e-6, atol=1e-6)


@GPU
def test_more_rows_than_a_kernel_holds_are_averaged_without_one():
    rows = torch.randn(33, 1000, device="cuda")
    mean = rows.double().mean(0)
    ops.average_(rows, torch.ones(33, device="cuda"), None)
    torch.testing.assert_close(rows.double(), mean.expand(33, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_are_right():
    n = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 14 * n:
        pytest.skip("needs 30 GB of GPU memory")
    rows = torch.zeros(1, n, dtype=torch.float16, device="cuda")
    rows[0, -1] = 3.0
    anchor, slow = torch.zeros(n, device="cuda"), torch.zeros(n, device="cuda")
    parts = torch.empty(1, ops.num_drift_parts(n), device="cuda")
    weights = torch.ones(1, device="cuda")
    ops.outer_step_(rows, anchor, slow, weights, parts, direct=0.5, momentum=0.0, decay=1.0, gain=0.0)
    assert rows[0, -1].item() == 1.5
    assert rows[0, :4096].count_nonzero().item() == 0
    rows[0, -2] = torch.inf
    assert ops.finite_rows(rows).tolist() == [False]


@pytest.mark.gpu
@OPTIMIZERS
def test_optimizers_step_the_end_of_a_tensor_of_more_than_two_to_the_31_elements(optimizer, extra):
    n, tail = 2**31 + 4099, 5000
    if torch.cuda.mem_get_info()[0] < 14 * n:
        pytest.skip("needs 30 GB of GPU memory")
    torch.manual_seed(0)
    end, slope = torch.randn(tail, device="cuda").bfloat16(), torch.randn(tail, device="cuda").bfloat16()
    results = []
    for length in (n, tail):
        param = nn.Parameter(torch.zeros(length, dtype=torch.bfloat16, device="cuda"))
        param.grad = torch.zeros_like(param)
        param.data[-tail:], param.grad[-tail:] = end, slope  # zeros add nothing to any norm
        optimizer([param], lr=0.1, weight_decay=0.1, fused=True, **extra).step()
        results.append(param.detach()[-tail:].clone())
        assert length == tail or not param.detach()[:tail].any()
        del param
        torch.cuda.empty_cache()
    torch.testing.assert_close(*results, rtol=2**-7, atol=1e-6)


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_with_the_kernels_agrees_with_the_reference(dtype, device):
    results = []
    for impl in ("triton", "reference"):
        torch.manual_seed(0)
        workers = Workers(nn.Linear(50, 20).to(device, dtype), 4)
        policy = FixedInterval(3)
        policy.reads_drift = True
        optimizer = SlowMo(torch.optim.SGD(workers.parameters(), lr=0.1), workers, policy, impl=impl)
        generator = torch.Generator(device).manual_seed(1)
        for _ in range(12):
            optimizer.zero_grad()
            for worker in workers:
                batch = torch.randn(8, 50, generator=generator, device=device).to(dtype)
                worker(batch).square().mean().backward()
            optimizer.step()
        results.append((torch.cat([p.detach().flatten() for p in workers.parameters()]), optimizer.stats.drift))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=tolerance)
    assert results[0][1] == pytest.approx(results[1][1], rel=10 * tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("optimizer", "tolerance"), [("sgd", 5e-4), ("lamb", 2e-3), ("lars", 8e-3)])
def test_a_run_on_the_gpu_follows_the_same_run_on_the_cpu(optimizer, tolerance, tmp_path):
    # Weights that begin 1e-6 apart move the last losses by 2e-5, 3e-4 and 4e-3, a run without steps by 4e-3 and more:
    # by 1.2e-2 with LARS.
    losses, rounds, graphs = {}, {}, {}
    for device in ("cpu", "cuda"):
        config = Config(
            epochs=2,
            synthetic_images=2000,
            workers=2,
            batch_size=32,
            optimizer=optimizer,
            policy="val-loss",
            interval=4,
        )
        splits = data.load(config)
        training = Training(config, splits, Path(tmp_path) / device, torch.device(device), Processes())
        records = list(training.epochs())
        losses[device] = [value for r in records for value in (r.train_loss, r.val_loss)]
        rounds[device] = (records[-1].rounds, records[-1].excluded)
        graphs[device] = training.gradients.graph is not None
    assert graphs == {"cpu": False, "cuda": True}
    assert rounds["cuda"] == rounds["cpu"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=tolerance)


@pytest.mark.gpu
def test_a_turn_in_which_the_device_waits_for_the_host_is_told():
    x = torch.ones(1000, device="cuda")
    x.mul_(0.5 * x.sum().item())  # what is loaded at the first use may take longer than the device sleeps
    assert not on_device(lambda: x.mul_(0.5)).host_bound
    assert on_device(lambda: x.mul_(x.sum().item())).host_bound


@EVERYWHERE
@pytest.mark.parametrize("small_messages_on_the_cpu", [True, False])
def test_messages_travel_on_the_device_that_the_group_has(device, small_messages_on_the_cpu):
    if device == "cpu" and not small_messages_on_the_cpu:
        pytest.skip("gloo sends from the CPU")
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl" if small_messages_on_the_cpu else "nccl"
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        group = Group(dist.group.WORLD, 60.0, torch.device(device))
        assert group.in_stream_order == (device == "cuda")
        assert group.gather([1.5, 2.0]) == [[1.5, 2.0]]
        assert group.gather_objects({"a": 1}) == [{"a": 1}]
        assert group.broadcast_object([1, "b"], 0) == [1, "b"]
        row = torch.arange(5.0, device=device)
        for operation in ("sum", "max", "min", *(["mean"] if group.in_stream_order else [])):
            group.reduce_(row, operation)
            assert row.tolist() == [0, 1, 2, 3, 4]
        group.broadcast_(row, 0)
    finally:
        dist.destroy_process_group()
