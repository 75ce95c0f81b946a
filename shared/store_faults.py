"""What the errors of the libraries below mean: wrong bucket, wrong key, passing fault, too many requests.

Each client reads its own library's exceptions into `Symptoms`; what they mean to the caller is said once, here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from shared.errors import KeyMissing, StoreError
from shared.retry import Fault

NO_BUCKET_CODES = {"NoSuchBucket", "ContainerNotFound"}
REFUSED_CODES = {
    "403",
    "AccessDenied",
    "AuthenticationFailed",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
}
PASSING_CODES = {"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "500", "502", "503", "504"}
THROTTLED_CODES = {"SlowDown", "ServerBusy", "Throttling", "ThrottlingException", "TooManyRequests", "429"}
PASSING_STATUSES = {408, 409, 429}  # and all from 500 on. 409: two conditional writes met, neither was done

# Names of exceptions, which are not imported: each scheme has its own library.
NO_CREDENTIALS_ERRORS = {
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "RefreshError",
}
REFUSED_ERRORS = {"ClientAuthenticationError", "PermissionDeniedError", "PermissionError", "UnauthenticatedError"}
PASSING_ERRORS = {
    "ChecksumError",
    "ClientConnectorError",
    "ClientOSError",
    "ClientPayloadError",
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "ConnectionTimeoutError",
    "EndpointConnectionError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ProxyConnectionError",
    "ProxyError",
    "ReadTimeoutError",
    "ResponseParserError",
    "ResponseStreamingError",
    "SSLError",
    "ServerDisconnectedError",
    "ServiceRequestError",
    "ServiceResponseError",
    "SocketTimeoutError",
}


@dataclass(frozen=True)
class Symptoms:
    """What a library's exception shows.

    Attributes:
        text: for a person.
        names: classes of the exception and of what it came from.
        codes: the store's own words (S3's "SlowDown").
        status: of HTTP, where there was an answer.
        leave_alone_s: its Retry-After.
        missing: it says that something isn't there.
        passing: it is one of Python's own passing faults.
    """

    text: str
    names: frozenset[str] = frozenset()
    codes: frozenset[str] = frozenset()
    status: int | None = None
    leave_alone_s: float = 0.0
    missing: bool = False
    passing: bool = False


def diagnose(symptoms: Symptoms, *, url: str, op: str, key: str) -> Fault:
    """The error that the caller gets, and what the server wishes."""
    if symptoms.codes & NO_BUCKET_CODES:
        bucket = url.partition("://")[2].split("/", 1)[0]
        return Fault(StoreError(f"no bucket {bucket!r} in {url}", op=op, key=key, hint="Create it, or mend the URL"))
    if symptoms.names & NO_CREDENTIALS_ERRORS:
        hint = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or your scheme's variables), or [store.options]"
        return Fault(StoreError(f"no credentials for {url}: {symptoms.text}", op=op, key=key, hint=hint))
    if symptoms.status in (401, 403) or symptoms.codes & REFUSED_CODES or symptoms.names & REFUSED_ERRORS:
        problem = f"{url} refuses these credentials: {symptoms.text}"
        return Fault(StoreError(problem, op=op, key=key, hint="Check key and policy"))
    if symptoms.missing and op == "get":
        return Fault(KeyMissing("no such object", op=op, key=key))
    if symptoms.missing:
        hint = "Does it exist, and is the endpoint a store of this kind?"
        return Fault(StoreError(f"{url} is not found there", op=op, key=key, hint=hint))
    throttled = symptoms.status == 429 or bool(symptoms.codes & THROTTLED_CODES)
    status = symptoms.status or 0
    passing = (
        throttled
        or symptoms.passing
        or status >= 500
        or status in PASSING_STATUSES
        or bool(symptoms.names & PASSING_ERRORS or symptoms.codes & PASSING_CODES)
    )
    hint = "Is the endpoint right and up?" if passing else ""
    if throttled:
        hint = "The store is asked too much: fewer nodes, or longer intervals"
    error = StoreError(f"{url}: {symptoms.text}", op=op, key=key, hint=hint, retryable=passing)
    return Fault(error, throttled, symptoms.leave_alone_s)


def symptoms_of(error: Exception) -> Symptoms:
    """Read an exception of fsspec, s3fs, gcsfs, adlfs or what lies below them."""
    links = chain(error)
    headers = next((found for link in links if (found := _headers(link))), {})
    unsaid = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    return Symptoms(
        text=str(error).strip() or unsaid,
        names=frozenset(type(link).__name__ for link in links),
        codes=frozenset(code for link in links if (code := _code(link))),
        status=status_of(error),
        leave_alone_s=leave_alone_s(headers.get("retry-after", ""), headers.get("date", "")),
        missing=isinstance(error, FileNotFoundError),
        passing=isinstance(error, TimeoutError | ConnectionError),
    )


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an exception or in what it came from: boto's response, Google's code, Azure's status_code."""
    for link in chain(error):
        boto = _response(link).get("ResponseMetadata", {}).get("HTTPStatusCode")
        for status in (boto, getattr(link, "status_code", None), getattr(link, "code", None)):
            if isinstance(status, int):
                return status
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):  # gcsfs keeps nothing but the words
        return 403
    return None


def chain(error: BaseException) -> list[BaseException]:
    """An exception and, from the last to the first, what it came from."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links


def leave_alone_s(retry_after: str, date: str) -> float:
    """What Retry-After asks for: seconds, or a time, which counts from the same answer's Date. 0 if it says nothing."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - parsedate_to_datetime(date)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def _response(error: BaseException) -> Mapping[str, Any]:
    response = getattr(error, "response", None)
    return response if isinstance(response, dict) else {}


def _headers(error: BaseException) -> Mapping[str, str]:
    boto = _response(error).get("ResponseMetadata", {}).get("HTTPHeaders")
    found = boto or getattr(getattr(error, "response", None), "headers", None) or getattr(error, "headers", None)
    try:
        return {str(name).lower(): str(value) for name, value in dict(found or {}).items()}
    except (TypeError, ValueError):
        return {}


def _code(error: BaseException) -> str:
    azure = getattr(error, "error_code", None)
    return str(_response(error).get("Error", {}).get("Code", "") or getattr(azure, "value", azure) or "")
