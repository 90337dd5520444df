"""One file per algorithm: its config, its batch, its loss and its jitted step.

They take an `apply_fn` and know neither models, data nor meshes.
"""
