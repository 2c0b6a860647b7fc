"""Methods that look at a whole matrix: singular vectors of task vectors, aligned and put together again.

Nearly every method here ends in two thin factors, ``update = left @ right.T``, whose rows are then added to the base
panel by panel. On the way there it never holds a task vector: it asks for *panels*, float64 runs of whole rows, as
often as it needs them (:mod:`mergepipe.tasks.subspace.panels`). OPCM is the exception: it holds the merge so far, one
matrix in the working type, and puts one task vector after another into it
(:mod:`mergepipe.tasks.subspace.sequential`). Methods that know nothing of matrices can have what they merge
calibrated (:mod:`mergepipe.tasks.subspace.post`).

    panels of task vector t ─► factor t ─► … ─► solve ─► left, right ─► rows of the output

*Route.* How singular vectors are found follows from a matrix's shape and the parameter `svd` alone, never from the
memory ceiling, which only accepts or refuses (:mod:`mergepipe.tasks.subspace.route`):

* full: up to 4,194,304 elements, one float64 SVD of the matrix;
* gram: beyond, the eigendecomposition of the float64 Gram matrix of the smaller side, panels folded in order. It
  squares the condition number; where the smallest kept eigenvalue is 1e-10 of the largest or less, the vectors are
  re-orthonormalised and the Gram step is repeated once (:mod:`mergepipe.tasks.subspace.factor`, `.frames`);
* randomized: only where asked for, a seeded range finder.

*Reproducibility.* Everything is float64, on one thread of torch per worker, in calls whose shapes follow from the
tensor's shape: chunk size, worker count and ceiling change no bit. Another device may differ in last bits, so it is
recorded and a resume on another one refused.

Directions whose singular value is at most `rtol` of the largest are dropped (of a zero task vector all are): they carry
nothing, and any vector would do for them, which is no way to define a result.

What is not here: sparsifying (panels come thinned), reading and writing (:mod:`mergepipe.tasks.nodes`), and the tensors
that are no matrices, which get the mean of the task vectors (:mod:`mergepipe.tasks.subspace.declare`).
"""
