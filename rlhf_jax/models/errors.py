"""Error of model folders."""


class ModelFolderError(ValueError):
  """A model folder cannot be loaded as requested; the message names the file and the fix."""

  exit_code = 78
