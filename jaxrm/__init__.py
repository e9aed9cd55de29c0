"""jaxrm: train, merge, evaluate and serve reward models in JAX.

`jaxrm.load(path)` is a reward model with `.score(conversations)`; every module, such as
`jaxrm.losses`, is imported when it is first used.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from jaxrm.version import __version__ as __version__

if TYPE_CHECKING:
    from jaxrm.loading import load as load

# transformers advises to install PyTorch when it is imported; jaxrm does without.
logging.getLogger('transformers').addFilter(lambda record: 'PyTorch' not in str(record.msg))


def __getattr__(name: str) -> Any:
    if name == 'load':
        return importlib.import_module('jaxrm.loading').load
    try:
        return importlib.import_module(f'jaxrm.{name}')
    except ModuleNotFoundError as error:
        if error.name != f'jaxrm.{name}':
            raise
        raise AttributeError(f'jaxrm has no {name!r}') from error
