"""The geometry of an update: diagnostics on weight matrices, each with its null ("On the Geometry of On-Policy
Distillation", arXiv:2606.07082).

    sparsity   which weights moved in bf16             masks      principal or small weights
    angles     rotation of the weights' subspaces      spectrum   drift of the weights' singular values
    update     shape of dW: stable rank, Hill, ...     subspace   does dW keep its directions
    nulls      random updates to compare with          floors     the same by formula
    measure    all of it for W0 and a row of checkpoints: what `potstill geometry` does

Matrices are torch tensors [m, n] = [out, in] on any device; spectral arithmetic is double throughout.
"""

from potstill.geometry.angles import Rotation, angles_between, principal_angles, rotation, subspace_angles
from potstill.geometry.decompose import Decomposition, decompose, decompose_product, gram, singular_values
from potstill.geometry.floors import (
    Storage,
    half_spacing,
    isotropic_shift,
    isotropic_stable_rank,
    storage,
    weight_decay_floor,
)
from potstill.geometry.masks import (
    MaskOverlap,
    Overlap,
    WeightMasks,
    mask_overlap,
    overlap_with,
    weight_masks,
)
from potstill.geometry.measure import Geometry, measure
from potstill.geometry.nulls import (
    Against,
    against,
    density_matched_update,
    isotropic_update,
    noise_trajectory,
    overlap_null,
    permuted_update,
    rotation_matched_update,
)
from potstill.geometry.sparsity import Agreement, changed_mask, mask_jaccard, update_sparsity
from potstill.geometry.spectrum import SpectralShift, shift_between, spectral_shift
from potstill.geometry.subspace import (
    basis,
    chance_similarity,
    increments,
    input_alignment,
    projection_energy,
    similarity,
    similarity_matrix,
    subspace_similarity,
    window_similarity,
)
from potstill.geometry.update import (
    UpdateSummary,
    growth_exponent,
    hill,
    hill_of,
    participation_ratio,
    stable_rank,
    summarise_product,
    summarise_update,
)

__all__ = [
    "Against",
    "Agreement",
    "Decomposition",
    "Geometry",
    "MaskOverlap",
    "Overlap",
    "Rotation",
    "SpectralShift",
    "Storage",
    "UpdateSummary",
    "WeightMasks",
    "against",
    "angles_between",
    "basis",
    "chance_similarity",
    "changed_mask",
    "decompose",
    "decompose_product",
    "density_matched_update",
    "gram",
    "growth_exponent",
    "half_spacing",
    "hill",
    "hill_of",
    "increments",
    "input_alignment",
    "isotropic_shift",
    "isotropic_stable_rank",
    "isotropic_update",
    "mask_jaccard",
    "mask_overlap",
    "measure",
    "noise_trajectory",
    "overlap_null",
    "overlap_with",
    "participation_ratio",
    "permuted_update",
    "principal_angles",
    "projection_energy",
    "rotation",
    "rotation_matched_update",
    "shift_between",
    "similarity",
    "similarity_matrix",
    "singular_values",
    "spectral_shift",
    "stable_rank",
    "storage",
    "subspace_angles",
    "subspace_similarity",
    "summarise_product",
    "summarise_update",
    "update_sparsity",
    "weight_decay_floor",
    "weight_masks",
    "window_similarity",
]
