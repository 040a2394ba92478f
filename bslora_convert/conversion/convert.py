"""From a measured source to a form as it is stored: in floats, or in codes."""

from bslora_convert.conversion.codes import in_codes
from bslora_convert.conversion.floats import in_floats
from bslora_convert.conversion.request import Converted, Request
from bslora_convert.fit.parallel import modules_over_cores
from bslora_convert.fit.source import Source
from bslora_convert.process.progress import Progress, silent


def convert(source: Source, request: Request, progress: Progress = silent) -> Converted:
    """The form that the request asks for, fitted in the source's metrics.

    :raises RecipeError: when the size asked for can't be met. An error that can't be reached is no error here: see `error`.
    """
    with modules_over_cores():
        return in_codes(source, request, progress) if request.target.is_coded else in_floats(source, request, progress)
