"""Is a version whole? Its tensors against what the base model and the targets say it must hold.

Both sides ask: the publisher before it commits, the rollout node before it loads. Missing, extra, misshapen, partly
covered or doubly covered tensors are all refused; vLLM would load most of them with HTTP 200 and serve the base model.
"""

from collections import Counter
from collections.abc import Mapping

from shared.errors import Corrupt
from shared.manifest import Manifest
from shared.tensor_table import Tensor

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
    """Whether slices tile the tensor: each cell in exactly one of them, in time that grows as their number.

    How often each cell is covered is a function whose mixed differences are +1 and -1 at the corners of each slice, and
    which they determine. So slices cover a tensor as one whole slice would exactly if their corners add up to its four.
    An empty slice has corners that add up to none, wherever it lies; so none may be empty.
    """
    if len(tensor.slices) == 1:
        return tensor.slices[0].offset == (0, 0) and tensor.slices[0].shape == tensor.shape
    if any(0 in slice_.shape for slice_ in tensor.slices):
        return False
    corners: Counter[tuple[int, int]] = Counter()
    for _, _, offset, shape in tensor.slices:
        _add_corners(corners, offset, shape, 1)
    _add_corners(corners, (0, 0), tensor.shape, -1)
    return not any(corners.values())


def _add_corners(corners: "Counter[tuple[int, int]]", offset: tuple[int, int], shape: tuple[int, int], by: int) -> None:
    (top, left), (height, width) = offset, shape
    for row, column, sign in ((0, 0, by), (height, width, by), (height, 0, -by), (0, width, -by)):
        corners[top + row, left + column] += sign


def _some(names: list[str]) -> str:
    more = ", ..." if len(names) > MAX_NAMED else ""
    return f"({', '.join(names[:MAX_NAMED])}{more})" if names else ""


def _refuse(manifest: Manifest, problem: str) -> None:
    raise Corrupt(problem.rstrip(), op="check adapter", version=str(manifest.version))
