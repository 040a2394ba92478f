"""Where conversions run: an engine works off jobs and gives each one's result as it ends, whatever happens to a worker."""

from collections.abc import Callable, Generator, Sequence

from bslora_convert.library.engines.local import run_local
from bslora_convert.library.engines.ray import run_ray
from bslora_convert.library.jobs import Job, Result, Work

RunsJobs = Callable[[Work, Sequence[Job], int], Generator[Result, None, None]]  # what to do, jobs, workers

ENGINES: dict[str, RunsJobs] = {"local": run_local, "ray": run_ray}
