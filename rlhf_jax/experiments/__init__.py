"""The folder `experiments` of a clone, by the name that it has where pip has installed it."""

import pathlib

# pip puts that folder here, and this file is not a part of it.
__path__ = [str(pathlib.Path(__file__).resolve().parents[2] / "experiments")]
