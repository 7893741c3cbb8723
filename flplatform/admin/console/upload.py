"""`upload_folder`: check, build, sign and upload a job, to be deployed and started later."""

import re

from flplatform.admin import units
from flplatform.admin.console.exchange import Refused, ask, data_of, persist
from flplatform.admin.console.packing import (
    pack_source,
    read_source,
    starting_point,
    upload,
    upload_id,
)
from flplatform.admin.console.transport import GrpcTransport
from flplatform.admin.modules.steps import STAGE
from flplatform.core.config import NAME_PATTERN
from flplatform.core.errors import InvalidArgumentError
from flplatform.files.scratch import scratch_folder
from flplatform.hci.connection import ExitCode
from flplatform.hci.shell import Shell


async def upload_folder(transport: GrpcTransport, argv: list[str], shell: Shell) -> int:
    """Stage a job on the server and return the exit code.

    Raises:
        FLError: what is wrong with the job, or why it is refused.
        OSError: a file cannot be read.
    """
    values, kit = shell.parse(argv), transport.credentials.kit
    source = read_source(values["job"], kit.folder / "transfer")
    name = values["name"] or source.job.name
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidArgumentError(f"{name[:80]!r} is not 1 to 63 of a-z 0-9 . _ -", field="--as")
    with scratch_folder("fl-upload-") as folder:
        try:
            start = await starting_point(transport, shell, source, folder)
            packed = pack_source(transport.credentials, source, start, folder)
            author = kit.admin.name
            await upload(transport, shell, packed, upload_id(author, name, start.blob))
            words = [STAGE, name, packed.blob.digest]
            job = data_of(await persist(shell, lambda: ask(transport, shell, words)), "job")
        except Refused as refused:
            return refused.exit_code
    parameters = units.count(int(job["parameters"]), "parameter")
    size = units.size(packed.upload_bytes)
    text = f"uploaded {size} · signed by {author} · staged as {name} ({parameters})"
    shell.show({"type": "text", "text": text})
    shell.show({"type": "data", "name": "job", "value": job})
    return ExitCode.OK
