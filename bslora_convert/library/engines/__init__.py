"""Where conversions run. An engine takes jobs and gives results as they end, one for each job, whatever happens to a worker."""

from collections.abc import Callable, Generator, Sequence

from bslora_convert.library.convert import Job, Result
from bslora_convert.library.engines.local import run_local
from bslora_convert.library.engines.ray import run_ray

Engine = Callable[[Sequence[Job], int], Generator[Result, None, None]]  # jobs, workers

ENGINES: dict[str, Engine] = {"local": run_local, "ray": run_ray}
