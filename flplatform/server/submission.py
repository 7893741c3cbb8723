"""What a submitted job must be to run here, and the event that it opens a run with."""

import base64

from flplatform.algorithms.codecs import check_codec
from flplatform.algorithms.recipes import check_recipe
from flplatform.core import events as ev
from flplatform.core.errors import InvalidArgumentError
from flplatform.core.job import check_targets
from flplatform.core.messages import ModelRef
from flplatform.core.model import Manifest
from flplatform.security.identity import Identity
from flplatform.security.package import Package


def opened_by(
    package: Package,
    submitter: Identity,
    *,
    order: bytes,
    submission_id: str,
    blob: ModelRef,
    sites: tuple[str, ...],
    min_clients: int | None,
    manifest: Manifest,
    model_bytes: int,
) -> ev.RunOpened:
    """Check a submission; return the first event of its run, which has no number yet.

    Args:
        package: the opened package, lying in `blob`.
        submitter: who signed `order`.
        order: the signed start.
        submission_id: what the start is called.
        blob: the package's.
        sites: the run's targets.
        min_clients: its quorum; None for the job's.
        manifest: the tensors of the initial model.
        model_bytes: size of the initial model's file.

    Raises:
        FLError: the job cannot run here, and why.
    """
    job = package.job
    quorum = job.min_clients if min_clients is None else min_clients
    check_targets(sites, quorum)
    if quorum < 1:
        raise InvalidArgumentError(f"is {quorum}; at least 1", field="min_clients")
    check_recipe(job, manifest, quorum)
    for codec in (job.codec, job.codec_down):
        check_codec(codec, manifest)
    if package.model.size != model_bytes:
        raise InvalidArgumentError(
            f"is {package.model.size}, the initial model has {model_bytes} bytes",
            field="model_size",
        )
    return ev.RunOpened(
        run=0,
        job=job,
        job_blob=ev.Blob(digest=blob.digest, size=blob.size),
        submission_id=submission_id,
        submitter=submitter.name,
        submitter_organisation=submitter.organisation,
        order=base64.b64encode(order).decode(),
        sites=tuple(sorted(sites)),
        min_clients=quorum,
        initial_model=ev.Blob(digest=package.model.digest, size=package.model.size),
    )
