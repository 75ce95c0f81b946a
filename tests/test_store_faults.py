"""What each library's own exceptions are read as: made by the library's own code where it has any for that."""

import json
from datetime import UTC, datetime
from typing import Any

import adlfs
import botocore.exceptions
import fsspec
import gcsfs.core
import gcsfs.retry
import pytest
from azure.core.exceptions import (
    ClientAuthenticationError,
    HttpResponseError,
    ResourceExistsError,
    ResourceNotFoundError,
    ServiceRequestError,
)
from s3fs.errors import translate_boto_error

from shared.errors import KeyMissing, StoreError
from shared.object_store import ObjectStore, modified
from shared.retry import Fault, Retry
from shared.store_faults import diagnose, status_of, symptoms_of

URL = "gs://bucket/run"


def fault(error: Exception, op: str = "get") -> Fault:
    return diagnose(symptoms_of(error), url=URL, op=op, key="policy/LATEST")


def google(status: int, message: str = "no") -> Exception:
    """As gcsfs reads an answer of Google's."""
    content = json.dumps({"error": {"code": status, "message": message}}).encode()
    with pytest.raises(Exception) as caught:
        gcsfs.retry.validate_response(status, content, "b/bucket/o/{}", ["policy/LATEST"])
    return caught.value


class _Answer:
    """What azure-core asks of an answer to make an error of it."""

    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.status_code, self.reason, self.headers = status, "no", headers or {}

    def text(self, *_: Any) -> str:
        return ""


def azure(kind: type[HttpResponseError], status: int, code: str = "", **headers: str) -> HttpResponseError:
    error = kind(message="no", response=_Answer(status, headers))
    error.error_code = code  # type: ignore[attr-defined] - as azure.storage.blob does it
    return error


def s3(status: int, code: str, **headers: str) -> Exception:
    """As s3fs hands on an answer of S3's."""
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": headers}
    answer = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": metadata}
    return translate_boto_error(botocore.exceptions.ClientError(answer, "GetObject"))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "error",
    [google(404), azure(ResourceNotFoundError, 404, "BlobNotFound"), s3(404, "NoSuchKey"), FileNotFoundError("a")],
)
def test_an_absent_object_is_missing_and_no_other_operation_says_so(error: Exception):
    if isinstance(error, ResourceNotFoundError):  # adlfs raises Python's own from it
        absent = FileNotFoundError("a")
        absent.__cause__ = error
        error = absent
    assert isinstance(fault(error).error, KeyMissing)
    assert not isinstance(fault(error, "put").error, KeyMissing)


@pytest.mark.parametrize("error", [azure(ResourceNotFoundError, 404, "ContainerNotFound"), s3(404, "NoSuchBucket")])
def test_an_absent_bucket_is_named(error: Exception):
    for op in ("get", "put", "list"):
        assert "no bucket 'bucket'" in fault(error, op).error.message
        assert not isinstance(fault(error, op).error, KeyMissing)


@pytest.mark.parametrize(
    "error",
    [
        google(403),
        google(401),
        azure(ClientAuthenticationError, 403, "AuthenticationFailed"),
        s3(403, "SignatureDoesNotMatch"),
        s3(403, "RequestTimeTooSkewed"),
        PermissionError("no"),
    ],
)
def test_refused_credentials_are_told_and_not_tried_again(error: Exception):
    told = fault(error).error
    assert "refuses these credentials" in told.message and not told.retryable


@pytest.mark.parametrize(
    ("error", "throttled"),
    [
        (google(500), False),
        (google(502), False),
        (google(503), False),
        (google(429), True),
        (azure(HttpResponseError, 503, "ServerBusy"), True),
        (azure(HttpResponseError, 500, "InternalError"), False),
        (azure(HttpResponseError, 409, "LeaseIdMissing"), False),
        (s3(503, "SlowDown"), True),
        (s3(503, "ServiceUnavailable"), False),
        (s3(200, "InternalError"), False),  # S3 begins its answer to Complete before it knows
        (s3(409, "ConditionalRequestConflict"), False),
        (ServiceRequestError("refused"), False),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"), False),
        (botocore.exceptions.ProxyConnectionError(proxy_url="http://x", error="refused"), False),
        (botocore.exceptions.SSLError(endpoint_url="https://x", error="EOF in violation of protocol"), False),
        (TimeoutError("16 bytes not given within 25 s"), False),
        (ConnectionResetError("reset"), False),
    ],
)
def test_passing_faults_may_be_tried_again_and_throttling_is_known(error: Exception, throttled: bool):
    found = fault(error)
    assert found.error.retryable and found.throttled == throttled


@pytest.mark.parametrize(
    "error", [google(400, "invalid name"), s3(400, "InvalidArgument"), ValueError("no"), google(412)]
)
def test_lasting_faults_are_not_tried_again(error: Exception):
    assert not fault(error).error.retryable


def test_what_a_server_asks_for_is_read_from_its_headers():
    assert fault(s3(503, "SlowDown", **{"retry-after": "7"})).leave_alone_s == 7
    assert fault(azure(HttpResponseError, 503, "ServerBusy", **{"Retry-After": "9"})).leave_alone_s == 9
    assert fault(google(503)).leave_alone_s == 0


def test_a_name_that_is_taken_and_one_that_is_busy_are_told_apart():
    assert isinstance(google(412), FileExistsError)
    assert status_of(s3(412, "PreconditionFailed")) == 412
    assert status_of(s3(409, "ConditionalRequestConflict")) == 409
    assert (
        status_of(azure(ResourceExistsError, 409, "BlobAlreadyExists")) == 409
    )  # adlfs: FileExistsError, whatever code


class _Busy(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Says "exists" once where nothing is, as Azure's client does for each 409; then creates."""

    protocol = "busy"
    objects: dict[str, bytes]

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self.objects, self.refusals = {}, 1

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        if mode == "create" and (path in self.objects or self.refusals):
            self.refusals -= 1
            raise FileExistsError(path)
        self.objects[path] = value

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": len(self.cat_file(path)), "type": "file"}

    def cat_file(self, path: str, **_: Any) -> bytes:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]


def test_a_name_refused_as_existing_where_nothing_is_is_tried_again():
    fsspec.register_implementation("busy", _Busy, clobber=True)
    store = ObjectStore("busy://bucket/run", {}, Retry(sleep=lambda _: None))
    assert store.put_if_absent("m/a", b"ours")
    assert not store.put_if_absent("m/a", b"theirs")


def test_google_and_azure_create_on_condition(monkeypatch: pytest.MonkeyPatch):
    """mode="create" becomes Google's ifGenerationMatch=0 and Azure's overwrite=False."""
    asked: list[dict[str, Any]] = []

    async def call(_: Any, *__: Any, **keywords: Any) -> dict[str, Any]:
        asked.append(keywords)
        raise google(412)

    monkeypatch.setattr(gcsfs.core.GCSFileSystem, "_call", call)
    google_fs = ObjectStore(URL, {"token": "anon"})._fs
    with pytest.raises(FileExistsError):
        google_fs.pipe_file("bucket/m/a", b"x", mode="create")
    assert asked[0]["ifGenerationMatch"] == "0"

    class Blob:
        async def __aenter__(self) -> "Blob":
            return self

        async def __aexit__(self, *_: Any) -> None:
            pass

        async def upload_blob(self, **keywords: Any) -> None:
            asked.append(keywords)
            raise azure(ResourceExistsError, 409, "BlobAlreadyExists")

    azure_fs = adlfs.AzureBlobFileSystem(account_name="a", anon=True, skip_instance_cache=True)
    monkeypatch.setattr(azure_fs, "service_client", type("Service", (), {"get_blob_client": lambda *_, **__: Blob()})())
    with pytest.raises(FileExistsError):
        azure_fs.pipe_file("bucket/m/a", b"x", mode="create")
    assert asked[1]["overwrite"] is False


def test_the_time_of_an_object_is_read_from_what_each_library_calls_it():
    when = datetime(2026, 11, 23, 17, 0, tzinfo=UTC)
    of_google = ObjectStore(URL, {"token": "anon"})._fs._process_object(
        "bucket",
        {"name": "m/a", "size": "1", "updated": "2026-11-23T17:00:00.000Z", "timeCreated": "2026-01-01T00:00:00Z"},
    )
    for info in (of_google, {"last_modified": when, "creation_time": None}, {"created": when.timestamp()}):
        assert modified(info) == when.timestamp()
    with pytest.raises(StoreError, match="does not say when"):
        modified({"name": "m/a", "size": 1})
