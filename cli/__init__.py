"""The command line: shows and asks.

Covers commands, options, progress, exit codes. Every command is a module of its own with one `click` command named
``command``; :mod:`mergepipe.cli.main` finds them by name and imports a module only when its command is wanted. A
command parses its options, calls one function of :mod:`mergepipe.pipeline` and prints what comes back: the result on
stdout, progress and log on stderr.

Does not cover: any decision about a merge, any arithmetic, any file format. Nothing here is imported by another layer.
Modules of this package import large libraries inside functions, so that ``mergepipe --help`` answers at once.
"""
