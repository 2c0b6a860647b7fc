"""What is computed: kernels, reductions, methods, and the nodes of the graph.

A merge method is zero or more reductions over a tensor and one kernel that maps a tile of every model to a tile of the
output; :mod:`mergepipe.tasks.method` says what that means, :mod:`mergepipe.tasks.blocks` how a tensor is cut, and
:mod:`mergepipe.tasks.registry` lists them all.

* :mod:`~mergepipe.tasks.convert`: stored bits to the working type and back.
* :mod:`~mergepipe.tasks.adjust`: scales and adapters, applied to blocks before anything else sees them.
* :mod:`~mergepipe.tasks.select`: exact order statistics of a tensor that is never held.
* :mod:`~mergepipe.tasks.thinning`, :mod:`~mergepipe.tasks.sparsify`, :mod:`~mergepipe.tasks.tadrop`: task vectors made
  sparse; :mod:`~mergepipe.tasks.philox`: random masks that depend on no order.
* :mod:`~mergepipe.tasks.task_vectors`: the methods that add task vectors up, all one implementation.
* :mod:`~mergepipe.tasks.fusion`, :mod:`~mergepipe.tasks.scores`, :mod:`~mergepipe.tasks.rows`: elements taken from
  donors by score (`scf_rkl`, `arcee_fusion`), and the divergence of rows that the scores are made of;
  :mod:`~mergepipe.tasks.points`: what each element contributes to it; :mod:`~mergepipe.tasks.exponentials`: what both
  are made of; :mod:`~mergepipe.tasks.rows_torch`: the same on a GPU, to the same bits.
* :mod:`~mergepipe.tasks.change`: how far an output has moved from its base.
* :mod:`~mergepipe.tasks.kernels`: the loops.
* :mod:`~mergepipe.tasks.nodes`, :mod:`~mergepipe.tasks.matrix_nodes`, :mod:`~mergepipe.tasks.copy_nodes`: what a node
  of the graph does, by tiles, with a whole matrix, or where nothing is computed; :mod:`~mergepipe.tasks.sources`: where
  values come from. Nothing else here knows of files.

Not here: which tensors are merged, in what order, with how much memory (:mod:`mergepipe.pipeline`), and what a file
looks like (:mod:`mergepipe.storage`).
"""
