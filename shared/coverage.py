"""Is a version whole? Its tensors against what the base model and the targets say it must hold.

Both sides ask: the publisher before it commits, the rollout node before it loads. Missing, extra, misshapen, partly
covered or doubly covered tensors are all refused; vLLM would load most of them with HTTP 200 and serve the base model.
"""

from collections.abc import Mapping

from shared.errors import Corrupt
from shared.manifest import Manifest
from shared.tensor_table import Slice, Tensor

MAX_NAMED = 3  # names shown in one message


def demand_complete(manifest: Manifest, expected: Mapping[str, tuple[int, int]]) -> None:
    """Check names, shapes and slices.

    Args:
        manifest: of the version.
        expected: every tensor's shape, from `shared.peft_names.expected_tensors`.

    Raises:
        Corrupt: says which names, and what is wrong with them.
    """
    shapes = {name: tensor.shape for name, tensor in manifest.tensors.items()}
    for alias, name in manifest.aliases.items():
        if alias in shapes:
            _refuse(manifest, f"{alias} is both a tensor and an alias")
        shapes[alias] = shapes[name]
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected]
    if missing or extra:
        _refuse(manifest, f"{len(missing)} tensors missing {_some(missing)}, {len(extra)} unexpected {_some(extra)}")
    misshapen = [f"{name} {shapes[name]} for {shape}" for name, shape in expected.items() if shapes[name] != shape]
    if misshapen:
        _refuse(manifest, f"{len(misshapen)} tensors of a wrong shape {_some(misshapen)}")
    torn = [name for name, tensor in manifest.tensors.items() if not _covered(tensor)]
    if torn:
        _refuse(manifest, f"{len(torn)} tensors not covered exactly once by their slices {_some(torn)}")


def _covered(tensor: Tensor) -> bool:
    """Whether slices tile the tensor: inside it, disjoint, and of its area in all."""
    rows, columns = tensor.shape
    area = 0
    for number, slice_ in enumerate(tensor.slices):
        (row, column), (height, width) = slice_.offset, slice_.shape
        if row + height > rows or column + width > columns:
            return False
        if any(_overlap(slice_, other) for other in tensor.slices[:number]):
            return False
        area += height * width
    return area == rows * columns


def _overlap(a: Slice, b: Slice) -> bool:
    return all(
        a.offset[axis] < b.offset[axis] + b.shape[axis] and b.offset[axis] < a.offset[axis] + a.shape[axis]
        for axis in (0, 1)
    )


def _some(names: list[str]) -> str:
    more = ", ..." if len(names) > MAX_NAMED else ""
    return f"({', '.join(names[:MAX_NAMED])}{more})" if names else ""


def _refuse(manifest: Manifest, problem: str) -> None:
    raise Corrupt(problem.rstrip(), op="check adapter", version=str(manifest.version))
