"""One file per merge method; each builds the `METHOD` that :mod:`mergepipe.tasks.registry` lists."""
