"""A run's state as its checkpoint holds it: by worker, so that any number of processes may go on with it."""

import io
from typing import TYPE_CHECKING, Any

import torch

from fastlocal.train.processes import Processes

if TYPE_CHECKING:
    from fastlocal.train.build import Optimizer


def collect(
    workers: list[dict[str, Any]], losses: torch.Tensor, optimizer: "Optimizer", processes: Processes
) -> dict[str, Any]:
    """All workers' parts, and what is common to them. A collective: every process gets it.

    Args:
        workers: the module states of this process's workers.
        losses: (k, 2), what these workers counted.
        optimizer: over these workers.
        processes: among which the workers are spread.
    """
    state = optimizer.state_dict()
    common, sent = state["fastlocal"], []
    if (sending := common.get("sending")) is not None:
        sent = [block["rows"] for block in sending["blocks"]]
        common = {**common, "sending": {**sending, "blocks": [{"rates": b["rates"]} for b in sending["blocks"]]}}
    own = {"workers": workers, "losses": losses, "inner": _cut(state, len(workers)), "sent": sent}
    # Saved tensors share their storages; a pickled list would hold the flat buffer once for each parameter.
    buffer = io.BytesIO()
    torch.save(own, buffer)
    parts = [torch.load(io.BytesIO(part), map_location="cpu") for part in processes.gather(buffer.getvalue())]
    return {
        "workers": [worker for part in parts for worker in part["workers"]],
        "losses": torch.cat([part["losses"] for part in parts]),
        "inner": [inner for part in parts for inner in part["inner"]],
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]],
        "common": common,
        "sent": [torch.cat(rows) for rows in zip(*(part["sent"] for part in parts), strict=True)],
    }


def optimizer_state(saved: dict[str, Any], optimizer: "Optimizer", here: range) -> dict[str, Any]:
    """The state_dict of one process's optimizer.

    Args:
        saved: what collect() returned.
        optimizer: which is to load it.
        here: the numbers of its workers.
    """
    groups, common = optimizer.state_dict()["param_groups"], saved["common"]
    if common.get("sending") is not None:
        pairs = zip(common["sending"]["blocks"], saved["sent"], strict=True)
        blocks = [{**block, "rows": rows[here.start : here.stop]} for block, rows in pairs]
        common = {**common, "sending": {**common["sending"], "blocks": blocks}}
    per_worker = _parameters_of_a_worker(groups, len(here))
    return {
        "state": {
            row * per_worker + index: state
            for row, worker in enumerate(here)
            for index, state in saved["inner"][worker].items()
        },
        "param_groups": [{**group, **values} for group, values in zip(groups, saved["groups"], strict=True)],
        "fastlocal": {**common, "num_rows": len(here)},
    }


def _cut(state: dict[str, Any], rows: int) -> list[dict[int, Any]]:
    """The inner optimizer's state of each worker, by the parameter's number within the worker."""
    per_worker = _parameters_of_a_worker(state["param_groups"], rows)
    cut: list[dict[int, Any]] = [{} for _ in range(rows)]
    for index, own in state["state"].items():
        cut[index // per_worker][index % per_worker] = own
    return cut


def _parameters_of_a_worker(groups: list[dict[str, Any]], rows: int) -> int:
    (group,) = groups  # built over all workers' parameters, worker by worker
    return len(group["params"]) // rows
