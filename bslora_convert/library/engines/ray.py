"""Tasks on Ray (extra `ray`): the cluster of RAY_ADDRESS, or one started on this machine."""

import logging
import os
from collections.abc import Generator, Sequence
from typing import Any

from bslora_convert.behaviour.loaded import keep_base
from bslora_convert.errors import reason_of
from bslora_convert.library.jobs import Job, Result, Work, failure
from bslora_convert.library.options import BASE

RETRIES = 2  # of a task whose worker or node died
AHEAD = 2  # tasks submitted for each worker
GPU_SHARE = 0.25  # of a GPU for one distillation


def run_ray(work: Work, jobs: Sequence[Job], workers: int) -> Generator[Result, None, None]:
    """Runs jobs as Ray tasks of one core each, at most `AHEAD` times `workers` submitted at a time; 0 workers: every core."""
    import ray

    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS")
        local: dict[str, Any] = {} if address else {"num_cpus": workers or None, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        yield from _run(ray, work, jobs, workers or int(ray.cluster_resources().get("CPU", 1)))
    finally:
        if started:
            ray.shutdown()


def _run(ray: Any, work: Work, jobs: Sequence[Job], workers: int) -> Generator[Result, None, None]:
    remote = ray.remote(max_retries=RETRIES, num_cpus=1)(_task)
    pending: dict[Any, Job] = {}
    waiting = iter(jobs)
    try:
        while True:
            for job in waiting:
                gpus = GPU_SHARE if _wants_gpu(job, ray) else 0
                pending[remote.options(num_gpus=gpus).remote(work, job)] = job
                if len(pending) >= AHEAD * workers:
                    break
            if not pending:
                return
            for ready in ray.wait(list(pending))[0]:
                job = pending.pop(ready)
                try:
                    yield ray.get(ready)
                except ray.exceptions.RayError as error:
                    yield failure(job, "failed", "WorkerDied", reason_of(error))
    finally:
        for task in pending:
            ray.cancel(task, force=True)


def _task(work: Work, job: Job) -> Result:
    import torch

    torch.set_num_threads(1)
    keep_base()  # Ray's workers do one task after another
    return work(job)


def _wants_gpu(job: Job, ray: Any) -> bool:
    """Whether the job runs the base model (or was told to fit) on a GPU: without a share of one, Ray hides them all."""
    device = str(job.recipe.get("device", "auto"))
    if device == "auto":
        return job.recipe.get(BASE) is not None and ray.cluster_resources().get("GPU", 0) > 0
    return device.startswith("cuda")
