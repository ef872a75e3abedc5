"""What libraries print while they load, left out."""

from __future__ import annotations


def quiet_loading() -> None:
    """Switches off the progress bars of diffusers and transformers; a run has one of its own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def only_errors() -> None:
    """Leaves out the warnings of diffusers and transformers too."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
