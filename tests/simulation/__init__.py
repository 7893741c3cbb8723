"""A whole federation in one thread, on a clock that only jumps: one seed, one history.

Real, the very code that is shipped:
    the pure workflow; `RunActor`, `Ledger`, `Shelf`, `Runs`, `Retention`, `ClientManager`,
    `RequestRelay`, `TrainingService` and both FL servicers; `FileBlobStore` on both sides;
    `TaskLoop`, `Spool`, `SiteRuns`, `SiteRun`, `Session`, `RequestAgent`, the loops of
    `SiteClient`, the sites' states (`client.state`), `files.durable`, model files, codecs on both
    sides, and aggregation with its optimisers.
Modelled:
    event loop and clock (`world`), file systems (`disk`, `system`), gRPC: connections, calls and
    blob transfers (`network`), the state store: one log, group commit, durable before its future
    resolves (`server`), tokens but no certificates or signatures, and the job's process: training
    is a digest of model, seed, site and committed state (`site`).
Not here:
    consoles, the audit, TLS, staging, validation on demand, and the order of bytes in SQLite's
    own files.

`history` plays one seed, `faults` draws what goes wrong and what operators do, `invariants` says
what must hold, `pool` plays many, `mutations` breaks the program to prove that this is found.
"""
