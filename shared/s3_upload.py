"""One large object to S3, in parts that travel side by side.

Promises: the object is there whole or not at all; memory holds the parts in flight, one of which is being filled; each
part is repeated on its own, from its own bytes; a failed upload is aborted, what a killed one leaves is swept later.
Guards against: a lost answer to the last request, which makes its repetition fail with "no such upload": then the
object is looked for, under a name that nobody else ever uses.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from io import BytesIO
from typing import Any

from shared.errors import StoreError

PART_BYTES = 16 << 20
MAX_PARTS = 10_000  # S3's own limit
IN_FLIGHT = 4

Request = Callable[..., Mapping[str, Any]]


def part_bytes(size: int) -> int:
    """The size of each part but the last: PART_BYTES, or as many whole MiB as MAX_PARTS of them need."""
    needed = -(-size // MAX_PARTS)
    return max(PART_BYTES, -(-needed // (1 << 20)) << 20)


def regroup(chunks: Iterable[memoryview], length: int) -> Iterator[BytesIO]:
    """The same bytes in pieces of `length`, the last one shorter; copied, so that the chunks' owner may go on."""
    piece = BytesIO()
    for chunk in chunks:
        rest = chunk
        while len(rest):
            taken = rest[: length - piece.tell()]
            piece.write(taken)
            rest = rest[len(taken) :]
            if piece.tell() == length:
                full, piece = piece, BytesIO()
                yield full
                del full  # before the next one fills
    if piece.tell():
        yield piece


def upload(request: Request, chunks: Iterable[memoryview], size: int, stands: Callable[[], bool]) -> None:
    """Upload an object of more than one part.

    Args:
        request: makes one S3 call, repeating it as may be: request("upload_part", PartNumber=1, ...). Bucket and key
            are its own.
        chunks: exactly `size` bytes, or an error that leaves as it is.
        stands: whether the whole object is there.

    Raises:
        StoreError: a request failed; the upload was aborted.
    """
    upload_id = request("create_multipart_upload")["UploadId"]
    try:
        parts = _send(request, upload_id, regroup(chunks, part_bytes(size)))
        try:
            request("complete_multipart_upload", UploadId=upload_id, MultipartUpload={"Parts": parts})
        except StoreError:
            if not stands():
                raise
    except BaseException:
        with contextlib.suppress(StoreError):  # what went wrong matters more; `sweep` finds it
            request("abort_multipart_upload", UploadId=upload_id)
        raise


def _send(request: Request, upload_id: str, pieces: Iterator[BytesIO]) -> list[dict[str, Any]]:
    """Send the parts, IN_FLIGHT at a time; the list that completes the upload. A part is filled when its turn comes."""

    def send(number: int, piece: BytesIO) -> dict[str, Any]:
        answer = request("upload_part", UploadId=upload_id, PartNumber=number, Body=piece)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    parts: list[dict[str, Any]] = []
    pending: set[Future[dict[str, Any]]] = set()
    with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="upload") as pool:
        for number in itertools.count(1):
            if len(pending) == IN_FLIGHT:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                parts.extend(future.result() for future in done)
            piece = next(pieces, None)
            if piece is None:
                break
            pending.add(pool.submit(send, number, piece))
            del piece  # the last to hold it is who sends it
        parts.extend(future.result() for future in pending)
    return sorted(parts, key=lambda part: int(part["PartNumber"]))
