"""Error of model folders."""

import os


class ModelFolderError(ValueError):
  """A model folder cannot be loaded as requested; the message names the file and the fix."""

  exit_code = os.EX_CONFIG
