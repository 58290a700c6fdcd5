"""Operators of torch with kernels of their own, one file each.

    krylov_block           a block of a Krylov iteration, from weights in their stored 16 bits
    panel_qr               orthonormal rows of thin panels
    precise_product        products as if in float64, from 8-bit integers on tensor cores
    project_pair           rows through the subspaces of two bases, range and complement at once
    small_singular_values  the singular values of a stack of small matrices
    small_svd              thin SVD of a stack of small matrices
    subspace_overlap       ‖UsᵀUt‖_F² of all layers and sides in one call
    tridiagonal_values     the largest eigenvalues of tridiagonal matrices
    tridiagonal_vectors    their eigenvectors
    tridiagonalise         symmetric matrices to tridiagonal ones

All but a few take float32 or float64, contiguous or not. All but the last three run on any device,
and under FakeTensor and torch.compile. The file of an op holds it with its twin, which says in
torch what it computes; `native` decides which of the two runs. The list of ops is PROLORA_OPS in
csrc/ops.h.
"""
