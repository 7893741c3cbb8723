from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("protocol", "version", "isolation", "runs")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ISOLATION_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    isolation: str
    runs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., isolation: _Optional[str] = ..., runs: _Optional[_Iterable[int]] = ...) -> None: ...

class RegisterReply(_message.Message):
    __slots__ = ("token", "heartbeat_s", "dead_after_s", "chunk_bytes")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    DEAD_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    token: str
    heartbeat_s: float
    dead_after_s: float
    chunk_bytes: int
    def __init__(self, token: _Optional[str] = ..., heartbeat_s: _Optional[float] = ..., dead_after_s: _Optional[float] = ..., chunk_bytes: _Optional[int] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RunReport]
    def __init__(self, runs: _Optional[_Iterable[_Union[RunReport, _Mapping]]] = ...) -> None: ...

class RunReport(_message.Message):
    __slots__ = ("run", "round", "phase", "since_s", "isolation")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    ISOLATION_FIELD_NUMBER: _ClassVar[int]
    run: int
    round: int
    phase: str
    since_s: float
    isolation: str
    def __init__(self, run: _Optional[int] = ..., round: _Optional[int] = ..., phase: _Optional[str] = ..., since_s: _Optional[float] = ..., isolation: _Optional[str] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class QuitRequest(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class QuitReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTaskRequest(_message.Message):
    __slots__ = ("held", "runs")
    HELD_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    held: _containers.RepeatedScalarFieldContainer[str]
    runs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, held: _Optional[_Iterable[str]] = ..., runs: _Optional[_Iterable[int]] = ...) -> None: ...

class GetTaskReply(_message.Message):
    __slots__ = ("tasks", "ended")
    TASKS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    tasks: _containers.RepeatedCompositeFieldContainer[Task]
    ended: _containers.RepeatedCompositeFieldContainer[EndedRun]
    def __init__(self, tasks: _Optional[_Iterable[_Union[Task, _Mapping]]] = ..., ended: _Optional[_Iterable[_Union[EndedRun, _Mapping]]] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("id", "model", "seed", "run", "round", "kind", "codec", "wire", "wire_codec")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    WIRE_CODEC_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: Blob
    seed: int
    run: int
    round: int
    kind: str
    codec: str
    wire: Blob
    wire_codec: str
    def __init__(self, id: _Optional[str] = ..., model: _Optional[_Union[Blob, _Mapping]] = ..., seed: _Optional[int] = ..., run: _Optional[int] = ..., round: _Optional[int] = ..., kind: _Optional[str] = ..., codec: _Optional[str] = ..., wire: _Optional[_Union[Blob, _Mapping]] = ..., wire_codec: _Optional[str] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("digest", "size")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size: int
    def __init__(self, digest: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class EndedRun(_message.Message):
    __slots__ = ("run", "status")
    RUN_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    run: int
    status: str
    def __init__(self, run: _Optional[int] = ..., status: _Optional[str] = ...) -> None: ...

class SubmitResultRequest(_message.Message):
    __slots__ = ("task_id", "result", "failure")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    result: TaskOutcome
    failure: TaskFailure
    def __init__(self, task_id: _Optional[str] = ..., result: _Optional[_Union[TaskOutcome, _Mapping]] = ..., failure: _Optional[_Union[TaskFailure, _Mapping]] = ...) -> None: ...

class TaskOutcome(_message.Message):
    __slots__ = ("blob", "examples", "metrics", "received", "received_examples", "trained_from")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class ReceivedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    BLOB_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    TRAINED_FROM_FIELD_NUMBER: _ClassVar[int]
    blob: Blob
    examples: int
    metrics: _containers.ScalarMap[str, float]
    received: _containers.ScalarMap[str, float]
    received_examples: int
    trained_from: str
    def __init__(self, blob: _Optional[_Union[Blob, _Mapping]] = ..., examples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., received: _Optional[_Mapping[str, float]] = ..., received_examples: _Optional[int] = ..., trained_from: _Optional[str] = ...) -> None: ...

class TaskFailure(_message.Message):
    __slots__ = ("error", "traceback")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    error: str
    traceback: str
    def __init__(self, error: _Optional[str] = ..., traceback: _Optional[str] = ...) -> None: ...

class SubmitResultReply(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: str
    def __init__(self, outcome: _Optional[str] = ...) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("received",)
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    received: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, received: _Optional[_Iterable[str]] = ...) -> None: ...

class RetrieveReply(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[SiteRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[SiteRequest, _Mapping]]] = ...) -> None: ...

class SiteRequest(_message.Message):
    __slots__ = ("id", "topic", "signed", "body")
    ID_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    id: str
    topic: str
    signed: bytes
    body: bytes
    def __init__(self, id: _Optional[str] = ..., topic: _Optional[str] = ..., signed: _Optional[bytes] = ..., body: _Optional[bytes] = ...) -> None: ...

class SiteReply(_message.Message):
    __slots__ = ("request_id", "status", "body", "message", "rule")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    status: str
    body: bytes
    message: str
    rule: str
    def __init__(self, request_id: _Optional[str] = ..., status: _Optional[str] = ..., body: _Optional[bytes] = ..., message: _Optional[str] = ..., rule: _Optional[str] = ...) -> None: ...

class SiteResult(_message.Message):
    __slots__ = ("topic", "body")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    topic: str
    body: bytes
    def __init__(self, topic: _Optional[str] = ..., body: _Optional[bytes] = ...) -> None: ...

class ChallengeReply(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class LoginRequest(_message.Message):
    __slots__ = ("nonce", "password", "user_file", "user_signature")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PASSWORD_FIELD_NUMBER: _ClassVar[int]
    USER_FILE_FIELD_NUMBER: _ClassVar[int]
    USER_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    password: str
    user_file: bytes
    user_signature: bytes
    def __init__(self, nonce: _Optional[bytes] = ..., password: _Optional[str] = ..., user_file: _Optional[bytes] = ..., user_signature: _Optional[bytes] = ...) -> None: ...

class LoginReply(_message.Message):
    __slots__ = ("token", "user", "role", "organisation", "project", "server", "version", "server_days_left")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ORGANISATION_FIELD_NUMBER: _ClassVar[int]
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVER_DAYS_LEFT_FIELD_NUMBER: _ClassVar[int]
    token: str
    user: str
    role: str
    organisation: str
    project: str
    server: str
    version: str
    server_days_left: float
    def __init__(self, token: _Optional[str] = ..., user: _Optional[str] = ..., role: _Optional[str] = ..., organisation: _Optional[str] = ..., project: _Optional[str] = ..., server: _Optional[str] = ..., version: _Optional[str] = ..., server_days_left: _Optional[float] = ...) -> None: ...

class SpecsReply(_message.Message):
    __slots__ = ("specs",)
    SPECS_FIELD_NUMBER: _ClassVar[int]
    specs: bytes
    def __init__(self, specs: _Optional[bytes] = ...) -> None: ...

class ExecuteRequest(_message.Message):
    __slots__ = ("signed", "attachment", "confirmed")
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    ATTACHMENT_FIELD_NUMBER: _ClassVar[int]
    CONFIRMED_FIELD_NUMBER: _ClassVar[int]
    signed: bytes
    attachment: bytes
    confirmed: bool
    def __init__(self, signed: _Optional[bytes] = ..., attachment: _Optional[bytes] = ..., confirmed: bool = ...) -> None: ...

class ReplyItem(_message.Message):
    __slots__ = ("item",)
    ITEM_FIELD_NUMBER: _ClassVar[int]
    item: bytes
    def __init__(self, item: _Optional[bytes] = ...) -> None: ...

class CompleteRequest(_message.Message):
    __slots__ = ("kind", "prefix")
    KIND_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    kind: str
    prefix: str
    def __init__(self, kind: _Optional[str] = ..., prefix: _Optional[str] = ...) -> None: ...

class CompleteReply(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: int
    def __init__(self, run: _Optional[int] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("prompt", "toolbar")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TOOLBAR_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    toolbar: str
    def __init__(self, prompt: _Optional[str] = ..., toolbar: _Optional[str] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("transfer_id", "blob")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    blob: Blob
    def __init__(self, transfer_id: _Optional[str] = ..., blob: _Optional[_Union[Blob, _Mapping]] = ...) -> None: ...

class UploadCommit(_message.Message):
    __slots__ = ("blob",)
    BLOB_FIELD_NUMBER: _ClassVar[int]
    blob: Blob
    def __init__(self, blob: _Optional[_Union[Blob, _Mapping]] = ...) -> None: ...

class UploadReply(_message.Message):
    __slots__ = ("committed",)
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    committed: bool
    def __init__(self, committed: bool = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: str
    offset: int
    def __init__(self, digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...
