"""The three errors a user of polyfuse can meet; everything else is a bug."""


class SpecError(ValueError):
    """A call, configuration or name that breaks a rule; raised before anything is launched."""


class Unsupported(RuntimeError):
    """A backend declines a valid call. The only exception that lets selection move on."""


class BackendError(RuntimeError):
    """A backend that was asked for is missing, cannot be loaded, or broke its contract."""
