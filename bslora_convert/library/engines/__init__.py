"""Where conversions run. An engine takes jobs and gives results as they end, one for each job, whatever happens to a worker."""

from collections.abc import Callable, Generator, Sequence

from bslora_convert.library.engines.local import run_local
from bslora_convert.library.engines.ray import run_ray
from bslora_convert.library.jobs import Job, Result, Work

Engine = Callable[[Work, Sequence[Job], int], Generator[Result, None, None]]  # what to do, jobs, workers

ENGINES: dict[str, Engine] = {"local": run_local, "ray": run_ray}
