"""Storage holds bytes: it opens checkpoints, knows where each tensor's bytes are, reads them, and writes the output.

**From a folder to bytes.** :mod:`~mergepipe.storage.checkpoint` opens a Hugging Face style folder from its headers,
which :mod:`~mergepipe.storage.header` has proved valid; of PyTorch's own files :mod:`~mergepipe.storage.pickled` learns
as much without executing them. :mod:`~mergepipe.storage.chunks` cuts each tensor into a grid
that follows from its shape alone. :mod:`~mergepipe.storage.manifest` writes down, per chunk, the file and the byte
range that hold it; this *chunk manifest* is all that a run knows of its inputs. A run asks it for the segments of an
element range, and a reader of :mod:`~mergepipe.storage.readers` for the bytes of those segments.

**Two kinds of store, one interface.** Each model is a zarr v3 hierarchy with one array per tensor:

* *virtual* (:mod:`~mergepipe.storage.virtual`): the chunks are byte ranges of the model's files themselves. It
  costs no disk and is ready as soon as the headers are read. zarr reads it through ``VirtualStore``, other tools
  through kerchunk references (:mod:`~mergepipe.storage.kerchunk`).
* *copy* (:mod:`~mergepipe.storage.copied`): the chunks are files of a zarr group on disk, each with a crc32c. Any zarr
  reader opens it.

Both use the data type ``bfloat16`` (:mod:`~mergepipe.storage.zdtype`). zarr is the interface, not the hot path: a run
reads ranges straight from the files of either kind.

**The output** is laid out to the byte before the first one is written, written in any order by threads of its own
(:mod:`~mergepipe.storage.outgoing`), and appears under its final names only when it is complete.

What storage promises
---------------------
* Inputs are opened read-only and are never written.
* Headers, indexes and manifests are checked before anything is allocated or read by them. A file that lies is a
  :class:`~mergepipe.errors.CheckpointError`: no crash, no hang, no memory beyond a fixed bound (headers and indexes
  of at most 100 MB, with at most 2,000,000 commas and brackets).
* No ``zarr.json`` is ever on disk beside missing chunks, which a zarr reader would silently take for zeros.
* Nobody reads from a chunk of a copied store that does not match its checksum (:mod:`~mergepipe.storage.checked`).
* Space for many small files is taken before the first of them is written (:mod:`~mergepipe.storage.ballast`).
* A small file that is replaced (:mod:`~mergepipe.storage.atomic`) is the old one or the new one, also after a power
  cut.

What it does not cover
----------------------
Arithmetic and the meaning of tensors (`tasks`), the order and size of units (`pipeline`), the detection of inputs that
changed between a build and a run (the caller compares :class:`~mergepipe.storage.checkpoint.FileInfo`). A file that
another process truncates while a mapped window of it is in use (in a run, for milliseconds) kills the process: no
mapping can be safe from that.
"""
